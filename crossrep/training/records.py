"""Training samples on training.<space>: a labelled sample, and what was known before it of every entity whose key it has.

One Avro record with the single-object header. What was known lies in front, as the very fields of the entities' representation records
(`crossrep.columnar.records`), all at fixed places, so that thousands are encoded or decoded as one numpy structured array; the sample
itself (`crossrep.training.samples`), whose strings have any length, is the rest. Byte by byte: docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.avro import single_object_header
from crossrep.columnar.records import HEADER, RecordLayout
from crossrep.columnar.rows import Known
from crossrep.errors import BadRecord
from crossrep.keys import Keys
from crossrep.spec import Space
from crossrep.training.samples import CODEC, attached_entities
from crossrep.views.answers import Representations, answer


@dataclass(frozen=True)
class TrainingBatch:
    """n labelled samples, each with what was known before its impression. All arrays are the caller's own."""

    sample_ids: list[str]  # of several records with one id the last is true: a click that came late has changed its label
    impression_ids: list[str]
    user_ids: list[str]
    item_ids: list[str]
    scenarios: list[str]
    branches: list[str]
    event_times: NDArray[np.float64]  # [n], of the impressions, seconds since 1970
    labels: NDArray[np.int8]  # [n], 1: clicked within the window
    clicked_at: NDArray[np.float64]  # [n], seconds since 1970; NaN if not
    known_before: NDArray[np.float64]  # [n], seconds since 1970: events that are strictly earlier are known
    known: dict[str, Representations]  # by entity, weights decayed to the impression
    positions: dict[int, int]  # partition -> the next offset to read, behind this batch

    def __len__(self) -> int:
        return len(self.sample_ids)


class TrainingLayout:
    """Where everything lies in a space's training samples, derived from the spec alone.

    `dtype` is the numpy structure of the part with fixed places, header included. Each version of the sample's schema makes another
    header; the fixed part is the same in all of them.
    """

    def __init__(self, space: Space):
        self.space = space
        self.entities = {entity: RecordLayout(space, entity) for entity in attached_entities(space)}
        fields = [(entity, layout.fields) for entity, layout in self.entities.items()]
        self.dtype = np.dtype([("header", f"V{HEADER}"), ("known_before", "<f8"), ("known", fields)])
        self.versions = {single_object_header(self.schema(version)): header for header, version in CODEC.versions.items()}
        self.header = next(header for header, sample in self.versions.items() if sample == CODEC.header)

    @property
    def size(self) -> int:
        """Bytes of the fixed part."""
        return self.dtype.itemsize

    def schema(self, sample: Any = CODEC.newest) -> dict[str, Any]:
        """The Avro schema of the part behind the header, with a version of the sample's."""
        namespace = RecordLayout(self.space, next(iter(self.space.entities))).schema["namespace"]
        # Each entity's types in a namespace of their own: two entities may have a column of one name.
        known = [{"name": e, "type": {**layout.schema, "namespace": f"{namespace}.{e}"}} for e, layout in self.entities.items()]
        fields = [
            {"name": "known_before", "type": "double"},
            {"name": "known", "type": {"type": "record", "name": "Known", "fields": known}},
            {"name": "sample", "type": {key: part for key, part in sample.items() if not key.startswith("__")}},  # fastavro's marks
        ]
        return {"type": "record", "name": "TrainingSample", "namespace": namespace, "fields": fields}

    def encode(
        self, samples: list[bytes], before: NDArray[np.float64], known: Mapping[str, Known], archived: Mapping[str, NDArray[np.int64]]
    ) -> list[bytes]:
        """n values.

        Args:
            samples: as `CODEC.encode` gives them.
            before: float64 [n], seconds since 1970: events that are strictly earlier are known.
            known: by entity, n answers.
            archived: by entity, int64 [n]: every frame of the key's partition up to and including this offset was looked at.
        """
        records = np.zeros(len(samples), self.dtype)
        records["header"], records["known_before"] = np.void(self.header), before
        for entity, layout in self.entities.items():
            found, into = known[entity], records["known"][entity]
            into["count"], into["event_time"], into["source_offset"] = found.counts, found.event_times, archived[entity]
            for name, column in layout.columns.items():
                rows = found.columns[name]
                into[f"{name}_time"] = rows.times
                if column.half_life is not None:
                    into[f"{name}_weight"] = rows.weights
                if column.dim:
                    into[name] = rows.vectors
        blob, size = records.tobytes(), self.size
        return [blob[at * size : (at + 1) * size] + sample[HEADER:] for at, sample in enumerate(samples)]

    def decode(self, values: list[bytes], positions: dict[int, int]) -> TrainingBatch:
        """The samples of n values.

        Raises:
            BadRecord: a value is no training sample of this space; says which.
        """
        samples = [self._sample(value, place) for place, value in enumerate(values)]
        records = np.frombuffer(b"".join(value[: self.size] for value in values), self.dtype)

        def column(name: str) -> list[Any]:
            return [sample[name] for sample in samples]

        times = np.array(column("event_time"), float) / 1000
        known = {}
        for entity, layout in self.entities.items():
            of = records["known"][entity]
            ids = _keys(column(self.space.key_field(entity)))
            found = answer(layout, ids, of["count"] > 0, of, times, {})
            # Also where nothing was known: so much of the archive was looked at.
            known[entity] = replace(found, source_offsets=of["source_offset"].astype(np.int64))
        return TrainingBatch(
            sample_ids=column("sample_id"),
            impression_ids=column("impression_id"),
            user_ids=column("user_id"),
            item_ids=column("item_id"),
            scenarios=column("scenario"),
            branches=column("branch"),
            event_times=times,
            labels=np.array(column("label"), np.int8),
            clicked_at=np.array(column("clicked_at"), float) / 1000,  # None becomes NaN
            known_before=records["known_before"].copy(),
            known=known,
            positions=positions,
        )

    def _sample(self, value: bytes, place: int) -> dict[str, Any]:
        header = self.versions.get(value[:HEADER])
        if header is None:
            raise BadRecord("schema", f"training sample {place} begins with {value[:HEADER].hex()}: another spec's, or of a newer crossrep")
        if len(value) < self.size:
            raise BadRecord("length", f"training sample {place} has {len(value)} bytes, fewer than the {self.size} of what was known")
        return CODEC.decode(header + value[self.size :])


def _keys(ids: list[str]) -> Keys:
    """Those of samples, in which a key may be empty: there is none then."""
    encoded = [id.encode() for id in ids]
    return Keys(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)], dtype=np.int32))
