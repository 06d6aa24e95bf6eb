"""The work in Quix Streams: python -m benchmarks.peers.quix_program BOOTSTRAP TOPIC GROUP ROWS FOLDER GUARANTEE, in its own environment."""

from __future__ import annotations

import sys
import time

from quixstreams import Application, State  # type: ignore[import-not-found]

from benchmarks.peers.average import folded

_begun: list[float] = []


def fold(sample: bytes, state: State) -> None:
    """Fold one sample into its key's state."""
    if not _begun:
        _begun.append(time.time())
        print(f"first {_begun[0]:.3f}", flush=True)
    state.set_bytes("mean", folded(state.get_bytes("mean"), sample))


def main(bootstrap: str, topic: str, group: str, rows: str, folder: str, guarantee: str) -> None:
    """Fold so many samples and commit; then wait for stdin's end, so that CPU time and memory can be read."""
    app = Application(
        broker_address=bootstrap,
        consumer_group=group,
        auto_offset_reset="earliest",
        state_dir=folder,
        processing_guarantee=guarantee,
        loglevel="WARNING",
    )
    samples = app.dataframe(app.topic(topic, key_deserializer="bytes", value_deserializer="bytes"))
    samples.update(fold, stateful=True)
    app.run(count=int(rows), collect=False)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
