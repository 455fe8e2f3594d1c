"""Errors are as predicted, and no larger than the published method's, with few snapshots or sudden
motion.

Walks of known rates and a real training are tracked; every average made from the directory is
compared with the float64 sum over all updates.
"""

from itertools import product

import numpy as np
import pytest
import torch
from checking import refused
from factories import Span, exact_weights
from saved import store
from trained import train

from posthoc_cli import Decay, PostHocEMA, Run, synthesize

SIZE = 400
STEPS = 4000
STRIDE = 10
WIDTHS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.28)


def cosine(passed):
    return np.cos(np.pi * passed / 2) ** 2


def frozen(passed):
    return np.where(passed < 0.5, 1.0, 0.0)


def restarts(passed):
    of_cycle = 4 * passed % 1
    return 1.0 - 0.97 * of_cycle


def walk(speed, steps=STEPS, seed=0):
    """Return weights of norm about 1 that move a quarter of that in a random walk: [steps,
    elements].

    `speed` is how fast, by the part of the training that has passed."""
    generator = np.random.default_rng(seed)
    passed = np.arange(steps) / steps
    speeds = speed(passed)
    moves = generator.normal(size=(steps, SIZE))
    moves *= speeds[:, None]
    variance = SIZE * np.sum(speeds**2)
    moves *= 0.25 / np.sqrt(variance)
    place = generator.normal(size=SIZE) / SIZE**0.5
    path = place + np.cumsum(moves, axis=0)
    return path.astype(np.float32)


def wave(periods, amplitude, phase=1.0):
    """Return weights of norm about 1 that swing in one direction."""
    random = np.random.default_rng(0)
    place, direction = random.normal(size=(2, SIZE)) / SIZE**0.5
    turns = 2 * np.pi * periods * np.arange(1, STEPS + 1) / STEPS
    distance = amplitude * np.sin(turns + phase)
    path = place + np.outer(distance, direction)
    return path.astype(np.float32)


def track(folder, path, stride=STRIDE, times=None, **options):
    _, size = path.shape
    model = torch.nn.Linear(size, 1, bias=False)
    settings = {
        "update_every": stride,
        "checkpoint_every": 200,
        "max_checkpoints": None,
        **options,
    }
    clock = [None] * len(path)
    if times is not None:
        clock = times.tolist()
        settings["t_unit"] = "seconds"
    rows = torch.from_numpy(path)
    with PostHocEMA.from_model(model, folder, **settings) as tracker:
        for row, t in zip(rows, clock, strict=True):
            model.weight.data[0] = row
            tracker.update_(model, t)
    return Run(folder)


def made(run, wanted, method="minvar"):
    """Return averages, shape [targets, elements], and their predicted errors."""
    plan = run.plan(wanted, method=method, dtype="float64")
    ((_, tensors),) = synthesize(plan)
    averages = torch.stack(tensors).flatten(1)
    predicted = [plan.predicted_error(k) for k in range(len(wanted))]
    return averages.numpy(), np.array(predicted)


def true(path, stride=STRIDE, times=None):
    """Return the exact averages of WIDTHS over all updates: shape [targets, elements]."""
    if times is None:
        times = np.arange(1.0, len(path) + 1)
    shares = [exact_weights(width, times[stride - 1 :: stride]) for width in WIDTHS]
    return np.array(shares) @ updates(path, stride)


def updates(path, stride=STRIDE):
    return path[stride - 1 :: stride].astype(np.float64)


def errors(found, truth):
    apart = np.linalg.norm(found - truth, axis=1)
    return apart / np.linalg.norm(truth, axis=1)


def judged(run, truth, wanted=WIDTHS):
    """Return the errors, the published method's errors, and the predicted errors."""
    found, predicted = made(run, wanted)
    published, _ = made(run, wanted, "paper")
    return errors(found, truth), errors(published, truth), predicted


