"""The rules, one class per work."""

from __future__ import annotations

from attnbias.steer.rules.key_shift import KeyShift
from attnbias.steer.rules.split_softmax import SplitSoftmax
from attnbias.steer.rules.zero_tuning import Example, Fitted, ZeroTuning

__all__ = ["Example", "Fitted", "KeyShift", "SplitSoftmax", "ZeroTuning"]
