"""Tiles for kernels that measure distances: entries of these take registers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from attnbias import kernels
from attnbias.kernels.configs import Config
from attnbias.kernels.kinds import Kind

LIGHT, HEAVY, MANY = 32, 16, 8  # scores of a thread


def fitting(config: Config, kinds: tuple[Any, ...], sums: int = 0, owner: str = "rows") -> Config:
    """The configuration with a tile small enough for the distances among the terms.

    sums: how many a program takes on the way; owner: the side of the tile that stays as it is, of
    which there must be 16 for each warp, or "both" where rows must be at most twice the columns.
    """
    load = sum(_load(kind) for kind in kinds if isinstance(kind, Kind) and kind[0] == "points")
    if not load or kernels.interpreted():
        return config
    most = MANY if sums > 12 else HEAVY if load > 8 or sums else LIGHT
    amd = torch.version.hip is not None
    lanes = 64 if amd else 32
    rows, cols, warps = config.rows, config.cols, config.warps
    owned, other = (cols, rows) if owner == "cols" else (rows, cols)
    if amd and warps == 8:
        owned, warps = owned // 2, 4  # of eight, each has half the registers
    if owned * other > most * lanes * warps and owned >= 32 * warps and warps < 8 and not amd:
        warps *= 2  # where each then has registers of its own
    while owned * other > most * lanes * warps and other > 16:
        other //= 2
    rows, cols = (other, owned) if owner == "cols" else (owned, other)
    if owner == "both" and rows > 2 * cols:
        rows = 2 * cols
        warps = max(1, min(warps, rows // 16))
    return dataclasses.replace(config, rows=rows, cols=cols, warps=warps)


def row_sums(kinds: tuple[Any, ...], wanted: tuple[int, ...] | None) -> int:
    """How many sums `points_gradients.start_rows` starts."""
    total = 0
    for kind, number in zip(kinds, wanted or (), strict=bool(wanted)):
        if number % 4:
            per = {"linear": 1, "bell": 3}.get(kind[5], 2)
            total += number % 2 * per * kind[6] + number // 2 % 2 * kind[2]
    return total


def col_sums(kinds: tuple[Any, ...], wanted: tuple[int, ...] | None) -> int:
    """How many sums `points_gradients.start_cols` starts."""
    pairs = zip(kinds, wanted or (), strict=bool(wanted))
    return sum(kind[2] for kind, number in pairs if number >= 4)


def _load(kind: Kind) -> int:
    """What is kept of each key and of each entry, roughly in registers."""
    _, metric, axes, split, _, form, *_ = kind.parts
    places = axes * (2 if split else 1) * (2 if metric == "sphere" else 1)
    return int(places) + {"linear": 1, "table": 8, "chip": 8}.get(form, 2)


__all__ = ["col_sums", "fitting", "row_sums"]
