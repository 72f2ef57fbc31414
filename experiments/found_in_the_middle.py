"""Found in the middle: a right document in a middle slot, ranked by attention and by calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import attnbias as ab
from experiments._slots import DUMMY, FACT, SLOTS, cases, prompt, slots
from experiments.common import Experiment

ROWS, TEMPERATURE = 32, 0.003


def spread(rows: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """The position curve of documents that are not right: highest less lowest slot, on average."""
    means = []
    for slot in range(SLOTS):
        kept = [row[slot] for row, own in zip(rows, right, strict=True) if own != slot]
        means.append(sum(kept) / len(kept))
    return max(means) - min(means)


def measure(seed: int) -> Mapping[str, float]:
    """Share of prompts whose right document comes first, and what the attention then answers."""
    model = slots(seed)
    with torch.no_grad():
        return _measured(model, seed)


def _measured(model: Any, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(500 + seed)
    case = cases(ROWS, generator, 1 + torch.arange(ROWS) % (SLOTS - 2))
    right = case.slot.tolist()
    ranked = [ab.rules.rank_documents(model, prompt(row), dummy=(DUMMY,)) for row in case.tokens]
    variants = {
        "calibrated": ranked,
        "raw": [replace(one, bias=(0.0,) * SLOTS) for one in ranked],
        "elsewhere": [replace(one, bias=one.bias[2:] + one.bias[:2]) for one in ranked],
    }
    found = {}
    for name, rankings in variants.items():
        first = [one.order[0] == f"document {k}" for one, k in zip(rankings, right, strict=True)]
        found[f"recall_{name}"] = sum(first) / ROWS
        found[f"curve_{name}"] = spread([one.relevance for one in rankings], right)
        hits = 0
        for one, row, answer in zip(rankings, case.tokens, case.answer, strict=True):
            # Two layers, of which the first reads the documents: all are edited.
            rule = ab.rules.FoundInTheMiddle(
                heads="all", ranking=one, temperature=TEMPERATURE, last=1.0
            )
            with ab.steer(model, rule, spans=prompt(row).spans):
                hits += int(model(row[None]).logits[0, -1, FACT::2].argmax() == answer)
        found[f"accuracy_{name}"] = hits / ROWS
    plain = model(case.tokens).logits[:, -1, FACT::2].argmax(-1)
    found["accuracy_plain"] = float((plain == case.answer).double().mean())
    found["effect"] = found["recall_calibrated"]
    found["control"] = max(found["recall_raw"], found["recall_elsewhere"])
    return found


EXPERIMENT = Experiment(
    work="found-in-the-middle",
    claim=(
        "Attention less what a dummy document gets in the same place ranks the right document "
        "first when it stands in a middle slot, in a decoder that was taught to look at the ends."
    ),
    control=(
        "The better of two rankings of the same prompts: by plain attention, and by attention less "
        "what the dummy got two slots further on."
    ),
    measure=measure,
)
