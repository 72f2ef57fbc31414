"""The processes that share a corpus: one, or those that `torchrun` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from attnbias.errors import AttnbiasError

GONE = "another process of this run has gone; the same command goes on from here."


class Processes:
    """This process among those of a run; here, the only one.

    Attributes:
        rank: number of this process from 0. size: how many there are.
    """

    rank = 0
    size = 1

    def shared(self, given: Any) -> list[Any]:
        """What every process has given, by rank; all wait for each other here."""
        return [given]

    def agree(self, problem: BaseException | None) -> None:
        """Wait for the others; raise where this process or another has a problem."""
        if problem is not None:
            words = str(problem) if isinstance(problem, AttnbiasError) else repr(problem)
        found = self.shared(None if problem is None else words)
        if problem is not None:
            raise problem
        for rank, said in enumerate(found):
            if said is not None:
                raise AttnbiasError(f"process {rank}: {said}")


class _Group(Processes):
    def __init__(self, rank: int, size: int, group: Any) -> None:
        self.rank, self.size, self._group = rank, size, group

    def shared(self, given: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, given, group=self._group)
        except RuntimeError as error:  # the connection to one that was killed is closed
            raise AttnbiasError(GONE) from error
        return found


def count_of(name: str) -> int | None:
    """A whole number from the environment (RANK, WORLD_SIZE, LOCAL_RANK), None where it is not
    set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise AttnbiasError(f"the environment variable {name} is {text!r}; it must be a number.")
    return int(text)


@contextmanager
def processes() -> Iterator[Processes]:
    """Those of the run: the group that exists, or one made from RANK and WORLD_SIZE (gloo).

    A group made here is taken down again. Processes may wait for each other for a week.
    """
    import torch.distributed as dist

    patience = timedelta(days=7)
    there = dist.is_available() and dist.is_initialized()
    if not there and (count_of("WORLD_SIZE") or 1) == 1:
        yield Processes()
        return
    if not dist.is_available():
        raise AttnbiasError("WORLD_SIZE is set, and this build of torch has no torch.distributed.")
    if not there:
        if count_of("RANK") is None:
            raise AttnbiasError("WORLD_SIZE is set and RANK is not; start with torchrun.")
        dist.init_process_group("gloo", timeout=patience)
    group = dist.new_group(backend="gloo", timeout=patience) if there else None
    try:
        yield _Group(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(None if not there else group)
