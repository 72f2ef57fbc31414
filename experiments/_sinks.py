"""A tiny decoder that looks at an "image", with attention sinks planted in some of its heads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BOS, ASK, SINK, DECOY = 0, 1, 2, 3
ENTITY, ENTITIES, NOISE = 4, 12, 8
VOCABULARY = ENTITY + ENTITIES + NOISE
IMAGE = (1, 10)  # positions of the image's nine tokens: an entity, three sinks, three decoys, noise
HIDDEN, HEADS, LAYERS = 48, 4, 3
ALWAYS, MASSIVE, OTHER = 0, 1, 2  # reserved dimensions: on in every token; in sinks; in decoys
SIZE = 12.0


@dataclass(frozen=True)
class Planted:
    """The decoder before and after planting, and where the sinks were planted."""

    plain: Any
    model: Any
    heads: tuple[tuple[int, int], ...]


def prompts(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """``BOS | image | two words | ASK``, which asks for the entity in the image."""
    generator = torch.Generator().manual_seed(seed)
    entity = ENTITY + torch.randint(ENTITIES, (rows,), generator=generator)
    words = ENTITY + ENTITIES + torch.randint(NOISE, (rows, 4), generator=generator)
    one = torch.ones(rows, 1, dtype=torch.long)
    things = torch.cat(
        [entity[:, None], SINK * one.expand(-1, 3), DECOY * one.expand(-1, 3), words[:, :2]], 1
    )
    order = torch.rand(rows, things.shape[1], generator=generator).argsort(-1)
    image = things.gather(1, order)
    return torch.cat([BOS * one, image, words[:, 2:], ASK * one], 1), entity


def _reserve(model: Any) -> None:
    """Nothing but the token itself writes to the reserved dimensions."""
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[:, : OTHER + 1] = 0.0
        table[:, ALWAYS] = 1.0
        table[[BOS, SINK], MASSIVE] = SIZE
        table[DECOY, OTHER] = SIZE
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[: OTHER + 1] = 0.0
            layer.mlp.down_proj.weight[: OTHER + 1] = 0.0


@lru_cache(maxsize=8)
def trained(seed: int, steps: int = 250) -> Any:
    """Train the decoder: a few seconds on one thread."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=96,
        max_position_embeddings=64,
        bos_token_id=BOS,
        pad_token_id=BOS,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    _reserve(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        tokens, answer = prompts(64, 1000 * seed + 10_000_000 + step)
        logits = model(tokens, logits_to_keep=1).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, answer)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
        _reserve(model)
    return model.eval()


def planted(seed: int, count: int, score: float) -> Planted:
    """Let some heads attend to the sinks: their score is about `score` (natural log) there.

    All heads of the first layer, where the image is read, and `count` of the others.
    """
    plain = trained(seed)
    model = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(seed)
    order = HEADS + torch.randperm((LAYERS - 1) * HEADS, generator=generator)[:count]
    chosen = [*range(HEADS), *order.tolist()]
    heads = tuple(sorted((number // HEADS, number % HEADS) for number in chosen))
    size = HIDDEN // HEADS
    slow = size // 2 - 1  # the slowest pair of the rotary embedding hardly turns
    with torch.no_grad():
        for layer, head in heads:
            attention = model.model.layers[layer].self_attn
            norm = model.model.layers[layer].input_layernorm.weight
            row = head * size + slow
            # A sink's normalised state is about sqrt(HIDDEN) in its massive dimension.
            attention.q_proj.weight[row] = 0.0
            attention.q_proj.weight[row, ALWAYS] = size**0.5 * score / norm[ALWAYS]
            attention.k_proj.weight[row] = 0.0
            attention.k_proj.weight[row, MASSIVE] = HIDDEN**-0.5 / norm[MASSIVE]
    return Planted(plain, model, heads)


@torch.no_grad()
def scores(model: Any, rows: int, seed: int) -> tuple[float, float]:
    """Accuracy and mean log-probability (nats) of the answers."""
    tokens, answer = prompts(rows, seed)
    logs = model(tokens, logits_to_keep=1).logits[:, -1].double().log_softmax(-1)
    right = (logs.argmax(-1) == answer).double().mean()
    return float(right), float(logs.gather(1, answer[:, None]).mean())
