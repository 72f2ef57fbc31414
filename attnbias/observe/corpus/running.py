"""A corpus run: one document after the other, each on disk before the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnbias.errors import AttnbiasError
from attnbias.observe.corpus.documents import Corpus
from attnbias.observe.corpus.folder import Folder, Journal, begin
from attnbias.observe.corpus.merge import check_interval, merged
from attnbias.observe.corpus.processes import Processes, processes
from attnbias.observe.corpus.work import Work
from attnbias.observe.registry import resolve
from attnbias.observe.statistics import Distance, Entropy, FirstToken, Received, SinkRate

if TYPE_CHECKING:
    from attnbias.observe.corpus.table import CorpusTable

DEFAULT = (Received("queries"), Entropy(), FirstToken(), SinkRate(), Distance())

Say = Callable[[str], None]


def run(
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    statistics: Any = DEFAULT,
    *,
    out: str | os.PathLike[str],
    layers: str | Iterable[int] | Mapping[str, Iterable[int]] = "all",
    spans: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    queries: int | None = None,
    seed: int = 0,
    name: str = "",
    identity: str = "",
    confidence: float = 0.95,
    interval: str = "t",
    progress: bool = False,
    say: Say | None = None,
) -> CorpusTable | None:
    """Statistics of the attention of a model over a corpus, as means over its documents.

    Each document is one forward of its own under `observe` (so its numbers do not depend on its
    neighbours) and one line of a journal in the folder `out`, on disk before the next begins. A run
    that was stopped, by Ctrl-C or by a kill, goes on with the same call: nothing is lost but the
    document under way, and nothing is counted twice. Under ``torchrun`` each process takes the
    documents whose index modulo the number of processes is its rank; another number of processes
    may go on. Process 0 waits for the others, reads all journals and adds in the order of the
    documents: the same numbers to the last bit for any number of processes and any interruption,
    as long as a forward gives the same numbers. For that the folder keeps the number of threads of
    PyTorch and the versions of what computes (``torchrun`` starts processes of one thread: compare
    two folders only where both have as many). Processors of another kind may round otherwise.

    Processes on several machines need one folder that all of them see. Where they have none, run
    with ``out`` of their own, copy all ``part-*.jsonl`` into one folder and run there once more: it
    only adds up.

    Args:
        model: a text encoder or decoder that `support` says can be observed. tokenizer: its own.
        corpus: from `corpus.read` or `corpus.of`.
        statistics: as `observe` takes them.
        out: the folder, new, empty or of a run with the same settings.
        layers, spans: as `observe` takes them; the same for all documents.
        max_tokens: use the first so many tokens of each document; without it a document that is
            longer than the model accepts is refused before anything runs.
        queries: sample so many queries of each call, as `observe` does. seed: of that; each
            document draws its own.
        name, identity: of the model and of its weights, for the header.
        confidence, interval: of the intervals, see `load`; they can be chosen again at any time.
        progress: a bar on standard error. say: gets a sentence before the run begins, with an
            estimate of the time it will take.

    Returns:
        The table, in process 0; None in the others.

    Raises:
        AttnbiasError: bad arguments, a folder with other settings, a document too long.
        Refused: a model that cannot be observed.
    """
    check_interval(confidence, interval)
    found = resolve(statistics)
    with processes() as group:
        with _told(group):
            work = Work(model, tokenizer, corpus, found, layers, spans, max_tokens, queries, seed)
            settings = work.settings(name, identity)
            if group.rank == 0:
                begin(Path(out), settings)
        with _told(group):
            folder = begin(Path(out), settings)
            done = folder.index()
            mine = [n for n in range(group.rank, len(corpus), group.size) if n not in done]
            lengths = work.lengths(mine)
        with _told(group), _threads(folder.threads):
            _measure_all(work, folder, group, mine, lengths, len(done), progress, say)
        if group.rank:
            return None
        missing = sorted(set(range(len(corpus))) - folder.index().keys())
        if missing:
            raise AttnbiasError(
                f"{folder.path} lacks {len(missing)} documents that other processes have measured "
                f"(the first has index {missing[0]}): copy their part-*.jsonl into it and run "
                "again, which only adds up."
            )
        return merged(folder, confidence=confidence, interval=interval)


@contextmanager
def _told(group: Processes) -> Iterator[None]:
    """A step that all processes end together; the problem of one is told to all."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    group.agree(problem)


def _measure_all(
    work: Work,
    folder: Folder,
    group: Processes,
    mine: list[int],
    lengths: list[int],
    done: int,
    progress: bool,
    say: Say | None,
) -> None:
    cpu = torch.backends.cpu.get_cpu_capability()
    about = {"of": group.size, "cpu": cpu}
    journal = Journal(folder, group.rank, about)
    try:
        if say is not None:
            own = work.estimate(mine[lengths.index(max(lengths))]).total(lengths) if mine else 0.0
            waits = group.shared((own, len(mine), sum(lengths)))
            if group.rank == 0:
                say(_announced(waits, done, group.size))
        with _bar(sum(lengths), progress and group.rank == 0) as tick:
            for index, tokens in zip(mine, lengths, strict=True):
                journal.add(work.record(index))
                tick(tokens)
    finally:
        journal.close()


def _announced(waits: list[tuple[float, int, int]], done: int, size: int) -> str:
    from attnbias.observe.corpus.estimate import spoken

    documents, tokens = (sum(wait[n] for wait in waits) for n in (1, 2))
    if not documents:
        return f"all {done} documents have been measured; adding up"
    before = f" ({done} are done)" if done else ""
    by = f" by {size} processes" if size > 1 else ""
    time = spoken(max(wait[0] for wait in waits))
    return f"{documents:,} documents{before}, {tokens:,} tokens{by}: {time}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda tokens: bar.advance(task, tokens)
