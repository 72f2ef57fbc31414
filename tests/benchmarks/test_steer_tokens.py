"""Tokens by turns: pairs are measured, the plain cache stays as it was, goals are judged."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import common, steer_tokens
from benchmarks.steer import runners


def test_lines_take_turns_with_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    real = steer_tokens.token

    def watched(llama: Any, cache: Any, ids: Any) -> tuple[float, Any]:
        lengths.append(cache.get_seq_length())
        return real(llama, cache, ids)

    monkeypatch.setattr(steer_tokens, "token", watched)
    monkeypatch.setattr(steer_tokens, "PAIRS", 8)
    monkeypatch.setattr(steer_tokens, "WARM", 2)
    monkeypatch.setattr(steer_tokens, "runners", lambda llama, n: runners(llama, n)[:3])
    found = steer_tokens.measure(64)
    # Both caches grow alike, and every line begins at the prompt.
    assert lengths == [64 + turn // 2 for _ in found for turn in range(16)]
    assert len(found) == 3
    for cell in found.values():
        assert 0 < cell["low"] <= cell["ratio"] <= cell["high"]


def test_a_token_above_its_goal_is_said() -> None:
    cell = {"ratio": 1.2, "low": 1.1, "high": 1.3, "plain ms": 10.0}
    head = common.header(
        "benchmarks.steer_tokens", [], seeds={}, started=common.now(), seconds=1.0, threads=1
    )
    payload = {**head, "lengths": {"64": {"KeyShift": cell, "a contiguous group": cell}}}
    text = steer_tokens.markdown(payload)
    assert "| KeyShift | 1.05 | 1.200 | 1.10 to 1.30 | FALLS SHORT |" in text
    assert "| a contiguous group | 1.3 | 1.200 | 1.10 to 1.30 | holds |" in text
