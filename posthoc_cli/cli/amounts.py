"""Numbers with units on the command line."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

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
    value = _amount(text, _BYTES)
    if value is None:
        raise InvalidValueError(f"{option} {text}", "must be a size above 0, such as 60GB, 500MiB or 1.5TB")
    return round(value)


def parse_count(text: str, option: str, example: str = "100000, 1e5 or 100K") -> int:
    """A whole number from 1.2e9, 1.2B, 350M or 350,000,000.

    Raises:
        InvalidValueError: naming the option and the accepted forms.
    """
    value = _amount(text, _COUNTS)
    if value is None or value != value.to_integral_value():
        shown = text.strip() or "(empty)"
        raise InvalidValueError(f"{option} {shown}", f"must be a whole number, at least 1, such as {example}")
    return int(value)


def _amount(text: str, units: dict[str, int]) -> Decimal | None:
    """The amount; None where it is none, below 1 or too large."""
    match = re.fullmatch(r"([\d.,]+(?:[eE][+-]?\d{1,2})?)\s*([a-zA-Z]*)", text.strip())
    unit = units.get(match[2].upper()) if match is not None else None
    if match is None or unit is None:
        return None
    try:
        value = Decimal(match[1].replace(",", "")) * unit
    except InvalidOperation:
        return None
    return value if 1 <= value < 2**63 else None
