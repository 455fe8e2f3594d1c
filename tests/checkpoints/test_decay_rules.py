"""Rules of decay, each against a loop in float64 of its library's own formula."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ema_command import Ema
from trained import STEPS, TIMES, Weights, by, check, ema, error_of, ratio, train, write

from posthoc_cli import Run, errors, import_checkpoints
from posthoc_cli.checkpoints.audit_decay import possible_rules
from posthoc_cli.checkpoints.settings import ImportSettings, warm_up_of, warm_up_text
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.profiles import DecayRule, OrdinaryEMA


def ultralytics(decay: float, tau: int) -> Iterator[float]:
    updates = 0
    while True:
        updates += 1
        yield decay * (1 - math.exp(-updates / tau))


def audiocraft(decay: float, _: int) -> Iterator[float]:
    count = 0.0
    while True:
        count = count * decay + 1
        yield 1 - 1 / count


def dino(base: float, steps: int) -> Iterator[float]:
    """As an array over the training, then 1."""
    angles = np.pi * np.arange(steps) / steps
    yield from 1 + 0.5 * (base - 1) * (1 + np.cos(angles))
    while True:
        yield 1.0


def ijepa(base: float, steps: int) -> Iterator[float]:
    yield from (base + k * (1 - base) / steps for k in range(steps))
    while True:
        yield 1.0


Loop = Callable[[float, int], Iterator[float]]
Decay = Callable[[int], float]
"""The decay of the n-th update."""

LOOPS: dict[str, tuple[Loop, float, int]] = {
    "exp:2000": (ultralytics, 0.9999, 2000),
    "unbiased": (audiocraft, 0.99, 0),
    "unbiased, long": (audiocraft, 0.99999, 0),
    "cosine:0.996": (dino, 0.996, 1000),
    "cosine:0.9, over before the last file": (dino, 0.9, 300),
    "linear:0.998, of a longer training": (ijepa, 0.998, 1250),
}
"""The decays of a library, by its decay or base, and by its second number if it has one."""


def constant(_: int) -> float:
    return 0.99


def after_a_copy(n: int) -> float:
    return 0.99 if n > 1 else 0.0


def long_ratio(n: int) -> float:
    return min(0.999, ratio(n))


def power(n: int) -> float:
    return min(0.99, 1 - (1 + n) ** (-2 / 3))


def power_after_three_copies(n: int) -> float:
    return power(max(n - 3, 0))


def slow_power(n: int) -> float:
    return min(0.99, 1 - (1 + n / 20) ** -0.8)


RULES: dict[str, tuple[DecayRule, Decay]] = {
    "constant": (DecayRule(0.99), constant),
    "first copies": (DecayRule(0.99, copies=1), after_a_copy),
    "ratio": (DecayRule(0.999, "ratio"), long_ratio),
    "power": (DecayRule(0.99, "power", copies=3), power_after_three_copies),
    "slow power": (DecayRule(0.99, "power", inv_gamma=20.0, power=0.8), slow_power),
}
"""Rules of other libraries, and the decay of their n-th update."""


def rule_of(name: str) -> DecayRule:
    _, first, second = LOOPS[name]
    arguments = warm_up_of(name.partition(",")[0])
    assert arguments is not None
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
def test_a_profile_weighs_as_the_library_does(name: str, every: int) -> None:
    """Of a random walk, the average by the loop and by the profile's masses are equal."""
    rule, decays = rule_and_decays(name)
    steps = 1000
    motion = np.random.default_rng(0).standard_normal(steps + 1)
    walk = np.cumsum(motion)
    average = walk[0]
    for step in range(every, steps + 1, every):
        decay = next(decays)
        average = decay * average + (1 - decay) * walk[step]
    profile = rule.profile(steps, steps // every, every)
    tails = profile.tail(np.arange(steps + 1.0) - 1e-9)
    masses = tails - np.append(tails[1:], 0.0)
    masses[0] = 1 - masses[1:].sum()  # the initial weights
    exact = 1e-12 * np.abs(walk).max()
    assert masses @ walk == pytest.approx(average, abs=exact)


def test_a_schedule_goes_on_after_a_restart() -> None:
    """It counts the steps of the training, not the updates since the restart."""
    settings = ImportSettings(ema_warmup="cosine:0.99", steps=1000, ema_restarts=[400])
    profile = Updates().profile(Path("x"), 600, settings)
    decays = [*islice(dino(0.99, 1000), 600)]
    for s in (450, 599):
        kept = math.prod(decays[s:])
        assert profile.tail(s) == pytest.approx(1 - kept, abs=1e-13)


def test_steps_are_of_the_training_where_updates_are_rarer() -> None:
    settings = ImportSettings(ema_warmup="linear:0.9", steps=1000, update_every=10)
    profile = Updates().profile(Path("x"), 500, settings)
    kept = math.prod(0.9 + 0.1 * k / 100 for k in range(40, 50))
    assert profile.tail(400) == pytest.approx(1 - kept, abs=1e-13)


def steps_of(profile: OrdinaryEMA, first: int) -> list[int]:
    """Return the steps from a first one on at which the tail of a profile jumps."""
    steps = []
    for step in range(first, int(profile.t) + 1):
        if profile.tail(step - 0.5) > profile.tail(step):
            steps.append(step)
    return steps


@pytest.mark.parametrize(
    ("calls", "updates"),
    [
        ("multiples", range(20, 98, 10)),
        ("from first", range(11, 98, 10)),
        ("after copy", range(20, 98, 10)),
    ],
)
def test_which_calls_are_updates(calls: Any, updates: range) -> None:
    """The steps of the updates by step 97, every tenth call, as told by the profile's jumps, after
    a copy at most one interval before the first of them."""
    settings = ImportSettings(ema_decay=0.5, update_after_step=20, update_every=10)
    profile = Updates({}, calls=calls).profile(Path("x"), 97, settings)
    assert steps_of(profile, 1) == [*updates]


def test_a_count_of_calls_tells_the_updates() -> None:
    settings = ImportSettings(ema_decay=0.5, update_after_step=0, update_every=10)
    profile = Updates({}, 97, calls="counted").profile(Path("x"), 97, settings)
    assert steps_of(profile, 12) == [*range(21, 98, 10)]


@pytest.mark.parametrize("text", ["none", "power:0.75", "ramp-up", "exp:500", "unbiased", "cosine"])
def test_a_warm_up_reads_as_it_is_written(text: str) -> None:
    arguments = warm_up_of(text)
    assert arguments is not None
    assert warm_up_text(DecayRule(0.99, **arguments)) == text


@pytest.mark.parametrize("text", ["exp:0", "unbiased:3", "cosine:1", "linear:", "yolo"])
def test_other_warm_ups_are_refused(text: str) -> None:
    with pytest.raises(errors.InvalidValueError, match=r"must be one of none, .*cosine\[:0\.996\]"):
        ImportSettings(ema_warmup=text)


@pytest.mark.parametrize(
    "text",
    [
        "99%",
        "5%",
        "half-life:",
    ],
)
def test_a_bare_percentage_is_no_decay(text: str, tmp_path: Path, ema: Ema) -> None:
    """A training's share is a half-life, and says so."""
    folder = write(tmp_path / "x", train(), by(constant))
    done = ema("import", folder, "--out", tmp_path / "run", "--ema-decay", text)
    assert done.code == 2
    accepted = "must be in (0, 1), 0.99 for 99%, or a half-life such as half-life:500000 or half-"
    assert f"--ema-decay '{text}': {accepted}life:5%" in done.error


# --- files whose rule is said, or found


def exponential(step: int) -> float:
    return 0.995 * (1 - math.exp(-step / 500))


def unbiased(step: int) -> float:
    return 1 - (1 - 0.995) / (1 - 0.995**step)


def cosine(step: int) -> float:
    angle = math.pi * (step - 1) / STEPS
    return 1 - 0.01 * (math.cos(angle) + 1) / 2


def beyond(step: int) -> float:
    return 0.99 + 0.01 * (step - 1) / (1.25 * STEPS)


SAID: dict[str, tuple[Decay, list[object]]] = {
    "exp": (exponential, ["--ema-decay", 0.995, "--ema-warmup", "exp:500"]),
    "unbiased": (unbiased, ["--ema-decay", 0.995, "--ema-warmup", "unbiased"]),
    "cosine": (cosine, ["--ema-warmup", "cosine:0.99"]),
    "linear": (beyond, ["--ema-warmup", "linear:0.99", "--steps", 1875]),
}


def form(step: int, weights: Weights, average: Weights) -> object:
    """As a loop of one's own: nothing says how the average is updated."""
    return {"model": weights, "ema": average, "step": step}


def last_profile(run: Path) -> OrdinaryEMA:
    last = [one.profile for one in Run(run).sources if one.t == STEPS]
    (profile,) = [one for one in last if isinstance(one, OrdinaryEMA)]
    return profile


@pytest.mark.parametrize("name", SAID)
def test_a_rule_that_is_said_fits_the_files(name: str, tmp_path: Path, ema: Ema) -> None:
    decay, options = SAID[name]
    folder = write(tmp_path / "x", train(), by(decay), form=form)
    done = ema("import", folder, "--out", tmp_path / "run", *options)
    assert done.code == 0, done.err
    assert "as claimed" in done.out
    assert ("steps: taken as 1,500, the last" in done.out) == (name == "cosine")
    check(tmp_path / "run", most=1e-2)  # the first files of long averages are not exact
    profile = last_profile(tmp_path / "run")
    kept = math.prod(decay(step) for step in range(1401, STEPS + 1))
    assert profile.tail(1400) == pytest.approx(1 - kept, abs=1e-12)


def test_settings_that_a_rule_does_not_take_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        errors.InvalidValueError, match=r"ema_decay 0\.99: has no place beside ema_warmup cosine"
    ):
        ImportSettings(ema_decay=0.99, ema_warmup="cosine")
    folder = write(tmp_path / "x", train(), ema(0.99))
    with pytest.raises(errors.InvalidValueError, match=r"steps 1500: is of no use"):
        import_checkpoints(folder, None, dry_run=True, ema_decay=0.99, steps=STEPS)


