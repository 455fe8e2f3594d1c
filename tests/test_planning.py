"""Thinning, schedules and error curves; proposals fit their budget and are better than even
spacing."""

from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from checking import refused
from factories import power_functions, solved, squared_error

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.planning import (
    ErrorCurve,
    Schedule,
    error_curve,
    propose,
    snapshots_to_drop,
    spared_times,
)
from posthoc_cli.reconstruction import (
    Motion,
    Problem,
    assumed_prior,
    thinned_subset,
)


def kept(snapshots, prior, keep):
    dropped = snapshots_to_drop(snapshots, prior, keep)
    assert len(set(dropped)) == len(dropped)
    return [p for index, p in enumerate(snapshots) if index not in dropped]


def test_thinning_keeps_the_newest_and_the_requested_number_of_each_profile():
    snapshots = power_functions((3, 1, 40, 9, 10, 2000))
    for keep in (1, 4, 7):
        left = kept(snapshots, assumed_prior(snapshots, 2e-4), keep)
        for gamma in {p.gamma for p in snapshots}:
            times = [p.t for p in left if p.gamma == gamma]
            assert len(times) == min(keep, 6)
            assert max(times) == 2000


def test_thinning_makes_nearly_the_best_choice_of_its_size():
    """Compared with every choice of 3 of 16 snapshots with the newest among them."""
    snapshots = power_functions(range(1, 17), (0.1,))
    prior = assumed_prior(snapshots, 2e-4, of_two_rates(1.0, 0.01))
    widths = np.geomspace(0.05, 0.28, 12)
    targets = power_functions(16.0, widths.tolist())

    def error(choice):
        """The 8-norm over twelve targets, by which thinning chooses."""
        chosen = [snapshots[index] for index in choice]
        solver = Problem(chosen, prior.of(choice), 16.0)
        squares = []
        for target in targets:
            coefficients = solved(solver, target)
            squares.append(squared_error(solver, coefficients, target))
        fourth = np.mean(np.array(squares) ** 4)
        return float(fourth ** (1 / 8))

    left = kept(snapshots, prior, 3)
    ours = error([snapshots.index(profile) for profile in left])
    choices = [(*others, 15) for others in combinations(range(15), 2)]
    best = min(map(error, choices))
    assert ours <= 1.02 * best


def of_two_rates(first, second):
    """Return a walk over 16 steps whose speed changes half way."""
    edges = np.array([0.0, 8.0, 16.0])
    walk = np.array([first, second])
    return Motion(edges, walk, noise=0 * walk)


def test_of_snapshots_that_are_equally_needed_those_far_apart_stay():
    snapshots = power_functions(range(1, 17), (0.1,))
    prior = assumed_prior(snapshots, 0.0, of_two_rates(0.0, 0.0))
    first, middle, last = (profile.t for profile in kept(snapshots, prior, 3))
    assert (first, last) == (1, 16)
    assert 5 < middle < 12


def test_a_schedule_predicts_the_snapshots_that_a_tracker_leaves(tmp_path):
    settings = {"checkpoint_every": 100, "max_checkpoints": None}
    planned = Schedule((0.05, 0.28), steps=1050, **settings).snapshots()
    model = torch.nn.Linear(1, 1)
    with PostHocEMA.from_model(model, tmp_path, **settings) as tracker:
        for _ in range(1050):
            tracker.update_(model)
    left = [s.profile for s in Run(tmp_path).snapshots if not s.off_schedule]
    assert len(left) == 20
    assert [profile.t for profile in planned] == [profile.t for profile in left]
    widths = [profile.sigma_rel for profile in left]
    assert [profile.sigma_rel for profile in planned] == pytest.approx(widths)


def test_a_schedule_keeps_so_many_times_and_the_newest():
    schedule = Schedule((0.05, 0.28), 1050, 100, max_checkpoints=4)
    *times, last = [profile.t for profile in schedule.snapshots()]
    assert len(times) == 2 * 4 - 1
    assert last == 1000


def test_at_most_a_quarter_of_the_kept_times_is_spared():
    assert [spared_times(keep) for keep in (1, 8, 40)] == [1, 2, 5]


