"""The audit of averages of a real training, and of averages that are broken in the ways of public
bug reports."""

import dataclasses
import functools
import json
import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
from checking import heavy, refused
from factories import RUN_ID, write_snapshot
from predictions import walk
from trained import EVERY, STEPS, by, ema, named, ratio, timm, train, write

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.checkpoints.audit import audit_sources
from posthoc_cli.errors import DirectoryError, NonFiniteError

DECAY = 0.995
STUCK = ("2.weight", "2.bias")

every_step = ema(DECAY)
eight_times_a_step = ema(DECAY**8)
every_tenth_step = by(lambda step: 1.0 if step % 10 else DECAY)
set_back_once = by(lambda step: 0.0 if step == 850 else DECAY)
in_the_first_half = by(lambda step: 1.0 if step > STEPS // 2 else DECAY)
stay = ema(1.0)
copy = ema(0.0)


def away_from_the_weights(_, average, weights):
    share = (1 - DECAY) / 10
    return average + share * (average - weights)


def of_another_run(step, average, _):
    others = train()[step - 1]
    return every_step(step, average, others)


def two_stuck(step, average, weights):
    """As under torch.compile with half of the names."""
    updated = every_step(step, average, weights)
    for name, tensor in named(np.arange(weights.size)).items():
        if name in STUCK:
            places = tensor.flatten().long().numpy()
            updated[places] = average[places]
    return updated


def audited(folder, weights, update, claimed=None):
    """Return the audit of a training's only average."""
    run = Run(write(folder, weights, update))
    (found,) = run.audit(claimed)
    return found


@pytest.fixture(scope="module")
def audit_of(tmp_path_factory):
    """Return a function that audits an average of the same training, once: of one that was not used
    to choose any threshold."""

    @functools.cache
    def audit(update):
        folder = tmp_path_factory.mktemp("audited")
        return audited(folder, train(falls=True, seed=7), update, DECAY)

    return audit


def log_error(found, decay):
    """Return the error of a found decay, as the logarithm of the ratio of time constants."""
    ratio = (1 - found.found) / (1 - decay)
    return abs(math.log(ratio))


def test_a_healthy_average_is_found(tmp_path):
    found = audited(tmp_path, train(), ema(0.99))
    assert found.verdict == "found"
    assert found.warm_up == ""
    assert log_error(found, 0.99) < 3 * found.uncertainty


def test_weights_that_move_without_noise_show_the_decay(tmp_path):
    """The covariance of such a path is nearly singular."""
    random = np.random.default_rng(0)
    start = random.standard_normal(train().shape[1])
    settling = 1 + np.exp(-np.arange(STEPS) / 30)
    found = audited(tmp_path, np.outer(settling, start), every_step)
    assert log_error(found, DECAY) < min(3 * found.uncertainty, 0.03)


BAD = {
    "stuck": (stay, "does not move", "is its update called"),
    "microbatch": (eight_times_a_step, "too short", "once a microbatch"),
    "every tenth": (every_tenth_step, "too long", r"updated every [89]\S* steps"),
    "reset": (set_back_once, "set back", "of step 900 does not follow .* 800: it began again"),
    "copy": (copy, "equals the weights", "copied"),
    "two tensors": (two_stuck, "some tensors", "2 of 6 tensors are not followed"),
    "not updated later": (
        in_the_first_half,
        "does not move",
        "from step 800 to 1,500, while the weights do",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_the_fault_of_an_average_is_named(case, audit_of):
    update, verdict, reason = BAD[case]
    found = audit_of(update)
    assert found.verdict == verdict, found.text
    assert found.is_bad
    assert re.search(reason, found.text)
    stuck = STUCK if update is two_stuck else ()
    assert sorted(found.tensors) == sorted(stuck)
    json.dumps(found.to_dict(), allow_nan=False)


UNEXPLAINED = {
    away_from_the_weights: ("undetermined", "do not explain how the average moves"),
    of_another_run: ("unrelated", "or of different runs"),
}


@pytest.mark.parametrize("update", UNEXPLAINED)
def test_an_unexplained_average_is_no_average_of_these_weights_if_it_moves_farther(
    update, audit_of
):
    verdict, text = UNEXPLAINED[update]
    found = audit_of(update)
    assert found.verdict == verdict, found.text
    assert found.is_bad == (verdict == "unrelated")
    assert text in found.text


def test_a_claim_that_is_nearly_right_is_no_fault(tmp_path):
    """It is 9 % longer than the average, which smooth weights show within 1 %."""
    random = np.random.default_rng(0)
    phases = random.standard_normal(train().shape[1])
    weights = np.sin(np.arange(STEPS)[:, None] / 400 + phases)
    claimed = 1 - (1 - DECAY) / 1.09
    found = audited(tmp_path, weights, every_step, claimed)
    assert found.verdict == "as claimed"
    assert log_error(found, DECAY) < 0.03 < log_error(found, claimed)


@pytest.mark.parametrize(("correlation", "length"), [(50, 50), (50, 150), (100, 500)])
def test_noise_about_a_minimum_makes_a_length_vague_and_refutes_no_claim(
    tmp_path, correlation, length
):
    """Noise that forgets in so many steps, in files 50 steps apart; the average has so many. Each
    motion undoes a part of the one before, and lines show lengths up to a tenth too long."""
    generator = np.random.default_rng(length)
    kept = math.exp(-1 / correlation)
    decay = math.exp(-1 / length)
    noise = generator.normal(size=(8, 50))
    path = []
    average = np.zeros(0)
    for step in range(1001):
        path.append(noise)
        average = noise if step == 0 else average + (1 - decay) * (noise - average)
        noise = kept * noise + math.sqrt(1 - kept**2) * generator.normal(size=noise.shape)
        if step and step % 50 == 0:
            content = {"weights": path[-1], "ema": average}
            sets = {
                key: {"a.weight": torch.from_numpy(value).float()} for key, value in content.items()
            }
            torch.save({"step": step, **sets}, tmp_path / f"step{step}.pt")
    (found,) = Run(tmp_path).audit()
    assert abs(math.log(found.length / length)) < 2 * found.uncertainty < 0.4
    (claimed,) = Run(tmp_path).audit(decay)
    assert not claimed.is_bad
    run = tmp_path / "run"
    import_checkpoints(tmp_path, run, ema_decay="found")
    for sigma_rel in (0.05, 0.2):
        gamma = gamma_of(sigma_rel)
        shares = np.diff((np.arange(1001) / 1000) ** (gamma + 1))
        truth = np.tensordot(shares, np.array(path[1:]), 1)
        made = Run(run).average(sigma_rel, dtype=torch.float32)
        error = np.linalg.norm(made["a.weight"].double().numpy() - truth) / np.linalg.norm(truth)
        assert error < 2 * made.predicted_error


def gamma_of(sigma_rel):
    """Solve sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3)) for gamma > 0."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        is_wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if is_wider else (low, middle)
    return low


def test_a_tensor_that_moves_by_rounding_alone_need_not_be_followed(tmp_path):
    """A bias before a BatchNorm has no gradient, and a float32 average loses such changes."""

    def form(step, weights, average):
        digits = step // EVERY % 3
        weights["3.bias"] = torch.ones(40) + digits * 2.0**-23
        average["3.bias"] = torch.ones(40)
        return timm(step, weights, average)

    run = Run(write(tmp_path, train(), every_step, form=form))
    (found,) = run.audit(DECAY)
    assert found.verdict == "as claimed", found.text


def test_an_average_of_weights_that_hardly_move_is_judged_like_others(tmp_path):
    weights = 1 + 1e-5 * train()
    assert audited(tmp_path, weights, stay, DECAY).verdict == "does not move"


def test_an_average_that_is_not_finite_is_named(tmp_path):
    def form(step, weights, average):
        if step == 700:
            average["2.weight"][0, 0] = math.nan
        return timm(step, weights, average)

    write(tmp_path, train(), every_step, form=form)
    run = Run(tmp_path)
    with refused(tmp_path / "step700.pt", "'2.weight'", kind=NonFiniteError):
        run.audit()


def test_an_average_too_short_for_its_files_is_said(tmp_path):
    found = audited(tmp_path, train(), ema(0.5), 0.5)
    assert found.verdict == "undetermined"
    assert found.found is None
    assert "checkpoints closer than 20 steps would show it" in found.text


def test_the_digits_that_averages_are_stored_in_change_no_decay_that_is_found(tmp_path):
    """It moves by a few digits between files: if their rounding is not counted, none is found."""
    path = walk(np.full(600, 1e-3), 2000)
    write(tmp_path, path, ema(0.998), torch.bfloat16, steps=range(30, 601, 30))
    (audit,) = Run(tmp_path).audit()
    assert audit.length == pytest.approx(500, rel=0.05)


def test_weights_that_stand_still_are_said(tmp_path):
    still = np.tile(train()[-1], (STEPS, 1))
    found = audited(tmp_path, still, every_step)
    assert "the weights stand still" in found.text


def test_a_trackers_snapshots_need_no_audit(tmp_path):
    write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": torch.ones(2)})
    with refused(tmp_path, kind=DirectoryError):
        Run(tmp_path).audit()


@heavy
def test_an_audit_of_many_checkpoints_takes_little_memory(tmp_path, healthy):
    moves = 0.01 * np.random.default_rng(0).standard_normal((480, 200))
    moves[0] *= 100
    weights = moves.cumsum(axis=0)
    write(tmp_path, weights, by(lambda n: min(0.97, ratio(n))), steps=range(10, 481, 10))
    Run(healthy).audit()  # which imports modules
    tracemalloc.start()
    (audit,) = Run(tmp_path).audit()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 55e6
    assert log_error(audit, 0.97) < 3 * audit.uncertainty


def test_the_command_fails_for_a_bad_average(tmp_path, ema):
    run = write(tmp_path / "x", train(), eight_times_a_step)
    picture = tmp_path / "a.png"
    done = ema("audit", run, "--claimed", DECAY, "--out", picture)
    assert done.code == 1
    answer, _, _, title, columns, *rows = done.out.splitlines()
    assert answer.startswith("too short by a factor of ")
    assert title.startswith("time constant in steps by interval: the 10 most unusual of ")
    assert columns.split() == ["from", "to", "found", "claimed", "ratio"]
    rows = [row.split() for row in rows[:10]]
    for _, _, found, claimed, factor in rows:
        assert float(claimed) == pytest.approx(1 / (1 - DECAY), rel=1e-3)
        assert float(factor) == pytest.approx(float(found) / float(claimed), rel=0.01)
    assert picture.stat().st_size > 10_000


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Return the files of a healthy average."""
    return write(tmp_path_factory.mktemp("healthy"), train(), every_step)


def test_the_command_prints_what_was_found(healthy, ema):
    (found,) = ema("audit", healthy, "--json").json["audits"]
    assert found["length"] == pytest.approx(1 / (1 - DECAY), rel=0.1)


def test_an_audit_names_the_unit_of_the_clock(healthy):
    sources = Run(healthy).sources
    in_images = [dataclasses.replace(source, t_unit="images") for source in sources]
    (found,) = audit_sources(in_images)
    assert found.unit == "images"
    assert " images (± " in found.text


def test_a_claim_that_is_no_decay_is_refused(healthy, ema):
    done = ema("audit", healthy, "--claimed", "7")
    assert done.code == 2
    assert done.error.startswith("--claimed 7: ")


def test_a_lone_checkpoint_cannot_be_audited(healthy):
    run = Run(healthy / "step300.pt")
    with refused(healthy):
        run.audit()
