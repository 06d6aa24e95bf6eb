"""All frames of a space, kept as Parquet."""

from crossrep.archive.store import Archive

__all__ = ["Archive"]