def test_the_curve_touches_zero_at_tracked_profiles():
    snapshots = Schedule((0.05, 0.10), 10_000, 500).snapshots()
    curve = error_curve("run", snapshots, assumed_prior(snapshots), (0.02, 0.28))
    assert curve.tracked == (0.05, 0.1)
    widths = curve.sigma_rels
    assert widths[0] == 0.02
    assert widths[-1] == 0.28
    is_tracked = np.isin(widths, curve.tracked)
    assert is_tracked.sum() == 2
    assert curve.profile_error[is_tracked].max() < 1e-6


# 0.289 is above the uniform average and refused as input
@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.0119, 0.2886, "0.012 to 0.288"),
        (0.0101, 0.0104, "0.0101 to 0.0104"),
    ],
)
def test_ranges_are_rounded_inwards(low, high, shown):
    curve = curve_of([low, high], [1e-3, 1e-3])
    assert curve.good_range == f"below 1 % for sigma_rel {shown}"


@pytest.mark.parametrize(
    ("errors", "ranges"),
    [
        ([0.5, 0.0, 0.5, 0.5, 0.5], []),  # a good point alone is none
        ([0.0, 0.0, 0.5, 0.0, 0.0], [(0.05, 0.1), (0.2, 0.25)]),
    ],
)
def test_good_ranges_have_no_worse_point(errors, ranges):
    curve = curve_of([0.05, 0.1, 0.15, 0.2, 0.25], errors)
    assert curve.ranges_below(0.01) == ranges


def curve_of(widths, errors):
    predicted = np.array(errors)
    ones = np.ones(predicted.size)
    return ErrorCurve(
        "x",
        1.0,
        np.array(widths),
        ones,
        predicted,
        (0.1,),
    )


# --- proposals ------------------------------------------------------------------------------------


@cache
def proposed(steps):
    return propose(steps, 1000)


@pytest.mark.parametrize("steps", [1, 3_000])
def test_named_schedules_state_their_size(steps):
    for proposal in proposed(steps):
        schedule = proposal.schedule
        fullest = min(schedule.kept + 1, schedule.taken)  # just before the thinning
        elements = len(schedule.sigma_rels) * fullest * 1000
        item_bytes = {"float16": 2, "float32": 4}[proposal.dtype]
        assert proposal.nbytes == elements * item_bytes
        assert schedule.checkpoint_every % proposal.update_every == 0
        assert 0 < schedule.taken * schedule.checkpoint_every <= steps


def test_named_schedules_are_better_than_even_spacing():
    for proposal in proposed(3_000):
        schedule = proposal.schedule
        interval = -(-3_000 // schedule.kept)
        evenly = replace(schedule, checkpoint_every=interval, max_checkpoints=None)
        snapshots = evenly.snapshots()
        prior = assumed_prior(snapshots, schedule.rounding, Motion.even(3_000))
        curve = error_curve("", snapshots, prior, (0.05, 0.28))
        assert proposal.errors.worst < 1.1 * curve.worst


def test_the_profiles_of_a_schedule_differ_in_a_narrow_range():
    for proposal in propose(100, 100, (0.1, 0.1001)):
        widths = proposal.schedule.sigma_rels
        assert len({*widths}) == len(widths)


@pytest.mark.parametrize(
    ("steps", "most"),
    [
        (401, 2),
        (3_000, 10),
    ],
)
def test_the_shortest_average_has_ten_updates_within_its_width(steps, most):
    for proposal in proposed(steps):
        assert proposal.update_every <= most


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        ((10.5, 1), "steps"),
        ((10, 0), "params"),
        ((10, 1, (0.28, 0.05)), "sigma_range"),
    ],
)
def test_a_plan_refuses_empty_and_fractional_values(arguments, subject):
    with refused(subject):
        propose(*arguments)


# --- the choice of the snapshots that a reconstruction uses if there are very many


def test_the_choice_is_spread_evenly_back_from_the_newest():
    of_one = power_functions(range(1, 101), (0.05,))
    of_other = power_functions((50, 100), (0.28,))
    *found, last = thinned_subset([*of_one, *of_other], 20)
    assert last == 101
    times = [of_one[index].t for index in found]
    assert times[-1] == 100
    gaps = np.diff(times)
    assert len(gaps) == 18
    assert {*gaps.tolist()} == {5.0, 6.0}
