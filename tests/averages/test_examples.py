"""The public names of `posthoc_cli.averages`; examples in docstrings run and print what they promise."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable

import pytest
import torch
from checking import refused

from posthoc_cli import averages


@pytest.mark.parametrize("name", averages.__all__)
def test_the_example_in_the_docstring_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = getattr(averages, name)
    names = dict(vars(sys.modules[found.__module__]))
    (example,) = doctest.DocTestFinder(recurse=False).find(found, name, globs=names)
    outcome = doctest.DocTestRunner().run(example)
    assert outcome.failed == 0, capsys.readouterr().out
    assert outcome.attempted > 2


def test_settings_show() -> None:
    layer = torch.nn.Linear(1, 1)
    assert "momentum=0.01, interval=2, update_buffers=False, warmup=True" in repr(
        averages.ExponentialMovingAverage(layer, 0.01, 2, warmup=True)
    )
    assert "decay=0.9, num_updates=3, zero_debias=True" in repr(averages.ShadowModel(layer, 0.9, 3, True))
    assert "num_features_x=3, num_features_y=2, momentum=0.5, eps=1e-06" in repr(averages.EMAStats(3, 2, 0.5))


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
