"""The mask and the positions of a layer that sees only some of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbias.bias import Bias, Window
from attnbias.errors import Refused
from attnbias.hub.request import MaskRequest


class SubsetRequest(MaskRequest):
    """A mask request for some queries and some keys of a whole one.

    A causal mask on tokens in order is causal again, so it stays what it is and costs nothing.
    Any other rule is asked about the slots that the tokens had.

    Args:
        whole: what the model asked for. past: tokens before this forward.
        rows, columns: slots of the queries and keys ``(batch, count)``, ascending in each row.
        keys: how many keys the layer attends to: more than columns where a static cache has slots
            that are not written yet.
    """

    def __init__(
        self, whole: MaskRequest, past: int, rows: Tensor, columns: Tensor, keys: int
    ) -> None:
        total = past + whole.queries
        given = dict(whole.arguments)
        sizes: dict[str, Any] = {"kv_length": total, "kv_offset": 0}
        if "cache_position" in given:
            sizes["cache_position"] = torch.arange(past, total, device=whole.device)
        else:
            sizes |= {"q_length": whole.queries, "q_offset": past}
        self._whole = MaskRequest(whole._stock_of, {**given, **sizes}, whole.original)
        self._rows, self._columns = rows.to(whole.device), columns.to(whole.device)
        count, start = rows.shape[1], columns.shape[1] - rows.shape[1]
        sizes = {"kv_length": keys, "kv_offset": 0, "batch_size": rows.shape[0]}
        if "cache_position" in given:
            sizes["cache_position"] = torch.arange(start, start + count, device=whole.device)
        else:
            sizes |= {"q_length": count, "q_offset": start}
        real = self._whole._real(total)
        if real is not None:
            sizes["attention_mask"] = real.expand(rows.shape[0], -1).gather(1, self._columns)
        terms = self._whole._parsed()
        if terms is None or not all(map(_causal, terms)):
            sizes["mask_function"] = self._visible
            for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip"):
                sizes[name] = False
        super().__init__(whole._stock_of, {**given, **sizes}, whole.original)

    def _visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first, written = self.query_start, self._columns.shape[1]
        rows = self._rows[batch, (query - first).clamp(0, self._rows.shape[1] - 1)]
        columns = self._columns[batch, key.clamp(max=written - 1)]
        seen: Tensor = self._whole.rule(batch, head, rows, columns)
        return seen & (key < written)

    def query_positions(self) -> Tensor:
        return self._slots("query", self._rows)

    def key_positions(self) -> Tensor:
        found = self._slots("key", self._columns)
        return torch.nn.functional.pad(found, (0, self.keys - found.shape[1]), value=-1)

    def _slots(self, name: str, slots: Tensor) -> Tensor:
        if name not in self._cache:
            total = self._whole.query_start + self._whole.queries
            known = self._whole._positions("slots", 0, total)
            self._cache[name] = known.expand(slots.shape[0], -1).gather(1, slots)
        found: Tensor = self._cache[name]
        return found


def _causal(term: Bias) -> bool:
    return isinstance(term, Window) and term.before is None and term.after == 0


def subset_mask(mask: Any, past: int, rows: Tensor, columns: Tensor, keys: int, what: str) -> Any:
    """A layer's `attention_mask` for some of its tokens: a request, a 4-D tensor or None.

    Raises:
        Refused: a mask of another kind.
    """
    if mask is None:
        return None
    if isinstance(mask, MaskRequest):
        return SubsetRequest(mask, past, rows, columns, keys)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or keys != columns.shape[1]:
        got = f"{mask.ndim}-D tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise Refused(f"{what} is given a mask ({got}) that cannot be cut to some of its tokens.")
    if mask.shape[2] > 1:
        mask = take(mask, rows - past, 2)
    return take(mask, columns, 3) if mask.shape[3] > 1 else mask


def take(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """``tensor[b, ..., index[b], ...]`` along `dim`; its dimension 0 is the batch, or 1."""
    batch, count = index.shape
    shape = [batch, *tensor.shape[1:]]
    shape[dim] = count
    view = [1] * tensor.ndim
    view[0], view[dim] = batch, count
    whole = tensor.expand(batch, *tensor.shape[1:])
    return whole.gather(dim, index.to(tensor.device).view(view).expand(shape))


# How a layer's arguments hold their tokens: the dimension, counted from the end.
_TOKENS = {
    "position_embeddings": -2,
    "position_embeddings_global": -2,
    "position_embeddings_local": -2,
    "rotary_pos_emb": -2,
    "position_ids": -1,
    "per_layer_input": -2,
}


def subset_argument(name: str, value: Any, index: Tensor, length: int, what: str) -> Any:
    """One argument of a layer, for the tokens ``index (batch, kept)`` of `length`.

    Raises:
        Refused: an argument with one entry per token whose layout is not known.
    """
    if isinstance(value, (tuple, list)) and name in _TOKENS:
        return type(value)(subset_argument(name, one, index, length, what) for one in value)
    if name in _TOKENS and isinstance(value, Tensor):
        dim = _TOKENS[name] % value.ndim
        if value.shape[dim] != length:
            raise Refused(f"{what}: {name} has {value.shape[dim]} entries for {length} tokens.")
        if dim == 0:  # the same for all rows
            return take(value[None], index, 1)
        if dim == 1:
            return take(value, index, 1)
        # Position axes (time, height, width) stand before the batch.
        if dim == 2 and value.shape[1] in (1, index.shape[0]):
            return torch.stack([take(axis, index, 1) for axis in value])
    parts = value if isinstance(value, (tuple, list)) else (value,)
    if any(isinstance(one, Tensor) and length in one.shape and one.ndim for one in parts):
        raise Refused(
            f"{what} is given {name!r}, which may hold one entry per token: tokens cannot be "
            "dropped there."
        )
    return value
