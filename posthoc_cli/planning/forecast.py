"""The errors that snapshots will have over a range of sigma_rel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_cli.planning.keeping import USEFUL_RANGE
from posthoc_cli.profiles import FloatArray, PowerFunction
from posthoc_cli.reconstruction import Prior, expected_errors


@dataclass(frozen=True)
class Forecast:
    """Errors over a range of sigma_rel, at the time of the last snapshot.

    Attributes:
        sigma_rels: what the errors are of: shape [points].
        predicted_error: expected relative L2 error of the weights: shape [points].
        profile_error: relative L2 error of the profile: shape [points].
    """

    sigma_rels: FloatArray
    predicted_error: FloatArray
    profile_error: FloatArray

    @property
    def worst(self) -> float:
        """The largest predicted error in the range."""
        return float(self.predicted_error.max())

    @property
    def median(self) -> float:
        """The median of the predicted errors in the range."""
        return float(np.median(self.predicted_error))


def forecast(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
    points: int = 41,
) -> Forecast:
    """What errors to expect of averages made of these snapshots.

    Arguments:
        snapshots: profiles of what is stored, at least one.
        prior: of these snapshots; an assumed one counts, too. Weights of norm 0 are reproduced exactly.
        sigma_range: lowest and highest sigma_rel.
        points: how many sigma_rels, spread over the range.
    """
    return forecast_at(snapshots, prior, sigma_rels_in(sigma_range, points))


def sigma_rels_in(sigma_range: tuple[float, float], points: int = 41) -> FloatArray:
    """Evenly spaced in the logarithm, both ends included: shape [points]."""
    return np.clip(np.geomspace(*sigma_range, points), *sigma_range)


def forecast_at(snapshots: Sequence[PowerFunction], prior: Prior, sigma_rels: FloatArray) -> Forecast:
    """As `forecast`, at these sigma_rels."""
    t = max(p.t for p in snapshots)
    targets = [PowerFunction.from_sigma_rel(float(s), t) for s in sigma_rels]
    predicted, profile = expected_errors(snapshots, targets, prior, t)
    return Forecast(sigma_rels, np.nan_to_num(predicted, nan=0.0), profile)
