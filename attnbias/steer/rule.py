"""The abstract `Rule`: where it acts, in which phase, and the hooks that a rule may implement."""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from attnbias.bias import Bias
from attnbias.errors import AttnbiasError

if TYPE_CHECKING:
    from torch import nn

    from attnbias.hub.prompt import Prompt
    from attnbias.steer.branch import Branch
    from attnbias.steer.hidden import HiddenCall, TokenCall
    from attnbias.steer.hooks import Tokens, Vectors
    from attnbias.steer.loop import Loop
    from attnbias.steer.site import SiteCall
    from attnbias.steer.step import Step
    from attnbias.steer.wiring import BlockCall, Wired

Phase = Literal["prefill", "decode", "both"]
Layers = Literal["all"] | tuple[int, ...]
Heads = Literal["all"] | tuple[int, ...] | tuple[tuple[int, int], ...]
Towers = tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """An edit of attention in a trained model, without training: a frozen record of its parameters.

    A rule implements the hooks it uses. Each is a pure function of what it is given: the `SiteCall`
    shows the rule's own heads and nothing of other rules; the engine does the rest (masks, sinks,
    grouped heads, other rules, rows left alone). At one call the order is `vectors`, `bias`
    (summed over rules), `reallocate` (in the order of the rules), `outputs`, `look`. Rules are
    final: a rule is subclassed from `Rule` itself. A rule that edits nothing of a single head gives
    the field `heads` the default ``"all"``; all others make the user type it.

    Args:
        heads: ``"all"`` (must be typed), head numbers, a mapping ``{layer: heads}``, or pairs
            ``(layer, head)``. Kept as ``"all"``, numbers, or pairs.
        layers: ``"all"`` or layer numbers, counted from 0 inside a tower.
        towers: names of the towers to edit (see ``ab.sites(model)``); None where the model has one.
        phase: ``"prefill"``, ``"decode"`` (one query at a time, with a cache) or ``"both"``.

    Raises:
        AttnbiasError: a field of the wrong kind.
    """

    heads: Heads
    layers: Layers = "all"
    towers: Towers = None
    phase: Phase = "both"

    # A row-local rule decides about a query from that query's own row of attention: decoding step
    # by step then equals one pass.
    row_local: ClassVar[bool] = True
    # The rule is a `bias` per key that follows from positions, spans and heads alone: that of a
    # decoded token is made once for all layers.
    layers_alike: ClassVar[bool] = False
    # Where `hidden` edits: "layer", "mlp", "attention", "neurons"; and whether site.hidden is read.
    hidden_at: ClassVar[tuple[str, ...]] = ()
    reads_hidden: ClassVar[bool] = False
    # `tokens` answers with `Tokens(keep=...)`: tokens go at a layer and all after it.
    drops_tokens: ClassVar[bool] = False
    # Pydantic reads this for recipes: unknown fields and numbers written as text are refused.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(issubclass(base, Rule) and base is not Rule for base in cls.__bases__):
            raise TypeError(f"rules are final: derive {cls.__name__} from Rule itself.")

    def __post_init__(self) -> None:
        if type(self) is Rule:
            raise TypeError("Rule is abstract: use a rule such as ab.rules.KeyShift.")
        for name, kind in (
            ("heads", _heads(self.heads)),
            ("layers", _numbers(self.layers, "layers")),
            ("towers", _towers(self.towers)),
        ):
            object.__setattr__(self, name, kind)
        if self.phase not in ("prefill", "decode", "both"):
            raise AttnbiasError(f"phase must be 'prefill', 'decode' or 'both', got {self.phase!r}.")

    # What a rule may supply -----------------------------------------------------------------------

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the spans that must be given to `steer`."""
        return ()

    def ready(self) -> None:  # noqa: B027 - most rules have nothing to fit
        """Raise `Refused` with the line to run where the rule must first be fitted."""

    def prepare(self, model: nn.Module, prompt: Prompt) -> Rule:
        """The rule with what it measured of one prompt; `steer` calls it before the prompt is run.

        For rules that need passes of their own for each prompt. The model is seen as it is then:
        plain, or under the contexts around.
        """
        return self

    @property
    def prepared(self) -> bool:
        """Whether `prepare` has run, where the rule has one."""
        return True

    def bias(self, site: SiteCall) -> Bias | None:
        """What to add to the scaled scores, in natural-log units; None for nothing.

        Shape ``(batch | 1, heads | 1, queries, keys)`` with as many heads as ``site.heads``.
        """
        return None

    def groups(self, site: SiteCall) -> Tensor | None:
        """The group of each key: integers from 0, ``(batch | 1, heads | 1, keys)``.

        None: nothing is reallocated at this call.
        """
        raise NotImplementedError(f"{type(self).__name__} reallocates but names no groups.")

    def group_count(self, site: SiteCall, groups: Tensor) -> int:
        """How many groups `masses` has; by default one more than the largest number present."""
        return int(groups.max()) + 1 if groups.numel() else 1

    def queries(self, site: SiteCall) -> Tensor | None:
        """The queries that `reallocate` may change: bool ``(batch | 1, queries)``; None for all.

        Rows before the first of them need not be computed: `masses` may be 0 there.
        """
        return None

    def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor | None:
        """New shares of attention per group, or None to leave everything as it is.

        Args:
            masses: ``(batch, heads, queries, groups)``, the share of each row's attention that each
                group gets now (float32, float64 in a float64 model). A row sums to 1 less what goes
                to the model's sink logit, and so must the row that is returned. A group with mass
                0 (its keys are hidden from that query, or get less than 1e-30) cannot receive. A
                row that is returned as it came is left alone, bit for bit.
        """
        return None

    def vectors(self, site: SiteCall) -> Vectors | None:
        """Edited queries, keys and values (``site.query``, ``site.key``, ``site.value``)."""
        return None

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        """Edited head outputs, before the output projection.

        Args:
            out: ``(batch, heads, queries, value dim)`` after all other edits, in the model's dtype.
        """
        return None

    def wire(self, block: BlockCall, before: Tensor, after: Tensor) -> Wired | None:
        """What a block with gated self-attention (GLIGEN) goes on with; None for `after` in both.

        Args:
            before: ``(batch, patches, size)``, the residual stream before gated self-attention.
            after: the same after it.
        """
        return None

    def look(self, site: SiteCall) -> Any:
        """Anything to be kept of this call, after all edits (`site.attention` shows them).

        Later hooks of the same forward find it in ``looked[site]``. None is not kept.
        """
        return None

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        """Edited hidden states ``(batch, tokens, size)`` at each of the rule's `places`.

        ``"layer"`` is the residual stream after a layer, ``"mlp"`` and ``"attention"`` what such a
        sub-block adds to it, ``"neurons"`` the MLP's hidden units after the activation (the input
        of its down projection). None changes nothing.
        """
        return None

    @property
    def places(self) -> tuple[str, ...]:
        """Where `hidden` edits: `hidden_at`, or fewer where that depends on the rule's fields."""
        return self.hidden_at

    def tokens(self, site: TokenCall, hidden: Tensor) -> Tokens | None:
        """Tokens to add to a layer's input ``(batch, tokens, size)``, None for nothing."""
        return None

    @property
    def branches(self) -> Mapping[str, Branch]:
        """Second forwards of the model beside the main one, by name; each runs when it is asked."""
        return {}

    def logits(self, step: Step) -> Tensor | None:
        """Edited next-token scores ``(batch, vocabulary)``, None to leave them as they are.

        Called after every forward that ends in a token, with ``step.logits`` at the last real token
        of each row. Rules act in order, each on the scores of the one before.
        """
        return None

    def decode(self, loop: Loop) -> None:  # noqa: B027 - most rules leave the loop alone
        """Drive the decoding of one prompt under ``generate``, until ``loop.finished``.

        Called once for each row of the batch, after its prompt was run.
        """

    # What follows from it -------------------------------------------------------------------------

    def uses(self, hook: str) -> bool:
        """Whether the rule's class implements a hook."""
        return implements(type(self), hook)

    def heads_at(self, layer: int) -> Literal["all"] | tuple[int, ...]:
        """The heads of one layer, sorted, without repeats."""
        if self.heads == "all":
            return "all"
        chosen = {
            h[1] if isinstance(h, tuple) else h
            for h in self.heads
            if not isinstance(h, tuple) or h[0] == layer
        }
        return tuple(sorted(chosen))

    def heads_in(self, tower: str, layer: int) -> Literal["all"] | tuple[int, ...]:
        """`heads_at` in a tower: a rule that edits one tower by what it sees in another overrides
        it.
        """
        return self.heads_at(layer)

    def acts_in(self, tower: str, layer: int, phase: str) -> bool:
        """Whether the rule has something to do at a site in a phase."""
        return (
            self.phase in ("both", phase)
            and (self.towers is None or tower in self.towers)
            and (self.layers == "all" or layer in self.layers)
            and bool(self.heads_in(tower, layer))
        )

    def named_layers(self) -> set[int]:
        """Every layer number that the rule names."""
        pairs = [] if self.heads == "all" else [h[0] for h in self.heads if isinstance(h, tuple)]
        return set(pairs) | (set() if self.layers == "all" else set(self.layers))


