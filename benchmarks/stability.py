"""Numeric deviation of every lowering, and what it does to trained weights.

    python -m benchmarks.stability [--quick] [--only deviation tiles drift]

The protocol of "Is Flash Attention Stable?" (2024, arXiv 2405.02803), on this package:

- deviation: largest difference of each lowering from a float64 oracle by length and format, with
  and without an additive bias (ALiBi), beside attention that builds its matrices in the same
  format; for the lowerings that have block sizes also over these;
- tiles: the work's own subject, a software tiling that rounds every number in between to the
  format, over tile sizes, the order of the keys and lengths, against the same with whole rows;
- drift: weights of a small decoder (ALiBi, causal) trained twice from one initialisation on the
  same data, once with attention that builds its matrices and once with each lowering, over 200
  steps: largest difference and 1-Wasserstein distance, beside two yardsticks, another
  initialisation and low-precision training.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnbias as ab
from attnbias.lowering import LOWERINGS, nest, strided, tiled
from attnbias.lowering.passes import ONE_PASS, THREE_PASS, run
from benchmarks import common

MODULE = "benchmarks.stability"
LENGTHS, QUICK_LENGTHS = (256, 512, 1024, 2048, 4096, 8192), (256, 512)
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TILES, QUICK_TILES = (16, 32, 64, 128, 256, 512), (16, 128)
HEADS, DIM, ROWS, SEEDS = 2, 64, 64, (0, 1, 2)
TILED_AT = 2048  # length at which tile sizes are compared
PARTS = ("deviation", "tiles", "drift")
SHARED = common.ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


def inputs(length: int, kind: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from N(0, 1), rounded to the format before anything is computed."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=gen).to(kind) for _ in range(3))
    return q, k, v


def sampled(length: int, seed: int) -> Tensor:
    """The rows that are compared: the last and some others."""
    gen = torch.Generator().manual_seed(seed + 100)
    return torch.cat(
        [torch.randperm(length, generator=gen)[: ROWS - 1], torch.tensor([length - 1])]
    )


def oracle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention in float64 of the given rows ``(1, heads, rows, size)``."""
    scores = q.double() @ k.double().mT / DIM**0.5
    if bias is not None:
        scores = scores + bias.double()
    return scores.softmax(-1) @ v.double()


def cascade_rows(
    cascade: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tile: int
) -> Tensor:
    """A cascade on the given rows of every head."""
    return torch.stack(
        [
            run(
                cascade,
                q[0, h],
                k[0, h],
                v[0, h],
                None if bias is None else bias[0, h],
                scale=DIM**-0.5,
                tile=tile,
            )
            for h in range(HEADS)
        ]
    )[None]


@contextmanager
def blocks_of(name: str, rows: int) -> Iterator[None]:
    """A lowering with blocks (tiles) of that many queries, and of keys where it has such."""
    places: dict[str, list[tuple[Any, str, int]]] = {
        "strided": [(strided, "ROWS", rows), (strided, "BLOCK", rows)],
        "tiled": [(tiled, "ROWS", rows)],
        "stream": [(nest, "ROWS", rows), (nest, "COLS", rows)],
    }
    with ExitStack() as stack:
        for module, attribute, value in places[name]:
            stack.enter_context(mock.patch.object(module, attribute, value))
        yield


BLOCKED = ("strided", "tiled", "stream")


