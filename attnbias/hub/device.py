"""Where a model runs, also where its weights are elsewhere."""

from __future__ import annotations

import torch
from torch import nn


def runs_on(model: nn.Module) -> torch.device:
    """The device on which a model's inputs are to be.

    That of its first weight; where that one is offloaded (it comes from memory or disk for the
    length of a call, and is a placeholder in between), what the offloading hooks were told.
    """
    first = next((one.device for one in model.parameters()), torch.device("cpu"))
    if first.type != "meta":
        return first
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a sequence of hooks, or one
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("cpu")
