"""What `fuse` did, as a table for people."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from attnbias.fuse.fused import Fused

WIDTH = 118


def places(names: tuple[str, ...]) -> str:
    """Dotted names with their numbers as a range: ``encoder.block.0-5.layer.0``."""
    if len(names) == 1:
        return names[0] or "(the model)"
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(one) for one in parts}) > 1:
        return f"{names[0]} and {len(names) - 1} more"
    words = []
    for column in zip(*parts, strict=True):
        values = sorted(set(column), key=lambda one: (len(one), one))
        if len(values) == 1:
            words.append(values[0])
        elif all(one.isdigit() for one in values):
            words.append(f"{values[0]}-{values[-1]}")
        else:
            return f"{names[0]} and {len(names) - 1} more"
    return "".join(words)


def told(fused: Fused) -> str:
    """The report of `Fused`, a table and sentences."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None)
    if fused.note:
        console.print(f"{fused.model}: {fused.note}")
    else:
        console.print(f"{fused.model} on {fused.device}: {fused.replaced} attention modules fused")
    if fused.sites:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for head in ("where", "bias", "lowering", "differs by", "gain of one module"):
            table.add_column(head, overflow="fold")
        for one in fused.sites:
            gain = "not measured"
            if one.gain is not None:
                size = f"{one.gain.batch} x {one.gain.length:,}"
                gain = f"{one.gain.ratio:.2f} x ({size})"
            differs = f"{one.difference:.0e}" if one.lowering else "not checked"
            where = f"{places(one.names)} ({len(one.names)} {one.kind})"
            table.add_row(where, one.form, one.lowering, differs, gain)
        console.print(table)
    for left in fused.left:
        console.print(
            f"left alone: {places(left.names)} ({len(left.names)} {left.kind}): {left.reason}"
        )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
