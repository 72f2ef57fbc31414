"""What is done with each document of a corpus, and the settings that say so."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias import native
from attnbias.errors import AttnbiasError
from attnbias.hub.modes import evaluating, limit
from attnbias.observe.corpus.documents import Corpus
from attnbias.observe.corpus.estimate import Estimate, estimate
from attnbias.observe.corpus.folder import Record
from attnbias.observe.observer import check_spans, choose, observe
from attnbias.observe.sampling import Sampler, check_sampled, generator

if TYPE_CHECKING:
    from attnbias.observe.statistic import Statistic


class Work:
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
        if queries is not None:
            Sampler(queries, seed)  # refuses what is no number of queries
            check_sampled(statistics)
        self.device = runs_on(model)
        found = sites(model)
        self.sites = found if layers == "all" else sorted(choose(found, layers), key=found.index)
        self.layers = layers if layers == "all" else _by_tower(self.sites)
        self.most = limit(model, tokenizer)
        if max_tokens is not None and (max_tokens < 1 or max_tokens > (self.most or max_tokens)):
            within = "of 1 or more" if self.most is None else f"from 1 to {self.most}"
            raise AttnbiasError(f"max_tokens: {max_tokens} came; write a number {within}.")
        self.max_tokens, self.queries, self.seed = max_tokens, queries, seed

    def settings(self, name: str, identity: str) -> dict[str, Any]:
        """All that the numbers depend on, as JSON has it."""
        weight = next(self.model.parameters())
        software = {
            name: importlib.metadata.version(name)
            for name in ("attnbias", "torch", "transformers", "numba")
            if name != "numba" or native.available()
        }
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
            "queries": self.queries, "seed": self.seed, "software": software,
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
            more = {"queries": self.queries, "seed": _seed(self.seed, index)}
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
        with evaluating(self.model):
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
        with evaluating(self.model):
            return estimate(lambda ids: self.seen(ids, longest).table(), self.ids(longest))


def _seed(seed: int, index: int) -> int:
    """A seed of its own for each document, whoever measures it."""
    return int(torch.randint(1 << 62, (1,), generator=generator(seed, index)))


def _by_tower(sites: list[Any]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for site in sites:
        found.setdefault(site.tower, []).append(site.layer)
    return found


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
