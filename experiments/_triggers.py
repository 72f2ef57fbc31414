"""A tiny decoder for a task in which attention is needed at some tokens and idle at all others."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

CONTENT, TRIGGERS = 32, 8
BOS = CONTENT
LENGTH = 64
Kind = Literal["softmax", "softmax, ReLU", "sigmoid", "normalised sigmoid"]


def texts(rows: int, generator: torch.Generator, length: int = LENGTH) -> Tensor:
    """``BOS`` and random tokens; the token after a trigger is the one before that trigger."""
    free = torch.randint(CONTENT, (rows, length), generator=generator)
    free[:, 0] = BOS
    for place in range(3, length):
        copied = free[:, place - 1] < TRIGGERS
        free[:, place] = torch.where(copied, free[:, place - 2], free[:, place])
    return free


def _sigmoid(normalised: bool) -> Any:
    """An attention function of transformers: weights ``sigmoid(s - ln 64)``, or these over their
    sum.

    The offset lets rows add up to about one at the start, as it is usual for sigmoid attention.
    Both return the weights over their sum: the proxy that the source measures sinks on.
    """

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        score = query @ key.transpose(-2, -1) * more["scaling"] + mask
        weight = torch.sigmoid(score - math.log(LENGTH))
        share = weight / (weight.sum(-1, keepdim=True) + 1e-8)
        out = (share if normalised else weight) @ value
        return out.transpose(1, 2).contiguous(), share

    return attend


def _named(kind: Kind) -> str:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    if kind.startswith("softmax"):
        return "eager"
    name = f"experiment_{kind.replace(' ', '_')}"
    AttentionInterface.register(name, _sigmoid(kind == "normalised sigmoid"))
    AttentionMaskInterface.register(name, eager_mask)
    return name


def fresh(seed: int, kind: Kind, layers: int, heads: int, width: int) -> Any:
    """A Llama-type decoder with weights drawn by the seed, the same for every kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=CONTENT + 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=BOS,
        eos_token_id=None,
        hidden_act="relu" if kind.endswith("ReLU") else "silu",
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(_named(kind))
    return model


@lru_cache(maxsize=16)
def trained(
    seed: int,
    kind: Kind = "softmax",
    steps: int = 350,
    layers: int = 1,
    heads: int = 1,
    width: int = 32,
) -> Any:
    """Train it; the texts and the plan are the same for every kind."""
    with torch.random.fork_rng():
        model = fresh(seed, kind, layers, heads, width)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        loss = loss_of(model, texts(32, generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
    return model.eval()


def loss_of(model: Any, rows: Tensor, hide: int | None = None) -> Tensor:
    """Mean cross-entropy (nats) of the next token; the key `hide` is hidden from later queries."""
    given, mask = rows[:, :-1], None
    if hide is not None:
        count = given.shape[1]
        seen = torch.ones(count, count, dtype=torch.bool).tril()
        seen[hide + 1 :, hide] = False
        least = torch.finfo(torch.float32).min
        mask = torch.where(seen, 0.0, least).expand(len(given), 1, -1, -1)
    logits = model(input_ids=given, attention_mask=mask, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
