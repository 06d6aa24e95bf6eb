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

    model = upstream.load(small_model())
    others = [np.zeros((len(users), len(model.features[kind])), np.int32) for kind in ("item", "event")]
    features = [{name: column[i] for name, column in data.user_features.items()} for i in range(len(users))]
    known, unknown = (model.forward(model.encode("user", users, of), *others)["ur"] for of in (features, [{}] * len(users)))
    matters = np.abs(known - unknown).max(axis=1)
    first, second, user = np.argsort(matters)[-3:].tolist()
    near = matters[user] / 4
    assert near > 0.001, "the features of one user were to matter"  # float16, in which frames hold them, is ten times as fine

    topic, port = space.inputs.user_features, free_port()
    for key in (users[first], users[second], "nobody", "x" * 65):
        publish(topic, key, None)
    publish(topic, users[second], codec("user_features").encode({"user_id": users[second], "values": features[second]}))  # in the same run
    start_infer(workers, path, port=port)
    wait_for(lambda: ready(port), "ready")
    assert (about(port)["users"], about(port)["features_skipped"]) == (len(users) - 1, 0)
    publish(space.inputs.impressions, users[user], event(user_id=users[user]))
    wait_for(lambda: inferred(space, bootstrap), "inferred")
    np.testing.assert_allclose(newest_ur(space, bootstrap), known[user], atol=near)
    publish(topic, users[user], None)
    wait_for(lambda: about(port)["users"] == len(users) - 2, "the deletion is heard of")
    publish(space.inputs.impressions, users[user], event(user_id=users[user]))
    wait_for(lambda: inferred(space, bootstrap), "inferred")
    np.testing.assert_allclose(newest_ur(space, bootstrap), unknown[user], atol=near)
    assert about(port)["features_skipped"] == 0
