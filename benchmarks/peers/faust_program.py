"""The work in plain Faust: python -m benchmarks.peers.faust_program BOOTSTRAP TOPIC APP FOLDER."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import faust

from benchmarks.peers.average import folded


def main(bootstrap: str, topic: str, name: str, folder: str) -> None:
    """Fold samples into a Table, one event at a time, until stdin ends."""
    app = faust.App(
        name,
        broker=f"kafka://{bootstrap}",
        store="rocksdb://",
        datadir=folder,
        topic_replication_factor=1,
        topic_partitions=4,
        broker_commit_interval=0.5,  # not the default 2.8 s, which the end of so short a run would wait for
        stream_wait_empty=False,
        web_enabled=False,
    )
    samples = app.topic(topic, key_serializer="raw", value_serializer="raw", key_type=bytes, value_type=bytes)
    means = app.Table("means", key_type=bytes, value_type=bytes)
    begun: list[float] = []

    @app.agent(samples)  # type: ignore[untyped-decorator]
    async def fold(stream: faust.Stream[bytes]) -> None:
        async for user, sample in stream.items():
            if not begun:
                begun.append(time.time())
                print(f"first {begun[0]:.3f}", flush=True)
            means[user] = folded(means.get(user), sample)

    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
    faust.Worker(app, loglevel="warning", quiet=True, redirect_stdouts=False).execute_from_commandline()


if __name__ == "__main__":
    main(*sys.argv[1:])
