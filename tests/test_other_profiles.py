"""Profiles that one may ask for, against integrals of their densities and against averages simulated here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import mpmath
import numpy as np
import pytest
from checking import refused
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from posthoc_cli.profiles import ClassicalEMA, Clock, ClockRecorder, Profile, StepWindow, Tabulated, Uniform

# --- the clock -----------------------------------------------------------------------------------

UNEVEN = Clock((10, 40, 100), (5.0, 80.0, 90.0))
"""Steps of half a unit, then of two and a half, then of a sixth."""


def uneven_time(step: int) -> float:
    if step <= 10:
        return step / 2
    return 5 + (step - 10) * 2.5 if step <= 40 else 80 + (step - 40) / 6


def test_the_step_clock_is_the_identity() -> None:
    at = np.array([0.0, 0.5, 1.0, 3.0, 12345.0, 1e9])
    for clock in (Clock.of_steps(), Clock((10, 20), (10, 20)), Clock(np.arange(1, 50), np.arange(1, 50))):
        np.testing.assert_array_equal(clock.step_at(at), at)
        np.testing.assert_array_equal(clock.time_at(at), at)
        np.testing.assert_array_equal(clock.steps_per_time(at), [0, 1, 1, 1, 1, 1])


def test_steps_are_as_long_as_the_known_pairs_around_them_say() -> None:
    steps = np.arange(101)
    times = np.array([uneven_time(step) for step in steps])
    np.testing.assert_allclose(UNEVEN.step_at(times), steps, rtol=1e-14)
    np.testing.assert_allclose(UNEVEN.time_at(steps), times, rtol=1e-14)
    np.testing.assert_allclose(UNEVEN.step_at([[-3.0, 0.0], [100.0, 150.0]]), [[0, 0], [160, 460]])
    np.testing.assert_allclose(UNEVEN.steps_per_time([-1, 0, 5, 5.1, 80, 80.1, 90, 91]), [0, 0, 2, 0.4, 0.4, 6, 6, 6])


@pytest.mark.parametrize(
    ("steps", "times"),
    [((), ()), ((1, 1), (1, 2)), ((0, 1), (0, 1)), ((1,), (math.inf,)), ((1, 2), (1,)), ((1, 2), (2, 1)), (3, 4)],
)
def test_a_clock_that_does_not_go_forward_is_refused(steps: tuple[float, ...], times: tuple[float, ...]) -> None:
    with refused("clock"):
        Clock(steps, times)


# --- recording a clock ---------------------------------------------------------------------------


def recorded(times: np.ndarray) -> ClockRecorder:
    recorder = ClockRecorder()
    for step, t in enumerate(times.tolist(), 1):
        recorder = recorder.add(step, t)
    return recorder


def worst(knots: Sequence[tuple[int, float]], times: np.ndarray) -> float:
    """By how many steps the knots are wrong at most, at the times of all steps."""
    steps, knot_times = zip(*knots, strict=True)
    return float(np.abs(Clock(steps, knot_times).step_at(times) - np.arange(1, len(times) + 1)).max())


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=200))
def test_a_recorded_clock_is_right_within_half_a_step(intervals: list[float]) -> None:
    times = np.cumsum(intervals)
    times = times[np.diff(times, prepend=0) > 0]
    recorder = recorded(times)
    for count in {1, len(times) // 2 + 1, len(times)}:
        knots = recorder.knots_until(count, float(times[count - 1]))
        if knots:
            assert knots[-1] == (count, times[count - 1])
            assert all(times[step - 1] == t for step, t in knots)
            assert worst(knots, times[:count]) <= 0.5 + 1e-6
    again = ClockRecorder.of_state(recorder.state())
    assert again.state() == recorder.state()


def lengths(name: str, steps: int = 50_000) -> np.ndarray:
    """How long each step is."""
    generator = np.random.default_rng(0)
    if name == "alternating":
        return np.where(np.arange(steps) // 20 % 2, 256.0, 64.0)
    return {
        "20 % up and down": generator.uniform(0.8, 1.2, steps),
        "1 to 1000": generator.integers(1, 1001, steps).astype(np.float64),
        "growing": np.linspace(1, 16, steps),
        "heavy tail": np.exp(generator.normal(0, 1, steps)),
    }[name]


@pytest.mark.parametrize(
    ("name", "steps_off"),
    [("20 % up and down", 3), ("1 to 1000", 15), ("growing", 0.5), ("heavy tail", 30), ("alternating", 20)],
)
def test_256_knots_are_enough_for_any_clock(name: str, steps_off: float) -> None:
    """The clock of 50,000 steps is right within so many."""
    times = np.cumsum(lengths(name))
    recorder = recorded(times)
    knots = recorder.knots_until(recorder.step, recorder.t)
    assert len(knots) <= 256
    assert worst(knots, times) <= steps_off


@pytest.mark.parametrize("interrupted_at", [1, 100, 9999, 10_000, 25_000])
def test_recording_continues_exactly_from_a_state_and_closely_from_knots(interrupted_at: int) -> None:
    times = np.cumsum(lengths("20 % up and down", 30_000))
    whole, part = recorded(times), recorded(times[:interrupted_at])
    exact = ClockRecorder.of_state(part.state())
    near = ClockRecorder.of_knots(part.knots_until(part.step, part.t))
    for step, t in enumerate(times[interrupted_at:].tolist(), interrupted_at + 1):
        exact = exact.add(step, t)
        near = near.add(step, t)
    assert exact.state() == whole.state()
    knots = near.knots_until(near.step, near.t)
    assert len(knots) <= 256
    assert worst(knots, times) <= 3


def test_a_recorder_continues_from_more_knots_than_it_keeps() -> None:
    knots = [(step, step + 0.2 * (step % 3)) for step in range(1, 1001)]
    recorder = ClockRecorder.of_knots(knots)
    recorder = recorder.add(1001, 2000.0)
    recorder = recorder.add(1002, 2001.0)
    assert len(recorder.knots_until(1002, 2001.0)) <= 256
    assert len(ClockRecorder.of_state(recorder.state()).knots_until(1002, 2001.0)) <= 256


def test_steps_of_one_length_have_no_turn_however_often_a_run_goes_on() -> None:
    recorder = ClockRecorder()
    for step in range(1, 1001):
        recorder = recorder.add(step, 7.0 * step)
        if step % 100 == 0:
            recorder = ClockRecorder.of_knots(recorder.knots_until(step, 7.0 * step))
    assert recorder.knots_until(1000, 7000.0) == ((1000, 7000.0),)


def test_steps_of_one_length_after_a_turn_have_no_further_one() -> None:
    """The slope of a run that goes on from its knots is that of the last piece, not of all training."""
    recorder = ClockRecorder()
    times = [3.0 * step if step <= 100 else 300 + 7.0 * (step - 100) for step in range(1, 1001)]
    for step, t in enumerate(times, 1):
        recorder = recorder.add(step, t)
        if step % 50 == 0:
            recorder = ClockRecorder.of_knots(recorder.knots_until(step, t))
    assert recorder.knots_until(1000, times[-1]) == ((100, 300.0), (1000, times[-1]))


def test_the_step_clock_needs_no_knots_and_any_other_does() -> None:
    assert recorded(np.arange(1.0, 101)).knots_until(100, 100.0) == ()
    assert recorded(np.arange(2.0, 201, 2)).knots_until(100, 200.0) == ((100, 200.0),)


def test_the_knot_that_goes_is_the_one_that_is_missed_least() -> None:
    """The first one too, whose line begins at step 0 and time 0."""
    turns = [(10 * k, 10.0 * k + (3 if k % 2 else -3)) for k in range(2, 259)]
    turns[:2] = (20, 20.1), (30, 30.2)  # 1/30 step from the line
    turns[50] = (520, 523.1)  # 0.1 step
    kept = [knot for knot in turns if knot != (20, 20.1)]
    assert list(ClockRecorder.of_knots(turns).knots_until(*turns[-1])) == kept


BEGUN = [0.5, 0.0, math.inf, 0, 0]
FULL = [0.5, 0.9, 1.1, *(number for step in range(1, 257) for number in (step, float(step)))]


@pytest.mark.parametrize("state", [BEGUN, FULL, [0.5, 1.0, 1.0, 5, 5.0], [7.25, 0.0, 2.0, 5, 2.5, 6, 2**62]])
def test_a_recorder_continues_from_a_state(state: list[float]) -> None:
    recorder = ClockRecorder.of_state(state)
    assert recorder.state() == state
    assert (recorder.step, recorder.t) == (state[-2], state[-1])


def test_a_recorder_begins_at_step_and_time_0() -> None:
    recorder = ClockRecorder()
    assert (recorder.step, recorder.t, recorder.state()) == (0, 0.0, BEGUN)


@pytest.mark.parametrize(
    "state",
    [
        {},
        tuple(BEGUN),
        BEGUN[:3],
        BEGUN[:4],
        [*BEGUN, 1],
        [*FULL, 257],
        [*FULL, 257, 257.0],
        [*FULL, *FULL[3:]],
        [*BEGUN[:4], "0"],
        [True, *BEGUN[1:]],
        [0.5, 0.9, 1.1, 2**63, 4.0],
        [0.5, 0.9, 1.1, 4, 2**63],
        [0.49, 0.9, 1.1, 4, 4.0],
        [math.inf, 0.9, 1.1, 4, 4.0],
        [math.nan, 0.9, 1.1, 4, 4.0],
        [0.5, -0.1, 1.1, 4, 4.0],
        [0.5, 1.2, 1.1, 4, 4.0],
        [0.5, 0.9, 1.1, 4.0, 4.0],
        [0.5, 0.9, 1.1, 0, 4.0],
        [0.5, 0.9, 1.1, 4, 0.0],
        [0.5, 0.9, 1.1, 4, math.inf],
        [0.5, 0.9, 1.1, 4, math.nan],
        [0.5, 0.9, 1.1, 4, 4.0, 4, 5.0],
        [0.5, 0.9, 1.1, 4, 4.0, 5, 4.0],
        [0.5, 0.9, 1.1, 4, 4.0, 3, 5.0],
        [0.5, 0.9, 1.1, 4, 4.0, 5, 3.0],
    ],
)
def test_what_is_no_state_is_refused(state: list[float]) -> None:
    with refused("clock", "must be a list"):
        ClockRecorder.of_state(state)


# --- other profiles ------------------------------------------------------------------------------

# Each with the times at which its density jumps or bends.
OTHERS: dict[str, tuple[Profile, list[float]]] = {
    "classical": (ClassicalEMA(0.98, 90.0, Clock.of_steps()), []),
    "classical, uneven": (ClassicalEMA(0.97, 90.0, UNEVEN), [5, 80]),
    "classical, late": (ClassicalEMA(0.97, 85.0, UNEVEN, start=3.0), [3, 5, 80, 85]),
    "classical, short": (ClassicalEMA(0.5, 90.0, Clock((30,), (90,))), []),
    "window": (StepWindow(30, 90.0, Clock.of_steps()), [60]),
    "window, uneven": (StepWindow(65, 85.0, UNEVEN), [5, 80, 85]),
    "uniform": (Uniform(20.0, 70.0), [20, 70]),
    "tabulated": (Tabulated((2, 10, 11, 70, 90), (1, 5, 0, 0.5, 2)), [2, 10, 11, 70]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_tail_is_the_integral_of_the_density(name: str) -> None:
    profile, kinks = OTHERS[name]
    for s in (0.0, 1.0, 3.0, 5.5, 10.3, 33.0, 69.0, 81.0, 89.0):
        edges = [s, *(kink for kink in kinks if kink > s), 90.0]
        spans = itertools.pairwise(edges)
        mass = sum(integrate.quad(profile.density, a, b, epsabs=1e-13, epsrel=1e-10, limit=200)[0] for a, b in spans)
        before_start = isinstance(profile, ClassicalEMA) and s < profile.start
        at_once = 1 - profile.tail(profile.start) if before_start else 0.0
        assert mass + at_once == pytest.approx(float(profile.tail(s)), abs=1e-11)


@pytest.mark.parametrize("name", OTHERS)
def test_times_of_any_dtype_are_computed_in_float64(name: str) -> None:
    profile, _ = OTHERS[name]
    times = np.array([0.0, 1.0, 3.0, 60.0, 69.0, 90.0, 97.0])
    for method in (profile.density, profile.tail):
        found = method(times.astype(np.float32))
        assert np.asarray(found).dtype == np.float64
        np.testing.assert_array_equal(found, method(times))


@pytest.mark.parametrize(
    ("profile", "start", "end"),
    [
        (ClassicalEMA(0.97, 85.0, UNEVEN, start=3.0), 3.0, 85.0),
        (StepWindow(30, 90.0, Clock.of_steps()), 60.0, 90.0),
        (Uniform(20.0, 70.0), 20.0, 70.0),
    ],
)
def test_a_density_is_that_of_a_span_open_on_the_left(profile: Profile, start: float, end: float) -> None:
    assert profile.density(start) == 0
    assert profile.density(np.nextafter(start, end)) > 0
    assert profile.density(end) > 0
    assert profile.density(np.nextafter(end, 1e9)) == 0


@pytest.mark.parametrize("name", OTHERS)
def test_no_profile_has_mass_outside_the_run(name: str) -> None:
    profile, _ = OTHERS[name]
    np.testing.assert_array_equal(profile.tail([[-5.0, -1e-9], [90.0, 1e6]]), [[1, 1], [0, 0]])
    np.testing.assert_array_equal(profile.density([[-5.0, 0.0], [90.1, 1e6]]), np.zeros((2, 2)))


def simulated_weights(decay: float, steps: int, first: int = 1) -> np.ndarray:
    """What x <- decay x + (1 - decay) theta_k, from x = theta_first, leaves on theta_0 .. theta_steps."""
    weights = np.zeros(steps + 1)
    weights[first] = 1.0
    for step in range(first + 1, steps + 1):
        weights *= decay
        weights[step] += 1 - decay
    return weights


def later_weights(weights: np.ndarray) -> np.ndarray:
    return np.append(np.cumsum(weights[::-1])[::-1], 0.0)[1:]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.9999, 1 - 1e-12, 1e-3])
@pytest.mark.parametrize("first", [1, 7])
def test_the_classical_profile_is_what_its_recursion_leaves(decay: float, first: int) -> None:
    expected = later_weights(simulated_weights(decay, 100, first))
    for clock, time in ((Clock.of_steps(), float), (UNEVEN, uneven_time)):
        times = np.array([time(step) for step in range(101)])
        profile = ClassicalEMA(decay, times[-1], clock, start=times[first])
        np.testing.assert_allclose(profile.tail(times), expected, rtol=1e-12, atol=1e-15)
        whole = ClassicalEMA(decay, times[-1], clock)
        np.testing.assert_allclose(whole.tail(times[1:]), later_weights(simulated_weights(decay, 100))[1:], rtol=1e-12)


def test_a_decay_next_to_one_keeps_its_digits() -> None:
    decay = 1 - 1e-12
    with mpmath.workdps(50):
        exact = [float(1 - mpmath.mpf(decay) ** n) for n in (1, 1000, 10**9)]
    tail = ClassicalEMA(decay, 1e9, Clock.of_steps()).tail([1e9 - 1, 1e9 - 1000, 0.0])
    np.testing.assert_allclose(tail, exact, rtol=1e-13)


@pytest.mark.parametrize("steps", [1, 30, 100])
def test_a_window_weighs_each_of_its_steps_the_same(steps: int) -> None:
    weights = np.zeros(101)
    weights[-steps:] = 1 / steps
    for clock, time in ((Clock.of_steps(), float), (UNEVEN, uneven_time)):
        times = np.array([time(step) for step in range(101)])
        profile = StepWindow(steps, times[-1], clock)
        np.testing.assert_allclose(profile.tail(times), later_weights(weights), rtol=1e-12, atol=1e-12)
        assert profile.start == pytest.approx(time(100 - steps), abs=1e-12)


@given(st.data())
def test_tails_fall_from_one_to_zero(data: st.DataObject) -> None:
    positive = st.floats(1e-3, 1e3)
    gaps = data.draw(st.lists(st.tuples(positive, positive), min_size=1, max_size=6))
    steps, times = np.cumsum(gaps, axis=0).T
    clock, t = Clock(steps, times), float(times[-1])
    decay = data.draw(st.floats(0, 1, exclude_min=True, exclude_max=True))
    values = data.draw(st.lists(st.floats(0, 1e300), min_size=len(times), max_size=len(times)))
    profiles = [
        ClassicalEMA(decay, t, clock, start=t * data.draw(st.floats(0, 1))),
        Uniform(t * data.draw(st.floats(0, 0.99)), t),
        Tabulated([0, *times], [1e-3, *values]),
    ]
    if steps[-1] >= 1:
        profiles.append(StepWindow(data.draw(st.integers(1, int(steps[-1]))), t, clock))
    at = np.sort(np.concatenate((np.linspace(-t, 1.5 * t, 101), times, np.nextafter(times, 0))))
    for profile in profiles:
        tail = profile.tail(at)
        # Rounding in a clock's step number, up to 1e-16 of it, is all that may lift a tail.
        assert np.all(np.diff(tail) <= 1e-12)
        assert np.all((tail >= 0) & (tail <= 1))
        assert tail[0] == 1
        assert np.all(tail[at >= t] == 0)
        assert np.all(profile.density(at) >= 0)


def test_tabulated_densities_may_have_any_scale() -> None:
    wanted = Tabulated((0, 50, 100), (0, 1, 0.25))
    for scale in (1e-300, 3.0, 1e307):
        found = Tabulated((0, 50, 100), (0, scale, scale / 4))
        np.testing.assert_allclose(found.tail([10, 50, 99.999]), wanted.tail([10, 50, 99.999]), rtol=1e-14)
        np.testing.assert_allclose(found.density([10, 50, 99]), wanted.density([10, 50, 99]), rtol=1e-14)
    assert wanted.tail(50) == pytest.approx(50 * 1.25 / (50 * 1 + 50 * 1.25))
    last = integrate.quad(wanted.density, 99.999, 100, epsabs=0)[0]
    assert wanted.tail(99.999) == pytest.approx(last, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "subject"),
    [
        (lambda: ClassicalEMA(1.0, 5.0, Clock.of_steps()), "beta"),
        (lambda: ClassicalEMA(0.0, 5.0, Clock.of_steps()), "beta"),
        (lambda: ClassicalEMA(0.9, 5.0, Clock.of_steps(), start=6.0), "start"),
        (lambda: ClassicalEMA(0.9, 0.0, Clock.of_steps()), "start"),
        (lambda: ClassicalEMA(0.9, math.inf, Clock.of_steps()), "start"),
        (lambda: Uniform(5.0, math.inf), "uniform"),
        (lambda: Uniform(5.0, 5.0), "uniform"),
        (lambda: Uniform(-1.0, 5.0), "uniform"),
        (lambda: StepWindow(0, 5.0, Clock.of_steps()), "window"),
        (lambda: StepWindow(6, 5.0, Clock.of_steps()), "window"),
        (lambda: Tabulated((1,), (1,)), "profile"),
        (lambda: Tabulated((1, 2), (1, 2, 3)), "profile"),
        (lambda: Tabulated((1, 1), (1, 2)), "profile"),
        (lambda: Tabulated((-1, 1), (1, 2)), "profile"),
        (lambda: Tabulated((0, 1), (1, -2)), "profile"),
        (lambda: Tabulated((0, 1), (1, math.nan)), "profile"),
        (lambda: Tabulated((0, 1), (0, 0)), "profile"),
        (lambda: Tabulated((0, 5e-324, 1e300), (1, 0, 0)), "profile"),
    ],
)
def test_an_impossible_profile_is_refused(make: Callable[[], Profile], subject: str) -> None:
    with refused(subject):
        make()
