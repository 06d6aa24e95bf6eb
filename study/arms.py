"""What is compared: blocks of features, the arms that are made of them, the pairs whose differences are reported, the goals. Data alone.

A new arm is a line in ARMS; a new feature is a block in BLOCKS. Runs are known by what their arm is, not by its name: an arm that
changes is run again, the others are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from study.past import FOR_EVER, Aggregate
from study.worlds import Upstream


@dataclass(frozen=True)
class Vectors:
    """Aggregates of one output of the model, a vector for each entity."""

    source: str
    how: Aggregate
    entities: tuple[str, ...] = ("user", "item")


@dataclass(frozen=True)
class Counters:
    """Of each entity and half-life: impressions and clicks (log(1 + n)), and the click rate, shrunk a little and more."""

    half_lives: tuple[str, ...] = (FOR_EVER,)
    entities: tuple[str, ...] = ("user", "item")


@dataclass(frozen=True)
class Affinity:
    """How near the item's IR is to the mean IR of what the user clicked, and of what he skipped; and the user's UR to the mean UR of those
    who clicked the item, and skipped it: for each entity and half-life the two dot products and their difference."""

    half_lives: tuple[str, ...]


@dataclass(frozen=True)
class Now:
    """What the model gives for the very impression that is scored: it has to be asked while serving."""

    source: str


@dataclass(frozen=True)
class Memory:
    """Of each entity a token a half-life: its counters, as of Counters, and its mean of one output, of which a click counts 3 more."""

    source: str
    half_lives: tuple[str, ...]
    entities: tuple[str, ...] = ("user", "item")


Block = Vectors | Counters | Affinity | Memory | Now

LATEST = Aggregate("latest")
MEAN = Aggregate(half_life=FOR_EVER)
MEAN_4 = Aggregate(half_life=FOR_EVER, click=3.0)  # an impression weighs 1 and its click 3: a sample that was clicked 4
LAYERS = ("embedding", "cross1", "cross2", "cross3", "mlp1")  # and mlp2, which is "cr"

BLOCKS: dict[str, Block] = {
    "ur": Vectors("ur", LATEST, ("user",)),
    "ir": Vectors("ir", LATEST, ("item",)),
    "cr": Vectors("cr", MEAN_4),
    "counters": Counters(),
    "user counters": Counters(entities=("user",)),
    "item counters": Counters(entities=("item",)),
    "rates": Counters(("1h", "6h", "1d", "3d", "7d", FOR_EVER)),
    "affinity": Affinity(("1d", FOR_EVER)),
    "cr at half-lives": Memory("cr", ("1h", "1d", "7d", FOR_EVER)),
    "logit": Now("logit"),
    "cr last": Vectors("cr", LATEST),
    "cr mean": Vectors("cr", MEAN),
    "cr sum .99": Vectors("cr", Aggregate("count_sum")),
    "cr ema .99": Vectors("cr", Aggregate("count_ema")),
    **{f"cr convex {h}": Vectors("cr", Aggregate("convex", h)) for h in ("1h", "1d", "7d")},
    **{f"cr {h}": Vectors("cr", Aggregate(half_life=h)) for h in ("1h", "1d", "7d")},
    "cr 7d x4": Vectors("cr", Aggregate(half_life="7d", click=3.0)),
    **{f"{layer} mean": Vectors(layer, MEAN) for layer in LAYERS},
    "cross1": Vectors("cross1", MEAN_4),
}

Module = Literal["none", "concat", "linear", "adapter", "adapter2", "attention", "stacked", "half-lives"]


@dataclass(frozen=True)
class Arm:
    """A DCNv2 of upstream's fields, trained on downstream's days, and what it is given.

    Args:
        blocks: names in BLOCKS; their parts, side by side, are what the module reads.
        module: how they come in (models/transfer/).
        beside: upstream's interaction layers and MLP, copied, add to the logit.
        table: begin with upstream's embeddings.
        frozen: steps for which the copied layers stay as they are.
    """

    blocks: tuple[str, ...] = ()
    module: Module = "concat"
    upstream: Upstream = "dual"
    beside: bool = False
    table: bool = False
    frozen: int = 0

    @property
    def kind(self) -> str:
        """Arms of a kind are tuned together: the first of them for all."""
        parts: list[str] = [self.module if self.blocks else "none"]
        parts += ["counted"] * any(isinstance(BLOCKS[name], Counters) for name in self.blocks)
        parts += ["isomorphic"] * self.beside + ["upstream's table"] * self.table + [f"frozen {self.frozen}"] * bool(self.frozen)
        return ", ".join(parts)


VECTORS = ("ur", "ir", "cr")
FROZEN = 50
NONE = "nothing"

ARMS: dict[str, Arm] = {
    NONE: Arm(),
    "CR": Arm(("cr",)),
    "UR": Arm(("ur",)),
    "UR + IR": Arm(("ur", "ir")),
    "UR + IR + CR": Arm(VECTORS),
    "UR + IR + CR of cross1": Arm(("ur", "ir", "cross1")),
    "counters": Arm(("counters",)),
    "counters of users": Arm(("user counters",)),
    "counters of items": Arm(("item counters",)),
    "counters + CR": Arm(("counters", "cr")),
    "counters + UR + IR": Arm(("counters", "ur", "ir")),
    "counters + UR + IR + CR": Arm(("counters", *VECTORS)),
    "rates": Arm(("rates",)),
    "rates + UR + IR": Arm(("rates", "ur", "ir")),
    "rates + affinity + UR + IR": Arm(("rates", "affinity", "ur", "ir")),
    "whole record": Arm(("rates", "affinity", *VECTORS)),
    "whole record, CR of cross1": Arm(("rates", "affinity", "ur", "ir", "cross1")),
    "whole record, half-lives side by side": Arm(("rates", "affinity", "ur", "ir", "cr at half-lives")),
    "whole record, half-lives attended": Arm(("rates", "affinity", "ur", "ir", "cr at half-lives"), "half-lives"),
    "upstream's logit": Arm(("logit",)),
    "counters + upstream's logit": Arm(("counters", "logit")),
    "CR of a random upstream": Arm(("cr",), upstream="random"),
    "CR, shared branch": Arm(("cr",), upstream="shared"),
    "UR + IR + CR, shared branch": Arm(VECTORS, upstream="shared"),
    "CR, upstream with click rates": Arm(("cr",), upstream="rated"),
    "UR + IR + CR, upstream with click rates": Arm(VECTORS, upstream="rated"),
    "CR: last": Arm(("cr last",)),
    "CR: plain mean": Arm(("cr mean",)),
    "CR: sum .99": Arm(("cr sum .99",)),
    "CR: count EMA .99": Arm(("cr ema .99",)),
    **{f"CR: convex {h}": Arm((f"cr convex {h}",)) for h in ("1h", "1d", "7d")},
    **{f"CR: decayed {h}": Arm((f"cr {h}",)) for h in ("1h", "1d", "7d")},
    "CR: decayed 7d, clicks weigh 4": Arm(("cr 7d x4",)),
    **{f"CR of {layer}": Arm((f"{layer} mean",)) for layer in LAYERS},
    "linear": Arm(VECTORS, "linear"),
    "non-linear adapter, gain 1": Arm(VECTORS, "adapter"),
    "non-linear adapter, gain 2": Arm(VECTORS, "adapter2"),
    "GCA, early": Arm(VECTORS, "attention"),
    "GCA, stacked": Arm(VECTORS, "stacked"),
    "upstream's table": Arm(table=True),
    "isomorphic": Arm(beside=True),
    "isomorphic, upstream's table": Arm(beside=True, table=True),
    "isomorphic, upstream's table, frozen": Arm(beside=True, table=True, frozen=FROZEN),
    "isomorphic, upstream's table, with UR + IR + CR": Arm(VECTORS, beside=True, table=True),
}

# On the second split, what the goals and the verdict need.
LATE = (
    *(NONE, "CR", "UR", "UR + IR", "UR + IR + CR"),
    *("counters", "counters of users", "counters of items", "counters + CR", "counters + UR + IR", "counters + UR + IR + CR"),
    *("rates", "rates + UR + IR", "rates + affinity + UR + IR", "whole record"),
    *("whole record, CR of cross1", "UR + IR + CR of cross1"),
    *("whole record, half-lives side by side", "whole record, half-lives attended"),
    *("upstream's logit", "counters + upstream's logit", "CR of a random upstream"),
    "CR: plain mean",
    "CR: decayed 7d",
    "CR: decayed 1h",
    "linear",
    "non-linear adapter, gain 2",
    "isomorphic, upstream's table",
    "UR + IR + CR, shared branch",
    *("CR, upstream with click rates", "UR + IR + CR, upstream with click rates"),
    *("CR of embedding", "CR of cross1", "CR of mlp1"),
)

# (table, one, other): one less other is reported, paired by seed.
PAIRS: tuple[tuple[str, str, str], ...] = (
    *(("what representations bring", one, NONE) for one in ("CR", "UR", "UR + IR", "UR + IR + CR", "upstream's logit", "counters")),
    ("what representations bring", "UR + IR", "UR"),
    ("what representations bring", "UR + IR + CR", "UR + IR"),
    ("what representations bring", "UR + IR + CR of cross1", "UR + IR"),
    ("what representations bring", "UR + IR + CR of cross1", "UR + IR + CR"),
    ("what representations bring", "CR of a random upstream", NONE),
    ("what representations bring", "CR", "CR of a random upstream"),
    ("on top of counters", "counters of users", NONE),
    ("on top of counters", "counters of items", NONE),
    ("on top of counters", "counters", "UR + IR + CR"),
    ("on top of counters", "counters + CR", NONE),
    ("on top of counters", "counters + CR", "counters"),
    ("on top of counters", "counters + UR + IR", "counters"),
    ("on top of counters", "counters + UR + IR + CR", "counters"),
    ("on top of counters", "counters + UR + IR + CR", "counters + UR + IR"),
    ("on top of counters", "counters + upstream's logit", "counters"),
    ("on top of counters", "counters + UR + IR + CR", "counters + upstream's logit"),
    ("whole record", "rates", "counters"),
    *(("whole record", one, "counters + UR + IR") for one in ("rates + UR + IR", "rates + affinity + UR + IR", "whole record")),
    ("whole record", "rates + affinity + UR + IR", "rates + UR + IR"),
    ("whole record", "whole record", "rates + affinity + UR + IR"),
    ("whole record", "whole record, CR of cross1", "whole record"),
    ("whole record", "whole record, CR of cross1", "counters + UR + IR"),
    ("whole record", "whole record, half-lives side by side", "whole record"),
    ("whole record", "whole record, half-lives attended", "whole record"),
    ("whole record", "whole record, half-lives attended", "whole record, half-lives side by side"),
    ("whole record", "whole record, half-lives attended", "counters + UR + IR"),
    ("other upstreams", "CR", "CR, shared branch"),
    ("other upstreams", "UR + IR + CR", "UR + IR + CR, shared branch"),
    ("other upstreams", "CR, upstream with click rates", NONE),
    ("other upstreams", "CR, upstream with click rates", "CR"),
    ("other upstreams", "UR + IR + CR, upstream with click rates", "UR + IR + CR"),
    *(("aggregates", name, "CR: plain mean") for name in ARMS if name.startswith("CR: ") and name != "CR: plain mean"),
    ("aggregates", "CR", "CR: plain mean"),
    ("aggregates", "CR: decayed 7d, clicks weigh 4", "CR: decayed 7d"),
    *(("layers (cr is of mlp2)", f"CR of {layer}", "CR: plain mean") for layer in LAYERS),
    *(
        ("modules", name, "UR + IR + CR")
        for name in ("linear", "non-linear adapter, gain 1", "non-linear adapter, gain 2", "GCA, early", "GCA, stacked")
    ),
    ("modules", "GCA, stacked", "GCA, early"),
    ("modules", "non-linear adapter, gain 2", "non-linear adapter, gain 1"),
    ("modules", "upstream's table", NONE),
    ("modules", "isomorphic", NONE),
    ("modules", "isomorphic, upstream's table", "upstream's table"),
    ("modules", "isomorphic, upstream's table", "UR + IR + CR"),
    ("modules", "isomorphic, upstream's table, frozen", "isomorphic, upstream's table"),
    ("modules", "isomorphic, upstream's table, with UR + IR + CR", "isomorphic, upstream's table"),
)

# (one, other, AUC to gain at least, on both splits with the interval above 0)
GOALS: tuple[tuple[str, str, float], ...] = (
    ("CR", NONE, 0.015),
    ("CR, upstream with click rates", NONE, 0.015),
    ("UR + IR + CR", "UR + IR", 0.001),
    ("whole record", "counters + UR + IR", 0.0015),
    ("whole record, CR of cross1", "counters + UR + IR", 0.0015),
)
