"""Measure one text and its two controls: the words shuffled, and random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.report.data import Map, ReportData, Word
from attnbias.report.even import Even, Watch
from attnbias.report.text import Read, limit, read, shuffled

if TYPE_CHECKING:
    from attnbias.hub import Site
    from attnbias.observe import Seen

SEED = 20240229
RECEIVED = "received[queries]"


@dataclass(frozen=True)
class _Kind:
    """A map: its label in the table of `observe`, and what a reader is told."""

    label: str
    statistic: str
    title: str
    unit: str
    meaning: str
    even: Callable[[Even], float]


KINDS = (
    _Kind("first_token", "first_token", "Attention to the first token", "share of attention",
          "The part of its attention that a head gives to the first token, as the mean over all "
          "tokens.", lambda e: float(e.received[0]) / e.queries),
    _Kind("share[last]", "last_token", "Attention to the last token", "share of attention",
          "The part of its attention that a head gives to the last token, as the mean over all "
          "tokens.", lambda e: float(e.received[-1]) / e.queries),
    _Kind(RECEIVED, "received", "Attention to the most attended token", "share of attention",
          "The part of its attention that a head gives to the one token that receives most from "
          "it, whichever that is.", lambda e: float(e.received.max()) / e.queries),
    _Kind("sink_rate", "sink_rate", "Sink heads", "yes or no",
          "Whether the tokens that can see the first token give it more than 30% of their "
          "attention on average (1: yes, 0: no).", lambda e: 0.0),
    _Kind("entropy", "entropy", "Entropy", "nats",
          "How widely a head spreads its attention: 0 is all on one token, higher is wider.",
          lambda e: e.entropy),
    _Kind("distance", "distance", "Mean distance", "tokens",
          "How far from a token the tokens are that it attends to.", lambda e: e.distance),
)  # fmt: skip


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
    progress: bool = False,
) -> ReportData:
    """Observe `model` on a text, on the same words shuffled, and with random weights.

    Three forwards under `attnbias.observe`; the model's own weights, mode and random state are as
    before afterwards. The shuffled text has the same tokens in another order of words; the
    untrained model is a new one of the same class and config, its weights drawn from `seed`.

    Args:
        model: a text encoder or decoder-only Hugging Face model. tokenizer: its tokenizer.
        text: the text. name, revision: what the report calls the model.
        max_tokens: cut a long text; without it a text longer than the model accepts is refused.
        layers: "all" or layer numbers, as in `observe`.
        seed: of the shuffle and the random weights.
        settings: more (name, value) lines for "how this was made".
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
    _check_vocabulary(model, text_read)
    asked = layers if isinstance(layers, str) else tuple(layers)
    found = sites(model)
    wanted = set(found) if asked == "all" else choose(found, asked)
    with _bar(len(found), progress) as tick:
        own, even = _run(model, ids, asked, wanted, tick("this text"), measure=True)
        mixed, _ = _run(model, ids[:, list(order)], asked, wanted, tick("words shuffled"))
        fresh = _untrained(model, seed)
        born, _ = _run(fresh, ids, asked, wanted, tick("random weights"))
        del fresh
    causal = all(one.causal for one in even.values())
    return ReportData(
        model=name, revision=revision, architecture=type(model).__name__, causal=causal,
        text=text_read.text, tokens=text_read.tokens,
        words=_words(text_read, order, even, (own, mixed, born)),
        layers=tuple((site.tower, site.layer) for site in even),
        maps=_maps(even, (own, mixed, born)), version=__version__,
        settings=(*settings, ("Controls", f"words shuffled and weights drawn with seed {seed}")),
    )  # fmt: skip


def _check_vocabulary(model: Any, text: Read) -> None:
    table = model.get_input_embeddings()
    size = getattr(table, "num_embeddings", None)
    if size is not None and max(text.ids) >= size:
        raise AttnbiasError(
            f"tokenizer: token {max(text.ids)} came, but the model knows {size}; give the "
            "tokenizer that belongs to the model"
        )


