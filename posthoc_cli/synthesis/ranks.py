"""The processes of one torchrun job: they make parts side by side, and know when one of them fails or dies.

No tensor is exchanged. What the processes share is the job's key-value store (torch.distributed's TCPStore, the one
that gloo meets in, too): every one counts up a heartbeat in it, and watches that of the next one, in a thread. The
first failure is noted there once, with the rank; everyone sees it within a beat and stops at its next tile.

A barrier of gloo alone would not do: it waits for a dead process until its timeout, or breaks without a rank.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from posthoc_cli.errors import InvalidValueError, RankError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

BEAT = 0.5
"""Seconds between two heartbeats."""

SILENCE = 60.0
"""Seconds without one after which a process counts as dead."""

START = 120.0
"""Seconds for all processes to begin."""

FAREWELL = 5.0
"""Seconds that a process waits at its end for others to have seen what it has to say."""

_T = TypeVar("_T")

_WANTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """One process among those of a job. A context manager: an error that leaves it stops the others, too.

    Arguments:
        rank: its number, from 0.
        world: how many there are.
        store: shared by all.
    """

    def __init__(self, rank: int, world: int, store: Store) -> None:
        self.rank, self.world, self._store = rank, world, store
        self._failure: RankError | None = None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ema-ranks", daemon=True)

    # --- for the one who works ---------------------------------------------------------------------

    def check(self, *_: object) -> None:
        """Go on only while all others do.

        Raises:
            RankError: naming the rank that failed or died.
        """
        if self._failure is not None:
            raise self._failure

    def begin(self, work: Callable[[], None]) -> None:
        """Do the work in rank 0 alone, before any process goes on.

        Raises:
            RankError: naming rank 0 where the work failed, or another one that failed meanwhile.
        """
        if self.rank == 0:
            work()
            self._add("begun", 1)
        else:
            self._wait(lambda: self._add("begun", 0) > 0)

    def finish(self, work: Callable[[], None]) -> None:
        """When every process has come here: do the work in rank 0 alone. Returns when it is done, in every process.

        Raises:
            RankError: naming a rank that did not come here, or rank 0 where the work failed.
        """
        self._add("ready", 1)
        if self.rank == 0:
            self._wait(lambda: self._add("ready", 0) == self.world)
            work()
            self._add("finished", 1)
        else:
            self._wait(lambda: self._add("finished", 0) > 0)

    def __enter__(self) -> Ranks:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = None
        try:
            if isinstance(error, SystemExit):  # a launcher ends all when one has died
                lost = self._look_for_dead()
                self._note_failure(f"rank {self.rank}: was told to stop" if lost is None else str(lost))
            elif error is not None and not isinstance(error, RankError):
                self._note_failure(f"rank {self.rank}: failed: {str(error) or type(error).__name__}")
            self._add(f"left/{self.rank}", 1)
            # The store may live in rank 0, and a launcher ends the others as soon as one has failed.
            deadline = time.monotonic() + (FAREWELL if self.rank == 0 or error is not None else 0.0)
            while time.monotonic() < deadline and not self._all_left():
                time.sleep(0.05)
        except RankError as gone:
            lost = lost or gone
        finally:
            self._leaving.set()
            # A thread that is inside the store when the interpreter ends takes the process down with it.
            self._thread.join(FAREWELL)
        if lost is not None and isinstance(error, SystemExit):
            raise lost from None

    # --- what is in the store ----------------------------------------------------------------------

    def _add(self, key: str, amount: int) -> int:
        """Count a key of the store up; returns where it stands.

        Raises:
            RankError: the store is gone.
        """
        try:
            return self._store.add(f"ema/{key}", amount)
        except RuntimeError as error:
            raise self._failure or RankError(
                "rank 0, or the launcher beside it, has died", f"its store does not answer ({_first_line(error)})"
            ) from error

    def _note_failure(self, message: str) -> None:
        if self._add("failures", 1) == 1:
            self._store.set("ema/failure", message)

    def _noted_failure(self) -> RankError | None:
        if not self._store.check(["ema/failure"]):
            return None
        return RankError(*self._store.get("ema/failure").decode().split(": ", 1))

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.check()
            time.sleep(0.05)

    # --- who is alive ------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Beat, and look whether the next rank does and whether a failure was noted; until this process leaves."""
        try:
            pulse = _Pulse(lambda: self._add(f"beat/{(self.rank + 1) % self.world}", 0))
            while not self._leaving.is_set():
                self._add(f"beat/{self.rank}", 1)
                self._watch_next(pulse)
                self._failure = self._failure or self._noted_failure()
                self._leaving.wait(BEAT)
        except (RankError, RuntimeError) as error:
            if not self._leaving.is_set():
                self._failure = error if isinstance(error, RankError) else RankError("the store of the job", str(error))

    def _watch_next(self, pulse: _Pulse) -> None:
        dead = (self.rank + 1) % self.world
        if pulse.silent_for() > (SILENCE if pulse.began else START) and not self._add(f"left/{dead}", 0):
            self._note_failure(f"rank {dead}: has died, no sign of life for {pulse.silent_for():.0f} s")

    def _look_for_dead(self) -> RankError | None:
        """What made a launcher end this process: a failure that was noted, or a rank that is silent for a few beats."""
        pulses = {r: _Pulse(lambda r=r: self._add(f"beat/{r}", 0)) for r in range(self.world)}  # type: ignore[misc]
        deadline = time.monotonic() + 6 * BEAT
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._failure is not None:
            return self._failure
        silent = [r for r, pulse in pulses.items() if pulse.silent_for() and not self._add(f"left/{r}", 0)]
        began = [r for r in silent if pulses[r].began]
        if silent and not began:  # one of them has died; the launcher may have ended the others as it ends this one
            named = " and ".join(f"rank {r}" for r in silent)
            return RankError(f"{named} never began", "died, or ended by the launcher")
        return RankError(f"rank {began[0]} has died", "it gives no sign of life") if began else None

    def _all_left(self) -> bool:
        return all(self._add(f"left/{rank}", 0) for rank in range(self.world))


