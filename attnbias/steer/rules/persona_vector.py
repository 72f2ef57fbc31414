"""Persona vectors: a trait's direction in the residual stream, to watch and to steer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.directions import Direction, Table, finite, of
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.rule import Heads, Rule, is_number
from attnbias.steer.scoring import bar
from attnbias.steer.states import collect, tower_of


@dataclass(frozen=True)
class Response:
    """One prompt with its answer, for `PersonaVector`.

    Args:
        inputs: the model's inputs for one row: the prompt and, after it, the answer.
        start: the position of the answer's first token (the number of prompt tokens).
    """

    inputs: Mapping[str, Any]
    start: int


@dataclass(frozen=True, kw_only=True)
class PersonaVector(Rule):
    r"""Add a trait's direction to the residual stream while the model answers.

    .. math:: h_l \leftarrow h_l + a\, v_l, \qquad
              v_l = \operatorname{mean}_{\text{with the trait}} \bar h_l
                  - \operatorname{mean}_{\text{without}} \bar h_l

    after each chosen layer l; the inner mean is over the tokens of an answer, the outer one over
    answers.

    Args:
        directions: `Direction` records, or ``{layer: vector}``; None until `fit` has found them.
        strength: a; positive brings the trait out, negative suppresses it, 0 changes nothing.
            In units of the difference itself; there is no single published value.
        tokens: ``"response"``: the prompt's last token and what follows it; ``"all"``;
            ``"prompt"``: the tokens of a prefill only.
        layers: where to steer. Published: one layer, the one that steers best; type it.
        towers: the tower that was fitted, where there are several. heads: no part of this rule.

    Cost: O(size) per token and layer.

    A prefill in chunks under ``"response"``: the last token of every chunk is edited, since no
    chunk says that it is the last one.

    Raises:
        Refused: no directions yet. AttnbiasError: directions of another width than the model's.

    Source: Persona Vectors: Monitoring and Controlling Character Traits in Language Models, 2025
    (arXiv 2507.21509); equations read, and copies of the authors' steering code in public
    repositories. The pipeline that writes prompts and judges answers with a large model is not
    part of this: the two sets of answers are yours.
    """

    heads: Heads = "all"
    directions: tuple[Direction, ...] | None = None
    strength: float = 1.0
    tokens_at: Literal["response", "all", "prompt"] = "response"

    hidden_at: ClassVar[tuple[str, ...]] = ("layer",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != "all":
            raise AttnbiasError("PersonaVector edits hidden states: heads stays 'all'.")
        finite(self.strength, "strength")
        if self.tokens_at not in ("response", "all", "prompt"):
            raise AttnbiasError(
                f"tokens_at must be 'response', 'all' or 'prompt', got {self.tokens_at!r}."
            )
        if self.directions is not None:
            object.__setattr__(self, "directions", of(self.directions, "directions"))
        object.__setattr__(self, "_table", Table(self.directions or (), "PersonaVector"))

    def ready(self) -> None:
        if self.directions is None:
            raise Refused(
                "PersonaVector has no directions yet: write PersonaVector(directions={layer: v}), "
                "or run rule = PersonaVector().fit(model, with_trait, without_trait)."
            )

    def named_layers(self) -> set[int]:
        return super().named_layers() | {one.layer for one in self.directions or ()}

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        table: Table = getattr(self, "_table")  # noqa: B009 - no field: recipes hold the numbers
        prompt = site.phase == "prefill"
        if (
            site.layer not in table
            or not self.strength
            or (self.tokens_at == "prompt" and not prompt)
        ):
            return None
        change = self.strength * table.at(site.layer, hidden)
        whole = hidden.to(change.dtype)
        if self.tokens_at != "response" or not prompt:
            return whole + change
        order = torch.arange(hidden.shape[1], device=hidden.device)
        chosen = (order == site.last[:, None])[..., None]
        return torch.where(chosen, whole + change, whole)

    def fit(
        self,
        model: nn.Module,
        with_trait: Sequence[Response],
        without_trait: Sequence[Response],
        *,
        progress: bool = True,
    ) -> PersonaVector:
        """The difference of mean hidden states over two sets of answers, for the rule's layers.

        Args:
            model: in eval mode; it is left as it is.
            with_trait, without_trait: answers that show the trait, and answers that do not.
            progress: show a bar (needs rich; silent without it).

        Cost: one forward per answer.

        Raises:
            AttnbiasError: an empty set, an answer without tokens.
        """
        means: list[dict[int, Tensor]] = []
        with bar(len(with_trait) + len(without_trait), progress, "PersonaVector") as tick:
            for answers, name in ((with_trait, "with_trait"), (without_trait, "without_trait")):
                if not answers or not all(isinstance(one, Response) for one in answers):
                    raise AttnbiasError(
                        f"{name} must hold answers such as ab.rules.Response(inputs, start)."
                    )
                total: dict[int, Tensor] = {}
                for answer in answers:
                    for layer, mean in self._answer(model, answer).items():
                        total[layer] = total.get(layer, torch.zeros_like(mean)) + mean
                    tick()
                means.append({layer: value / len(answers) for layer, value in total.items()})
        vectors = {layer: means[0][layer] - means[1][layer] for layer in means[0]}
        return replace(self, directions=of(vectors, "directions"))

    def monitor(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
        """How strongly each prompt calls for the trait, before anything is generated.

        Returns:
            For each layer of the rule the projection of the last token's hidden state on the unit
            vector, ``(batch,)``.
        """
        self.ready()

        def last(site: HiddenCall, hidden: Tensor) -> Tensor:
            rows = torch.arange(len(hidden), device=hidden.device)
            return self._projected(site, hidden[rows, site.last][:, None])[:, 0]

        return self._collected(model, inputs, last)

    def projection(self, model: nn.Module, answer: Response) -> dict[int, float]:
        """The mean projection of an answer's tokens on each layer's unit vector.

        The difference between a training answer and the model's own one for the same prompt flags
        data that would bring the trait out.
        """
        self.ready()

        def mean(site: HiddenCall, hidden: Tensor) -> Tensor:
            return self._projected(site, hidden)[0, _inside(site, answer)].mean()

        found = self._collected(model, answer.inputs, mean)
        return {layer: float(value) for layer, value in found.items()}

    def _projected(self, site: HiddenCall, hidden: Tensor) -> Tensor:
        table: Table = getattr(self, "_table")  # noqa: B009
        vector = table.at(site.layer, hidden)[0]
        found: Tensor = hidden.to(vector.dtype) @ (vector / vector.norm())
        return found

    def _answer(self, model: nn.Module, answer: Response) -> dict[int, Tensor]:
        def mean(site: HiddenCall, hidden: Tensor) -> Tensor:
            return hidden[0, _inside(site, answer)].double().mean(0)

        return self._collected(model, answer.inputs, mean)

    def _collected(self, model: nn.Module, inputs: Mapping[str, Any], keep: Any) -> dict[int, Any]:
        tower = tower_of(self, model, prefer="text")
        layers = self.layers
        if self.directions is not None:
            known = tuple(one.layer for one in self.directions)
            layers = known if layers == "all" else tuple(n for n in layers if n in known)
        states = collect(model, inputs, layers=layers, tower=tower, keep=keep)
        return {state.site.layer: state.hidden for state in states}


def _inside(site: HiddenCall, answer: Response) -> Tensor:
    """Which tokens of the one row belong to the answer."""
    positions = site.positions[0]
    inside = positions >= answer.start
    if site.batch != 1 or not is_number(answer.start) or not bool(inside.any()):
        raise AttnbiasError(
            f"an answer must be one row with tokens from start={answer.start!r} on, got "
            f"{site.batch} rows of {int((positions >= 0).sum())} tokens."
        )
    return inside