@functools.cache
def implements(kind: type[Rule], hook: str) -> bool:
    """Whether a class of rules implements a hook."""
    return getattr(kind, hook) is not getattr(Rule, hook)


def is_number(value: object) -> bool:
    """A whole number from 0 (True and False are not numbers here)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _numbers(value: Any, name: str) -> Any:
    if isinstance(value, str) and value == "all":
        return "all"
    items = _items(value)
    if not items or not all(is_number(v) for v in items):
        raise AttnbiasError(
            f"{name} must be 'all' or a list of whole numbers from 0, got {value!r}."
        )
    return tuple(items)


def _heads(value: Any) -> Any:
    if isinstance(value, Mapping):
        pairs: list[Any] = []
        for layer, heads in value.items():
            items = _items(heads)
            if not is_number(layer) or not items or not all(is_number(h) for h in items):
                raise AttnbiasError(
                    "heads as a mapping must go from a layer number to a list of head numbers, got "
                    f"{value!r}."
                )
            pairs += [(layer, head) for head in items]
        value = pairs
    items = [] if isinstance(value, str) else _items(value)
    if items and not isinstance(value, str) and all(_is_pair(v) for v in items):
        return tuple((v[0], v[1]) for v in items)
    try:
        return _numbers(value, "heads")
    except AttnbiasError:
        raise AttnbiasError(
            "heads must be 'all', a list of head numbers, a mapping {layer: heads} or a list of "
            f"(layer, head), got {value!r}."
        ) from None


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (Sequence, range, set, frozenset)) else []


def _towers(value: Any) -> Any:
    if value is None:
        return None
    items = [] if isinstance(value, str) else _items(value)
    if not items or not all(isinstance(v, str) for v in items):
        raise AttnbiasError(
            f"towers must be None or a list of names such as ('decoder',), got {value!r}."
        )
    return tuple(items)
