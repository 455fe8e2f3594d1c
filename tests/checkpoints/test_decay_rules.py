"""Rules of decay, each against a loop in float64 of its library's own formula; and files of which
a rule is said, found, or contradicted."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import refused
from predictions import assert_predicted, walk
from safetensors.torch import save_file
from trained import (
    STEPS,
    TIMES,
    by,
    ema,
    paste,
    ratio,
    settings_of,
    train,
    write,
)

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.checkpoints import layouts
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.decay_rules import DecayRule


def constant(_):
    return 0.99


def long_ratio(n):
    """As diffusers with `min_decay`."""
    return max(0.9, min(0.999, ratio(n)))


def power(n):
    rising = 1 - (1 + n) ** (-2 / 3)
    return min(0.99, rising)


def power_after_three_copies(n):
    counted = max(n - 3, 0)
    return power(counted)


def slow_power(n):
    rising = 1 - (1 + n / 20) ** -0.8
    return min(0.99, rising)


def exponential(n):
    """As ultralytics."""
    risen = 1 - math.exp(-n / 500)
    return 0.995 * risen


def unbiased(n):
    """As audiocraft."""
    counted = 1 - 0.995**n
    return 1 - (1 - 0.995) / counted


def cosine(n):
    """As DINO, whose schedule ends with the training."""
    angle = math.pi * min((n - 1) / STEPS, 1)
    falling = (1 + math.cos(angle)) / 2
    return 1 - 0.01 * falling


def beyond(n):
    """As I-JEPA, whose schedule is that of a longer training."""
    passed = (n - 1) / (1.25 * STEPS)
    return 0.99 + 0.01 * passed


RULES = {
    constant: DecayRule(0.99),
    long_ratio: DecayRule(0.999, "ratio", least=0.9),
    power_after_three_copies: DecayRule(0.99, "power", copies=3),
    slow_power: DecayRule(0.99, "power", inv_gamma=20.0, power=0.8),
    exponential: DecayRule(0.995, "exp", tau=500.0),
    unbiased: DecayRule(0.995, "unbiased"),
    cosine: DecayRule(warm_up="cosine", base=0.99, steps=STEPS),
    beyond: DecayRule(warm_up="linear", base=0.99, steps=1.25 * STEPS),
}
"""The decay of a library's n-th update, and its rule."""


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("decay", RULES)
def test_a_profile_weighs_as_the_library_does(decay, every):
    """Of a random walk, the average by the loop and by the profile's masses are equal."""
    steps = 1800
    random = np.random.default_rng(0)
    walk = np.cumsum(random.standard_normal(steps + 1))
    average = walk[0]
    for step in range(every, steps + 1, every):
        kept = decay(step // every)
        average = kept * average + (1 - kept) * walk[step]
    profile = RULES[decay].profile(steps, steps // every, every)
    before = np.arange(steps + 1.0) - 1e-9
    tails = profile.tail(before)
    masses = -np.diff(tails, append=0.0)
    masses[0] = 1 - masses[1:].sum()  # the initial weights
    exact = 1e-12 * np.abs(walk).max()
    assert masses @ walk == pytest.approx(average, abs=exact)


FILE = Path("x")
"""The file that an error would name."""


def test_a_schedule_counts_the_steps_of_the_training():
    """Not the updates, which are rarer, nor those since an average began."""
    settings = ImportSettings(ema_warmup="linear:0.9", steps=1000, update_every=10)
    late = replace(settings, update_after_step=400)
    profile = Updates().profile(FILE, 500, late)
    for s, first in ((405, 40), (455, 45)):
        passed = np.arange(first, 50) / 100
        decays = 0.9 + 0.1 * passed
        assert profile.tail(s) == pytest.approx(1 - decays.prod(), abs=1e-13)


@pytest.mark.parametrize(
    ("calls", "count", "updates"),
    [
        ("multiples", None, range(20, 98, 10)),
        ("from first", None, range(11, 98, 10)),
        ("after copy", None, range(20, 98, 10)),
        ("counted", 97, range(21, 98, 10)),
    ],
)
def test_which_calls_are_updates(calls, count, updates):
    """The steps of the updates by step 97, every tenth call, as told by the profile's jumps, after
    a copy at most one interval before the first of them."""
    settings = ImportSettings(ema_decay=0.5, update_after_step=20, update_every=10)
    counted = Updates({}, count, calls=calls)
    profile = counted.profile(FILE, 97, settings)
    tails = profile.tail(np.arange(98))
    jumps = 1 + np.flatnonzero(np.diff(tails))
    assert jumps.tolist() == [*updates]


# --- files whose rule is said, or found


SAID = {
    cosine: ({"ema_warmup": "cosine:0.99"}, ["steps: taken as 1,500, the last checkpoint's"]),
    beyond: ({"ema_warmup": "linear:0.99", "steps": 1875}, []),
}
"""Settings, and what an import says besides."""


FALLING = {"falls": True, "seed": 7}


def form(step, weights, average):
    """As a loop of one's own: nothing says how the average is updated."""
    return {"model": weights, "ema": average, "step": step}


def saved(folder, decay, **training):
    """Write the files of a training whose n-th update keeps decay(n)."""
    folder.mkdir()
    return write(folder, train(**training), by(decay), form=form)


def last_profile(run):
    (last,) = (one for one in Run(run).sources if one.t == STEPS and one.holds != "weights")
    return last.profile


@pytest.mark.parametrize("decay", SAID)
def test_a_rule_that_is_said_fits_the_files(decay, files, run):
    saved(files, decay)
    settings, besides = SAID[decay]
    *others, checked = import_checkpoints(files, run, **settings).checks
    assert others == besides
    assert "as claimed" in checked
    # the first files of long averages are not exact
    assert_predicted(run, below=1e-2, low=0.2)
    profile = last_profile(run)
    decays = [decay(step) for step in range(1401, STEPS + 1)]
    mass = 1 - math.prod(decays)
    assert profile.tail(1400) == pytest.approx(mass, abs=1e-12)


def test_a_schedule_takes_no_decay_besides():
    with refused("ema_decay 0.99"):
        ImportSettings(ema_decay=0.99, ema_warmup="cosine")


def test_a_decay_takes_no_steps_of_a_schedule(files, run, ema):
    saved(files, constant)
    done = ema("import", files, "--out", run, "--ema-decay", 0.99, "--steps", STEPS)
    assert done.error.startswith("--steps 1500: ")


OF_AVERAGES = {
    "sigma_rels": (0.1,), "update_every": 10, "update_after_step": 10, "ema_decay": 0.99,
    "ema_warmup": "cosine", "steps": STEPS,
}  # fmt: skip
"""A value of each setting of averages."""


def test_a_setting_of_averages_is_refused_for_files_that_hold_none(files, run):
    files.mkdir()
    for step in (1, 2, 3):
        save_file({"w": torch.full((3,), float(step))}, files / f"step{step}.safetensors")
    assert {*OF_AVERAGES} == layouts._OF_AVERAGES
    for name, value in OF_AVERAGES.items():
        with refused(name, "taken for weights"):
            import_checkpoints(files, run, **{name: value})


def test_a_base_that_is_wrong_does_not_fit(files, run):
    saved(files, cosine)
    with refused("ema_warmup cosine:0.9", "too long"):
        import_checkpoints(files, run, ema_warmup="cosine:0.9")


@pytest.mark.parametrize("given", [0.98, 0.995, 0.9999])
def test_a_decay_that_files_refute_by_another_one_is_replaced(given, files, run):
    saved(files, constant)
    with refused(f"ema_decay {given}", "--ema-decay 0.99 ") as asked:
        import_checkpoints(files, run, ema_decay=given)
    paste(asked.value, run)


MEANS_AT_FIRST = {
    "mean": lambda decay, n: min(decay, n / (n + 1)),
    "power": lambda decay, n: min(decay, 1 - (1 + n) ** -0.75),
    "unbiased": lambda decay, n: 1 - (1 - decay) / (1 - decay**n),
}
"""The decay of the n-th update, which rises to another one before the first file."""


@pytest.mark.parametrize("rule", MEANS_AT_FIRST)
@pytest.mark.parametrize("decay", [0.98, 0.99])
def test_a_warm_up_that_ends_before_the_files_is_no_question(decay, rule, files, run):
    """The simplest rule is taken, and the text names those that explain the files as well. What the
    first files have of the weights before them changes little."""
    path = walk(np.full(2000, 0.02), 300)
    write(files, path, by(lambda n: MEANS_AT_FIRST[rule](decay, n)), steps=range(600, 2001, 100))
    done = import_checkpoints(files, run)
    assert re.search("with .*power.* the files would look the same", done.checks[0])
    assert settings_of(run)["ema_decay"] == decay
    assert "ema_warmup" not in settings_of(run)
    assert_predicted(run, path, targets=(0.05, 0.1, 0.2, 0.28), low=0.0, high=3)


@pytest.mark.parametrize(
    ("rule", "decay"),
    [
        (lambda n: 1 - (1 + n) ** -0.75, 0.995),
        (lambda n: 1 - (1 + n) ** -0.75, 0.994),
        (lambda n: 1 - (1 + n) ** (-2 / 3), 0.99),
        (ratio, 0.99),
        (ratio, 0.992),
    ],
)
def test_the_files_of_a_warm_up_put_no_doubt_on_the_decay_that_it_reaches(rule, decay, files):
    """Half of the files or more are before its end, and explained by any decay above theirs."""
    path = walk(np.full(2000, 0.02), 300)
    write(files, path, by(lambda n: min(decay, rule(n))), steps=range(100, 2001, 100))
    (audit,) = Run(files).audit()
    assert audit.verdict == "found"
    off = abs(math.log((1 - audit.found) / (1 - decay)))
    assert off <= 2 * audit.uncertainty
    assert audit.uncertainty < 0.06


@pytest.mark.parametrize("given", [0.1, 0.02])
def test_a_width_that_files_refute_by_a_decay_or_another_width_is_named(given, files, run):
    saved(files, constant)
    with refused(f"sigma_rels {given}", "--ema-decay 0.99 "):
        import_checkpoints(files, run, sigma_rels=(given,))


def test_an_unstated_schedule_is_taken(files, run):
    saved(files, cosine)
    (line,) = import_checkpoints(files, run).checks
    assert line.endswith("; taken as cosine:0.99")
    assert_predicted(run, below=1e-2)


def test_an_unstated_rule_is_proposed(files, run):
    """The length of 200 steps is 6 % uncertain."""
    saved(files, unbiased)
    with refused("ema_decay", "--ema-decay 0.995 --ema-warmup unbiased --out run") as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)
    assert_predicted(run, below=1e-2)


# --- what the files do not show


def drifting(noise):
    """Return weights that drift, with white noise."""
    random = np.random.default_rng(0)
    direction = random.standard_normal(train().shape[1])
    drift = 1e-3 * np.outer(np.arange(STEPS), direction)
    noises = random.standard_normal(drift.shape)
    return train()[0] + drift + noise * noises


def test_a_length_that_drift_and_noise_hide_is_not_claimed(files):
    """3 steps, of files 100 apart."""
    write(files, drifting(0.03), ema(1 - 1 / 3))
    (audit,) = Run(files).audit()
    assert audit.found is None
    assert "too short for the time between these checkpoints" in audit.text


def test_a_length_that_drift_and_noise_explain_by_several_rules_is_asked_for(files, run):
    write(files, drifting(0.1), ema(0.95))
    with refused("ema_decay", "do not show its length"):
        import_checkpoints(files, run)
    assert not run.exists()


@pytest.mark.parametrize(("decay", "length"), [(constant, 100), (unbiased, 200)])
def test_five_files_show_a_length_within_the_uncertainty(decay, length, files):
    saved(files, decay, **FALLING)
    for step in TIMES:
        if step % 300:
            (files / f"step{step}.pt").unlink()
    (audit,) = Run(files).audit()
    assert abs(math.log(audit.length / length)) < 2.5 * audit.uncertainty < 1


# --- a rule that is given, and that the files contradict


def test_a_rule_that_explains_the_files_worse_is_refused(files, run):
    saved(files, cosine, **FALLING)
    with refused("ema_decay 0.99") as raised:
        import_checkpoints(files, run, ema_decay=0.99)
    assert re.search(r"cosine from 0\.9(9|89)", str(raised.value))


def test_a_rule_that_is_true_is_taken(files, run):
    """The path of the weights shows another length, 90 % off and by more than the uncertainty says:
    the claim explains the intervals better."""
    saved(files, exponential, rate=1e-2, optimizer="SGD")
    done = import_checkpoints(files, run, ema_decay=0.995, ema_warmup="exp:500")
    assert done.checks[-1].startswith("given: ")


def test_a_decay_that_is_true_with_a_warm_up_is_taken_with_the_warm_up(files, run):
    def rising(n):
        return min(0.998, n / (n + 1))

    saved(files, rising)
    taken, line = import_checkpoints(files, run, ema_decay=0.998).checks
    assert "power:1" in taken
    assert "as claimed" in line
    assert_predicted(run, below=1e-2, low=0.2)


def test_a_length_that_nothing_limits_is_said_in_one_line(files):
    """An average of 1 step for 200 claimed ones: the factor between them has no upper bound."""
    saved(files, exponential, **FALLING)
    (audit,) = Run(files).audit(0.995)
    assert re.search(r"too short by a factor of .* times a step: once", audit.text), audit.text


def test_a_decay_by_an_unknown_rule_is_refused(files, run):
    def cosine_to_0_999(n):
        angle = math.pi * n / STEPS
        return 0.9945 - 0.0045 * math.cos(angle)

    saved(files, cosine_to_0_999, **FALLING)
    with refused("ema_decay", "step 1,500 does not follow", "--ema-decay N --out run"):
        import_checkpoints(files, run)


def claiming_a_warm_up(step, weights, average):
    ema = {
        "decay": 0.99,
        "num_updates": step,
        "shadow_params": list(average.values()),
    }
    return {"model": weights, "ema": ema, "step": step}


def test_a_rule_that_files_claim_wrongly_is_replaced(files, run):
    """A count of updates claims the warm-up of torch-ema; the average has none."""
    write(files, train(), by(constant), form=claiming_a_warm_up)
    with refused("ema_decay 0.99", "--ema-warmup none") as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)
    (line,) = import_checkpoints(files, None, dry_run=True, ema_warmup="none").checks
    assert "as claimed" in line


def test_a_claim_that_nothing_can_check_is_not_replaced(files, run):
    """As of ultralytics, whose files hold no weights beside the average."""

    def alone(step, weights, average):
        return {"ema": average, "updates": step, "model": None}

    write(files, train(), by(constant), form=alone)
    with refused("ema_warmup ratio"):
        import_checkpoints(files, run, ema_warmup="ratio", ema_decay=0.9999)


def test_a_decay_whose_weights_would_be_far_larger_than_the_averages_is_refused(files, run):
    """Averages that forget within a few steps, and no weights beside them to compare."""

    def alone(step, weights, average):
        return {"ema": average, "step": step}

    growing = (1 + np.arange(STEPS) / 200)[:, None] * train()
    write(files, growing, by(lambda _: 0.9), form=alone)
    with refused("ema_decay", "step1100.pt", "far larger"):
        import_checkpoints(files, run, ema_decay=0.9998)
    import_checkpoints(files, run, ema_decay=0.9)
