"""A small tokenizer for tests: pieces of three letters, with offsets, padding on either side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch


class Pieces:
    """Words cut into pieces of three letters; a piece's id follows from its letters."""

    def __init__(self, low: int, size: int, first: int, last: int | None, side: str = "right"):
        self.low, self.size, self.first, self.last, self.padding_side = low, size, first, last, side
        self.pad_token_id = 0

    def _one(self, text: str, special: bool, limit: int | None) -> tuple[list[int], list[Any]]:
        ids, places = [], []
        for word in re.finditer(r"[A-Za-z']+|[^\sA-Za-z']", text):
            for start in range(word.start(), word.end(), 3):
                stop = min(start + 3, word.end())
                code = sum((n + 7) * ord(c) for n, c in enumerate(text[start:stop]))
                ids.append(self.low + code % self.size)
                places.append((start, stop))
        if special:
            ids, places = [self.first, *ids], [(0, 0), *places]
            if self.last is not None:
                cut = None if limit is None else limit - 1
                ids, places = [*ids[:cut], self.last], [*places[:cut], (0, 0)]
        return ids[:limit], places[:limit]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool = False,
        return_tensors: str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
    ) -> dict[str, Any]:
        limit = max_length if truncation else None
        many = [text] if isinstance(text, str) else list(text)
        found = [self._one(one, add_special_tokens, limit) for one in many]
        longest = max(len(ids) for ids, _ in found) if padding else 0
        out: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "offset_mapping": []}
        for ids, places in found:
            more = max(longest - len(ids), 0)
            left, right = (more, 0) if self.padding_side == "left" else (0, more)
            out["input_ids"].append([0] * left + ids + [0] * right)
            out["attention_mask"].append([0] * left + [1] * len(ids) + [0] * right)
            out["offset_mapping"].append([(0, 0)] * left + places + [(0, 0)] * right)
        if not return_offsets_mapping:
            del out["offset_mapping"]
        if return_tensors == "pt":
            return {name: torch.tensor(value) for name, value in out.items()}
        if isinstance(text, str):
            return {name: value[0] for name, value in out.items()}
        return out


def pieces(name: str, side: str = "right") -> Pieces:
    """The tokenizer for a subject of tests/steer/models.py."""
    if name == "minilm":
        return Pieces(1000, 90, 101, 102, side)
    return Pieces(3, 90, 1, None, side)
