"""What steering costs a decoded token, by turns with the plain model: a ratio for each pair.

    python -m benchmarks.steer_tokens [--quick] [--only N ...]

The lines and the model of `benchmarks.steer`. There a line's tokens follow its prefill and are
compared with tokens of the plain model taken minutes before or after, whose times differ by more
than some goals allow. Here a second, plain copy of the model decodes the same tokens in turn with
the steered one, who begins changes from token to token, and the median of the ratios of the pairs
counts, with its quartiles.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.steer import Clock, Runner, runners
from benchmarks.steer_lines import GOALS, LINES, model

MODULE = "benchmarks.steer_tokens"
LENGTHS = (2048, 4096)
QUICK_LENGTHS = (128,)
PAIRS, WARM = 60, 4  # pairs of tokens, and how many of them come first and are not counted


def token(llama: Any, cache: Any, ids: Tensor) -> tuple[float, Any]:
    """Seconds of a token, and the cache after it."""
    start = time.perf_counter()
    out = llama(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start, out.past_key_values


@torch.no_grad()
def line(runner: Runner, llama: Any, plain: Any, ids: Tensor, known: Any) -> dict[str, float]:
    """One line: ratios of its tokens to the plain ones. `known`: the plain model's cache."""
    length, pairs = ids.shape[1], []
    with runner.context(Clock()):
        cache = llama(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        for turn in range(PAIRS):
            one = ids[:, turn : turn + 1]
            if turn % 2:
                ours, cache = token(llama, cache, one)
                theirs, known = token(plain, known, one)
            else:
                theirs, known = token(plain, known, one)
                ours, cache = token(llama, cache, one)
            pairs.append((ours, theirs))
    known.crop(length - known.get_seq_length())  # as it was before, for the next line
    low, middle, high = quantiles([a / b for a, b in pairs[WARM:]], n=4)
    return {
        "ratio": round(middle, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "plain ms": round(1e3 * median(b for _, b in pairs[WARM:]), 2),
    }


def measure(length: int) -> dict[str, dict[str, float]]:
    """Every line of a length that is not eager."""
    llama = model()
    plain = copy.deepcopy(llama)
    ids = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        known = plain(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    chosen = [runner for runner in runners(llama, length) if not runner.eager]
    found = {}
    with common.progress(f"{length:,} tokens", len(chosen)) as advance:
        for runner in chosen:
            found[runner.name] = line(runner, llama, plain, ids, known)
            advance(1, runner.name)
    return found


def markdown(payload: dict[str, Any]) -> str:
    """The report: a table for each length."""
    goals = {one.name: GOALS.get(one.goal) for one in LINES}
    parts = [
        "# What steering costs a decoded token, over the plain fused model",
        common.header_markdown(payload),
        f"Plain and steered tokens in turn, {PAIRS - WARM} pairs: the median of their ratios and "
        "its quartiles. The model and the lines are those of `benchmarks/results/steer.md`.",
    ]
    for length, lines in payload["lengths"].items():
        rows = []
        for name, cell in lines.items():
            goal = goals.get(name)
            verdict = "" if goal is None else ("holds" if cell["ratio"] <= goal else "FALLS SHORT")
            quartiles = f"{cell['low']:.2f} to {cell['high']:.2f}"
            rows.append([name, goal or "", f"{cell['ratio']:.3f}", quartiles, verdict])
        head = ["line", "goal", "token over plain", "quartiles", ""]
        parts += [f"## {int(length):,} tokens", common.markdown_table(head, rows)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    made.add_argument("--only", type=int, nargs="+", default=LENGTHS, metavar="N")
    made.add_argument(
        "--quick", action="store_true", help="a short prompt, written to out/ instead"
    )
    args = made.parse_args(given)
    lengths = QUICK_LENGTHS if args.quick else tuple(args.only)
    started, begin = common.now(), time.perf_counter()
    found = {str(length): measure(length) for length in lengths}
    head = common.header(
        MODULE,
        given,
        seeds={"torch": 0},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=torch.get_num_threads(),
    )
    payload = {**head, "lengths": found}
    path = common.SCRATCH / "quick_steer_tokens.json"
    if lengths == LENGTHS:
        path = common.recorded_or_scratch("steer_tokens.json", common.machine())
    common.write_result(path, payload, markdown(payload))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
