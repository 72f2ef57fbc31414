"""Adaptive long-context heads of a real decoder: routed by query, beside the same share by head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias
from attnbias.measures import AdaptiveHeads
from attnbias.steer import Rule, SiteCall
from experiments.common import Experiment
from experiments.zerotuning import _loaded

TEXTS, LENGTH, SINKS, WINDOW, THRESHOLD = 8, 256, 4, 16, 0.6


@dataclass(frozen=True, kw_only=True)
class Routed(Rule):
    """Hides the keys that are neither first nor near from the queries that do without them."""

    heads: Any = "all"
    long: Tensor  # (rows, layers, heads, queries) bool: which queries see all keys

    def bias(self, site: SiteCall) -> Bias:
        length = site.shape[2]
        query, key = torch.arange(length)[:, None], torch.arange(length)
        local = (key < SINKS) | (query - key < WINDOW)
        seen = self.long[:, site.site.layer, list(site.heads)][..., None] | local
        return ab.Dense(torch.where(seen, 0.0, -torch.inf))


def texts(seed: int) -> Tensor:
    """Stretches of what the decoder was trained on, as it writes it: sampled stories."""
    model, _ = _loaded()
    torch.manual_seed(seed)
    begin = torch.ones(TEXTS, 1, dtype=torch.long)
    found: Tensor = model.generate(
        begin,
        attention_mask=torch.ones_like(begin),
        do_sample=True,
        top_k=0,
        min_new_tokens=LENGTH - 1,
        max_new_tokens=LENGTH - 1,
        pad_token_id=0,
    )
    return found


@torch.no_grad()
def loss(ids: Tensor, long: Tensor | None = None) -> float:
    """Mean cross-entropy (nats) of the second half of the texts' tokens."""
    model, _ = _loaded()
    if long is None:
        logits = model(ids).logits
    else:
        with ab.steer(model, Routed(long=long)):
            logits = model(ids).logits
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return float(each[:, LENGTH // 2 :].mean())


def fixed(long: Tensor) -> Tensor:
    """As many queries with all keys, given to the heads that need them most often."""
    shares = long.double().mean((0, 3)).flatten()
    every = long[:, 0, 0].numel()  # queries of one head in all texts
    found = torch.zeros_like(long)
    whole, rest = divmod(int(long.sum()), every)
    for place, head in enumerate(shares.argsort(descending=True)[: whole + 1].tolist()):
        layer, number = divmod(head, long.shape[2])
        # Of the last head, the last queries of each text: those with the most keys.
        size = long.shape[3] if place < whole else round(rest / long.shape[0])
        found[:, layer, number, long.shape[3] - size :] = True
    return found


def measure(seed: int) -> Mapping[str, float]:
    """How much the loss grows, as a negative number; and how well the estimate finds the oracle."""
    model, _ = _loaded()
    ids = texts(seed)
    adaptive = AdaptiveHeads(sinks=SINKS, window=WINDOW, threshold=THRESHOLD)
    scores = adaptive.measure(model, [{"input_ids": ids}])
    oracle = scores.long(THRESHOLD, exact=True)
    # The threshold of the estimate that sends as many queries to all keys as the oracle does.
    known = scores.estimated[~scores.estimated.isnan()]
    tau = float(known.sort().values[int(oracle.sum())])
    long = scores.long(tau)
    far = torch.arange(LENGTH) >= SINKS + WINDOW  # queries that have a bulk
    as_given, matched = scores.agreement(THRESHOLD), scores.agreement(tau, THRESHOLD)
    plain, given = loss(ids), scores.long(THRESHOLD)
    return {
        "effect": plain - loss(ids, given),
        "control": plain - loss(ids, fixed(given)),
        "window alone": plain - loss(ids, torch.zeros_like(long)),
        "plain": plain,
        "share with all keys": float(given[..., far].double().mean()),
        "precision": as_given["precision"],
        "recall": as_given["recall"],
        "oracle": plain - loss(ids, oracle),
        "oracle, fixed heads": plain - loss(ids, fixed(oracle)),
        "share by the oracle": float(oracle[..., far].double().mean()),
        "oracle's share: threshold": tau,
        "oracle's share: effect": plain - loss(ids, long),
        "oracle's share: control": plain - loss(ids, fixed(long)),
        "oracle's share: precision": matched["precision"],
    }


EXPERIMENT = Experiment(
    work="adaptive-long-context-heads",
    claim=(
        "On texts of 256 tokens that stories260K writes, with 4 first and 16 near keys local, the "
        "queries that the estimate sends to all keys at a threshold of 0.6 keep more of the "
        "next-token predictions (loss of the second half) than as many given to whole heads, those "
        "that need them most."
    ),
    control="A fixed choice of heads with as many queries, taken from the same decisions.",
    measure=measure,
)
