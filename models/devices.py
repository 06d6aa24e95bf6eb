"""Where a network is trained, in which precision, and what makes two runs there equal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from crossrep.errors import ModelError


def choose(name: str) -> torch.device:
    """ "cpu", "cuda", "cuda:1", or "auto": CUDA where there is one.

    Raises:
        ModelError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"no device is called {name!r}; write auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is not supported; write auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"no device {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; write cpu")
    return device


def mixed(device: torch.device) -> torch.dtype | None:
    """bfloat16 where `device` multiplies it in hardware, to be used beside float32 weights; else None."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_fast_bfloat16()
    return torch.bfloat16 if fast else None


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without that, float32 is the faster of the two."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Only kernels whose sums have one order, so that the same seed on the same kind of device gives the same bits.

    On a CPU training uses no others, as long as the number of threads is the same.
    """
    if device.type == "cpu":
        yield
        return
    # cuBLAS reads it when it is first used; without it, torch refuses its multiplications.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
