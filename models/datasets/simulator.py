"""A seeded simulator of impressions of any length, with known click probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
from numpy.typing import NDArray

from models.datasets.base import Dataset, Impressions

SLICE = 65_536  # impressions in a slice of time; the sort key below needs a position to fit 16 bits
TOPICS = 8
SCENARIOS = ("feed", "discover", "search", "related")
SCENARIO_SHARE = (0.55, 0.25, 0.10, 0.10)
SCENARIO_EFFECT = (0.0, -0.4, 0.5, 0.2)  # on the logit, like every effect here
AD_EFFECT = -0.5
AGE_EFFECT = {"18-24": 0.3, "25-34": 0.1, "35-49": -0.1, "50+": -0.3}
DURATION_EFFECT = {"0-15s": 0.2, "15-60s": 0.1, "1-5min": -0.1, "5min+": -0.2}
USER_SPREAD, ITEM_SPREAD, AUTHOR_SPREAD = 0.3, 0.3, 0.2  # standard deviations of normal effects
BIAS, AFFINITY = -0.5, 4.0
HOME_WEIGHT, MAIN_WEIGHT = 0.5, 0.75
SESSION_MEAN, GAP_SECONDS = 8.0, 6.0
ACTIVITY_SIGMA, DIURNAL, PEAK_HOUR = 1.0, 0.6, 20.0
DAY_MS = 86_400_000

_MINUTES = np.arange(1441) / 1440.0
_ANGLE = 2 * math.pi * (_MINUTES - PEAK_HOUR / 24)
# The share of a day's sessions that have begun by each minute, the integral of 1 + DIURNAL * cos; both ends exact (0 and 1).
_DAY_SHARE = _MINUTES + DIURNAL * (np.sin(_ANGLE) - math.sin(_ANGLE[0])) / (2 * math.pi)
_DAY_SHARE[-1] = 1.0


@dataclass(frozen=True)
class World:
    """Everything drawn once per data set. U users, I items, K = TOPICS; an item's index is its order of appearance."""

    events: int
    seed: int
    start_ms: int
    span_ms: int
    drift_ms: float
    ad_share: float
    user_cumulative: NDArray[np.float64]  # (U,) running sum of activities, ends at 1
    user_bias: NDArray[np.float32]  # (U,)
    user_home: NDArray[np.int32]  # (U,) the lasting topic, also the passing one until the first jump
    user_phase: NDArray[np.float32]  # (U,) in [0, 1): how far into a term the user is at the start
    item_cumulative: tuple[NDArray[np.float64], NDArray[np.float64]]  # (I,) running sums of popularity: content only, ads only
    item_first: int  # items there at the start; the others appear at even steps over the period
    item_bias: NDArray[np.float32]  # (I,) quality, author, duration and ad effects
    item_topics: NDArray[np.int32]  # (I,) main topic * K + second topic
    item_ad: NDArray[np.bool_]  # (I,)
    affinity: NDArray[np.float32]  # (K * K * K,) by user topic, item's main topic, item's second topic; mean 0


