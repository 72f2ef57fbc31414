"""A protocol: one published effect, and how it is measured beside a control."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from attnbias.errors import AttnbiasError
from attnbias.steer import Rule

Item = Mapping[str, Any]
Rules = tuple[Rule, ...]
ARMS: tuple[str, ...] = ("plain", "rule", "control")


@dataclass(frozen=True)
class Cell:
    """A number that a work prints, as it prints it.

    Args:
        where: table, row and column, or the sentence that states it.
        model: the model of that number, by its name on the model hub.
        data: the data of that number.
        score: which score of the protocol it is.
        plain, rule: the plain model's number and the number under the rule, in the unit of `score`.
        margin: how far a measured number may be off and still count as the same.
        sha256: of data files that hold exactly the published items. Without one, no run can be
            called a reproduction.
    """

    where: str
    model: str
    data: str
    score: str
    plain: float | None
    rule: float | None
    margin: float
    sha256: tuple[str, ...] = ()


@dataclass
class Bench:
    """What the functions of a protocol are given.

    Attributes:
        model: in eval mode. processor: its tokenizer, processor or image processor.
        examples: the items set aside for fitting, never measured.
        ask: an item as a `Prompt`.
        random: seeded by the run.
    """

    model: Any
    processor: Any
    examples: Sequence[Item]
    ask: Callable[[Item], Any]
    random: random.Random
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way to run an item: its name and the rules in force (none: the plain model)."""

    name: str
    rules: Rules = ()


@dataclass(frozen=True)
class Protocol:
    """One effect of one work.

    Args:
        work: id in the catalogue.
        kind: name of the kind of data, a key of `KINDS`.
        effect: what the work claims of this score, in one sentence.
        score: the name of the score that is compared.
        better: whether more or less of it is better.
        rule: the rules with the published settings, fitted on ``bench.examples`` where they need
            it; called once for a run.
        control: rules of the same size that lack what the work is about; called once for a run.
        control_says: what the control is, in one sentence.
        cell: the published number.
        fit: how many items `rule` takes for fitting.
        measure: more scores of one item, ``(model, prompt, item) -> {name: value}``, under the
            rules of the arm.
        needs: what a recipe given by the user must hold, as names of rules.
    """

    work: str
    kind: str
    effect: str
    score: str
    better: Literal["higher", "lower"]
    rule: Callable[[Bench], Rules]
    control: Callable[[Bench, Rules], Rules]
    control_says: str
    needs: tuple[str, ...]
    cell: Cell
    fit: int = 0
    measure: Callable[[Any, Any, Item], dict[str, float]] | None = None

    def check(self, rules: Rules) -> Rules:
        """The rules of a recipe, refused where they are not those of this work."""
        names = {type(rule).__name__ for rule in rules}
        missing = [name for name in self.needs if name not in names]
        if missing:
            raise AttnbiasError(
                f"--recipe has {', '.join(sorted(names))}, and the protocol of {self.work} needs "
                f"{missing[0]}."
            )
        return rules
