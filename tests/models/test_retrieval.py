"""Standalone retrieval: the cosine, its adapter, and the index."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from crossrep.errors import CrossrepError
from models.transfer.index import Index, nearest, recall
from models.transfer.retrieval import RetrievalAdapter, fit, info_nce


def test_an_untrained_adapter_is_the_plain_cosine() -> None:
    torch.manual_seed(0)
    ur, ir = torch.randn(10, 6), torch.randn(10, 6)
    users, items = RetrievalAdapter(6, 6)(ur, ir)
    torch.testing.assert_close((users * items).sum(1), torch.cosine_similarity(ur, ir))
    users, items = RetrievalAdapter(8, 6, dim=3)(torch.randn(10, 8), ir)
    assert users.shape == items.shape == (10, 3)
    torch.testing.assert_close(users.norm(dim=1), torch.ones(10))


def test_info_nce_by_formula() -> None:
    torch.manual_seed(1)
    users, items = (torch.nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1) for _ in range(2))
    ids, log_q = torch.tensor([7, 3, 7, 2, 3]), torch.tensor([0.4, 0.4, 0.4, 0.2, 0.4], dtype=torch.float64).log()
    logits = users.numpy() @ items.numpy().T / 0.2 - log_q.numpy()
    losses = []
    for i in range(5):
        others = [j for j in range(5) if j == i or ids[j] != ids[i]]  # the same item is no negative of itself
        losses.append(np.log(np.exp(logits[i, others]).sum()) - logits[i, i])
    assert float(info_nce(users, items, ids, 0.2, log_q)) == pytest.approx(np.mean(losses))


def test_a_trained_adapter_finds_what_the_cosine_does_not() -> None:
    rng = np.random.default_rng(2)
    items = rng.normal(size=(200, 8)).astype(np.float32)
    turned = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)  # users live in a rotated space
    clicked = rng.integers(0, 200, 4_000)
    users = (items[clicked] @ turned + 0.1 * rng.normal(size=(4_000, 8))).astype(np.float32)
    found = []
    for _ in range(2):
        adapter = RetrievalAdapter(8, 8)
        losses = fit(adapter, users, items[clicked], clicked, epochs=6, batch=256, rate=1e-2, seed=3)
        assert losses[-1] < 0.5 * losses[0]
        with torch.inference_mode():
            u, v = (part.numpy() for part in adapter(torch.from_numpy(users), torch.from_numpy(items)))
        found.append(nearest(v, u, 5))
    assert np.array_equal(found[0], found[1])
    assert recall(found[0], clicked[:, None]) > 0.9 > 0.2 > recall(nearest(items, users, 5), clicked[:, None])


def test_exact_neighbours_by_hand() -> None:
    items = np.array([[1, 0], [0, 2], [3, 3], [0, 0], [5, 0]], dtype=np.float32)
    queries = np.array([[2, 0], [0, 1], [-1, -1]], dtype=np.float32)
    assert nearest(items, queries, 2, block=2).tolist() == [[0, 4], [1, 2], [3, 0]]
    assert nearest(items, queries, 9).shape == (3, 5) and nearest(items, queries[:0], 9).shape == (0, 5)
    assert recall(np.array([[0, 4], [1, 2]]), np.array([[4, 3], [1, 2]])) == 0.75


def test_the_index_misses_little_and_is_the_same_every_time() -> None:
    pytest.importorskip("usearch")
    rng = np.random.default_rng(4)
    items, queries = rng.normal(size=(3_000, 32)).astype(np.float32), rng.normal(size=(200, 32)).astype(np.float32)
    index, exact = Index(items), nearest(items, queries, 10)
    found = index.search(queries, 10)
    assert len(index) == 3_000 and found.shape == (200, 10)
    assert recall(found, exact) > 0.95
    assert recall(found, exact) > recall(Index(items, connectivity=4, expansion=10).search(queries, 10), exact) + 0.1
    assert np.array_equal(found, Index(items).search(queries, 10))
    assert Index(items[:3]).search(queries[:1], 10).shape == (1, 3)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(CrossrepError, match=r"crossrep\[retrieval\]"):
        Index(np.ones((2, 2), dtype=np.float32))
