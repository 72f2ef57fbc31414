"""What fits of rules share: labelled prompts, their scores under a rule, a bar of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.steer.context import steer
from attnbias.steer.rule import Rule
from attnbias.steer.rules.zero_tuning import Example

Score = tuple[float, ...]


@torch.no_grad()
def score(rule: Rule, model: nn.Module, examples: list[Example], by: str) -> Score:
    """Accuracy with the mean log-probability of the answers, or the negative mean entropy."""
    right, log_probability, entropy = 0.0, 0.0, 0.0
    with steer(model, rule):
        for example in examples:
            logits = next_logits(model(**example.inputs).logits, example.inputs).double()
            choices = list(example.choices) or list(range(len(logits)))
            logs = logits[choices].log_softmax(-1)
            entropy -= float((logs.exp() * logs).sum())
            if by == "accuracy":
                place = choices.index(example.answer)  # type: ignore[arg-type]
                right += float(int(logs.argmax()) == place)
                log_probability += float(logs[place])
    count = len(examples)
    return (right / count, log_probability / count) if by == "accuracy" else (-entropy / count,)


def next_logits(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The logits that follow the last real token (or the classes) of the one row."""
    if logits.shape[0] != 1:
        raise AttnbiasError(f"an example must hold one row, got {logits.shape[0]}.")
    if logits.ndim == 2:
        return logits[0]
    mask = inputs.get("attention_mask")
    last = -1 if mask is None or mask.ndim != 2 else int(mask[0].nonzero()[-1])
    return logits[0, last]


def examples_of(examples: Sequence[Any], by: str) -> list[Example]:
    """Examples checked; mappings of model inputs are examples without an answer."""
    if by not in ("accuracy", "entropy"):
        raise AttnbiasError(f"by must be 'accuracy' or 'entropy', got {by!r}.")
    kept = [Example(dict(e)) if isinstance(e, Mapping) else e for e in examples]
    if not kept or not all(isinstance(e, Example) for e in kept):
        raise AttnbiasError(
            "fit needs examples such as ab.rules.Example(inputs, answer=token), got "
            f"{'none' if not kept else type(examples[0]).__name__}."
        )
    for number, example in enumerate(kept):
        missing = by == "accuracy" and example.answer is None
        if missing or (example.choices and example.answer not in (None, *example.choices)):
            raise AttnbiasError(
                f"example {number} has the answer {example.answer!r}, expected one of its choices;"
                " without labels write by='entropy'."
            )
    return kept


@contextmanager
def bar(steps: int, show: bool, name: str) -> Iterator[Callable[[], None]]:
    """A progress bar; yields what is called after each step. Silent without rich."""
    try:
        if not show:
            raise ImportError
        from rich.progress import Progress
    except ImportError:
        yield lambda: None
        return
    with Progress(transient=True) as progress:
        task = progress.add_task(name, total=steps)
        yield lambda: progress.advance(task)
        progress.update(task, completed=steps)
