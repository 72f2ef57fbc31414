"""The kept list of defects. Add one when a wrong result was found that no test had noticed."""

from __future__ import annotations

from tests.mutants.runner import Defect

DEFECTS: tuple[Defect, ...] = ()
