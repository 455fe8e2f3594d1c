"""Checks of numbers that a user passes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

from posthoc_cli.errors import InvalidValueError


def check_number(name: str, value: float, accepts: Callable[[float], bool], accepted: str) -> float:
    """`value` as a float, or an InvalidValueError that says what is `accepted`; `accepts` is False for nan."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan
    if not accepts(number):
        raise InvalidValueError(f"{name} {value!r}", f"must {accepted}")
    return number
