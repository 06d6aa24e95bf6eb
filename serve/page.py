"""The page's files, as they lie in serve/page/, with headers that let a browser load nothing else and run nothing else."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from serve.answers import Answer, Refused

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": b"text/html; charset=utf-8", ".css": b"text/css; charset=utf-8", ".js": b"text/javascript; charset=utf-8"}
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
)


@cache
def _files() -> dict[str, Answer]:
    return {file.name: Answer(200, file.read_bytes(), TYPES[file.suffix], HEADERS) for file in FOLDER.iterdir() if file.suffix in TYPES}


def answer(name: bytes = b"index.html") -> Answer:
    """One file. Raises Refused."""
    found = _files().get(name.decode(errors="replace"))
    if found is None:
        raise Refused(404, "the page has no such file", "GET / is the page")
    return found
