"""`attnbias steer`: what a model writes after a prompt, plain and under a recipe, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attnbias.cli.loading import add_loading
from attnbias.errors import AttnbiasError, Refused

if TYPE_CHECKING:
    from attnbias.hub.prompt import Prompt
    from attnbias.steer import Recipe

LONGEST = 600  # characters of a rule that are shown


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "steer", help="what a model writes, plain and under a recipe, side by side"
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the model hub")
    parser.add_argument("--recipe", required=True, metavar="FILE", help="rules as JSON")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the model goes on")
    parser.add_argument("--system", metavar="TEXT", help='the instruction before it: span "system"')
    parser.add_argument(
        "--documents",
        nargs="+",
        default=[],
        metavar="FILE",
        help='texts before the prompt: spans "document 0", "document 1", ...',
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help='an image before the prompt: span "image" (several: "image 0", "image 1", ...)',
    )
    parser.add_argument(
        "--span",
        action="append",
        default=[],
        metavar="NAME=START:STOP",
        help="name tokens by position (STOP may be left out), or NAME=OTHER for another span",
    )
    parser.add_argument(
        "--max-new-tokens", type=_count, default=40, metavar="N", help="default: 40"
    )
    add_loading(parser)


def run(args: argparse.Namespace) -> int:
    """Print both continuations, decoded greedily; returns 0. Nothing is written to disk."""
    from attnbias.cli.loading import load_writer, text_of
    from attnbias.steer import Recipe

    recipe = Recipe.load(args.recipe)
    if not args.prompt.strip():
        raise AttnbiasError("--prompt holds no word; give a text to go on from")
    named = dict(map(_named, args.span))
    documents = [text_of(path, "--documents") for path in args.documents]
    check_spans(recipe, names_of(args, named))
    model, processor = load_writer(
        args.model, images=bool(args.image), device=args.device, dtype=args.dtype,
        revision=args.revision, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if recipe.model != args.model:
        print(
            f"attnbias: note: the recipe was made for {recipe.model!r}, the model is "
            f"{args.model!r}",
            file=sys.stderr,
        )
    prompt = asked(
        processor, args.prompt, system=args.system, documents=documents, images=args.image,
        spans=named,
    )  # fmt: skip
    plain, steered, parts = continuations(model, processor, recipe, prompt, args.max_new_tokens)
    tell(recipe, prompt, plain, steered, parts)
    return 0


def asked(
    processor: Any,
    text: str,
    *,
    system: str | None,
    documents: Sequence[str],
    images: Sequence[str],
    spans: Mapping[str, Any],
) -> Prompt:
    """The prompt with its spans, and those that the user named.

    Raises:
        AttnbiasError: a span of an unknown span, or beyond the prompt.
    """
    import attnbias as ab

    given: dict[str, Any] = {"documents": documents, "system": system}
    if len(images) == 1:
        given["image"] = images[0]
    elif images:
        given["images"] = images
    made = ab.prompt(processor, text, **given)
    found: dict[str, Any] = dict(made.spans)
    length = made.inputs["input_ids"].shape[1]
    for name, value in spans.items():
        if isinstance(value, str):
            if value not in found:
                raise AttnbiasError(
                    f"--span {name}={value}: there is no span {value!r}; there are "
                    f"{', '.join(sorted(found))}"
                )
            found[name] = found[value]
        elif value[0] >= length:
            raise AttnbiasError(
                f"--span {name} starts at {value[0]}; the prompt has {length} tokens"
            )
        else:
            found[name] = value
    return replace(made, spans=found)


def names_of(args: argparse.Namespace, named: Iterable[str]) -> set[str]:
    """The spans that the prompt will have."""
    names = {"first", "question", "generated", *named}
    names |= {f"document {number}" for number in range(len(args.documents))}
    if args.image:
        names |= {"image", *(f"image {number}" for number in range(len(args.image)))}
    return names | ({"system"} if args.system else set())


def check_spans(recipe: Recipe, names: Collection[str]) -> None:
    """Refuse a rule that needs a span which is not there, with what to add to the line.

    Raises:
        Refused: the first that is missing.
    """
    for rule in recipe.rules:
        for name in rule.needs:
            if name in names:
                continue
            kind = name.partition(" ")[0]
            add = {
                "document": "--documents FILE ...",
                "image": "--image FILE",
                "system": "--system TEXT",
            }.get(kind, f"--span '{name}=START:STOP'")
            raise Refused(
                f"{type(rule).__name__} needs the span {name!r}, and the prompt has "
                f"{', '.join(sorted(names))}: add {add}"
                + ("" if add.startswith("--span") else f" (or --span '{name}=START:STOP')")
            )


def continuations(
    model: Any, processor: Any, recipe: Recipe, prompt: Prompt, count: int
) -> tuple[str, str, int | None]:
    """The plain and the steered continuation, and the token at which they part (None: never).

    Raises:
        Refused: a model that writes no text. AttnbiasError: a prompt that is too long.
    """
    import attnbias as ab
    from attnbias.protocols.answering import written_ids

    if not getattr(model, "can_generate", lambda: False)():
        raise Refused(
            f"{type(model).__name__} writes no text (it is an encoder), and this command shows what"
            " a model writes; use attnbias.steer in Python for it"
        )
    length = prompt.inputs["input_ids"].shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + count > limit:
        raise AttnbiasError(
            f"--prompt has {length} tokens, which with {count} new ones is more than the {limit} "
            "that the model takes"
        )
    with ab.steer(model, *recipe.rules, prompt=prompt):
        steered = written_ids(model, prompt, count)
    plain = written_ids(model, prompt, count)
    parts = next((n for n, (a, b) in enumerate(zip(plain, steered, strict=False)) if a != b), None)
    if parts is None and len(plain) != len(steered):
        parts = min(len(plain), len(steered))
    tokenizer = getattr(processor, "tokenizer", processor)
    both = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (plain, steered)]
    return both[0], both[1], parts


def tell(recipe: Recipe, prompt: Prompt, plain: str, steered: str, parts: int | None) -> None:
    """Print the rules, the spans and both texts as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from attnbias.report.clean import visible

    console = Console(highlight=False)
    for rule in recipe.rules:
        told = repr(rule)  # a fit may hold thousands of numbers
        told = told if len(told) <= LONGEST else f"{told[:LONGEST]} ..."
        console.print(Text(visible(f"rule: {told}")))
    spans = ", ".join(
        f"{name} {start}:{'' if stop is None else stop}"
        for name, (start, stop) in prompt.spans.items()
    )
    console.print(Text(visible(f"spans: {spans}")))
    table = Table("plain", "steered", expand=True)
    table.add_row(Text(visible(plain)), Text(visible(steered)))
    console.print(table)
    console.print(
        "Both texts are the same: the rules did not change a single token."
        if parts is None
        else f"The texts part at new token {parts + 1}."
    )


def _named(text: str) -> tuple[str, Any]:
    """``name=start:stop`` or ``name=other``."""
    name, equals, value = text.partition("=")
    start, colon, stop = value.partition(":")
    if not equals or not name.strip() or not value.strip():
        raise AttnbiasError(f"--span {text!r}: write NAME=START:STOP or NAME=OTHER")
    if not colon:
        return name.strip(), value.strip()
    good = start.strip().isdecimal() and (not stop.strip() or stop.strip().isdecimal())
    if not good or (stop.strip() and int(stop) <= int(start)):
        raise AttnbiasError(
            f"--span {text!r}: START and STOP are token positions from 0, START below STOP"
        )
    return name.strip(), (int(start), int(stop) if stop.strip() else None)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_count.__name__ = "whole number from 1"  # argparse puts the name in its message
