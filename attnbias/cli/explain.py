"""`attnbias explain`: the way of computing chosen for an attention of given sizes, and why."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from attnbias.cli.biases import BIASES, build
from attnbias.errors import AttnbiasError

if TYPE_CHECKING:
    import torch

    from attnbias.bias import Bias

DTYPES = ("float32", "float64", "bfloat16", "float16")


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "explain", help="the ways to compute an attention with a bias, and the one chosen"
    )
    options(parser)


def options(parser: argparse.ArgumentParser, *, queries: bool = True) -> None:
    """The options that describe a problem."""
    number = _positive
    parser.add_argument("--bias", choices=BIASES, default="none", help="default: none")
    parser.add_argument("--queries", type=number, required=queries, metavar="N")
    parser.add_argument("--keys", type=number, metavar="M", help="default: as many as queries")
    parser.add_argument("--batch", type=number, default=1, help="default: 1")
    parser.add_argument("--heads", type=number, default=8, help="query heads, default: 8")
    parser.add_argument("--key-heads", type=number, help="default: as many as query heads")
    parser.add_argument("--dim", type=number, default=64, help="width of a head, default: 64")
    parser.add_argument("--causal", action="store_true", help="hide the keys after each query")
    parser.add_argument("--window", type=number, metavar="W", help="only the last W keys, causal")
    parser.add_argument("--train", action="store_true", help="gradients to query, key and value")
    parser.add_argument(
        "--learned", action="store_true", help="gradients to what the bias stores, too"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", default="cpu", help="default: cpu")


def run(args: argparse.Namespace) -> int:
    """Print `attnbias.explain`'s table for the sizes asked; returns 0."""
    import attnbias as ab

    query, key, value, bias = problem(args)
    print(ab.explain(query, key, value, bias=bias, causal=args.causal))
    return 0


def problem(
    args: argparse.Namespace, *, fill: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Bias | None]:
    """Query, key, value and bias as the options say; with `fill`, of random numbers."""
    import torch

    keys = args.queries if args.keys is None else args.keys
    key_heads = args.key_heads or args.heads
    try:
        device = torch.device(args.device)
        like = torch.empty(0, dtype=getattr(torch, args.dtype), device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise AttnbiasError(f"--device {args.device!r} cannot be used here: {first}") from error
    # To explain, only sizes are read: the values stay whatever the memory holds.
    query = like.new_empty(args.batch, args.heads, args.queries, args.dim)
    key = like.new_empty(args.batch, key_heads, keys, args.dim)
    value = like.new_empty(args.batch, key_heads, keys, args.dim)
    for tensor in (query, key, value):
        if fill:
            tensor.normal_()
        tensor.requires_grad_(args.train)
    return query, key, value, _bias(args, keys, device)


def _bias(args: argparse.Namespace, keys: int, device: torch.device) -> Bias | None:
    import attnbias as ab

    bias = build(args.bias, args.heads, args.queries, keys, args.dim, device)
    if bias is not None and args.learned:
        bias = bias.with_parameters(
            [p.requires_grad_(p.is_floating_point()) for p in bias.detach().parameters()]
        )
    if args.window is not None:
        window = ab.Window(args.window - 1, 0, queries=args.queries, keys=keys, device=device)
        bias = window if bias is None else bias + window
    return bias


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return number
