"""Whether averages of any length are as exact as predicted: weights along a known path, the
directories and files that a training of them leaves, and the errors of averages from these."""

from functools import singledispatch

import numpy as np
import torch
from factories import Span, exact_weights
from scipy.signal import lfilter
from trained import ema, shapes, train, write

from posthoc_cli import Beta, Decay, PostHocEMA, Run, import_checkpoints, synthesize

DIGIT = 3e-8
"""Half of the last digit of float32, in which averages are tracked."""


# --- paths: [steps, elements]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def walk(rates, size=400, seed=0):
    """Return weights of variance 1 at first, whose steps have these standard deviations."""
    start = normal(size, seed=seed)
    moves = normal(len(rates), size, seed=seed + 1)
    return start + np.cumsum(rates[:, None] * moves, axis=0)


def noise(steps, memory, size=400, seed=0):
    """Return displacements of variance 1 that are forgotten within so many steps."""
    kept = np.exp(-1 / memory)
    moves = np.sqrt(1 - kept**2) * normal(steps, size, seed=seed)
    return lfilter([1.0], [1.0, -kept], moves, axis=0)


def wave(periods, amplitude, phase=1.0, steps=4000):
    """Return weights that swing in one direction."""
    place, direction = normal(2, 400)
    turns = 2 * np.pi * periods * np.arange(1, steps + 1) / steps
    return place + np.outer(amplitude * np.sin(turns + phase), direction)


def in_float32(path):
    return path.astype(np.float32).astype(np.float64)


# --- what a training leaves: its place, and the weights and times of the updates


def tracked(folder, path, times=None, **options):
    """Track a path, by default with an update at every tenth step and every snapshot kept."""
    options = {"update_every": 10, "checkpoint_every": 200, "max_checkpoints": None} | options
    clock = [None] * len(path)
    if times is None:
        times = np.arange(1.0, len(path) + 1)
    else:
        clock = times.tolist()
        options["t_unit"] = "seconds"
    path = in_float32(path)
    model = torch.nn.ParameterDict({"w": torch.zeros(path.shape[1])})
    with PostHocEMA.from_model(model, folder, **options) as tracker:
        for weights, t in zip(torch.from_numpy(path), clock, strict=True):
            model["w"].data.copy_(weights)
            tracker.update_(model, t)
    updates = slice(options["update_every"] - 1, None, options["update_every"])
    return folder, path[updates], times[updates]


COPY = ema(0.0)
"""An average that is the weights themselves, in its own dtype."""


def copy_alone(step, _, copy):
    return {"model": copy, "step": step}


def in_files(folder, path, update=COPY, settings=None, every=100, form=copy_alone, **options):
    """Write files as `write` does, by default of the weights alone; import them if there are
    settings of an import."""
    path = in_float32(path)
    steps = range(every, len(path) + 1, every)
    files = write(folder / "files", path, update, form=form, **{"steps": steps} | options)
    if settings is None:
        return files, path
    import_checkpoints(files, folder / "run", **settings)
    return folder / "run", path


# --- errors


@singledispatch
def shares(target, times):
    """Return what an average has of each of the updates at `times`."""
    return exact_weights(target, times)


@shares.register
def _(target: Span, times):
    within = (target.start < times) & (times <= target.end)
    return within / within.sum()


@shares.register
def _(target: Decay, times):
    """Of a decay 1 - sqrt."""
    passed = 1 - (1 - times / times[-1]) / target.over
    return np.diff(np.sqrt(passed.clip(0, 1)), prepend=0.0)


@shares.register
def _(target: Beta, times):
    """The first weights have what is left of the average's beginning, too."""
    left = target.beta ** np.arange(len(times), -1.0, -1)
    left[0] = 0.0
    return np.diff(left)


def true_averages(targets, path, times=None):
    """Return the float64 sums over every update: [targets, elements]."""
    if times is None:
        times = np.arange(1.0, len(path) + 1)
    return np.array([shares(target, times) for target in targets]) @ path


def relative_errors(found, truth):
    return np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)


def errors(place, path=None, times=None, targets=(0.15,), names=None, method=None):
    """Return the errors of averages, relative to the true ones, and the predicted errors.

    Arguments:
        path: the weights at each update, by default of the training of `trained`.
        names: tensors that the elements of `path` are of, in their order; by default `w` alone, or
            those of that training.
    """
    path = train() if path is None else path
    plan = Run(place).plan(targets, method=method, dtype="float64")
    averages = dict(synthesize(plan))
    if names is None:
        names = ["w"] if "w" in averages else shapes()
    found = torch.cat([torch.stack(averages[name]).flatten(1) for name in names], dim=1)
    actual = relative_errors(found.numpy(), true_averages(targets, path, times))
    predicted = [plan.predicted_error(number) for number in range(len(targets))]
    return actual, np.array(predicted, dtype=float)


def assert_predicted(
    *training, low=0.3, high=2.5, below=np.inf, median=(0.0, np.inf), published=False, **of
):
    """Assert that errors over the predicted ones, and their median, have bounds, and that both are
    below a limit; with `published`, that errors are no larger than of the published method.
    Arguments as of `errors`.
    """
    actual, predicted = errors(*training, **of)
    report = f"{actual} of {predicted}: {actual / predicted}"
    assert np.all(actual < high * predicted + DIGIT), report
    assert np.all(low * predicted < actual + DIGIT), report
    assert max(*actual, *predicted) < below, report
    assert median[0] <= np.median(actual / predicted) < median[1], report
    if published:
        theirs, _ = errors(*training, **of, method="paper")
        assert np.all(actual <= 1.05 * theirs + DIGIT), f"{report}, published {theirs}"
