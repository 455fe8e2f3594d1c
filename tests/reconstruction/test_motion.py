"""The fitted motion: from distances that are exact by construction, from simulated paths, and from too little."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from factories import exact_gamma, exact_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from posthoc_cli.profiles import Clock, PowerFunction, RecordedPowerFunction
from posthoc_cli.reconstruction import (
    Distance,
    Measurements,
    Motion,
    Steps,
    StoredAverage,
    measured_prior,
    reconstruct,
)
from posthoc_cli.reconstruction.motion import ASSUMED_STRETCH, MOST_SEGMENTS, PairDistance, fit_motion, influences
from posthoc_cli.tracker.layout import Tile, TileReader, lay_out
from posthoc_cli.tracker.running import RunningAverages

START = 2.0
TIMES = [float(t) for t in range(50, 1001, 50)]
EDGES = np.array([START, *TIMES])


def distance(p: PowerFunction, q: PowerFunction, motion: Motion, rounding: float = 0.0) -> PairDistance:
    """Of two averages, the later one first, by quadrature of the defining integrals."""
    total = rounding
    points = sorted({*motion.edges[motion.edges < p.t], q.t, p.t})
    for a, b in pairwise(points):
        piece = int(np.searchsorted(motion.edges, (a + b) / 2, side="right")) - 1
        for weight, name in ((motion.walk[piece], "tail"), (motion.noise[piece], "density")):

            def squared(s: float, name: str = name) -> float:
                return float(getattr(p, name)(s) - getattr(q, name)(s)) ** 2

            total += weight * integrate.quad(squared, a, b, epsabs=1e-15, epsrel=1e-10)[0]
    return PairDistance(p, q, total, rounding)


def neighbours(times: list[float], sigma_rels: tuple[float, ...], motion: Motion) -> list[PairDistance]:
    """What a tracker measures: between the profiles of one time, and to the two times before."""
    found = []
    for index, t in enumerate(times):
        now = [PowerFunction.from_sigma_rel(s, t) for s in sigma_rels]
        found += [distance(p, q, motion) for i, p in enumerate(now) for q in now[:i]]
        for earlier in times[max(index - 2, 0) : index]:
            found += [distance(p, PowerFunction.from_sigma_rel(s, earlier), motion) for p in now for s in sigma_rels]
    return found


def test_a_walk_is_found_again() -> None:
    """Smoothing pulls a little at jumps; everywhere else the walk is the one that made the distances."""
    times, edges = TIMES, EDGES
    walk = np.where(edges[1:] <= 500, 1.0, 0.1)
    found = fit_motion(START, times, neighbours(times, (0.05, 0.28), Motion(edges, walk, np.zeros(20))))
    assert set(edges) <= set(found.edges)
    walk, noise = found.on(edges)
    np.testing.assert_allclose(walk[2:8], 1.0, rtol=0.1)
    np.testing.assert_allclose(walk[13:], 0.1, rtol=0.1)
    assert noise[2:].max() < 0.05 * 50**2 * 0.1


def test_noise_is_told_from_a_walk() -> None:
    times, edges = TIMES, EDGES
    for sigma_rels in ((0.05, 0.28), (0.1,)):
        noisy = Motion(edges, np.full(20, 1e-6), np.ones(20))
        found = fit_motion(START, times, neighbours(times, sigma_rels, noisy))
        walk, noise = found.on(edges)
        np.testing.assert_allclose(noise[3:], 1.0, rtol=0.1)
        assert walk[3:].max() * 50**2 < 0.1


@given(st.lists(st.floats(-5, 0), min_size=3, max_size=3), st.floats(1e-6, 1e6))
@settings(max_examples=20, deadline=None)
def test_the_walk_scales_with_the_squares_and_is_never_negative_or_nought(logs: list[float], scale: float) -> None:
    times = [20.0, 50.0, 90.0]
    motion = Motion(np.array([START, *times]), 10 ** np.array(logs), np.zeros(3))
    distances = neighbours(times, (0.05, 0.28), motion)
    found = fit_motion(START, times, distances)
    scaled = [PairDistance(d.later, d.earlier, d.squared * scale, 0.0) for d in distances]
    again = fit_motion(START, times, scaled)
    assert np.all(found.walk > 0)
    assert np.all(found.noise >= 0)
    np.testing.assert_allclose(again.walk, found.walk * scale, rtol=1e-6)


def test_rounding_is_not_taken_for_motion() -> None:
    """Half of each squared distance is rounding of the stored partner."""
    times = [float(t) for t in range(50, 501, 50)]
    motion = Motion(np.array([START, *times]), np.ones(10), np.zeros(10))
    clean = neighbours(times, (0.05, 0.28), motion)
    rounded = [PairDistance(d.later, d.earlier, 2 * d.squared, d.squared) for d in clean]
    found = fit_motion(START, times, rounded)
    np.testing.assert_allclose(found.on(motion.edges)[0][2:], 1.0, rtol=0.1)


@pytest.mark.parametrize("times", [[50.0], [50.0, 100.0]])
@pytest.mark.parametrize("sigma_rels", [(0.1,), (0.05, 0.28)])
def test_few_snapshots_give_what_they_support(times: list[float], sigma_rels: tuple[float, ...]) -> None:
    motion = Motion(np.array([START, *times]), np.ones(len(times)), np.zeros(len(times)))
    distances = neighbours(times, sigma_rels, motion)
    if distances:
        found = fit_motion(START, times, distances)
        moved = np.sum(found.walk * np.diff(found.edges))
        assert moved == pytest.approx(times[-1] - START, rel=0.5)


def test_a_distance_of_averages_from_before_the_training_is_no_motion() -> None:
    found = fit_motion(START, [10.0, 20.0], [PairDistance(PowerFunction(5.0, 1.0), PowerFunction(3.0, 0.5), 1.0, 0.0)])
    assert (found.edges[0], found.edges[-1]) == (START, 20.0)
    np.testing.assert_array_equal(found.walk, np.zeros(found.edges.size - 1))
    np.testing.assert_array_equal(found.noise, np.zeros(found.edges.size - 1))


def test_too_much_and_too_little_weigh_the_same() -> None:
    """One pair, measured as 1, 1 and 8. The residuals (x - s_i)^2 / (x s_i) add up to the least where
    x^2 = sum_i s_i / sum_i (1 / s_i): between the harmonic mean and the mean.
    """
    p, q = PowerFunction.from_sigma_rel(0.05, 100.0), PowerFunction.from_sigma_rel(0.28, 100.0)
    found = fit_motion(START, [100.0], [PairDistance(p, q, squared, 0.0) for squared in (1.0, 8.0, 1.0)])
    assert distance(p, q, found).squared == pytest.approx((10 / (1 + 1 + 1 / 8)) ** 0.5, rel=1e-4)


def test_the_influence_of_each_segment_is_its_integral() -> None:
    """Of the walk and of the noise, for pairs of the same time, of neighbouring ones, and far apart."""
    edges = np.array([START, 20.0, 50.0, 90.0])
    pairs = [
        (PowerFunction.from_sigma_rel(s, t), PowerFunction.from_sigma_rel(u, v))
        for s, t, u, v in ((0.05, 90, 0.28, 90), (0.1, 90, 0.1, 50), (0.28, 90, 0.05, 20), (0.07, 50, 0.2, 35))
    ]
    distances = [PairDistance(p, q, 1.0, 0.0) for p, q in pairs]
    for part, found in enumerate(influences(edges, distances, None)[1:3]):
        for piece in range(3):
            only = np.where(np.arange(3) == piece, 1.0, 0.0)
            motion = Motion(edges, *((only, 0 * only) if part == 0 else (0 * only, only)))
            expected = [distance(p, q, motion).squared for p, q in pairs]
            np.testing.assert_allclose(found[:, piece], expected, rtol=1e-8, atol=1e-14)


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


def test_what_was_known_stays_where_no_distance_tells_more() -> None:
    """The network stood still in the second half; only the last snapshots are left, which say little of the first."""
    times = [float(t) for t in range(100, 1001, 100)]
    walk = np.where(np.array(times) <= 500, 1.0, 1e-6)
    motion = Motion(np.array([START, *times]), walk, np.zeros(10))
    found = fit_motion(START, times, neighbours(times, (0.05, 0.28), motion))
    left = neighbours(times[-1:], (0.05, 0.28), motion)
    without = fit_motion(START, times[-1:], left)
    kept = fit_motion(START, times[-1:], left, known=found)
    long, longer = (PowerFunction.from_sigma_rel(s, 1000.0) for s in (0.2, 0.27))
    true = distance(long, longer, motion).squared
    assert distance(long, longer, kept).squared == pytest.approx(true, rel=0.3)
    assert distance(long, longer, without).squared < true / 2  # it takes the quiet end for the whole


def test_a_network_that_begins_to_move_after_it_stood_still_is_seen() -> None:
    still = Motion(np.array([START, 100.0]), np.zeros(1), np.zeros(1))
    motion = Motion(np.array([START, 100.0, 200.0]), np.array([1e-9, 1.0]), np.zeros(2))
    now = neighbours([100.0, 200.0], (0.05, 0.28), motion)[1:]
    found = fit_motion(START, [100.0, 200.0], now, known=still)
    assert float(found.on(np.array([150.0, 151.0]))[0][0]) == pytest.approx(1, rel=0.3)


def test_a_motion_for_a_header_has_few_segments_and_moves_as_much() -> None:
    edges = np.arange(1.0, 302.0)
    motion = Motion(edges, np.linspace(1, 3, 300), np.linspace(0, 1, 300))
    short = motion.handed_on()
    assert short.walk.size == short.noise.size == short.edges.size - 1 == 96
    assert (short.edges[0], short.edges[-1]) == (1, 301)
    np.testing.assert_allclose(short.walk @ np.diff(short.edges), 600, rtol=1e-5)
    np.testing.assert_allclose(short.noise @ np.diff(short.edges), 150, rtol=1e-5)
    again = fit_motion(1.0, [301.0], [distance(*profiles(301.0), motion)], known=short)
    np.testing.assert_allclose(again.on(edges)[0], motion.walk, rtol=0.02)


def profiles(t: float) -> tuple[PowerFunction, PowerFunction]:
    return PowerFunction.from_sigma_rel(0.05, t), PowerFunction.from_sigma_rel(0.28, t)


def test_a_run_of_one_update_has_a_segment() -> None:
    """Nothing is known of what was before; the first update may have been anywhere since half its time."""
    found = fit_motion(10.0, [10.0], [PairDistance(PowerFunction(5.0, 10.0), PowerFunction(3.0, 10.0), 1.0, 0.0)])
    np.testing.assert_array_equal(found.edges, [5, 10])
    assert found.walk.size == found.noise.size == 1
    assert np.isfinite(found.walk[0])


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_segments_end_at_snapshots_the_last_one_too(count: int) -> None:
    times = np.linspace(40.0, 1000.0, count)
    motion = Motion(np.array([START, times[-1]]), np.ones(1), np.zeros(1))
    found = fit_motion(START, times.tolist(), neighbours([times[-1]], (0.05, 0.28), motion))
    assert found.edges[0] == START and found.edges.size == min(count, MOST_SEGMENTS) + 1
    assert set(found.edges[1:]) <= set(times)
    assert found.edges[-1] == times[-1]


def test_the_distance_to_the_weights_tells_how_fast_the_network_moves_within_an_interval() -> None:
    """One profile and one snapshot, of a simulated walk: without it, nothing would be known."""
    steps, size = 2000, 1000
    path = np.cumsum(np.random.default_rng(3).normal(size=(steps, size)), axis=0)
    exact = exact_weights(0.1, np.arange(1, steps + 1)) @ path
    profile = RecordedPowerFunction(exact_gamma(0.1), float(steps), 1.0, 1.0)
    measured = Measurements(float(exact @ exact), 0.0, (), float(np.sum((exact - path[-1]) ** 2)))
    prior = measured_prior([StoredAverage(profile, steps, 2.0**-23, measured, step_length=1.0)])
    assert prior.source == "measured"
    assert prior.motion.walk[-1] == pytest.approx(size, rel=0.4)


def test_weights_that_stand_still_have_no_motion() -> None:
    found = fit_motion(
        START, [50.0, 100.0], [PairDistance(PowerFunction(6.9, 100.0), PowerFunction(6.9, 50.0), 1e-30, 1e-30)]
    )
    assert np.all(np.isfinite(found.walk))
    prior = measured_prior([average(10.0, 0.1, 4.0, ()), average(20.0, 0.1, 4.0, (Distance(10.0, 0.1, 0.0, 0.0),))])
    result = reconstruct(
        [PowerFunction.from_sigma_rel(0.1, 20.0)], [PowerFunction.from_sigma_rel(0.2, 20.0)], prior=prior.of([1])
    )
    assert result.predicted_error[0] < 1e-6


# --- what headers tell -----------------------------------------------------------------------------


def average(
    t: float, sigma_rel: float, norm: float, distances: tuple[Distance, ...], rounding: float = 0.0
) -> StoredAverage:
    profile = RecordedPowerFunction(exact_gamma(sigma_rel), t, 1.0, 1.0)
    return StoredAverage(profile, int(t), 2.0**-23, Measurements(norm, rounding, distances))


def test_the_source_says_what_is_measured_and_what_is_assumed() -> None:
    alone = measured_prior([average(10.0, 0.1, 4.0, ())])
    assert alone.source == "assumed"
    two = measured_prior(
        [average(10.0, s, 4.0, (Distance(10.0, u, 0.5, 0.0),)) for s, u in ((0.05, 0.25), (0.25, 0.05))]
    )
    assert two.source == "measured"
    assert two.motion.edges[-1] == 10.0
    assert not two.motion.noise.any()
    unmeasured = StoredAverage(RecordedPowerFunction(6.9, 10.0, 1.0, 1.0), 10, 2.0**-23, None)
    assert measured_prior([unmeasured, average(10.0, 0.05, 4.0, ())]).source == "assumed"


def test_two_averages_of_one_profile_tell_nothing() -> None:
    """Their distance is rounding, or a mistake; no motion explains it, and the others count as without it."""
    twin = Distance(20.0, 0.1 * (1 + 1e-9), 5.0, 0.0)
    real = Distance(10.0, 0.1, 0.5, 0.0)
    with_twin, without = (
        measured_prior([average(10.0, 0.1, 4.0, ()), average(20.0, 0.1, 4.0, found)])
        for found in ((real, twin), (real,))
    )
    assert with_twin.source == without.source == "measured"
    np.testing.assert_array_equal(with_twin.motion.walk, without.motion.walk)
    alone = measured_prior([average(10.0, 0.1, 4.0, ()), average(20.0, 0.1, 8.0, (twin,))])
    assert alone.source == "assumed"
    np.testing.assert_array_equal(alone.motion.walk * 20.0, [ASSUMED_STRETCH**2 * 6.0])


def test_of_two_records_of_one_pair_the_later_one_counts() -> None:
    """Whichever of the two averages says it, with a sigma_rel that was computed elsewhere."""
    first, other = (Distance(10.0, s, squared, 0.0) for s, squared in ((0.25 * (1 + 1e-15), 3.0), (0.05, 0.5)))
    both = [average(10.0, 0.05, 4.0, (first,)), average(10.0, 0.25, 4.0, (other,))]
    single = [average(10.0, 0.05, 4.0, (first,)), average(10.0, 0.25, 4.0, ())]
    np.testing.assert_array_equal(measured_prior(both).motion.walk, measured_prior(both[::-1]).motion.walk)
    np.testing.assert_allclose(measured_prior(both).motion.walk, measured_prior(single).motion.walk, rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "step_length", "max_interval", "counts"),
    [(9.0, 1.0, 1.0, True), (None, 1.0, 1.0, False), (0.0, 1.0, 1.0, False), (9.0, 0.0, 1.0, False),
     (9.0, 1.04, 1.0, True), (9.0, 1.05, 1.0, False), (9.0, 1.0, 12.49, True), (9.0, 1.0, 12.51, False)],
)  # fmt: skip
def test_the_weights_count_where_they_are_much_shorter_than_the_average(
    weights: float | None, step_length: float, max_interval: float, counts: bool
) -> None:
    """They are an average over 12 steps or an interval; an eighth of sigma_rel 0.1 at time 1,000 is 12.5."""
    profile = RecordedPowerFunction(exact_gamma(0.1), 1000.0, 1.0, max_interval)
    measured = Measurements(4.0, 0.0, (), weights)
    prior = measured_prior([StoredAverage(profile, 100, 2.0**-23, measured, step_length)])
    assert prior.source == ("measured" if counts else "assumed")


@pytest.mark.parametrize("sigma_rel", [0.05, 0.28])
@pytest.mark.parametrize("steps", [9, 31, 201, 1001, 4001])
def test_the_rounding_of_updates_is_that_of_the_hooks_averages(steps: int, sigma_rel: float) -> None:
    """Means of 32 values, which are rounded at each, averages that are at each fold, and once more when read."""
    size = 2000
    generator = np.random.default_rng(0)
    model = torch.from_numpy(generator.normal(size=size).astype(np.float32))
    reader = TileReader.of_tensors(lay_out({"w": model}), {"w": model})
    averages, both = RunningAverages.none_yet((0.05, 0.28)), (exact_gamma(0.05), exact_gamma(0.28))
    gamma, exact = exact_gamma(sigma_rel), np.zeros(size)
    for k in range(1, steps + 1):
        model += torch.from_numpy(generator.normal(size=size).astype(np.float32) * 0.01)
        averages.update_(reader, {}, float(k), k)
        exact += (1 - ((k - 1) / k) ** (gamma + 1)) * (model.double().numpy() - exact)
    found = averages.values(Tile(0, 0, 0, size), both.index(gamma)).double().numpy()
    profile, measured = RecordedPowerFunction(gamma, float(k), 1.0, 1.0), Measurements(float(exact @ exact), 0.0)
    stored = StoredAverage(profile, k, 2.0**-23, measured, gammas=both)
    error = np.sum((found - exact) ** 2) / measured_prior([stored]).arithmetic[0]
    assert 0.5 < error < 1.6


def test_without_motion_or_without_distances_something_is_assumed() -> None:
    still = [average(10.0, s, 4.0, (Distance(10.0, u, 0.0, 0.0),)) for s, u in ((0.05, 0.25), (0.25, 0.05))]
    prior = measured_prior(still)
    assert prior.source == "measured"
    assert prior.motion.walk.max() < prior.arithmetic.max()
    zeros = measured_prior([replace(one, measurements=replace(one.measurements, norm=0.0)) for one in still])
    assert zeros.source == "measured"
    assert (zeros.motion.edges[-1], zeros.motion.walk.sum()) == (10.0, 0.0)
    alone = measured_prior([average(10.0, 0.1, 4.0, ())])
    assert alone.motion.edges[-1] == 10.0
    # Over the whole training the path has ASSUMED_STRETCH of the norm.
    walked = float(np.sum(alone.motion.walk * np.diff(alone.motion.edges)))
    assert walked == pytest.approx(ASSUMED_STRETCH**2 * 4.0)


# --- the error bar ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dominant", "scale"), [("rounding", 1e-3), ("rounding", 1e-4), ("rounding", 1e-6), ("walk", 1e-2)]
)
def test_the_error_bar_holds_whatever_dominates(dominant: str, scale: float) -> None:
    """Simulated walks of many elements, snapshots rounded to float16 or not at all.

    With a scale of 1e-6 hardly an element moves by a spacing of float16: all snapshots are rounded alike, and no
    combination of them is better than one. At 1e-4 it is in between.
    """
    steps, size, every = 2000, 3000, 100
    generator = np.random.default_rng(1)
    path = 1 + generator.uniform(0, 1, size) + np.cumsum(generator.normal(size=(steps, size)), axis=0) * scale
    cast = (lambda x: x.astype(np.float16).astype(float)) if dominant == "rounding" else lambda x: x
    averages, stored, exact = [], [], {}
    for t in range(every, steps + 1, every):
        for s in (0.05, 0.28):
            exact[t, s] = exact_weights(s, np.arange(1, t + 1)) @ path[:t]
        for s, other in ((0.05, 0.28), (0.28, 0.05)):
            x = exact[t, s]
            others = [(t, other, exact[t, other], 0.0)]
            others += [(t - every, q, cast(exact[t - every, q]), None) for q in (0.05, 0.28) if t > every]
            found = tuple(
                Distance(u, q, float(np.sum((x - y) ** 2)), float(np.sum((y - exact[u, q]) ** 2)) if r is None else r)
                for u, q, y, r in others
            )
            rounding = float(np.sum((cast(x) - x) ** 2))
            averages.append(average(float(t), s, float(x @ x), found, rounding))
            stored.append(cast(x))
    prior = measured_prior(averages)
    wanted = (0.03, 0.07, 0.15, 0.22)
    targets = [PowerFunction.from_sigma_rel(s, float(steps)) for s in wanted]
    result = reconstruct([a.profile.pure for a in averages], targets, prior=prior)
    for index, sigma_rel in enumerate(wanted):
        truth = exact_weights(sigma_rel, np.arange(1, steps + 1)) @ path
        actual = np.linalg.norm(result.coefficients[:, index] @ stored - truth) / np.linalg.norm(truth)
        assert 0.7 < actual / result.predicted_error[index] < 1.4
