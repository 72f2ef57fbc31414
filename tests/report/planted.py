"""Tiny decoders whose attention is known: one head looks at the previous token, or none at all."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

TEXT = (
    "one day a small dog ran over the green hill and saw a red boat on the calm sea then it sat "
    "down to rest"
)
HEADS, WIDTH = 4, 32


def tokenizer() -> Any:
    """One token for each word of TEXT."""
    words = sorted(set(TEXT.split()))
    found = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["?", *words])}, "?"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="?")


def model(planted: tuple[int, int] | None) -> Any:
    """Two layers of even heads; `planted` (layer, head) looks at the token before it.

    Position i is the i-th unit vector (through a layer norm), words are nothing and heads write
    nothing, so both layers see the same; the planted head's query of position i is a multiple of
    its key of position i - 1.
    """
    torch.manual_seed(3)
    size = HEADS * WIDTH
    config = GPT2Config(
        vocab_size=len(set(TEXT.split())) + 1, n_positions=WIDTH, n_embd=size, n_layer=2,
        n_head=HEADS,
    )  # fmt: skip
    made = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        made.transformer.wte.weight.zero_()
        made.transformer.wpe.weight.copy_(torch.eye(WIDTH, size))
        for number, block in enumerate(made.transformer.h):
            for part in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj):
                part.weight.zero_()
                part.bias.zero_()
            if planted is not None and planted[0] == number:
                head = planted[1] * WIDTH
                weight = block.attn.c_attn.weight  # (in, query | key | value)
                for i in range(1, WIDTH):
                    weight[i, head + i - 1] = 1.0
                    weight[i - 1, size + head + i - 1] = 1.0
    return made
