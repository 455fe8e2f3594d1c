"""Thinning, schedules and error curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning import Candidate, ErrorCurve, Schedule, error_curve, profile_fit, snapshots_to_drop
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.snapshots.store import read_directory


def thinned(arrivals: list[float], keep: int) -> list[float]:
    kept: list[float] = []
    for t in arrivals:
        kept.append(t)
        for index in snapshots_to_drop(kept, keep):
            del kept[index]
    return kept


@given(st.integers(3, 40), st.integers(1, 400))
def test_thinning_keeps_the_ends_and_stays_even(keep: int, arrived: int) -> None:
    kept = thinned([float(t) for t in range(1, arrived + 1)], keep)
    assert len(kept) == min(keep, arrived)
    assert kept[-1] == arrived
    if keep > 1:
        assert kept[0] == 1
    gaps = np.diff(kept)
    if arrived > keep:
        even = (arrived - 1) / (keep - 1)
        assert gaps.max() <= 2 * even + 1e-9 or gaps.max() == 1


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=60, unique=True), st.integers(2, 30))
def test_first_and_last_stay_on_any_clock(times: list[float], keep: int) -> None:
    times.sort()
    dropped = set(snapshots_to_drop(times, keep))
    left = [t for i, t in enumerate(times) if i not in dropped]
    assert left[0] == times[0]
    assert left[-1] == times[-1]
    assert len(left) == min(len(times), keep)


def test_keeping_one_keeps_the_newest() -> None:
    assert thinned([1.0, 2.0, 3.0], 1) == [3.0]


def test_keeping_all_drops_nothing() -> None:
    assert snapshots_to_drop([1.0, 2.0, 3.0], None) == []
    with pytest.raises(InvalidValueError, match="max_checkpoints 0"):
        snapshots_to_drop([1.0], 0)


def test_a_schedule_is_what_a_tracker_leaves(tmp_path: Path) -> None:
    schedule = Schedule((0.05, 0.28), steps=1050, checkpoint_every=100, max_checkpoints=4)
    model = torch.nn.Linear(1, 1)
    with PostHocEMA.from_model(model, tmp_path, checkpoint_every=100, max_checkpoints=4) as tracker:
        for _ in range(1050):
            tracker.update_(model)
    left = {(s.info.t, s.info.sigma_rel) for s in read_directory(tmp_path)}
    assert {(p.t, round(p.sigma_rel, 9)) for p in schedule.snapshots()} == left
    assert schedule.times() == sorted({t for t, _ in left})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0.4,), 100, 10), "sigma_rel 0.4"),
        (((0.05,), 0, 10), "steps 0"),
        (((0.05,), 100, 0), "checkpoint_every 0"),
        (((0.05,), 100, 101), "at most steps"),
        (((0.05,), 10**9, 1), "at most 20,000 and 2,048 can be judged"),
    ],
)
def test_an_impossible_schedule_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        Schedule(*arguments)


def test_the_curve_touches_zero_at_tracked_profiles_and_names_the_good_ranges() -> None:
    curve = error_curve(Candidate.of_schedule(Schedule((0.05, 0.10), 10_000, 500)), (0.02, 0.28))
    assert curve.tracked == (0.05, 0.1)
    assert curve.sigma_rels[0] == 0.02
    assert curve.sigma_rels[-1] == 0.28
    for tracked in curve.tracked:
        assert curve.profile_error[np.flatnonzero(curve.sigma_rels == tracked)[0]] < 1e-6
    below = curve.profile_error < 0.01
    for low, high in curve.ranges_below(0.01):
        inside = (curve.sigma_rels >= low) & (curve.sigma_rels <= high)
        assert below[inside].all()
    assert (
        sum(((curve.sigma_rels >= a) & (curve.sigma_rels <= b)).sum() for a, b in curve.ranges_below(0.01))
        == below.sum()
    )


def test_a_lone_point_is_no_range() -> None:
    curve = ErrorCurve("x", 1.0, np.array([0.05, 0.1, 0.15]), np.array([0.5, 0.0, 0.5]), (0.1,))
    assert curve.ranges_below(0.01) == []


def test_no_good_range_is_an_empty_list() -> None:
    curve = ErrorCurve("x", 1.0, np.array([0.05, 0.1]), np.array([0.5, 0.5]), (0.2,))
    assert curve.ranges_below(0.01) == []


@pytest.mark.parametrize("ends", [(0.1, 0.1), (0.2, 0.1), (0.0, 0.1), (0.1, 0.3)])
def test_an_impossible_range_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(InvalidValueError):
        error_curve(Candidate("x", [PowerFunction(1.0, 1.0)]), ends)


def test_a_time_outside_the_snapshots_is_refused() -> None:
    candidate = Candidate("x", [PowerFunction(1.0, 10.0), PowerFunction(1.0, 20.0)])
    for t in (5.0, 25.0):
        with pytest.raises(InvalidValueError, match="between the first snapshot"):
            error_curve(candidate, (0.05, 0.1), t=t)


def test_a_fit_has_the_mass_of_its_target() -> None:
    fit = profile_fit(Candidate.of_schedule(Schedule((0.05, 0.10), 10_000, 500)), 0.15)
    spacing = fit.times[1] - fit.times[0]
    assert fit.target.sum() * spacing == pytest.approx(1.0, abs=0.01)
    assert fit.reconstructed.sum() * spacing == pytest.approx(1.0, abs=0.01)
    assert sum(c.sum() for c in fit.coefficients.values()) == pytest.approx(1.0)
    assert set(fit.snapshot_times) == {"sigma_rel 0.05", "sigma_rel 0.1"}
