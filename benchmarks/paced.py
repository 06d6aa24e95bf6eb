"""Requests at a fixed rate, whether or not earlier ones have been answered: latencies count from when each was to be sent."""

from __future__ import annotations

import gc
import re
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
HEAD = 1024  # bytes at most of an answer's head, which comes in one piece


def http_end(answer: bytes) -> int:
    """Bytes of an HTTP answer that begins like this."""
    head, length = answer.find(b"\r\n\r\n"), LENGTH.search(answer)
    if head < 0 or length is None or not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(answer.decode(errors="replace"))
    return head + 4 + int(length[1])


def fixed_end(size: int) -> Callable[[bytes], int]:
    """Answers that all have the same length, such as Redis' of values of one length."""
    return lambda answer: size


@dataclass(eq=False)
class Connection:
    """One request at a time."""

    socket: socket.socket
    due: float = 0.0  # when the request was to be sent, time.perf_counter()
    left: int = 0  # bytes of the answer still to come; 0: its length is not known yet

    def fileno(self) -> int:
        return self.socket.fileno()


@dataclass
class Times:
    """Seconds, of each request."""

    late: list[float] = field(default_factory=list)  # until it was sent, though a connection was free: the sender's own fault
    latency: list[float] = field(default_factory=list)  # until its answer was there


def _run(idle: list[Connection], requests: list[bytes], rate: float, seconds: float, end: Callable[[bytes], int]) -> Times:
    """One thread that sleeps until a request is due or an answer comes: an event loop's timers know whole milliseconds, and a loop that
    never sleeps takes one of two cores from whoever is measured."""
    times, busy, scratch = Times(), set[Connection](), memoryview(bytearray(1 << 20))
    total, sent, started, freed = int(rate * seconds), 0, time.perf_counter() + 0.1, 0.0
    while sent < total or busy:
        now, due = time.perf_counter(), started + sent / rate
        if sent < total and idle and due <= now:
            connection = idle.pop()
            if connection.socket.send(requests[sent % len(requests)]) < len(requests[sent % len(requests)]):
                raise RuntimeError("a request does not fit into an empty socket")
            times.late.append(now - max(due, freed))
            connection.due = due
            busy.add(connection)
            sent += 1
            continue
        timeout = due - now if sent < total and idle else 10.0
        for connection in select.select(busy, (), (), timeout)[0]:
            got = connection.socket.recv_into(scratch)
            if not got:
                raise RuntimeError("the connection was closed")
            connection.left = (connection.left or end(bytes(scratch[:HEAD]))) - got
            if connection.left == 0:
                times.latency.append(time.perf_counter() - connection.due)
                freed = freed if idle else time.perf_counter()
                busy.remove(connection)
                idle.append(connection)
    return times


def paced(port: int, requests: list[bytes], rate: float, seconds: float, connections: int = 16, size: int = 0) -> dict[str, float]:
    """Milliseconds: p50, p99, p99.9 and the worst, of requests sent in turn, after a second of them that does not count; and how late
    the sender itself was (p99): what is in the others of its own doing. And the CPU seconds it took.

    Args:
        size: bytes of every answer; 0: it is HTTP.
    """
    end = fixed_end(size) if size else http_end
    gc.disable()  # its own pauses are not what is measured
    idle = [Connection(socket.create_connection(("127.0.0.1", port))) for _ in range(connections)]
    for connection in idle:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        _run(idle, requests, rate, 1.0, end)
        cpu = time.process_time()
        times = _run(idle, requests, rate, seconds, end)
        cpu = time.process_time() - cpu
    finally:
        for connection in idle:
            connection.socket.close()
    names = ("p50_ms", "p99_ms", "p999_ms", "max_ms")
    latency = dict(zip(names, (1000 * np.percentile(times.latency, (50, 99, 99.9, 100))).tolist()))
    return {"requests": len(times.latency), **latency, "sent_late_p99_ms": 1000 * float(np.percentile(times.late, 99)), "sender_cpu": cpu}
