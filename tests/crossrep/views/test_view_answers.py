"""What trainers ask of a view: a part of the keys, vectors for keys that have none, torch and Arrow."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch

from crossrep import CrossrepError, LocalView, SpaceError
from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import RecordLayout
from crossrep.files.parquet import schema
from crossrep.keys import Keys
from crossrep.spec import Space
from crossrep.torch import RepresentationLookup
from tests.cluster import new_space, wait_for
from tests.crossrep.snapshot_world import Changelog, some_rows

IDS = [f"k{i}" for i in range(400)]


@pytest.fixture(scope="module")
def space(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Space:
    """Users IDS; an id that is no UTF-8; and one with a record, but no click."""
    space = new_space(bootstrap, tmp_path_factory.mktemp("space"))[0]
    log = Changelog(space, bootstrap)
    log.put("user", IDS, 1)
    log.put("user", [b"\xff"], 2)
    return space


@pytest.fixture(scope="module")
def view(bootstrap: str, space: Space) -> Any:
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        yield view


def truth(space: Space) -> tuple[dict[str, int], np.ndarray[Any, Any]]:
    keys, records = some_rows(space, "user", IDS, 1)
    return {name.decode(): row for row, name in enumerate(keys.tolist())}, records


# --- Filters ---


def test_a_view_of_some_partitions_reads_only_those(bootstrap: str, space: Space, view: LocalView) -> None:
    of = Keys.of(IDS).partitions(space.partitions)
    parts = [[3], [0, 2], [1]]
    views = [LocalView("user", space.name, bootstrap, partitions=part) for part in parts]
    for part, some in zip(parts, views):
        some.wait(60)
        mine = np.isin(of, part)
        answer = some.get(IDS)
        assert (answer.found == mine).all() and set(some._live.follower.positions) == set(part)
        assert (answer["cr"].vectors[mine] == view.get(IDS)["cr"].vectors[mine]).all()
    assert sum(map(len, views)) == len(view) and sum(v._live.follower.records for v in views) == view._live.follower.records
    for some in views:
        some.close()


def test_a_view_of_some_ids_holds_only_those(bootstrap: str, space: Space, view: LocalView) -> None:
    log = Changelog(space, bootstrap)
    wanted = ["k1", "k17", b"k2", "not yet there"]
    with LocalView("user", space.name, bootstrap, ids=wanted, missing="mean") as some:
        some.wait(60)
        assert set(some._live.follower.positions) == set(Keys.of(wanted).partitions(space.partitions).tolist())
        assert sorted(some.ids()) == ["k1", "k17", "k2"]
        answer, all_of_them = some.get(["k1", "k17", "k2", "k3"], at=2e9), view.get(["k1", "k17", "k2"], at=2e9)
        assert answer.found.tolist() == [True, True, True, False]
        assert (answer["cr"].vectors[:3] == all_of_them["cr"].vectors).all() and (
            answer["cr"].weights[:3] == all_of_them["cr"].weights
        ).all()
        np.testing.assert_allclose(answer["cr"].vectors[3], all_of_them["cr"].vectors.mean(axis=0), rtol=1e-5)
        log.put("user", ["not yet there", "k5"], 3)
        log.delete("user", ["k2", "k6"])
        wait_for(lambda: sorted(some.ids()) == ["k1", "k17", "not yet there"], "it follows them")
        log.put("user", ["k2", "k5", "k6"], 1)  # as it was, for the other tests
        log.delete("user", ["not yet there"])
        wait_for(lambda: sorted(some.ids()) == ["k1", "k17", "k2"], "it follows them")
    wait_for(lambda: len(view) == 401, "so does the other")
    log.put("user", IDS, 1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"partitions": [1, 4]}, SpaceError, "partitions 0 to 3; 4 is none"),
        ({"partitions": [-1]}, SpaceError, "-1 is none"),
        ({"partitions": ["1"]}, SpaceError, "'1' is none"),
        ({"partitions": []}, ValueError, "partitions is empty"),
        ({"ids": []}, ValueError, "ids is empty"),
        ({"ids": ["a", ""]}, ValueError, "id '' at 1 has 0 bytes"),
        ({"ids": ["a"], "partitions": [1]}, ValueError, "both given"),
        ({"missing": "median"}, ValueError, "'median'; it must be one of 'zero', 'mean'"),
    ],
)
def test_a_wrong_argument_is_named(bootstrap: str, space: Space, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LocalView("user", space.name, bootstrap, **given)


# --- Keys that have no vector ---


def test_the_mean_follows_the_keys(bootstrap: str, tmp_path: Path) -> None:
    space = new_space(bootstrap, tmp_path)[0]
    log = Changelog(space, bootstrap)
    with LocalView("user", space.name, bootstrap, missing="mean") as view:
        view.wait(60)

        def is_mean() -> None:
            held, nobody = view.get(view.ids(), columns=["cr", "ur"]), view.get(["nobody"])
            assert not nobody.found[0] and nobody["cr"].weights[0] == 0 == nobody["ur"].confidence[0] and nobody["cr"].times[0] == NEVER
            for name, values in held.items():
                known = values.vectors[values.known]
                mean = known.mean(axis=0, dtype=np.float64) if len(known) else np.zeros(view.dim(name))
                np.testing.assert_allclose(nobody[name].vectors[0], mean, rtol=1e-6, atol=1e-7)

        is_mean()
        log.put("user", IDS, 1)
        wait_for(lambda: len(view) == 400, "they come")
        is_mean()
        log.put("user", IDS[:200], 2, start=1.7e9)
        log.delete("user", IDS[100:300])
        wait_for(lambda: len(view) == 200 and view.stream_time > 1.7e9, "they change and go")
        is_mean()
        untouched = RecordLayout(space, "user").empty(1)
        untouched["cr_time"], untouched["ur_time"], untouched["ur"] = NEVER, 1e9, 3.0
        log.send("user", [(b"no cr", untouched.tobytes())])
        wait_for(lambda: len(view) == 201, "one comes whose cr nothing has touched")
        is_mean()
        both = view.get(["no cr", "nobody"])
        assert both.found.tolist() == [True, False] and (both["cr"].vectors[0] == both["cr"].vectors[1]).all()
        assert both["cr"].confidence.tolist() == [0, 0] and both["ur"].confidence.tolist() == [1, 0] and (both["ur"].vectors[0] == 3).all()
        log.delete("user", view.ids())
        wait_for(lambda: len(view) == 0, "all go")
        is_mean()


# --- numpy, torch, Arrow ---


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def test_an_answer_as_torch_and_arrow_is_the_same_memory(space: Space, view: LocalView) -> None:
    rows, records = truth(space)
    asked = ["k3", "nobody", "k1", "k3", 17]
    answer = view.get(asked)
    tensors, batch = answer.to_torch(), answer.to_arrow()
    batch.validate(full=True)
    assert list(tensors) == ["cr", "ur"] and batch.num_rows == 5
    assert (answer["cr"].vectors[0] == records["cr"][rows["k3"]]).all()
    for name, tensor in tensors.items():
        vectors = answer[name].vectors
        assert tensor.dtype == torch.float32 and tensor.shape == vectors.shape and not tensor.requires_grad
        assert tensor.data_ptr() == address(vectors) == batch.column(name).flatten().buffers()[1].address
        assert batch.column(name).type == pa.list_(pa.float32(), vectors.shape[1])
        assert (np.array(batch.column(name).to_pylist(), np.float32) == vectors).all()
    for column, array in (("count", answer.counts), ("source_offset", answer.source_offsets), ("cr_confidence", answer["cr"].weights)):
        assert batch.column(column).buffers()[1].address == address(array) and batch.column(column).to_numpy().tolist() == array.tolist()
    assert batch.column("id").to_pylist() == ["k3", "nobody", "k1", "k3", "17"] and batch.column("id").buffers()[2].address == address(
        answer.ids.data
    )
    assert batch.column("found").to_pylist() == answer.found.tolist() == [True, False, True, True, False]
    assert batch.column("ur_confidence").to_pylist() == [1, 0, 1, 1, 0] and batch.column("cr_time").null_count == 2
    assert batch.column("cr_time").cast(pa.int64())[0].as_py() == round(answer["cr"].times[0] * 1e6)
    assert "clicks_confidence" in batch.schema.names and "clicks" not in batch.schema.names
    tensors["cr"][0] = 7.0
    assert (answer["cr"].vectors[0] == 7).all() and (view.get(["k3"])["cr"].vectors != 7).all()  # the caller's own, not the table's


def test_ids_in_arrays_and_tensors(view: LocalView) -> None:
    for ids in (np.array(["k1", "k2"]), np.array([b"k1", b"k2"]), ["k1", b"k2"], ("k1", "k2")):
        assert view.get(ids).found.all()
    for numbers in (np.array([17, 4]), torch.tensor([17, 4])):
        assert view.get(numbers).ids.tolist() == [b"17", b"4"]
    some = view.get(["k1"], columns=["ur"])
    assert list(some) == ["ur"] and some.found[0]
    with pytest.raises(KeyError, match=r"not all columns of \['typo'\]; it has \['cr', 'ur', 'clicks'\]"):
        view.get(["k1"], columns=["typo"])


def test_the_whole_view_as_an_arrow_table(space: Space, view: LocalView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossrep.views.arrow.ROWS", 100)  # several batches
    held = view.arrow()
    held.validate(full=True)
    assert held.schema == schema(RecordLayout(space, "user")) and held.num_rows == len(view) == 401
    ids = held.column("id").to_pylist()
    assert sorted(ids) == sorted([*IDS, "\\xff"]) and set(held.column("_key").to_pylist()) == {None, b"\xff"}
    answer = view.get([id if id != "\\xff" else b"\xff" for id in ids])
    assert answer.found.all() and held.column("count").to_pylist() == answer.counts.tolist()
    assert (np.array(held.column("cr").to_pylist(), np.float32) == answer["cr"].vectors).all()
    busiest = duckdb.sql("select count(*), sum(count), sum(cr[1])::float8 from held").fetchall()[0]
    assert busiest[:2] == (401, answer.counts.sum())
    assert busiest[2] == pytest.approx(float(answer["cr"].vectors[:, 0].sum(dtype=np.float64)), rel=1e-4)


# --- RepresentationLookup ---


def test_a_lookup_in_a_model(space: Space, view: LocalView) -> None:
    rows, records = truth(space)
    lookup = RepresentationLookup(view, "cr")
    model = torch.nn.Sequential(lookup, torch.nn.Linear(lookup.dim, 1))
    assert set(model.state_dict()) == {"1.weight", "1.bias"} and not list(lookup.parameters()) and not list(lookup.state_dict())
    vectors = lookup(["k1", "nobody", "k2"])
    assert vectors.dtype == torch.float32 and vectors.shape == (3, 8) and vectors.is_contiguous() and not vectors.requires_grad
    assert (vectors[0].numpy() == records["cr"][rows["k1"]]).all() and not vectors[1].any()
    model(["k1", "k2"]).sum().backward()
    assert model[1].weight.grad is not None
    answer = view.get(["k1", "nobody"])
    _, confidence, age = lookup.look_up(["k1", "nobody"])
    assert confidence.shape == age.shape == (2, 1)
    np.testing.assert_allclose(confidence[:, 0], answer["cr"].weights, rtol=1e-6)
    np.testing.assert_allclose(age[:, 0], [view.stream_time - answer["cr"].times[0], 0], rtol=1e-6)
    of_numbers = lookup.look_up(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert of_numbers.vectors.shape == (2, 3, 8) and of_numbers.confidence.shape == of_numbers.age.shape == (2, 3, 1)
    assert lookup(np.array([["k1", "k2"]])).shape == (1, 2, 8) and lookup([]).shape == (0, 8)
    assert lookup.to("meta")(["k1"]).device.type == "meta"
    assert RepresentationLookup(view, "ur").look_up(["k1", "nobody"]).confidence.tolist() == [[1], [0]]
    assert "user.cr" in repr(model)
    for column in ("clicks", "typo"):
        with pytest.raises(KeyError, match=f"no vectors '{column}'"):
            RepresentationLookup(view, column)


def test_refresh_holds_a_step_still(bootstrap: str, tmp_path: Path) -> None:
    space = new_space(bootstrap, tmp_path)[0]
    log = Changelog(space, bootstrap)
    log.put("user", IDS, 1)
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        held, live = RepresentationLookup(view, "cr"), RepresentationLookup(view, "cr")
        held.refresh()
        first, at = held.look_up(["k1", "k1", "k2", "nobody"]), view.stream_time
        log.put("user", ["k1", "k2", "nobody", "other"], 2, start=1.7e9)
        wait_for(lambda: view.stream_time > at, "they change")
        again = held.look_up(["nobody", "k2", "k1"])
        for before, after in zip(first, again):
            assert torch.equal(before[[3, 2, 1]], after)
        assert not torch.equal(first.vectors[0], live(["k1"])[0]) and held(["other"]).any()  # read when first asked for
        many = [f"m{i}" for i in range(3000)]
        assert torch.equal(held(["k1", *many, "k2"])[[0, -1]], first.vectors[[0, 2]])  # more ids than it began with room for
        held.refresh()
        assert torch.equal(held(["k1", "nobody"]), live(["k1", "nobody"]))
        shared = copy.deepcopy(torch.nn.Sequential(live))[0]
        assert shared is not live and shared.view is view and torch.equal(shared(["k1"]), live(["k1"]))
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(live)


def _ask(view: LocalView, answers: Connection) -> None:
    try:
        answers.send(view.get(["k1"]).counts.tolist())
    except CrossrepError as error:
        answers.send(str(error))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # that threads and forks do not mix is what is tested
def test_a_forked_process_does_not_get_old_answers(view: LocalView) -> None:
    """As a DataLoader's worker would: the thread that follows the topic stays in the parent."""
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_ask, args=(view, there))
    worker.start()
    assert here.poll(30) and "of which this one is a fork" in here.recv()
    worker.join(10)
