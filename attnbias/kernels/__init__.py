"""Attention kernels in Triton, for NVIDIA and AMD GPUs; where there is none they run interpreted.

Triton comes with PyTorch's GPU builds; elsewhere ``attnbias[gpu]`` brings it. With
``TRITON_INTERPRET=1`` in the environment before the first import every kernel runs on the CPU, one
block of a tensor at a time: slow, for tests.

Files: `terms`, what a bias is to a kernel, and the device functions that make its entries; `places`
and `ranges`, which keys a query sees; `forward`, `decode` (few queries), `backward`, `entries`
(gradients of entries that have no closed form on chip), `statistics`; `launch`, tensors to
arguments; `configs`, tile sizes; `offline`, kernels compiled for cards that are not there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MISSING = "Triton is not installed (PyTorch's GPU builds bring it; so does attnbias[gpu])"

_off = 0


@contextmanager
def disabled() -> Iterator[None]:
    """No kernel offers inside: for tests, and to see what the kernels bring."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def switched_off() -> bool:
    """Whether `disabled` is in force."""
    return _off > 0


@functools.cache
def installed() -> bool:
    """Whether Triton can be found; nothing is imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run on the CPU, interpreted."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "", "false", "off")


def runs_on(device: torch.device) -> str:
    """Why the kernels cannot run on a device, in words; empty where they can."""
    if _off:
        return "the kernels are switched off"
    if not installed():
        return MISSING
    if interpreted():
        return "" if device.type in ("cpu", "meta") else "TRITON_INTERPRET=1 runs on the CPU only"
    if device.type == "cuda":  # AMD's builds of PyTorch call their devices so, too
        return ""
    return f"the kernels run on GPUs, not on {device.type} (TRITON_INTERPRET=1 runs them slowly)"


__all__ = ["MISSING", "disabled", "installed", "interpreted", "runs_on", "switched_off"]
