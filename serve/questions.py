"""What clients send, taken apart and checked: ids, parameters, bodies."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import orjson

from crossrep.columnar.records import RecordLayout
from crossrep.spec import MAX_KEY_BYTES
from serve.answers import JSON, SAFETENSORS, Refused

DRAINED = 4 << 20  # bytes of a body that is too large, taken and dropped before the answer; of a larger one nothing is read

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Question:
    """A look-up's options."""

    at: float | None
    columns: list[str] | None
    accept: bytes


def question(layout: RecordLayout, scope: Scope, asked: Mapping[str, Any]) -> Question:
    """The options of a look-up, from a query's parameters or a body. Raises Refused."""
    at, columns = asked.get("at"), asked.get("columns")
    if isinstance(at, str):  # a parameter
        try:
            at = float(at) if at.isascii() and "_" not in at else math.nan
        except ValueError:
            at = math.nan
    if "at" in asked and (type(at) not in (int, float) or not math.isfinite(at)):  # type: ignore[arg-type]
        raise Refused(400, "at is not a time", "send seconds since 1970, such as 1.65e9, or leave it out for the stream's own time")
    if isinstance(columns, str):
        columns = columns.split(",")
    if "columns" in asked and not (isinstance(columns, list) and all(type(c) is str and c in layout.columns for c in columns)):
        raise Refused(400, f"columns is not a list of {layout.entity}'s columns", f"it has {', '.join(layout.columns)}")
    accept = next((value for name, value in scope["headers"] if name == b"accept"), b"*/*")
    return Question(None if at is None else float(at), columns, SAFETENSORS if SAFETENSORS in accept else JSON)


def key_of(id: bytes) -> bytes:
    """An id of a path. Raises Refused."""
    try:
        id.decode()
    except UnicodeDecodeError:
        raise Refused(400, "the id is not UTF-8", "write it percent-encoded, such as %C3%BC for ü") from None
    if not 1 <= len(id) <= MAX_KEY_BYTES:
        raise Refused(400, f"the id has {len(id)} bytes", f"1 to {MAX_KEY_BYTES} are allowed")
    return id


def parameters(scope: Scope, allowed: set[str]) -> dict[str, str]:
    """The query's parameters. Raises Refused."""
    if not scope["query_string"]:
        return {}
    pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    given = dict(pairs)
    if len(given) < len(pairs) or not given.keys() <= allowed:
        raise Refused(400, "a parameter is unknown or given twice", f"send each of {', '.join(sorted(allowed))} once at most")
    return given


async def body_of(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole request body. Raises Refused."""
    length = int(next((value for name, value in scope["headers"] if name == b"content-length"), b"0"))
    parts, size, more = [], 0, True
    while more and max(length, size) <= max(limit, DRAINED):  # a client that is cut off while it sends never reads why
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the connection was closed", "send the whole body")
        more = message.get("more_body", False)
        size += len(message.get("body", b""))
        if size <= limit:
            parts.append(message.get("body", b""))
    if not more and size <= limit:
        return b"".join(parts)
    raise Refused(413, f"the body is larger than {limit} bytes", "send fewer ids at once", (b"connection", b"close"))


def object_of(body: bytes, allowed: set[str]) -> dict[str, Any]:
    """A JSON object with no other members than these. Raises Refused."""
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(400, f"the body is not JSON: {error}", 'send {"ids": ["17", "4711"]}') from None
    if not isinstance(asked, dict) or not asked.keys() <= allowed:
        raise Refused(400, "the body is not an object of ids, at and columns alone", 'send {"ids": ["17", "4711"]}')
    return asked
