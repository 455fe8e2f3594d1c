"""Processes that use every core, as data loaders do: what is measured beside them says how a busy machine is borne."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PER_CORE = 2

_WORK = """
import os
parent = os.getppid()
while os.getppid() == parent:  # it ends with whoever began it, however that ends
    sum(range(1_000_000))
"""


@contextmanager
def busy_machine(processes: int | None = None) -> Iterator[None]:
    """Keep processes busy within the block, PER_CORE for each core by default."""
    count = PER_CORE * (os.cpu_count() or 1) if processes is None else processes
    running = [subprocess.Popen([sys.executable, "-c", _WORK]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def load_text() -> str:
    """The system's load average over the last minute."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