def test_a_base_that_is_wrong_does_not_fit(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", train(), by(cosine), form=form)
    with pytest.raises(errors.InvalidValueError, match=r"does not fit the files: .* too long"):
        import_checkpoints(folder, tmp_path / "run", ema_warmup="cosine:0.9")


@pytest.mark.parametrize("name", ["unbiased", "cosine"])
def test_a_rule_that_nobody_says_is_found(name: str, tmp_path: Path) -> None:
    decay, _ = SAID[name]
    folder = write(tmp_path / "x", train(), by(decay), form=form)
    done = import_checkpoints(folder, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "ema-import.json").read_text())["settings"]
    assert settings["ema_warmup"].startswith(name), done.checks
    check(tmp_path / "run", most=1e-2)


# --- what the files do not show


def drifting(noise: float) -> np.ndarray:
    random = np.random.default_rng(0)
    direction = random.standard_normal(train().shape[1])
    drift = 1e-3 * np.arange(STEPS)[:, None] * direction
    noises = random.standard_normal(drift.shape)
    return train()[0] + drift + noise * noises


@pytest.mark.parametrize(("length", "noise"), [(3, 0.03), (20, 0.0), (20, 0.1)])
def test_a_length_far_below_the_spacing_is_not_claimed(
    length: int,
    noise: float,
    tmp_path: Path,
) -> None:
    """Drift and white noise, files 100 apart: the true length is within twice the ±, or asked."""
    folder = write(tmp_path / "x", drifting(noise), ema(1 - 1 / length))
    (found,) = Run(folder).audit()
    if found.found is None:
        reasons = ("too short", "do not show its length", "about equally")
        assert any(reason in found.text for reason in reasons), found.text
        with pytest.raises(errors.InvalidValueError, match="ema_decay: must be given"):
            import_checkpoints(folder, tmp_path / "run")
    else:
        assert found.uncertainty is not None
        factor = (1 - found.found) * length
        assert abs(math.log(factor)) < 2 * found.uncertainty


