"""What only some readers install: named when it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from crossrep.errors import CrossrepError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of the packages that `pip install 'crossrep[name]'` brings.

    Raises:
        CrossrepError: one is not installed; says how to.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise CrossrepError(f"{error.name} is not installed. It comes with: pip install 'crossrep[{name}]'") from None
