"""`observe`: statistics of a model's attention while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.bias import Bias
from attnbias.errors import AttnbiasError, Refused
from attnbias.observe.registry import resolve
from attnbias.observe.run import Run
from attnbias.observe.sampling import SampledRun, Sampler, check_sampled
from attnbias.observe.scene import Scene
from attnbias.observe.seen import Seen
from attnbias.observe.statistic import Statistic, measure

if TYPE_CHECKING:
    from attnbias.hub import Call, Site


class Observer:
    """Sees each attention call of a model and adds up the statistics. A participant of the hub."""

    role = "see"
    few = 16  # below this many queries the map is small: a tile costs less than several fused calls

    def __init__(
        self,
        statistics: list[Statistic],
        *,
        spans: Mapping[str, Any] | None = None,
        targets: Mapping[str, Tensor] | None = None,
        wanted: set[Site] | None = None,
        fused: bool = True,
        sampler: Sampler | None = None,
    ) -> None:
        self.seen = Seen(statistics, dict(spans or {}), sampler)
        self.sampler = sampler
        self.targets = dict(targets or {})
        self.statistics, self.wanted, self.fused = statistics, wanted, fused

    def begin_forward(self, forward: int) -> None:
        """Nothing to prepare."""

    def end_forward(self, forward: int) -> None:
        """Nothing to settle: every call is complete in itself."""

    def see(self, call: Call, extra: Bias | None, output: Tensor, lse: Tensor | None) -> None:
        """Measure one call; its output is not touched."""
        if self.wanted is not None and call.site not in self.wanted:
            return
        with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
            scene = Scene(call, extra, lse, self.seen.spans, self.targets)
            if scene.batch == 0 or scene.queries == 0 or scene.keys == 0:
                return
            run = self._run(call, scene)
            fused = self.fused and scene.queries >= self.few
            if isinstance(run, SampledRun):
                run.sample(call, extra, scene, run.sampler.draw(scene.real), fused=fused)
                return
            run.add(scene, measure(scene, self.statistics, fused=fused))

    def _run(self, call: Call, scene: Scene) -> Run:
        """The run that the call belongs to; one that starts its sequences starts a run."""
        runs = self.seen._runs.setdefault(call.site, [])
        starts = call.past == 0
        if not runs and not starts:
            raise Refused(
                f"{call.site}: the first forward seen continues a cache that was filled before "
                "observe() was entered; run the prefill inside the context."
            )
        if starts:
            sampler = self.sampler
            runs.append(
                Run(self.statistics, scene)
                if sampler is None
                else SampledRun(self.statistics, scene, sampler)
            )
        else:
            runs[-1].check(scene)
        return runs[-1]


@contextmanager
def observe(
    model: nn.Module,
    statistics: Any,
    *,
    spans: Mapping[str, Any] | None = None,
    targets: Mapping[str, Any] | None = None,
    layers: str | Iterable[int] | Mapping[str, Iterable[int]] = "all",
    fused: bool = True,
    queries: int | None = None,
    seed: int = 0,
) -> Iterator[Seen]:
    """Statistics of the attention of a pretrained model, without its N x N maps.

    Inside the context the model runs as always: its output is unchanged to the last bit, also under
    ``generate``. After each attention call the statistics are computed from its queries, keys and
    masks, in float32 whatever the model's dtype, by one more fused call or by tiles of 256 queries
    of one head. Within a `steer` context they are those of the edited attention.

    Forwards that continue a cache (chunks of a prefill, decoding steps) continue the same run; a
    forward without past starts a new one. Beam search, assisted decoding and any other change of
    rows or step back between two forwards is refused, since observing it would mix sequences.

    Each run keeps O(tokens) numbers for each head and statistic; nothing grows with their square.

    Args:
        model: a Hugging Face model that `support` says can be observed.
        statistics: a list of statistics (``statistics.Received()``), classes or names
            (``"received"``).
        spans: name -> ``(start, stop)``, or a list with one such pair (or None) for each row of the
            batch: absolute token positions, 0 is the first real token of a row; ``stop`` None is
            open, so that the span grows while the model generates. Or booleans ``(tokens)`` or
            ``(batch, tokens)`` by position, for tokens that do not stand together (punctuation).
        targets: name -> ``(tokens, T)`` or ``(batch, tokens, T)`` integers: for each query position
            the key positions that `statistics.At` looks at, -1 for none.
        layers: "all", layer numbers (in every tower), or tower -> layer numbers.
        fused: False computes everything from tiles (slower; the same numbers to about 1e-5).
        queries: sample so many queries of each row in each call instead of taking all, 2 or more
            (see `attnbias.observe.sampling`): O(queries x keys) in place of O(queries^2). A row
            with fewer is taken whole, and so is what costs O(N) anyway (`FirstToken`, `SinkRate`,
            `Offset`, `At` where the forward gives its log-sum-exp). Every query is drawn with the
            same probability; sums and means over queries are unbiased. The table then has an
            `error`, the standard error of each value that comes from the sampling (15 degrees of
            freedom from 30 queries on). It says too little where a few queries hold most of a mean
            and the sample is small, and nothing of a threshold (`SinkRate`) that all replicates
            pass. A statistic that needs all queries is refused.
        seed: of the sampling; the same seed draws the same queries.

    Yields:
        `Seen`, with ``table()``, ``tensor(name)`` and ``save(path)``.

    Raises:
        AttnbiasError: bad statistics, spans or layers; nothing is changed.
        Refused: a model or a call that cannot be observed exactly.
    """
    from attnbias.hub import attach, sites

    found = resolve(statistics)
    checked = check_spans(spans)
    aimed = check_targets(targets)
    for statistic in found:
        statistic.check(tuple(checked))
        missing = sorted(set(statistic.aims) - set(aimed))
        if missing:
            raise AttnbiasError(
                f"{statistic.label} needs the targets {', '.join(missing)}, and observe() was "
                f"given {', '.join(aimed) or 'none'}; write observe(..., targets=...)."
            )
    wanted = None if layers == "all" else choose(sites(model), layers)
    sampler = None if queries is None else Sampler(queries, seed)
    if sampler is not None:
        check_sampled(found)
    observer = Observer(
        found, spans=checked, targets=aimed, wanted=wanted, fused=fused, sampler=sampler
    )
    with attach(model, observer):
        yield observer.seen


def choose(sites: list[Site], layers: Any) -> set[Site]:
    """The sites of the layers wanted; a layer or tower that is not there is an error."""
    if isinstance(layers, str):
        raise AttnbiasError(
            f'layers must be "all", layer numbers or tower -> layer numbers, got {layers!r}.'
        )
    towers = {s.tower for s in sites}
    try:
        asked: list[tuple[str | None, int]]
        if isinstance(layers, Mapping):
            asked = [(tower, n) for tower, numbers in layers.items() for n in numbers]
        else:
            asked = [(None, n) for n in layers]
    except TypeError:
        raise AttnbiasError(
            f'layers must be "all", layer numbers or tower -> layer numbers, got {layers!r}.'
        ) from None
    wanted: set[Site] = set()
    for tower, number in asked:
        here = {s for s in sites if s.layer == number and tower in (None, s.tower)}
        if isinstance(number, bool) or not isinstance(number, int) or not here:
            place = "" if tower is None else f" of tower {tower!r}"
            most = {t: max(s.layer for s in sites if s.tower == t) for t in sorted(towers)}
            known = ", ".join(f"{t} 0 to {n}" for t, n in most.items())
            raise AttnbiasError(f"layers: there is no layer {number!r}{place}; there is {known}.")
        wanted |= here
    if not wanted:
        raise AttnbiasError("layers is empty; name at least one layer.")
    return wanted


def check_spans(spans: Mapping[str, Any] | None) -> dict[str, Any]:
    """Spans as plain tuples and lists of integers; one sentence for any that is not a span."""
    if spans is None:
        return {}
    if not isinstance(spans, Mapping):
        raise AttnbiasError(
            f"spans must be a mapping of name to (start, stop), got {type(spans).__name__}."
        )
    return {_name(name): _span(name, span) for name, span in spans.items()}


def check_targets(targets: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Targets as (batch | 1, tokens, T) integers."""
    if targets is None:
        return {}
    if not isinstance(targets, Mapping):
        raise AttnbiasError(
            f"targets must be a mapping of name to key positions, got {type(targets).__name__}."
        )
    found = {}
    for name, given in targets.items():
        at = torch.as_tensor(given)
        if at.ndim not in (2, 3) or at.is_floating_point() or at.dtype == torch.bool:
            raise AttnbiasError(
                f"targets[{name!r}] must be integers (tokens, T) or (batch, tokens, T), got "
                f"{at.dtype} of shape {tuple(at.shape)}."
            )
        found[_name(name)] = (at if at.ndim == 3 else at[None]).long()
    return found


def _name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise AttnbiasError(f"the name of a span must be a word, got {name!r}.")
    return name


def _span(name: str, span: Any) -> Any:
    if isinstance(span, Tensor):
        if span.dtype != torch.bool or span.ndim not in (1, 2):
            raise AttnbiasError(
                f"spans[{name!r}] as a tensor must be booleans (tokens) or (batch, tokens), got "
                f"{span.dtype} of shape {tuple(span.shape)}."
            )
        return span if span.ndim == 2 else span[None]
    if isinstance(span, list) and all(
        row is None or (isinstance(row, (tuple, list)) and len(row) == 2) for row in span
    ):
        return [None if row is None else _pair(name, row) for row in span]
    return _pair(name, span)


def _pair(name: str, span: Any) -> tuple[int, int | None]:
    problem = AttnbiasError(
        f"spans[{name!r}] must be (start, stop) with 0 <= start < stop (or stop None), or a list "
        f"of such pairs, one for each row of the batch, got {span!r}."
    )
    try:
        start, stop = span
    except (TypeError, ValueError):
        raise problem from None
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (start, stop or 1))
    if not whole or start < 0 or (stop is not None and stop <= start):
        raise problem
    return (start, stop)
