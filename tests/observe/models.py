"""Models and the ways they are run, each with its whole eager maps laid out by position."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.observe import Seen
from tests.observe.calls import DenseMap, by_position, has_key

TEXT = [
    "Once upon a time there was a little girl who liked to play in the garden with her dog.",
    "The dog was happy and ran away, and Tim said that he wanted to find a big red ball now.",
]
SPANS: dict[str, Any] = {"first": (0, 3), "middle": [(5, 9), (4, 12)], "rest": (2, None)}


@dataclass
class Scenario:
    """A model, how it is run, and what its eager twin attends to.

    Attributes:
        run: runs the forwards on a model; returns the outputs to compare bit for bit.
        whole: inputs of one eager pass over the finished sequences.
        real: (B, N) real tokens of each tower's keys; visible: (N, M) what a tower's masks show.
    """

    model: nn.Module
    run: Callable[[nn.Module], list[Tensor]]
    whole: dict[str, Any]
    real: dict[str, Tensor]
    visible: dict[str, Callable[[int], Tensor]]
    outputs: dict[str, str] = field(default_factory=lambda: {"text": "attentions"})
    queries: dict[str, str] = field(default_factory=dict)
    tolerance: float = 1e-5
    _maps: dict[str, list[DenseMap]] | None = None

    @property
    def batch(self) -> int:
        return len(next(iter(self.real.values())))

    @property
    def spans(self) -> dict[str, Any]:
        return {**SPANS, "middle": [SPANS["middle"][b % 2] for b in range(self.batch)]}

    def observe(self, statistics: Any, spans: Any = None, **options: Any) -> Seen:
        with torch.no_grad(), ab.observe(self.model, statistics, spans=spans, **options) as seen:
            self.run(self.model)
        return seen

    def eager(self) -> nn.Module:
        twin = copy.deepcopy(self.model)
        twin.set_attn_implementation("eager")  # type: ignore[operator]
        return twin

    def maps(self) -> dict[str, list[DenseMap]]:
        """Tower -> the map of each layer, by position."""
        if self._maps is None:
            with torch.no_grad():
                out = self.eager()(**self.whole, output_attentions=True)
            self._maps = {
                tower: [
                    self._laid_out(tower, layer, p) for layer, p in enumerate(getattr(out, name))
                ]
                for tower, name in self.outputs.items()
            }
        return self._maps

    def _laid_out(self, tower: str, layer: int, p: Tensor) -> DenseMap:
        key_real, query_real = self.real[tower], self.real[self.queries.get(tower, tower)]
        allowed = self.visible[tower](layer)
        seen = (allowed[None] if allowed.ndim == 2 else allowed) & key_real[:, None, :]
        queries, keys = (
            (r.long().cumsum(-1) - 1).masked_fill(~r, -1) for r in (query_real, key_real)
        )
        laid, visible = by_position(p, seen[:, None], queries, keys)
        return DenseMap(laid, visible, has_key(keys), self.spans)


def sharpen(model: nn.Module, factor: float = 2.0) -> nn.Module:
    """Scale the queries of the first quarter of the heads; redraw sinks, which are born zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] in ("q_proj", "query"):
            rows = max(module.out_features // 4, 1)
            module.weight.data[:rows] *= factor
            if module.bias is not None:
                module.bias.data[:rows] *= factor
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_()
    return model.eval()


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def window(n: int, size: int) -> Tensor:
    return causal(n) & ~causal(n).tril(-size)


def everything(n: int, m: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool)


# Models, made once --------------------------------------------------------------------------------


@functools.cache
def stories_model(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def minilm_model(folder: Path) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def mistral_model() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    return sharpen(
        MistralForCausalLM(
            MistralConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=2,
                sliding_window=7,
                initializer_range=0.2,
            )
        )
    )


@functools.cache
def gpt_oss_model() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(2)
    return sharpen(
        GptOssForCausalLM(
            GptOssConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=2,
                head_dim=16,
                num_local_experts=2,
                num_experts_per_tok=1,
                sliding_window=7,
                initializer_range=0.2,
            )
        )
    )


@functools.cache
def vit_model() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(3)
    return sharpen(
        ViTModel(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=48,
                patch_size=8,
                initializer_range=0.2,
            )
        )
    )


@functools.cache
def bart_model() -> nn.Module:
    from transformers import BartConfig, BartModel

    torch.manual_seed(4)
    return sharpen(
        BartModel(
            BartConfig(
                vocab_size=64,
                d_model=64,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=64,
                init_std=0.2,
            )
        )
    )


