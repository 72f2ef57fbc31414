"""Small decoders of attention alone that learn to go on with a list that repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 48, 48  # token 0 begins a text


class Nothing(nn.Module):
    """In place of an MLP."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


class Smeared(nn.Module):
    """Keys mixed with those of the token before: ``s k_j + (1 - s) k_{j-1}``, s for each head."""

    def __init__(self, inner: nn.Linear, heads: int) -> None:
        super().__init__()
        self.inner, self.heads = inner, heads
        self.alpha = nn.Parameter(torch.zeros(heads))

    def forward(self, hidden: Tensor) -> Tensor:
        keys = self.inner(hidden)
        parts = keys.unflatten(-1, (self.heads, -1))
        before = torch.cat([parts[:, :1], parts[:, :-1]], 1)
        share = torch.sigmoid(self.alpha)[:, None]
        found: Tensor = (share * parts + (1 - share) * before).flatten(-2)
        return found


def decoder(seed: int, layers: int, heads: int, *, smeared: bool = False) -> Any:
    """Width 64, heads of 16, no MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=16,
        intermediate_size=8,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=0,
        pad_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = Nothing()
        if smeared:
            layer.self_attn.k_proj = Smeared(layer.self_attn.k_proj, heads)
    return model


def repeated(rows: int, generator: torch.Generator) -> Tensor:
    """Texts of random tokens that begin again after 8 to 24 tokens: a place says nothing."""
    periods = torch.randint(8, 25, (rows,), generator=generator)
    lists = torch.stack(
        [1 + torch.randperm(VOCABULARY - 1, generator=generator)[:24] for _ in range(rows)]
    )
    at = torch.arange(LENGTH) % periods[:, None]
    return torch.cat([lists.new_zeros(rows, 1), lists.gather(1, at)], 1)


def train(
    model: Any,
    seed: int,
    steps: int = 300,
    rate: float = 5e-3,
    look: Callable[[int], None] = lambda step: None,
) -> Any:
    """AdamW on fresh texts, the loss of every next token; `look` is called before each step."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        look(step)
        model.train()
        ids = repeated(32, generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        plan.step()
    return model.eval()
