"""Ports of brokers and workers on this machine."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection

from streams.broker.jars import BrokerError
from streams.broker.server import HOST


def ports(kept: tuple[int, ...], count: int, taken: Collection[int] = ()) -> tuple[int, ...]:
    """`count` ports: those kept, and free ones other than `taken`. Raises BrokerError."""
    ports = list(kept)
    while len(ports) < count:
        ports.append(free_port(None, {*ports, *taken}))
    return tuple(ports)


def free_port(port: int | None = None, taken: Collection[int] = ()) -> int:
    """`port` if it is free; or, where it is None, any that is free and not `taken`. Raises BrokerError."""
    # Below the system's ephemeral range: there, some outgoing connection could take the port while the broker is down.
    for candidate in [port] if port else random.sample(range(20000, 32000), 100):
        if candidate in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, candidate))
            except OSError as error:
                reason = error
                continue
            return candidate
    what = f"port {port}" if port else "any port from 20000 to 31999"
    raise BrokerError(f"the broker cannot have {what} ({reason}): stop the program that has it, or choose another port")
