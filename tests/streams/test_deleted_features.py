"""Features that were deleted are not used any more: every worker knows what one that starts now would know."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep import kafka
from crossrep.columnar import frames
from crossrep.spec import Space
from models import upstream
from schemas import codec
from tests.cluster import Workers, free_port, new_space, ready, wait_for
from tests.streams.bad_samples import event
from tests.streams.small_model import SPEC, Feed, inferred, small_dataset, small_model, start_infer


def about(port: int) -> dict[str, Any]:
    """What the worker says of itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as response:
        return dict(json.load(response))


def newest_ur(space: Space, bootstrap: str) -> NDArray[np.float32]:
    """The UR of the newest frame of users, which holds one, float32 [32]."""
    written = kafka.messages(bootstrap, space.frames_topic, kafka.bounds(bootstrap, space.frames_topic))
    *_, rows = (rows for m in written if (rows := frames.decode(space, m.value(), partition=m.partition())).entity == "user")
    (ur,) = rows.columns["ur"].vectors
    return ur


def test_deleted_features_are_not_used_any_more(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC, partitions=1)
    data = small_dataset()
    Feed(space, data, bootstrap)
    users, producer = data.user_ids, kafka.producer(bootstrap)

    def publish(topic: str, key: str, value: bytes | None) -> None:
        producer.produce(topic, value, key)
        assert producer.flush(30) == 0

    known = {name: column[1] for name, column in data.user_features.items()}
    model = upstream.load(small_model())
    item, at = np.zeros((1, len(model.features["item"])), np.int32), np.zeros((1, len(model.features["event"])), np.int32)
    urs = [model.forward(model.encode("user", [users[1]], [features]), item, at)["ur"][0] for features in (known, {})]
    assert np.abs(urs[0] - urs[1]).max() > 0.05, "this user's features were to matter"

    topic, port = space.inputs.user_features, free_port()
    for key in (users[0], users[2], "nobody", "x" * 65):
        publish(topic, key, None)
    publish(topic, users[2], codec("user_features").encode({"user_id": users[2], "values": known}))  # comes back, in the same run
    start_infer(workers, path, port=port)
    wait_for(lambda: ready(port), "ready")
    assert (about(port)["users"], about(port)["features_skipped"]) == (len(users) - 1, 0)
    publish(space.inputs.impressions, users[1], event(user_id=users[1]))
    wait_for(lambda: inferred(space, bootstrap), "inferred")
    np.testing.assert_allclose(newest_ur(space, bootstrap), urs[0], atol=0.005)
    publish(topic, users[1], None)
    wait_for(lambda: about(port)["users"] == len(users) - 2, "the deletion is heard of")
    publish(space.inputs.impressions, users[1], event(user_id=users[1]))
    wait_for(lambda: inferred(space, bootstrap), "inferred")
    np.testing.assert_allclose(newest_ur(space, bootstrap), urs[1], atol=0.005)
    assert about(port)["features_skipped"] == 0
