"""How kernels are compiled: `kernel` for loops over rows, `inline` and `inner` for what is inside.

Import this module, and every module of kernels, only where `attnbias.native.available()`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# Everything of fast arithmetic but the promise that no infinity occurs: masks are infinities.
FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}
# One team of threads: two Python threads must not enter it at once.
_LOCK = threading.Lock()

prange = numba.prange
_set_eval_frame: Any = torch._C._dynamo.eval_frame.set_eval_frame


def inline(function: Function) -> Function:
    """A small function that kernels call; it disappears into them."""
    made: Function = numba.njit(fastmath=FAST, inline="always", cache=False)(function)
    return made


def inner(function: Function) -> Function:
    """A function that kernels call as a whole: compiled once, without loops over threads."""
    made: Function = numba.njit(fastmath=FAST, nogil=True, cache=False)(function)
    return made


def kernel(function: Function) -> Function:
    """A loop over `prange`. Tensors go in as arrays of the same memory, None stays None.

    Compiled for each combination of argument types at the first call with it, and kept on disk
    (`cache=True`: a change of a function that is inlined needs a change of this file's clock too).
    """
    compiled = numba.njit(parallel=True, fastmath=FAST, cache=True, nogil=True)(function)

    @functools.wraps(function)
    def run(*given: Any) -> None:
        arrays = [t.detach().numpy() if isinstance(t, Tensor) else t for t in given]
        with _LOCK:
            threads = torch.get_num_threads()
            numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))
            # The first call starts numba's team and with it sets the threads of the whole process,
            # PyTorch's too: other sums are then split otherwise, and their last bits change.
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            # `torch.compile` would look into numba's compiler too. What its own decorator does,
            # without importing the whole of it.
            before = _set_eval_frame(None)
            try:
                compiled(*arrays)
            finally:
                _set_eval_frame(before)

    return run  # type: ignore[return-value]


@inline
def exp32(x: Any) -> Any:
    """``e^x`` for float32, relative error 3e-7, 0 below -87, written so that it vectorises."""
    f = np.float32
    y = x if x > f(-87.0) else f(-87.0)
    y = y if y < f(88.0) else f(88.0)
    whole = np.floor(y * f(1.44269504088896341) + f(0.5))
    rest = y - whole * f(0.693359375)
    rest = rest - whole * f(-2.12194440e-4)
    p = f(1.9875691500e-4)
    p = p * rest + f(1.3981999507e-3)
    p = p * rest + f(8.3334519073e-3)
    p = p * rest + f(4.1665795894e-2)
    p = p * rest + f(1.6666665459e-1)
    p = p * rest + f(5.0000001201e-1)
    p = p * rest * rest + rest + f(1.0)
    bits = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return p * np.int32(bits).view(np.float32) if x > f(-87.0) else f(0.0)
