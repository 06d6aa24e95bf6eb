"""The nearest items of a user by cosine, exactly or from an approximate index (HNSW, by usearch), and how much the index misses.

usearch because it is a small wheel for every Python we support, needs little more than numpy, and is kept up; hnswlib has no wheels, and
faiss brings an OpenMP of its own beside torch's. Which one the paper uses is stated nowhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.extras import extra

Vectors = NDArray[np.float32]
Positions = NDArray[np.int64]


class Index:
    """Vectors [n, dim] as a graph, each under its position. Built by one thread, it is the same every time.

    Args:
        connectivity: neighbours of a vector in the graph; memory grows with it.
        expansion: candidates looked at for a new vector, and in a search: more find more, and take longer.
        threads: that build; with several, the graph depends on their race.
    """

    def __init__(self, vectors: Vectors, *, connectivity: int = 16, expansion: int = 128, threads: int = 1):
        with extra("retrieval"):
            from usearch.index import Index as Graph
        self._graph: Any = Graph(
            ndim=vectors.shape[1], metric="cos", dtype="f32", connectivity=connectivity, expansion_add=expansion, expansion_search=expansion
        )
        self._graph.add(np.arange(len(vectors), dtype=np.uint64), np.ascontiguousarray(vectors), threads=threads)

    def __len__(self) -> int:
        return len(self._graph)

    def search(self, queries: Vectors, k: int) -> Positions:
        """[q, k]: positions of about the k nearest vectors of each query, nearest first."""
        found: Positions = self._graph.search(np.ascontiguousarray(queries), min(k, len(self)), threads=1).keys
        return found.reshape(len(queries), -1).astype(np.int64)


def nearest(vectors: Vectors, queries: Vectors, k: int, block: int = 1024) -> Positions:
    """[q, k]: positions of the k nearest vectors by cosine, exactly, nearest first; the lower position first among equals."""
    items, k = _unit(vectors), min(k, len(vectors))
    found = [
        np.argsort(-(_unit(part) @ items.T), axis=1, kind="stable")[:, :k]
        for part in np.array_split(queries, max(1, -(-len(queries) // block)))
    ]
    return np.concatenate(found)


def recall(found: Positions, truth: Positions) -> float:
    """The share of `truth` [q, m] that is in `found` [q, k]. truth = exact neighbours: what the index misses; = clicked items: recall@k."""
    return float((found[:, :, None] == truth[:, None, :]).any(1).mean())


def _unit(vectors: Vectors) -> Vectors:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    return unit
