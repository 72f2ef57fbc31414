"""A tiny Llama-type decoder to be trained on the spot, the same for all experiments."""

from __future__ import annotations

from typing import Any

import torch


def decoder(seed: int, vocabulary: int, *, key_heads: int = 4, length: int = 64) -> Any:
    """Two layers of four heads, width 48, weights drawn by the seed; token 0 begins a text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        intermediate_size=96,
        max_position_embeddings=length,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def schooling(model: Any, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its plan of learning rates."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    return optimizer, plan
