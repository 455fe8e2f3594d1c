"""What one sign shows of an average is said, and is in the predicted error; what two signs agree on
is a fault. The truth is summed over every step in float64."""

import math

import numpy as np
import pytest
import torch
from checking import each_heavy, refused
from predictions import assert_predicted, normal, walk
from saved import store
from trained import by, ema, paste, write

from posthoc_cli import Run, import_checkpoints

pytestmark = pytest.mark.statistical

STEPS = 1500
SIZE = 400
EVERY = 50
TIMES = range(EVERY, STEPS + 1, EVERY)


def rates(kind, every=EVERY):
    """Return the rates of a training: constant, by a cosine to 0, or by one in each interval."""
    steps = np.arange(STEPS)
    period = {"constant": math.inf, "cosine": STEPS, "cycles": every}[kind]
    return 0.01 * (1 + np.cos(np.pi * (steps % period) / period))


def written(folder, path, update, steps=TIMES):
    return write(folder, path, update, steps=steps)


def taken(folder, run, caplog, **settings):
    """Import with settings; return the lines about the average, and the warnings."""
    caplog.clear()
    done = import_checkpoints(folder, run, **settings)
    return done.checks[-1], [
        record.message for record in caplog.records if record.levelname == "WARNING"
    ]


# --- an average that began again


@pytest.mark.parametrize("kind", ["constant", "cosine", "cycles"])
@pytest.mark.parametrize("begin", [450, *each_heavy(430, 451)])
def test_an_average_that_began_again_is_named_and_predicted(kind, begin, files, run, caplog):
    """Without a sign of it errors were up to 880 times the predicted ones."""
    path = walk(rates(kind), SIZE)
    written(files, path, by(lambda n: 0.0 if n == begin else 0.998))
    place = f"of step {math.ceil(begin / EVERY) * EVERY} does not follow"
    with refused("average", place):
        import_checkpoints(files, run)
    _, warnings = taken(files, run, caplog, ema_decay=0.998)
    assert any(place in warning for warning in warnings)
    assert_predicted(run, path, targets=(0.1, 0.2, 0.28), low=0.0, high=3)


def test_of_several_restarts_the_last_one_is_named(files):
    written(files, walk(rates("constant"), SIZE), by(lambda n: 0.0 if n in (430, 910) else 0.998))
    (audit,) = Run(files).audit()
    assert audit.verdict == "set back"
    assert audit.set_back_at == 950


def test_a_decay_that_changes_early_in_a_training_refutes_a_constant_one(files):
    written(files, walk(rates("constant"), SIZE), by(lambda n: 0.997 if n > 500 else 0.98))
    (audit,) = Run(files).audit(0.997)
    assert audit.verdict == "another rule"


# --- honest averages

HONEST = [
    ("constant", 0.95),
    ("cosine", 0.95),
    ("cosine", 0.92),
    ("cycles", 0.98),
    ("cycles", 0.95),
]
"""Rates and decays: files are 1 to 4 time constants apart."""


@pytest.mark.parametrize(("kind", "decay"), HONEST)
def test_a_true_decay_is_never_refused(kind, decay, files, run):
    """With rates that fall or cycle within an interval, averages look up to 4 times as short."""
    path = walk(rates(kind), SIZE)
    written(files, path, ema(decay))
    (line,) = import_checkpoints(files, run, ema_decay=decay).checks
    assert line.startswith("given: ")
    (audit,) = Run(files).audit()
    assert not audit.is_bad
    if audit.length:
        assert abs(math.log(audit.length * (1 - decay))) < 3 * audit.uncertainty


def test_how_far_an_average_moves_is_no_sign_against_its_name(files, run):
    """Where the rate falls to 0 it moves on, and the weights do not."""
    path = walk(np.where(np.arange(STEPS) < STEPS - 300, 0.01, 1e-4), SIZE)
    late = range(STEPS - 300, STEPS + 1, 30)

    def form(step, weights, average):
        return {"model": weights, "model_ema": average, "step": step}

    write(files, path, ema(0.99), steps=late, form=form)
    assert import_checkpoints(files, run, ema_decay=0.99).counts.total() == 2 * len(late)


def test_weights_that_are_named_as_the_average_are_no_average(files):
    path = walk(rates("constant"), SIZE)

    def form(step, weights, average):
        return {"model": average, "model_ema": weights, "step": step}

    write(files, path, ema(0.99), steps=TIMES, form=form)
    with refused("average", "moves farther than the weights"):
        import_checkpoints(files, None, dry_run=True, ema_decay=0.99)


# --- claims within the uncertainty


