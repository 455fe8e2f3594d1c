"""Ordinary EMAs whose files lack the warm-up, restarts or clock: an import finds, takes or requires
them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edm2_layout
import numpy as np
import pytest
import torch
from ema_command import Ema
from trained import (
    EVERY,
    STEPS,
    TIMES,
    Average,
    by,
    check,
    error_of,
    follow,
    named,
    network,
    ratio,
    train,
    write,
)

from posthoc_cli import Run, errors, import_checkpoints
from posthoc_cli.profiles import Point


def power(n: float, exponent: float = 2 / 3) -> float:
    return 1 - (1 + n) ** -exponent


def again(decay: Callable[[int], float], begin: int = 850) -> Average:
    """Return an EMA that restarts from the weights at a step, and then counts its updates from
    0."""
    update = by(lambda step: decay(step if step < begin else step - begin))
    return lambda step, e, x: x.copy() if step == begin else update(step, e, x)


def late(begin: int) -> Average:
    """Return copies of the weights up to a step, and then an EMA."""
    return by(lambda step: 0.995 if step > begin else 0.0)


UNSAID: dict[str, tuple[Average, str | None, tuple[int, ...], str]] = {
    "constant": (late(0), None, (), "decay 0.99[45]"),
    "ratio": (
        by(lambda n: min(0.99, ratio(n))),
        "ratio",
        (),
        r"decay 0.9[89].*, reached by the warm-up \(1 \+ n\) / ",
    ),
    "still rising": (
        by(ratio),
        "ratio",
        (),
        r"decay 0.994.* by the warm-up \(1 \+ n\) / \(10 \+ n\)",
    ),
    "power": (
        by(lambda n: min(0.99, power(n))),
        "power",
        (),
        r"decay 0.9[89].*the warm-up 1 - \(1 \+ n\)\^-0.667",
    ),
    "mean teacher": (
        by(lambda n: min(0.998, power(n, 1.0))),
        "power:1",
        (),
        r"decay 0.99[78].*the warm-up 1 - \(1 \+ n\)\^-1",
    ),
    "another power": (
        by(lambda n: power(n, 0.75)),
        "power:0.75",
        (),
        r"the warm-up 1 - \(1 \+ n\)\^-0.75",
    ),
    "restart": (
        again(lambda _: 0.995),
        None,
        (850,),
        "began again from the weights near step 8[3-6].*decay 0.99",
    ),
    "restart of a warm-up": (
        again(lambda n: min(0.99, ratio(n))),
        "ratio",
        (850,),
        "near step 8[0-8].*decay 0.98[5-7].* still rising by",
    ),
    "late": (late(430), None, (430,), "near step 4[1-5]"),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_nobody_says_is_found(case: str, tmp_path: Path) -> None:
    """The import finds the decay's rule and the restarts; averages are as exact as predicted."""
    update, warm_up, begun, said = UNSAID[case]
    done = import_checkpoints(write(tmp_path / "x", train(), update), tmp_path / "run")
    (line,) = done.checks
    assert re.search(f"^found: .*{said}", line), line
    settings = json.loads((tmp_path / "run" / "ema-import.json").read_text())["settings"]
    assert settings.get("ema_warmup") == (warm_up or "none")
    found = [settings["update_after_step"]] if case == "late" else settings.get("ema_restarts", [])
    assert found == [pytest.approx(step, abs=40 if warm_up else 15) for step in begun]
    check(tmp_path / "run", most=5e-3 if begun and warm_up else 2e-3, low=0.2)
    if case in ("another power", "restart of a warm-up", "late"):
        (audit,) = Run(tmp_path / "run").audit()
        assert audit.verdict == "as claimed"
        assert all(interval.unexplained < 1 for interval in audit.intervals)


def test_a_restart_that_was_found_counts_as_uncertain(tmp_path: Path) -> None:
    """The target ends shortly after the restart, when much of the averages is of the weights at the
    restart."""
    folder = write(tmp_path / "x", train(), again(lambda _: 0.999))
    import_checkpoints(folder, tmp_path / "found")
    import_checkpoints(folder, tmp_path / "said", ema_decay=0.999, ema_restarts=[850])
    made = [Run(tmp_path / name).average(0.05, t=1000) for name in ("found", "said")]
    assert made[0].predicted_error > made[1].predicted_error  # type: ignore[operator]
    settings = json.loads((tmp_path / "found" / "ema-import.json").read_text())["settings"]
    assert abs(settings["ema_restarts"][0] - 850) < 3 * settings["ema_late"]


