"""The models that `benchmarks.fuse` measures: real classes, random weights, tables from N(0, 1)."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.hub.modes import evaluating
from attnbias.hub.registry import CONFIG_KEY

VOCABULARY = 1000
WIDTH, HEADS = 512, 8
TABLES = r"relative_attention_bias|relative_position_bias|rel_pos.*bias|sinks"
PADDED_BATCH = 4
MORE_MOST = 256
STEPS = 8  # decoded tokens of one call


@dataclass(frozen=True)
class Variant:
    """One way in which the stock model computes attention.

    `prepare` chooses it; `bytes` says how much it takes at a size beyond the model, roughly.
    """

    name: str
    prepare: Callable[[Any], None]
    bytes: Callable[[int], float] = lambda size: 0.0


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name, words: for people. unit: what its sizes count. build: from a size.
        inputs: keyword arguments of a forward, from (size, generator).
        variants: the ways the stock model has; the fastest that fits is the stock line.
        more: other ways to fuse, from (model, inputs), at sizes up to `MORE_MOST`.
    """

    name: str
    words: str
    unit: str
    build: Callable[[int], nn.Module]
    inputs: Callable[[int, torch.Generator], dict[str, Any]]
    variants: tuple[Variant, ...]
    more: Mapping[str, Callable[[Any, dict[str, Any]], Any]] = field(default_factory=dict)


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _hub(model: str, config: str, **settings: Any) -> nn.Module:
    """A class of transformers from its config."""
    made: nn.Module = _named(f"transformers.{model}")(_named(f"transformers.{config}")(**settings))
    return made


def made(subject: Subject, size: int) -> nn.Module:
    """The model at a size, in eval mode."""
    torch.manual_seed(0)
    model = subject.build(size).eval()
    with torch.no_grad():
        for name, one in model.named_parameters():
            if re.search(TABLES, name):
                one.normal_()
    return model


def twin(model: nn.Module) -> Any:
    """A copy that shares parameters and buffers."""
    shared: dict[int, Any] = {id(one): one for one in model.parameters()}
    shared |= {id(one): one for one in model.buffers()}
    return copy.deepcopy(model, shared)


# Inputs ------------------------------------------------------------------------------------------


def ids(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (1, size), generator=generator)}


