"""Ordinary EMAs whose files lack the warm-up, restarts or clock: an import finds, takes or requires
them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import edm2_layout
import numpy as np
import pytest
import torch
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
    settings_of,
    train,
    write,
)

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import Point


def power(n: float, exponent: float = 2 / 3) -> float:
    return 1 - (1 + n) ** -exponent


def again(decay: Callable[[int], float], begin: int = 850) -> Average:
    """Return an EMA that restarts from the weights at a step, and then counts its updates from
    0."""

    def updated(step, average, weights):
        if step == begin:
            return weights.copy()
        counted = step if step < begin else step - begin
        kept = decay(counted)
        return kept * average + (1 - kept) * weights

    return updated


def late(begin: int) -> Average:
    """Return copies of the weights up to a step, and then an EMA."""
    return by(lambda step: 0.995 if step > begin else 0.0)


def constant(_):
    return 0.995


def limited_ratio(n):
    return min(0.99, ratio(n))


def limited_power(n):
    return min(0.99, power(n))


def long_power(n):
    return power(n, 0.75)


RISING = {
    "ratio": (limited_ratio, r"decay 0.9[89].*, reached by the warm-up \(1 \+ n\) / "),
    "still rising": (ratio, r"decay 0.994.* by the warm-up \(1 \+ n\) / \(10 \+ n\)"),
    "another power": (long_power, r"the warm-up 1 - \(1 \+ n\)\^-0.75"),
}
WARM_UPS = {"still rising": "ratio", "another power": "power:0.75"}


def imported_line(folder: Path, run: Path, update: Average) -> str:
    """Import a training's files; return what the import says."""
    write(folder, train(), update)
    done = import_checkpoints(folder, run)
    (line,) = done.checks
    return line


@pytest.mark.parametrize("case", RISING)
def test_a_warm_up_that_nobody_says_is_found(case, files, run):
    decay, said = RISING[case]
    line = imported_line(files, run, by(decay))
    assert re.search(f"^found: .*{said}", line), line
    settings = settings_of(run)
    assert settings["ema_warmup"] == WARM_UPS.get(case, case)
    assert not settings.get("ema_restarts")
    check(run, low=0.2)


def test_a_restart_of_a_warm_up_is_found(files, run):
    line = imported_line(files, run, again(limited_ratio))
    said = "near step 8[0-8].*decay 0.98[5-7].* still rising by"
    assert re.search(f"^found: .*{said}", line), line
    settings = settings_of(run)
    assert settings["ema_warmup"] == "ratio"
    (restart,) = settings["ema_restarts"]
    assert abs(restart - 850) <= 40
    check(run, most=5e-3, low=0.2)
    assert_explained(run)


def test_a_late_start_that_nobody_says_is_found(files, run):
    line = imported_line(files, run, late(430))
    assert re.search("^found: .*near step 4[1-5]", line), line
    settings = settings_of(run)
    assert settings["ema_warmup"] == "none"
    assert abs(settings["update_after_step"] - 430) <= 15
    check(run, low=0.2)


def assert_explained(run: Path) -> None:
    """Assert that the settings of an import explain every interval."""
    (audit,) = Run(run).audit()
    assert audit.verdict == "as claimed"
    assert all(interval.unexplained < 1 for interval in audit.intervals)


def test_a_restart_that_was_found_counts_as_uncertain(tmp_path, files):
    """The target ends shortly after the restart, when much of the averages is of the weights at the
    restart."""
    update = again(lambda _: 0.999)
    write(files, train(), update)
    found = tmp_path / "found"
    said = tmp_path / "said"
    import_checkpoints(files, found)
    import_checkpoints(files, said, ema_decay=0.999, ema_restarts=[850])
    uncertain = Run(found).average(0.05, t=1000)
    certain = Run(said).average(0.05, t=1000)
    assert uncertain.predicted_error > certain.predicted_error
    settings = settings_of(found)
    (restart,) = settings["ema_restarts"]
    assert abs(restart - 850) < 3 * settings["ema_late"]


def with_copies(_, weights, average):
    return {"state_dict": weights, "state_dict_ema": average}


def without_copies(step, weights, average):
    if step > 1000:
        return with_copies(step, weights, average)
    return {"state_dict": weights}


def weights_alone(_, weights, __):
    return weights


