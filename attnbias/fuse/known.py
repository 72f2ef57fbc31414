"""Classes of transformers that carry an attention bias and are refused, each with its reason."""

from __future__ import annotations

REFUSED: dict[str, str] = {}
