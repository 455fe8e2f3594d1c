"""Sizes as users write them, the number of threads for this machine, and the progress of long
jobs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from decimal import Decimal, InvalidOperation

from posthoc_cli.errors import InvalidValueError

# the largest number of threads: with more, the memory bus and Python's global lock are the limit
MAX_WORKERS = 16


def worker_count(count: int | None = None) -> int:
    """Choose the number of threads: `count`, or this process's cores up to MAX_WORKERS."""
    if count is not None:
        return max(1, count)
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(cores, MAX_WORKERS)


_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("IB", 1024))
}


MOST = 2**63 - 1  # the largest count or size that is accepted
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
"""The units of counts."""


def parse_bytes(size: str, option: str) -> int:
    """Parse a size such as 60GB, 500MiB, 1.5TB or a plain number of bytes.

    Raises:
        InvalidValueError: the text is something else, or below 1; the message names `option`.
    """
    value = parse_amount(size, _UNITS)
    if value is None or not 1 <= value <= MOST:
        reason = "must be a size from 1B to 9e6TB, such as 60GB, 500MiB or 1.5TB"
        raise InvalidValueError(option, reason, value=f"{size!r}")
    return round(value)


def format_bytes(nbytes: float) -> str:
    """Write a number of bytes in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


_AMOUNT = re.compile(
    r"(-?(?:\d{1,3}(?:,\d{3})+|[\d_]*)(?:\.\d*)?(?:[eE][+-]?\d{1,2})?)\s*([a-zA-Z]*)"
)
"""A number, perhaps as 350,000,000, and a unit; 1,5 may mean 1.5, and is neither."""


def parse_amount(
    text: str,
    units: dict[str, int],
) -> Decimal | None:
    """Parse a number with one of `units` (upper-case names); None if it is invalid."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        return None
    unit = match[2].upper()
    if unit not in units:
        return None
    try:
        return Decimal(match[1].replace(",", "")) * units[unit]
    except InvalidOperation:
        return None


ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A function of a job's name, such as "verifying", and its total bytes; its context yields
`advance(nbytes)`."""


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG001
    """Show nothing."""
    yield lambda _: None
