"""What the card can do, measured in the run whose results are held against it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.device import Device

# Elements of a copy, side of a product, programs and steps of the elementwise kernels.
REAL = {"copy": 1 << 29, "side": 8192, "programs": 132 * 16, "steps": 2048}
TINY = {"copy": 1 << 12, "side": 32, "programs": 2, "steps": 4}
BLOCK = 4096  # enough for each thread that the loop itself costs nothing
SAMPLES = 7


def measure(device: Device) -> dict[str, float]:
    """Per second: ``copy`` bytes read and written; operations of a product in ``bfloat16``,
    ``float16``, ``tf32`` and ``float32``; ``exp2`` and ``fma``, elements of an elementwise kernel.
    """
    size = TINY if device.rehearsal else REAL
    found = {"copy": _copy(device, size["copy"])}
    for name in ("bfloat16", "float16", "tf32", "float32"):
        found[name] = _product(device, name, size["side"])
    with contextlib.suppress(ImportError):
        found |= _elementwise(device, size["programs"], size["steps"])
    device.empty()
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _best(device: Device, call: Callable[[], Any]) -> float:
    for _ in range(1 if device.rehearsal else 3):
        call()
    return max(min(device.sample(call, 1e-3) for _ in range(SAMPLES)), 1e-9)


def _copy(device: Device, count: int) -> float:
    source = torch.empty(count, dtype=torch.int8, device=device.name)
    target = torch.empty_like(source)
    return 2 * count / _best(device, lambda: target.copy_(source))


def _product(device: Device, name: str, side: int) -> float:
    kind = torch.float32 if name in ("tf32", "float32") else getattr(torch, name)
    a, b = (torch.randn(side, side, device=device.name).to(kind) for _ in range(2))
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = name == "tf32"
    try:
        return 2 * side**3 / _best(device, lambda: a @ b)
    finally:
        matmul.allow_tf32 = before


def _elementwise(device: Device, programs: int, steps: int) -> dict[str, float]:
    from benchmarks.gpu.ceiling_kernels import exponentials, products

    out = torch.empty(programs * BLOCK, device=device.name)
    found = {}
    kernels: dict[str, Any] = {"exp2": exponentials, "fma": products}
    for name, kernel in kernels.items():

        def call(kernel: Any = kernel) -> None:
            kernel[(programs,)](out, COUNT=steps, BLOCK=BLOCK)

        found[name] = programs * BLOCK * steps / _best(device, call)
    return found
