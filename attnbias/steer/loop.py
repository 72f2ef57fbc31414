"""The decoding of one prompt as a rule drives it: candidates, acceptance, going back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.attempts import Candidate, Mark, Request, random_state
from attnbias.steer.caches import State, copied, cropped, detached, light, repeated, selected

if TYPE_CHECKING:
    from attnbias.hub import Site
    from attnbias.steer.edit import Memory


class Loop:
    """The decoding of one prompt (batches are run row by row).

    The tokens are all run through the model except perhaps the last; what the rule's `look` saw in
    the forward that predicts the coming token is `looked`.

    Attributes:
        finished: whether a stopping criterion of the call holds.
        state: a mapping that the rule's other hooks see as ``site.state``; empty for each prompt.
        prompt_length: tokens of the prompt, padding included.
    """

    def __init__(self, request: Request, ids: Tensor, inputs: dict[str, Any], memory: Memory):
        self.request, self.memory = request, memory
        self.finished = False
        self.prompt_length = ids.shape[1]
        self.state = memory.state
        self._prompt = copied(State(ids, inputs, None, {}))
        self._at = self._prefill(copied(self._prompt))

    # What there is --------------------------------------------------------------------------------

    @property
    def tokens(self) -> Tensor:
        """All tokens so far, ``(1, length)``."""
        return self._at.ids

    @property
    def length(self) -> int:
        return self._at.ids.shape[1]

    @property
    def cache(self) -> Any:
        return self._at.cache

    @property
    def looked(self) -> dict[Site, Any]:
        """What `look` saw in the forward that predicts the coming token."""
        self._ready()
        return self._at.looked

    @property
    def logits(self) -> Tensor:
        """The model's scores of the coming token, ``(vocabulary,)``, float32, unprocessed."""
        self._ready()
        assert self._at.logits is not None
        return self._at.logits[0]

    @property
    def sampling(self) -> bool:
        """Whether the call asked to sample."""
        return bool(self.request.config.do_sample)

    def scores(self) -> Tensor:
        """The scores after the call's logits processors, ``(vocabulary,)``."""
        self._ready()
        assert self._at.logits is not None
        return self.request.processors(self._at.ids, self._at.logits.clone())[0]

    # What may come --------------------------------------------------------------------------------

    def candidates(
        self,
        count: int,
        tokens: int,
        *,
        sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> list[Candidate]:
        """Continuations from here; the loop stays where it is.

        Args:
            count, tokens: how many, and of at most how many tokens each.
            sample: None as the call asks.
            temperature, top_p: of the rule, after the call's logits processors; with them the call
                itself must not ask to sample.

        Cost: `tokens` forwards with `count` rows where the cache grows (DynamicCache), else with
        one row each.

        Raises:
            Refused: sampling settings of the rule and of the call at once.
        """
        warpers = self._warpers(temperature, top_p)
        draw = self.sampling if sample is None else sample
        self._ready()
        if count > 1 and not light(self._at):
            return [part for _ in range(count) for part in self._run(1, tokens, draw, warpers)]
        return self._run(count, tokens, draw, warpers)

    def append(self, more: Candidate | Tensor | int) -> None:
        """Accept a candidate of this place, or tokens ``(count,)`` that need not come from one."""
        if self.finished:
            raise AttnbiasError("the text is finished: nothing can be appended.")
        if isinstance(more, Candidate):
            self._at, self.finished = copied(more.state), more.stopped
            for token in more.tokens:
                self._stream(token)
            return
        for token in torch.as_tensor(more, device=self.tokens.device).reshape(-1):
            self._ready()
            self._at = self._at.extended(token[None])
            self._stream(token)
            self.finished = bool(self.request.stopping(self._at.ids, None)[0])
            if self.finished:
                return

    # Going back -----------------------------------------------------------------------------------

    def snapshot(self) -> Mark:
        """This point, with the state of the random numbers."""
        return Mark(copied(self._at), self.finished, random_state(self.tokens.device))

    def rewind(self, mark: Mark, *, random: bool = False) -> None:
        """Go back to a point; with `random` the same random numbers come again."""
        if mark.state.ids.shape[1] < self.length and self.request.stream is not None:
            raise AttnbiasError("tokens that were appended are streamed and cannot be taken back.")
        self._at, self.finished = copied(mark.state), mark.finished
        if random:
            random_state(self.tokens.device, mark.random)

    def again(self) -> None:
        """Forget the forward that predicts the coming token: it is run anew when asked for.

        For a rule that now edits it. The last token is then a step of its own, also where it is
        the end of the prompt.
        """
        if self._at.logits is None:
            return
        before = cropped(self._at)
        if before is None:  # a cache that has dropped what came before: the prompt is run once more
            if self.length != self.prompt_length or self.length == 1 or self._prompt.past:
                raise Refused(
                    f"the cache {type(self._prompt.cache).__name__} cannot give back its last "
                    "token: use the default cache of generate."
                )
            short = self._prefill(copied(self._prompt.shortened()))
            before = short.extended(self._at.ids[:, -1])
        self._at = before

    def step_with_gradients(self) -> Probe:
        """Run the forward that predicts the coming token with gradients on.

        Only that step is in the graph; the cache is a constant. The loop goes on from it.

        Raises:
            Refused: under ``torch.inference_mode``, or a cache that is no DynamicCache.
        """
        if torch.is_inference_mode_enabled():
            raise Refused(
                "gradients are needed while decoding, which torch.inference_mode forbids: use "
                "torch.no_grad (generate does so itself)."
            )
        self.again()
        if not light(self._at):
            raise Refused(
                f"gradients while decoding need the default cache of generate (DynamicCache), got "
                f"{type(self._at.cache).__name__}."
            )
        probe = Probe(self, copied(self._at))
        self._at = detached(probe.state)
        return probe

    # Inside ---------------------------------------------------------------------------------------

    def _run(
        self, count: int, tokens: int, draw: bool, warpers: list[Callable[[Tensor, Tensor], Tensor]]
    ) -> list[Candidate]:
        start = self._at
        state = repeated(copied(start), count)
        done = torch.zeros(count, dtype=torch.bool, device=state.ids.device)
        lengths = torch.zeros_like(done, dtype=torch.long)
        looked = []
        for _ in range(tokens):
            if state.logits is None:
                state = self._step(state)
            assert state.logits is not None
            looked.append(state.looked)
            # Row by row: some of the call's processors hold a state for its one row.
            lines = [
                self.request.processors(
                    state.ids[row : row + 1], state.logits[row : row + 1].clone()
                )
                for row in range(count)
            ]
            scores = torch.cat(lines)
            for warper in warpers:
                scores = warper(state.ids, scores)
            if draw:
                chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                chosen = scores.argmax(-1)
            lengths = lengths + (~done).long()
            state = state.extended(torch.where(done, chosen.new_tensor(0), chosen))
            held = [self.request.stopping(state.ids[row : row + 1], None) for row in range(count)]
            done = done | torch.cat(held).to(done.device)
            if bool(done.all()):
                break
        found = []
        for row in range(count):
            length = int(lengths[row])
            ids = state.ids[row : row + 1, : start.ids.shape[1] + length]
            seen = tuple(
                {site: _row(value, row, count) for site, value in step.items()}
                for step in looked[:length]
            )
            own = replace(selected(state, start, row), ids=ids)
            found.append(Candidate(ids[0, start.ids.shape[1] :], seen, bool(done[row]), own))
        return found

    def _warpers(
        self, temperature: float | None, top_p: float | None
    ) -> list[Callable[[Tensor, Tensor], Tensor]]:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        if temperature is None and top_p is None:
            return []
        if self.sampling:
            raise Refused(
                "the rule samples its candidates with its own temperature and top_p, and this call "
                "of generate asks to sample too: leave out do_sample, or write temperature=None, "
                "top_p=None in the rule to use those of the call."
            )
        found: list[Any] = []
        if temperature is not None and temperature != 1:
            found.append(TemperatureLogitsWarper(float(temperature)))
        if top_p is not None and top_p < 1:
            found.append(TopPLogitsWarper(float(top_p)))
        return found

    def _ready(self) -> None:
        if self._at.logits is None:
            self._at = self._step(self._at)

    def _prefill(self, state: State) -> State:
        request = self.request
        inputs = dict(state.inputs)
        out = request.model._prefill(state.ids, request.config, inputs)
        return self._after(state, inputs, out)

    def _step(self, state: State) -> State:
        """Run the last token; the state's cache is used up."""
        model = self.request.model
        inputs = model.prepare_inputs_for_generation(
            state.ids, **_one_token(type(model)), **state.inputs
        )
        return self._after(state, dict(state.inputs), model(**inputs, return_dict=True))

    def _after(self, state: State, inputs: dict[str, Any], out: Any) -> State:
        inputs = self.request.model._update_model_kwargs_for_generation(
            out, inputs, is_encoder_decoder=False
        )
        logits = out.logits[:, -1].to(copy=True, dtype=torch.float32, device=state.ids.device)
        return State(state.ids, inputs, logits, dict(self.memory.looked))

    def _stream(self, token: Tensor) -> None:
        if self.request.stream is not None:
            self.request.stream(token.reshape(1).cpu())


class Probe:
    """One step with gradients on.

    Attributes:
        logits: ``(vocabulary,)``, in the graph. looked: what `look` returned, in the graph.
    """

    def __init__(self, loop: Loop, state: State) -> None:
        self._loop = loop
        with torch.enable_grad():
            self.state = loop._step(state)
            assert self.state.logits is not None
            self.logits = self.state.logits[0]  # a view made without gradients would be cut off
        self.looked = self.state.looked

    def follow(self, token: Tensor) -> Probe:
        """The step after it that reads `token`, in the same graph."""
        return Probe(self._loop, copied(self.state).extended(token.reshape(1)))


def _one_token(kind: type[nn.Module]) -> dict[str, Any]:
    """Since 5.2 or so transformers must be told how many of the tokens are new."""
    import inspect

    from transformers import GenerationMixin

    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return {"next_sequence_length": 1} if "next_sequence_length" in known else {}


def _row(value: Any, row: int, count: int) -> Any:
    if isinstance(value, Tensor) and count > 1 and value.ndim and value.shape[0] == count:
        return value[row : row + 1]
    return value
