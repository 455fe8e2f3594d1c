"""Processes that make one call together: of a distributed training, or of a torchrun job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from posthoc_cli.devices import HOST
from posthoc_cli.errors import PostHocError, RankError, VanishedError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Group:
    """Processes that make one call together, or one alone; the first of `ranks` makes what others
    take."""

    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    device: torch.device = HOST
    processes: Any = None  # torch's group of these ranks; None for all of the training

    @property
    def leads(self) -> bool:
        return self.rank == self.ranks[0]

    @property
    def is_alone(self) -> bool:
        return len(self.ranks) == 1

    def from_all(self, value: Result) -> list[Result]:
        values = [value] * len(self.ranks)
        if not self.is_alone:
            with _named_if_dead():
                dist.all_gather_object(values, value, self.processes)
        return values

    def differ(self, value: object) -> bool:
        """Return whether the processes have different values."""
        first, *others = self.from_all(value)
        return any(other != first for other in others)

    def together(self, work: Callable[[], Result]) -> Result:
        """Do work in every process, and return its result; if one fails, all raise its error or a
        RankError with it.

        If nothing else went wrong in any of them, all raise a VanishedError: they may try again.
        """
        if self.is_alone:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  raised again below, when the other processes know
            failure = error
        own_vanished = isinstance(failure, VanishedError)
        own = None
        if failure is not None:
            own = own_vanished, self.rank, _describe(failure)
        try:
            failed = sorted(filter(None, self.from_all(own)))
        except RankError as dead:
            raise failure or dead from None
        if not failed:
            return result
        vanished, rank, message = failed[0]
        if failure is None or vanished != own_vanished:
            kind = VanishedError if vanished else RankError
            failure = kind(f"rank {rank}", message)
        raise failure

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Do work in the first process, and return its result in every process, or raise errors as
        `together` does."""
        if self.is_alone:
            return work()

        def work_first() -> list[Result]:
            return [work()] if self.leads else []

        sent = [self.together(work_first)]
        with _named_if_dead():
            dist.broadcast_object_list(sent, self.ranks[0], self.processes)
        (result,) = sent[0]
        return result

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        """Do work in the first process, then in the others, and return its result; an error in one
        is raised in all."""
        done: list[Result] = []
        self.from_first(lambda: done.append(work()))
        return self.together(lambda: done[0] if done else work())

    def broadcast(self, value: Tensor, ranks: Sequence[int]) -> None:
        """Copy `value` of the first of these ranks to the others, in place; all of these ranks call
        this."""
        if len(ranks) < 2 or not value.numel():
            return
        in_bytes = value.contiguous().reshape(-1).view(torch.uint8)
        buffer = in_bytes.to(self.device)
        with _named_if_dead():
            if len(ranks) == len(self.ranks):
                dist.broadcast(buffer, ranks[0], self.processes)
            elif self.rank == ranks[0]:
                for other in ranks[1:]:
                    dist.send(buffer, other, self.processes)
            else:
                dist.recv(buffer, ranks[0], self.processes)
        if self.rank != ranks[0]:
            received = buffer.cpu().view(value.dtype)
            value.copy_(received.view(value.shape))


@contextmanager
def _named_if_dead() -> Iterator[None]:
    """Raise a RankError if a call of torch in the block fails: usually another process has died."""
    try:
        yield
    except RuntimeError as error:
        raise RankError("another process of this job", "failed or died") from error


def _describe(error: BaseException) -> str:
    """Put an error into words, with its type unless it is this package's."""
    return str(error) if isinstance(error, PostHocError) else f"{type(error).__name__}: {error}"


THIS_PROCESS = Group()