class _Pulse:
    """When a counter last moved, on this machine's clock."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._count, self._moved = read(), time.monotonic()

    @property
    def began(self) -> bool:
        """Whether it ever moved."""
        return self._count > 0

    def silent_for(self) -> float:
        """Seconds since it was first seen where it stands; 0 where it has just moved."""
        now, count = time.monotonic(), self._read()
        if count != self._count:
            self._count, self._moved = count, now
            return 0.0
        return now - self._moved


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several of a torchrun job."""
    return all(environment.get(name) for name in _WANTED) and environment["WORLD_SIZE"] != "1"


def local_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which process of those on this machine this one is, and how many they are; (0, 1) where nobody says."""
    try:
        return int(environment.get("LOCAL_RANK", "0")), max(1, int(environment.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        return 0, 1


def join_ranks() -> Ranks:
    """Meet the other processes of the job that the environment describes.

    Raises:
        InvalidValueError: the environment makes no sense.
        RankError: the others did not come in time.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank = world = -1
    if not 0 <= rank < world:
        raise InvalidValueError(
            f"RANK {os.environ['RANK']!r} and WORLD_SIZE {os.environ['WORLD_SIZE']!r} in the environment",
            "must be whole numbers as torchrun sets them",
        )
    meet: Any = rendezvous
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = _interruptible(lambda: next(meet("env://", rank, world, timeout=timedelta(seconds=START))))
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank}", f"the {world} processes did not meet at {where}: {_first_line(error)}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Ranks(rank, world, PrefixStore(f"ema-attempt-{attempt}", store))


def _interruptible(call: Callable[[], _T]) -> _T:
    """The result of a call that lets no signal through, such as a long wait in C++; made in a thread."""
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
