"""What is known of the classes with a bias: the table, and the refusal of what is not known."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import attnbias as ab
from attnbias.errors import Refused
from attnbias.fuse import FAMILIES, known, scan
from docs import make_fuse
from tests.fuse.test_t5 import SMALL


@pytest.fixture(scope="module")
def rows() -> dict[str, known.Row]:
    return {row.path: row for row in known.table()}


def path(model: str, name: str) -> str:
    return f"transformers.models.{model}.modeling_{model}.{name}"


def small(**changes: Any) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**{**SMALL, **changes})).eval()


# The table ----------------------------------------------------------------------------------------


def test_every_class_is_decided(rows: dict[str, known.Row]) -> None:
    """A class of a newer transformers shows up here: write a family for it, or why not."""
    assert len(rows) > 150
    assert not [row.path for row in rows.values() if row.status == "unknown"]


def test_every_class_of_a_family_is_there(rows: dict[str, known.Row]) -> None:
    from importlib import import_module

    for family in FAMILIES:
        there = 0
        for one in (*family.modules, *family.parts):
            module, _, name = one.rpartition(".")
            if hasattr(import_module(module), name):  # else of another version of transformers
                assert rows[one].status == "fused", one
                assert (rows[one].family, rows[one].why) == (family.name, family.form)
                there += 1
            else:
                assert one not in rows
        assert there


def test_what_is_refused_is_there_and_not_fused(rows: dict[str, known.Row]) -> None:
    """A reason for a class that is gone, or that a family knows by now, is out of date."""
    families = {one for family in FAMILIES for one in (*family.modules, *family.parts)}
    assert not families & known.REFUSED.keys()
    for one, reason in known.REFUSED.items():
        assert rows[one].status == "refused"
        assert rows[one].why == reason
        assert reason.endswith(".")
        assert "\n" not in reason


@pytest.mark.parametrize(
    ("model", "name", "status"),
    [
        ("t5", "T5Attention", "fused"),
        ("t5", "T5Stack", "carries"),
        ("t5", "T5Block", "carries"),
        ("wavlm", "WavLMAttention", "refused"),
        ("wavlm", "WavLMEncoder", "carries"),
        ("deberta_v2", "DisentangledSelfAttention", "refused"),
        ("sam", "SamVisionSdpaAttention", "refused"),
        ("xlnet", "XLNetRelativeAttention", "refused"),
        ("levit", "LevitAttention", "refused"),
        ("phi4_multimodal", "Phi4MultimodalAudioRelativeAttentionBias", "carries"),
    ],
)
def test_classes_by_name(rows: dict[str, known.Row], model: str, name: str, status: str) -> None:
    assert rows[path(model, name)].status == status


def test_classes_without_a_bias_are_not_there(rows: dict[str, known.Row]) -> None:
    for one in (
        path("t5", "T5LayerNorm"),
        path("t5", "T5PreTrainedModel"),  # it fills the table, nothing more
        path("bert", "BertSelfAttention"),
        path("llama", "LlamaAttention"),
    ):
        assert one not in rows


def test_carriers_name_what_they_carry_for(rows: dict[str, known.Row]) -> None:
    assert rows[path("t5", "T5Stack")].why == "for T5Attention"
    assert rows[path("t5", "T5Stack")].family == rows[path("t5", "T5Attention")].family
    assert rows[path("mpnet", "MPNetEncoder")].why == "for MPNetSelfAttention"
    assert rows[path("cpmant", "CpmAntSegmentPositionEmbedding")].why == "for CpmAntAttention"


def test_every_call_of_the_interface_with_a_position_bias_is_there(
    rows: dict[str, known.Row],
) -> None:
    """By another route: the text of each class that hands `position_bias=` to what it calls."""
    found = 0
    for module, file in scan.model_files():
        parts = re.split(r"^class (\w+)", file.read_text("utf-8"), flags=re.M)
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            if re.search(r"\bposition_bias=(?!None)", body):
                found += 1
                assert f"{module}.{name}" in rows
    assert found > 30


NEW = """
class NewAttention(nn.Module):
    def __init__(self, config):
        self.relative_attention_bias = nn.Embedding(32, 4)

    def forward(self, x):
        return torch.softmax(x @ x.mT + self.relative_attention_bias.weight, -1) @ x

class NewLayer(nn.Module):
    def __init__(self, config):
        self.attention = TABLE[config.kind](config)

    def forward(self, x, position_bias=None):
        return self.attention(x, position_bias)

class Plain(nn.Module):
    def forward(self, x):
        return torch.softmax(x @ x.mT, -1) @ x

class NewPreTrainedModel(nn.Module):
    def _init_weights(self, module):
        init.zeros_(module.relative_attention_bias.weight)

class Head(Plain):
    def forward(self, x):
        return 2 * x

