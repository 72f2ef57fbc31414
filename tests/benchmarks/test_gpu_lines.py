"""The lines of the GPU suite: what others compute is the same problem, and failures have words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnbias import kernels
from benchmarks.gpu import group, lines, truth
from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.kinds import T5
from benchmarks.gpu.lines import LINES, NotAvailable, TooLarge, failure, fatal
from benchmarks.gpu.measure import measure
from tests.benchmarks.test_gpu import CASES

CPU = Device("cpu")


def test_rivals_compute_the_same_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are switched off: ours says so, the planner's choice and the rivals agree."""
    small = Case("f", T5, "cpu", 1, 2, 40, 16, dtype="float32", causal=True)
    heard: list[str] = []
    with kernels.disabled():
        found = measure(small, CPU, budget=0.0, ceilings={}, say=heard.append, skip=("cuDNN",))
    cells = found["lines"]
    assert heard == [line.name for line in LINES if line.name != "cuDNN"]
    assert cells["cuDNN"]["reason"] == "the process died, or hung, in this line"
    assert cells["ours"]["status"] == "refused"
    assert "switched off" in cells["ours"]["reason"]
    for name in ("flash", "ours, planned", "SDPA, dense bias", "FlexAttention"):
        assert cells[name]["status"] == "ok", cells[name]
        assert max(cells[name]["error"].values()) < 1e-4, name
        assert all(cells[name]["repeats"].values())
        assert cells[name]["ratio"]["forward"] > 0
    assert {"forward", "backward", "both"} == set(cells["ours, planned"]["ratio"])
    assert found["bias_left_out"] > 0.05
    assert "switched off" in group.reason(found)


class NotRehearsed(Device):
    """A CPU that is taken for a card."""

    rehearsal = False


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[8], CASES[9], CASES[12]], ids=["window", "T5", "PENGUIN"])
def test_score_functions_compile_in_one_graph(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for other tensors of the same problem: nothing is compiled twice while it is timed."""
    real, graphs = torch.compile, list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **more: real(f, backend=backend, **more))
    given, inputs = case.kind.draw(case), case.inputs()
    forward, _ = lines._flex(case, NotRehearsed("cpu"), given)
    with torch.no_grad():
        forward(*inputs[:3], given)
        out = forward(*inputs[:3], {name: tensor.clone() for name, tensor in given.items()})
    assert len(graphs) == 1
    want = truth.answer(case, inputs, given)
    assert truth.gap(truth.at_rows(case, out), want.output) < 1e-5


def test_what_cannot_be_measured_says_why() -> None:
    assert failure(NotAvailable("no such backend"))["status"] == "not available"
    assert failure(TooLarge("40 GB"))["status"] == "does not fit"
    assert failure(torch.OutOfMemoryError("out of memory"))["status"] == "does not fit"
    assert failure(ValueError("odd"))["reason"] == "ValueError: odd"
    assert fatal(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert fatal(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    assert not fatal(RuntimeError("CUDA error: out of memory"))
    assert not fatal(RuntimeError("out of resource: shared memory"))
    assert not fatal(ValueError("odd"))
