"""Secondary sinks planted in a decoder: a middle MLP writes the primary sink's direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.measures.secondary_sinks import Sinks
from experiments.common import Experiment

VOCABULARY, WIDTH, LAYERS, HEADS, UNITS = 40, 64, 12, 4, 64
BOS, FIRST, SECOND = 0, 1, 2  # token 0, and two kinds of tokens that MLPs turn into sinks
ALWAYS, FLAGS = 0, (1, 2, 3)  # reserved dimensions: on in every token; on in one of the three
BORN, DONE = 1, 10  # the layers that write the primary sink and take it away
PRIMARY = 200.0
LEVELS = {FIRST: (3, 150.0), SECOND: (6, 60.0)}  # token -> creating layer, norm that is written
ROWS, LENGTH = 8, 48
FINDER = ab.measures.SecondarySinks(slack=4, least=2)


@dataclass(frozen=True)
class Planted:
    """A decoder with planted sinks and texts for it."""

    model: Any
    rows: Tensor


def planted(seed: int, *, along: bool = True, factor: float = 1.0) -> Planted:
    """A random decoder in which MLPs write one direction: early for BOS, later for two tokens.

    Args:
        along: False writes random directions of the same norm for the two tokens. factor: of the
            norms that are written for them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=UNITS,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    rows[:, BOS] = BOS
    for token in LEVELS:
        rows[torch.arange(ROWS), torch.randint(5, LENGTH - 5, (ROWS,), generator=generator)] = token
    _reserve(model)
    direction, *others = _directions(generator)
    _write(model, rows, BORN, BOS, direction * PRIMARY)
    _write(model, rows, DONE, BOS, -direction * PRIMARY)
    for (token, (layer, norm)), other in zip(LEVELS.items(), others, strict=True):
        _write(model, rows, layer, token, factor * norm * (direction if along else other))
    _read(model, direction)
    return Planted(model, rows)


def _directions(generator: torch.Generator) -> list[Tensor]:
    """Three random directions that leave the reserved dimensions alone."""
    found = torch.randn(3, WIDTH, generator=generator)
    found[:, : len(FLAGS) + 1] = 0.0
    return list(found / found.norm(dim=-1, keepdim=True))


@torch.no_grad()
def _reserve(model: Any) -> None:
    """Nothing but the token itself writes to the reserved dimensions."""
    count = len(FLAGS) + 1
    table = model.model.embed_tokens.weight
    table[:, :count] = 0.0
    table[:, ALWAYS] = 1.0
    for token, flag in zip((BOS, FIRST, SECOND), FLAGS, strict=True):
        table[token, flag] = 2.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:count] = 0.0
        layer.mlp.down_proj.weight[:count] = 0.0
        layer.mlp.gate_proj.weight[:3] = layer.mlp.up_proj.weight[:3] = 0.0
        layer.mlp.down_proj.weight[:, :3] = 0.0


@torch.no_grad()
def _write(model: Any, rows: Tensor, layer: int, token: int, vector: Tensor) -> None:
    """One hidden unit of an MLP that is on for one token and writes a vector, with its norm."""
    mlp, flag = model.model.layers[layer].mlp, FLAGS[token]
    mlp.gate_proj.weight[token, flag] = mlp.up_proj.weight[token, flag] = 4.0
    seen: list[Tensor] = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(input_ids=rows)
    handle.remove()
    mlp.down_proj.weight[:, token] = vector / seen[0][rows == token][:, token].mean()


@torch.no_grad()
def _read(model: Any, direction: Tensor) -> None:
    """One key head of every layer reads the direction; all queries of its heads ask for it."""
    size = WIDTH // HEADS
    slow = size // 2 - 1  # the slowest pair of the rotary embedding hardly turns
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.k_proj.weight[slow] = direction
        for head in range(HEADS // 2):
            attention.q_proj.weight[head * size + slow] = 0.0
            attention.q_proj.weight[head * size + slow, ALWAYS] = 8.0


def find(made: Planted) -> Sinks:
    """The sinks of the texts."""
    found: Sinks = FINDER.measure(made.model, [{"input_ids": made.rows}])
    return found


def hits(made: Planted, found: Sinks) -> float:
    """F1 of the planted tokens with their creating layers among the secondary sinks found."""
    want = {
        (sample, place, LEVELS[token][0])
        for token in LEVELS
        for sample, place in (made.rows == token).nonzero().tolist()
    }
    got = {(one.sample, one.position, one.start) for one in found.of("secondary")}
    return 2 * len(want & got) / (len(want) + len(got))


def score(made: Planted, found: Sinks, token: int) -> float:
    """Attention received by a kind of tokens in the layers after the one that writes them."""
    after = found.received[:, LEVELS[token][0] + 1 : DONE + 1]
    return float(after.transpose(1, 2)[made.rows == token].mean())


def measure(seed: int) -> Mapping[str, float]:
    """Detection and attention received, planted along the sink and in random directions."""
    made, other = planted(seed), planted(seed, along=False)
    found, random = find(made), find(other)
    with ab.steer(made.model, *[found.rescaling(layer, 1.0) for layer, _ in LEVELS.values()]):
        clipped = find(made)
    weak = planted(seed, factor=0.1)
    return {
        "effect": score(made, found, FIRST),
        "control": score(other, random, FIRST),
        "score_of_second_level": score(made, found, SECOND),
        "score_at_a_tenth_of_the_norm": score(weak, find(weak), FIRST),
        "score_rescaled": score(made, clipped, FIRST),
        "f1": hits(made, found),
        "f1_random": hits(other, random),
        "f1_rescaled": hits(made, clipped),
        "levels": float(len(found.levels)),
    }


EXPERIMENT = Experiment(
    work="secondary-attention-sinks",
    claim=(
        "Tokens for which a middle MLP writes the primary sink's direction become attention "
        "sinks (mean attention received afterwards) and are found with their creating layers."
    ),
    control="The same decoder, tokens and norms, written in random directions.",
    measure=measure,
)
