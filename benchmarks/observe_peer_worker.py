"""One line of `benchmarks.observe_peers` in a process of its own; prints one line of JSON.

    python benchmarks/observe_peer_worker.py LINE MODEL_FOLDER TEXT_FILE TOKENS REPEATS

Stands alone: it imports the one library that its line measures.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from torch import Tensor

INSEQ_TOKENS = 8  # inseq reads attention while it generates: the last tokens of the text


def statistics_of(maps: Any) -> dict[str, list[list[float]]]:
    """Layer -> head -> the numbers that attnbias's table holds, from whole maps (1, H, N, N)."""
    found: dict[str, list[list[float]]] = {}
    for p in maps:
        n = p.shape[-1]
        place = torch.arange(n)
        p = p[0]
        columns = p.sum(-2)
        numbers = {
            "received": columns.amax(-1),
            "entropy": -torch.xlogy(p, p).sum(-1).mean(-1),
            "first_token": p[..., 0].mean(-1),
            "distance": torch.stack(
                [(head * (place[:, None] - place).abs()).sum(-1).mean() for head in p]
            ),
            "offset": p.diagonal(-1, -2, -1).mean(-1),
            "peak[weight]": p.amax(-1).mean(-1),
        }
        for name, values in numbers.items():
            found.setdefault(name, []).append([float(x) for x in values])
    return found


def load(folder: str, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def encoded(folder: str, text: str, tokens: int) -> tuple[Any, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text[: 40 * tokens], return_tensors="pt")["input_ids"][:, :tokens]
    assert ids.shape[1] == tokens
    return tokenizer, ids


def forward(folder: str, text: str, tokens: int) -> Callable[[], Any]:
    model, (_, ids) = load(folder, "sdpa"), encoded(folder, text, tokens)
    return lambda: model(input_ids=ids, use_cache=False) and {}


def eager_forward(folder: str, text: str, tokens: int) -> Callable[[], Any]:
    model, (_, ids) = load(folder, "eager"), encoded(folder, text, tokens)
    return lambda: model(input_ids=ids, use_cache=False) and {}


def attnbias(folder: str, text: str, tokens: int) -> Callable[[], Any]:
    import attnbias as ab

    model, (_, ids) = load(folder, "sdpa"), encoded(folder, text, tokens)
    s = ab.statistics
    wanted = [
        s.Received(), s.Entropy(), s.FirstToken(), s.SinkRate(), s.Distance(), s.Share(),
        s.Offset(), s.Peak(),
    ]  # fmt: skip

    def run() -> Any:
        with ab.observe(model, wanted, spans={"first": (0, 16), "rest": (16, None)}) as seen:
            model(input_ids=ids, use_cache=False)
        found: dict[str, list[list[float]]] = {}
        for row in seen.table():
            layers = found.setdefault(row.statistic, [])
            while len(layers) <= row.layer:
                layers.append([])
            layers[row.layer].append(row.value)
        return found

    return run


def eager_maps(folder: str, text: str, tokens: int) -> Callable[[], Any]:
    model, (_, ids) = load(folder, "eager"), encoded(folder, text, tokens)

    def run() -> Any:
        maps = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        return statistics_of(maps)

    return run


def bertviz(folder: str, text: str, tokens: int) -> Callable[[], Any]:
    from bertviz import head_view

    model, (tokenizer, ids) = load(folder, "eager"), encoded(folder, text, tokens)

    def run() -> Any:
        maps = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        page = head_view(
            maps, tokenizer.convert_ids_to_tokens(ids[0].tolist()), html_action="return"
        )
        return {"page_bytes": len(page.data)}

    return run


def transformer_lens(folder: str, text: str, tokens: int) -> Callable[[], Any]:
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer, ids = encoded(folder, text, tokens)
    model = TransformerBridge.boot_transformers(
        folder, hf_model=load(folder, "eager"), tokenizer=tokenizer
    )

    def run() -> Any:
        _, cache = model.run_with_cache(
            ids, names_filter=lambda name: name.endswith("hook_pattern")
        )
        return statistics_of(cache.values())

    return run


def inseq(folder: str, text: str, tokens: int) -> Callable[[], Any]:
    import inseq as library

    tokenizer, ids = encoded(folder, text, tokens)
    model = library.load_model(folder, "attention")
    prompt = tokenizer.decode(ids[0, :-INSEQ_TOKENS], skip_special_tokens=True)
    whole = tokenizer.decode(ids[0], skip_special_tokens=True)

    def run() -> Any:
        out = model.attribute(prompt, whole, show_progress=False)
        return {"steps": out[0].target_attributions.shape[1]}

    return run


LINES = {
    "forward": forward,
    "eager forward": eager_forward,
    "attnbias": attnbias,
    "eager maps": eager_maps,
    "bertviz": bertviz,
    "transformer_lens": transformer_lens,
    "inseq": inseq,
}


def main() -> None:
    line, folder, file, tokens, repeats = sys.argv[1:6]
    with open(file, encoding="utf-8") as handle:
        text = handle.read()
    torch.manual_seed(0)
    seconds: list[float] = []
    with torch.no_grad():
        run = LINES[line](folder, text, int(tokens))
        found = run()
        for _ in range(int(repeats)):
            begin = time.perf_counter()
            found = run()
            seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "found": found}))


if __name__ == "__main__":
    main()
