"""What has been measured so far, on disk: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from attnbias.errors import AttnbiasError


class Journal:
    """One line for each item and arm, written when it is done.

    The first line says what was asked; a journal of another question is refused, not mixed in. A
    last line that was cut by a crash is dropped.

    Raises:
        AttnbiasError: a journal of another model, data or setting.
    """

    def __init__(self, path: Path, asked: dict[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.done: dict[tuple[int, str], dict[str, Any]] = {}
        if fresh:
            path.unlink(missing_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = lines[:-1]  # what follows the last line feed was cut
        if whole:
            head = json.loads(whole[0])
            if head != asked:
                other = sorted(name for name in asked if head.get(name) != asked[name])
                raise AttnbiasError(
                    f"{path} holds a run with another {', '.join(other) or 'setting'}: write "
                    "--fresh to begin anew, or name another --out"
                )
            for line in whole[1:]:
                row = json.loads(line)
                self.done[row["item"], row["arm"]] = row
        self._keep(whole or [json.dumps(asked).encode()])

    def _keep(self, lines: list[bytes]) -> None:
        """The whole lines alone, so that the next is not glued to a piece."""
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))
        os.replace(temporary, self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row, on disk before this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[row["item"], row["arm"]] = row