LATE = [(1000, {}, True), (400, {"rate": 1e-2, "optimizer": "SGD"}, True), (430, {}, False)]


@pytest.mark.parametrize(("begin", "options", "copies"), LATE)
def test_files_before_a_late_start_are_weights(
    begin: int, options: dict[str, Any], copies: bool, tmp_path: Path
) -> None:
    """The average in files before is a copy of the weights, or absent; whether the start is said or
    found."""
    weights = train(**options)
    folder = write(
        tmp_path / "x",
        weights,
        late(begin),
        form=lambda step, w, a: (
            {"state_dict": w} | ({"state_dict_ema": a} if copies or step > begin else {})
        ),
    )
    write(tmp_path / "weights", weights, late(begin), form=lambda _, w, __: w)
    alone, _ = error_of(Run(tmp_path / "weights"), 0.25, weights=weights)
    said: list[dict[str, Any]] = [
        {"ema_decay": 0.995, "update_after_step": begin},
        {"ema_decay": 0.995},
    ]
    for settings in ({}, *(said if (begin, copies) == (1000, True) else ())):
        done = import_checkpoints(folder, tmp_path / "run", overwrite=True, **settings)
        assert done.counts["weights"] == len(TIMES)
        assert sum(done.counts.values()) == len(TIMES) + sum(step > begin for step in TIMES)
        check(tmp_path / "run", 0.25, most=1.01 * alone, low=0.4, high=2, weights=weights)
    if copies:
        with pytest.raises(
            errors.InvalidValueError, match=r"update_after_step 1600: is not before .* 1,500: no"
        ):
            import_checkpoints(folder, tmp_path / "none", ema_decay=0.995, update_after_step=1600)


@pytest.mark.parametrize("exponent", [3.0, 20.0])
def test_a_power_function_is_found(exponent: float, tmp_path: Path) -> None:
    """The n-th update keeps (1 - 1/n)^exponent; of its width, exact averages are as far off as
    predicted."""
    update = by(lambda n: (1 - 1 / n) ** exponent)
    options = {} if exponent == 3 else {"rate": 1e-2, "optimizer": "SGD"}
    weights = train(**options)
    folder = write(tmp_path / "x", weights, update)
    width = exponent**0.5 / ((exponent + 1) * (exponent + 2) ** 0.5)
    try:
        done = import_checkpoints(folder, tmp_path / "run")
    except errors.InvalidValueError as error:
        assert "ema_decay: must be given: the files show it too vaguely: sigma_rel 0.04" in str(
            error
        )
        done = import_checkpoints(folder, tmp_path / "run", sigma_rels=[width])
    assert "sigma_rel" in done.checks[0]
    settings = json.loads((tmp_path / "run" / "ema-import.json").read_text())["settings"]
    assert settings["sigma_rels"] == [
        pytest.approx(width, rel=2 * settings.get("ema_uncertainty", 0))
    ]
    for wanted in (0.1, 0.25):
        error, predicted = error_of(Run(tmp_path / "run"), wanted, weights=weights)
        assert error < 2 * predicted < 1e-2


def test_rules_that_explain_the_files_equally_are_asked_for(tmp_path: Path, ema: Ema) -> None:
    """Drift and white noise, from which no rule follows."""
    random = np.random.default_rng(0)
    drift = np.arange(STEPS)[:, None] * random.standard_normal(train().shape[1])
    weights = train()[0] + 1e-3 * drift + 0.1 * random.standard_normal(drift.shape)
    folder = write(tmp_path / "x", weights, by(lambda _: 0.95))
    done = ema("import", folder, "--out", tmp_path / "run")
    assert done.code == 2
    choices = "about equally as decay .* with warm-up .*, and as decay .* with warm-up"
    assert re.search(f"--ema-decay: must be given: .* {choices}", done.error), done.error
    assert not (tmp_path / "run").exists()
    assert ema("audit", folder).code == 0


