"""Where no kernels were measured nothing is replaced, unless the fused route is asked for."""

from __future__ import annotations

import pytest
import torch

import attnbias as ab
from attnbias.fuse import modes
from attnbias.lowering import costs
from benchmarks.fuse_models import SUBJECTS, made


def test_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SUBJECTS["T5, training"]
    model = made(subject, 80)
    given = subject.inputs(80, torch.Generator().manual_seed(0))
    monkeypatch.setattr("attnbias.fuse.fused.runs_on", lambda root: torch.device("cuda"))
    with torch.no_grad():
        want = model(**given).last_hidden_state
        alone = ab.fuse(model, quiet=True)
        assert not alone.sites
        assert "no kernels were measured on cuda" in str(alone)
        # The own prices take a lowering whose bits are not those of the stock code.
        with (
            costs.unmeasured(),
            modes.taking("fused"),
            ab.fuse(model, quiet=True) as fused,
            modes.recording() as seen,
        ):
            found = model(**given).last_hidden_state
    assert fused.device == "cuda"
    assert fused.sites
    # Each module's attention came through us, with the bias as a structure.
    assert len(seen) == model.config.num_layers
    assert all("Relative" in bias for bias, _ in seen)
    assert 0 < (found - want).abs().max() < 1e-4
