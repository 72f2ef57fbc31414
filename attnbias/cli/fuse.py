"""`attnbias fuse MODEL`: fuse a model as `ab.fuse` does and print what it says."""

from __future__ import annotations

import argparse
from typing import Any

from attnbias.errors import AttnbiasError


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "fuse", help="what `attnbias.fuse` replaces in a model, and the gain measured here"
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, a hub name, or (--random) a model type such as t5"
    )
    parser.add_argument("--length", type=_positive, default=1024, help="tokens, default: 1024")
    parser.add_argument("--batch", type=_positive, default=1, help="default: 1")
    parser.add_argument("--no-measure", action="store_true", help="do not time the modules")
    parser.add_argument(
        "--random", action="store_true", help="random weights for the config; none are read"
    )
    parser.add_argument("--revision", help="commit, branch or tag of a hub model")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings (off)"
    )


def run(args: argparse.Namespace) -> int:
    """Load, fuse, print; returns 0. A model of which nothing can be fused is refused (2)."""
    from attnbias.cli.loading import _sentence, quiet
    from attnbias.cli.support import class_of, config_of
    from attnbias.fuse import fuse

    quiet()
    config, where = config_of(args.model, args.revision, args.trust_remote_code)
    kind: Any = class_of(config, args.model)
    if where != args.model and not args.random:
        raise AttnbiasError(
            f"{args.model!r} is a type of model, which has no weights; add --random, or give a "
            "folder or a hub name"
        )
    options = {} if args.revision is None else {"revision": args.revision}
    try:
        model = (
            kind(config)
            if args.random
            else kind.from_pretrained(args.model, config=config, weights_only=True, **options)
        )
    except Exception as error:
        raise AttnbiasError(f"{args.model!r} could not be loaded: {_sentence(error)}") from error
    with fuse(
        model.eval(),
        length=args.length,
        batch=args.batch,
        measure=not args.no_measure,
        quiet=True,
    ) as fused:
        print(fused)
    return 0


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return number
