"""Recognise averages that lose updates, since they are kept in too few digits.

An average that is rounded only when it is saved stands still by chance: about as often as it moves
by one digit up or down. One that is rounded at every update stands still more often, since updates
of less than half a digit change nothing.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from posthoc_cli.dtypes import DTYPES
from posthoc_cli.profiles import FloatArray
from posthoc_cli.snapshots.sources import spacing

MOST_LOST = 0.01
"""The largest `lost_share` of an average that is usable. On the motions of
scripts/bench_checkpoints.py, with 20 files and decays from 0.9 to 0.9995, it is 0 where float32
averages are saved in half precision. It is above 0.01, or another fault is found, where averages
beside weights are kept in it and more than 1.3 times as far off as predicted."""
_ERRORS = 4  # standard errors that chance does not reach


def digits_of(
    values: npt.NDArray[np.floating],
    dtype: str,
) -> FloatArray:
    """Return the distance from each value to the next one of its stored dtype."""
    stored = DTYPES[dtype]
    return spacing(values.astype(np.float64), stored.mantissa_bits, stored.lowest_exponent)


def lost_share(
    motion: FloatArray,
    is_expected: npt.NDArray[np.bool_],
) -> float:
    """Return the share of the elements that stand still, beyond chance, of those that are expected
    to move by several digits; `motion` is in digits. It is 0 if it may be chance."""
    digits = np.abs(motion[is_expected])
    standing = np.count_nonzero(digits < 0.5)
    neighbours = np.count_nonzero((digits > 0.5) & (digits < 1.5))
    lost = standing - neighbours / 2
    error = math.sqrt(1 + neighbours)
    return lost / digits.size if lost > _ERRORS * error else 0.0