def assert_honest(actual, theirs, predicted, within=3):
    """Require errors no larger than the published method's and than predicted, up to the last digit
    of float32."""
    assert np.all(actual <= 1.05 * theirs + 3e-8)
    assert np.all(actual < within * predicted + 3e-8)


def assert_near(actual, predicted, factor):
    """Require errors that are as predicted up to a factor."""
    ratios = actual / predicted
    assert ratios.max() < factor, ratios
    assert ratios.min() > 1 / factor, ratios


def check(folder, path, within=3, times=None, **options):
    run = track(folder, path, times=times, **options)
    truth = true(path, times=times)
    assert_honest(*judged(run, truth), within)


EXACT = {"checkpoint_dtype": "float32"}


@pytest.mark.parametrize(
    ("speed", "options"),
    [
        (cosine, {"max_checkpoints": 1}),
        (frozen, {"max_checkpoints": 2, "sigma_rels": (0.05, 0.10)}),
    ],
)
def test_with_few_times_left(speed, options, tmp_path):
    """From the motion between the survivors alone, predictions were up to 200 times too small."""
    path = walk(speed)
    run = track(tmp_path, path, **options)
    actual, theirs, predicted = judged(run, true(path))
    assert_honest(actual, theirs, predicted, 4)
    # one realisation's error is within 10 % of its expectation; the rest is the motion
    ratio = np.median(actual / predicted)
    assert ratio == pytest.approx(1, abs=0.7)


def test_an_oscillation_in_step_with_the_snapshots(tmp_path):
    """It looks like a standstill: errors were up to 47 times the predicted."""
    check(tmp_path, wave(20, 1.0, 0.0), 2.5, checkpoint_dtype="float16")


@pytest.mark.parametrize("periods", [2.5, 200])
def test_slow_oscillations_and_one_of_two_updates(periods, tmp_path):
    """Treated as a walk, errors were up to 110 times the published method's."""
    check(tmp_path, wave(periods, 0.5), **EXACT)


