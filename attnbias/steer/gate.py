"""The gate before `generate`: what a rule cannot live with is refused, and a rule may drive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from attnbias.errors import Refused
from attnbias.steer.rule import Rule

if TYPE_CHECKING:
    from attnbias.hub.adapter import Session
    from attnbias.steer.context import Editing

# What decodes in another way than one token after another in each row of the caller's batch.
_WAYS = {
    "num_beams": "beams",
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding",
    "assistant_early_exit": "assisted decoding",
    "use_mtp": "assisted decoding",
    "constraints": "constrained beams",
    "force_words_ids": "constrained beams",
    "num_beam_groups": "groups of beams",
    "penalty_alpha": "contrastive search",
    "dola_layers": "decoding by contrasting layers",
    "guidance_scale": "guidance by a second forward",
    "custom_generate": "a decoding function of your own",
    "synced_gpus": "ranks that wait for each other",
}
# The arguments of `generate` that may be given without their names.
_PLACES = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
)
_STOP = "stop_strings"
_OFF = (None, False, 0, 1, 1.0)


def gated(rule: Rule) -> bool:
    """Whether a rule needs plain decoding: it drives the loop, edits scores, or runs branches."""
    return rule.uses("decode") or rule.uses("logits") or bool(getattr(rule, "branches", None))


def setting(model: nn.Module, options: Mapping[str, Any], name: str) -> Any:
    """An option of a call of `generate`: as given, else of the config given, else the model's."""
    found = options.get(name)
    for config in (options.get("generation_config"), getattr(model, "generation_config", None)):
        found = getattr(config, name, None) if found is None else found
    return found


def refuse(model: nn.Module, options: Mapping[str, Any], name: str) -> None:
    """Raise `Refused` in one sentence where a call of `generate` is no plain decoding.

    Args:
        options: the keyword arguments of the call. name: of the rule that minds.
    """
    for option, way in _WAYS.items():
        value = setting(model, options, option)
        if not any(value is off or (type(value) is type(off) and value == off) for off in _OFF):
            raise Refused(
                f"{name} needs greedy decoding or sampling, and this call of generate asks for "
                f"{way}: leave out {option}={_short(value)}."
            )


@contextmanager
def gate(editing: Editing, session: Session) -> Iterator[None]:
    """Intercept ``model.generate`` while rules are in force that need it; else do nothing.

    The function is set on the model object and removed on exit, whatever was raised inside.

    Raises:
        Refused: two rules that drive, a rule that drives beside one with branches, or a model that
            does not generate.
    """
    rules = [rule for rule in editing.rules if gated(rule)]
    if not rules:
        yield
        return
    root = session.root
    drivers = [rule for rule in rules if rule.uses("decode")]
    _check(root, rules, drivers)
    if not callable(getattr(root, "generate", None)):
        yield
        return
    name = type((drivers or rules)[0]).__name__
    before = vars(root).get("generate")
    inner: Callable[..., Any] = getattr(root, "generate")  # noqa: B009 - a module's type knows none

    def generate(*args: Any, **options: Any) -> Any:
        given = {**dict(zip(_PLACES, args, strict=False)), **options}
        refuse(root, given, name)
        if not drivers:
            return inner(*args, **options)
        from attnbias.steer.driver import drive

        _honoured(root, given, name)
        number = next(i for i, rule in enumerate(editing.rules) if rule is drivers[0])
        return drive(inner, _stopping(root, given, name), editing, number, session)

    generate.__dict__["attnbias_rules"] = [*rules, *_outer(root)]
    object.__setattr__(root, "generate", generate)
    try:
        yield
    finally:
        if before is None:
            vars(root).pop("generate", None)
        else:
            object.__setattr__(root, "generate", before)


def _honoured(root: nn.Module, options: Mapping[str, Any], name: str) -> None:
    for option in ("prefix_allowed_tokens_fn", "watermarking_config", "token_healing"):
        if setting(root, options, option):
            raise Refused(f"{name} drives the decoding itself and cannot honour {option}.")


def _stopping(root: nn.Module, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options with texts to stop at as a stopping criterion.

    Transformers does not hand the tokenizer on to a decoding function that it is given.
    """
    found = {key: value for key, value in options.items() if key not in ("tokenizer", _STOP)}
    texts, tokenizer = options.get(_STOP), options.get("tokenizer")
    if texts is None and setting(root, options, _STOP) is None:
        return found
    if texts is None or tokenizer is None:
        raise Refused(
            f"{name} honours texts to stop at where they are given in the call: write "
            "generate(..., stop_strings=[...], tokenizer=tokenizer)."
        )
    from transformers import StoppingCriteriaList, StopStringCriteria

    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=texts)
    others = found.get("stopping_criteria") or []
    return {**found, "stopping_criteria": StoppingCriteriaList([*others, criterion])}


def _outer(root: nn.Module) -> Sequence[Rule]:
    """The gated rules of the contexts around this one."""
    found: Sequence[Rule] = getattr(vars(root).get("generate"), "attnbias_rules", ())
    return found


def _check(root: nn.Module, rules: Sequence[Rule], drivers: Sequence[Rule]) -> None:
    everyone = [*rules, *_outer(root)]
    if not any(rule.uses("decode") for rule in everyone):
        return
    if len(everyone) > 1:
        one, two = (type(rule).__name__ for rule in everyone[:2])
        raise Refused(
            f"{one} and {two} both decide how tokens are generated (loops and branches): "
            "steer with one of them at a time."
        )
    name = type(drivers[0]).__name__
    if not (callable(getattr(root, "generate", None)) and root.can_generate()):  # type: ignore[operator]
        raise Refused(
            f"{name} drives generate, which {type(root).__name__} does not have: load the model "
            "with its language head, as in AutoModelForCausalLM."
        )
    if getattr(root.config, "is_encoder_decoder", False):
        raise Refused(
            f"{name} drives the decoding of decoder-only models; {type(root).__name__} is an "
            "encoder-decoder."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"<{type(value).__name__}>"
