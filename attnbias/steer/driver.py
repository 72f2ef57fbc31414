"""What a call of `generate` becomes while a rule drives: one `Loop` for each row of the batch.

Rows are run one after another, each by a call of the model's own `generate`, which prepares
everything as always (config, processors, stopping criteria, images, cache) and then calls a
`Driver` instead of its own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.attempts import Request
from attnbias.steer.caches import CACHE, State, copied
from attnbias.steer.gate import setting
from attnbias.steer.loop import Loop

if TYPE_CHECKING:
    from attnbias.hub.adapter import Session
    from attnbias.steer.context import Editing

_TOO_MUCH = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_ROWS = ("input_ids", "inputs", "inputs_embeds")


def drive(
    inner: Callable[..., Any],
    given: Mapping[str, Any],
    editing: Editing,
    number: int,
    session: Session,
) -> Any:
    """Answer a call of `generate`.

    Args:
        inner: the model's own. given: the arguments of the call, by name.
        editing: the context of the rule. number: of the rule there. session: of the model.

    Raises:
        Refused: inputs that cannot be split into rows, options that cannot be honoured.
    """
    root, rule = session.root, editing.rules[number]
    name = type(rule).__name__
    driver = Driver(editing, number, given.get("streamer"))
    batch = next((len(given[key]) for key in _ROWS if given.get(key) is not None), 1)
    _alone(session, name)
    copies = setting(root, given, "num_return_sequences") or 1
    _check(root, given, name, batch * copies)
    found = []
    for row in range(batch):
        inputs = {key: _row(root, key, value, row, batch, name) for key, value in given.items()}
        if copies > 1:
            inputs["num_return_sequences"] = 1
        with _spans_of_row(session, row, batch):
            found += [inner(**inputs, custom_generate=driver) for _ in range(copies)]
    if len(found) == 1:
        return found[0]
    whole = _padded(
        [one if isinstance(one, Tensor) else one.sequences for one in found], root, given
    )
    if isinstance(found[0], Tensor):
        return whole
    return type(found[0])(sequences=whole)


class Driver:
    """The decoding function that `generate` is given for one row."""

    def __init__(self, editing: Editing, number: int, streamer: Any) -> None:
        self.streamer = streamer
        self.rule, self.memory = editing.rules[number], editing.memories[number]
        self.effects = editing.effects[number]

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[[Tensor, Any], Tensor],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        name = type(self.rule).__name__
        cache = model_kwargs.get(CACHE)
        if not generation_config.use_cache or cache is None:
            raise Refused(f"{name} drives the decoding itself and needs use_cache=True.")
        if not input_ids.shape[1] or model_kwargs.get("inputs_embeds") is not None:
            raise Refused(f"{name} drives the decoding itself and needs input_ids, not embeddings.")
        stream = None if self.streamer is None else self.streamer.put
        request = Request(model, generation_config, logits_processor, stopping_criteria, stream)
        # A cache of the caller's stays as it is until all has gone well.
        inputs = copied(State(input_ids, model_kwargs, None, {})).inputs
        self.memory.state.clear()
        try:
            loop = Loop(request, input_ids, inputs, self.memory)
            self.rule.decode(loop)
        finally:
            self.memory.state.clear()
        if not loop.finished:
            raise AttnbiasError(
                f"{name}.decode returned before the text was finished: go on until loop.finished."
            )
        self.effects.add("changed")
        vars(cache).update(vars(loop.cache))
        if self.streamer is not None:
            self.streamer.end()
        if generation_config.return_dict_in_generate:
            from transformers.generation import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=loop.tokens)
        return loop.tokens


@contextmanager
def _spans_of_row(session: Session, row: int, batch: int) -> Iterator[None]:
    """Every context shows the spans of this row alone."""
    contexts = [one for one in session.participants if hasattr(one, "spans")]
    before = [one.spans for one in contexts]
    try:
        for one in contexts:
            one.spans = one.spans.row(row, batch)
        yield
    finally:
        for one, spans in zip(contexts, before, strict=True):
            one.spans = spans


def _alone(session: Session, name: str) -> None:
    for one in session.participants:
        for rule in getattr(one, "rules", ()):
            if rule.drops_tokens and rule.uses("tokens"):
                raise Refused(
                    f"{name} goes back while decoding, which {type(rule).__name__} cannot follow "
                    "(the tokens it dropped are gone): steer with one of them at a time."
                )


def _check(root: nn.Module, given: Mapping[str, Any], name: str, rows: int) -> None:
    filled = rows > 1 and given.get(CACHE) is not None
    asked = setting(root, given, "return_dict_in_generate")
    reasons = {
        "one row with a streamer": given.get("streamer") is not None and rows > 1,
        "one row with a cache of yours": filled,
        "no " + " or ".join(_TOO_MUCH): asked and any(setting(root, given, n) for n in _TOO_MUCH),
    }
    for need, missing in reasons.items():
        if missing:
            raise Refused(f"{name} drives the decoding itself and needs {need}.")


def _row(root: nn.Module, key: str, value: Any, row: int, batch: int, name: str) -> Any:
    """The part of an input that belongs to one row."""
    if batch == 1 or hasattr(getattr(root, "generation_config", None), key):
        return value
    if not _holds_tensors(value):
        return value
    axis = 1 if key == "position_ids" and getattr(value, "ndim", 0) == 3 else 0
    splits = isinstance(value, Tensor) and value.ndim > axis and value.shape[axis] == batch
    if splits and key.startswith("pixel"):  # packed patches, or images that rows do not share alike
        splits = value.ndim >= 4
    if not splits:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise Refused(
            f"{name} runs the rows of a batch one after another and cannot tell which part of "
            f"{key} ({got}) belongs to which of {batch} rows: call generate for one row at a time."
        )
    return value.narrow(axis, row, 1)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _padded(rows: list[Tensor], root: nn.Module, given: Mapping[str, Any]) -> Tensor:
    """The rows beside each other, filled up on the right as `generate` does."""
    pad = setting(root, given, "pad_token_id")
    pad = setting(root, given, "eos_token_id") if pad is None else pad
    value = 0 if pad is None else int(torch.as_tensor(pad).reshape(-1)[0])
    lines = [row[0] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=value)
