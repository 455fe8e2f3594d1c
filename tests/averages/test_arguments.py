"""Arguments of the averages are checked."""

from __future__ import annotations

import pytest
import torch
from checking import refused

from posthoc_cli import averages

LAYER = torch.nn.Linear(1, 1)
NUMBERS: list[object] = [-0.1, 2, float("nan"), True, "0.1", None]
BAD = [
    (averages.ExponentialMovingAverage, {"model": LAYER}, "momentum", [0.0, 1.0, float("inf"), [0.1], *NUMBERS]),
    (averages.ExponentialMovingAverage, {"model": LAYER}, "interval", [0, -1, 1.5, True, "2"]),
    (averages.ShadowModel, {"model": LAYER}, "decay", [1.0, *NUMBERS]),
    (averages.ShadowModel, {"model": LAYER, "decay": 0.9}, "num_updates", [-1, 1.5, True, "3"]),
    (averages.EMAStats, {"dim_x": 2}, "momentum", [0.0, *NUMBERS]),
    (averages.EMAStats, {"dim_x": 2}, "eps", [-1e-9, float("nan"), float("inf"), "small"]),
    (averages.EMAStats, {}, "dim_x", [0, 2.0]),
    (averages.EMAStats, {"dim_x": 2}, "dim_y", [0, True]),
    (averages.DifferentiableEMA, {"shape": 2}, "decay", [1.0, *NUMBERS]),
    (averages.DifferentiableEMA, {"shape": 2, "decay": 0.9}, "mode", ["half"]),
    (averages.DifferentiableEMA, {"shape": 2, "decay": 0.9, "mode": "full"}, "window", [3]),
    (averages.DifferentiableEMA, {"shape": 2, "decay": 0.9, "mode": "window"}, "window", [None, 0]),
    (averages.DifferentiableEMA, {"shape": 2, "decay": 0.9}, "dtype", [torch.float16]),
]


@pytest.mark.parametrize(("kind", "usual", "name", "values"), BAD)
def test_a_bad_argument_is_named(kind: type, usual: dict[str, object], name: str, values: list[object]) -> None:
    for value in values:
        with refused(name):
            kind(**usual | {name: value})
