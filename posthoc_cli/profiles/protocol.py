"""What every profile can say of itself."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class Profile(Protocol):
    """What reconstruction needs to know of an average: its mass, 1 in all, over training time.

    Both functions take times on the run's clock, in an array of any shape, and return an array of that shape.
    """

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at times `s`; points of mass are left out."""
        ...

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass at times after `s`: 1 before the start, 0 from the end on. It never grows."""
        ...
