"""Runs in a process of its own, with torch loaded: forks processes that are killed or interrupted at random moments.

Its arguments: kills FOLDER COUNT SEED, or signals FOLDER COUNT SEED. Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from torture.killing import killed_trainings
from torture.signalling import signalled_commands

PATIENCE = 60.0
"""Seconds after which a process that should have ended is taken to hang."""


class Nursery:
    """Forks processes one at a time.

    A child leaves through the very top of this program, so that it ends as any process of Python does.
    """

    def __init__(self, err: Path) -> None:
        self._err = err

    def run(self, work: Callable[[], object], after: float | None, number: int) -> tuple[int, str, float]:
        """Do `work` in a child.

        Arguments:
            work: begins with SIGINT blocked.
            after: seconds until the child gets a signal; None: none.
            number: of the signal.

        Returns:
            The exit code, negative for a signal, -1000 where it hung and -1001 where it left a process; what it wrote
            to stderr; how long it took.
        """
        started = time.monotonic()
        # Until `work` wants it: what comes before is no part of any command.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            out = os.open(self._err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 2)
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

    def _left(self, child: int, number: int) -> bool:
        """Whether a child has left processes of its own; what a killed one leaves goes, and is no mistake of its."""
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


EXPERIMENTS = {"kills": killed_trainings, "signals": signalled_commands}

if __name__ == "__main__":
    name, folder, count, seed = sys.argv[1:]
    torch.set_num_threads(1)  # before anything starts a pool of threads, which no fork would have
    gc.collect()
    gc.freeze()  # the end of a forked process would go through all that is loaded, and so copy it
    tally = EXPERIMENTS[name](Nursery(Path(folder) / "stderr"), Path(folder), int(count), random.Random(int(seed)))
    print(json.dumps(vars(tally)))
