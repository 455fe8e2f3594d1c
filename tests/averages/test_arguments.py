"""Arguments of the averages are checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checking import refused

from posthoc_cli import averages


def one(kind: type, **usual: object) -> Callable[..., object]:
    """Makes one of a small layer or of small batches."""
    return lambda **options: kind(**usual | options)


LAYER = torch.nn.Linear(1, 1)
NUMBERS: list[object] = [-0.1, 2, float("nan"), True, "0.1", None]
BAD = [
    (one(averages.ExponentialMovingAverage, model=LAYER), "momentum", [0.0, 1.0, float("inf"), [0.1], *NUMBERS]),
    (one(averages.ExponentialMovingAverage, model=LAYER), "interval", [0, -1, 1.5, True, "2"]),
    (one(averages.ShadowModel, model=LAYER), "decay", [1.0, *NUMBERS]),
    (one(averages.ShadowModel, model=LAYER, decay=0.9), "num_updates", [-1, 1.5, True, "3"]),
    (one(averages.EMAStats, dim_x=2), "momentum", [0.0, *NUMBERS]),
    (one(averages.EMAStats, dim_x=2), "eps", [-1e-9, float("nan"), float("inf"), "small"]),
    (one(averages.EMAStats), "dim_x", [0, 2.0]),
    (one(averages.EMAStats, dim_x=2), "dim_y", [0, True]),
    (one(averages.DifferentiableEMA, shape=2), "decay", [1.0, *NUMBERS]),
    (one(averages.DifferentiableEMA, shape=2, decay=0.9), "mode", ["half"]),
    (one(averages.DifferentiableEMA, shape=2, decay=0.9, mode="full"), "window", [3]),
    (one(averages.DifferentiableEMA, shape=2, decay=0.9, mode="window"), "window", [None, 0]),
    (one(averages.DifferentiableEMA, shape=2, decay=0.9), "dtype", [torch.float16]),
]


@pytest.mark.parametrize(("make", "name", "values"), BAD)
def test_a_bad_argument_is_named(make: Callable[..., object], name: str, values: list[object]) -> None:
    for value in values:
        with refused(name):
            make(**{name: value})
