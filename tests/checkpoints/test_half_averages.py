"""Averages that files hold in half precision, with and without weights beside them."""

import numpy as np
import pytest
import torch
from factories import exact_weights, relative_distance

from posthoc_cli import Run, import_checkpoints

STEPS = 600
EVERY = 30
ELEMENTS = 2000
SIGMA = 0.1


def write(folder, dtype, decay, rate, moving=1.0, is_kept=False, noise=0.0, beside=None, size=1.0):
    """Write averages of a random walk of some elements, with noise of ten steps, and return the
    true average of `SIGMA`.

    Each is rounded when it is saved, or kept in its dtype and rounded at each update. Weights are
    `beside` it in a dtype.
    """
    random = np.random.default_rng(0)
    walk = random.standard_normal(ELEMENTS)
    shaken = np.zeros(ELEMENTS)
    average = torch.from_numpy(size * walk)
    if is_kept:
        average = average.to(dtype)
    truth = np.zeros(ELEMENTS)
    count = int(moving * ELEMENTS)
    shares = exact_weights(SIGMA, range(1, STEPS + 1))
    for step, share in enumerate(shares, 1):
        walk[:count] += rate * random.standard_normal(count)
        shaken[:count] = 0.9 * shaken[:count] + 0.4 * noise * random.standard_normal(count)
        weights = torch.from_numpy(size * (walk + shaken))
        truth += share * weights.numpy()
        average.lerp_(weights.to(average.dtype), 1 - decay)
        if step % EVERY == 0:
            content = {"ema": {"w": average.to(dtype)}, "global_step": step}
            if beside:
                content["model"] = {"w": weights.to(beside)}
            torch.save(content, folder / f"step{step}.pt")
    return truth


@pytest.mark.parametrize(
    ("dtype", "decay", "rate", "moving"),
    [
        (torch.bfloat16, 0.9995, 1e-2, 0.1),
        (torch.float16, 0.999, 3e-3, 1.0),
    ],
)
def test_the_error_of_averages_of_which_most_stands_still_is_predicted(
    dtype, decay, rate, moving, tmp_path
):
    truth = write(tmp_path, dtype, decay, rate, moving)
    assert_predicted(tmp_path, truth, decay, 1 / 6, 1.3)


def assert_predicted(folder, truth, decay, low, high):
    """Check that the error of an average, over the predicted one, has bounds."""
    import_checkpoints(folder, folder / "run", ema_decay=decay)
    made = Run(folder / "run").average(SIGMA, dtype="float64")
    error = relative_distance(made["w"], truth)
    assert low < error / made.predicted_error < high


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1e-5)])
def test_averages_of_noisy_weights_are_taken_if_they_are_rounded_when_saved(dtype, size, tmp_path):
    """Of the elements that the weights should move by two digits 2 to 4 % stand still. Numbers of
    1e-5 are subnormal in float16."""
    truth = write(tmp_path, dtype, 0.99, 2e-4, noise=0.03, beside=dtype, size=size)
    assert_predicted(tmp_path, truth, 0.99, 1 / 3, 2)


def test_the_digits_that_averages_are_stored_in_change_no_decay_that_is_found(tmp_path):
    """It moves by a few digits between files: if their rounding is not counted, none is found."""
    write(tmp_path, torch.bfloat16, 0.998, 1e-3, beside=torch.float32)
    (audit,) = Run(tmp_path).audit()
    assert audit.length == pytest.approx(500, rel=0.05)