@pytest.fixture(scope="module")
def error_of_weights(tmp_path_factory: pytest.TempPathFactory) -> float:
    folder = tmp_path_factory.mktemp("weights")
    write(folder, train(), late(1000), form=weights_alone)
    error, _ = error_of(Run(folder), 0.25)
    return error


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        (without_copies, {}),
        (with_copies, {"ema_decay": 0.995}),
    ],
)
def test_files_before_a_late_start_are_weights(form, settings, error_of_weights, files, run):
    """The average in files before is a copy of the weights, or absent."""
    write(files, train(), late(1000), form=form)
    done = import_checkpoints(files, run, **settings)
    assert done.counts["weights"] == len(TIMES)
    after = range(1100, STEPS + 1, EVERY)
    assert len(done.checkpoints) == len(TIMES) + len(after)
    check(run, 0.25, most=1.01 * error_of_weights, low=0.4, high=2)


def test_a_start_after_the_last_file_is_refused(files):
    write(files, train(), late(1000))
    settings = {"ema_decay": 0.995, "update_after_step": 1600}
    reason = r"update_after_step 1600: is not before .* 1,500: no"
    with pytest.raises(InvalidValueError, match=reason):
        import_checkpoints(files, None, dry_run=True, **settings)


def of_power(folder: Path, exponent: float, weights: np.ndarray) -> tuple[Path, float]:
    """Write averages whose n-th update keeps (1 - 1/n)^exponent; return their folder and width."""
    write(folder, weights, by(lambda n: (1 - 1 / n) ** exponent))
    variance = exponent / ((exponent + 1) ** 2 * (exponent + 2))
    return folder, variance**0.5


def test_a_power_function_is_found(files, run):
    folder, width = of_power(files, 3.0, train())
    import_checkpoints(folder, run)
    settings = settings_of(run)
    (found,) = settings["sigma_rels"]
    uncertainty = settings["ema_uncertainty"]
    assert found == pytest.approx(width, rel=2 * uncertainty)
    for wanted in (0.1, 0.25):
        error, predicted = error_of(Run(run), wanted)
        assert error < 2 * predicted < 1e-2


def test_a_power_function_that_files_show_too_vaguely_is_asked_for(files, run):
    weights = train(rate=1e-2, optimizer="SGD")
    folder, _ = of_power(files, 20.0, weights)
    reason = "ema_decay: must be given: the files show it too vaguely: sigma_rel 0.04"
    with pytest.raises(InvalidValueError, match=reason):
        import_checkpoints(folder, run)


def test_rules_that_explain_the_files_equally_are_asked_for(files, run):
    """Drift and white noise, from which no rule follows."""
    random = np.random.default_rng(0)
    direction = random.standard_normal(train().shape[1])
    drift = 1e-3 * np.outer(np.arange(STEPS), direction)
    noise = 0.1 * random.standard_normal(drift.shape)
    weights = train()[0] + drift + noise
    write(files, weights, by(lambda _: 0.95))
    choices = "about equally as decay .* with warm-up .*, and as decay .* with warm-up"
    with pytest.raises(InvalidValueError, match=f"ema_decay: must be given: .* {choices}"):
        import_checkpoints(files, run)
    assert not run.exists()


def average_alone(_, __, average):
    return average


def test_a_late_start_of_averages_alone(files, run):
    """The files before it are copies of the weights: an average of any length is as exact as
    predicted."""
    write(files, train(), late(700), form=average_alone)
    import_checkpoints(files, run, kind="ema", ema_decay=0.995, update_after_step=700)
    check(run, most=1, low=0.5, high=2)


def test_a_restart_that_is_said_makes_the_true_profile(files, run, ema):
    """The profile has the masses of the formula: all of the average at step 900 is of step 850 and
    later."""
    write(files, train(), again(constant))
    options = ("--ema-decay", 0.995, "--ema-restarts", 850)
    done = ema("import", files, "--out", run, *options)
    assert done.code == 0, done.err
    at_900 = [one.profile for one in Run(run).sources if one.t == 900]
    (profile,) = [one for one in at_900 if not isinstance(one, Point)]
    for s in (0, 849):
        assert profile.tail(s) == pytest.approx(1, abs=1e-12)
    for s in (850, 870, 899):
        mass = 1 - 0.995 ** (900 - s)
        assert profile.tail(s) == pytest.approx(mass, abs=1e-12)
    check(run, low=0.4)


# --- timm's warm-up, and files that know only their epoch


def timm(folder):
    """Write files as with timm's ModelEmaV3 and `use_warmup`: one after each epoch of 100
    updates."""
    folder.mkdir()
    averages = follow(by(lambda step: limited_power(step - 1)))
    for step in TIMES:
        epoch = step // EVERY - 1
        content = {
            "epoch": epoch,
            "arch": "x",
            "version": 2,
            "optimizer": {"state": {}},
            "state_dict": named(train()[step - 1]),
            "state_dict_ema": named(averages[step - 1]),
        }
        torch.save(content, folder / f"checkpoint-{epoch}.pth.tar")


