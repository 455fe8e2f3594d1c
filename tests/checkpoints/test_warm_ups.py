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
    Weights,
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


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.995}])
def test_files_before_a_late_start_are_weights(
    copies: bool,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The average in files before is a copy of the weights, or absent."""

    def form(step: int, weights: Weights, average: Weights) -> object:
        if copies or step > 1000:
            return {"state_dict": weights, "state_dict_ema": average}
        return {"state_dict": weights}

    folder = write(tmp_path / "x", train(), late(1000), form=form)
    write(tmp_path / "weights", train(), late(1000), form=lambda _, w, __: w)
    alone, _ = error_of(Run(tmp_path / "weights"), 0.25)
    done = import_checkpoints(folder, tmp_path / "run", **settings)
    assert done.counts["weights"] == len(TIMES)
    assert sum(done.counts.values()) == len(TIMES) + sum(step > 1000 for step in TIMES)
    check(tmp_path / "run", 0.25, most=1.01 * alone, low=0.4, high=2)


def test_a_start_after_the_last_file_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", train(), late(1000))
    reason = r"update_after_step 1600: is not before .* 1,500: no"
    with pytest.raises(errors.InvalidValueError, match=reason):
        import_checkpoints(folder, None, dry_run=True, ema_decay=0.995, update_after_step=1600)


def of_power(folder: Path, exponent: float, weights: np.ndarray) -> tuple[Path, float]:
    """Write averages whose n-th update keeps (1 - 1/n)^exponent; return their folder and width."""
    write(folder, weights, by(lambda n: (1 - 1 / n) ** exponent))
    return folder, exponent**0.5 / ((exponent + 1) * (exponent + 2) ** 0.5)


def test_a_power_function_is_found(tmp_path: Path) -> None:
    folder, width = of_power(tmp_path / "x", 3.0, train())
    import_checkpoints(folder, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "ema-import.json").read_text())["settings"]
    assert settings["sigma_rels"] == [pytest.approx(width, rel=2 * settings["ema_uncertainty"])]
    for wanted in (0.1, 0.25):
        error, predicted = error_of(Run(tmp_path / "run"), wanted)
        assert error < 2 * predicted < 1e-2


def test_a_power_function_that_files_show_too_vaguely_is_asked_for(tmp_path: Path) -> None:
    folder, _ = of_power(tmp_path / "x", 20.0, train(rate=1e-2, optimizer="SGD"))
    reason = "ema_decay: must be given: the files show it too vaguely: sigma_rel 0.04"
    with pytest.raises(errors.InvalidValueError, match=reason):
        import_checkpoints(folder, tmp_path / "run")


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


def timm(folder: Path) -> None:
    """Write files as with timm's ModelEmaV3 and `use_warmup`: one after each epoch of 100
    updates."""
    folder.mkdir()
    averages = follow(by(lambda step: min(0.99, power(step - 1))))
    for step in TIMES:
        epoch = step // EVERY - 1
        content = {"epoch": epoch, "arch": "x", "version": 2, "optimizer": {"state": {}}}
        content |= {"state_dict": named(train()[step - 1])}
        content |= {"state_dict_ema": named(averages[step - 1])}
        torch.save(content, folder / f"checkpoint-{epoch}.pth.tar")


def test_epochs_become_steps(tmp_path: Path, ema: Ema) -> None:
    timm(tmp_path / "x")
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
            others = {"G": weights, "D": edm2_layout.network()}
            edm2_layout.save(path, persistent(average), half=False, under="G_ema", **others)
    return folder


@pytest.mark.parametrize("library", ["edm", "stylegan"])
def test_half_lives_in_images(library: str, tmp_path: Path) -> None:
    folder = edm(tmp_path / "x", library)
    key = "ema_halflife_kimg" if library == "edm" else "ema_kimg"
    options = json.dumps({"batch_size": BATCH, key: HALF_LIFE / 1000})
    (folder / "training_options.json").write_text(options)
    run = Run(folder)
    assert {one.t for one in run.sources} == {BATCH * step for step in TIMES}
    assert {one.t_unit for one in run.sources} == {"images"}
    assert len(run.sources) == 2 * len(TIMES)
    check(run, prefix="model.")
    average = next(one for one in run.sources if one.step == BATCH * STEPS and one.decay)
    for step in (1, 50, 1400, 1499):
        kept = np.prod([half_life(later) for later in range(step + 1, STEPS + 1)])
        assert average.profile.tail(step * BATCH) == pytest.approx(1 - kept, abs=1e-9)


def test_what_files_of_images_do_not_say_is_asked_for(tmp_path: Path, ema: Ema) -> None:
    command = ["import", edm(tmp_path / "x"), "--out", tmp_path / "run"]
    assert "--update-every: must be given, the images of a batch: " in ema(*command).error
    command += ["--update-every", BATCH, "--ema-decay", "half-life:60k"]
    assert "--ema-warmup: must be given, ramp-up or none: " in ema(*command).error
    done = ema(*command, "--ema-warmup", "ramp-up")
    assert "as claimed" in done.out, done.err
    check(tmp_path / "run", prefix="model.")


def test_a_ramp_up_is_found(tmp_path: Path, ema: Ema) -> None:
    folder = edm(tmp_path / "x")
    done = ema("import", folder, "--out", tmp_path / "run", "--update-every", BATCH)
    assert "the ramp-up of its half-life to 0.05 of the training so far" in done.out, done.err
    check(tmp_path / "run", prefix="model.")


def test_names_count_thousands_of_images_rounded_down(tmp_path: Path) -> None:
    file = edm(tmp_path / "x") / "network-snapshot-000040.pkl"
    settings = {"update_every": 399, "ema_decay": "half-life:60k", "ema_warmup": "ramp-up"}
    done = import_checkpoints(file, None, dry_run=True, **settings)
    assert done.checkpoints[0].step == 101 * 399


def test_a_half_life_without_ramp_up(tmp_path: Path) -> None:
    """The profile is the product of equal decays."""
    beta = 0.5 ** (BATCH / HALF_LIFE)
    folder = edm(tmp_path / "x", decay=lambda _: beta)
    options = {"batch_size": BATCH, "ema_halflife_kimg": 60, "ema_rampup_ratio": None}
    (folder / "training_options.json").write_text(json.dumps(options))
    run = Run(folder)
    check(run, prefix="model.")
    average = next(one for one in run.sources if one.step == BATCH * STEPS and one.decay)
    for step in (1, 1400, 1499):
        tail = 1 - beta ** (STEPS - step)
        assert average.profile.tail(step * BATCH) == pytest.approx(tail, abs=1e-9)
