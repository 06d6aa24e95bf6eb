"""The algebra of aggregation: one set of kernels for the stream, the combiner, replays and readers.

A row is a *partial*: mean vector m, weight W, time T (seconds), count n. A raw event is the partial (x, w, t, 1), w finite and > 0.
Folding partial b into a, with half-life h:

    T' = max(Ta, Tb);  α = Wa·2^(-(T'-Ta)/h);  γ = Wb·2^(-(T'-Tb)/h);  W' = α + γ
    m' = m_a + (γ / W')·(m_b - m_a);  n' = na + nb                      so β = α / W'

β depends on the time since the key's last update and on how active the key is. Exponents are never positive, so nothing overflows.
The fold is associative and commutative (to rounding): late events, batches and pre-merged rows need no special case. It is the decayed
weighted mean of Cormode et al., "Forward decay" (ICDE 2009), kept in normalised form and anchored at the newest event.

`latest` keeps the vector of the greatest time; at equal times the one whose little-endian float32 bytes compare greater: order never
matters.

All kernels take rows of one frame or batch: `slots` int32 [n] says where row i goes, `vectors` is float32 [n, dim], `weights` and `times`
float64 [n], `present` bool [n] (rows a column does not take are False). State arrays are float64 [capacity, dim] and [capacity]; an empty
slot has T = -inf and W = 0. Rows may repeat a slot.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossrep.kernels import jit

NEVER = -np.inf  # the time of a slot that holds nothing


def decay(weight: ArrayLike, since: ArrayLike, half_life: float) -> NDArray[np.float64]:
    """Weight that is left `since` seconds later: `weight · 2^(-since / half_life)`. A negative `since` (an older clock) leaves it whole."""
    return np.asarray(weight, np.float64) * np.exp2(-np.maximum(since, 0.0) / half_life)


def cosines(vectors: NDArray[np.float32], to: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each of n vectors [n, dim] with one [dim]; 0 where either is all zeros."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(to)
    found: NDArray[np.float32] = np.divide(vectors @ to, norms, out=np.zeros(len(vectors), np.float32), where=norms > 0)
    return found


@jit
def fold_decayed(mean, weight, time, slots, vectors, weights, times, present, half_life):  # type: ignore[no-untyped-def]
    """Fold n rows into (mean, weight, time), in place."""
    dim = mean.shape[1]
    for i in range(len(slots)):
        if not present[i]:
            continue
        s = slots[i]
        ta, tb = time[s], times[i]
        if tb >= ta:
            alpha, gamma = weight[s] * np.exp2((ta - tb) / half_life), weights[i]
            time[s] = tb
        else:
            alpha, gamma = weight[s], weights[i] * np.exp2((tb - ta) / half_life)
        total = alpha + gamma
        weight[s] = total
        if alpha == 0.0:  # the old mean counts nothing: take the new one exactly, not old + (new - old)
            for d in range(dim):
                mean[s, d] = vectors[i, d]
        else:
            share = gamma / total
            for d in range(dim):
                mean[s, d] += share * (vectors[i, d] - mean[s, d])


@jit
def fold_latest(vector, time, slots, vectors, times, present):  # type: ignore[no-untyped-def]
    """Keep the newest vector, in place. `vector` is float32 [capacity, dim]."""
    dim = vector.shape[1]
    for i in range(len(slots)):
        if not present[i]:
            continue
        s = slots[i]
        newer = times[i] > time[s]
        if times[i] == time[s]:
            a, b = vector[s].view(np.uint8), vectors[i].view(np.uint8)
            for j in range(4 * dim):
                if a[j] != b[j]:
                    newer = b[j] > a[j]
                    break
        if newer:
            time[s] = times[i]
            for d in range(dim):
                vector[s, d] = vectors[i, d]


@jit
def fold_entity(count, event_time, slots, counts, times):  # type: ignore[no-untyped-def]
    """Per key: events folded, and the newest event time."""
    for i in range(len(slots)):
        s = slots[i]
        count[s] += counts[i]
        event_time[s] = max(event_time[s], times[i])


@jit
def first_outside(values, low, high):  # type: ignore[no-untyped-def]
    """The first i where not low <= values[i] <= high, as NaN never is; -1 if there is none."""
    for i in range(len(values)):
        if not low <= values[i] <= high:
            return i
    return -1


@jit
def narrow(mean, slots, out):  # type: ignore[no-untyped-def]
    """out[i] = mean[slots[i]] as float32, in one pass: numpy's way needs a copy in float64 between."""
    for i in range(len(slots)):
        for d in range(mean.shape[1]):
            out[i, d] = mean[slots[i], d]


@numba.njit(cache=True, nogil=True)
def _widen(halves, bits, floats):  # type: ignore[no-untyped-def]
    # A float16's exponent and fraction, shifted into float32's place, are the value scaled by 2^-112, subnormals included.
    for i in range(len(halves)):
        h = np.uint32(halves[i])
        bits[i] = np.uint32((h & np.uint32(0x8000)) << np.uint32(16)) | np.uint32((h & np.uint32(0x7FFF)) << np.uint32(13))
    scale = np.float32(2.0**112)
    for i in range(len(halves)):
        floats[i] *= scale
    not_finite = 0
    for i in range(len(halves)):
        not_finite += (halves[i] & np.uint16(0x7C00)) == np.uint16(0x7C00)
    return not_finite


def widen(halves: NDArray[np.float16]) -> tuple[NDArray[np.float32], bool]:
    """float16 to float32, exactly, and whether all are finite. Numpy's own cast is about ten times slower."""
    floats = np.empty(halves.shape, np.float32)
    not_finite = _widen(halves.ravel().view(np.uint16), floats.reshape(-1).view(np.uint32), floats.reshape(-1))
    return floats, not_finite == 0
