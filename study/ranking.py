"""NDCG and AUC of ranked targets: over all items, and in expectation over sampled negatives.

Sampled metrics flatter weak models and can even order models differently (Krichene and Rendle, KDD 2020), but the literature on this
data reports them, with 999 negatives. Their expectation over all draws follows from the rank over all items, so nothing needs to be drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SAMPLED = 999

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


def above(scores: Floats, target: Integers, row: Integers, item: Integers) -> tuple[Floats, Integers]:
    """How many candidates rank above each target, ties counted half, and how many candidates there are: float64 [N], int64 [N].

    Args:
        scores: float [N, items]; overwritten.
        target: [N].
        row, item: pairs that are no candidates, such as what the user has already; the target never is.
    """
    n = len(target)
    own = scores[np.arange(n), target][:, None]
    out = np.unique(np.concatenate([row, np.arange(n)]) * scores.shape[1] + np.concatenate([item, target]))
    scores.reshape(-1)[out] = -np.inf
    counted = np.count_nonzero(scores > own, axis=1) + np.count_nonzero(scores >= own, axis=1)
    return counted / 2, scores.shape[1] - np.bincount(out // scores.shape[1], minlength=n)


def ndcg(above: Floats, k: int) -> Floats:
    """1 / log2(1 + rank) for a rank up to k, else 0."""
    return np.where(above < k, 1 / np.log2(2 + above), 0.0)


def sampled_ndcg(above: Floats, candidates: Integers, k: int, sampled: int = SAMPLED) -> Floats:
    """The mean NDCG@k over all draws of `sampled` of the candidates, without replacement; of all of them where there are fewer."""
    logs = np.concatenate([[0.0], np.log(np.arange(1, max(candidates, default=0) + 1)).cumsum()])  # of factorials

    def choose(n: Integers, k: Integers) -> Floats:
        """log of n over k, -inf where there is no way."""
        fits = (k >= 0) & (k <= n)
        n, k = np.where(fits, n, 0), np.where(fits, k, 0)
        return np.where(fits, logs[n] - logs[k] - logs[n - k], -np.inf)

    total, better, place = candidates[:, None], np.round(above).astype(np.int64)[:, None], np.arange(k)
    drawn = np.minimum(total, sampled)
    chance = np.exp(choose(better, place) + choose(total - better, drawn - place) - choose(total, drawn))  # hypergeometric
    return np.asarray(chance @ (1 / np.log2(2 + place)), dtype=np.float64)


def auc(above: Floats, candidates: Integers) -> Floats:
    """The share of candidates that rank below the target."""
    return 1 - above / np.maximum(candidates, 1)


def metrics(user: Integers, above: Floats, candidates: Integers) -> dict[str, float]:
    """Means over users, each the mean over its targets."""
    _, owner, count = np.unique(user, return_inverse=True, return_counts=True)
    weight = 1 / count[owner] / max(len(count), 1)
    found = {
        "ndcg@1": ndcg(above, 1),
        "ndcg@10": ndcg(above, 10),
        "auc": auc(above, candidates),
        "sampled ndcg@1": sampled_ndcg(above, candidates, 1),
        "sampled ndcg@10": sampled_ndcg(above, candidates, 10),
    }
    return {name: float(weight @ values) for name, values in found.items()}
