"""Measure one text and its two controls: the words shuffled, and random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.hub.modes import evaluating, limit
from attnbias.report import interval
from attnbias.report.data import Map, ReportData
from attnbias.report.even import Even, Watch
from attnbias.report.kinds import RECEIVED, kind_of
from attnbias.report.profiles import (
    SAMPLED,
    WHOLE,
    Near,
    Whole,
    binned,
    bins,
    gaps,
    keeps_maps,
    profiles,
)
from attnbias.report.text import Read, read, shuffled
from attnbias.report.trial import LONG, last, tell_time, usable
from attnbias.report.words import words_of

if TYPE_CHECKING:
    from attnbias.hub import Site
    from attnbias.observe import Seen

SEED = 20240229
"""Over so many tokens a page shows only statistics that need no tile of the map."""


def collect(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    name: str,
    revision: str = "",
    max_tokens: int | None = None,
    layers: str | Iterable[int] = "all",
    seed: int = SEED,
    settings: Sequence[tuple[str, str]] = (),
    rules: Sequence[Any] = (),
    progress: bool = False,
) -> ReportData:
    """Observe `model` on a text, on the same words shuffled, and with random weights.

    Three forwards under `attnbias.observe`; the model's own weights, mode and random state are as
    before afterwards. The shuffled text has the same tokens in another order of words; the
    untrained model is a new one of the same class and config, its weights drawn from `seed`.
    Every statistic that needs no argument is measured; one that does not apply to the model is left
    out, and over 8,192 tokens those that only tiles can give are.

    Args:
        model: a text encoder or decoder-only Hugging Face model. tokenizer: its tokenizer.
        text: the text. name, revision: what the report calls the model.
        max_tokens: cut a long text; without it a text longer than the model accepts is refused.
        layers: "all" or layer numbers, as in `observe`.
        seed: of the shuffle, the random weights and the bootstrap of the intervals.
        settings: more (name, value) lines for "how this was made".
        rules: of `attnbias.steer`, in force in all three forwards.
        progress: a progress bar on standard error.

    Raises:
        AttnbiasError: a text too long or too short, unknown layers. Refused: a model that cannot be
            observed.
    """
    from attnbias import __version__
    from attnbias.hub import sites
    from attnbias.hub.device import runs_on
    from attnbias.observe.observer import choose

    text_read = read(text, tokenizer, limit(model, tokenizer), max_tokens)
    order = shuffled(text_read.words, seed)
    device = runs_on(model)
    ids = torch.tensor([text_read.ids], device=device)
    length = ids.shape[1]
    _check_vocabulary(model, text_read)
    asked = layers if isinstance(layers, str) else tuple(layers)
    found = sites(model)
    wanted = set(found) if asked == "all" else choose(found, asked)
    shown = usable(model, ids, asked)
    near = Near(length)
    heads = int(getattr(_text_config(model), "num_attention_heads", 1)) * len(wanted)
    maps = keeps_maps(heads, length)
    run = _Runner(asked, wanted, [*shown, near], rules)
    if progress and length >= LONG:
        tell_time(lambda part: run(model, part, lambda: None), ids)
    with _bar(len(found), progress) as tick:
        more = [Whole(length)] if maps else []
        own, even = run(model, ids, tick("this text"), more, measure=True)
        mixed, _ = run(model, ids[:, list(order)], tick("words shuffled"))
        fresh = _untrained(model, seed)
        born, _ = run(fresh, ids, tick("random weights"))
        del fresh
    runs = (own, mixed, born)
    starts = bins(length)
    return ReportData(
        model=name, revision=revision, architecture=type(model).__name__,
        causal=all(one.causal for one in even.values()),
        text=text_read.text, tokens=text_read.tokens,
        words=words_of(text_read, order, even, runs, seed),
        layers=tuple((site.tower, site.layer) for site in even),
        maps=_maps(even, runs, shown, seed), version=__version__,
        settings=(*settings, ("Controls", f"words shuffled and weights drawn with seed {seed}")),
        profiles=profiles(list(even), runs, RECEIVED, maps), bins=starts,
        even_received=tuple(
            tuple((binned(one.received, starts) / one.queries).tolist()) for one in even.values()
        ),
        gaps=gaps(length), even_near=tuple(one.rows[near.label] for one in even.values()),
        blocks=interval.blocks(length), sampled=length if length <= WHOLE else SAMPLED,
    )  # fmt: skip


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _check_vocabulary(model: Any, text: Read) -> None:
    table = model.get_input_embeddings()
    size = getattr(table, "num_embeddings", None)
    if size is not None and max(text.ids) >= size:
        raise AttnbiasError(
            f"tokenizer: token {max(text.ids)} came, but the model knows {size}; give the "
            "tokenizer that belongs to the model"
        )


class _Runner:
    """One forward under `observe` and the rules; with `measure` even attention is measured too."""

    def __init__(
        self, layers: Any, wanted: set[Site], statistics: list[Any], rules: Sequence[Any]
    ) -> None:
        self._layers, self._wanted = layers, wanted
        self._statistics, self._rules = statistics, tuple(rules)

    def __call__(
        self,
        model: nn.Module,
        ids: Tensor,
        tick: Callable[[], None],
        more: Sequence[Any] = (),
        measure: bool = False,
    ) -> tuple[Seen, dict[Site, Even]]:
        from attnbias.hub import attach
        from attnbias.observe import observe
        from attnbias.steer import steer

        spans = last(ids)
        watch = Watch(self._wanted, tick, self._statistics if measure else None, spans)
        statistics = [*self._statistics, *more]
        with (
            evaluating(model),
            torch.no_grad(),
            observe(model, statistics, spans=spans, layers=self._layers) as seen,
            attach(model, watch),
        ):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if self._rules:
                with steer(model, *self._rules):
                    model(**inputs)
            else:
                model(**inputs)
        return seen, {site: watch.found[site] for site in seen.sites} if measure else {}


def _untrained(model: nn.Module, seed: int) -> nn.Module:
    """The same class and config with weights as they are before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: nn.Module = type(model)(copy.deepcopy(model.config))
    like = next(model.parameters())
    return fresh.to(device=like.device, dtype=like.dtype).eval()