def deviation(lengths: Sequence[int], advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every lowering, format, length, with and without a bias; means over seeds of the largest
    difference from the oracle.
    """
    found: dict[tuple[Any, ...], list[float]] = {}

    def note(value: float, *key: Any) -> None:
        found.setdefault(key, []).append(value)

    for length in lengths:
        advance(f"deviation, {length:,} tokens")
        form = ab.forms.ALiBi(HEADS)(length)
        for name, kind in FORMATS.items():
            for seed in SEEDS:
                q, k, v = inputs(length, kind, seed)
                rows = sampled(length, seed)
                for biased in (False, True):
                    bias = form if biased else None
                    few = torch.cat(
                        [form[..., r : r + 1, 0:length].dense() for r in rows.tolist()], 2
                    )
                    given = few if biased else None
                    part = q[:, :, rows]
                    want = oracle(part, k, v, given)
                    whole = cascade_rows(THREE_PASS, part, k, v, given, length)
                    note(worst(whole, want), "matrix", name, length, biased, None)
                    for lowering in LOWERINGS:
                        if lowering == "reference" and length > TILED_AT:
                            continue  # the oracle's own matrices: gigabytes beyond this
                        try:
                            with torch.no_grad():
                                out = ab.attention(q, k, v, bias=bias, lowering=lowering)
                        except ab.Refused:
                            continue
                        assert isinstance(out, Tensor)
                        note(worst(out[:, :, rows], want), lowering, name, length, biased, None)
                        if lowering not in BLOCKED or length != max(lengths, key=_near):
                            continue
                        for size in (32, 128, 512):
                            with blocks_of(lowering, size), torch.no_grad():
                                out = ab.attention(q, k, v, bias=bias, lowering=lowering)
                            assert isinstance(out, Tensor)
                            got = worst(out[:, :, rows], want)
                            note(got, lowering, name, length, biased, size)
    names = ("lowering", "format", "length", "bias", "block")
    return [
        {**dict(zip(names, key, strict=True)), "deviation": statistics.fmean(values)}
        for key, values in found.items()
    ]


def _near(length: int) -> int:
    return -abs(length - TILED_AT)


def worst(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max())


def tiles(
    lengths: Sequence[int], sizes: Sequence[int], advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The software tiling with every number in the format, over tile size, order, length."""
    found = []
    at = max(lengths, key=_near)
    cells = [(at, size) for size in sizes] + [(n, 128) for n in lengths if n != at]
    cells.append((at - 37, 128))  # a tile that does not divide the keys
    for length, size in cells:
        advance(f"software tiling, {length:,} tokens, tiles of {size}")
        form = ab.forms.ALiBi(HEADS)(length)
        for name, kind in FORMATS.items():
            for biased in (False, True):
                rows_of: dict[str, list[float]] = {"tiled": [], "matrix": [], "apart": []}
                rows_of["reversed"] = []
                for seed in SEEDS:
                    q, k, v = inputs(length, kind, seed)
                    rows = sampled(length, seed)
                    dense = torch.cat(
                        [form[..., r : r + 1, 0:length].dense() for r in rows.tolist()], 2
                    )
                    bias = dense.to(kind) if biased else None
                    part = q[:, :, rows]
                    want = oracle(part, k, v, bias)
                    one = cascade_rows(ONE_PASS, part, k, v, bias, size)
                    three = cascade_rows(THREE_PASS, part, k, v, bias, size)
                    turned = cascade_rows(
                        ONE_PASS,
                        part,
                        k.flip(2),
                        v.flip(2),
                        None if bias is None else bias.flip(-1),
                        size,
                    )
                    rows_of["tiled"].append(worst(one, want))
                    rows_of["reversed"].append(worst(turned, want))
                    rows_of["matrix"].append(worst(three, want))
                    rows_of["apart"].append(worst(one, three))
                means = {what: statistics.fmean(values) for what, values in rows_of.items()}
                found.append(
                    {"format": name, "length": length, "tile": size, "bias": biased, **means}
                )
    return found


# Training -----------------------------------------------------------------------------------------

WIDTH, LAYERS, CONTEXT, BATCH = 64, 2, 256, 4


class Decoder(nn.Module):
    """A small causal decoder over characters; `mix` is its attention."""

    def __init__(self, letters: int, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.embed = nn.Embedding(letters, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "one": nn.LayerNorm(WIDTH),
                    "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                    "out": nn.Linear(WIDTH, WIDTH),
                    "two": nn.LayerNorm(WIDTH),
                    "up": nn.Linear(WIDTH, 4 * WIDTH),
                    "down": nn.Linear(4 * WIDTH, WIDTH),
                }
            )
            for _ in range(LAYERS)
        )
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            parts = layer["qkv"](layer["one"](x)).unflatten(-1, (3, HEADS, -1))
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            x = x + layer["out"](self.mix(q, k, v).transpose(1, 2).flatten(2))
            x = x + layer["down"](F.gelu(layer["up"](layer["two"](x))))
        logits: Tensor = self.head(self.last(x))
        return logits


def matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that builds its matrices in the format of its inputs."""
    n = q.shape[2]
    bias = ab.forms.ALiBi(HEADS)(n).dense().to(q.dtype)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5 + bias).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def lowered(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention by one lowering."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = ab.forms.ALiBi(HEADS)(q.shape[2])
        out = ab.attention(q, k, v, bias=bias, causal=True, lowering=name)
        assert isinstance(out, Tensor)
        return out

    return mix


def text() -> tuple[Tensor, int, str]:
    """Characters as numbers: the shared text, or where it is missing a drawn one."""
    if SHARED.is_file():
        letters = SHARED.read_text(encoding="utf-8")[:200_000]
        alphabet = {letter: i for i, letter in enumerate(sorted(set(letters)))}
        return torch.tensor([alphabet[c] for c in letters]), len(alphabet), SHARED.name
    gen = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 5, (200_000,), generator=gen)
    return steps.cumsum(0) % 61, 61, "drawn"


def train(
    mix: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    seed: int,
    half: bool,
    steps: int,
    marks: Sequence[int],
) -> tuple[dict[int, Tensor], float]:
    """All weights at the marked steps and the last loss. Adam, 3e-3; the data do not depend on the
    seed of the weights.
    """
    ids, letters, _ = text()
    torch.manual_seed(seed)
    model = Decoder(letters, mix)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    gen = torch.Generator().manual_seed(11)
    kept, loss = {}, torch.zeros(())
    for step in range(1, steps + 1):
        first = torch.randint(0, len(ids) - CONTEXT - 1, (BATCH,), generator=gen)
        given = torch.stack([ids[int(f) : int(f) + CONTEXT + 1] for f in first])
        context = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
        with context:
            logits = model(given[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), given[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step in marks:
            kept[step] = torch.cat([p.detach().flatten() for p in model.parameters()])
    return kept, float(loss.detach())


def wasserstein(one: Tensor, other: Tensor) -> float:
    """The 1-Wasserstein distance of two sets of equally many numbers."""
    return float((one.sort().values - other.sort().values).abs().mean())


def drift(steps: int, seeds: Sequence[int], advance: Callable[[str], None]) -> dict[str, Any]:
    """How far weights come apart, by steps, for each lowering and the two yardsticks."""
    marks = sorted({max(1, steps * share // 20) for share in (1, 2, 5, 10, 15, 20)})
    named: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"matrix": matrices}
    for name in LOWERINGS:
        if not ab_refuses(name):
            named[name] = lowered(name)
    lines: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
    losses: dict[str, list[float]] = {}
    for seed in seeds:
        runs: dict[tuple[str, bool], dict[int, Tensor]] = {}
        for half in (False, True):
            for name, mix in named.items():
                advance(f"training, {name}, {'bfloat16' if half else 'float32'}")
                weights, loss = train(mix, seed=seed, half=half, steps=steps, marks=marks)
                runs[name, half] = weights
                losses.setdefault(f"{name} {'bfloat16' if half else 'float32'}", []).append(loss)
        advance("training, another initialisation")
        other, _ = train(matrices, seed=seed + 1000, half=False, steps=steps, marks=marks)

        def note(what: str, kind: str, a: dict[int, Tensor], b: dict[int, Tensor]) -> None:
            line = lines.setdefault((what, kind), {})
            for mark in marks:
                both = (worst(a[mark], b[mark]), wasserstein(a[mark], b[mark]))
                line.setdefault(mark, []).append(both)

        for name in named:
            for half in (False, True):
                if name != "matrix":
                    kind = "bfloat16" if half else "float32"
                    note(name, kind, runs[name, half], runs["matrix", half])
        note("another initialisation", "float32", other, runs["matrix", False])
        note("low precision", "bfloat16 over float32", runs["matrix", True], runs["matrix", False])
    found = [
        {
            "line": what,
            "format": kind,
            "steps": mark,
            "largest": statistics.fmean(p[0] for p in pairs),
            "wasserstein": statistics.fmean(p[1] for p in pairs),
        }
        for (what, kind), line in lines.items()
        for mark, pairs in line.items()
    ]
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    return {"text": text()[2], "weights": found, "loss": means}


def ab_refuses(name: str) -> bool:
    """Whether a lowering refuses the attention of the decoder."""
    q = torch.zeros(1, HEADS, CONTEXT, WIDTH // HEADS, requires_grad=True)
    try:
        lowered(name)(q, q, q)
    except ab.Refused:
        return True
    return False


# What it says -------------------------------------------------------------------------------------


def verdicts(payload: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """What holds of the work's claims, with the numbers."""
    found: list[dict[str, Any]] = []
    rows = [r for r in payload.get("tiles", ()) if r["format"] == "bfloat16" and not r["bias"]]
    if rows:
        at = max((r["length"] for r in rows), key=_near)
        ordered = sorted((r for r in rows if r["length"] == at), key=lambda r: r["tile"])
        ratios = [r["tiled"] / r["matrix"] for r in ordered]
        found.append(
            {
                "claim": "in bfloat16 tiling deviates about 10 times as much as whole rows",
                "number": f"{min(ratios):.2f} to {max(ratios):.2f} times, over tile sizes",
                "holds": bool(statistics.median(ratios) >= 5),
                "weaker": bool(min(ratios) > 1),
            }
        )
        first, last = ordered[0], ordered[-1]
        falls = all(a["tiled"] >= b["tiled"] for a, b in itertools.pairwise(ordered))
        found.append(
            {
                "claim": "larger tiles deviate less",
                "number": f"{first['tiled']:.2e} at {first['tile']} keys, "
                f"{last['tiled']:.2e} at {last['tile']}",
                "holds": bool(first["tiled"] > last["tiled"]),
                "weaker": falls,
            }
        )
    ends = [r for r in payload.get("drift", {}).get("weights", ()) if r["steps"] == steps]
    if ends:
        low = next(r for r in ends if r["line"] == "low precision")
        init = next(r for r in ends if r["line"] == "another initialisation")
        for kind in ("float32", "bfloat16"):
            lines = [r for r in ends if r["format"] == kind and r["line"] in LOWERINGS]
            own = [r for r in lines if r["line"] != "reference"]
            exact = next((r["wasserstein"] for r in lines if r["line"] == "reference"), None)
            most = max(own, key=lambda r: r["wasserstein"])
            times = low["wasserstein"] / most["wasserstein"]
            below = init["wasserstein"] / most["wasserstein"]
            found.append(
                {
                    "claim": f"in {kind} weights drift 2 to 5 times less than by low precision",
                    "number": f"{times:.1f} times less at most ({most['line']}), "
                    f"{below:.1f} times less than by another initialisation (Wasserstein)"
                    + (
                        f"; attention in float64 inside drifts {exact:.1e} from the same matrices, "
                        f"this lowering {most['wasserstein']:.1e}"
                        if exact is not None
                        else ""
                    ),
                    "holds": bool(times >= 2),
                    "weaker": bool(times > 1),
                }
            )
    return found


