"""`attnbias steer`: what a model writes after a prompt, plain and under a recipe, side by side."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from attnbias.cli.loading import add_loading
from attnbias.errors import AttnbiasError, Refused

if TYPE_CHECKING:
    from attnbias.steer import Recipe


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "steer", help="what a model writes, plain and under a recipe, side by side"
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the model hub")
    parser.add_argument("--recipe", required=True, metavar="FILE", help="rules as JSON")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the model goes on")
    parser.add_argument(
        "--max-new-tokens", type=_count, default=40, metavar="N", help="default: 40"
    )
    add_loading(parser)


def run(args: argparse.Namespace) -> int:
    """Print both continuations, decoded greedily; returns 0. Nothing is written to disk."""
    from attnbias.cli.loading import load
    from attnbias.steer import Recipe

    recipe = Recipe.load(args.recipe)
    if not args.prompt.strip():
        raise AttnbiasError("--prompt holds no word; give a text to go on from")
    model, tokenizer, _ = load(
        args.model, device=args.device, dtype=args.dtype, revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if recipe.model != args.model:
        print(
            f"attnbias: note: the recipe was made for {recipe.model!r}, the model is "
            f"{args.model!r}",
            file=sys.stderr,
        )
    tell(recipe, *continuations(model, tokenizer, recipe, args.prompt, args.max_new_tokens))
    return 0


def continuations(
    model: Any, tokenizer: Any, recipe: Recipe, text: str, count: int
) -> tuple[str, str, int | None]:
    """The plain and the steered continuation, and the token at which they part (None: never).

    Raises:
        Refused: a model that writes no text. AttnbiasError: a prompt that is too long.
    """
    import attnbias as ab

    if not getattr(model, "can_generate", lambda: False)():
        raise Refused(
            f"{type(model).__name__} writes no text (it is an encoder), and this command shows what"
            " a model writes; use attnbias.steer in Python for it"
        )
    prompt = ab.prompt(tokenizer, text)
    inputs = {name: value.to(model.device) for name, value in prompt.inputs.items()}
    inputs.pop("token_type_ids", None)  # decoders do not take it, some tokenizers give it
    length = inputs["input_ids"].shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + count > limit:
        raise AttnbiasError(
            f"--prompt has {length} tokens, which with {count} new ones is more than the {limit} "
            "that the model takes"
        )
    options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False}
    if model.generation_config.pad_token_id is None:
        ends = model.generation_config.eos_token_id
        options["pad_token_id"] = ends[0] if isinstance(ends, list) else (ends or 0)
    with ab.steer(model, *recipe.rules, spans=prompt.spans):
        steered = model.generate(**inputs, **options)[0, length:].tolist()
    plain = model.generate(**inputs, **options)[0, length:].tolist()
    parts = next((n for n, (a, b) in enumerate(zip(plain, steered, strict=False)) if a != b), None)
    if parts is None and len(plain) != len(steered):
        parts = min(len(plain), len(steered))
    both = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (plain, steered)]
    return both[0], both[1], parts


def tell(recipe: Recipe, plain: str, steered: str, parts: int | None) -> None:
    """Print the rules and both texts as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from attnbias.report.clean import visible

    console = Console(highlight=False)
    for rule in recipe.rules:
        console.print(Text(visible(f"rule: {rule!r}")))
    table = Table("plain", "steered", expand=True)
    table.add_row(Text(visible(plain)), Text(visible(steered)))
    console.print(table)
    console.print(
        "Both texts are the same: the rules did not change a single token."
        if parts is None
        else f"The texts part at new token {parts + 1}."
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_count.__name__ = "whole number from 1"  # argparse puts the name in its message
