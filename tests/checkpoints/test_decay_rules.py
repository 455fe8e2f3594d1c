"""Rules of decay, each against a loop in float64 of its library's own formula."""

import math
import re
from collections.abc import Iterator
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import (
    STEPS,
    TIMES,
    by,
    check,
    ema,
    error_of,
    ratio,
    settings_of,
    train,
    write,
)

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.checkpoints.audit_decay import possible_rules
from posthoc_cli.checkpoints.settings import ImportSettings, warm_up_of, warm_up_text
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import DecayRule, OrdinaryEMA


def ultralytics(decay, tau):
    for updates in count(1):
        risen = 1 - math.exp(-updates / tau)
        yield decay * risen


def audiocraft(decay, _):
    total = 0.0
    while True:
        total = total * decay + 1
        yield 1 - 1 / total


def dino(base, steps):
    """As an array over the training, then 1."""
    angles = np.linspace(0, np.pi, steps, endpoint=False)
    falling = 0.5 * (1 + np.cos(angles))
    yield from 1 - (1 - base) * falling
    yield from repeat(1.0)


def ijepa(base, steps):
    each = (1 - base) / steps
    for k in range(steps):
        yield base + k * each
    yield from repeat(1.0)


LOOPS = {
    "exp:2000": (ultralytics, 0.9999, 2000),
    "unbiased": (audiocraft, 0.99, 0),
    "unbiased, long": (audiocraft, 0.99999, 0),
    "cosine:0.996": (dino, 0.996, 1000),
    "cosine:0.9, over before the last file": (dino, 0.9, 300),
    "linear:0.998, of a longer training": (ijepa, 0.998, 1250),
}
"""The decays of a library, by its decay or base, and by its second number if it has one."""


def constant(_):
    return 0.99


def after_a_copy(n):
    return 0.99 if n > 1 else 0.0


def long_ratio(n):
    return min(0.999, ratio(n))


def power(n):
    rising = 1 - (1 + n) ** (-2 / 3)
    return min(0.99, rising)


def power_after_three_copies(n):
    counted = max(n - 3, 0)
    return power(counted)


def slow_power(n):
    rising = 1 - (1 + n / 20) ** -0.8
    return min(0.99, rising)


RULES = {
    "constant": (DecayRule(0.99), constant),
    "first copies": (DecayRule(0.99, copies=1), after_a_copy),
    "ratio": (DecayRule(0.999, "ratio"), long_ratio),
    "power": (DecayRule(0.99, "power", copies=3), power_after_three_copies),
    "slow power": (DecayRule(0.99, "power", inv_gamma=20.0, power=0.8), slow_power),
}
"""Rules of other libraries, and the decay of their n-th update."""


def rule_of(name: str) -> DecayRule:
    _, first, second = LOOPS[name]
    text, *_ = name.split(",")
    arguments = warm_up_of(text)
    if "base" in arguments:
        return DecayRule(steps=second, **arguments)
    return DecayRule(first, **arguments)


def rule_and_decays(name: str) -> tuple[DecayRule, Iterator[float]]:
    if name in RULES:
        rule, at = RULES[name]
        return rule, map(at, count(1))
    loop, first, second = LOOPS[name]
    return rule_of(name), loop(first, second)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("name", [*LOOPS, *RULES])
