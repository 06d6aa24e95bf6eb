"""A process without other threads, for what traces memory: with threads about, as in a process that runs tests, `tracemalloc.stop` may
crash it before Python 3.12.9 and 3.13.2 (python/cpython#128679)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def alone(call: Callable[Given, Answer], *args: Given.args, **kwargs: Given.kwargs) -> Answer:
    """What a module's function gives or raises, called in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(call, *args, **kwargs).result()
