"""Few updates in an interval are a sum, and a clock may run on while nothing is trained: against explicit sums."""

from __future__ import annotations

import numpy as np
import pytest
from factories import exact_gamma, exact_weights, solved, squared_error

from posthoc_cli.profiles import Clock, PowerFunction
from posthoc_cli.reconstruction import MinimumVariance, Motion, Prior, Steps
from posthoc_cli.reconstruction.basis import FEW
from posthoc_cli.reconstruction.motion import PairDistance, fit_motion


def simulated_square(c, snapshots, sigma_rel, updates, rate):  # type: ignore[no-untyped-def]
    """E |error|^2 of a walk that moves by `rate` from each update to the next: a sum over updates, from the weights."""
    made = np.zeros(updates.size)
    for coefficient, (s, t) in zip(c, snapshots, strict=True):
        count = int(np.searchsorted(updates, t, side="right"))
        made[:count] += coefficient * exact_weights(s, updates[:count])
    missed = made - exact_weights(sigma_rel, updates)
    after = np.cumsum(missed[::-1])[::-1]  # what an increment at update k shifts: all values from k on
    return float(rate @ after[1:] ** 2)


@pytest.mark.parametrize("noise", [0.0, 5.0])
@pytest.mark.parametrize(("every", "stride"), [(10, 10), (20, 10), (3, 1)])
def test_a_snapshot_at_every_update_or_every_few_makes_averages_to_rounding(
    every: int, stride: int, noise: float
) -> None:
    steps = every * 40
    updates = np.arange(stride, steps + 1, stride, dtype=np.float64)
    stored = [(s, float(t)) for t in range(every, steps + 1, every) for s in (0.05, 0.28)]
    snapshots = [PowerFunction(exact_gamma(s), t) for s, t in stored]
    motion = Motion(np.array([float(stride), steps]), np.array([2.0]), np.array([noise]))
    tiny = np.full(len(snapshots), 1e-14)
    prior = Prior(motion, tiny, 0 * tiny, np.ones(len(snapshots)), "measured", Steps(Clock.of_steps(), stride))
    target = PowerFunction(exact_gamma(0.15), float(steps))
    solver = MinimumVariance(snapshots, prior, target.t)
    c = solved(solver, target)
    true = simulated_square(c, stored, 0.15, updates, np.full(updates.size - 1, 2.0 * stride))
    expected = squared_error(solver, c, target) - 1e-14 * float(c @ c)
    if noise == 0:
        assert expected == pytest.approx(true, rel=0.02, abs=1e-13)
    # Two profiles and an update or two between snapshots: as many unknowns as values.
    assert true < (1e-10 if every <= 2 * stride else 1e-3)


@pytest.mark.parametrize("count", [FEW, FEW + 1, 4 * FEW])
def test_the_sum_and_the_integral_agree_where_one_gives_way_to_the_other(count: int) -> None:
    """Two snapshots, `count` updates apart: the expected square against the sum over updates."""
    updates = np.arange(1.0, 11 * count + 1)
    stored = [(0.1, 10.0 * count), (0.1, 11.0 * count)]
    snapshots = [PowerFunction(exact_gamma(s), t) for s, t in stored]
    motion = Motion(np.array([1.0, 11.0 * count]), np.ones(1), np.zeros(1))
    prior = Prior(motion, np.zeros(2), np.zeros(2), np.ones(2), "measured", Steps(Clock.of_steps()))
    target = PowerFunction(exact_gamma(0.06), 11.0 * count)
    solver = MinimumVariance(snapshots, prior, target.t)
    c = solved(solver, target)
    true = simulated_square(c, stored, 0.06, updates, np.ones(updates.size - 1))
    assert squared_error(solver, c, target) == pytest.approx(true, rel=0.1)


def test_a_pause_of_the_clock_is_no_movement() -> None:
    """1,000 steps, a pause as long as they took, and 1,000 more: how one combination misses, against the sum."""
    times = np.concatenate((np.arange(1.0, 1001), np.arange(2001.0, 3001)))
    clock = Clock((1000, 1001, 2000), (1000.0, 2001.0, 3000.0))
    stored = [(s, t) for t in (1000.0, 2500.0, 3000.0) for s in (0.05, 0.28)]
    snapshots = [PowerFunction(exact_gamma(s), t) for s, t in stored]
    motion = Motion(np.array([1.0, 3000.0]), np.ones(1), np.zeros(1))
    prior = Prior(motion, np.zeros(6), np.zeros(6), np.ones(6), "measured", Steps(clock))
    target = PowerFunction(exact_gamma(0.2), 3000.0)
    solver = MinimumVariance(snapshots, prior, 3000.0)
    for c in (solved(solver, target), np.array([0.2, 0.3, -0.1, 0.2, 0.1, 0.3])):
        true = simulated_square(c, stored, 0.2, times, np.ones(1999))
        assert squared_error(solver, c, target) == pytest.approx(true, rel=0.02)
    # Without the clock the pause counts as half of the training.
    blind = MinimumVariance(snapshots, Prior(motion, np.zeros(6), np.zeros(6), np.ones(6), "measured"), 3000.0)
    assert squared_error(blind, c, target) != pytest.approx(true, rel=0.1)


def test_the_rate_of_a_walk_is_found_where_a_snapshot_is_an_update() -> None:
    """Squared distances of averages one update apart, by the weights: the walk that made them is found again."""
    updates = np.arange(10.0, 401.0, 10.0)
    distances = []
    for index in range(1, updates.size):
        rows = []
        for s, last in ((0.05, index), (0.28, index), (0.05, index - 1)):
            row = np.zeros(updates.size)
            row[: last + 1] = exact_weights(s, updates[: last + 1])
            rows.append((exact_gamma(s), float(updates[last]), np.cumsum(row[::-1])[::-1][1:]))
        (a, t, first), others = rows[0], rows[1:]
        for b, u, second in others:
            distances.append(
                PairDistance(PowerFunction(a, t), PowerFunction(b, u), 30.0 * float(np.sum((first - second) ** 2)), 0.0)
            )
    found = fit_motion(10.0, updates.tolist(), distances, Steps(Clock.of_steps(), 10))
    np.testing.assert_allclose(found.on(updates)[0], 3.0, rtol=0.05)
