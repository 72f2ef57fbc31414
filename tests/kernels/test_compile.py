"""Kernels are compiled for cards that are not there; what they issue is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

from attnbias.kernels import configs, offline

CODE = """
        /*0000*/                   MUFU.EX2 R1, R2 ;           /* 0x0 */
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R4, gdesc[UR8] ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64 P0, [R3], R5 ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/                   FADD R1, R2, R3 ;
        /*0050*/                   LDS.128 R8, [R9] ;
        /*0060*/                   IADD3 R1, R2, R3, RZ ;
        /*0070*/              @!P1 BRA 0x0 ;
        /*0080*/                   BRA 0x80 ;
"""


def test_what_an_inner_loop_issues_is_counted() -> None:
    (counts,) = offline.loops(CODE)
    assert counts == {
        "products": 1, "exponentials": 1, "memory": 1, "order": 3, "floats": 1, "integers": 1
    }  # fmt: skip
    one = offline.Compiled("forward", "sm_90", 255, 0, 0, 4, 1.0, (64, 16))
    # 64 x 16 scores of 128 threads: eight for each.
    assert offline.per_score(one, counts)["order"] == 3 / 8
    assert offline.loops(CODE.replace("HGMMA", "FFMA")) == []
    assert offline.kept_in_memory(CODE) == 0
    assert offline.kept_in_memory(CODE.replace("IADD3", "LDL  ")) == 1
    assert offline.kept_in_memory(CODE.replace("0x0 ;", "0x10 ;").replace("MUFU", "STL ")) == 0


def test_a_kernel_fits_with_its_registers_on_chip_and_its_shared_memory_there() -> None:
    made = offline.Compiled("forward", "sm_80", 255, 0, 163 * 1024, 4, 1.0, None)
    assert made.fits
    assert not offline.Compiled("forward", "gfx942", 255, 0, 163 * 1024, 4, 1.0, None).fits
    assert not offline.Compiled("forward", "sm_80", 255, 8, 0, 4, 1.0, None).fits


@pytest.mark.parametrize(
    ("size", "held"),
    [(1, (16, 0)), (16, (16, 0)), (20, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)),
     (96, (64, 32)), (100, (128, 0)), (160, (128, 32)), (192, (128, 64)), (256, (256, 0))],
)  # fmt: skip
def test_head_sizes_in_two_parts(size: int, held: tuple[int, int]) -> None:
    assert configs.halves(size) == held
    assert sum(held) >= size


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels: they are compiled for the card there is"
)
def test_interpreted_kernels_are_not_compiled() -> None:
    with (
        pytest.raises(RuntimeError, match="TRITON_INTERPRET"),
        offline.compiling(offline.CARDS["sm_90"]),
    ):
        pass


SCRIPT = """
import json, sys
from benchmarks import kernels
wanted = json.loads(sys.argv[2])
found = [
    {**row, "case": case.name}
    for case in kernels.cases()
    if case.name in wanted
    for row in kernels.compiled(case, kernels.offline.CARDS[sys.argv[1]])
]
print("\\n" + json.dumps(found))
"""


def made(card: str, *names: str) -> list[dict[str, Any]]:
    """The kernels of some cases, compiled in a process of their own: here they are interpreted."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, card, json.dumps(names)],
        cwd=root, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert {row["case"] for row in found} == set(names)
    return found


def assert_fits(rows: list[dict[str, Any]]) -> None:
    bad = [row for row in rows if "error" in row or not row["fits"]]
    assert not bad, bad


@pytest.mark.slow
def test_decoding_fits() -> None:
    rows = made("sm_90", "none, bfloat16, d 64, 1 queries, 1 key heads")
    assert {row["kernel"] for row in rows} == {"decode", "join"}
    assert_fits(rows)


CASES = (
    "none, bfloat16, d 64",
    "key and relative, bfloat16, d 64",
    "key and relative, bfloat16, d 128",
    "key and relative, bfloat16, d 256",
    "key and relative, float32, d 64",
)


@pytest.mark.slow
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_fit(card: str, name: str) -> None:
    rows = made(card, name)
    assert_fits(rows)
    assert {"forward", "keys_pass", "queries_pass"} <= {row["kernel"] for row in rows}


@pytest.mark.slow
def test_what_a_bias_adds() -> None:
    """Keys and diagonals together take less than three quarters of a softmax alone."""
    rows = made("sm_90", *CASES[:2])
    plain, biased = (
        sum(row["loops"][0].values())
        for name in CASES[:2]
        for row in rows
        if row["case"] == name and row["kernel"] == "forward"
    )
    assert 0 < biased - plain < 0.75 * plain
