"""Attention modulation on two blobs whose words leak: what each blob reads of the other's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer.hooks import Vectors
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.rules.attention_modulation import AttentionModulation, Entity
from attnbias.steer.site import SiteCall
from experiments.common import Experiment

SIDE, SIZE, HEADS = 8, 32, 4
WORDS = ("start", "black", "cat", "and", "white", "dog", "end")
SPANS = {word: (number, number + 1) for number, word in enumerate(WORDS)}
ENTITIES = (Entity("cat", ("black",)), Entity("dog", ("white",)))


@dataclass(frozen=True, kw_only=True)
class Map(Rule):
    """Keeps the map of cross-attention."""

    heads: Heads = "all"

    def look(self, site: SiteCall) -> Any:
        KEPT.append(site.attention())


KEPT: list[Tensor] = []


@dataclass(frozen=True, kw_only=True)
class Sharper(Rule):
    """Cross-attention at another temperature."""

    heads: Heads = "all"
    factor: float

    def vectors(self, site: SiteCall) -> Vectors:
        return Vectors(query=site.query * self.factor)


@dataclass(frozen=True, kw_only=True)
class Anyone(Rule):
    """Patches owned by entities at random: the mask of the method without its choice."""

    heads: Heads = "all"
    seed: int

    def groups(self, site: SiteCall) -> Tensor:
        found = torch.zeros(1, 1, site.shape[3], dtype=torch.long)
        for number, entity in enumerate(ENTITIES):
            found[0, 0, [WORDS.index(w) for w in (entity.noun, *entity.attributes)]] = number + 1
        return found

    def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        owner = torch.randint(1, 3, (1, 1, site.shape[2], 1), generator=generator)
        number = torch.arange(3)
        new = masses * ((number == owner) | (number == 0))
        return new * masses.sum(-1, keepdim=True) / new.sum(-1, keepdim=True)


def scene(seed: int) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A block, its inputs, and the blob of each patch (0: none, 1: the cat's, 2: the dog's).

    A noun's key looks like its blob. The key of an attribute looks a little like its own blob and
    nearly as much like the other.
    """
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(seed)
    block = BasicTransformerBlock(SIZE, HEADS, SIZE // HEADS, cross_attention_dim=SIZE).eval()
    axes = torch.randn(2, SIZE)
    axes = axes / axes.norm(dim=-1, keepdim=True) * SIZE**0.5
    spot = torch.stack([torch.arange(SIDE**2) // SIDE, torch.arange(SIDE**2) % SIDE], -1).float()
    near = [(spot - torch.tensor(centre)).norm(dim=-1) < 2.3 for centre in ((3.0, 1.5), (4.0, 6.0))]
    blob = near[0].long() + 2 * near[1].long()
    hidden = 1.2 * torch.randn(SIDE**2, SIZE)
    words = 0.5 * torch.randn(len(WORDS), SIZE)
    for number, (noun, attribute) in enumerate((("cat", "black"), ("dog", "white"))):
        hidden[blob == number + 1] += axes[number]
        words[WORDS.index(noun)] += 0.8 * axes[number]
        words[WORDS.index(attribute)] += 0.5 * axes[number] + 0.4 * axes[1 - number]
    with torch.no_grad():
        block.attn1.to_out[0].weight.mul_(0.1)
        for part in (block.attn2.to_q, block.attn2.to_k):
            part.weight.copy_(torch.eye(SIZE))
    given = {"hidden_states": hidden[None], "encoder_hidden_states": words[None]}
    return block, {**given, "timestep": torch.tensor([900])}, blob


@torch.no_grad()
def leaked(
    block: Any, given: dict[str, Tensor], blob: Tensor, *rules: Rule
) -> tuple[float, Tensor]:
    """Of the attention that blobs pay to entities, the share that goes to the other's words."""
    KEPT.clear()
    with ab.steer(block, *rules, Map(towers=("cross",)), spans=SPANS):
        block(**given)
    found = KEPT[-1].mean(1)[0]
    own = torch.stack(
        [
            found[:, [WORDS.index(w) for w in (entity.noun, *entity.attributes)]].sum(-1)
            for entity in ENTITIES
        ]
    )
    inside = blob > 0
    wrong = own[1 - (blob[inside] - 1), inside.nonzero()[:, 0]]
    return float((wrong / own[:, inside].sum(0)).mean()), found


def measure(seed: int) -> Mapping[str, float]:
    """Leak under the method, beside random owners and sharper attention as far from plain."""
    block, given, blob = scene(seed)
    plain, before = leaked(block, given, blob)
    rule = AttentionModulation(entities=ENTITIES)
    whole, after = leaked(block, given, blob, rule)

    def moved(found: Tensor) -> float:
        return float((found - before).abs().sum(-1).mean())

    low, high = 1.0, 64.0
    for _ in range(20):  # the factor that moves the map as far
        factor = (low * high) ** 0.5
        sharp, found = leaked(block, given, blob, Sharper(factor=factor, towers=("cross",)))
        low, high = (low, factor) if moved(found) > moved(after) else (factor, high)
    anyone, _ = leaked(block, given, blob, Anyone(seed=seed, towers=("cross",)))
    return {
        "effect": -whole,
        "control": -min(sharp, anyone),
        "leak plain": plain,
        "leak modulated": whole,
        "leak sharpened": sharp,
        "leak with random owners": anyone,
        "map moved (modulated)": moved(after),
        "map moved (sharpened)": moved(found),
    }


EXPERIMENT = Experiment(
    work="t2i-attention-modulation",
    claim=(
        "On two noisy blobs whose attributes leak, each patch seeing the words of the entity it "
        "attends to most lowers the share of attention that goes to the other blob's words."
    ),
    control=(
        "The better of two edits of the same map: a random owner for each patch, and sharper "
        "cross-attention that moves the map as far."
    ),
    measure=measure,
)
