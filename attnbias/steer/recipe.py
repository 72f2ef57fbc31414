"""Recipes: rules with what they were made for, as validated JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from attnbias import __version__
from attnbias.errors import AttnbiasError
from attnbias.steer import rules as shelf
from attnbias.steer.rule import Rule

FORMAT = 1
_SHELF = (getattr(shelf, name) for name in shelf.__all__)
BUILT_IN: dict[str, type[Rule]] = {
    item.__name__: item for item in _SHELF if isinstance(item, type) and issubclass(item, Rule)
}
GROUP = "attnbias.rules"


def rule_names() -> list[str]:
    """Every rule that a recipe may name: ours and those that installed packages add."""
    from attnbias.plugins import names

    return sorted({*BUILT_IN, *names(GROUP)})


def rule_class(name: str) -> type[Rule]:
    """The class of a rule by its name in recipes.

    Raises:
        AttnbiasError: no such rule, or a plugin that cannot be loaded.
    """
    from attnbias.plugins import load

    found = BUILT_IN.get(name) or load(GROUP, name, Rule)
    if found is None:
        raise AttnbiasError(f"there is no rule {name!r}; there are {', '.join(rule_names())}")
    return found


def rule_name(rule: Rule) -> str:
    """The name of a rule in recipes, which must lead back to its class.

    Raises:
        AttnbiasError: a rule of no installed package, which could be saved but never loaded.
    """
    from attnbias.plugins import names

    kind = type(rule)
    for name in (kind.__name__, *names(GROUP)):
        if (name in BUILT_IN or name in names(GROUP)) and rule_class(name) is kind:
            return name
    raise AttnbiasError(
        f"{kind.__name__} cannot be saved: it is no rule of attnbias and no installed package adds "
        f"it in the entry-point group {GROUP}."
    )


@dataclass(frozen=True)
class Recipe:
    """Rules, and the model and library that they were made with.

    Args:
        rules: in the order that `steer` takes them: ``with ab.steer(model, *recipe.rules)``. What
            was fitted (factor, heads, scores) is part of each rule.
        model: id or path of the model. revision: its commit, where it has one.
        library: the version of attnbias that made the recipe.
    """

    rules: tuple[Rule, ...]
    model: str
    revision: str | None = None
    library: str = field(default=__version__)

    def __post_init__(self) -> None:
        rules = tuple(self.rules) if isinstance(self.rules, Sequence) else ()
        if not rules or not all(isinstance(rule, Rule) for rule in rules):
            raise AttnbiasError(f"a recipe needs a list of rules, got {self.rules!r}.")
        for rule in rules:
            rule.ready()
        object.__setattr__(self, "rules", rules)
        for name, value in (("model", self.model), ("library", self.library)):
            if not isinstance(value, str) or not value:
                raise AttnbiasError(f"{name} of a recipe must be a text, got {value!r}.")
        if not (self.revision is None or isinstance(self.revision, str)):
            raise AttnbiasError(f"revision must be a text or None, got {self.revision!r}.")

    @classmethod
    def of(cls, model: Any, *rules: Rule) -> Recipe:
        """A recipe for a loaded model, with the id and commit that its config remembers."""
        config = getattr(model, "config", None)
        name = getattr(config, "name_or_path", "") or type(model).__name__
        return cls(rules, str(name), getattr(config, "_commit_hash", None))

    def to_json(self) -> str:
        """The recipe as JSON text.

        Raises:
            AttnbiasError: a rule of no installed package, or with a field that JSON cannot hold.
        """
        whole = {
            "format": FORMAT,
            "library": self.library,
            "model": self.model,
            "revision": self.revision,
            "rules": [{"rule": rule_name(rule), **_parameters(rule)} for rule in self.rules],
        }
        try:
            return json.dumps(whole, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AttnbiasError(f"the recipe cannot be written as JSON: {error}.") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as JSON, whole or not at all.

        Raises:
            AttnbiasError: a rule that could not be loaded again, or a path that cannot be written.
        """
        text = self.to_json() + "\n"
        target = Path(path)
        try:
            _write(target, text)
        except OSError as error:
            raise AttnbiasError(f"{target} cannot be written: {error.strerror}.") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe; needs pydantic.

        Raises:
            AttnbiasError: a missing file, text that is no JSON, an unknown field or rule, a value
                of the wrong type: the message names the file and the field.
        """
        source = Path(path)
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
            raise AttnbiasError(f"{source} cannot be read: {reason}.") from None
        try:
            found = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
        except RecursionError:
            raise AttnbiasError(f"{source} is no JSON: it is nested too deeply.") from None
        except ValueError as error:
            raise AttnbiasError(f"{source} is no JSON: {error}.") from None
        try:
            return _recipe(found)
        except AttnbiasError as error:
            raise AttnbiasError(f"{source}: {error}") from None


def _write(target: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _parameters(rule: Rule) -> dict[str, Any]:
    """The fields that differ from their defaults, and always the heads."""
    whole = asdict(rule)
    return {f.name: whole[f.name] for f in fields(rule) if getattr(rule, f.name) != f.default}


def _recipe(found: Any) -> Recipe:
    if not isinstance(found, dict):
        raise AttnbiasError("a recipe must be an object with model and rules.")
    known = {"format", "library", "model", "revision", "rules"}
    for name in found:
        if name not in known:
            raise AttnbiasError(f"field {name!r} is unknown; there are {', '.join(sorted(known))}.")
    for name in ("format", "model", "rules"):
        if name not in found:
            raise AttnbiasError(f"field {name!r} is missing.")
    if found["format"] != FORMAT or isinstance(found["format"], bool):
        raise AttnbiasError(
            f"field 'format' is {found['format']!r}, but this version reads {FORMAT}: use the "
            "version of attnbias that wrote the recipe."
        )
    for name in ("model", "library", "revision"):
        if not isinstance(found.get(name, ""), str) and (name != "revision" or found[name]):
            raise AttnbiasError(f"field {name!r} must be a text, got {found[name]!r}.")
    if not isinstance(found["rules"], list) or not found["rules"]:
        raise AttnbiasError(f"field 'rules' must be a list of rules, got {found['rules']!r}.")
    rules = tuple(_rule(item, f"rules[{number}]") for number, item in enumerate(found["rules"]))
    library = found.get("library", "unknown")
    return Recipe(rules, found["model"], found.get("revision"), library)


def _rule(item: Any, place: str) -> Rule:
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(item, dict) or not isinstance(item.get("rule"), str):
        raise AttnbiasError(f"field {place} must be an object that names a rule, got {item!r}.")
    try:
        kind = rule_class(item["rule"])
    except AttnbiasError as error:
        raise AttnbiasError(f"field {place}.rule: {error}.") from None
    given = {name: value for name, value in item.items() if name != "rule"}
    unknown = sorted(set(given) - {f.name for f in fields(kind)})
    if unknown:
        raise AttnbiasError(
            f"field {place}.{unknown[0]} is unknown; {item['rule']} has "
            f"{', '.join(f.name for f in fields(kind))}."
        )
    try:
        rule: Rule = TypeAdapter(kind).validate_json(json.dumps(given))
    except ValidationError as error:
        raise AttnbiasError(_sentence(error.errors(), kind, given, place)) from None
    return rule


def _sentence(errors: Sequence[Any], kind: type[Rule], given: dict[str, Any], place: str) -> str:
    """One sentence for the first thing that is wrong."""
    first = errors[0]
    parts = [str(part) for part in first["loc"]]
    message = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    if not parts:
        return f"field {place}: {message}."
    name = parts[0]
    try:  # where a field may be one of several kinds, the rule's own words say it better
        kind(**given)
    except (AttnbiasError, TypeError) as own:
        if str(own).startswith(f"{name} "):
            return f"field {place}.{own}"
    got = f", got {given[name]!r}" if name in given else ""
    return f"field {place}.{name}: {message[:1].lower()}{message[1:]}{got}."


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the field {name!r} is there twice")
    return dict(pairs)