def _run(
    model: nn.Module,
    ids: Tensor,
    layers: Any,
    wanted: set[Site],
    tick: Callable[[], None],
    measure: bool = False,
) -> tuple[Seen, dict[Site, Even]]:
    from attnbias.hub import attach
    from attnbias.observe import observe, statistics

    watch = Watch(wanted, tick, measure)
    last = ids.shape[1] - 1
    measured: list[Any] = [
        statistics.Received("queries"), statistics.Entropy(), statistics.FirstToken(),
        statistics.SinkRate(), statistics.Distance(), statistics.Share(("last",)),
    ]  # fmt: skip
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            observe(model, measured, spans={"last": (last, last + 1)}, layers=layers) as seen,
            attach(model, watch),
        ):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        model.train(training)
    return seen, {site: watch.found[site] for site in seen.sites} if measure else {}


def _untrained(model: nn.Module, seed: int) -> nn.Module:
    """The same class and config with weights as they are before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: nn.Module = type(model)(copy.deepcopy(model.config))
    like = next(model.parameters())
    return fresh.to(device=like.device, dtype=like.dtype).eval()


def _maps(even: dict[Site, Even], runs: tuple[Seen, Seen, Seen]) -> tuple[Map, ...]:
    tables = [_cells(seen) for seen in runs]
    towers = dict.fromkeys(site.tower for site in even)
    found = []
    for kind in KINDS:
        for tower in towers:
            places = [site for site in even if site.tower == tower]
            grids = [
                tuple(tuple(table[tower, site.layer, kind.label]) for site in places)
                for table in tables
            ]
            found.append(
                Map(
                    kind.statistic,
                    tower,
                    kind.title,
                    kind.unit,
                    kind.meaning,
                    tuple(site.layer for site in places),
                    grids[0],
                    grids[1],
                    grids[2],
                    tuple(kind.even(even[site]) for site in places),
                )
            )
    return tuple(found)


def _cells(seen: Seen) -> dict[tuple[str, int, str], list[float]]:
    found: dict[tuple[str, int, str], list[float]] = {}
    for row in seen.table():
        found.setdefault((row.tower, row.layer, row.statistic), []).append(row.value)
    return found


def _words(
    text: Read, order: tuple[int, ...], even: dict[Site, Even], runs: tuple[Seen, Seen, Seen]
) -> tuple[Word, ...]:
    flat = torch.stack([one.received / one.queries for one in even.values()])  # (layers, keys)
    own, mixed, born = (_received(seen, even) for seen in runs)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))  # old position -> new position
    found = []
    for piece in text.words:
        here = torch.arange(piece.start, piece.stop)
        there = back[here]
        by_layer = own[:, here].sum(1) / flat[:, here].sum(1)
        moved = (mixed[:, there].sum(1) / flat[:, there].sum(1)).mean()
        place = (mixed[:, here].sum(1) / flat[:, here].sum(1)).mean()
        random = (born[:, here].sum(1) / flat[:, here].sum(1)).mean()
        found.append(
            Word(
                text=piece.text,
                special=piece.special,
                tokens=(piece.start, piece.stop),
                share=float(own[:, here].sum(1).mean()),
                received=float(by_layer.mean()),
                by_layer=tuple(by_layer.tolist()),
                shuffled=float(moved),
                in_place=float(place),
                random=float(random),
                gap=piece.gap,
            )
        )
    return tuple(found)


def _received(seen: Seen, even: dict[Site, Even]) -> Tensor:
    """(layers, keys): share of a query's attention that each key receives, mean over heads."""
    rows = []
    for site in even:
        tensor = seen.tensor(RECEIVED, site.tower)
        rows.append(tensor.select(layer=site.layer, run=0, batch=0).values.nanmean(0))
    return torch.stack(rows)


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