@pytest.mark.parametrize("claimed", [1 - 0.01 / 1.08, 1 - 0.01 / 1.05])
def test_the_difference_of_a_claim_is_in_the_predicted_error(claimed, files, run):
    """Within the uncertainty it was left out: errors were 7 to 11 times the predicted ones."""
    path = walk(rates("constant"), SIZE)
    written(files, path, ema(0.99))
    import_checkpoints(files, run, ema_decay=claimed)
    assert_predicted(run, path, targets=(0.1, 0.2, 0.28), low=0.0, high=3)


def test_updates_that_were_skipped_are_in_the_predicted_error(files, run):
    """As where a scaler finds infinities: at one step in 20."""
    path = walk(rates("constant"), SIZE)
    skipped = np.random.default_rng(0).random(STEPS + 1) < 0.05
    written(files, path, by(lambda n: 1.0 if skipped[n] else 0.99))
    import_checkpoints(files, run, ema_decay=0.99)
    assert_predicted(run, path, targets=(0.1, 0.2, 0.28), low=0.0, high=3)


def test_a_decay_of_numpy_is_taken(files, run):
    written(files, walk(rates("constant"), SIZE), ema(0.99))
    import_checkpoints(files, run, ema_decay=np.float64(0.99))


# --- dtypes and counts


@pytest.mark.parametrize("size", [0.005, 0.02])
def test_a_dtype_in_which_an_average_stands_still_is_named(size, files, run, caplog):
    path = torch.tensor(walk(np.full(STEPS, size), SIZE))
    average = path[0].bfloat16()
    for step, weights in enumerate(path, 1):
        average.mul_(0.99).add_(weights.bfloat16(), alpha=0.01)
        if step % EVERY == 0:
            content = {"w": weights.float()}, {"w": average.clone()}
            store(files / f"step{step}.pt", dict(zip(("model", "ema"), content, strict=True)))
    (audit,) = Run(files).audit()
    assert audit.is_bad
    assert "bfloat16 has too few digits" in audit.text
    with refused("average", "bfloat16"):
        import_checkpoints(files, run)
    _, warnings = taken(files, run, caplog, ema_decay=0.99)
    assert any("bfloat16" in warning for warning in warnings)


def test_a_mean_of_some_steps_is_taken_as_its_counts_say(files, run):
    """As of torch's `AveragedModel`: the command that was proposed led to another refusal."""
    path = walk(rates("constant"), SIZE)
    mean = np.zeros(SIZE)
    for count, step in enumerate(range(300, STEPS + 1, EVERY), 1):
        mean = mean + (path[step - 1] - mean) / count
        average = {"module.w": torch.tensor(mean).float(), "n_averaged": torch.tensor(count)}
        weights = {"w": torch.tensor(path[step - 1]).float()}
        store(files / f"step{step}.pt", {"model": weights, "swa": average, "step": step})
    with refused("update_every", "--update-every 50 --out run"):
        import_checkpoints(files, run)
    with refused("ema_decay", "--update-every 50 --ema-decay found --out run") as asked:
        import_checkpoints(files, run, update_every=50)
    paste(asked.value, run)


def test_a_decay_with_a_warm_up_of_no_library_is_taken(files, run):
    """As D-FINE's, whose rise takes 100 steps: "decay 0.99501, ..., not 0.995" was no reason."""

    def form(step, weights, average):
        return {"model": weights, "ema": {"module": average, "updates": step}, "step": step}

    path = normal(SIZE) + np.cumsum(0.01 * normal(STEPS, SIZE, seed=1), axis=0)
    rising = by(lambda n: 0.995 * (1 - math.exp(-n / 100)))
    write(files, path, rising, steps=TIMES, form=form)
    *_, line = import_checkpoints(files, run, ema_decay=0.995).checks
    assert line.startswith("given: ")
    assert_predicted(run, path, targets=(0.1, 0.2), low=0.0, high=3)


def test_updates_that_seem_rare_are_taken_at_the_interval_that_is_given(files, run, caplog):
    """Rates that cycle let the weights rest at each file: an EMA then looks as if it were updated
    there alone."""
    path = walk(rates("cycles"), SIZE)
    written(files, path, ema(0.94))
    with refused("update_every", "once at each", "--update-every N --out run"):
        import_checkpoints(files, run, ema_decay=0.94)
    _, warnings = taken(files, run, caplog, ema_decay=0.94, update_every=1)
    assert any("once at each" in warning for warning in warnings)
    assert_predicted(run, path, targets=(0.1, 0.2, 0.28), low=0.0, high=3)