# Ways to run them ---------------------------------------------------------------------------------


def positions(real: Tensor) -> Tensor:
    return (real.long().cumsum(-1) - 1).clamp_min(0)


def decoder(
    model: nn.Module,
    ids: Tensor,
    real: Tensor,
    cuts: list[int],
    cache: str = "dynamic",
    visible: Callable[[int], Tensor] | None = None,
) -> Scenario:
    """A causal model fed in pieces: the cuts are the ends of the forwards."""
    n = ids.shape[1]

    def run(one: nn.Module) -> list[Tensor]:
        from transformers import DynamicCache, StaticCache

        past = {
            "dynamic": lambda: DynamicCache(config=one.config),
            "static": lambda: StaticCache(config=one.config, max_cache_len=n + 7),
            "none": lambda: None,
        }[cache]()
        out, start = [], 0
        for stop in cuts:
            given = {
                "input_ids": ids[:, start:stop],
                "attention_mask": real[:, :stop].long(),
                "position_ids": positions(real)[:, start:stop],
            }
            if bool(real.all()):
                del given["attention_mask"]
            found = one(**given, past_key_values=past, use_cache=past is not None)
            out.append(found.logits)
            start = stop
        return out

    return Scenario(
        model=model,
        run=run,
        whole={
            "input_ids": ids,
            "attention_mask": real.long(),
            "position_ids": positions(real),
            "use_cache": False,
        },
        real={"text": real},
        visible={"text": visible or (lambda layer: causal(n))},
    )


def ragged(batch: int, n: int, side: str) -> Tensor:
    real = torch.ones(batch, n, dtype=torch.bool)
    for row in range(1, batch):
        if side == "left":
            real[row, : 4 * row] = False
        else:
            real[row, n - 4 * row :] = False
    return real


def tokens(batch: int, n: int, size: int = 60) -> Tensor:
    return torch.randint(3, size, (batch, n), generator=torch.Generator().manual_seed(n))


def _minilm(request: pytest.FixtureRequest) -> Scenario:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue("minilm")
    model = minilm_model(folder)
    texts = [" ".join(TEXT), TEXT[1]]
    given = dict(AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt"))
    n = given["input_ids"].shape[1]
    return Scenario(
        model=model,
        run=lambda one: [one(**given).last_hidden_state],
        whole=given,
        real={"text": given["attention_mask"].bool()},
        visible={"text": lambda layer: everything(n, n)},
    )


def _stories(side: str, cuts: list[int] | None = None, cache: str = "dynamic") -> Any:
    def make(request: pytest.FixtureRequest) -> Scenario:
        model = stories_model(request.getfixturevalue("stories"))
        real = torch.ones(2, 40, dtype=torch.bool) if side == "none" else ragged(2, 40, side)
        return decoder(model, tokens(2, 40, 500), real, cuts or [40], cache)

    return make


def _packed(request: pytest.FixtureRequest) -> Scenario:
    """Two sequences in one row, told apart by position_ids alone."""
    model = stories_model(request.getfixturevalue("stories"))
    ids = tokens(1, 40, 500)
    places = torch.cat([torch.arange(18), torch.arange(22)])[None]
    same = (torch.arange(40) < 18)[:, None] == (torch.arange(40) < 18)[None, :]
    given = {"input_ids": ids, "position_ids": places, "use_cache": False}
    return Scenario(
        model=model,
        run=lambda one: [one(**given).logits],
        whole=given,
        real={"text": torch.ones(1, 40, dtype=torch.bool)},
        visible={"text": lambda layer: causal(40) & same},
    )


def _mistral(cuts: list[int], cache: str = "dynamic", side: str = "left") -> Any:
    def make(request: pytest.FixtureRequest) -> Scenario:
        real = torch.ones(2, 40, dtype=torch.bool) if side == "none" else ragged(2, 40, side)
        return decoder(
            mistral_model(), tokens(2, 40), real, cuts, cache, lambda layer: window(40, 7)
        )

    return make


def _gpt_oss(cuts: list[int], cache: str = "dynamic") -> Any:
    def make(request: pytest.FixtureRequest) -> Scenario:
        model = gpt_oss_model()
        kinds = model.config.layer_types
        return decoder(
            model,
            tokens(2, 40),
            ragged(2, 40, "left"),
            cuts,
            cache,
            lambda layer: window(40, 7) if kinds[layer] == "sliding_attention" else causal(40),
        )

    return make


def _vit(request: pytest.FixtureRequest) -> Scenario:
    given = {"pixel_values": torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(5))}
    real = torch.ones(2, 37, dtype=torch.bool)
    return Scenario(
        model=vit_model(),
        run=lambda one: [one(**given).last_hidden_state],
        whole=given,
        real={"vision": real},
        visible={"vision": lambda layer: everything(37, 37)},
        outputs={"vision": "attentions"},
    )


