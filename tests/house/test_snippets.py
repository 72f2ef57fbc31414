"""The Python blocks of the README and the docs run, in order, one page after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.hub.processors import picture, processor
from tests.hub.test_images import subject

PAGES = ["README.md"]
PAGES += [f"docs/{name}.md" for name in ("quickstart", "hub", "observe", "steer", "writing_rules")]
PAGES += ["docs/observe_corpus.md"]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(
    page: str, stories: Path, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    model.generation_config.max_new_tokens = 4
    # What a page takes for granted.
    import attnbias as ab

    names: dict[str, Any] = {
        "ab": ab, "model": model, "inputs": dict(inputs), "path": minilm, "torch": torch,
        "tokenizer": tokenizer, "processor": processor("llava"), "vlm": subject("llava").model,
    }  # fmt: skip
    names["vlm"].generation_config.max_new_tokens = 4
    picture().save(tmp_path / "cat.png")
    (tmp_path / "texts.jsonl").write_text('{"text": "One day."}\n{"text": "A dog ran to Tim."}\n')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert blocks(page)
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
