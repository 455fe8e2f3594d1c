"""Thinning, schedules and error curves; proposals fit their budget and are better than even spacing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checking import refused
from factories import power_functions
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_cli import PostHocEMA
from posthoc_cli.planning import (
    ErrorCurve,
    PlanReport,
    Schedule,
    error_curve,
    propose,
    relative_rounding,
    snapshots_to_drop,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import Motion, Prior, Problem, assumed_prior
from posthoc_cli.snapshots.directory import read_directory


def kept(snapshots: list[PowerFunction], prior: Prior, keep: int) -> list[PowerFunction]:
    dropped = snapshots_to_drop(snapshots, prior, keep)
    assert len(set(dropped)) == len(dropped)
    return [p for index, p in enumerate(snapshots) if index not in dropped]


@given(
    st.lists(st.floats(1.0, 1e6), min_size=2, max_size=24, unique=True), st.integers(1, 12),
    st.sampled_from([(0.05,), (0.05, 0.28), (0.03, 0.1, 0.28)]),
)  # fmt: skip
@settings(max_examples=30)
def test_thinning_keeps_the_newest_and_the_requested_number_of_each_profile(
    times: list[float], keep: int, sigma_rels: tuple[float, ...]
) -> None:
    snapshots = power_functions(times, sigma_rels)
    left = kept(snapshots, assumed_prior(snapshots, 2e-4), keep)
    for profile in power_functions(1.0, sigma_rels):
        of_profile = [p.t for p in left if p.gamma == profile.gamma]
        assert len(of_profile) == min(keep, len(times))
        assert max(of_profile) == max(times)


@pytest.mark.parametrize(
    ("sigma_rel", "rates"), [(0.10, (1.0, 1.0)), (0.05, (1.0, 1.0)), (0.10, (1.0, 0.01)), (0.05, (0.01, 1.0))]
)
def test_thinning_makes_nearly_the_best_choice_of_its_size(sigma_rel: float, rates: tuple[float, float]) -> None:
    """Compared with every choice of 3 of 16 snapshots with the newest among them."""
    snapshots = power_functions(range(1, 17), (sigma_rel,))
    prior = assumed_prior(snapshots, 2e-4, Motion(np.array([0.0, 8.0, 16.0]), np.array(rates), np.zeros(2)))
    targets = power_functions(16.0, np.geomspace(0.05, 0.28, 12).tolist())

    def error(choice: Sequence[int]) -> float:
        """The 8-norm over twelve targets, by which thinning chooses."""
        solver = Problem([snapshots[i] for i in choice], prior.of(choice), 16.0)
        goals = solver.goals(targets)
        return float(np.mean(solver.expected_squares(solver.optimum(goals), goals).sum(axis=0) ** 4) ** (1 / 8))

    best = min(error([*others, 15]) for others in combinations(range(15), 2))
    assert error([snapshots.index(p) for p in kept(snapshots, prior, 3)]) <= 1.02 * best


def held(snapshots: list[PowerFunction]) -> set[tuple[float, float]]:
    return {(p.t, round(p.sigma_rel, 9)) for p in snapshots}


@pytest.mark.parametrize("keep", [None, 4])
def test_a_schedule_predicts_the_snapshots_that_a_tracker_leaves(tmp_path: Path, keep: int | None) -> None:
    settings: dict = {"checkpoint_every": 100, "max_checkpoints": keep}
    model, planned = torch.nn.Linear(1, 1), Schedule((0.05, 0.28), steps=1050, **settings).snapshots()
    with PostHocEMA.from_model(model, tmp_path, **settings) as tracker:
        for _ in range(1050):
            tracker.update_(model)
    left = [s.profile for s in read_directory(tmp_path) if not s.off_schedule]
    assert len(planned) == len(left) == 2 * (keep or 10)
    assert {p.t for p in planned} >= {1000.0}
    if keep is None:  # the choice of thinning depends on how the network moved
        assert held(planned) == held(left)


def test_the_curve_touches_zero_at_tracked_profiles_and_names_the_good_ranges() -> None:
    snapshots = Schedule((0.05, 0.10), 10_000, 500).snapshots()
    curve = error_curve("run", snapshots, assumed_prior(snapshots), (0.02, 0.28))
    assert (curve.tracked, curve.t, curve.assumption) == ((0.05, 0.1), 10_000, "the network moves evenly")
    assert (curve.sigma_rels[0], curve.sigma_rels[-1]) == (0.02, 0.28)
    for tracked in curve.tracked:
        assert curve.profile_error[np.flatnonzero(curve.sigma_rels == tracked)[0]] < 1e-6
    below = curve.predicted_error < 0.01
    insides = [(curve.sigma_rels >= a) & (curve.sigma_rels <= b) for a, b in curve.ranges_below(0.01)]
    assert np.array_equal(np.any(insides, axis=0), below)


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
    lone = replace(curve, sigma_rels=np.array([0.05, 0.1, 0.15]), predicted_error=np.array([0.5, 0.0, 0.5]))
    assert lone.ranges_below(0.01) == []


# --- proposals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_relative_rounding_is_that_of_rounded_numbers(dtype: str) -> None:
    values = 2.0 ** np.random.default_rng(0).uniform(0, 1, 100_000)  # one octave represents all
    spacing = 2.0 ** (np.floor(np.log2(values)) - {"float16": 10, "bfloat16": 7, "float32": 23}[dtype])
    rounded = np.round(values / spacing) * spacing
    measured = np.linalg.norm(rounded - values) / np.linalg.norm(values)
    assert relative_rounding(dtype) == pytest.approx(measured, rel=0.05)


@given(steps=st.integers(1, 10**6), params=st.integers(1, 10**10))
@settings(max_examples=3)
def test_named_schedules_state_their_size_and_are_marked_if_they_fit(steps: int, params: int) -> None:
    proposals = propose(steps, params)
    for proposal in proposals:
        schedule = proposal.schedule
        most = schedule.kept + (schedule.kept < schedule.taken)  # one more before the thinning
        nbytes = {"float16": 2, "float32": 4}[proposal.dtype]
        assert proposal.nbytes == len(schedule.sigma_rels) * most * params * nbytes
        assert schedule.checkpoint_every % proposal.update_every == 0
        assert 0 < schedule.taken * schedule.checkpoint_every <= steps
    report = PlanReport(tuple(proposals), proposals[1].nbytes)
    assert report.within_disk is not None
    assert report.within_disk.nbytes <= proposals[1].nbytes
    fitting = [p.errors.worst for p in proposals if p.nbytes <= proposals[1].nbytes]
    assert report.within_disk.errors.worst == min(fitting)
    assert PlanReport(tuple(proposals), 1).within_disk is None
    assert PlanReport(tuple(proposals)).within_disk is None


@pytest.mark.parametrize(
    "motion", [None, Motion(np.array([0.0, 20_000.0, 40_000.0]), np.array([8e-6, 1e-7]), np.zeros(2))]
)
def test_named_schedules_are_better_than_even_spacing(motion: Motion | None) -> None:
    for proposal in propose(40_000, 10**6, motion=motion):
        schedule = proposal.schedule
        even = replace(schedule, checkpoint_every=-(-40_000 // schedule.kept), max_checkpoints=None).snapshots()
        prior = assumed_prior(even, schedule.rounding, motion or Motion.even(40_000))
        assert proposal.errors.worst < 1.1 * error_curve("", even, prior, (0.05, 0.28)).worst


def test_a_range_has_its_ends_tracked_and_short_averages_are_updated_more_often() -> None:
    for steps, low, every in ((3_000, 0.05, 5), (20, 0.05, 1)):
        for proposal in propose(steps, 1000, (low, 0.28)):
            tracked, each = proposal.schedule.sigma_rels, proposal.update_every
            assert tracked[:1] == (low,) or len(tracked) == 1
            assert tracked[-1:] == (0.28,) or len(tracked) == 1
            assert each <= every * (1 + (steps == 3_000))
    assert {p.update_every for p in propose(400_000, 1000)} == {10}


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [((0, 1), "steps"), ((10.5, 1), "steps"), ((1000.0, 1), "steps"), ((10, 0), "params"), ((10, 1e6), "params"),
     ((10, 1, (0.28, 0.05)), "sigma_range")],
)  # fmt: skip
def test_a_plan_refuses_empty_and_fractional_values(arguments: Any, subject: str) -> None:
    with refused(subject):
        propose(*arguments)