def test_a_late_start_of_averages_alone(tmp_path: Path) -> None:
    """The files before it are copies of the weights: an average of any length is as exact as
    predicted."""
    folder = write(tmp_path / "x", train(), late(700), form=lambda _, __, average: average)
    import_checkpoints(folder, tmp_path / "run", kind="ema", ema_decay=0.995, update_after_step=700)
    check(tmp_path / "run", most=1, low=0.5, high=2)


def test_a_restart_that_is_said_makes_the_true_profile(tmp_path: Path, ema: Ema) -> None:
    """The profile has the masses of the formula: all of the average at step 900 is of step 850 and
    later."""
    folder = write(tmp_path / "x", train(), again(lambda _: 0.995))
    done = ema(
        "import", folder, "--out", tmp_path / "run", "--ema-decay", 0.995, "--ema-restarts", 850
    )
    assert done.code == 0, done.err
    (profile,) = [
        one.profile
        for one in Run(tmp_path / "run").sources
        if one.t == 900 and not isinstance(one.profile, Point)
    ]
    for s in (0, 849, 850, 870, 899):
        assert profile.tail(s) == pytest.approx(
            1 - 0.995 ** (900 - max(s, 850)) if s >= 850 else 1, abs=1e-12
        )
    check(tmp_path / "run", low=0.4)


# --- timm's warm-up, and files that know only their epoch


def timm(folder: Path) -> Path:
    """Write files as with timm's ModelEmaV3 and `use_warmup`: one after each epoch of 100
    updates."""
    folder.mkdir()
    averages = follow(by(lambda step: min(0.99, power(step - 1))))
    for step in TIMES:
        content = {
            "epoch": step // EVERY - 1,
            "arch": "x",
            "state_dict": named(train()[step - 1]),
            "version": 2,
        }
        content |= {"state_dict_ema": named(averages[step - 1]), "optimizer": {"state": {}}}
        torch.save(content, folder / f"checkpoint-{step // EVERY - 1}.pth.tar")
    return folder


def test_epochs_become_steps(tmp_path: Path, ema: Ema) -> None:
    folder = timm(tmp_path / "x")
    command = ("import", tmp_path / "x", "--out", tmp_path / "run")
    done = ema(*command, "--ema-decay", 0.99)
    assert done.code == 2
    reason = (
        "--steps-per-epoch: must be given: decays are of steps, and numbers are epochs, "
        "counted from 0: "
    )
    assert reason in done.error
    done = ema(*command, "--steps-per-epoch", EVERY)
    assert "reached by the warm-up 1 - (1 + n)^-0.667" in done.out, done.err
    assert {one.step for one in Run(tmp_path / "run").sources} == {*TIMES}
    check(tmp_path / "run", low=0.4)
    said = import_checkpoints(
        folder, None, dry_run=True, ema_decay=0.99, ema_warmup="power", steps_per_epoch=EVERY
    ).checkpoints
    kept = np.prod([min(0.99, power(n)) for n in range(1400, STEPS)])
    (profile,) = [one.profile for one in said if one.decay and one.step == STEPS]
    assert profile.tail(1400) == pytest.approx(1 - kept, abs=1e-9)


# --- EDM and StyleGAN: pickles, a half-life in images, a ramp-up

BATCH = 400
HALF_LIFE = 60_000


def half_life(step: int) -> float:
    """Return the decay of a step by the formula, from the images before it."""
    return 0.5 ** (BATCH / max(min(HALF_LIFE, 0.05 * (step - 1) * BATCH), 1e-8))


def persistent(vector: np.ndarray) -> torch.nn.Module:
    net = edm2_layout.Persistent()
    net.model = network()
    net.model.load_state_dict(named(vector))
    return net


