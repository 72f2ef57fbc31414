"""`attnbias support MODEL` and `attnbias support --all`: what can be done with which attention."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from attnbias.errors import AttnbiasError, Refused

if TYPE_CHECKING:
    from attnbias.fuse.known import Row

_HEADINGS = {
    "fused": "computed by `attnbias.fuse`",
    "carries": "make or pass a bias that another class attends with",
    "refused": "refused",
    "unknown": "unknown",
}


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "support",
        help="what can be fused, observed and steered in a model; which classes are known",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a folder with config.json, a hub name, or a model type such as t5; needs no weights",
    )  # fmt: skip
    parser.add_argument(
        "--all",
        action="store_true",
        help="every class of the installed transformers that makes a relative bias or passes one",
    )
    parser.add_argument("--json", action="store_true", help="with --all: the table as JSON")
    parser.add_argument("--revision", help="commit, branch or tag of a hub model")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings (off)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, or what holds for one model; returns 0."""
    if args.all == (args.model is not None):
        raise AttnbiasError("give either a MODEL or --all (see `attnbias support --help`)")
    if args.json and not args.all:
        raise AttnbiasError("--json goes with --all")
    if args.all:
        import transformers

        from attnbias.fuse.known import table

        rows = table()
        if args.json:
            print(json.dumps([row.as_dict() for row in rows], indent=2))
        else:
            print(told(rows, transformers.__version__))
        return 0
    from attnbias.cli.loading import quiet

    quiet()
    for line in of_model(args.model, args.revision, args.trust_remote_code):
        print(line)
    return 0


def told(rows: Iterable[Row], version: str) -> str:
    """The table for people: classes of one model with the same fate stand together."""
    rows = list(rows)
    lines = [f"transformers {version}:"]
    for status, heading in _HEADINGS.items():
        count = sum(row.status == status for row in rows)
        lines.append(f"  {count:4d} classes  {heading}")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((_model(row.path), row.status, row.why), []).append(row)
    last = ""
    for (model, status, why), group in sorted(groups.items(), key=lambda one: one[0][0]):
        if model != last:
            lines += ["", model]
            last = model
        names = ", ".join(row.path.rpartition(".")[2] for row in group)
        more = ""
        if status == "fused":
            since = group[0].oldest
            more = f" [{group[0].family}]" + (f", transformers {since} or newer" if since else "")
        lines.append(f"  {status:<8} {names}: {why}{more}")
    return "\n".join(lines)


def _model(path: str) -> str:
    return path.rpartition(".")[0].removeprefix("transformers.models.").partition(".modeling_")[0]


def of_model(name: str, revision: str | None, trust_remote_code: bool) -> Iterable[str]:
    """What holds for one model, built without weights, in lines."""
    import torch

    config, where = config_of(name, revision, trust_remote_code)
    kind = class_of(config, name)
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:
        from attnbias.cli.loading import _sentence

        raise AttnbiasError(
            f"{kind.__name__} could not be built without its weights: {_sentence(error)}"
        ) from error
    yield f"{kind.__name__} ({where})"
    yield from _fusing(model)
    yield from _seeing(model)


def _fusing(model: Any) -> Iterable[str]:
    from attnbias.fuse.find import find, path_of
    from attnbias.fuse.known import oldest
    from attnbias.fuse.words import places

    found = find(model)
    groups: dict[tuple[type, str], list[str]] = {}
    for place, family in found.places.items():
        groups.setdefault((type(place.module), family.name), []).append(place.name)
    forms = {family.name: family.form for family in found.places.values()}
    if not groups and not found.left:
        yield "fuse: nothing. It holds no attention with a bias that is known."
    elif not groups:
        yield "fuse: nothing."
    for (kind, who), names in groups.items():
        since = oldest(path_of(kind), who)
        more = f"; transformers {since} or newer" if since else ""
        yield f"fuse: {places(tuple(names))} ({len(names)} {kind.__name__}): {forms[who]}{more}"
    for (name, reason), left in found.left.items():
        yield f"left alone: {places(left)} ({len(left)} {name}): {reason}"


def _seeing(model: Any) -> Iterable[str]:
    from attnbias.hub.checks import check
    from attnbias.hub.sites import find

    found = find(model)
    try:
        check(model, found)
    except Refused as refusal:
        yield f"observe, steer: no. {refusal}"
        return
    towers: dict[str, int] = {}
    for entry in found:
        towers[entry.site.tower] = towers.get(entry.site.tower, 0) + 1
    said = ", ".join(f"{count} of {tower}" for tower, count in towers.items())
    yield (
        f"observe, steer: {len(found)} attention layers use the interface ({said}); "
        "ab.support(model) runs it and says what holds for each."
    )


# Models -------------------------------------------------------------------------------------------


def config_of(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, str]:
    """The config of a folder, a model type or a hub name, and which of them it was.

    Raises:
        AttnbiasError: there is nothing of that name.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    from attnbias.cli.loading import _place, _sentence

    given = _place(name)
    if given == name and name in CONFIG_MAPPING_NAMES and revision is None:
        return CONFIG_MAPPING[name](), "the default config of its type"
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        return AutoConfig.from_pretrained(given, **options), name
    except Exception as error:
        raise AttnbiasError(f"{name!r} could not be loaded: {_sentence(error)}") from error


def class_of(config: Any, name: str) -> Any:
    """The class of a config's model: the one that its weights were saved from, if it is named.

    Raises:
        Refused: transformers has no model of that type.
    """
    import transformers

    for wanted in tuple(getattr(config, "architectures", None) or ()):
        found = getattr(transformers, wanted, None)
        if found is not None:
            return found
    for auto in ("AutoModel", "AutoModelForCausalLM"):
        try:
            return getattr(transformers, auto)._model_mapping[type(config)]
        except (KeyError, ValueError):
            continue
    raise Refused(f"{name!r} ({config.model_type}): transformers has no model class of that type.")
