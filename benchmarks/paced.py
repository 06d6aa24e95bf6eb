"""Requests at a fixed rate, whether or not earlier ones have been answered: latencies count from when each was to be sent."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections import deque
from collections.abc import Callable
from typing import cast

import numpy as np
import uvloop

LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def http_end(answer: bytearray) -> int:
    """Bytes of an HTTP answer; -1 while its head has not come."""
    head = answer.find(b"\r\n\r\n")
    if head < 0:
        return -1
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(bytes(answer[:300]).decode())
    length = LENGTH.search(answer, 0, head)
    assert length is not None
    return head + 4 + int(length[1])


def fixed_end(size: int) -> Callable[[bytearray], int]:
    """Answers that all have the same length, such as Redis' of values of one length."""
    return lambda answer: size


class Connection(asyncio.Protocol):
    def __init__(self, free: Callable[[Connection], None], end: Callable[[bytearray], int]):
        self._free, self._end = free, end
        self._answer = bytearray()
        self._due, self._length = 0.0, -1
        self.latencies: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are, but do not say so

    def send(self, due: float, request: bytes) -> None:
        self._due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._length < 0:
            self._length = self._end(self._answer)
        if len(self._answer) == self._length:
            self.latencies.append(time.perf_counter() - self._due)
            self._answer, self._length = bytearray(), -1
            self._free(self)

    def close(self) -> None:
        self._transport.close()


async def _run(
    port: int, requests: list[bytes], rate: float, seconds: float, connections: int, end: Callable[[bytearray], int]
) -> np.ndarray:
    loop = asyncio.get_running_loop()
    idle: deque[Connection] = deque()
    waiting: deque[tuple[float, bytes]] = deque()

    def free(connection: Connection) -> None:
        if waiting:
            connection.send(*waiting.popleft())
        else:
            idle.append(connection)

    made = [(await loop.create_connection(lambda: Connection(free, end), "127.0.0.1", port))[1] for _ in range(connections)]
    idle.extend(made)
    total, sent, started = int(rate * seconds), 0, time.perf_counter() + 0.1
    while sent < total:
        due = started + sent / rate
        now = time.perf_counter()
        if due > now:
            await asyncio.sleep(due - now)
            continue
        if idle:
            idle.popleft().send(due, requests[sent % len(requests)])
        else:
            waiting.append((due, requests[sent % len(requests)]))
        sent += 1
        if sent % 8 == 0:
            await asyncio.sleep(0)
    while len(idle) < connections:
        await asyncio.sleep(0.01)
    for connection in made:
        connection.close()
    return np.concatenate([np.array(connection.latencies) for connection in made])


def paced(port: int, requests: list[bytes], rate: float, seconds: float, connections: int = 16, size: int = 0) -> dict[str, float]:
    """Milliseconds: p50, p99, p99.9 and the worst, of requests sent in turn, after a second of them that does not count.

    Args:
        size: bytes of every answer; 0: it is HTTP.
    """
    end = fixed_end(size) if size else http_end
    gc.disable()  # its own pauses are not what is measured

    async def both() -> np.ndarray:
        await _run(port, requests, rate, 1.0, connections, end)
        return await _run(port, requests, rate, seconds, connections, end)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        latencies = runner.run(both()) * 1000
    p50, p99, p999 = np.percentile(latencies, (50, 99, 99.9)).tolist()
    return {"requests": float(len(latencies)), "p50_ms": p50, "p99_ms": p99, "p999_ms": p999, "max_ms": float(latencies.max())}