def ours(payload: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each format the largest ratio, over lengths and biases, of each lowering's deviation to
    that of attention with matrices in the same format.
    """
    rows = [r for r in payload.get("deviation", ()) if r["block"] is None]
    base = {
        (r["format"], r["length"], r["bias"]): r["deviation"]
        for r in rows
        if r["lowering"] == "matrix"
    }
    found: dict[str, dict[str, float]] = {}
    for r in rows:
        ratio = r["deviation"] / base[r["format"], r["length"], r["bias"]]
        own = found.setdefault(r["lowering"], {})
        own[r["format"]] = max(own.get(r["format"], 0.0), ratio)
    return found


def markdown(payload: dict[str, Any]) -> str:
    """The report: claims first, then tables."""
    told = [
        f"- {v['claim']}: {v['number']}; "
        + ("holds" if v["holds"] else "in the weaker form only" if v["weaker"] else "DOES NOT HOLD")
        for v in payload["claims"]
    ]
    parts = [
        "# Deviation of each lowering, and of the weights trained with it",
        common.header_markdown(payload),
        'The protocol of "Is Flash Attention Stable?" (2024, arXiv 2405.02803).',
        "\n".join(told) or "Not enough was measured to judge the claims.",
    ]
    if "deviation" in payload:
        rows = [
            [name, *(f"{own[f]:.2f}" if f in own else "" for f in FORMATS)]
            for name, own in ours(payload).items()
        ]
        parts += [
            "Largest difference from float64, over that of attention that builds its matrices and "
            "rounds every number to the same format (worst over lengths, with and without ALiBi):",
            common.markdown_table(["lowering", *FORMATS], rows),
        ]
        rows = [
            [
                *(r["lowering"], r["format"], f"{r['length']:,}", "ALiBi" if r["bias"] else "none"),
                *(str(r["block"] or ""), f"{r['deviation']:.1e}"),
            ]
            for r in payload["deviation"]
        ]
        head = ["lowering", "format", "tokens", "bias", "block", "deviation"]
        parts.append(common.markdown_table(head, rows))
    if "tiles" in payload:
        rows = [
            [r["format"], f"{r['length']:,}", str(r["tile"]), "ALiBi" if r["bias"] else "none"]
            + [f"{r[what]:.1e}" for what in ("tiled", "reversed", "matrix", "apart")]
            + [f"{r['tiled'] / r['matrix']:.2f}"]
            for r in payload["tiles"]
        ]
        head = ["format", "tokens", "tile", "bias", "tiled", "keys reversed", "whole rows"]
        parts += [
            "Software tiling, every number in between rounded to the format: largest difference "
            "from float64 (last two columns: between the two, and tiled over whole rows):",
            common.markdown_table([*head, "apart", "ratio"], rows),
        ]
    if "drift" in payload:
        rows = [
            [
                r["line"],
                r["format"],
                str(r["steps"]),
                f"{r['largest']:.1e}",
                f"{r['wasserstein']:.1e}",
            ]
            for r in payload["drift"]["weights"]
        ]
        head = ["weights against attention with matrices", "format", "steps", "largest", "W1"]
        parts += [
            f"Training on {payload['drift']['text']}, {LAYERS} layers of {WIDTH}, {CONTEXT} "
            f"characters, {BATCH} rows:",
            common.markdown_table(head, rows),
        ]
    return "\n\n".join(parts) + "\n"


def figure(payload: dict[str, Any]) -> Any:
    """Four panels: ours by length, tiling by tile size, both in bfloat16; drift by steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(1, 4, figsize=(19, 4.4), layout="constrained")
    for axis, kind in zip(axes[:2], ("float32", "bfloat16"), strict=True):
        rows = [r for r in payload.get("deviation", ()) if r["format"] == kind and r["bias"]]
        for name in dict.fromkeys(r["lowering"] for r in rows):
            line = [r for r in rows if r["lowering"] == name and r["block"] is None]
            style = "k--" if name == "matrix" else "o-"
            axis.plot(
                [r["length"] for r in line], [r["deviation"] for r in line], style, label=name
            )
        axis.set(title=f"{kind}, ALiBi", xlabel="tokens", ylabel="largest difference from float64")
        _axes(axis, sorted({r["length"] for r in rows}))
    rows = [r for r in payload.get("tiles", ()) if r["format"] == "bfloat16" and not r["bias"]]
    if rows:
        at = max((r["length"] for r in rows), key=_near)
        rows = sorted((r for r in rows if r["length"] == at), key=lambda r: r["tile"])
        names = {"tiled": "tiled", "reversed": "tiled, keys reversed", "matrix": "whole rows"}
        for what, label in names.items():
            style = "k--" if what == "matrix" else "o-"
            axes[2].plot([r["tile"] for r in rows], [r[what] for r in rows], style, label=label)
        axes[2].set(title=f"bfloat16 throughout, {at:,} tokens", xlabel="keys of a tile")
        _axes(axes[2], [r["tile"] for r in rows])
    weights = payload.get("drift", {}).get("weights", ())
    for what in dict.fromkeys((r["line"], r["format"]) for r in weights):
        line = [r for r in weights if (r["line"], r["format"]) == what]
        style = "o-" if what[0] in LOWERINGS else "k--" if "low" in what[0] else "k:"
        xs, ys = [r["steps"] for r in line], [r["wasserstein"] for r in line]
        axes[3].plot(xs, ys, style, label=f"{what[0]}, {what[1]}")
    axes[3].set(title="drift of weights", xlabel="steps", ylabel="1-Wasserstein distance")
    _axes(axes[3], sorted({r["steps"] for r in weights}))
    return made


def _axes(axis: Any, places: Sequence[int]) -> None:
    """Logarithmic, with the measured places as ticks and the names beside the lines."""
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    made.add_argument("--quick", action="store_true", help="tiny sizes, written to out/ instead")
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    made.add_argument("--steps", type=int, help="of training, by default 200")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    args = made.parse_args(given)
    lengths = QUICK_LENGTHS if args.quick else LENGTHS
    sizes = QUICK_TILES if args.quick else TILES
    steps = args.steps or (20 if args.quick else 200)
    path = args.out or common.SCRATCH / "quick_stability.json"
    if not (args.out or args.quick or args.steps or set(args.only) != set(PARTS)):
        path = common.recorded_or_scratch("stability.json", common.machine())
    started, begin = common.now(), time.perf_counter()
    found: dict[str, Any] = {}
    with common.progress("stability", 100) as tell:

        def advance(words: str) -> None:
            tell(0.5, words)

        if "deviation" in args.only:
            found["deviation"] = deviation(lengths, advance)
        if "tiles" in args.only:
            found["tiles"] = tiles(lengths, sizes, advance)
        if "drift" in args.only:
            found["drift"] = drift(steps, SEEDS[:1] if args.quick else SEEDS[:2], advance)
    head = common.header(
        MODULE,
        given,
        seeds={f"torch {i}": seed for i, seed in enumerate(SEEDS)},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=torch.get_num_threads(),
    )
    payload = {**head, "claims": verdicts(found, steps), **found}
    common.write_result(path, payload, markdown(payload))
    common.save_figure(figure(payload), path.with_suffix(".png"))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
