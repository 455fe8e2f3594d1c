"""Thinning, schedules and error curves; proposals fit their budget and are better than even
spacing."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checking import refused
from factories import power_functions, solved, squared_error
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.planning import (
    ErrorCurve,
    PlanReport,
    Schedule,
    error_curve,
    propose,
    snapshots_to_drop,
    spared_times,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import (
    MOST_SOLVED,
    Motion,
    Prior,
    Problem,
    assumed_prior,
    reconstruct,
    thinned_subset,
)


def kept(snapshots: list[PowerFunction], prior: Prior, keep: int) -> list[PowerFunction]:
    dropped = snapshots_to_drop(snapshots, prior, keep)
    assert len(set(dropped)) == len(dropped)
    return [p for index, p in enumerate(snapshots) if index not in dropped]


@given(
    st.lists(st.floats(1.0, 1e6), min_size=2, max_size=24, unique=True),
    st.integers(1, 12),
    st.sampled_from([(0.05,), (0.05, 0.28), (0.03, 0.1, 0.28)]),
)
@settings(max_examples=30)
def test_thinning_keeps_the_newest_and_the_requested_number_of_each_profile(
    times: list[float],
    keep: int,
    sigma_rels: tuple[float, ...],
) -> None:
    snapshots = power_functions(times, sigma_rels)
    left = kept(snapshots, assumed_prior(snapshots, 2e-4), keep)
    for profile in power_functions(1.0, sigma_rels):
        of_profile = [p.t for p in left if p.gamma == profile.gamma]
        assert len(of_profile) == min(keep, len(times))
        assert max(of_profile) == max(times)


@pytest.mark.parametrize(
    ("sigma_rel", "rates"), [(0.10, (1.0, 1.0)), (0.10, (1.0, 0.01)), (0.05, (0.01, 1.0))]
)
def test_thinning_makes_nearly_the_best_choice_of_its_size(
    sigma_rel: float,
    rates: tuple[float, float],
) -> None:
    """Compared with every choice of 3 of 16 snapshots with the newest among them."""
    snapshots = power_functions(range(1, 17), (sigma_rel,))
    prior = assumed_prior(
        snapshots, 2e-4, Motion(np.array([0.0, 8.0, 16.0]), np.array(rates), np.zeros(2))
    )
    targets = power_functions(16.0, np.geomspace(0.05, 0.28, 12).tolist())

    def error(choice: Sequence[int]) -> float:
        """The 8-norm over twelve targets, by which thinning chooses."""
        solver = Problem([snapshots[i] for i in choice], prior.of(choice), 16.0)
        squares = [squared_error(solver, solved(solver, target), target) for target in targets]
        return float(np.mean(np.array(squares) ** 4) ** (1 / 8))

    best = min(error([*others, 15]) for others in combinations(range(15), 2))
    assert error([snapshots.index(p) for p in kept(snapshots, prior, 3)]) <= 1.02 * best


def test_exact_snapshots_of_a_network_that_stood_still_are_thinned() -> None:
    snapshots = power_functions(range(1, 17))
    motion = Motion(np.array([0.0, 8, 16]), np.array([0.0, 1]), np.zeros(2))
    assert len(kept(snapshots, assumed_prior(snapshots, 0.0, motion), 3)) == 6


@pytest.mark.parametrize("keep", [None, 4])
def test_a_schedule_predicts_the_snapshots_that_a_tracker_leaves(
    tmp_path: Path,
    keep: int | None,
) -> None:
    settings: dict = {"checkpoint_every": 100, "max_checkpoints": keep}
    model = torch.nn.Linear(1, 1)
    planned = Schedule((0.05, 0.28), steps=1050, **settings).snapshots()
    with PostHocEMA.from_model(model, tmp_path, **settings) as tracker:
        for _ in range(1050):
            tracker.update_(model)
    left = [s.profile for s in Run(tmp_path).snapshots if not s.off_schedule]
    assert len(planned) == len(left) == 2 * (keep or 10)
    assert {p.t for p in planned} >= {1000.0}
    if keep is None:  # the choice of thinning depends on how the network moved
        assert {(p.t, round(p.sigma_rel, 9)) for p in planned} == {
            (p.t, round(p.sigma_rel, 9)) for p in left
        }


def test_the_curve_touches_zero_at_tracked_profiles_and_names_the_good_ranges() -> None:
    snapshots = Schedule((0.05, 0.10), 10_000, 500).snapshots()
    curve = error_curve("run", snapshots, assumed_prior(snapshots), (0.02, 0.28))
    assert (curve.tracked, curve.t, curve.assumption) == (
        (0.05, 0.1),
        10_000,
        "the network moves evenly",
    )
    assert (curve.sigma_rels[0], curve.sigma_rels[-1]) == (0.02, 0.28)
    for tracked in curve.tracked:
        assert curve.profile_error[np.flatnonzero(curve.sigma_rels == tracked)[0]] < 1e-6
    below = curve.predicted_error < 0.01
    insides = [
        (curve.sigma_rels >= a) & (curve.sigma_rels <= b) for a, b in curve.ranges_below(0.01)
    ]
    assert np.array_equal(np.any(insides, axis=0), below)


# 0.289 is above the uniform average and refused as input
@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.0119, 0.2886, "0.012 to 0.288"), (0.0101, 0.0104, "0.0101 to 0.0104")],
)
def test_ranges_are_rounded_inwards(low: float, high: float, shown: str) -> None:
    curve = ErrorCurve(
        "x", 1.0, np.array([low, high]), np.array([1.0, 1.0]), np.array([1e-3, 1e-3]), (0.1,)
    )
    assert curve.ranges_text(0.01) == shown
    lone = replace(
        curve, sigma_rels=np.array([0.05, 0.1, 0.15]), predicted_error=np.array([0.5, 0.0, 0.5])
    )
    assert lone.ranges_below(0.01) == []


# --- proposals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "params"), [(1, 1), (97, 10**10), (3_000, 10**6)])
def test_named_schedules_state_their_size_and_are_marked_if_they_fit(
    steps: int,
    params: int,
) -> None:
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


def test_named_schedules_are_better_than_even_spacing() -> None:
    for proposal in propose(40_000, 10**6):
        schedule = proposal.schedule
        even = replace(
            schedule, checkpoint_every=-(-40_000 // schedule.kept), max_checkpoints=None
        ).snapshots()
        prior = assumed_prior(even, schedule.rounding, Motion.even(40_000))
        assert proposal.errors.worst < 1.1 * error_curve("", even, prior, (0.05, 0.28)).worst


@pytest.mark.parametrize("steps", [20, 3_000])
def test_the_ends_of_a_range_are_tracked(steps: int) -> None:
    for proposal in propose(steps, 1000, (0.05, 0.28)):
        tracked = proposal.schedule.sigma_rels
        assert len(tracked) == 1 or (tracked[0], tracked[-1]) == (0.05, 0.28)


def test_the_profiles_of_a_schedule_differ_in_a_narrow_range() -> None:
    for proposal in propose(1000, 100, (0.1, 0.1001)):
        widths = proposal.schedule.sigma_rels
        assert len({*widths}) == len(widths)


@pytest.mark.parametrize(("steps", "most"), [(20, 1), (400, 2), (3_000, 10)])
def test_the_shortest_average_has_ten_updates_within_its_width(steps: int, most: int) -> None:
    for proposal in propose(steps, 1000):
        assert proposal.update_every <= most


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        ((0, 1), "steps"),
        ((10.5, 1), "steps"),
        ((1000.0, 1), "steps"),
        ((10, 0), "params"),
        ((10, 1e6), "params"),
        ((10, 1, (0.28, 0.05)), "sigma_range"),
    ],
)
def test_a_plan_refuses_empty_and_fractional_values(arguments: Any, subject: str) -> None:
    with refused(subject):
        propose(*arguments)


# --- the choice of the snapshots that a reconstruction uses if there are very many

SIGMA_RELS = (0.05, 0.28)


def pure(sigma_rel: float, t: float) -> PowerFunction:
    return PowerFunction.from_sigma_rel(sigma_rel, t)


def regular(count: int) -> list[PowerFunction]:
    return [pure(s, float(t)) for t in range(1, count + 1) for s in SIGMA_RELS]


@given(
    st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=60, unique=True),
    st.integers(1, 40),
    st.integers(1, 3),
)
@example([999999972.0, 999999973.0], 1, 1)
@settings(max_examples=60)
def test_the_choice_has_the_asked_number_and_the_newest_of_each_profile(
    times: list[float],
    most: int,
    profiles: int,
) -> None:
    sigma_rels = (0.05, 0.28, 0.1)[:profiles]
    snapshots = [pure(s, t) for t in times for s in sigma_rels]
    found = thinned_subset(snapshots, most)
    assert found == sorted(set(found))
    assert len(found) <= max(most, profiles)
    for sigma_rel in sigma_rels:
        chosen = [snapshots[i].t for i in found if snapshots[i].gamma == pure(sigma_rel, 1.0).gamma]
        assert len(chosen) >= min(max(1, most // profiles), len(times))
        assert max(chosen) == max(times)


def test_the_choice_is_spread_evenly_back_from_the_newest() -> None:
    snapshots = [pure(0.05, float(t)) for t in range(1, 101)] + [
        pure(0.28, float(t)) for t in (50, 100)
    ]
    found = thinned_subset(snapshots, 20)
    assert found[-1] == 101
    gaps = np.diff([snapshots[i].t for i in found[:-1]])
    assert snapshots[found[-2]].t == 100
    assert (len(gaps), {*gaps.tolist()}) == (18, {5.0, 6.0})
    # `keep` of each profile, even beyond `most`
    assert len(thinned_subset(regular(50), 10, keep=20)) == 40
    assert len(thinned_subset(regular(MOST_SOLVED))) == MOST_SOLVED
    assert thinned_subset(regular(50), 100) == list(range(100))


@pytest.mark.parametrize(
    ("rounding", "cooling"), [(2e-4, 2.0), (1.5e-3, 0.0)], ids=["float16", "bfloat16"]
)
def test_the_choice_loses_little(rounding: float, cooling: float) -> None:
    """With half of the snapshots no average loses much more than what rounding alone would cost, a
    root of 2."""
    snapshots = regular(150)
    t = 150.0
    edges = np.linspace(1, t, 33)
    walk = (1.02 - edges[1:] / t) ** cooling
    prior = assumed_prior(snapshots, rounding, Motion(edges, walk * 0.06 / t, np.zeros(32)))
    targets = [pure(s, t) for s in (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28)]

    def errors(which: Iterable[int]) -> np.ndarray:
        chosen = sorted(which)
        return reconstruct(
            [snapshots[i] for i in chosen], targets, prior=prior.of(chosen), t=t
        ).predicted_error

    everything = errors(range(300))
    found = errors(thinned_subset(snapshots, 150))
    assert (found / everything).max() < 1.7


def test_at_most_a_quarter_of_the_kept_times_is_spared() -> None:
    assert [spared_times(keep) for keep in (1, 4, 8, 20, 40)] == [1, 1, 2, 5, 5]
