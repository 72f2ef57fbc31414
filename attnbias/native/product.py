"""Small matrix products in registers: what the compiled attention is made of.

A product of `ROWS` rows with some vectors of columns keeps its sums in registers while it walks the
depth; every number of the left matrix is spread over a vector. The instructions are written out for
the vectors of the machine (`LANES` numbers of 32 bits), since PyTorch's own products use half of
their width on some processors.

Import this module only where `attnbias.native.available()`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from attnbias.native.jit import inner


def _lanes() -> int:
    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


LANES = _lanes()  # of one vector
WIDE = 2 if LANES == 8 else 4  # vectors of a product: AVX2 has half the registers
ROWS = 4  # of a product
PANEL = WIDE * LANES  # columns of a product


def _product(vectors: int, accumulate: bool) -> Any:
    """``C (ROWS, vectors x LANES) = A B``, or added to it, as a function that kernels call."""
    number, place = ir.FloatType(), ir.IntType(64)
    vector = ir.VectorType(number, LANES)

    @intrinsic
    def product(
        typing: Any,
        a: Any,
        a0: Any,
        row: Any,
        step: Any,
        b: Any,
        b0: Any,
        b_step: Any,
        c: Any,
        c0: Any,
        c_row: Any,
        depth: Any,
    ) -> Any:
        i = types.intp
        signature = types.void(a, i, i, i, b, i, i, c, i, i, i)

        def code(context: Any, build: Any, signature: Any, given: Any) -> Any:
            def start(at: int) -> Any:
                array = context.make_array(signature.args[at])(context, build, given[at])
                return build.gep(array.data, [given[at + 1]])

            left, right, out = start(0), start(4), start(7)
            row, step, b_step, c_row, depth = (given[at] for at in (2, 3, 6, 9, 10))
            kind = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(build.module, kind, f"llvm.fma.v{LANES}f32")
            pointer, zero = vector.as_pointer(), ir.Constant(vector, None)
            first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
            nothing = ir.Constant(vector, ir.Undefined)

            def load(address: Any) -> Any:
                found = build.load(build.bitcast(address, pointer))
                found.align = 4
                return found

            lines = [out]
            for _ in range(1, ROWS):
                lines.append(build.gep(lines[-1], [c_row]))
            places = [
                [build.gep(line, [ir.Constant(place, v * LANES)]) for v in range(vectors)]
                for line in lines
            ]
            begin = [[load(p) if accumulate else zero for p in line] for line in places]

            before = build.block
            loop = build.append_basic_block("product.loop")
            done = build.append_basic_block("product.done")
            some = build.icmp_signed(">", depth, ir.Constant(place, 0))
            build.cbranch(some, loop, done)

            build.position_at_end(loop)
            count = build.phi(place)
            count.add_incoming(ir.Constant(place, 0), before)
            at_left, at_right = build.phi(left.type), build.phi(right.type)
            at_left.add_incoming(left, before)
            at_right.add_incoming(right, before)
            sums = [[build.phi(vector) for _ in range(vectors)] for _ in range(ROWS)]
            columns = [
                load(build.gep(at_right, [ir.Constant(place, v * LANES)])) for v in range(vectors)
            ]
            made, address = [], at_left
            for r in range(ROWS):
                if r:
                    address = build.gep(address, [row])
                one = build.insert_element(
                    nothing, build.load(address), ir.Constant(ir.IntType(32), 0)
                )
                spread = build.shuffle_vector(one, nothing, first)
                made.append(
                    [build.call(fma, [spread, columns[v], sums[r][v]]) for v in range(vectors)]
                )
            further = build.add(count, ir.Constant(place, 1))
            count.add_incoming(further, loop)
            at_left.add_incoming(build.gep(at_left, [step]), loop)
            at_right.add_incoming(build.gep(at_right, [b_step]), loop)
            for r in range(ROWS):
                for v in range(vectors):
                    sums[r][v].add_incoming(begin[r][v], before)
                    sums[r][v].add_incoming(made[r][v], loop)
            build.cbranch(build.icmp_signed("<", further, depth), loop, done)

            build.position_at_end(done)
            ends = [[build.phi(vector) for _ in range(vectors)] for _ in range(ROWS)]
            for r in range(ROWS):
                for v in range(vectors):
                    ends[r][v].add_incoming(begin[r][v], before)
                    ends[r][v].add_incoming(made[r][v], loop)
            for r in range(ROWS):
                for v in range(vectors):
                    stored = build.store(ends[r][v], build.bitcast(places[r][v], pointer))
                    stored.align = 4
            return context.get_dummy_value()

        return signature, code

    return product


set_panel = _product(WIDE, accumulate=False)
_add_one, _add_two, _add_three, _add_four = (_product(v, accumulate=True) for v in (1, 2, 3, 4))


@inner
def add_product(
    a: Any,
    a0: int,
    row: int,
    step: int,
    b: Any,
    b0: int,
    b_step: int,
    c: Any,
    c0: int,
    c_row: int,
    columns: int,
    depth: int,
) -> None:
    """``C (ROWS, columns) += A (ROWS, depth) B (depth, columns)``, columns a multiple of `LANES`.

    Arrays are flat. Entry ``(r, k)`` of A is ``a[a0 + r row + k step]``, ``(k, j)`` of B is ``b[b0
    + k b_step + j]``, ``(r, j)`` of C is ``c[c0 + r c_row + j]``.
    """
    at = 0
    while at < columns:
        rest = (columns - at) // LANES
        if WIDE == 4 and rest >= 4:
            _add_four(a, a0, row, step, b, b0 + at, b_step, c, c0 + at, c_row, depth)
            at += 4 * LANES
        elif WIDE == 4 and rest == 3:
            _add_three(a, a0, row, step, b, b0 + at, b_step, c, c0 + at, c_row, depth)
            at += 3 * LANES
        elif rest >= 2:
            _add_two(a, a0, row, step, b, b0 + at, b_step, c, c0 + at, c_row, depth)
            at += 2 * LANES
        else:
            _add_one(a, a0, row, step, b, b0 + at, b_step, c, c0 + at, c_row, depth)
            at += LANES
