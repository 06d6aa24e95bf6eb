"""What moved between two snapshots of a space: how many keys a column covers, where its mean vector points, how long vectors are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from crossrep.errors import DataError
from crossrep.extras import extra
from crossrep.snapshots import sql
from crossrep.snapshots.store import Manifest, Store

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Side:
    """One column in one of the two snapshots."""

    rows: int  # keys of the entity
    covered: int  # keys that the column has been touched for
    mean: Floats  # [dim], of the vectors of covered keys, each key alike; NaN where there are none, [0] where the column has no vector
    norms: Floats  # [covered], lengths of the vectors; [0] where the column has none


@dataclass(frozen=True)
class Moved:
    """One column in both."""

    entity: str
    column: str
    a: Side
    b: Side
    came: int  # covered in b alone
    gone: int  # covered in a alone
    changed: int  # covered in both, and any value differs
    cosines: Floats  # [covered in both], of a key's vector in a with its vector in b; 0 if one is all zeros

    @property
    def mean_cosine(self) -> float:
        """Of the two mean vectors: 1 if they point the same way. NaN where there are none."""
        return (
            float(self.a.mean @ self.b.mean / (np.linalg.norm(self.a.mean) * np.linalg.norm(self.b.mean))) if len(self.a.mean) else np.nan
        )

    @property
    def mean_shift(self) -> float:
        """|mean b - mean a| / |mean a|."""
        return float(np.linalg.norm(self.b.mean - self.a.mean) / np.linalg.norm(self.a.mean)) if len(self.a.mean) else np.nan


def drift(store: Store, a: Manifest, b: Manifest) -> list[Moved]:
    """Every column of every entity, in the order of the spec.

    Memory: 12 bytes a key and column; DuckDB joins the keys, and spills to disk what is too much.

    Raises:
        DataError: the two were not taken of the same spec.
    """
    if a.spec_hash != b.spec_hash:
        raise DataError(
            f"snapshots {a.id} and {b.id} are of different specs ({a.spec_hash}, {b.spec_hash}): their vectors have nothing in common"
        )
    connection = sql.connect()
    for name, manifest in (("a", a), ("b", b)):
        sql.attach(connection, store, manifest, name)
    space = a.declared()
    with np.errstate(invalid="ignore", divide="ignore"):  # a mean of nothing is NaN
        return [
            _moved(connection, entity, column, declared.dim, [_rows(a, entity), _rows(b, entity)])
            for entity, spec in space.entities.items()
            for column, declared in spec.columns.items()
        ]


def _rows(manifest: Manifest, entity: str) -> int:
    return sum(part.rows for part in manifest.parts[entity])


def _moved(connection: Any, entity: str, column: str, dim: int, rows: list[int]) -> Moved:
    in_a, in_b = f'a."{entity}"', f'b."{entity}"'
    id = connection.sql(f"FROM {in_a}").columns[0]
    values = [f'{side}."{column}_time" AS {side[0]}_time' for side in (in_a, in_b)]
    values += [f'{side}."{column}" AS {side[0]}_vector' for side in (in_a, in_b) if dim]
    joined = connection.sql(f'SELECT {", ".join(values)} FROM {in_a} FULL JOIN {in_b} ON {in_a}."{id}" = {in_b}."{id}"')
    sums, norms, cosines = np.zeros((2, dim)), ([np.zeros(0)], [np.zeros(0)]), [np.zeros(0)]
    covered, both, changed = np.zeros(2, np.int64), 0, 0
    for batch in joined.to_arrow_reader(sql.BATCH):
        present = [batch.column(side).is_valid().to_numpy(zero_copy_only=False) for side in (0, 1)]
        paired = present[0] & present[1]
        covered += [present[0].sum(), present[1].sum()]
        both += int(paired.sum())
        differs = batch.column(0).to_numpy(zero_copy_only=False)[paired] != batch.column(1).to_numpy(zero_copy_only=False)[paired]
        if dim:
            vectors = [batch.column(2 + side).flatten().to_numpy().reshape(-1, dim).astype(np.float64) for side in (0, 1)]
            lengths = [np.linalg.norm(found, axis=1) for found in vectors]
            for side in (0, 1):
                sums[side] += vectors[side].sum(axis=0)
                norms[side].append(lengths[side])
            x, y = (vectors[side][paired[present[side]]] for side in (0, 1))
            product = lengths[0][paired[present[0]]] * lengths[1][paired[present[1]]]
            cosines.append(np.divide((x * y).sum(axis=1), product, out=np.zeros(len(x)), where=product > 0))
            differs |= (x != y).any(axis=1)
        changed += int(differs.sum())
    a, b = (Side(rows[side], int(covered[side]), sums[side] / covered[side], np.concatenate(norms[side])) for side in (0, 1))
    came, gone = int(covered[1]) - both, int(covered[0]) - both
    return Moved(entity, column, a, b, came, gone, changed, np.concatenate(cosines))


def table(found: list[Moved]) -> Table:
    """As people read it: a → b."""
    rows = Table("entity", "column", "keys", "covered", "came", "gone", "changed", box=None)
    for name in ("mean: cosine", "shift", "median |vector|", "a key's cosine: p50, p5"):
        rows.add_column(name)
    for moved in found:
        sides = (moved.a, moved.b)
        keys = " → ".join(f"{side.rows:,}" for side in sides)
        covered = " → ".join(f"{side.covered / side.rows:.1%}" if side.rows else "none" for side in sides)
        counts = (f"{moved.came:,}", f"{moved.gone:,}", f"{moved.changed:,}")
        vectors = ("", "", "", "")
        if len(moved.a.mean):
            norms = " → ".join(f"{_quantile(side.norms, 0.5):.4f}" for side in sides)
            lows = f"{_quantile(moved.cosines, 0.5):.4f}, {_quantile(moved.cosines, 0.05):.4f}"
            vectors = (f"{moved.mean_cosine:.4f}", f"{moved.mean_shift:.4f}", norms, lows)
        rows.add_row(moved.entity, moved.column, keys, covered, *counts, *vectors)
    return rows


def plot(found: list[Moved], a: Manifest, b: Manifest, path: str) -> None:
    """A row for every column with vectors: lengths in a and b, and how far keys turned. The format is the path's ending.

    Raises:
        DataError: there is no vector to plot, or the file cannot be written.
    """
    with extra("analytics"):
        from matplotlib.figure import Figure
    shown = [moved for moved in found if len(moved.a.mean)]
    if not shown:
        raise DataError(f"no column of space {a.space!r} has a vector: there is nothing to plot")
    figure = Figure(figsize=(10, 2.6 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False)
    for (lengths, turns), moved in zip(grid, shown):
        both = np.concatenate([moved.a.norms, moved.b.norms, [0.0]])
        bins = np.linspace(0, max(float(both.max()), 1e-9), 60)
        for manifest, side in ((a, moved.a), (b, moved.b)):
            lengths.hist(side.norms, bins, histtype="step", label=f"{manifest.id}: {side.covered:,} keys")
        lengths.set(title=f"{moved.entity}.{moved.column}", xlabel="|vector|", ylabel="keys")
        lengths.legend(fontsize="x-small")
        turns.hist(moved.cosines, np.linspace(-1, 1, 60), color="grey")
        turns.set(
            title=f"{moved.changed:,} of {len(moved.cosines):,} keys changed",
            xlabel="cosine of a key's vectors",
            ylabel="keys",
            yscale="symlog",
        )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be written: {error}") from None


def _quantile(values: Floats, share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else np.nan
