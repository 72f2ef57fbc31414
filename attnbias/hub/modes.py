"""Models as they are measured: in eval mode for a while, and how long a text they take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def limit(model: nn.Module, tokenizer: Any) -> int | None:
    """How many tokens the model accepts; None where neither model nor tokenizer says.

    The smallest of the position limit of the config, that of the tokenizer (unset limits of
    tokenizers are huge numbers) and, where positions count on from a padding index (RoBERTa), the
    rows of the position table after it.
    """
    config: Any = model.config
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [
        getattr(inner, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")
    ]
    found.append(getattr(tokenizer, "model_max_length", None))
    found += [
        table.num_embeddings - table.padding_idx - 1
        for name, table in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(table, nn.Embedding)
        and table.padding_idx is not None
    ]
    known = [int(n) for n in found if isinstance(n, (int, float)) and 0 < n < 10**9]
    return min(known, default=None)
