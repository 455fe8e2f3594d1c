"""The processes of one torchrun job: they make parts side by side, and end together if one of them fails or dies.

No tensor is exchanged, only flags in the job's key-value store (torch.distributed's TCPStore). The first failure is
noted there, and everyone sees it at its next tile. A process that has died is noticed by the launcher, which ends the
others; without one by those that wait for it, since it gives no sign any more; and if it is rank 0, by the store's
silence.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from posthoc_cli.errors import InvalidValueError, RankError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

START = 120.0
"""Seconds for all processes to begin."""

WORK_WAIT = 600.0
"""Seconds that a process waits for the others, in addition to twice the time that its own work took."""

SILENCE = 30.0
"""Seconds without a sign after which a process is taken to have died; each gives one six times as often."""

EXIT_WAIT = 3.0
"""Seconds that a process waits at its end for the others to see its failure, or to show that they run."""

_T = TypeVar("_T")


class Ranks:
    """One process among those of a job. A context manager: an error that leaves it stops the others, too.

    Every method raises a RankError that names the rank that failed, was ended, or does not respond.

    Arguments:
        rank: its number, from 0.
        world: how many there are.
        store: shared by all.
    """

    def __init__(self, rank: int, world: int, store: Store) -> None:
        self.rank, self.world, self._store = rank, world, store
        self._began = time.monotonic()
        self._left = threading.Event()
        self._signs: dict[int, tuple[int, float]] = {}
        threading.Thread(target=self._give_signs, name="ema-signs", daemon=True).start()

    def check(self) -> None:
        """Raise if another process has failed."""
        self._raise_noted("failure")
        self._raise_noted("end")

    def begin(self, work: Callable[[], None]) -> None:
        """Do the work in rank 0 alone; the other processes wait for it."""
        self._in_first(work, "begun")

    def finish(self, work: Callable[[], None]) -> None:
        """Wait for every process, then do the work in rank 0 alone; returns in every process when it is done."""
        self._set_flag("ready")
        self._wait_for("ready", range(self.world))
        self._in_first(work, "finished")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._leave(error)
        except RankError as found:
            if isinstance(error, SystemExit):
                raise found from None
        finally:
            self._left.set()

    def _give_signs(self) -> None:
        with suppress(RuntimeError):  # the store has gone, which this process finds when it needs it
            self._store.add(f"signs/{self.rank}", 1)
            while not self._left.wait(SILENCE / 6):
                self._store.add(f"signs/{self.rank}", 1)

    def _silence(self, rank: int) -> float:
        """Seconds since the last sign of a process, as far as this one has looked."""
        now, count = time.monotonic(), self._ask(lambda: self._store.add(f"signs/{rank}", 0))
        if rank not in self._signs or self._signs[rank][0] != count:
            self._signs[rank] = count, now
        return now - self._signs[rank][1]

    def _leave(self, error: BaseException | None) -> None:
        """Publish why this process ends, and wait until the others have seen it; after a signal, find the cause."""
        ended = isinstance(error, SystemExit)
        if ended:
            self._note("end", f"rank {self.rank}: was ended by a signal")
        elif error is not None and not isinstance(error, RankError):
            self._note("failure", f"rank {self.rank}: failed: {str(error) or type(error).__name__}")
        self._set_flag("left")
        # The store may be in rank 0, and a launcher ends the others as soon as one has failed.
        deadline = time.monotonic() + (EXIT_WAIT if self.rank == 0 or error is not None else 0.0)
        while (silent := self._missing("left", range(self.world))) and time.monotonic() < deadline:
            time.sleep(0.05)
        if ended:  # a launcher ends all when one has died
            self._raise_noted("failure")
            if silent:
                named = " and ".join(f"rank {rank}" for rank in silent)
                raise RankError(named, "has died" if len(silent) == 1 else "died, or never began")

    def _in_first(self, work: Callable[[], None], flag: str) -> None:
        if self.rank == 0:
            work()
            self._set_flag(flag)
        self._wait_for(flag, [0])

    def _ask(self, call: Callable[[], _T]) -> _T:
        """The result of a call of the store; a RankError if it does not respond."""
        try:
            return call()
        except RuntimeError as error:
            reason = f"has died, or its launcher has: the store does not answer ({_first_line(error)})"
            raise RankError("rank 0", reason) from error

    def _set_flag(self, flag: str) -> None:
        self._ask(lambda: self._store.set(f"{flag}/{self.rank}", "1"))

    def _missing(self, flag: str, ranks: Sequence[int]) -> list[int]:
        """The ranks that have not set this flag."""
        return self._ask(lambda: [rank for rank in ranks if not self._store.check([f"{flag}/{rank}"])])

    def _note(self, key: str, message: str) -> None:
        """Store a message under a key, unless another process has."""
        if self._ask(lambda: self._store.add(f"{key}/count", 1)) == 1:
            self._ask(lambda: self._store.set(key, message))

    def _raise_noted(self, key: str) -> None:
        if self._ask(lambda: self._store.check([key])):
            raise RankError(*self._ask(lambda: self._store.get(key)).decode().split(": ", 1))

    def _wait_for(self, flag: str, ranks: Sequence[int]) -> None:
        now = time.monotonic()
        deadline = now + WORK_WAIT + 2 * (now - self._began)
        while missing := self._missing(flag, ranks):
            if self._silence(missing[0]) > SILENCE:
                self._note("failure", f"rank {missing[0]}: has died: it gave no sign for {SILENCE:.0f} s")
            elif time.monotonic() > deadline:
                self._note("failure", f"rank {missing[0]}: is stuck: it did not come within {deadline - now:.0f} s")
            self.check()
            time.sleep(0.05)


def local_rank() -> tuple[int, int]:
    """The number of this process among those on this machine, and how many they are; (0, 1) if not known."""
    try:
        return int(os.environ.get("LOCAL_RANK", "0")), max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        return 0, 1


def join_ranks() -> Ranks:
    """Meet the other processes of the job that the environment describes.

    Raises:
        InvalidValueError: RANK or WORLD_SIZE is not a number as torchrun sets it.
        RankError: the others did not come in time.
    """
    # Else torch prints a C++ trace when the process with the store has died.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank = world = -1
    if not 0 <= rank < world:
        variables = f"RANK {os.environ['RANK']!r} and WORLD_SIZE {os.environ['WORLD_SIZE']!r} in the environment"
        raise InvalidValueError(variables, "must be whole numbers as torchrun sets them")
    meet: Any = rendezvous
    try:
        store, _, _ = _interruptible(lambda: next(meet("env://", rank, world, timeout=timedelta(seconds=START))))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = f"the {world} processes did not meet at {where}: {_first_line(error)}"
        raise RankError(f"rank {rank}", reason) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Ranks(rank, world, PrefixStore(f"ema-attempt-{attempt}", store))


def _interruptible(call: Callable[[], _T]) -> _T:
    """The result of a long C++ call, made in a thread, since no signal is handled during it."""
    outcome: Future[_T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised again below
            outcome.set_exception(error)

    threading.Thread(target=work, name="ema-meet", daemon=True).start()
    while not outcome.done():
        time.sleep(0.02)
    return outcome.result()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