def _bart(request: pytest.FixtureRequest) -> Scenario:
    given = {
        "input_ids": tokens(2, 30),
        "attention_mask": ragged(2, 30, "right").long(),
        "decoder_input_ids": tokens(2, 24),
        "use_cache": False,
    }
    return Scenario(
        model=bart_model(),
        run=lambda one: [one(**given).last_hidden_state],
        whole=given,
        real={
            "encoder": given["attention_mask"].bool(),
            "decoder": torch.ones(2, 24, dtype=torch.bool),
            "cross": given["attention_mask"].bool(),
        },
        visible={
            "encoder": lambda layer: everything(30, 30),
            "decoder": lambda layer: causal(24),
            "cross": lambda layer: everything(24, 30),
        },
        outputs={
            "encoder": "encoder_attentions",
            "decoder": "decoder_attentions",
            "cross": "cross_attentions",
        },
        queries={"cross": "decoder"},
    )


@functools.cache
def t5_model() -> nn.Module:
    """Position biases, drawn from N(0, 1): they are born small."""
    from transformers import T5Config, T5Model

    torch.manual_seed(6)
    model = T5Model(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4,
            relative_attention_num_buckets=8, dropout_rate=0.0,
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.data.normal_()
        elif name.endswith((".q.weight", ".k.weight")):
            parameter.data.normal_(std=0.2)
    return model


def _t5(request: pytest.FixtureRequest) -> Scenario:
    bart = _bart(request)
    return replace(
        bart, model=t5_model(), _maps=None, run=lambda one: [one(**bart.whole).last_hidden_state]
    )


@functools.cache
def clip_model() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(7)
    size = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.2,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**size, "vocab_size": 64, "eos_token_id": 63},
        vision_config={**size, "image_size": 48, "patch_size": 8},
        projection_dim=16,
    )
    return sharpen(CLIPModel(config), 4.0)


def _llava(request: pytest.FixtureRequest) -> Scenario:
    """Image tokens among the words; the maps are those of the text tower."""
    from tests.steer import models

    subject = models.make("llava", request)
    given: dict[str, Any] = dict(subject.inputs)
    n = given["input_ids"].shape[1]
    mask = given.get("attention_mask")
    real = torch.ones(2, n, dtype=torch.bool) if mask is None else mask.bool()
    return Scenario(
        model=subject.model,
        run=lambda one: [one(**given).logits],
        whole=given,
        real={"text": real},
        visible={"text": lambda layer: causal(n)},
    )


STEPS = [32, *range(33, 41)]
SCENARIOS: dict[str, Callable[[pytest.FixtureRequest], Scenario]] = {
    "minilm, padded": _minilm,
    "stories": _stories("none"),
    "stories, left padding": _stories("left"),
    "stories, right padding, no cache": _stories("right", cache="none"),
    "stories, packed": _packed,
    "stories, decoding": _stories("none", STEPS),
    "stories, decoding, padded, static cache": _stories("left", STEPS, "static"),
    "stories, prefill of a static cache": _stories("none", [40], "static"),
    "stories, chunks": _stories("left", [19, 40]),
    "stories, chunks, static cache": _stories("left", [19, 40], "static"),
    "mistral, window": _mistral([40]),
    "mistral, window, decoding, cropped cache": _mistral(STEPS),
    "mistral, window, decoding, static cache": _mistral(STEPS, "static"),
    "mistral, window, chunks": _mistral([19, 40], side="none"),
    "gpt-oss, sinks": _gpt_oss([40]),
    "gpt-oss, sinks, decoding": _gpt_oss(STEPS),
    "vit": _vit,
    "llava": _llava,
    "bart": _bart,
    "t5, position bias": _t5,
}
_made: dict[str, Scenario] = {}


def scenario(name: str, request: pytest.FixtureRequest) -> Scenario:
    """A scenario by name; models and maps are made once in a process."""
    if name not in _made:
        _made[name] = SCENARIOS[name](request)
    return _made[name]