def test_a_pause_of_the_clock(tmp_path):
    """In the middle, for as long as the training takes."""
    times = np.arange(1.0, STEPS + 1)
    times[STEPS // 2 :] += STEPS
    check(tmp_path, walk(cosine), times=times, **EXACT)


def test_many_snapshots(tmp_path):
    """Coefficients fit the projections: without the leverage of these, errors are up to 1.8 times
    the predicted."""
    check(tmp_path, walk(restarts, 2000), 1.4, checkpoint_every=50, **EXACT)


def test_a_real_training(tmp_path):
    path = train().astype(np.float32)
    run = track(tmp_path, path, checkpoint_every=100, checkpoint_dtype="bfloat16")
    actual, theirs, predicted = judged(run, true(path))
    assert_honest(actual, theirs, predicted, 1.8)
    assert np.all(actual > 0.3 * predicted)


# --- what else is predicted


def test_the_error_of_a_decay_that_begins_steeply_is_not_overestimated(tmp_path):
    """A 1-sqrt decay's density grows without bound at its start; its predicted error was 2 to 3
    times too large."""
    path = walk(np.ones_like)
    run = track(tmp_path, path, checkpoint_every=100, **EXACT)
    found, predicted = made(run, [Decay("1-sqrt", 0.2)])
    seen = np.arange(STRIDE, STEPS + 1, STRIDE)
    decayed = 5 * seen / STEPS - 4
    until = np.sqrt(decayed.clip(0, 1))
    masses = np.diff(until, prepend=0.0)
    truth = masses @ updates(path)
    assert_near(errors(found, truth[None]), predicted, 2)


def test_a_snapshot_at_every_update_is_used(tmp_path):
    """Motion between two updates contributes to no average."""
    path = walk(cosine, 600)
    run = track(tmp_path, path, checkpoint_every=STRIDE, **EXACT)
    actual, theirs, predicted = judged(run, true(path))
    assert np.all(actual <= 1.05 * theirs + 3e-8)  # the last digit of float32 aside
    assert np.all(predicted < 4 * actual + 1e-7)
    assert actual.max() < 2e-6


def test_weights_drawn_anew_right_after_a_snapshot_are_expected(tmp_path):
    """Distances show the moment, so that errors are as predicted, also those of averages over the
    time after it. A search for the motion that starts with the first estimate of the noise gives
    errors of 9.5 times the predicted ones, and 7.5 times the published method's."""
    path = walk(cosine, seed=1)
    random = np.random.default_rng(2)
    jump = 0.15 * random.normal(size=40)
    path[3000:, :40] += jump.astype(np.float32)
    run = track(tmp_path, path, sigma_rels=(0.10,), **EXACT)
    since = updates(path)[3000 // STRIDE :]
    wanted = [*WIDTHS[2:], Span(3000, 3200)]
    truth = [*true(path)[2:], since[:20].mean(axis=0)]
    actual, theirs, predicted = judged(run, np.array(truth), wanted)
    assert_honest(actual, theirs, predicted)
    assert np.all(predicted < 6 * actual + 3e-8)


# --- averages of other programs, without a sketch of the path


def test_predictions_allow_for_oscillations_that_files_do_not_show(tmp_path):
    """Of averages, as EDM2 writes them. Without the widening 4 of 15 runs are within 3; nothing in
    the files excludes that they oscillate."""
    within = []
    for periods, phase in product((5, 10, 20, 21, 40), (0, 1, 2)):
        path = wave(periods, 0.1, phase)
        folder = tmp_path / f"{periods}-{phase}"
        for t, width in product(range(800, STEPS + 1, 800), (0.05, 0.28)):
            average = exact_weights(width, range(1, t + 1)) @ path[:t]
            content = {"ema": {"w": torch.from_numpy(average).float()[None]}}
            store(folder / f"network-snapshot-{t:07}-{width:.3f}.pkl", content)
        found, predicted = made(Run(folder), WIDTHS)
        actual = errors(found, true(path, 1))
        within.append(np.all(actual < 3 * predicted))
    assert sum(within) >= 9


def assert_known(folder, path, every):
    """Write checkpoints of weights, and check that errors of averages are the predicted ones."""
    path = path.astype(np.float32)
    for step in {*range(every, STEPS + 1, every), len(path)}:
        weights = torch.from_numpy(path[step - 1])
        store(folder / f"step{step}.pt", {"w": weights})
    found, predicted = made(Run(folder), WIDTHS)
    actual = errors(found, true(path, 1))
    assert_near(actual, predicted, 2)


def noisy_walk(noise):
    random = np.random.default_rng(0)
    steps = random.normal(size=(STEPS, SIZE))
    path = 100 + np.cumsum(steps, axis=0)
    return path + noise * random.normal(size=path.shape)


def test_a_copy_of_the_last_checkpoint_says_nothing_about_motion(tmp_path):
    """With equal checkpoints, or weights that did not move for a while, errors were up to 200 times
    too large."""
    path = noisy_walk(5.0)
    assert_known(tmp_path, np.concatenate([path, path[-1:]]), 200)


@pytest.mark.parametrize(("stop", "noise", "every"), [(3200, 0.0, 200), (2000, 5.0, 500)])
def test_a_standstill_at_the_end_says_nothing_about_motion_before(stop, noise, every, tmp_path):
    path = noisy_walk(noise)
    path[stop:] = path[stop - 1]
    assert_known(tmp_path, path, every)


def test_usual_mistakes_with_a_tracker_name_what_was_meant(tmp_path):
    model = torch.nn.Linear(3, 3)
    ema = PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=5)
    for name in ("update", "update_parameters"):
        with pytest.raises(AttributeError, match=r"call ema.update_\(model\) after each step"):
            getattr(ema, name)
    with refused("state", "not of a tracker", "'weight', 'bias'", "ema.state_dict()"):
        ema.load_state_dict(model.state_dict())
    with refused("checkpoint_every", "checkpoint_every 100.0: must be a whole number"):
        PostHocEMA.from_model(model, tmp_path, checkpoint_every=100.0)
