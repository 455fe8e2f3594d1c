"""Memory, disk and processors: amounts as people write them, and the threads that this machine is good for."""

from __future__ import annotations

import os
import re
from decimal import Decimal, InvalidOperation

from posthoc_cli.errors import InvalidValueError

MAX_WORKERS = 16
"""Threads at most: beyond, the memory bus and Python's own lock are the limit."""


def worker_count(wanted: int | None = None) -> int:
    """Threads to work with: as many as this process has cores, up to MAX_WORKERS."""
    if wanted is not None:
        return max(1, wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("IB", 1024))
}


MOST = 2**63 - 1
"""Of a count or a size."""


def parse_bytes(size: str, option: str) -> int:
    """Bytes from 60GB, 500MiB, 1.5TB or a plain number.

    Raises:
        InvalidValueError: anything else, or less than 1; its subject is `option`.
    """
    value = parse_amount(size, _UNITS)
    if value is None or value > MOST:
        reason = "must be a size above 0, such as 60GB, 500MiB or 1.5TB"
        raise InvalidValueError(option, reason, value=f"{size!r}")
    return round(value)


def size_text(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def parse_amount(text: str, units: dict[str, int]) -> Decimal | None:
    """A number in one of `units`, by their upper-case names; None if it is none, or below 1; it may exceed `MOST`."""
    match = re.fullmatch(r"([\d.,]+(?:[eE][+-]?\d{1,2})?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in units:
        return None
    try:
        value = Decimal(match[1].replace(",", "")) * units[match[2].upper()]
    except InvalidOperation:
        return None
    return value if value >= 1 else None
