"""Models in plain PyTorch whose stock code `fuse` replaces, where no library holds them."""

from __future__ import annotations

from attnbias.fuse.plain.pairformer import Pairformer, PairformerBlock

__all__ = ["Pairformer", "PairformerBlock"]
