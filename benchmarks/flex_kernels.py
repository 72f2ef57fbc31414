"""FlexAttention's forward kernels for a Hopper GPU that is not there: generated and compiled.

python -m benchmarks.flex_kernels [--case NAME ...] [--again] [--minutes M]

The lowering `flex` makes score and mask functions; here PyTorch's compiler turns them into Triton
kernels for an H200 and Triton compiles these for sm_90. Nothing is run. PyTorch believes in a GPU
for as long: tensors are fakes, the device's properties are written below, and calls that only
switch to a device do nothing (a line of C++, so g++ is needed, and a build of PyTorch for CPUs).
Recorded are registers, bytes of registers kept in memory, shared memory, and the instructions that
a thread issues for a score in the shortest loop over blocks of keys. The backward cannot be
generated so: PyTorch's engine of gradients asks the device itself. Written after every case to
benchmarks/results/flex_kernels.json and .md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnbias.bias import Bias
from attnbias.kernels import offline
from attnbias.lowering import flex, flex_blocks, flex_parts
from benchmarks.common import (
    RESULTS,
    header,
    header_markdown,
    markdown_table,
    now,
    versions,
    write_json,
    write_text,
)
from benchmarks.kernels import BIASES, HEADS, N

CARD = offline.CARDS["sm_90"]
CASES = ("none", "causal", "key", "relative", "low rank 4", "dense, float32", "grid", "classes")
CASES += ("packed segments", "padding", "neighborhood", "squared distance", "RBF, five terms")
H200 = SimpleNamespace(
    name="NVIDIA H200",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=140 << 30,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    warp_size=32,
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=CARD.shared,
    shared_memory_per_multiprocessor=CARD.shared + 1024,
    gcnArchName="",
)
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
WORDS = (
    "Forward, bfloat16, heads of 64 features, 1,024 tokens, one block of 128 x 128 or as PyTorch "
    "chose. Issued: instructions of a thread for a score in the shortest loop, by kind. Compiled, "
    "not run: this says that kernels are generated and fit, not how fast they are."
)


class Made(Exception):
    """The code is there; there is nothing to run it on."""


def pretend() -> list[str]:
    """PyTorch takes an H200 for granted; returned is the list that generated code is put on."""
    from torch._dynamo import device_interface
    from torch._inductor import compile_fx, config, graph
    from torch.utils.cpp_extension import include_paths
    from triton.runtime.driver import driver

    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        includes = [f"-I{path}" for path in include_paths()]
        where = str(Path(torch.__file__).parent / "lib")
        command = ["g++", "-std=c++20", "-shared", "-fPIC", *includes, str(source)]
        subprocess.run([*command, f"-L{where}", "-lc10", "-o", str(library)], check=True)
        ctypes.CDLL(str(library))
    torch.cuda._lazy_init = lambda: None
    torch.cuda._get_device_properties = lambda *given: H200  # type: ignore[attr-defined]
    torch.cuda.get_device_capability = lambda *given: (9, 0)
    torch.cuda.is_bf16_supported = lambda *given, **more: True
    torch.cuda.current_device, torch.cuda.device_count = (lambda: 0), (lambda: 1)
    cuda: Any = device_interface.CudaInterface
    cuda.Worker.get_device_properties = staticmethod(lambda *given: H200)
    cuda.is_available = staticmethod(lambda: True)
    cuda.is_bf16_supported = staticmethod(lambda *given, **more: True)
    cuda.get_compute_capability = staticmethod(lambda *given: "90")
    config.compile_threads, config.joint_graph_constant_folding = 1, False
    stands_for: Any = offline._Driver(CARD)
    stands_for.get_active_torch_device = lambda: torch.device("cuda", 0)
    driver.set_active(stands_for)
    codes: list[str] = []

    def keep(self: Any) -> Any:
        code = self.codegen()[0]
        codes.append(getattr(code, "value", code))
        raise Made

    def inner(*given: Any, **options: Any) -> Any:
        try:
            generate(*given, **options)
        except Exception as error:
            if "Made" not in str(error):
                raise

        def nothing_to_run(*tensors: Tensor) -> None:
            raise Made

        nothing_to_run._boxed_call = True  # type: ignore[attr-defined]
        return nothing_to_run

    generate, whole = compile_fx.compile_fx_inner, compile_fx.compile_fx
    graph.GraphLowering.compile_to_module = keep  # type: ignore[method-assign]
    compile_fx.compile_fx = lambda *given, **options: whole(
        *given, **{**options, "inner_compile": inner}
    )
    return codes


def trace(bias: Bias | None) -> None:
    """Calls the function of a bias on tensors that claim to be on a GPU."""
    here = torch.device("cpu")
    terms = [] if bias is None else bias.detach().terms()
    hide = [t for t in terms if flex_parts.masks(t)]
    scores = [flex_parts.part(t, here) for t in terms if not flex_parts.masks(t)]
    masks = [flex_parts.part(t, here) for t in hide]
    lists = flex._lists(flex_blocks.blocks(hide, N, N, here)) if hide else ()
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(tensor: Tensor) -> Tensor:
            shape, step = tensor.shape, tensor.stride()
            return torch.empty_strided(shape, step, dtype=tensor.dtype, device="cuda")

        query, key, value = (
            torch.empty(2, HEADS, N, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        tensors = [tuple(fake(t) for t in part.tensors) for part in (*scores, *masks)]
        kinds = (tuple(p.kind for p in scores), tuple(p.kind for p in masks))
        looks = flex._looks(query, key, value, *(t for own in tensors for t in own))
        run = flex.compiled(flex.Structure(*kinds, 0.125, "cuda", looks))
        try:
            run(
                query,
                key,
                value,
                tensors,
                tuple(p.function for p in masks),
                tuple(map(fake, lists)),
            )
        except Made:
            return
    raise AssertionError("nothing should have run")


def build(code: str) -> offline.Compiled:
    """The attention kernel of generated code, compiled."""
    import triton
    from torch._inductor.runtime import triton_heuristics
    from triton.compiler import ASTSource

    blocks = re.findall(r"async_compile\.triton\('(\w+)', '{3}(.*?)'{3}", code, re.DOTALL)
    name, text = next(b for b in blocks if "flex_attention" in b[0])
    text = text.replace("triton_helpers.set_driver_to_gpu()", "")
    keep = triton_heuristics.template
    triton_heuristics.template = lambda **options: lambda function: (function, options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")  # Triton reads the source of a function from its file
        path.write_text(text)
        space: dict[str, Any] = {"__name__": name, "__file__": str(path)}
        try:
            exec(compile(text, str(path), "exec"), space)
        finally:
            triton_heuristics.template = keep
        function, options = space[name]
        meta = options["triton_meta"]
        constants = dict(meta.get("constants", {}))
        signature = {**meta["signature"], **dict.fromkeys(constants, "constexpr")}
        (aligned,) = meta["configs"]
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
        how = {"num_warps": options["num_warps"], "num_stages": options["num_stages"]}
        begun = time.perf_counter()
        made = triton.compile(source, target=offline._Driver(CARD).target, options=how)
    sizes = [re.search(rf"{side} : tl.constexpr = (\d+)", text) for side in ("BLOCK_M", "BLOCK_N")]
    tile = tuple(int(found[1]) for found in sizes if found)
    assert len(tile) == 2
    return offline._read("forward", CARD, made, time.perf_counter() - begun, tile)


def line(name: str, built: offline.Compiled) -> dict[str, Any]:
    loops = offline.loops(offline.code_of(built))
    issued = offline.per_score(built, loops[0]) if loops else {}
    found = {k: v for k, v in asdict(built).items() if k != "binary"}
    return {"case": name, **found, "issued": {k: round(v, 3) for k, v in issued.items()}}


def before() -> dict[str, dict[str, Any]]:
    """What is recorded, of these versions."""
    path = RESULTS / "flex_kernels.json"
    if not path.exists():
        return {}
    kept = json.loads(path.read_text())
    if kept["versions"] != versions():
        return {}
    return {one["case"]: one for one in kept["kernels"]}


def write(found: dict[str, dict[str, Any]], head: dict[str, Any]) -> None:
    found = {name: found[name] for name in CASES if name in found}
    write_json(RESULTS / "flex_kernels.json", {**head, "kernels": list(found.values())})
    columns = [
        "bias",
        "tile",
        "warps",
        "registers",
        "spilled, B",
        "shared, kB",
        "issued for a score",
    ]
    rows = [
        [
            one["case"],
            "x".join(map(str, one["tile"])),
            str(one["warps"]),
            str(one["registers"]),
            str(one["spilled"]),
            f"{one['shared'] / 1024:.0f}",
            f"{sum(one['issued'].values()):.2f}" if one["issued"] else "",
        ]
        for one in found.values()
    ]
    text = ["# FlexAttention's kernels, compiled for sm_90", header_markdown(head), WORDS]
    write_text(
        RESULTS / "flex_kernels.md", "\n\n".join([*text, markdown_table(columns, rows)]) + "\n"
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flex_kernels")
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--again", action="store_true", help="also what is recorded")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="begin nothing after a minute")
    options = parser.parse_args(arguments)
    if options.quick:
        options.minutes = min(options.minutes, 1.0)
    started, begun = now(), time.perf_counter()
    codes = pretend()
    found = before()
    for name in [one for one in options.case if options.again or one not in found]:
        if time.perf_counter() - begun > 60 * options.minutes:
            print(f"out of time before {name}", file=sys.stderr)
            return 1
        torch.manual_seed(0)
        codes.clear()
        trace(BIASES[name]())
        found[name] = line(name, build(codes[0]))
        print(name, found[name]["registers"], found[name]["issued"], flush=True)
        write(
            found,
            header(
                "benchmarks.flex_kernels",
                arguments,
                seeds={"draws": 0},
                started=started,
                seconds=time.perf_counter() - begun,
            ),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
