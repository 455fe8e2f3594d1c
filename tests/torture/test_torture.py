"""A short share of every experiment; `make torture` runs all of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from torture.experiments import EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nothing_is_lost_missed_or_executed(name: str, tmp_path: Path) -> None:
    experiment, share = EXPERIMENTS[name]
    tally = experiment(tmp_path, share, 0)
    assert tally.tried > 0
    assert not tally.failures
