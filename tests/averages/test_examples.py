"""The public names of `posthoc_cli.averages`; examples in docstrings run and print what they promise."""

from __future__ import annotations

import doctest
import sys

import pytest
import torch

import posthoc_cli
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
    assert "dim_x=3, dim_y=2, momentum=0.5, eps=1e-06" in repr(averages.EMAStats(3, 2, 0.5))


def test_the_room_is_there_without_an_import_of_its_own() -> None:
    assert posthoc_cli.averages is averages
    assert averages.__all__ == sorted(averages.__all__)
