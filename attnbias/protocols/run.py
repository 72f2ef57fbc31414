"""Running a protocol: three arms on every item, and a result that says what was measured."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from attnbias import __version__
from attnbias.errors import AttnbiasError
from attnbias.protocols.base import ARMS, Arm, Bench, Protocol, Rules
from attnbias.protocols.items import Items
from attnbias.protocols.journal import Journal
from attnbias.protocols.kinds import KINDS


def reproduce(
    protocol: Protocol,
    model: Any,
    processor: Any,
    items: Items,
    *,
    name: str,
    identity: str = "",
    rules: Rules = (),
    seed: int = 0,
    new_tokens: int = 32,
    journal: Path | None = None,
    fresh: bool = False,
    tick: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Score every item by the plain model, under the rule and under the control.

    Args:
        protocol: which. model: in eval mode. processor: its tokenizer, processor or image
            processor. items: the user's data.
        name: what the model is called on the hub, or its folder. identity: its commit or checksum.
        rules: instead of the protocol's own, for instance fitted ones.
        seed: for all that is drawn. new_tokens: the most that an answer is written to.
        journal: where to keep what is done, to go on from there; None keeps nothing.
        fresh: forget an earlier journal. tick: called after each item with a few words.

    Returns:
        A JSON object: means and standard errors of every score of every arm, the paired gains, the
        rules, the cited cell, and the mark: "reproduced" where model, data and value are the
        cell's, "measured" otherwise.

    Cost: three answers for each item, and what the rules add.

    Raises:
        AttnbiasError: too few items, a journal of another run.
    """
    start = time.monotonic()
    kind = KINDS[protocol.kind]
    aside = 0 if rules else protocol.fit
    if len(items.items) <= aside:
        raise AttnbiasError(
            f"--data holds {len(items.items)} items, and {protocol.work} sets {aside} aside to fit "
            "its rule: give more, or a fitted rule by --recipe"
        )
    for number, item in enumerate(items.items):
        if wrong := kind.check(item):
            raise AttnbiasError(f"item {number} of {items.name}: {wrong}")

    def ask(item: Mapping[str, Any]) -> Any:
        # The same draw for an item in every arm and after a restart.
        draw = random.Random(f"{seed} {json.dumps(item, sort_keys=True)}")
        return kind.ask(processor, item, items.folder, draw)

    asked = {
        "work": protocol.work,
        "model": [name, identity],
        "data": items.sha256,
        "items": len(items.items),
        "seed": seed,
        "new tokens": new_tokens,
        "recipe": [repr(rule) for rule in rules],
        "library": __version__,
    }
    book = None if journal is None else Journal(journal, asked, fresh=fresh)
    bench = Bench(model, processor, items.items[:aside], ask, random.Random(seed), seed)
    with torch.no_grad():
        tick("fitting" if aside and not rules else "starting")
        own = rules or protocol.rule(bench)
        arms = (Arm("plain"), Arm("rule", own), Arm("control", protocol.control(bench, own)))
        rows = []
        for number in range(aside, len(items.items)):
            item = items.items[number]
            prompt = None
            for arm in arms:
                row = None if book is None else book.done.get((number, arm.name))
                if row is None:
                    prompt = ask(item) if prompt is None else prompt
                    row = {"item": number, "arm": arm.name}
                    row |= _answer(protocol, arm, model, processor, prompt, item, new_tokens)
                    if book is not None:
                        book.write(row)
                rows.append(row)
            tick(f"item {number + 1} of {len(items.items)}")
    result = summary(protocol, rows, model=name, identity=identity, sha256=items.sha256)
    result |= {
        "data": {"file": items.name, "sha256": items.sha256, "fitted on": aside},
        "rules": [_told(rule) for rule in own],
        "control rules": [_told(rule) for rule in arms[2].rules],
        "notes": bench.notes,
        "seeds": [seed],
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "device": str(model.device),
            "dtype": str(model.dtype),
        },
        "library": __version__,
        "commit": f"attnbias {__version__}",
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
    }
    return result


def _answer(
    protocol: Protocol, arm: Arm, model: Any, processor: Any, prompt: Any, item: Any, count: int
) -> dict[str, Any]:
    import attnbias as ab

    context: Any = contextlib.nullcontext()
    if arm.rules:
        context = ab.steer(model, *arm.rules, prompt=prompt)
    with context:
        scores, text = KINDS[protocol.kind].score(model, processor, prompt, item, count)
        if protocol.measure is not None:
            scores = {**scores, **protocol.measure(model, prompt, item)}
    if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise AttnbiasError(f"the score {bad[0]} of an item is not finite under {arm.name}")
    return {"scores": scores, "text": text}


def summary(
    protocol: Protocol,
    rows: Sequence[Mapping[str, Any]],
    *,
    model: str,
    identity: str,
    sha256: str,
) -> dict[str, Any]:
    """Means, gains and the mark, from the rows of a run."""
    scores = {
        arm: {row["item"]: row["scores"] for row in rows if row["arm"] == arm} for arm in ARMS
    }
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    if protocol.score not in names:
        raise AttnbiasError(
            f"no item has the score {protocol.score!r} that {protocol.work} is about; a line is "
            f"such as {KINDS[protocol.kind].example}"
        )
    arms = {
        arm: {name: _mean([one[name] for one in found.values() if name in one]) for name in names}
        for arm, found in scores.items()
    }
    sign = 1 if protocol.better == "higher" else -1
    gains = {}
    for other in ("plain", "control"):
        pairs = [
            sign * (one[protocol.score] - scores[other][item][protocol.score])
            for item, one in scores["rule"].items()
            if protocol.score in one
        ]
        gains[f"over {other}"] = _mean(pairs)
    cell, measured = protocol.cell, arms["rule"].get(protocol.cell.score, {})
    near = (
        cell.rule is not None
        and "mean" in measured
        and abs(measured["mean"] - cell.rule) <= cell.margin
    )
    same = {
        "model": model == cell.model and identity.startswith("commit "),
        "data": sha256 in cell.sha256,
        "value": near,
    }
    return {
        "work": protocol.work,
        "mark": "reproduced" if all(same.values()) else "measured",
        "passed": all(same.values()),
        "effect": protocol.effect,
        "control": protocol.control_says,
        "score": protocol.score,
        "better": protocol.better,
        "arms": arms,
        "gain": gains,
        "model": {"name": model, "identity": identity},
        "cell": asdict(cell),
        "same as the cell": same,
    }


def _mean(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"count": 0}
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    found = {"mean": mean(values), "count": len(values)}
    return found | ({"error": error} if len(values) > 1 else {})


def _told(rule: Any) -> dict[str, Any]:
    from attnbias.steer.recipe import rule_name

    found = {"rule": rule_name(rule), **asdict(rule)}
    whole: dict[str, Any] = json.loads(json.dumps(found))
    return whole
