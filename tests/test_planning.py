"""Thinning, schedules before a training, and error curves."""

from itertools import combinations

import numpy as np
import pytest
import torch
from checking import refused
from factories import power_functions, solved, squared_error

from posthoc_cli import PostHocEMA, Run, error_curve
from posthoc_cli.planning import (
    CurveRequest,
    ErrorCurve,
    Schedule,
    count_protected_times,
    newest_times,
    times_to_drop,
)
from posthoc_cli.profiles import gamma_from_sigma_rel
from posthoc_cli.reconstruction import (
    Motion,
    Problem,
    assumed_prior,
    choose_evenly,
)
from posthoc_cli.targets import Beta, SigmaRel


def kept(snapshots, prior, keep):
    dropped = times_to_drop(snapshots, prior, keep, newest_times(snapshots, 1))
    gone = {time.t for time in dropped}
    assert len(gone) == len(dropped)
    return [snapshot for snapshot in snapshots if snapshot.t not in gone]


def test_thinning_keeps_the_newest_and_the_requested_number_of_each_profile():
    snapshots = power_functions((3, 1, 40, 9, 10, 2000))
    for keep in (1, 4, 7):
        left = kept(snapshots, assumed_prior(snapshots, 2e-4), keep)
        for gamma in {p.gamma for p in snapshots}:
            times = [p.t for p in left if p.gamma == gamma]
            assert len(times) == min(keep, 6)
            assert max(times) == 2000


def test_thinning_makes_nearly_the_best_choice_of_its_size():
    """Compared with every choice of 3 of 16 snapshots with the newest among them: to drop one after
    another is the worse, the fewer are left."""
    snapshots = power_functions(range(1, 17), (0.1,))
    prior = assumed_prior(snapshots, 2e-4, of_two_rates(1.0, 0.01))
    widths = np.geomspace(0.05, 0.28, 12)
    targets = power_functions(16.0, widths.tolist())

    def error(choice):
        """The 8-norm over twelve targets, by which thinning chooses."""
        chosen = [snapshots[index] for index in choice]
        solver = Problem(chosen, prior.subset(choice), 16.0)
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
    assert ours <= 1.4 * best


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
    planned = Schedule(steps=1050, **settings).snapshots()
    model = torch.nn.Linear(1, 1)
    with PostHocEMA.from_model(model, tmp_path, **settings) as tracker:
        for _ in range(1050):
            tracker.update_(model)
    *left, _, _ = [snapshot.profile for snapshot in Run(tmp_path).snapshots]
    assert len(left) == 20
    assert [profile.t for profile in planned] == [profile.t for profile in left]
    widths = [profile.sigma_rel for profile in left]
    assert [profile.sigma_rel for profile in planned] == pytest.approx(widths)


def test_a_schedule_keeps_so_many_times_and_the_newest():
    schedule = Schedule(1050, 100, max_checkpoints=4)
    *times, last = [profile.t for profile in schedule.snapshots()]
    assert len(times) == 2 * 4 - 1
    assert last == 1000


def test_a_thinned_schedule_is_better_than_even_spacing():
    ends = (0.05, 0.28)
    evenly = Schedule(3_000, 3_000 // 8, None).error_curve(CurveRequest(ends))
    thinned = Schedule(3_000, 3_000 // 16, 8).error_curve(CurveRequest(ends))
    assert thinned.worst < 0.9 * evenly.worst


def test_a_schedule_predicts_earlier_averages_from_the_snapshots_until_then():
    """If none are thinned away, these are the snapshots of a shorter training."""
    ends = (0.05, 0.28)
    early = Schedule(3_000, 100, None).error_curve(CurveRequest(ends, t=1_500, method="paper"))
    short = Schedule(1_500, 100, None).error_curve(CurveRequest(ends, method="paper"))
    assert early.t == short.t == 1_500
    assert early.profile_error == pytest.approx(short.profile_error)


def test_a_schedule_predicts_other_averages():
    """An ordinary EMA of decay d has the mean age d / (1 - d) steps before t, and the power
    function t / (gamma + 2)."""
    others = [SigmaRel(0.1), Beta(0.99)]
    request = CurveRequest((0.1, 0.28), others=others)
    curve = Schedule(3_000, 100, None).error_curve(request)
    same, ordinary = curve.others
    assert same.predicted_error == pytest.approx(curve.predicted_error[0])
    gamma = gamma_from_sigma_rel(ordinary.sigma_rel)
    assert 3_000 / (gamma + 2) == pytest.approx(99, rel=0.02)
    assert 0 < ordinary.predicted_error < 0.05


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [((10.5, 1), "steps"), ((10, 11), "every"), ((10, 1, 0), "keep")],
)
def test_a_schedule_refuses_empty_and_fractional_values(arguments, subject):
    with refused(subject):
        Schedule(*arguments)


def test_at_most_a_quarter_of_the_kept_times_is_spared():
    assert [count_protected_times(keep) for keep in (1, 8, 40)] == [1, 2, 5]


def test_the_curve_touches_zero_at_tracked_profiles():
    snapshots = Schedule(10_000, 500, None, (0.05, 0.10)).snapshots()
    request = CurveRequest((0.02, 0.28))
    curve = error_curve("run", snapshots, assumed_prior(snapshots), request)
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
    assert curve.good_range == f"below 5 % for sigma_rel {shown}"


@pytest.mark.parametrize(
    ("losses", "ranges"),
    [
        ([0.5, 0.0, 0.5, 0.5, 0.5], []),  # a good point alone is none
        ([0.0, 0.0, 0.5, 0.0, 0.0], [(0.05, 0.1), (0.2, 0.25)]),
    ],
)
def test_good_ranges_have_no_worse_point(losses, ranges):
    curve = curve_of([0.05, 0.1, 0.15, 0.2, 0.25], losses)
    assert curve.ranges_below(0.01) == ranges


def curve_of(widths, losses):
    lost_gain = np.array(losses)
    ones = np.ones(lost_gain.size)
    return ErrorCurve(
        "x",
        1.0,
        np.array(widths),
        ones,
        ones,
        lost_gain,
        (0.1,),
    )


# --- proposals ------------------------------------------------------------------------------------


# --- the choice of the snapshots that a reconstruction uses if there are very many


def test_the_choice_is_spread_evenly_back_from_the_newest():
    of_one = power_functions(range(1, 101), (0.05,))
    of_other = power_functions((50, 100), (0.28,))
    *found, last = choose_evenly([*of_one, *of_other], 20)
    assert last == 101
    times = [of_one[index].t for index in found]
    assert times[-1] == 100
    gaps = np.diff(times)
    assert len(gaps) == 18
    assert {*gaps.tolist()} == {5.0, 6.0}
