"""A short share of every experiment; `make torture` runs all of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from torture.experiments import EXPERIMENTS, Experiment


@pytest.mark.parametrize("experiment", [pytest.param(one, id=one.name.replace(" ", "-")) for one in EXPERIMENTS])
def test_nothing_is_lost_missed_or_executed(experiment: Experiment, tmp_path: Path) -> None:
    tally = experiment.run(tmp_path, experiment.share, 0)
    assert tally.tried > 0
    assert not tally.failures