TABLE = {"new": NewAttention}
"""


def test_a_new_class_is_unknown() -> None:
    found = {row.path: row for row in known._rows(scan.read(NEW, "new"))}
    assert {name: row.status for name, row in found.items()} == {
        "new.NewAttention": "unknown",
        "new.NewLayer": "carries",
    }
    assert found["new.NewLayer"].why == "for NewAttention"
    assert found["new.NewAttention"].signs == ("relative_attention_bias",)


def test_a_subclass_in_a_file_is_as_its_base_or_refused() -> None:
    text = """
class A(T):
    def forward(self, x, position_bias):
        return torch.softmax(x @ x + position_bias)

class B(A):
    def __init__(self): pass

class C(A):
    def forward(self, x, position_bias):
        return torch.matmul(x, torch.softmax(x + 2 * position_bias))
"""
    classes = scan.read(text, "transformers.models.t5.modeling_t5")
    module = "transformers.models.t5.modeling_t5"
    classes["A"] = scan.replace(classes["A"], path=f"{module}.T5Attention")
    found = {row.path: row for row in known._rows(classes)}
    assert found[f"{module}.T5Attention"].status == "fused"
    assert found[f"{module}.C"].status == "refused"
    assert "it has forward of its own, other than A" in found[f"{module}.C"].why


# What is not known is refused by name -------------------------------------------------------------


def changed(kind: str, body: dict[str, Any]) -> nn.Module:
    """A small T5 encoder whose attention is of a subclass with other methods."""
    from transformers.models.t5.modeling_t5 import T5Attention

    model = small()
    own = type(kind, (T5Attention,), body)
    for module in model.modules():
        if type(module) is T5Attention:
            module.__class__ = own
    return model


def test_a_subclass_that_adds_nothing_is_fused() -> None:
    model = changed("Same", {"__init__": lambda self: None})
    with ab.fuse(model, quiet=True, measure=False) as fused:
        assert fused.replaced == 2


@pytest.mark.parametrize("name", ["forward", "compute_bias", "_relative_position_bucket"])
def test_a_subclass_with_a_method_of_its_own_is_refused(name: str) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    def other(*args: Any, **kwargs: Any) -> Any:
        return 2 * getattr(T5Attention, name)(*args, **kwargs)

    model = changed("Other", {name: other})
    with pytest.raises(Refused, match=f"Other .* it has {name} of its own, other than T5Attention"):
        ab.fuse(model, quiet=True)


def test_a_method_that_another_library_has_replaced_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    model = small()
    attention: Any = model.encoder.block[1].layer[0].SelfAttention  # type: ignore[union-attr,index]
    attention.compute_bias = lambda *_, **__: None
    with ab.fuse(model, quiet=True, measure=False) as fused:
        assert fused.replaced == 1
        assert fused.left[0].reason == "another library has replaced its compute_bias."
    monkeypatch.setattr(T5Attention, "compute_bias", patched)
    with pytest.raises(Refused, match="has replaced compute_bias of T5Attention"):
        ab.fuse(small(), quiet=True)


class Novel(nn.Module):
    """Attention with a bias in a class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.alibi = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.mT + self.alibi, -1) @ x


def test_an_unknown_class_is_refused_by_name() -> None:
    said = r"Novel .* is not fused: its code speaks of alibi, and no family knows its class"
    with pytest.raises(Refused, match=said):
        ab.fuse(nn.Sequential(Novel()), quiet=True)
    both = nn.ModuleList([small(), Novel()])
    with ab.fuse(both, quiet=True, measure=False) as fused:
        assert fused.replaced == 2
        assert [one.kind for one in fused.left] == ["Novel"]
    with pytest.raises(Refused, match="holds no attention with a bias that is known"):
        ab.fuse(nn.Linear(2, 2), quiet=True)


def test_a_class_that_is_refused_says_why() -> None:
    from transformers import WavLMConfig, WavLMModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "num_conv_pos_embeddings": 4}
    sizes |= {"num_conv_pos_embedding_groups": 2}
    model = WavLMModel(WavLMConfig(**sizes))
    with pytest.raises(Refused, match=r"WavLMAttention .* is not fused: each query scales"):
        ab.fuse(model, quiet=True)


# The page -----------------------------------------------------------------------------------------


PAGE = make_fuse.PAGE.read_text("utf-8")


def test_the_page_is_current() -> None:
    """Also after a family, a reason or a recorded version has changed."""
    assert make_fuse.text(PAGE) == PAGE, "run `python docs/make_fuse.py`"
    for family in FAMILIES:
        assert f"| {family.name} | {family.form} |" in PAGE
    for reason in known.REFUSED.values():
        assert reason in PAGE


def test_the_first_block_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)[0]
    exec(compile(block, "fuse.md", "exec"), {})
    assert "2 attention modules fused" in capsys.readouterr().out
