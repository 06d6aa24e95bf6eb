"""The HTTP interface: what may be asked, who may ask, and what is refused. Plain ASGI; docs/serve.md shows it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.views.answers import Representations, answer
from serve import answers, openapi, page
from serve.answers import JSON, SAFETENSORS, Answer, Refused
from serve.metrics import Metrics
from serve.nearest import WITHIN, nearest
from serve.options import Limits
from serve.questions import Question, Receive, Scope, Send, body_of, key_of, object_of, parameters, question
from serve.replica import Replica
from serve.serving import Served, Serving

log = logging.getLogger(__name__)

MAX_NEAREST = 100
READERS = 4  # threads that read the disk
_TEXT = b"text/plain; version=0.0.4; charset=utf-8"
_OPEN = (b"healthz", b"ready", b"", b"page")  # what a balancer asks needs no token, and the page asks people for theirs


@dataclass
class App:
    """Answers for all entities of a space. A request is of the space that was served when it came, from its first line to its last.

    Args:
        tokens: one of them must be shown; empty: nobody is asked.
        waiting: how many requests were received and not yet answered.
    """

    served: Served
    limits: Limits
    tokens: list[bytes]
    waiting: Callable[[], int]

    def __post_init__(self) -> None:
        self._readers = ThreadPoolExecutor(READERS, "read")
        self.metrics = Metrics(self.served, self.waiting)
        self._searchers = ThreadPoolExecutor(self.limits.searches, "nearest")
        self._searching = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        path = [unquote_to_bytes(part) for part in scope["raw_path"].split(b"/")[1:]]
        route, now = "other", self.served.enter()
        try:
            route, handler = self._route(now, scope, path)
            answer = await handler(scope, receive)
        except Refused as refused:
            answer = refused.answer
        except CrossrepError as error:
            answer = unavailable(str(error), "ask another replica; this one ends, and a restart mends it").answer
        except Exception:
            log.exception("a request failed")
            answer = Refused(500, "a fault of the replica", "its log says more; ask another replica").answer
        finally:
            now.leave()
        head = [(b"content-type", answer.content_type), (b"content-length", b"%d" % len(answer.body)), *answer.headers]
        with contextlib.suppress(RuntimeError):  # what uvloop calls a connection that was cut off this moment
            await send({"type": "http.response.start", "status": answer.status, "headers": head})
            await send({"type": "http.response.body", "body": answer.body})
        requests, seconds = self.metrics.of(route, answer.status)
        requests.inc()
        seconds.observe(time.perf_counter() - started)

    def _route(self, now: Serving, scope: Scope, path: list[bytes]) -> tuple[str, Callable[[Scope, Receive], Awaitable[Answer]]]:
        """The handler of a request that may be asked now. Raises Refused."""
        if not path or path[0] not in _OPEN:
            self._authorise(scope)
        match path:
            case [b"healthz"]:
                route, method, handler = "healthz", "GET", self._healthz
            case [b"ready"]:
                route, method, handler = "ready", "GET", functools.partial(self._ready, now)
            case [b"metrics"]:
                route, method, handler = "metrics", "GET", self._metrics
            case [b"openapi.json"]:
                route, method, handler = "openapi", "GET", functools.partial(self._openapi, now)
            case [b""]:
                route, method, handler = "page", "GET", functools.partial(self._page, b"index.html")
            case [b"page", name]:
                route, method, handler = "page", "GET", functools.partial(self._page, name)
            case [b"v1", b"status"]:
                route, method, handler = "status", "GET", functools.partial(self._status, now)
            case [b"v1", b"space"]:
                route, method, handler = "space", "GET", functools.partial(self._space, now)
            case [b"v1", entity, b"batch"]:
                route, method, handler = "batch", "POST", functools.partial(self._batch, now, _replica(now, entity))
            case [b"v1", entity, id]:
                route, method, handler = "point", "GET", functools.partial(self._point, now, _replica(now, entity), id)
            case [b"v1", entity, id, b"nearest"]:
                route, method, handler = "nearest", "GET", functools.partial(self._nearest, now, _replica(now, entity), id)
            case _:
                raise Refused(404, "there is nothing here", "/openapi.json lists what there is")
        if scope["method"] != method:
            hint = "; a key that is called batch is asked for in a batch" if route == "batch" else ""
            raise Refused(405, f"{scope['method']} is not answered here", f"use {method}{hint}", (b"allow", method.encode()))
        if path[0] == b"v1" and self.waiting() > self.limits.waiting:
            raise unavailable(f"{self.waiting()} requests are waiting", "try again, or ask another replica", 1)
        return route, handler

    def _authorise(self, scope: Scope) -> None:
        if not self.tokens:
            return
        shown = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, token = shown.partition(b" ")
        # Compared with every token, in constant time.
        known = [hmac.compare_digest(token.strip(), each) for each in self.tokens]
        if kind.lower() != b"bearer" or not any(known):
            raise Refused(401, "no valid token", "send the header Authorization: Bearer TOKEN", (b"www-authenticate", b"Bearer"))

    # --- Look-ups ---

    async def _point(self, now: Serving, replica: Replica, id: bytes, scope: Scope, receive: Receive) -> Answer:
        options = question(replica.layout, scope, parameters(scope, {"at", "columns"}))
        found = await self._look_up(replica, [key_of(id)], options)
        name = id.decode()
        if not found.found[0]:
            raise Refused(404, f"no {replica.entity} {name!r}", "the key was never seen, has expired or was forgotten")
        if options.accept == SAFETENSORS:
            return Answer(200, answers.tensors(_about(now, replica), found, now.weighted[replica.entity]), SAFETENSORS)
        return Answer(200, answers.point(_about(now, replica), name, found, now.weighted[replica.entity]))

    async def _batch(self, now: Serving, replica: Replica, scope: Scope, receive: Receive) -> Answer:
        asked = object_of(await body_of(scope, receive, self.limits.body), {"ids", "at", "columns"})
        ids = asked.get("ids")
        if not isinstance(ids, list) or not set(map(type, ids)) <= {str}:
            raise Refused(400, "ids is not a list of strings", 'send {"ids": ["17", "4711"]}')
        if len(ids) > self.limits.keys:
            raise Refused(413, f"{len(ids)} ids are too many", f"send {self.limits.keys} at most in one batch")
        options = question(replica.layout, scope, asked)
        found = await self._look_up(replica, ids, options)
        encode, kind = (answers.tensors, SAFETENSORS) if options.accept == SAFETENSORS else (answers.batch, JSON)
        return Answer(200, encode(_about(now, replica), found, now.weighted[replica.entity]), kind)

    async def _nearest(self, now: Serving, replica: Replica, id: bytes, scope: Scope, receive: Receive) -> Answer:
        given = parameters(scope, {"column", "k"})
        key, name = key_of(id), id.decode()
        with_vectors = [name for name, column in replica.layout.columns.items() if column.dim]
        column = given.get("column", next(iter(with_vectors), ""))
        if column not in with_vectors:
            raise Refused(400, f"{replica.entity} has no vectors {column!r}", f"it has {', '.join(with_vectors) or 'none'}")
        text = given.get("k", "10")
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_NEAREST and len(text) < 9):
            raise Refused(400, f"k is {text!r}", f"send a number from 1 to {MAX_NEAREST}")
        self._caught_up(replica)
        if self._searching >= self.limits.searches:
            raise unavailable(f"{self._searching} searches are under way", "try again, or ask another replica", 1)
        self._searching += 1
        try:
            best = await asyncio.get_running_loop().run_in_executor(self._searchers, nearest, replica, column, key, int(text))
        except TimeoutError:
            raise unavailable(f"it takes longer than {WITHIN:g} s", "give the replica more memory (--memory-mb)", 60) from None
        finally:
            self._searching -= 1
        if best is None:
            raise Refused(404, f"no {replica.entity} {name!r}", "the key was never seen, has expired or was forgotten")
        found = [{"id": key.decode(errors="replace"), "cosine": cosine} for key, cosine in best]
        return Answer(200, answers.dumps(_about(now, replica) | {"id": name, "column": column, "nearest": found}))

    async def _look_up(self, replica: Replica, ids: list[str] | list[bytes], options: Question) -> Representations:
        self._caught_up(replica)
        try:
            keys = Keys.of(ids)
        except ValueError as error:
            raise Refused(400, str(error), "ids are UTF-8, as they are in the events") from None
        held = replica.held(keys)
        if held.whole or not held.missing:
            found, records = replica.read(keys, held)
        else:
            found, records = await asyncio.get_running_loop().run_in_executor(self._readers, replica.read, keys, held)
        self.metrics.keys.labels(replica.entity).inc(len(ids))
        self.metrics.unknown.labels(replica.entity).inc(int(len(found) - found.sum()))
        at = replica.stream_time if options.at is None else options.at
        return answer(replica.layout, keys, found, records, at, {}, options.columns)

    def _caught_up(self, replica: Replica) -> None:
        if not replica.caught_up:
            raise unavailable(f"the replica of {replica.entity} is still reading what there is", "ask another replica; /ready tells", 5)

    # --- The replica itself ---

    async def _healthz(self, scope: Scope, receive: Receive) -> Answer:
        return Answer(200, answers.dumps({"alive": True}))

    async def _ready(self, now: Serving, scope: Scope, receive: Receive) -> Answer:
        said: dict[str, Any] = {"ready": False, **self._of(now)}
        try:
            said["entities"] = {
                name: {"caught_up": r.caught_up, "lag": answers.lag(r), "applied": r.applied, "resumed": r.resumed}
                for name, r in now.replicas.items()
            }
            said["ready"] = now.caught_up and all(replica.staleness <= self.limits.max_lag for replica in now.replicas.values())
        except CrossrepError as error:
            said["error"] = str(error)
        return Answer(200 if said["ready"] else 503, answers.dumps(said), JSON, () if said["ready"] else ((b"retry-after", b"5"),))

    async def _metrics(self, scope: Scope, receive: Receive) -> Answer:
        return Answer(200, self.metrics.text(), _TEXT)

    async def _openapi(self, now: Serving, scope: Scope, receive: Receive) -> Answer:
        return Answer(200, answers.dumps(openapi.document(now.space, self.limits.keys, MAX_NEAREST, bool(self.tokens))))

    async def _page(self, name: bytes, scope: Scope, receive: Receive) -> Answer:
        return page.answer(name)

    async def _status(self, now: Serving, scope: Scope, receive: Receive) -> Answer:
        return Answer(200, answers.dumps(now.status.said() | self._of(now)), JSON, ((b"cache-control", b"no-store"),))

    async def _space(self, now: Serving, scope: Scope, receive: Receive) -> Answer:
        entities = {name: {"lag": answers.lag(r), "stream_time": r.stream_time} for name, r in now.replicas.items()}
        return Answer(200, answers.dumps(self._of(now) | {"spec": now.space.toml_dict, "entities": entities}))

    def _of(self, now: Serving) -> dict[str, Any]:
        alias = self.served.alias
        return {"space": now.space.name, "hash": now.hash} | ({"alias": alias} if alias else {})


def _replica(now: Serving, entity: bytes) -> Replica:
    replica = now.replicas.get(entity.decode(errors="replace"))
    if replica is None:
        raise Refused(404, f"no entity {entity.decode(errors='replace')!r}", f"this space has {', '.join(now.replicas)}")
    return replica


def _about(now: Serving, replica: Replica) -> dict[str, Any]:
    return answers.about(replica, now.space.name, now.hash)


def unavailable(error: str, fix: str, seconds: int = 1) -> Refused:
    """503: not now, or not here."""
    return Refused(503, error, fix, (b"retry-after", b"%d" % seconds))
