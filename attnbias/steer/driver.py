"""The decoding function that `generate` is given while a rule drives: row by row, one `Loop` each.

Transformers prepares everything as always (config, processors, stopping criteria, cache, several
sequences) and then calls this instead of its own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.caches import CACHE, State, copied
from attnbias.steer.loop import Loop, Request

if TYPE_CHECKING:
    from attnbias.hub.adapter import Session
    from attnbias.steer.context import Editing

_KEPT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class Driver:
    """Runs ``rule.decode`` for each row of a batch and pads what comes out.

    Args:
        editing: the context of the rule. number: of the rule there. session: of the model.
        streamer: of the call, or None.
    """

    def __init__(self, editing: Editing, number: int, session: Session, streamer: Any) -> None:
        self.editing, self.session, self.streamer = editing, session, streamer
        self.rule, self.memory = editing.rules[number], editing.memories[number]
        self.effects = editing.effects[number]
        self.name = type(self.rule).__name__

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[[Tensor, Any], Tensor],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        batch = input_ids.shape[0]
        self._check(generation_config, model_kwargs, batch, input_ids)
        stream = None if self.streamer is None else self.streamer.put
        request = Request(model, generation_config, logits_processor, stopping_criteria, stream)
        rows = []
        for row in range(batch):
            inputs = {
                name: self._row(name, value, row, batch) for name, value in model_kwargs.items()
            }
            # What the caller gave stays as it is until all has gone well.
            inputs = copied(State(input_ids, inputs, None, {})).inputs
            with self._one_row(row, batch):
                loop = Loop(request, input_ids[row : row + 1], inputs, self.memory)
                self.rule.decode(loop)
            if not loop.finished:
                raise AttnbiasError(
                    f"{self.name}.decode returned before the text was finished: go on until "
                    "loop.finished."
                )
            rows.append(loop.tokens[0])
        self.effects.add("changed")
        given = model_kwargs.get(CACHE)
        if batch == 1 and given is not None:
            vars(given).update(vars(loop.cache))
        if self.streamer is not None:
            self.streamer.end()
        found = _padded(rows, generation_config)
        if generation_config.return_dict_in_generate:
            from transformers.generation import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=found)
        return found

    @contextmanager
    def _one_row(self, row: int, batch: int) -> Iterator[None]:
        """Every context shows the spans of this row alone."""
        contexts = [one for one in self.session.participants if hasattr(one, "spans")]
        before = [one.spans for one in contexts]
        self.memory.state.clear()
        try:
            for one in contexts:
                one.spans = one.spans.row(row, batch)
            yield
        finally:
            self.memory.state.clear()
            for one, spans in zip(contexts, before, strict=True):
                one.spans = spans

    def _row(self, name: str, value: Any, row: int, batch: int) -> Any:
        if batch == 1 or name in (CACHE, "cache_position") or not _holds_tensors(value):
            return value
        axis = 1 if name == "position_ids" and getattr(value, "ndim", 0) == 3 else 0
        packed = name.startswith("pixel") and getattr(value, "ndim", 0) < 4
        if not isinstance(value, Tensor) or value.shape[axis] != batch or packed:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Refused(
                f"{self.name} runs the rows of a batch one after another and cannot tell which "
                f"part of {name} ({got}) belongs to which of {batch} rows: call generate for one "
                "row at a time."
            )
        return value.narrow(axis, row, 1)

    def _check(self, config: Any, inputs: Mapping[str, Any], batch: int, ids: Tensor) -> None:
        cache = inputs.get(CACHE)
        reasons = {
            "use_cache=True": not config.use_cache or cache is None,
            "one row with a streamer": self.streamer is not None and batch > 1,
            "input_ids, not inputs_embeds": ids.shape[1] == 0
            or inputs.get("inputs_embeds") is not None,
            "one row with a cache that is filled": batch > 1
            and cache is not None
            and cache.get_seq_length() > 0,
            "no " + " or ".join(_KEPT): config.return_dict_in_generate
            and any(getattr(config, name, None) for name in _KEPT),
        }
        for need, missing in reasons.items():
            if missing:
                raise Refused(f"{self.name} drives the decoding itself and needs {need}.")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _padded(rows: list[Tensor], config: Any) -> Tensor:
    """The rows beside each other, filled up on the right as `generate` does."""
    pad = getattr(config, "_pad_token_tensor", None)
    if pad is None:
        pad = config.pad_token_id
    value = 0 if pad is None else int(torch.as_tensor(pad).reshape(-1)[0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