def test_epochs_become_steps(files, run, ema):
    timm(files)
    command = ("import", files, "--out", run)
    done = ema(*command, "--ema-decay", 0.99)
    assert done.code == 2
    reason = "must be given: decays are of steps, and numbers are epochs, counted from 0: "
    assert f"--steps-per-epoch: {reason}" in done.error
    done = ema(*command, "--steps-per-epoch", EVERY)
    assert "reached by the warm-up 1 - (1 + n)^-0.667" in done.out, done.err
    assert {one.step for one in Run(run).sources} == {*TIMES}
    check(run, low=0.4)


# --- EDM and StyleGAN: pickles, a half-life in images, a ramp-up

BATCH = 400
HALF_LIFE = 60_000


def half_life(step):
    """Return the decay of a step by the formula, from the images before it."""
    images = (step - 1) * BATCH
    length = min(HALF_LIFE, 0.05 * images)
    return 0.5 ** (BATCH / max(length, 1e-8))


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
        path = folder / f"network-snapshot-{kimg}.pkl"
        weights = persistent(train()[step - 1])
        average = persistent(averages[step - 1])
        if library == "edm":
            edm2_layout.save(path, average, half=False)
            state = {"net": weights.state_dict(), "optimizer_state": {}}
            torch.save(state, folder / f"training-state-{kimg}.pt")
        else:
            others = {"G": weights, "D": edm2_layout.network()}
            edm2_layout.save(path, average, half=False, under="G_ema", **others)
    return folder


def check_tail(run: Run, step: int, mass: float) -> None:
    """Check the mass after a step of the average in the last file."""
    last = [one for one in run.sources if one.step == BATCH * STEPS]
    (profile,) = (one.profile for one in last if one.decay)
    assert profile.tail(step * BATCH) == pytest.approx(mass, abs=1e-9)


@pytest.mark.parametrize("library", ["edm", "stylegan"])
def test_half_lives_in_images(library, files):
    folder = edm(files, library)
    key = "ema_halflife_kimg" if library == "edm" else "ema_kimg"
    options = {"batch_size": BATCH, key: HALF_LIFE / 1000}
    (folder / "training_options.json").write_text(json.dumps(options))
    run = Run(folder)
    times = [one.t for one in run.sources]
    assert {*times} == {BATCH * step for step in TIMES}
    assert len(times) == 2 * len(TIMES)
    assert {one.t_unit for one in run.sources} == {"images"}
    check(run, prefix="model.")
    for step in (1, 50, 1400, 1499):
        decays = [half_life(later) for later in range(step + 1, STEPS + 1)]
        check_tail(run, step, 1 - np.prod(decays))


@pytest.fixture(scope="module")
def of_edm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return files that do not say the half-life."""
    return edm(tmp_path_factory.mktemp("edm") / "files")


def test_what_files_of_images_do_not_say_is_asked_for(of_edm, run, ema):
    command = ["import", of_edm, "--out", run]
    assert "--update-every: must be given, the images of a batch: " in ema(*command).error
    command += ["--update-every", BATCH, "--ema-decay", "half-life:60k"]
    assert "--ema-warmup: must be given, ramp-up or none: " in ema(*command).error
    done = ema(*command, "--ema-warmup", "ramp-up")
    assert "as claimed" in done.out, done.err
    check(run, prefix="model.")


def test_a_ramp_up_is_found(of_edm, run):
    (line,) = import_checkpoints(of_edm, run, update_every=BATCH).checks
    assert "the ramp-up of its half-life to 0.05 of the training so far" in line
    check(run, prefix="model.")


def test_names_count_thousands_of_images_rounded_down(of_edm):
    file = of_edm / "network-snapshot-000040.pkl"
    settings = {"update_every": 399, "ema_decay": "half-life:60k", "ema_warmup": "ramp-up"}
    done = import_checkpoints(file, None, dry_run=True, **settings)
    assert done.checkpoints[0].step == 101 * 399


def test_a_half_life_without_ramp_up(files):
    """The profile is the product of equal decays."""
    beta = 0.5 ** (BATCH / HALF_LIFE)
    folder = edm(files, decay=lambda _: beta)
    options = {"batch_size": BATCH, "ema_halflife_kimg": 60, "ema_rampup_ratio": None}
    (folder / "training_options.json").write_text(json.dumps(options))
    run = Run(folder)
    check(run, prefix="model.")
    for step in (1, 1400, 1499):
        kept = beta ** (STEPS - step)
        check_tail(run, step, 1 - kept)