def edm(folder: Path, library: str = "edm", decay: Callable[[int], float] = half_life) -> Path:
    """Write files in these trainings' format: pickles of objects with their source, named by
    thousands of images."""
    folder.mkdir()
    averages = follow(by(decay))
    for step in TIMES:
        kimg = f"{step * BATCH // 1000:06d}"
        weights = persistent(train()[step - 1])
        average = averages[step - 1]
        path = folder / f"network-snapshot-{kimg}.pkl"
        if library == "edm":
            edm2_layout.save(path, persistent(average), half=False)
            torch.save(
                {"net": weights.state_dict(), "optimizer_state": {}},
                folder / f"training-state-{kimg}.pt",
            )
        else:
            edm2_layout.save(
                path,
                persistent(average),
                half=False,
                under="G_ema",
                G=weights,
                D=edm2_layout.network(),
            )
    return folder


@pytest.mark.parametrize("library", ["edm", "stylegan"])
def test_half_lives_in_images(library: str, tmp_path: Path, ema: Ema) -> None:
    folder = edm(tmp_path / "x", library)
    options = {
        "update_every": 399,
        "ema_decay": "half-life:60k",
        "ema_warmup": "ramp-up",
        "dry_run": True,
    }
    later = import_checkpoints(folder / "network-snapshot-000040.pkl", None, **options)
    assert later.checkpoints[0].step == 101 * 399  # names count thousands, rounded down
    done = ema("import", folder, "--out", tmp_path / "run")
    assert (
        "--update-every: must be given, the images of a batch: neither "
        "network-snapshot-000040.pkl nor"
    ) in done.error
    said = (
        "import",
        folder,
        "--out",
        tmp_path / "run",
        "--update-every",
        BATCH,
        "--ema-decay",
        "half-life:60k",
    )
    done = ema(*said)
    assert (
        "--ema-warmup: must be given, ramp-up or none: without training_options.json "
        "network-snapshot"
    ) in done.error
    done = ema(*said, "--ema-warmup", "ramp-up")
    assert "as claimed" in done.out, done.err
    places = [tmp_path / "run", folder]
    if library == "edm":  # an audit of either finds it
        found = ema("import", folder, "--out", tmp_path / "found", "--update-every", BATCH)
        assert "the ramp-up of its half-life to 0.05 of the training so far" in found.out, found.err
        places.append(tmp_path / "found")
    options = {
        "batch_size": BATCH,
        "ema_halflife_kimg" if library == "edm" else "ema_kimg": HALF_LIFE / 1000,
    }
    (folder / "training_options.json").write_text(json.dumps(options))
    for place in places:
        run = Run(place)
        assert {(one.t, one.t_unit) for one in run.sources} == {
            (BATCH * step, "images") for step in TIMES
        }
        assert len(run.sources) == 2 * len(TIMES)
        check(run, prefix="model.")
    average = next(one for one in Run(folder).sources if one.step == BATCH * STEPS and one.decay)
    for step in (1, 50, 1400, 1499):
        kept = np.prod([half_life(later) for later in range(step + 1, STEPS + 1)])
        assert average.profile.tail(step * BATCH) == pytest.approx(1 - kept, abs=1e-9)


@pytest.mark.parametrize("says", ["options", "option", "nothing"])
def test_a_half_life_without_ramp_up(says: str, tmp_path: Path) -> None:
    """Whether it is said or found, the profile is the product of equal decays."""
    beta = 0.5 ** (BATCH / HALF_LIFE)
    folder = edm(tmp_path / "x", decay=lambda _: beta)
    settings: dict[str, Any] = {"update_every": BATCH}
    if says == "options":
        options = {
            "batch_size": BATCH,
            "ema_halflife_kimg": HALF_LIFE / 1000,
            "ema_rampup_ratio": None,
        }
        (folder / "training_options.json").write_text(json.dumps(options))
    elif says == "option":
        settings |= {"ema_decay": f"half-life:{HALF_LIFE}", "ema_warmup": "none"}
    import_checkpoints(folder, tmp_path / "run", **settings)
    run = Run(tmp_path / "run")
    # An odd decay is found within some percent only.
    check(run, prefix="model.", most=5e-3 if says == "nothing" else 2e-3)
    average = next(one for one in run.sources if one.step == BATCH * STEPS and one.decay)
    for step in (1, 1400, 1499):
        tail = 1 - beta ** (STEPS - step)
        assert average.profile.tail(step * BATCH) == pytest.approx(
            tail, abs=2e-2 if says == "nothing" else 1e-9
        )