def test_a_profile_weighs_as_the_library_does(name, every):
    """Of a random walk, the average by the loop and by the profile's masses are equal."""
    rule, decays = rule_and_decays(name)
    steps = 1000
    random = np.random.default_rng(0)
    walk = np.cumsum(random.standard_normal(steps + 1))
    average = walk[0]
    for step in range(every, steps + 1, every):
        decay = next(decays)
        average = decay * average + (1 - decay) * walk[step]
    profile = rule.profile(steps, steps // every, every)
    before = np.arange(steps + 1.0) - 1e-9
    tails = profile.tail(before)
    masses = -np.diff(tails, append=0.0)
    masses[0] = 1 - masses[1:].sum()  # the initial weights
    exact = 1e-12 * np.abs(walk).max()
    assert masses @ walk == pytest.approx(average, abs=exact)


def test_a_schedule_goes_on_after_a_restart():
    """It counts the steps of the training, not the updates since the restart."""
    settings = ImportSettings(ema_warmup="cosine:0.99", steps=1000, ema_restarts=[400])
    profile = Updates().profile(FILE, 600, settings)
    decays = [*islice(dino(0.99, 1000), 600)]
    for s in (450, 599):
        mass = 1 - math.prod(decays[s:])
        assert profile.tail(s) == pytest.approx(mass, abs=1e-13)


FILE = Path("x")
"""The file that an error would name."""


def test_steps_are_of_the_training_where_updates_are_rarer():
    settings = ImportSettings(ema_warmup="linear:0.9", steps=1000, update_every=10)
    profile = Updates().profile(FILE, 500, settings)
    passed = np.arange(40, 50) / 100
    decays = 0.9 + 0.1 * passed
    mass = 1 - decays.prod()
    assert profile.tail(400) == pytest.approx(mass, abs=1e-13)


def steps_of(profile: OrdinaryEMA, first: int) -> list[int]:
    """Return the steps from a first one on at which the tail of a profile jumps."""
    steps = np.arange(first, int(profile.t) + 1)
    before = profile.tail(steps - 0.5)
    jumps = before > profile.tail(steps)
    return steps[jumps].tolist()


@pytest.mark.parametrize(
    ("calls", "updates"),
    [
        ("multiples", range(20, 98, 10)),
        ("from first", range(11, 98, 10)),
        ("after copy", range(20, 98, 10)),
    ],
)
def test_which_calls_are_updates(calls, updates):
    """The steps of the updates by step 97, every tenth call, as told by the profile's jumps, after
    a copy at most one interval before the first of them."""
    settings = ImportSettings(ema_decay=0.5, update_after_step=20, update_every=10)
    counted = Updates({}, calls=calls)
    profile = counted.profile(FILE, 97, settings)
    assert steps_of(profile, 1) == [*updates]


def test_a_count_of_calls_tells_the_updates():
    settings = ImportSettings(ema_decay=0.5, update_after_step=0, update_every=10)
    counted = Updates({}, 97, calls="counted")
    profile = counted.profile(FILE, 97, settings)
    assert steps_of(profile, 12) == [*range(21, 98, 10)]


WARM_UPS = ["none", "power:0.75", "ramp-up", "exp:500", "unbiased", "cosine"]


@pytest.mark.parametrize("text", WARM_UPS)
def test_a_warm_up_reads_as_it_is_written(text):
    arguments = warm_up_of(text)
    rule = DecayRule(0.99, **arguments)
    assert warm_up_text(rule) == text


@pytest.mark.parametrize("text", ["exp:0", "unbiased:3", "cosine:1", "linear:", "yolo"])
def test_other_warm_ups_are_refused(text):
    with pytest.raises(InvalidValueError, match=r"must be one of none, .*cosine\[:0\.996\]"):
        ImportSettings(ema_warmup=text)


@pytest.mark.parametrize("text", ["99%", "5%", "half-life:"])
def test_a_bare_percentage_is_no_decay(text):
    """A training's share is a half-life, and says so."""
    accepted = r"0\.99 for 99%, or a half-life such as half-life:500000 or half-life:5%"
    with pytest.raises(InvalidValueError, match=rf"'{text}': must be in \(0, 1\), {accepted}"):
        ImportSettings(ema_decay=text)


# --- files whose rule is said, or found


def exponential(step):
    risen = 1 - math.exp(-step / 500)
    return 0.995 * risen


def unbiased(step):
    counted = 1 - 0.995**step
    return 1 - (1 - 0.995) / counted


def cosine(step):
    angle = math.pi * (step - 1) / STEPS
    falling = (1 + math.cos(angle)) / 2
    return 1 - 0.01 * falling


def beyond(step):
    passed = (step - 1) / (1.25 * STEPS)
    return 0.99 + 0.01 * passed


STEPS_TAKEN = "steps: taken as 1,500, the last checkpoint's"
SAID = {
    exponential: ({"ema_decay": 0.995, "ema_warmup": "exp:500"}, []),
    cosine: ({"ema_warmup": "cosine:0.99"}, [STEPS_TAKEN]),
    beyond: ({"ema_warmup": "linear:0.99", "steps": 1875}, []),
}
"""Settings, and what an import says besides."""


FALLING = {"falls": True, "seed": 7}


def form(step, weights, average):
    """As a loop of one's own: nothing says how the average is updated."""
    return {"model": weights, "ema": average, "step": step}


def saved(folder: Path, decay: Any, **training: Any) -> Path:
    """Write the files of a training whose n-th update keeps decay(n)."""
    folder.mkdir()
    return write(folder, train(**training), by(decay), form=form)


def last_profile(run: Path) -> OrdinaryEMA:
    last = [one.profile for one in Run(run).sources if one.t == STEPS]
    (profile,) = (one for one in last if isinstance(one, OrdinaryEMA))
    return profile


@pytest.mark.parametrize("decay", SAID)
def test_a_rule_that_is_said_fits_the_files(decay, files, run):
    saved(files, decay)
    settings, besides = SAID[decay]
    *others, checked = import_checkpoints(files, run, **settings).checks
    assert others == besides
    assert "as claimed" in checked
    check(run, most=1e-2)  # the first files of long averages are not exact
    profile = last_profile(run)
    decays = [decay(step) for step in range(1401, STEPS + 1)]
    mass = 1 - math.prod(decays)
    assert profile.tail(1400) == pytest.approx(mass, abs=1e-12)


def test_a_schedule_takes_no_decay_besides():
    reason = r"ema_decay 0\.99: has no place beside ema_warmup cosine"
    with pytest.raises(InvalidValueError, match=reason):
        ImportSettings(ema_decay=0.99, ema_warmup="cosine")


def test_a_decay_takes_no_steps_of_a_schedule(files, run, ema):
    saved(files, constant)
    done = ema("import", files, "--out", run, "--ema-decay", 0.99, "--steps", STEPS)
    assert "--steps 1500: is of no use" in done.error


def test_a_base_that_is_wrong_does_not_fit(files, run):
    saved(files, cosine)
    with pytest.raises(InvalidValueError, match=r"does not fit the files: .* too long"):
        import_checkpoints(files, run, ema_warmup="cosine:0.9")


@pytest.mark.parametrize("decay", [unbiased, cosine])
def test_a_rule_that_nobody_says_is_found(decay, files, run):
    saved(files, decay)
    done = import_checkpoints(files, run)
    found = settings_of(run)["ema_warmup"]
    assert found.startswith(decay.__name__), done.checks
    check(run, most=1e-2)


# --- what the files do not show


def drifting(noise: float) -> np.ndarray:
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
    assert "the checkpoints do not show its length" in audit.text


def test_a_length_far_below_the_spacing_has_a_true_uncertainty(files):
    """20 steps, of files 100 apart that drift."""
    write(files, drifting(0.0), ema(0.95))
    (audit,) = Run(files).audit()
    factor = 20 * (1 - audit.found)
    assert abs(math.log(factor)) < 2 * audit.uncertainty


@pytest.mark.parametrize("decay", [constant, power, unbiased])
def test_five_files_show_a_length_within_the_uncertainty(decay, files, run):
    saved(files, decay, **FALLING)
    for step in TIMES:
        if step % 300:
            (files / f"step{step}.pt").unlink()
    import_checkpoints(files, run)
    decays = [decay(step) for step in range(STEPS, 0, -1)]
    true = np.cumprod(decays).sum()
    steps = np.arange(STEPS) + 0.5
    tails = last_profile(run).tail(steps)
    length = (1 - tails).sum()
    most = 2.5 * settings_of(run)["ema_uncertainty"]
    error = abs(math.log(length / true))
    assert error < max(most, 0.02)


# --- a rule that is given, and that the files contradict


def line(step):
    passed = (step - 1) / STEPS
    return 0.99 + 0.01 * passed


FAST = {"rate": 1e-2, "optimizer": "SGD"}


def late_ratio(step):
    return min(0.99, ratio(step))


CONTRADICTED = [
    (cosine, {"ema_decay": 0.99}, "cosine"),
    (line, {"ema_decay": 0.99}, "linear"),
]


@pytest.mark.parametrize(("decay", "settings", "true"), CONTRADICTED)
def test_a_rule_that_explains_the_files_worse_is_refused(decay, settings, true, files, run):
    saved(files, decay, **FALLING)
    pattern = rf"does not fit the files: the average moves as by .*warm-up {true}:0\.(99|989)"
    with pytest.raises(InvalidValueError, match=pattern):
        import_checkpoints(files, run, **settings)


TRUE = [
    (FALLING, late_ratio, {"ema_decay": 0.99, "ema_warmup": "ratio"}),
    (FAST, exponential, {"ema_decay": 0.995, "ema_warmup": "exp:500"}),
]
"""Of the first and the last the path of the weights shows another length, 14 and 90 % off and by
more than the uncertainty says: the claims explain the intervals better."""


@pytest.mark.parametrize(("training", "decay", "settings"), TRUE)
def test_a_rule_that_is_true_is_taken(training, decay, settings, files, run):
    saved(files, decay, **training)
    done = import_checkpoints(files, run, **settings)
    assert done.checks[-1].startswith("given: ")


def test_a_decay_that_is_true_with_a_warm_up_is_refused_with_the_warm_up(files, run):
    def rising(n):
        return min(0.998, n / (n + 1))

    saved(files, rising)
    reason = "ema_decay 0.998: does not fit .* without the warm-up .*; add `ema_warmup` power:1"
    with pytest.raises(InvalidValueError, match=reason):
        import_checkpoints(files, run, ema_decay=0.998)


def test_a_length_that_nothing_limits_is_said_in_one_line(files):
    """An average of 1 step for 200 claimed ones: the factor between them has no upper bound."""
    saved(files, exponential, **FALLING)
    (audit,) = Run(files).audit(0.995)
    assert re.search(r"times too short: .* times a step: once", audit.text), audit.text


def cosine_to_0_999(n):
    angle = math.pi * n / STEPS
    return 0.9945 - 0.0045 * math.cos(angle)


def two_decays(n):
    return 0.99 if n < STEPS / 2 else 0.997


@pytest.mark.parametrize("decay", [cosine_to_0_999, two_decays])
def test_a_rule_that_the_table_has_not_is_asked_for(decay, files, run):
    saved(files, decay, **FALLING)
    with pytest.raises(InvalidValueError, match=r"ema_decay: must be given: .*length"):
        import_checkpoints(files, run)


def test_a_decay_that_an_unknown_rule_reaches_widens_the_error(files, run):
    def rising(n):
        return n / (n + 30)

    saved(files, rising, **FALLING)
    import_checkpoints(files, run, ema_decay=0.98)
    weights = train(**FALLING)
    for width in (0.05, 0.25):
        error, predicted = error_of(Run(run), width, weights=weights)
        assert error < 2 * predicted


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
    together = "`ema_decay` and `ema_warmup` of an import together replace what files say"
    with pytest.raises(InvalidValueError, match=f"does not fit the files.*{together}"):
        import_checkpoints(files, run)
    with pytest.raises(InvalidValueError, match="contradicts"):
        import_checkpoints(files, run, ema_warmup="none")
    (line,) = import_checkpoints(files, run, ema_warmup="none", ema_decay=0.99).checks
    assert "as claimed" in line


def test_a_claim_that_nothing_can_check_is_not_replaced(files, run):
    """As of ultralytics, whose files hold no weights beside the average."""

    def alone(step, weights, average):
        return {"ema": average, "updates": step, "model": None}

    write(files, train(), by(constant), form=alone)
    with pytest.raises(InvalidValueError, match="ema_warmup ratio: contradicts"):
        import_checkpoints(files, run, ema_warmup="ratio", ema_decay=0.9999)


def test_rules_that_begin_as_the_mean_count_the_first_weights_alike():
    means = []
    for rule in possible_rules(1000):
        numbers = np.arange(20.0, 0.0, -1)
        kept = rule.at(numbers)
        later = np.append(1.0, np.cumprod(kept))
        masses = -np.diff(later)
        is_even = np.ptp(masses[:-1]) < 1e-6  # the first update may be a copy
        is_mean = is_even and masses.sum() > 0.9
        assert rule.begins_as_mean == is_mean, rule
        if is_mean:
            means.append(warm_up_text(rule))
    assert means == ["power:1", "unbiased"]
