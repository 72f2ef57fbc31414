"""The abstract measures: one that says anything of a model, and one that scores its heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from attnbias.errors import AttnbiasError
from attnbias.hub.modes import evaluating as evaluating

if TYPE_CHECKING:
    from attnbias.measures.scores import Scores

Data = Iterable[Mapping[str, Any]]


class Measure(ABC):
    """A published measurement of a model. Subclasses are frozen dataclasses of its parameters.

    `measure` runs the model as often as it must, in eval mode and without touching its weights, and
    returns a frozen record. Results do not depend on how the data are cut into batches.

    Attributes:
        name: the word for it in tables and files, lower case with underscores.
    """

    name: ClassVar[str]

    @abstractmethod
    def measure(self, model: nn.Module, data: Data | None = None, *, progress: bool = False) -> Any:
        """The measurement.

        Args:
            model: a Hugging Face model that `ab.support` says can be observed.
            data: forwards, each the keyword arguments of one (``input_ids``, ``attention_mask``,
                ...); None where the measure makes probe sequences of its own.
            progress: a bar on standard error.
        """

    def parameters(self) -> dict[str, object]:
        """The fields, for files."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


class HeadMeasure(Measure):
    """A measure that gives every head of a model one number for each sample."""

    @abstractmethod
    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        """The scores of the heads; see `Measure.measure` and `Scores`."""


def forwards(data: Data | None, name: str) -> list[Mapping[str, Any]]:
    """The forwards of a measure without a probe of its own; a sentence where they are missing."""
    if data is None:
        raise AttnbiasError(
            f"{name} needs data: a list of forwards, as in [tokenizer(text, return_tensors='pt')]."
        )
    if isinstance(data, Mapping):
        raise AttnbiasError(f"{name}: data is one forward; write [inputs], a list of them.")
    found = list(data)
    if not found:
        raise AttnbiasError(f"{name}: data is empty; give at least one forward.")
    return found


@contextmanager
def bar(total: int, what: str, show: bool) -> Iterator[Any]:
    """A function to be called after each of `total` steps; a progress bar where `show`."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
