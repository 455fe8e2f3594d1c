"""Thinning, schedules and error curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import refused
from factories import solved, squared_error
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_cli import PostHocEMA
from posthoc_cli.planning import (
    Candidate,
    ErrorCurve,
    Schedule,
    error_curve,
    errors_after_each,
    forecast,
    losses_of,
    profile_fit,
    snapshots_to_drop,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import MinimumVariance, Motion, Prior, assumed_prior
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.targets import SigmaRel


def pure(sigma_rel: float, t: float) -> PowerFunction:
    return PowerFunction.from_sigma_rel(sigma_rel, t)


def thinned(arrivals: list[float], keep: int, sigma_rels: tuple[float, ...], prior_of: PriorOf) -> list[PowerFunction]:
    """What is left when snapshots arrive and are thinned one time after another."""
    left: list[PowerFunction] = []
    for t in arrivals:
        left += [pure(s, t) for s in sigma_rels]
        gone = set(snapshots_to_drop(left, prior_of(left), keep))
        left = [p for index, p in enumerate(left) if index not in gone]
    return left


PriorOf = Callable[[list[PowerFunction]], Prior]


def walking(t: float, rounding: float = 2e-4) -> PriorOf:
    """An even walk up to `t`."""
    motion = Motion.even(t, 0.25**2)
    return lambda snapshots: assumed_prior(snapshots, rounding, motion)


clocks = st.lists(st.floats(1.0, 1e6), min_size=2, max_size=24, unique=True)
tracked = st.sampled_from([(0.05,), (0.05, 0.28), (0.03, 0.1, 0.28)])


@given(clocks, st.integers(1, 12), tracked)
@settings(deadline=None, max_examples=30)
def test_thinning_keeps_the_newest_and_so_many_of_each_profile(
    times: list[float], keep: int, sigma_rels: tuple[float, ...]
) -> None:
    snapshots = [pure(s, t) for t in times for s in sigma_rels]
    gone = snapshots_to_drop(snapshots, assumed_prior(snapshots, 2e-4), keep)
    assert len(set(gone)) == len(gone)
    left = [p for index, p in enumerate(snapshots) if index not in gone]
    for sigma_rel in sigma_rels:
        own = [p.t for p in left if p.gamma == pure(sigma_rel, 1.0).gamma]
        assert len(own) == min(keep, len(times))
        assert max(own) == max(times)


@pytest.mark.parametrize("sigma_rels", [(0.05, 0.28), (0.05, 0.10)])
def test_thinning_a_long_run_is_better_than_even_spacing(sigma_rels: tuple[float, ...]) -> None:
    prior_of = walking(120.0)
    left = thinned([float(t) for t in range(1, 121)], 8, sigma_rels, prior_of)
    even = [pure(s, 120.0 * k / 8) for k in range(1, 9) for s in sigma_rels]
    assert len(left) == len(even)
    assert forecast(left, prior_of(left)).worst < forecast(even, prior_of(even)).worst


def test_the_error_after_a_loss_is_that_of_solving_again_without_it() -> None:
    snapshots = [pure(s, float(t)) for t in (5, 11, 18, 30, 40) for s in (0.05, 0.28)]
    prior = assumed_prior(snapshots, 1e-3)
    targets = [pure(float(s), 40.0) for s in np.geomspace(0.05, 0.28, 12)]
    for lost, error in enumerate(errors_after_each(losses_of(snapshots, prior))):
        rest = [index for index in range(len(snapshots)) if index != lost]
        solver = MinimumVariance([snapshots[i] for i in rest], prior.of(rest), 40.0)
        again = np.array([squared_error(solver, solved(solver, target), target) for target in targets])
        assert error == pytest.approx(np.mean(again**4) ** (1 / 8), rel=1e-6)


def test_the_snapshot_that_goes_is_the_one_missed_least() -> None:
    snapshots = [pure(s, float(t)) for t in (2, 3, 20, 30, 40) for s in (0.05, 0.28)]
    prior = assumed_prior(snapshots, 2e-4)
    errors = errors_after_each(losses_of(snapshots, prior))
    gone = snapshots_to_drop(snapshots, prior, 4)
    assert gone[0] == int(np.argmin(errors))


@pytest.mark.parametrize(("keep", "sigma_rels"), [(3, (0.10,)), (4, (0.10,)), (3, (0.05,))])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (1.0, 0.01), (0.01, 1.0)])
def test_what_is_kept_is_nearly_the_best_choice_of_its_size(
    keep: int, sigma_rels: tuple[float, ...], rates: tuple[float, float]
) -> None:
    """Against every choice of 3 or 4 of 16 snapshots with the newest among them."""
    snapshots = [pure(s, float(t)) for t in range(1, 17) for s in sigma_rels]
    motion = Motion(np.array([0.0, 8.0, 16.0]), np.array(rates), np.zeros(2))
    prior = assumed_prior(snapshots, 2e-4, motion)

    def worst(kept: Sequence[int]) -> float:
        solver = MinimumVariance([snapshots[i] for i in kept], prior.of(kept), 16.0)
        targets = [pure(float(s), 16.0) for s in np.geomspace(0.05, 0.28, 12)]
        squares = np.array([squared_error(solver, solved(solver, target), target) for target in targets])
        return float(np.mean(squares**4) ** (1 / 8))

    gone = set(snapshots_to_drop(snapshots, prior, keep))
    best = min(worst([*others, 15]) for others in combinations(range(15), keep - 1))
    assert worst([i for i in range(16) if i not in gone]) <= 1.02 * best


def test_keeping_one_keeps_the_newest() -> None:
    left = thinned([1.0, 2.0, 3.0], 1, (0.05, 0.28), walking(3.0))
    assert [p.t for p in left] == [3.0, 3.0]


def test_keeping_all_drops_nothing() -> None:
    snapshots = [pure(0.05, t) for t in (1.0, 2.0, 3.0)]
    prior = assumed_prior(snapshots)
    assert snapshots_to_drop(snapshots, prior, None) == []
    with refused("max_checkpoints"):
        snapshots_to_drop(snapshots, prior, 0)


# --- schedules -------------------------------------------------------------------------------------


def held(snapshots: list[PowerFunction]) -> set[tuple[float, float]]:
    return {(p.t, round(p.sigma_rel, 9)) for p in snapshots}


@pytest.mark.parametrize("keep", [None, 4])
def test_a_schedule_is_what_a_tracker_leaves(tmp_path: Path, keep: int | None) -> None:
    schedule = Schedule((0.05, 0.28), steps=1050, checkpoint_every=100, max_checkpoints=keep)
    model = torch.nn.Linear(1, 1)
    with PostHocEMA.from_model(
        model, tmp_path, checkpoint_every=100, max_checkpoints=keep, final_snapshot=False
    ) as tracker:
        for _ in range(1050):
            tracker.update_(model)
    left = [s.info.profile.pure for s in read_directory(tmp_path)]
    planned = schedule.snapshots()
    assert len(planned) == len(left) == 2 * schedule.kept
    assert {p.t for p in planned} >= {1000.0}
    if keep is None:  # which ones thinning drops depends on how the network moved
        assert held(planned) == held(left)


def test_few_snapshots_are_thinned_exactly_as_they_arrive() -> None:
    schedule = Schedule((0.05, 0.28), 60, 2, 6, rounding=2e-4)
    full = thinned([float(t) for t in range(2, 61, 2)], 6, (0.05, 0.28), walking(60.0))
    assert held(schedule.snapshots()) == held(full)


@pytest.mark.parametrize(
    ("keep", "taken"), [(30, 31), (30, 60), (64, 200), (500, 501), (500, 20_000), (1000, 1500), (25, 20_000)]
)
def test_a_long_schedule_keeps_as_many_different_snapshots_as_it_says(keep: int, taken: int) -> None:
    schedule = Schedule((0.05, 0.28), 7 * taken + 3, 7, keep, rounding=2e-4)
    snapshots = schedule.snapshots()
    assert len(held(snapshots)) == 2 * keep
    assert all(p.t % 7 == 0 and 7 <= p.t <= 7 * taken for p in snapshots)
    assert sorted(p.t for p in snapshots)[-2:] == [7.0 * taken, 7.0 * taken]


def test_spreading_snapshots_like_fewer_ones_is_close_to_simulating_them_all() -> None:
    schedule = Schedule((0.05, 0.28), 3000, 50, 30, rounding=2e-4)
    prior_of = walking(3000.0)
    full = thinned([float(t) for t in range(50, 3001, 50)], 30, (0.05, 0.28), prior_of)
    spread = schedule.snapshots()
    simulated, approximated = (forecast(snapshots, prior_of(snapshots)) for snapshots in (full, spread))
    assert approximated.worst == pytest.approx(simulated.worst, rel=0.1)
    assert approximated.median == pytest.approx(simulated.median, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        (((0.4,), 100, 10), "sigma_rel"),
        (((0.05,), 0, 10), "steps"),
        (((0.05,), 100, 0), "checkpoint_every"),
        (((0.05,), 100, 101), "checkpoint_every"),
        (((0.05,), 10**9, 1), "checkpoint_every"),
    ],
)
def test_an_impossible_schedule_is_refused(arguments: tuple, subject: str) -> None:
    with refused(subject):
        Schedule(*arguments)


def test_a_schedule_stands_for_the_snapshots_that_it_will_leave() -> None:
    schedule = Schedule((0.05, 0.28), 1000, 100, 5)
    curve, same = (error_curve(given, (0.1, 0.2), points=3) for given in (schedule, Candidate.of_schedule(schedule)))
    assert (curve.label, curve.t, curve.tracked) == (same.label, 1000.0, (0.05, 0.28))
    assert (curve.profile_error == same.profile_error).all()


def test_the_curve_touches_zero_at_tracked_profiles_and_names_the_good_ranges() -> None:
    curve = error_curve(Candidate.of_schedule(Schedule((0.05, 0.10), 10_000, 500)), (0.02, 0.28))
    assert curve.tracked == (0.05, 0.1)
    assert curve.sigma_rels[0] == 0.02
    assert curve.sigma_rels[-1] == 0.28
    for tracked in curve.tracked:
        assert curve.profile_error[np.flatnonzero(curve.sigma_rels == tracked)[0]] < 1e-6
    assert curve.assumption == "the network moves evenly"
    below = curve.predicted_error < 0.01
    for low, high in curve.ranges_below(0.01):
        inside = (curve.sigma_rels >= low) & (curve.sigma_rels <= high)
        assert below[inside].all()
    assert (
        sum(((curve.sigma_rels >= a) & (curve.sigma_rels <= b)).sum() for a, b in curve.ranges_below(0.01))
        == below.sum()
    )


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.0119, 0.2886, "0.012 to 0.288"),  # 0.289 is above the uniform average and refused as input
        (0.05, 0.28, "0.050 to 0.280"),
        (0.0101, 0.0104, "0.0101 to 0.0104"),
        (0.05001, 0.05002, "0.05001 to 0.05002"),
    ],
)
def test_ranges_are_rounded_inwards(low: float, high: float, shown: str) -> None:
    curve = ErrorCurve("x", 1.0, np.array([low, high]), np.array([1.0, 1.0]), np.array([1e-3, 1e-3]), (0.1,))
    assert curve.ranges_text(0.01) == shown


def test_a_lone_point_and_no_point_are_no_range() -> None:
    widths = np.array([0.05, 0.1, 0.15])
    for errors in ([0.5, 0.0, 0.5], [0.5, 0.5, 0.5]):
        assert ErrorCurve("x", 1.0, widths, np.array(errors), None, (0.1,)).ranges_below(0.01) == []


@pytest.mark.parametrize("ends", [(0.1, 0.1), (0.2, 0.1), (0.0, 0.1), (0.1, 0.3)])
def test_an_impossible_range_is_refused(ends: tuple[float, float]) -> None:
    with refused("sigma_range"):
        error_curve(Candidate("x", [PowerFunction(1.0, 1.0)]), ends)


def test_a_time_outside_the_snapshots_is_refused() -> None:
    candidate = Candidate("x", [PowerFunction(1.0, 10.0), PowerFunction(1.0, 20.0)])
    for t in (5.0, 25.0):
        with refused("t", "between the first snapshot"):
            error_curve(candidate, (0.05, 0.1), t=t)


def test_a_fit_has_the_mass_of_its_target() -> None:
    fit = profile_fit(Candidate.of_schedule(Schedule((0.05, 0.10), 10_000, 500)), SigmaRel(0.15))
    spacing = fit.times[1] - fit.times[0]
    assert fit.target.sum() * spacing == pytest.approx(1.0, abs=0.01)
    assert fit.reconstructed.sum() * spacing == pytest.approx(1.0, abs=0.01)
    assert sum(c.sum() for c in fit.coefficients.values()) == pytest.approx(1.0)
    assert set(fit.snapshot_times) == {"sigma_rel 0.05", "sigma_rel 0.1"}