def simulate(
    *,
    events: int,
    users: int,
    items: int,
    seed: int = 0,
    start: datetime | float = datetime(2024, 1, 1, tzinfo=UTC),
    days: float = 14.0,
    drift_days: float = 7.0,
    zipf: float = 1.1,
    ad_share: float = 0.1,
) -> Dataset:
    """A data set of exactly `events` impressions over `days` days from `start` (seconds since 1970, or an aware datetime).

    The same arguments give the same impressions however they are iterated (per numpy build: exp may differ in the last bit);
    memory grows with users and items only. `zipf` is the exponent of popularity, `drift_days` the length of a passing interest.

    - Time: sessions begin at rate 1 + 0.6 cos(2 pi (h - 20) / 24), h the hour UTC. A session has Geometric(1/8) impressions, the
      gaps Exponential(6 s), one user, one scenario. The period is cut into slices of 65,536 impressions of equal expectation;
      what of a session passes its slice's end goes on from the slice's beginning, which keeps the rate even at the borders.
    - Users: activity LogNormal(0, 1); logit effect Normal(0, .3) plus age. Interest: a lasting topic of 8 (weight .5) and a passing
      one (.5), which is the lasting one at first and jumps to a uniformly drawn topic every `drift_days` (phase uniform per user).
    - Items: popularity rank^-zipf, ranks random, within content and within ads; half are there at the start, the others appear one
      by one; `ad_share` of the impressions are of ads (10 % of the items). Topics: main (.75), with probability .8 the author's,
      and second (.25). Authors are items / 8, drawn uniformly. What is shown does not depend on the user.
    - Click: Bernoulli(sigmoid(-.5 + user + item + scenario + 4 affinity)). affinity is the weighted mean, over the user's and the
      item's topics, of an 8 x 8 matrix (1 on the diagonal, Normal(0, .25) off it), less its mean. item is Normal(0, .3) plus
      Normal(0, .2) of the author plus duration plus ad (-.5). The constants above state the rest. About .3 to .45 are clicked.
    - Features: segment is the lasting topic with probability .85, category the main topic with probability .9, else a uniform one;
      author_id, age_band, duration, type ("AD", "NORMAL") and activity (bucket) are exact; device and country say nothing.
    """
    for name, count, limit in (("events", events, math.inf), ("users", users, 2**31), ("items", items, 2**31)):
        if not (isinstance(count, int) and 1 <= count < limit):
            raise ValueError(f"{name} must be a whole number from 1{'' if limit == math.inf else ' and below 2**31'}, not {count!r}")
    if not (isinstance(seed, int) and seed >= 0):
        raise ValueError(f"seed must be a whole number from 0, not {seed!r}")
    for name, value in (("days", days), ("drift_days", drift_days)):
        if not (math.isfinite(value) and value * DAY_MS >= 1):
            raise ValueError(f"{name} must be finite and at least a millisecond, not {value!r}")
    if not (math.isfinite(zipf) and zipf >= 0):
        raise ValueError(f"zipf must be finite and not negative, not {zipf!r}")
    if not 0 <= ad_share <= 1:
        raise ValueError(f"ad_share must be between 0 and 1, not {ad_share!r}")
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise ValueError(f"start must have a time zone, not {start!r}")
        start = start.timestamp()
    if not math.isfinite(start):
        raise ValueError(f"start must be finite, not {start!r}")

    start_ms, span_ms = round(start * 1000), round(days * DAY_MS)
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(0,))))

    activity = rng.lognormal(0.0, ACTIVITY_SIGMA, users)
    age = rng.integers(0, len(AGE_EFFECT), users)
    home = rng.integers(0, TOPICS, users, dtype=np.int32)
    user_bias = rng.normal(0.0, USER_SPREAD, users) + np.array(list(AGE_EFFECT.values()))[age]
    # Quartiles of the log-normal itself, so that a user's bucket does not depend on who else there is.
    bucket = np.searchsorted(np.exp(ACTIVITY_SIGMA * np.array([-0.6745, 0.0, 0.6745])), activity)
    user_features = {
        "segment": _pick([f"s{k}" for k in range(TOPICS)], _noised(rng, home, 0.15)),
        "age_band": _pick(list(AGE_EFFECT), age),
        "device": _pick(["android", "ios", "web"], rng.integers(0, 3, users)),
        "country": _pick([f"c{k}" for k in range(20)], rng.integers(0, 20, users)),
        "activity": _pick(["low", "medium", "high", "top"], bucket),
    }

    authors = max(1, items // 8)
    author = rng.integers(0, authors, items)
    main = _noised(rng, rng.integers(0, TOPICS, authors, dtype=np.int32)[author], 0.2)
    second = rng.integers(0, TOPICS, items, dtype=np.int32)
    duration = rng.integers(0, len(DURATION_EFFECT), items)
    ad = rng.random(items) < 0.1
    ad[:2] = (False, True)[:items]  # both branches have something to show from the start
    popularity = (rng.permutation(items) + 1.0) ** -zipf
    item_bias = (
        rng.normal(0.0, ITEM_SPREAD, items)
        + rng.normal(0.0, AUTHOR_SPREAD, authors)[author]
        + np.array(list(DURATION_EFFECT.values()))[duration]
        + AD_EFFECT * ad
    )
    item_features = {
        "author_id": _pick([f"a{k}" for k in range(authors)], author),
        "category": _pick([f"t{k}" for k in range(TOPICS)], _noised(rng, main, 0.1)),
        "duration": _pick(list(DURATION_EFFECT), duration),
        "type": _pick(["NORMAL", "AD"], ad.astype(np.int64)),
    }

    match = rng.normal(0.0, 0.25, (TOPICS, TOPICS))
    np.fill_diagonal(match, 1.0)
    match -= match.mean()
    total = np.cumsum(activity)
    world = World(
        events=events,
        seed=seed,
        start_ms=start_ms,
        span_ms=span_ms,
        drift_ms=drift_days * DAY_MS,
        ad_share=ad_share if items > 1 else 0.0,
        user_cumulative=total / total[-1],
        user_bias=user_bias.astype(np.float32),
        user_home=home,
        user_phase=rng.random(users, dtype=np.float32),
        item_cumulative=(np.cumsum(popularity * ~ad), np.cumsum(popularity * ad)),
        item_first=min(items, max(2, (items + 1) // 2)),
        item_bias=item_bias.astype(np.float32),
        item_topics=main * TOPICS + second,
        item_ad=ad,
        affinity=(MAIN_WEIGHT * match[:, :, None] + (1 - MAIN_WEIGHT) * match[:, None, :]).ravel().astype(np.float32),
    )
    return Dataset(
        name=f"simulated-{seed}",
        user_ids=[f"u{i}" for i in range(users)],
        item_ids=[f"i{i}" for i in range(items)],
        scenarios=SCENARIOS,
        user_features=user_features,
        item_features=item_features,
        impressions=partial(_stream, world),
        size=events,
        train_until=(start_ms + round(0.6 * span_ms)) / 1000,
        test_from=(start_ms + round(0.8 * span_ms)) / 1000,
    )


def _stream(world: World) -> Iterator[Impressions]:
    for number in range(-(-world.events // SLICE)):
        yield draw(world, number)[0]


def draw(world: World, number: int) -> tuple[Impressions, NDArray[np.float32]]:
    """The impressions of slice `number` and the probability of a click on each: what no model can do better than."""
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence(world.seed, spawn_key=(1, number))))
    before = number * SLICE
    n = min(SLICE, world.events - before)
    share = _elapsed(world.start_ms), _elapsed(world.start_ms + world.span_ms)
    edges = [share[0] + (share[1] - share[0]) * (done / world.events) for done in (before, before + n)]
    begin, end = (min(max(int(ms), world.start_ms), world.start_ms + world.span_ms) for ms in _moment(np.array(edges)))
    width = max(1, end - begin)

    # An impression begins a session with probability 1 / mean: geometric lengths that sum to n exactly.
    first = rng.random(n, dtype=np.float32) < 1 / SESSION_MEAN
    first[0] = True
    session = np.cumsum(first) - 1
    heads = np.flatnonzero(first)
    begun = _moment(rng.uniform(edges[0], edges[1], len(heads))) - begin
    seconds = np.cumsum(rng.standard_exponential(n, dtype=np.float32), dtype=np.float64) * GAP_SECONDS
    offset = ((begun - 1000 * seconds[heads])[session] + 1000 * seconds).astype(np.int64) % width
    # Sorting (time, position) as one integer is unambiguous for ties and several times faster than a stable argsort.
    key = np.sort((offset << 16) | np.arange(n))
    session = session[key & 0xFFFF]
    since = (begin - world.start_ms) + (key >> 16)  # ms since the start

    user = _weighted(world.user_cumulative, rng.random(len(heads)))[session].astype(np.int32)
    scenario = rng.choice(len(SCENARIOS), len(heads), p=SCENARIO_SHARE)[session].astype(np.int16)

    later = len(world.item_ad) - world.item_first
    newest = world.item_first - 1 + (since * (later / world.span_ms)).astype(np.int64)
    wants_ad, place = rng.random(n, dtype=np.float32) < world.ad_share, rng.random(n)
    item = np.empty(n, dtype=np.int32)
    for branch, cumulative in enumerate(world.item_cumulative):
        at = np.flatnonzero(wants_ad == bool(branch))
        item[at] = np.minimum(_weighted(cumulative, place[at] * cumulative[newest[at]]), newest[at])
    ad = world.item_ad[item]

    logit = world.user_bias[user] + world.item_bias[item] + np.array(SCENARIO_EFFECT, dtype=np.float32)[scenario]
    topics = world.item_topics[item]
    passing = _passing(world, user, since)
    for topic, weight in ((world.user_home[user], HOME_WEIGHT), (passing, 1 - HOME_WEIGHT)):
        logit += np.float32(AFFINITY * weight) * world.affinity[topic * TOPICS**2 + topics]
    probability = 1 / (1 + np.exp(-(logit + np.float32(BIAS))))
    clicked = rng.random(n, dtype=np.float32) < probability
    impressions = Impressions(
        user=user,
        item=item,
        event_time=(world.start_ms + since) / 1000,
        scenario=scenario,
        ad=ad,
        clicked=clicked,
        labels=np.empty((n, 0), dtype=np.bool_),
    )
    return impressions, probability


def _passing(world: World, user: NDArray[np.int32], since: NDArray[np.int64]) -> NDArray[np.int32]:
    """The passing topic of each user at `since` ms: a hash of user and term, so that any moment is known without those before it."""
    term = (since / world.drift_ms + world.user_phase[user]).astype(np.uint64)
    # The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    key = (term << np.uint64(32) | user.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(world.seed & 0xFFFF_FFFF_FFFF_FFFF)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    drawn = ((key ^ (key >> np.uint64(31))) >> np.uint64(32)).astype(np.int64) % TOPICS
    return np.where(term == 0, world.user_home[user], drawn.astype(np.int32))


def _weighted(cumulative: NDArray[np.float64], place: NDArray[np.float64]) -> NDArray[np.int64]:
    """The index whose stretch of the running sum holds each place; an index of weight 0 is never drawn."""
    return np.searchsorted(cumulative, place, side="right")


def _elapsed(ms: float) -> float:
    """Sessions begun since 1970 at `ms`, in days' worth."""
    day, rest = divmod(ms, DAY_MS)
    return float(day + np.interp(rest / DAY_MS, _MINUTES, _DAY_SHARE))


def _moment(elapsed: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of _elapsed, in ms."""
    day = np.floor(elapsed)
    moment: NDArray[np.float64] = (day + np.interp(elapsed - day, _DAY_SHARE, _MINUTES)) * DAY_MS
    return moment


def _noised(rng: np.random.Generator, topic: NDArray[np.int32], rate: float) -> NDArray[np.int32]:
    """`topic`, at probability `rate` replaced by a uniform draw."""
    return np.where(rng.random(len(topic)) < rate, rng.integers(0, TOPICS, len(topic), dtype=np.int32), topic)


def _pick(names: list[str], codes: NDArray[np.integer]) -> NDArray[np.object_]:
    picked: NDArray[np.object_] = np.array(names, dtype=object)[codes]
    return picked