def padded_ids(size: int, generator: torch.Generator) -> dict[str, Any]:
    """A batch whose rows are full, 3/4, 1/2 and 1/4 long."""
    keep = torch.arange(size) < torch.tensor([[size], [3 * size // 4], [size // 2], [size // 4]])
    tokens = torch.randint(3, VOCABULARY, (PADDED_BATCH, size), generator=generator)
    return {"input_ids": tokens, "attention_mask": keep.long()}


def images(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}


def page(size: int, generator: torch.Generator) -> dict[str, Any]:
    """Words with their boxes, and a picture of 196 patches."""
    corner = torch.randint(0, 500, (1, size, 2), generator=generator)
    box = torch.cat([corner, corner + torch.randint(1, 500, corner.shape, generator=generator)], -1)
    return {**ids(size, generator), "bbox": box, **images(224, generator)}


def pairs(single: int) -> Callable[[int, torch.Generator], dict[str, Any]]:
    """Residues with `single` channels, their pairs with 128."""
    return lambda size, generator: {
        "single": torch.randn(1, size, single, generator=generator),
        "pair": torch.randn(1, size, size, 128, generator=generator),
    }


# Models ------------------------------------------------------------------------------------------


def t5(size: int, layers: int = 6, model: str = "T5EncoderModel") -> nn.Module:
    return _hub(
        model, "T5Config", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=64, num_heads=HEADS,
        num_layers=layers, d_ff=2048, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip


def t5_training(size: int) -> nn.Module:
    return t5(size, layers=4)


def t5_decoder(size: int) -> nn.Module:
    return t5(size, layers=4, model="T5ForConditionalGeneration")


def long_t5(size: int) -> nn.Module:
    return _hub(
        "LongT5EncoderModel", "LongT5Config", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=64,
        num_heads=HEADS, num_layers=4, d_ff=2048, encoder_attention_type="transient-global",
    )  # fmt: skip


def mpt(size: int) -> nn.Module:
    return _hub(
        "MptForCausalLM", "MptConfig", vocab_size=VOCABULARY, d_model=WIDTH, n_heads=HEADS,
        n_layers=4, max_seq_len=size + 1024,
    )  # fmt: skip


def bloom(size: int) -> nn.Module:
    return _hub(
        "BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=WIDTH, n_head=HEADS,
        n_layer=4,
    )  # fmt: skip


def falcon(size: int) -> nn.Module:
    return _hub(
        "FalconForCausalLM", "FalconConfig", vocab_size=VOCABULARY, hidden_size=WIDTH,
        num_attention_heads=HEADS, num_hidden_layers=4, alibi=True, multi_query=False,
        new_decoder_architecture=False, parallel_attn=False,
    )  # fmt: skip


def gpt_oss(size: int) -> nn.Module:
    return _hub(
        "GptOssForCausalLM", "GptOssConfig", vocab_size=VOCABULARY, hidden_size=WIDTH, head_dim=64,
        num_attention_heads=HEADS, num_key_value_heads=2, num_hidden_layers=4, num_local_experts=4,
        num_experts_per_tok=2, intermediate_size=WIDTH, sliding_window=128,
    )  # fmt: skip


def swin(size: int) -> nn.Module:
    return _hub("SwinModel", "SwinConfig", image_size=size)


def swin_v2(size: int) -> nn.Module:
    return _hub("Swinv2Model", "Swinv2Config", image_size=size, window_size=8)


def beit(size: int) -> nn.Module:
    return _hub(
        "BeitModel", "BeitConfig", image_size=size, num_hidden_layers=4,
        use_relative_position_bias=True,
    )  # fmt: skip


def layout(size: int) -> nn.Module:
    return _hub(
        "LayoutLMv3Model", "LayoutLMv3Config", vocab_size=VOCABULARY, num_hidden_layers=4,
        max_position_embeddings=size + 8,
    )  # fmt: skip


class FoldBlock(nn.Module):
    """One block of a trunk at its true widths; the trunks are 48 of them, all alike."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.chunk_size: int | None = None

    def forward(self, single: Tensor, pair: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self.block(single, pair, chunk_size=self.chunk_size)
        return out


def esm_fold(size: int) -> nn.Module:
    config = _named("transformers.models.esm.configuration_esm.TrunkConfig")(num_blocks=1)
    file = "transformers.models.esm.modeling_esmfold"
    return _drawn(FoldBlock(_named(f"{file}.EsmFoldTriangularSelfAttentionBlock")(config)))


def pairformer(size: int) -> nn.Module:
    return _drawn(FoldBlock(_named("attnbias.fuse.plain.pairformer.PairformerBlock")()))


def _drawn(model: nn.Module) -> nn.Module:
    """Some last projections begin at zero: nothing would be seen of what is before them."""
    for one in model.parameters():
        if one.ndim > 1:
            nn.init.normal_(one, std=one.shape[-1] ** -0.5)
    return model


# The stock ways ----------------------------------------------------------------------------------


def _implementation(name: str) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        # Not through set_attn_implementation, which Falcon refuses.
        for module in model.modules():
            if hasattr(module, "config"):
                vars(module.config)[CONFIG_KEY] = name

    return prepare


def _dense(tensors: float, heads: int = HEADS, batch: int = 1) -> Callable[[int], float]:
    """So many float32 tensors of all scores of a layer."""
    return lambda size: 4.0 * tensors * heads * batch * size**2


def _nothing(model: Any) -> None:
    return None


def _chunks(size: int | None) -> Callable[[Any], None]:
    return lambda model: setattr(model, "chunk_size", size)


def _low_rank(route: str) -> Callable[[Any, dict[str, Any]], Any]:
    """Triangle attention with a pair bias of rank 16: an approximation, judged by its error."""

    def fuse(model: Any, given: dict[str, Any]) -> Any:
        from attnbias.fuse import fuse as fuse_model
        from attnbias.fuse import learn

        found = learn(model, [given], rank=16, route=route, steps=FIT_STEPS, quiet=True)
        return fuse_model(model, factors=found, quiet=True, measure=False)

    return fuse


FIT_STEPS = 100  # enough to run; how good factors become with more is not timed here
LOW_RANK = {
    "fused, rank 16 by singular vectors": _low_rank("svd"),
    f"fused, rank 16 by networks after {FIT_STEPS} steps": _low_rank("networks"),
}
SDPA = Variant("sdpa", _implementation("sdpa"), _dense(2.1))  # the bias, and it contiguous
EAGER = Variant("eager", _implementation("eager"), _dense(5))
OWN = Variant("its own", _nothing, _dense(5))
OWN_WINDOWS = Variant("its own", _nothing)
IMAGES = tuple(Variant(name, _implementation(name)) for name in ("sdpa", "eager"))
CHUNKS = (
    *(Variant(f"chunks of {rows}", _chunks(rows)) for rows in (4, 16, 64)),
    Variant("no chunks", _chunks(None), lambda size: 4.0 * 3 * 4 * size**3),
)

T5_WORDS = "8 heads of 64, width 512"
DECODER_WORDS = "4 layers, 8 heads of 64, width 512"
SUBJECTS: dict[str, Subject] = {
    one.name: one
    for one in (
        Subject("T5", f"encoder, 6 layers, {T5_WORDS}", "tokens", t5, ids, (SDPA, EAGER)),
        Subject(
            "T5, padded", f"the same, a batch of {PADDED_BATCH}: full, 3/4, 1/2, 1/4", "tokens",
            t5, padded_ids, (SDPA, EAGER),
        ),
        Subject(
            "T5, training", f"encoder, 4 layers, {T5_WORDS}, dropout 0", "tokens", t5_training, ids,
            (SDPA, EAGER),
        ),
        Subject(
            "T5, decoding", f"4 + 4 layers, {T5_WORDS}", "tokens", t5_decoder, ids, (SDPA, EAGER)
        ),
        Subject("MPT", DECODER_WORDS, "tokens", mpt, ids, (OWN,)),
        Subject("Bloom", DECODER_WORDS, "tokens", bloom, ids, (OWN,)),
        # Not eager: there the stock code adds ALiBi twice, so it computes something else.
        Subject("Falcon", f"{DECODER_WORDS}, ALiBi", "tokens", falcon, ids, (SDPA,)),
        Subject(
            "gpt-oss", "4 layers, 8 heads of 64, 2 key heads, windows of 128 in every other layer",
            "tokens", gpt_oss, ids, (OWN,),
        ),
        Subject("Swin", "tiny, windows of 7", "pixels", swin, images, IMAGES),
        Subject("Swin v2", "tiny, windows of 8", "pixels", swin_v2, images, (OWN_WINDOWS,)),
        Subject("BEiT", "base, 4 layers, patches of 16", "pixels", beit, images, IMAGES),
        Subject(
            "LayoutLMv3", "base, 4 layers, words and 197 patches", "tokens", layout, page, (OWN,)
        ),
        Subject(
            "LongT5", f"encoder, 4 layers, {T5_WORDS}, transient-global", "tokens", long_t5, ids,
            (OWN_WINDOWS,),
        ),
        Subject(
            "ESMFold", "one block of the trunk: 32 heads over residues, 4 over pairs, of 32",
            "residues", esm_fold, pairs(1024), CHUNKS, LOW_RANK,
        ),
        Subject(
            "Pairformer", "one block of AlphaFold 3's: 16 heads over residues, 4 over pairs of 32",
            "residues", pairformer, pairs(384), CHUNKS, LOW_RANK,
        ),
    )
}  # fmt: skip


# Calls -------------------------------------------------------------------------------------------


def output(found: Any) -> Tensor:
    """What is compared of a model's output."""
    for name in ("logits", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            out: Tensor = getattr(found, name)
            return out
    return torch.cat([one.flatten() for one in found])


def call(model: Any, subject: Subject, kind: str, size: int) -> Callable[[], Tensor]:
    """What is timed, of a model in any state: a forward, a training step or a few tokens."""
    generator = torch.Generator().manual_seed(size)
    given = subject.inputs(size, generator)
    if kind == "training":
        return lambda: step(model, given)
    if kind == "token":
        return Decoding(model, given)

    def forward() -> Tensor:
        with evaluating(model), torch.no_grad():
            return output(model(**given))

    return forward


def step(model: Any, given: dict[str, Any]) -> Tensor:
    """Forward and backward; the gradient of the tables, or of everything without one."""
    model.train()
    model.zero_grad(set_to_none=True)
    out = output(model(**given))
    (out.square().mean() + out.mean()).backward()
    named = [(name, one, one.grad) for name, one in model.named_parameters()]
    tables = [
        torch.zeros_like(one) if grad is None else grad
        for name, one, grad in named
        if re.search(TABLES, name)
    ]
    *_, last = (grad for _, _, grad in named if grad is not None)
    return torch.cat([one.flatten() for one in (*tables, last)])


class Decoding:
    """`STEPS` tokens after a prompt; the cache is filled before and grows with every call."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.model, self.given = model, dict(given)
        tokens = self.given.pop("input_ids")
        if model.config.is_encoder_decoder:
            with torch.no_grad():
                self.given["encoder_outputs"] = model.get_encoder()(input_ids=tokens)
            self.name = "decoder_input_ids"
        else:
            self.name = "input_ids"
        self.prompt = tokens
        self.restart()

    def restart(self) -> None:
        """An empty cache, and the prompt read into it."""
        self.cache = None
        self._forward(self.prompt)

    def _forward(self, tokens: Tensor) -> Tensor:
        with evaluating(self.model), torch.no_grad():
            out = self.model(
                **{self.name: tokens}, **self.given, past_key_values=self.cache, use_cache=True
            )
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    def __call__(self) -> Tensor:
        return torch.stack([self._forward(self.prompt[:, :1] + number) for number in range(STEPS)])
