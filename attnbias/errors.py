"""The one family of exceptions that attnbias raises on purpose."""

from __future__ import annotations


class AttnbiasError(ValueError):
    """Bad input: the message says which argument, what came and what was expected."""


class Refused(AttnbiasError):
    """A model, mask, option or lowering that attnbias cannot handle exactly, so it does not try."""