def _maps(
    even: dict[Site, Even], runs: tuple[Seen, Seen, Seen], shown: list[Any], seed: int
) -> tuple[Map, ...]:
    tables = [_cells(seen) for seen in runs]
    found = []
    for statistic in shown:
        labels = [
            label for label in tables[0] if label == statistic.label or _entry(statistic, label)
        ]
        for column, label in enumerate(labels):
            kind = kind_of(statistic, label)
            for tower in dict.fromkeys(site.tower for site in even):
                places = [site for site in even if site.tower == tower]
                grids = [
                    tuple(tuple(table[label][tower, site.layer]) for site in places)
                    for table in tables
                ]
                low, high = _ends(runs[0], statistic, column, len(labels), tower, grids[0], seed)
                found.append(Map(
                    kind.key, tower, kind.title, kind.unit, kind.meaning,
                    tuple(site.layer for site in places), grids[0], grids[1], grids[2],
                    tuple(even[site].values[label] for site in places), low, high,
                ))  # fmt: skip
    return tuple(found)


def _entry(statistic: Any, label: str) -> bool:
    """Whether a line of the table is one of several of a statistic."""
    own = statistic.labels(("last",))
    return any(label == f"{statistic.name}[{name}]" for names in own.values() for name in names)


def _ends(
    seen: Seen, statistic: Any, column: int, columns: int, tower: str, means: Any, seed: int
) -> tuple[Any, Any]:
    """The intervals of a statistic whose number is a plain mean over the queries; else nothing."""
    from attnbias.observe.statistic import Statistic

    if statistic.over != "query" or type(statistic).summary is not Statistic.summary:
        return (), ()
    if "query" not in statistic.axes():
        return (), ()
    values = seen.tensor(statistic.label, tower).select(run=0, batch=0).values
    if values.ndim == 4:
        values = values[..., column]
    ends = interval.over_queries(values, seed)
    low, high = (
        tuple(tuple(float(x) for x in row[: len(own)]) for row, own in zip(end, means, strict=True))
        for end in ends
    )
    return low, high


def _cells(seen: Seen) -> dict[str, dict[tuple[str, int], list[float]]]:
    found: dict[str, dict[tuple[str, int], list[float]]] = {}
    for row in seen.table():
        places = found.setdefault(row.statistic, {})
        places.setdefault((row.tower, row.layer), []).append(row.value)
    return found


@contextmanager
def _bar(calls: int, show: bool) -> Iterator[Callable[[str], Callable[[], None]]]:
    """Yields a function that starts the next of three measurements and returns its tick."""
    if not show:
        yield lambda _: lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=3 * calls)

        def start(what: str) -> Callable[[], None]:
            bar.update(task, description=f"measuring: {what}")
            return lambda: bar.advance(task)

        yield start
