"""A worker's membership of a consumer group, by Faust, and the worker's end."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import faust
from confluent_kafka import KafkaException

from crossrep.errors import CrossrepError, StateError
from streams.stateful import faust_transport

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_REFUSED = 1, 3


@dataclass(frozen=True)
class Membership:
    """Of which group, of what, and as whom."""

    group: str
    topics: Sequence[str]  # the first one's partitions are distributed
    partitions: int
    bootstrap: str
    name: str  # stable name of this worker: its folder and its group membership survive a restart
    folder: Path
    session_timeout: float  # seconds after which a silent worker's partitions move


def faust_app(member: Membership) -> faust.App:
    return faust.App(
        member.group,
        broker=";".join(f"kafka://{address}" for address in member.bootstrap.split(",")),
        consumer_group_instance_id=member.name,  # a restarted worker gets its partitions back without a rebalance
        datadir=str(member.folder / "faust"),
        store="memory://",
        table_standby_replicas=0,
        topic_allow_declare=False,
        topic_disable_leader=True,
        broker_session_timeout=member.session_timeout,
        # Kafka tells members of a rebalance in answer to their heartbeats, and all wait for the last one to hear of it.
        broker_heartbeat_interval=min(0.5, member.session_timeout / 5),
        broker_rebalance_timeout=60.0,
        broker_request_timeout=60.0,
        consumer_max_fetch_size=1 << 16,  # Faust's member may fetch once before it is paused
        broker_max_poll_interval=faust_transport.MAX_POLL_INTERVAL,
        stream_buffer_maxsize=100_000,  # `_runs` knows when to wait
        stream_wait_empty=False,
        stream_recovery_delay=0.0,
        web_enabled=False,  # /ready and /metrics answer from a thread of their own
        worker_redirect_stdouts=False,
    )


def lock(folder: Path, name: str) -> None:
    """Take a worker's name, until the process ends. Raises CrossrepError: another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)  # held open, and so locked, until the process ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CrossrepError(f"a worker named {name!r} already runs on {folder}; give this one another --name") from None


def die(doing: str, error: BaseException) -> NoReturn:
    """End the process at once: nothing after a failure may be flushed."""
    if isinstance(error, StateError):
        log.error("%s is refused: %s", doing, error)
        leave(EXIT_REFUSED)
    if isinstance(error, KafkaException):
        log.error("%s failed: %s. The process ends, since memory may be ahead of the log; start it again", doing, error.args[0])
    else:
        log.critical("%s failed; the process ends, since memory may be ahead of the log; start it again", doing, exc_info=error)
    leave(EXIT_FAILED)


def leave(code: int) -> NoReturn:
    """End the process without waiting for anything."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
