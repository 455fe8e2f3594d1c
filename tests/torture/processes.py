"""Experiments that run in separate processes: processes that die, several in one directory, threads and signals."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import torch

from torture import Tally

PATIENCE = 60.0
"""The seconds after which a process that should have ended is considered to hang."""


def apart(name: str, most: int, folder: Path, share: float, seed: int) -> Tally:
    """Run an experiment, named as "module function", up to `most` times in a process that has loaded torch."""
    count = max(1, round(most * share))
    process = forked.Forked("from torture.processes import run_alone; run_alone()", name, folder, count, seed)
    out, err = process.communicate(timeout=1e6)
    assert process.returncode == 0, err
    return Tally(**json.loads(out))


def run_alone() -> None:
    """Run the experiment named on the command line, in the process that `apart` has started."""
    name, folder, count, seed = sys.argv[1:]
    torch.set_num_threads(1)  # before a thread pool exists: forked children would lack its threads
    gc.collect()
    gc.freeze()  # else the garbage collector of a forked child would touch, and so copy, all loaded objects
    module, function = name.split()
    experiment = getattr(importlib.import_module(f"torture.{module}"), function)
    print(json.dumps(vars(experiment(Path(folder), int(count), random.Random(int(seed))))))


class Nursery:
    """A launcher of forked processes that are killed or interrupted, one at a time.

    A child returns through the top of this program, so that it ends as every Python process does.
    """

    def __init__(self, err: Path) -> None:
        self._err = err

    def run(self, work: Callable[[], object], after: float | None, number: int) -> tuple[int, str, float]:
        """Do `work` in a child that starts with SIGINT blocked; send it the signal `number` after `after` seconds.

        Returns:
            The exit code (negative for a signal, -1000 if the child hung, -1001 if it left a process), its output to
            stderr, and its duration in seconds.
        """
        started = time.monotonic()
        # Blocked until `work` unblocks it: the code before is not part of any command.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.dup2(os.open(self._err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            sys.exit(0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if after is not None:
            time.sleep(after)
            os.kill(child, number)
        code = self._wait(child)
        if self._left(child, number):
            code = -1001
        return code, self._err.read_text(errors="replace") if self._err.exists() else "", time.monotonic() - started

    def kills(
        self, tally: Tally, count: int, chance: random.Random, seconds: float, work: Callable[[], object]
    ) -> Iterator[tuple[str, int]]:
        """Do `work` of about `seconds` repeatedly, killing it at random moments until `count` kills have been made.

        Yields the name of each attempt and its number, counted from 0. The last attempt is the first to complete.
        """
        for attempt in range(1_000):
            after = chance.uniform(0, 1.2 * seconds) if tally.tried < count else None
            code, err, _ = self.run(work, after, signal.SIGKILL)
            tally.tried += after is not None
            where = f"kill {tally.tried}, attempt {attempt}"
            if code not in (0, -signal.SIGKILL):
                tally.missed.append(f"{where}: the resumed process ended with {code}: {err.strip()[-500:]}")
            yield where, attempt
            if code != -signal.SIGKILL:
                return

    def run_whole(self, work: Callable[[], object]) -> float:
        """Do `work` without a signal; return its duration."""
        code, err, seconds = self.run(work, None, 0)
        assert code == 0, err
        return seconds

    def _left(self, child: int, number: int) -> bool:
        """Return whether a child has left processes; those of a killed child are killed and not counted."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            try:
                os.killpg(child, signal.SIGKILL if number == signal.SIGKILL else 0)
            except ProcessLookupError:
                return False
            time.sleep(0.01)
        return number != signal.SIGKILL

    def _wait(self, child: int) -> int:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -1000
