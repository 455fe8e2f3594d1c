"""Numbers with units on the command line."""

from __future__ import annotations

import re

from posthoc_cli.errors import InvalidValueError

_BYTES = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("IB", 1024))
}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_bytes(text: str, option: str) -> int:
    """Bytes from 60GB, 500MiB, 1.5TB or a plain number.

    Raises:
        InvalidValueError: naming the option and the accepted forms.
    """
    return _amount(text, _BYTES, f"{option} {text}: must be a size above 0, such as 60GB, 500MiB or 1.5TB")


def parse_count(text: str, option: str) -> int:
    """A number from 1.2e9, 1.2B, 350M or 350,000,000.

    Raises:
        InvalidValueError: naming the option and the accepted forms.
    """
    return _amount(text, _COUNTS, f"{option} {text}: must be a number, at least 1, such as 1.2e9, 1.2B or 350M")


def _amount(text: str, units: dict[str, int], message: str) -> int:
    match = re.fullmatch(r"([\d.,]+(?:[eE][+-]?\d{1,2})?)\s*([a-zA-Z]*)", text.strip())
    unit = units.get(match[2].upper()) if match is not None else None
    try:
        value = 0.0 if match is None or unit is None else float(match[1].replace(",", "")) * unit
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**63:
        raise InvalidValueError(message)
    return round(value)
