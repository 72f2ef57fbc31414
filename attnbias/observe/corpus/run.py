"""A corpus run: one document after the other, each on disk before the next."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.observe.corpus.documents import Corpus
from attnbias.observe.corpus.estimate import Estimate, estimate
from attnbias.observe.corpus.folder import Folder, Journal, Record, begin
from attnbias.observe.corpus.merge import check_interval, merged
from attnbias.observe.corpus.processes import Processes, processes
from attnbias.observe.observer import check_spans, choose, observe
from attnbias.observe.registry import resolve
from attnbias.observe.statistics import Distance, Entropy, FirstToken, Received, SinkRate

if TYPE_CHECKING:
    from attnbias.observe.corpus.table import CorpusTable
    from attnbias.observe.statistic import Statistic

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
    as long as a forward gives the same numbers (same machine kind, torch and number of threads;
    ``torchrun`` sets one thread a process).

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
            work = _Work(model, tokenizer, corpus, found, layers, spans, max_tokens, queries, seed)
            settings = work.settings(name, identity)
            if group.rank == 0:
                begin(Path(out), settings)
        with _told(group):
            folder = begin(Path(out), settings)
            done = folder.index()
            mine = [n for n in range(group.rank, len(corpus), group.size) if n not in done]
            lengths = work.lengths(mine)
        with _told(group):
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
    work: _Work,
    folder: Folder,
    group: Processes,
    mine: list[int],
    lengths: list[int],
    done: int,
    progress: bool,
    say: Say | None,
) -> None:
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "of": group.size}
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


class _Work:
    """What is done with each document, and the settings that say so."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        corpus: Corpus,
        statistics: list[Statistic],
        layers: Any,
        spans: Mapping[str, Any] | None,
        max_tokens: int | None,
        queries: int | None,
        seed: int,
    ) -> None:
        from attnbias.hub import sites
        from attnbias.hub.device import runs_on

        self.model, self.tokenizer, self.corpus = model, tokenizer, corpus
        self.statistics, self.spans = statistics, check_spans(spans)
        for statistic in statistics:
            statistic.check(tuple(self.spans))
            if statistic.aims:
                raise AttnbiasError(
                    f"{statistic.label} needs targets, which differ from document to document; "
                    "observe them one by one with observe(..., targets=...)."
                )
        self.device = runs_on(model)
        found = sites(model)
        self.sites = found if layers == "all" else sorted(choose(found, layers), key=found.index)
        self.layers = layers if layers == "all" else _by_tower(self.sites)
        self.most = _limit(model, tokenizer)
        if max_tokens is not None and (max_tokens < 1 or max_tokens > (self.most or max_tokens)):
            within = "of 1 or more" if self.most is None else f"from 1 to {self.most}"
            raise AttnbiasError(f"max_tokens: {max_tokens} came; write a number {within}.")
        self.max_tokens, self.queries, self.seed = max_tokens, queries, seed

    def settings(self, name: str, identity: str) -> dict[str, Any]:
        """All that the numbers depend on, as JSON has it."""
        from attnbias import __version__

        weight = next(self.model.parameters())
        return {
            "model": name, "weights": identity, "architecture": type(self.model).__name__,
            "dtype": str(weight.dtype).removeprefix("torch."), "device": self.device.type,
            "tokenizer": _tokenizer_digest(self.tokenizer),
            "corpus": {
                "name": self.corpus.name, "sha256": self.corpus.digest,
                "documents": len(self.corpus),
            },
            "statistics": [
                {"label": s.label, "name": s.name, "parameters": _jsonable(s.parameters())}
                for s in self.statistics
            ],
            "layers": [[site.tower, site.layer] for site in self.sites],
            "spans": _jsonable(self.spans), "max_tokens": self.max_tokens,
            "queries": self.queries, "seed": self.seed, "version": __version__,
        }  # fmt: skip

    def ids(self, index: int) -> Tensor:
        """``(1, tokens)``: a document as the model reads it."""
        document = self.corpus[index]
        cut = {} if self.max_tokens is None else {
            "truncation": True, "max_length": self.max_tokens,
        }  # fmt: skip
        ids = self.tokenizer(document.text, verbose=False, **cut)["input_ids"]
        where = f"corpus {self.corpus.name!r}, line {document.line}"
        if not ids:
            raise AttnbiasError(f"{where}: the tokenizer makes no token of it; leave it out.")
        if self.most is not None and len(ids) > self.most:
            raise AttnbiasError(
                f"{where}: the document has {len(ids)} tokens, and the model accepts {self.most}; "
                f"write --max-tokens {self.most} to use the beginning of each document."
            )
        return torch.tensor([ids], device=self.device)

    def lengths(self, documents: list[int]) -> list[int]:
        """Tokens of each document; the first that cannot be read is an error."""
        return [self.ids(index).shape[1] for index in documents]

    def seen(self, ids: Tensor, index: int) -> Any:
        """One forward under `observe`."""
        more: dict[str, Any] = {}
        if self.queries is not None:
            more = {"queries": self.queries, "seed": (self.seed << 32) + index}
        with (
            torch.no_grad(),
            observe(
                self.model, self.statistics, spans=self.spans, layers=self.layers, **more
            ) as seen,
        ):
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return seen

    def record(self, index: int) -> Record:
        """Measure one document."""
        ids = self.ids(index)
        with _evaluating(self.model):
            table = self.seen(ids, index).table()
        errors = None
        if self.queries is not None:
            errors = tuple(float(row.error) for row in table)
        return Record(
            index, self.corpus[index].id, ids.shape[1],
            tuple((r.tower, r.layer, r.head, r.statistic) for r in table),
            tuple(r.value for r in table), errors,
        )  # fmt: skip

    def estimate(self, longest: int) -> Estimate:
        """From pieces of the longest document."""
        with _evaluating(self.model):
            return estimate(lambda ids: self.seen(ids, longest).table(), self.ids(longest))


def _by_tower(sites: list[Any]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for site in sites:
        found.setdefault(site.tower, []).append(site.layer)
    return found


def _limit(model: Any, tokenizer: Any) -> int | None:
    """How many tokens the model accepts; None where neither model nor tokenizer says.

    Unset limits of tokenizers are huge numbers; where positions count on from a padding index
    (RoBERTa), the rows of the position table after it count.
    """
    config = model.config
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    found = [getattr(inner, name, None) for name in names]
    found.append(getattr(tokenizer, "model_max_length", None))
    found += [
        table.num_embeddings - table.padding_idx - 1
        for name, table in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(table, nn.Embedding)
        and table.padding_idx is not None
    ]
    known = [int(n) for n in found if isinstance(n, (int, float)) and 0 < n < 10**9]
    return min(known, default=None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _tokenizer_digest(tokenizer: Any) -> str:
    """What tells one fast tokenizer from another; the class of a slow one."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return type(tokenizer).__name__
    # Cutting and padding are settings of the last call, not of the tokenizer.
    inner = type(inner).from_str(inner.to_str())
    inner.no_truncation()
    inner.no_padding()
    return hashlib.sha256(inner.to_str().encode()).hexdigest()[:16]


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


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