def medium_ratio(n: int) -> float:
    return min(0.995, ratio(n))


FEW: dict[str, Decay] = {
    "constant": constant,
    "power": power,
    "ratio": medium_ratio,
    "unbiased": unbiased,
}


@pytest.mark.parametrize("name", FEW)
def test_five_files_show_a_length_within_the_uncertainty(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", train(falls=True), by(FEW[name]), form=form)
    for step in TIMES:
        if step % 300:
            (folder / f"step{step}.pt").unlink()
    try:
        import_checkpoints(folder, tmp_path / "run")
    except errors.InvalidValueError as error:
        assert "ema_decay: must be given" in str(error)
        return
    settings = json.loads((tmp_path / "run" / "ema-import.json").read_text())["settings"]
    found = last_profile(tmp_path / "run")
    decays = np.array([FEW[name](step) for step in range(1, STEPS + 1)])
    true = np.cumprod(decays[::-1]).sum()
    tails = found.tail(np.arange(STEPS) + 0.5)
    length = (1 - tails).sum()
    most = max(2.5 * settings["ema_uncertainty"], 0.02)
    assert abs(math.log(length / true)) < most


# --- a rule that is given, and that the files contradict


def line(step: int) -> float:
    return 0.99 + 0.01 * (step - 1) / STEPS


FALLING: dict[str, Any] = {"falls": True, "seed": 7}
FAST: dict[str, Any] = {"rate": 1e-2, "optimizer": "SGD"}


def late_ratio(step: int) -> float:
    return min(0.99, ratio(step))


CONTRADICTED: dict[str, tuple[Decay, dict[str, object], str]] = {
    "constant": (cosine, {"ema_decay": 0.99}, "cosine"),
    "a warm-up": (cosine, {"ema_decay": 0.99, "ema_warmup": "ratio"}, "cosine"),
    "another schedule": (cosine, {"ema_warmup": "linear:0.99"}, "cosine"),
    "of a line": (line, {"ema_decay": 0.99}, "linear"),
}


@pytest.mark.parametrize("name", CONTRADICTED)
def test_a_rule_that_explains_the_files_worse_is_refused(name: str, tmp_path: Path) -> None:
    decay, settings, true = CONTRADICTED[name]
    folder = write(tmp_path / "x", train(**FALLING), by(decay), form=form)
    pattern = rf"does not fit the files: the average moves as by .*warm-up {true}:0\.(99|989)"
    with pytest.raises(errors.InvalidValueError, match=pattern):
        import_checkpoints(folder, None, dry_run=True, **settings)


TRUE: dict[str, tuple[dict[str, Any], Decay, dict[str, object]]] = {
    "ratio": (FALLING, late_ratio, {"ema_decay": 0.99, "ema_warmup": "ratio"}),
    "of a line": (FAST, line, {"ema_warmup": "linear:0.99"}),
    "exp": (FAST, exponential, {"ema_decay": 0.995, "ema_warmup": "exp:500"}),
}
"""Of "ratio" and "exp" the path of the weights shows another length, 14 and 90 % off and by more
than the uncertainty says: the claims explain the intervals better."""


@pytest.mark.parametrize("name", TRUE)
def test_a_rule_that_is_true_is_taken(name: str, tmp_path: Path) -> None:
    training, decay, settings = TRUE[name]
    folder = write(tmp_path / "x", train(**training), by(decay), form=form)
    done = import_checkpoints(folder, None, dry_run=True, **settings)
    assert done.checks[-1].startswith("given: ")


def test_a_decay_that_is_true_with_a_warm_up_is_refused_with_the_warm_up(tmp_path: Path) -> None:
    def rising(n: int) -> float:
        return min(0.998, n / (n + 1))

    folder = write(tmp_path / "x", train(), by(rising), form=form)
    reason = "ema_decay 0.998: does not fit .* without the warm-up .*; add `ema_warmup` power:1"
    with pytest.raises(errors.InvalidValueError, match=reason):
        import_checkpoints(folder, None, dry_run=True, ema_decay=0.998)
    import_checkpoints(folder, tmp_path / "run", ema_decay=0.998, ema_warmup="power:1")
    check(tmp_path / "run", most=1e-2)


def test_a_length_that_nothing_limits_is_said_in_one_line(tmp_path: Path) -> None:
    """An average of 1 step for 200 claimed ones: the factor between them has no upper bound."""
    folder = write(tmp_path / "x", train(**FALLING), by(exponential), form=form)
    with pytest.raises(errors.InvalidValueError, match=r"does not fit the files: .* times too sh"):
        import_checkpoints(folder, None, dry_run=True, ema_decay=0.995)


def cosine_to_0_999(n: int) -> float:
    angle = math.pi * n / STEPS
    return 0.9945 - 0.0045 * math.cos(angle)


def two_decays(n: int) -> float:
    return 0.99 if n < STEPS / 2 else 0.997


OUTSIDE: dict[str, Decay] = {"cosine": cosine_to_0_999, "two decays": two_decays}
"""Rules that the table has not."""


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_rule_that_is_unknown_is_asked_for(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", train(**FALLING), by(OUTSIDE[name]), form=form)
    with pytest.raises(errors.InvalidValueError, match=r"ema_decay: must be given: .*length"):
        import_checkpoints(folder, tmp_path / "run")


def test_a_decay_that_an_unknown_rule_reaches_widens_the_error(tmp_path: Path) -> None:
    weights = train(**FALLING)
    folder = write(tmp_path / "x", weights, by(lambda n: n / (n + 30)), form=form)
    import_checkpoints(folder, tmp_path / "run", ema_decay=0.98)
    run = Run(tmp_path / "run")
    for width in (0.05, 0.25):
        error, predicted = error_of(run, width, weights=weights)
        assert error < 2 * predicted


def claiming_a_warm_up(step: int, weights: Weights, average: Weights) -> object:
    ema = {"decay": 0.99, "num_updates": step, "shadow_params": list(average.values())}
    return {"model": weights, "ema": ema, "step": step}


def test_a_rule_that_files_claim_wrongly_is_replaced(tmp_path: Path, ema: Ema) -> None:
    """A count of updates claims the warm-up of torch-ema; the average has none."""
    folder = write(tmp_path / "x", train(), by(constant), form=claiming_a_warm_up)
    command = ("import", folder, "--out", tmp_path / "run")
    refused = ema(*command).error
    assert "does not fit the files" in refused
    assert "--ema-decay and --ema-warmup of an import together replace what files say" in refused
    assert "contradicts" in ema(*command, "--ema-warmup", "none").error
    assert "as claimed" in ema(*command, "--ema-warmup", "none", "--ema-decay", "0.99").out


def test_a_claim_that_nothing_can_check_is_not_replaced(tmp_path: Path) -> None:
    """As of ultralytics, whose files hold no weights beside the average."""

    def alone(step: int, weights: Weights, average: Weights) -> object:
        return {"ema": average, "updates": step, "model": None}

    folder = write(tmp_path / "x", train(), by(constant), form=alone)
    with pytest.raises(errors.InvalidValueError, match="ema_warmup ratio: contradicts"):
        import_checkpoints(folder, tmp_path / "run", ema_warmup="ratio", ema_decay=0.9999)


def test_rules_that_begin_as_the_mean_count_the_first_weights_alike() -> None:
    numbers = np.arange(1.0, 21.0)
    for rule in possible_rules(1000):
        kept = rule.at(numbers)
        from_last = np.cumprod(kept[:0:-1])
        later = np.append(from_last[::-1], 1.0)
        masses = (1 - kept) * later
        is_even = np.ptp(masses[1:]) < 1e-6  # the first update may be a copy
        is_mean = is_even and masses.sum() > 0.9
        assert rule.begins_as_mean == is_mean, rule
    named = [warm_up_text(rule) for rule in possible_rules(1000) if rule.begins_as_mean]
    assert named == ["power:1", "unbiased"]
