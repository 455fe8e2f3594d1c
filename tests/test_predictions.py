"""Averages of any length are as exact as predicted, whatever moved, and whatever was kept of it.

Each row is a training of known weights, by the tracker or in files of other programs; every average
is compared with the float64 sum over all updates.
"""

from itertools import product

import numpy as np
import pytest
import torch
from checking import heavy
from factories import Span, exact_gamma, exact_weights
from predictions import (
    assert_predicted,
    errors,
    in_files,
    in_float32,
    noise,
    normal,
    relative_errors,
    tracked,
    true_averages,
    walk,
    wave,
)
from safetensors.torch import load_file
from saved import store
from trained import by, ema, follow, timm, train

from posthoc_cli import Beta, Decay, Run

pytestmark = pytest.mark.statistical

WIDTHS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.28)
THREE = (0.03, 0.1, 0.25)
EXACT = {"checkpoint_dtype": "float32"}


# --- paths


def rates(speed, steps=4000):
    """Return the sizes of steps by the part of the training that has passed: in all, a walk moves
    by a quarter of what the weights are."""
    speeds = speed(np.arange(steps) / steps)
    return 0.25 * speeds / np.sqrt(speeds @ speeds)


def cosine(passed):
    return np.cos(np.pi * passed / 2) ** 2


def frozen(passed):
    return np.where(passed < 0.5, 1.0, 0.0)


def restarts(passed):
    return 1.0 - 0.97 * (4 * passed % 1)


def cooled():
    """Return a walk whose learning rate falls to 0 by a cosine: late, weights hardly move."""
    angle = np.linspace(0, np.pi, 2000)
    return walk(0.0025 * (1 + np.cos(angle)))


def steady(steps=2000, rate=0.001):
    return walk(np.full(steps, rate))


def about_a_minimum(memory, seed=0):
    return normal(400, seed=seed) + 0.05 * noise(2000, memory, seed=seed + 1)


def paused():
    """Return the times of a clock that stops in the middle, for as long as the training takes."""
    times = np.arange(1.0, 4001)
    times[2000:] += 4000
    return times


def drawn_anew():
    """Return a walk of which a tenth leaps right after step 3000."""
    path = walk(rates(cosine), seed=1)
    path[3000:, :40] += 3 * normal(40, seed=2)
    return path


def alternating():
    path = walk(np.full(1000, 2e-4))
    side = 0.1 * normal(400, seed=2)
    path[::2] -= side
    path[1::2] += side
    return path


def standing_still(stop, amplitude, steps=4000):
    """Return a noisy walk that stops."""
    path = walk(np.full(steps, 0.01)) + amplitude * normal(steps, 400, seed=2)
    path[stop:] = path[stop - 1]
    return path


def partly_still(rate, moving):
    """Return a walk of the first elements; the others stand still."""
    path = walk(np.full(600, rate), 2000)
    path[:, moving:] = path[0, moving:]
    return path


def shaken():
    return walk(np.full(600, 2e-4), 2000) + 0.03 * noise(600, 10, 2000)


# --- what files hold


def without_a_step(step, _, copy):
    return {"model": copy}


def both(step, weights, average):
    return {"model": weights, "ema": average, "step": step}


def both_without_a_step(step, weights, average):
    return {"model": weights, "ema": average}


def average_alone(step, _, average):
    return {"ema": average, "step": step}


def both_in_few_bits(step, weights, average):
    few = average["w"].dtype
    return {"model": {"w": weights["w"].to(few)}, "ema": average, "step": step}


