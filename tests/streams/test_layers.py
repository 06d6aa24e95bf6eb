"""`crossrep infer` for a space whose sources are layers of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crossrep import LocalView
from models.lfm4ads import load
from tests.cluster import Workers, new_space, settled, wait_for
from tests.streams.small_model import INPUTS, Feed, inferred, small_dataset, small_model, start_infer

SPEC = (
    INPUTS.replace('flush = "50ms"', 'flush = "50ms"\nvectors = "float32"')
    + """
[entities.item.columns.crossed]
source = "cross2"
dim = DIM
aggregate = "latest"
[entities.item.columns.hidden]
source = "mlp1"
dim = 256
aggregate = "latest"
"""
)


def test_a_space_takes_any_layer_of_the_model(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    model = load(small_model(), outputs=("cross2", "mlp1"))
    space, path = new_space(bootstrap, tmp_path, SPEC.replace("DIM", str(model.outputs["cross2"])))
    data = small_dataset()
    feed = Feed(space, data, bootstrap)
    workers.fold(path)
    start_infer(workers, path, "i0", "--dtype", "float32")
    feed.send(200)
    try:
        wait_for(lambda: inferred(space, bootstrap) and settled(space, bootstrap), "all events folded", 60)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{workers.logs()}") from None

    run = next(iter(data.impressions()))
    user, item, scenario, ad, time = (column[:200] for column in (run.user, run.item, run.scenario, run.ad, run.event_time))
    newest = np.array([np.flatnonzero(item == i)[-1] for i in np.setdiff1d(item, item[run.clicked[:200]])])  # of items without a click
    assert len(newest) > 10
    expected = model.forward(
        model.fields.encode_columns("user", data.user_ids, data.user_features)[user[newest]],
        model.fields.encode_columns("item", data.item_ids, data.item_features)[item[newest]],
        model.encode_events(
            [data.scenarios[s] for s in scenario[newest]], ["ad" if each else "content" for each in ad[newest]], time[newest]
        ),
    )
    with LocalView("item", space.name, bootstrap) as items:
        items.wait(30)
        found = items.get([data.item_ids[i] for i in item[newest]])
        for column, source in (("crossed", "cross2"), ("hidden", "mlp1")):
            np.testing.assert_allclose(found[column].vectors, expected[source], atol=1e-5)
            assert np.abs(expected[source]).max() > 0.01  # so that 1e-5 says something