def with_a_table(step, _, copy):
    """Add noise levels, far longer than all weights, whose averages move by roundings."""
    table = torch.linspace(1, 1000, 50) * (1 + 3e-7) ** (step // 200 % 2)
    return {"model": copy | {"sigmas": table}, "step": step}


def torchtitan(_, weights, average):
    states = {f"state.{name}.ema_params": value for name, value in average.items()}
    return {"model": weights, "ema_optimizer": states}


def in_half(folder, path, dtype, decay, form):
    """Write an average in half precision, and import it."""
    settings = {"ema_decay": decay}
    return in_files(folder, path, ema(decay), settings, 30, form, dtype=dtype)


# --- decays of the n-th update


def every_10th(n):
    return 1.0 if n % 10 else 0.9


EVERY_10TH = {"ema_decay": 0.9, "update_every": 10}


def dino(n):
    return 1 - 0.002 * (1 + np.cos(np.pi * (n - 1) / 2000))


def power(n):
    """(1 - 1/n)^(gamma + 1) of gamma 5.94, at every tenth step."""
    return 1.0 if n % 10 else (1 - 10 / n) ** 6.94


def half_life_of_a_tenth(n):
    return 2 ** (-1 / (0.1 * n))


def started_late(n):
    """At step 50 and every 7 steps after, with a half-life of 5 % of the updates."""
    updates, rest = divmod(n - 50, 7)
    if rest or updates < 0:
        return 1.0
    return 2 ** (-1 / (0.05 * updates)) if updates else 0.0


def unknown_rise(n):
    return n / (n + 30)


# --- the table


def row(name, make, why, targets=WIDTHS, **limits):
    """A training, the averages, the limits of their errors, see `assert_predicted`, and what went
    wrong, or what is special."""
    return pytest.param(make, targets, limits, why, id=name)


def within(factor):
    return {"low": 1 / factor, "high": factor}


def at_most(factor):
    """No larger than predicted by a factor, nor than of the published method."""
    return {"low": 0.0, "high": factor, "published": True}


FEW = "from the motion between the survivors alone, predictions were up to 200 times too small"
SWINGS = "treated as a walk, errors were up to 110 times the published method's"
TRACKED = [
    row(
        "few times are left of a cosine",
        lambda to: tracked(to, walk(rates(cosine)), max_checkpoints=1),
        FEW,
        **at_most(4),
        median=(0.3, 1.7),
    ),
    row(
        "few times are left of a training that stops",
        lambda to: tracked(to, walk(rates(frozen)), max_checkpoints=2, sigma_rels=(0.05, 0.1)),
        FEW,
        **at_most(4),
        median=(0.3, 1.7),
    ),
    row(
        "an oscillation in step with the snapshots",
        lambda to: tracked(to, wave(20, 1.0, 0.0), checkpoint_dtype="float16"),
        "it looks like a standstill: errors were up to 47 times the predicted",
        **at_most(2.5),
    ),
    row(
        "a slow oscillation",
        lambda to: tracked(to, wave(2.5, 0.5), **EXACT),
        SWINGS,
        **at_most(3),
    ),
    row(
        "an oscillation of two updates",
        lambda to: tracked(to, wave(200, 0.5), **EXACT),
        SWINGS,
        **at_most(3),
    ),
    row(
        "a pause of the clock",
        lambda to: tracked(to, walk(rates(cosine)), paused(), **EXACT),
        "nothing moves for half of the time",
        **at_most(3),
    ),
    row(
        "many snapshots",
        lambda to: tracked(to, walk(rates(restarts, 2000)), checkpoint_every=50, **EXACT),
        "coefficients fit the projections: without their leverage, errors are up to 1.8 times the"
        " predicted",
        **at_most(1.4),
    ),
    row(
        "a real training",
        lambda to: tracked(to, train(), checkpoint_every=100, checkpoint_dtype="bfloat16"),
        "a network is no walk",
        **at_most(1.8) | {"low": 0.3},
    ),
    row(
        "a decay that begins steeply",
        lambda to: tracked(to, walk(rates(np.ones_like)), checkpoint_every=100, **EXACT),
        "a density without bound at its start: 2 to 3 times too much was predicted",
        [Decay("1-sqrt", 0.2)],
        **within(2),
    ),
    row(
        "a snapshot at every update",
        lambda to: tracked(to, walk(rates(cosine, 600)), checkpoint_every=10, **EXACT),
        "motion between two updates contributes to no average",
        **at_most(3) | {"low": 0.25},
        below=2e-6,
    ),
    row(
        "weights that are drawn anew",
        lambda to: tracked(to, drawn_anew(), sigma_rels=(0.1,), **EXACT),
        "a search for the motion that starts with the first estimate of the noise: errors of 9.5"
        " times the predicted ones, and 7.5 times the published method's",
        [*WIDTHS[2:], Span(3000, 3200)],
        **at_most(3) | {"low": 1 / 6},
    ),
    row(
        "an average that keeps most of the first weights",
        lambda to: tracked(to, alternating(), update_every=1, checkpoint_every=100),
        "they are not the mean of their window",
        [Beta(0.9999)],
        low=0.0,
        high=2,
    ),
]

NUMBERED = "between files that are numbered weights move on"
COUNTED = "a few steps between files count one by one"
ROUNDED = "weights of fewer bits than the training has are rounded"
STILL = "a standstill at the end says nothing about motion before"
OF_WEIGHTS = [
    row(
        "model_1.pth",
        lambda to: in_files(
            to, steady(), form=without_a_step, name=lambda step: f"model_{step // 100}.pth"
        ),
        NUMBERED,
        THREE,
        **within(1.4),
    ),
    row(
        "model_5.pth",
        lambda to: in_files(
            to, steady(), form=without_a_step, name=lambda step: f"model_{step // 20}.pth"
        ),
        NUMBERED,
        THREE,
        **within(1.4),
    ),
    row(
        "epoch_1.pt",
        lambda to: in_files(
            to, steady(), form=without_a_step, name=lambda step: f"epoch_{step // 100}.pt"
        ),
        NUMBERED,
        THREE,
        **within(1.4),
    ),
    row(
        "files of every step",
        lambda to: in_files(to, steady(40), every=1),
        "they hold every update",
        THREE,
        low=0.0,
        high=np.inf,
        below=2e-7,
    ),
    row(
        "files of every second step",
        lambda to: in_files(to, steady(60), every=2),
        COUNTED,
        THREE,
        **within(1.4),
    ),
    row(
        "files of every fifth step",
        lambda to: in_files(to, steady(150), every=5),
        COUNTED,
        THREE,
        **within(1.4),
    ),
    row(
        "weights in float16",
        lambda to: in_files(to, cooled(), every=40, dtype=torch.float16),
        ROUNDED,
        THREE,
        **within(1.5),
    ),
    row(
        "weights in bfloat16",
        lambda to: in_files(to, cooled(), dtype=torch.bfloat16),
        ROUNDED,
        THREE,
        **within(1.5),
    ),
    row(
        "weights in bfloat16 that stand still",
        lambda to: in_files(to, steady(rate=1e-6), dtype=torch.bfloat16),
        "they keep their rounding",
        THREE,
        **within(1.5),
    ),
    row(
        "a constant tensor",
        lambda to: in_files(to, steady(), form=with_a_table, every=200),
        "it makes no error look smaller",
        [0.1],
        **within(2),
    ),
    row(
        "a copy of the last checkpoint",
        lambda to: in_files(
            to, standing_still(4000, 0.05, 4001), steps=[*range(200, 4001, 200), 4001]
        ),
        "it says nothing about motion: errors were up to 200 times too large",
        **within(2),
    ),
    row(
        "a walk that stops late",
        lambda to: in_files(to, standing_still(3200, 0.0), every=200),
        STILL,
        **within(2),
    ),
    row(
        "a noisy walk that stops early",
        lambda to: in_files(to, standing_still(2000, 0.05), every=500),
        f"{STILL}; a hundredth of that motion is always allowed for",
        low=0.01,
        high=2,
    ),
]

BITS = "of an average in few bits most elements stand still"
SAVED = "rounded when it is saved, of elements that should move by two digits 2 to 4 % stand still"
BETWEEN = (
    "the updated values were taken for the means of their steps: 3.5 times the predicted errors,"
    " which contain that such files cannot confirm the decay"
)
TEACHER = "late intervals, of which a teacher has little: 62 times the predicted, at 0.01 576 times"
TITAN = "the default half-life is 5 % of the training"
OF_AVERAGES = [
    row(
        "weights beside an average",
        lambda to: in_files(
            to,
            about_a_minimum(30, 1),
            ema(0.99),
            {"ema_decay": 0.99},
            form=both_without_a_step,
            name="{}.pt".format,
        ),
        "a known decay tells that numbers are of steps",
        THREE,
        **within(1.2),
    ),
    row(
        "averages alone of noise",
        lambda to: in_files(
            to, about_a_minimum(1), ema(0.99), {"ema_decay": 0.99}, form=average_alone
        ),
        "taken for a walk, whose averages differ less: errors were 3.7 times the predicted",
        (0.05, 0.15, 0.25),
        **within(2),
    ),
    row(
        "a teacher alone of a walk",
        lambda to: in_files(
            to, steady(rate=0.005), by(dino), {"ema_warmup": "cosine:0.996"}, form=average_alone
        ),
        TEACHER,
        (0.01, 0.05, 0.15),
        **within(2.2),
    ),
    row(
        "a teacher alone of weights that are cooled",
        lambda to: in_files(
            to, cooled(), by(dino), {"ema_warmup": "cosine:0.996"}, form=average_alone
        ),
        TEACHER,
        (0.01, 0.05, 0.15),
        **within(2.2),
    ),
    row(
        "every tenth update of noise, beside weights",
        lambda to: in_files(to, about_a_minimum(30), by(every_10th), EVERY_10TH, form=both),
        BETWEEN,
        (0.05, 0.1, 0.2),
        **within(2.5),
    ),
    row(
        "every tenth update of noise, alone",
        lambda to: in_files(
            to, about_a_minimum(10), by(every_10th), EVERY_10TH, form=average_alone
        ),
        BETWEEN,
        (0.05, 0.1, 0.2),
        **within(2.5),
    ),
    row(
        "an average in bfloat16 of which a tenth moves",
        lambda to: in_half(to, partly_still(1e-2, 200), torch.bfloat16, 0.9995, average_alone),
        BITS,
        [0.1],
        low=1 / 6,
        high=1.3,
    ),
    row(
        "an average in float16 of slow weights",
        lambda to: in_half(to, partly_still(3e-3, 2000), torch.float16, 0.999, average_alone),
        BITS,
        [0.1],
        low=1 / 6,
        high=1.3,
    ),
    row(
        "an average in bfloat16 of noise",
        lambda to: in_half(to, shaken(), torch.bfloat16, 0.99, both_in_few_bits),
        SAVED,
        [0.1],
        low=1 / 3,
        high=2,
    ),
    row(
        "an average in subnormal float16 of noise",
        lambda to: in_half(to, 1e-5 * shaken(), torch.float16, 0.99, both_in_few_bits),
        SAVED,
        [0.1],
        low=1 / 3,
        high=2,
    ),
    row(
        "a folder that no import has seen",
        lambda to: in_files(to, train(), ema(0.995), form=timm),
        "it is opened as an import opens it, with the decay that its files show",
        [0.15],
        below=2e-3,
    ),
    row(
        "a power function",
        lambda to: in_files(
            to,
            train(),
            by(power),
            {"sigma_rels": [0.110967], "update_every": 10},
            form=timm,
        ),
        "its width is given",
        [0.15],
        low=0.0,
        high=2,
        below=0.02,
    ),
    row(
        "a half-life of a part of the training",
        lambda to: in_files(
            to, train(), by(half_life_of_a_tenth), {"ema_decay": "half-life:10%"}, form=torchtitan
        ),
        TITAN,
        [0.15],
        low=0.0,
        high=2,
        below=0.02,
    ),
    row(
        "a half-life of a part of the training, from a late start",
        lambda to: in_files(
            to,
            train(),
            by(started_late),
            {"update_every": 7, "update_after_step": 50},
            form=torchtitan,
        ),
        TITAN,
        [0.15],
        low=0.0,
        high=2,
        below=0.02,
    ),
    row(
        "a decay that is reached by an unknown rule",
        lambda to: in_files(
            to,
            train(falls=True, seed=7),
            by(unknown_rise),
            {"ema_decay": 0.98},
            form=both,
        ),
        "the predicted error is wider",
        (0.05, 0.25),
        low=0.0,
        high=2,
    ),
]


@pytest.mark.parametrize(
    ("make", "targets", "limits", "why"),
    [*TRACKED, *OF_WEIGHTS, *(row._replace(marks=(heavy,)) for row in OF_AVERAGES)],
)
def test_the_prediction_holds(make, targets, limits, why, tmp_path):
    print(why)  # beside a failure
    assert_predicted(*make(tmp_path), targets=targets, **limits)


# --- what else a prediction is


@heavy
def test_predictions_allow_for_oscillations_that_files_do_not_show(tmp_path):
    """Of averages, as EDM2 writes them. Without the widening 4 of 15 runs are within 3; nothing in
    the files excludes that they oscillate."""
    held = []
    for periods, phase in product((5, 10, 20, 21, 40), (0, 1, 2)):
        path = in_float32(wave(periods, 0.1, phase))
        folder = tmp_path / f"{periods}-{phase}"
        for t, width in product(range(800, 4001, 800), (0.05, 0.28)):
            average = exact_weights(width, range(1, t + 1)) @ path[:t]
            content = {"ema": {"w": torch.from_numpy(average).float()}}
            store(folder / f"network-snapshot-{t:07}-{width:.3f}.pkl", content)
        actual, predicted = errors(folder, path, targets=WIDTHS)
        held.append(np.all(actual < 3 * predicted))
    assert sum(held) >= 9


def test_before_the_first_of_a_few_last_files_the_weights_may_have_moved_faster(tmp_path):
    """Only the last three files of a training are kept. Taken for as quiet as they are, what came
    before made errors 180 times as large as predicted."""
    training = in_files(tmp_path, cooled(), steps=(1960, 1980, 2000))
    assert_predicted(*training, targets=(0.15, 0.28), low=1 / 8, high=3)
    (warning,) = Run(training[0]).plan((0.15, 0.28)).warnings
    assert "before t = 1,960" in warning


def nearest(path, averages, steps, decay, width):
    """Return the combination of weights and their EMAs, with the sum 1, whose tail is nearest to
    that of a power function."""
    before = np.arange(len(path))
    ages = np.maximum(steps[:, None] - before, 0)
    tails = np.vstack([ages > 0, 1 - decay**ages])
    values = np.vstack([path[steps - 1], averages[steps - 1]])
    wanted = 1 - (before / len(path)) ** (exact_gamma(width) + 1)
    others = tails[:-1] - tails[-1]
    c, *_ = np.linalg.lstsq(others.T, wanted - tails[-1], rcond=1e-12)
    return values[-1] + c @ (values[:-1] - values[-1])


@heavy
def test_at_uneven_steps_no_interval_moves_for_nothing(tmp_path):
    """A fitted motion of 0 in one interval cost nothing: errors were 60 times the predicted."""
    random = np.random.default_rng(105)
    drawn = random.choice(np.arange(40, 2000), 19, replace=False)
    steps = np.append(np.sort(drawn), 2000)
    place, path = in_files(
        tmp_path,
        about_a_minimum(1000, 5),
        ema(0.999),
        {"ema_decay": 0.999},
        form=both,
        steps=steps.tolist(),
    )
    widths = (0.05, 0.1, 0.2)
    assert_predicted(place, path, targets=widths, **within(2.5))
    averages = follow(ema(0.999), path)
    plain = [nearest(path, averages, steps, 0.999, width) for width in widths]
    actual, _ = errors(place, path, targets=widths)
    assert np.all(actual < 1.05 * relative_errors(plain, true_averages(widths, path)))


def test_an_earlier_snapshot_alone_may_be_nearest(tmp_path):
    """For a sawtooth out of step with the snapshots, coefficients of all of them were 5 times as
    far from the truth."""
    place, height = normal(2, 200)
    steps = np.arange(1, 2001)
    path = place + np.outer(steps / 70 % 1, height)
    training = tracked(
        tmp_path, path, update_every=1, checkpoint_every=100, checkpoint_dtype=torch.float16
    )
    actual, _ = errors(*training, targets=[0.03])
    truth = true_averages([0.03], *training[1:])
    stored = [load_file(file)["w"].double().numpy() for file in tmp_path.glob("*.safetensors")]
    assert actual[0] <= 1.05 * min(relative_errors(np.array(stored), truth))
