"""Averages that break between two checkpoints: files that hold an average and the weights in
exchanged places, resumes that begin the average or the warm-up of its decay again. The truth is
summed over every step in float64."""

import copy

import numpy as np
import pytest
import torch
from checking import each_heavy, refused
from predictions import assert_predicted, walk
from saved import store
from torch import nn
from trained import by, follow, paste, ratio, train, write
from trained import ema as ema_of

from posthoc_cli import Run, import_checkpoints

STEPS = 1500
EVERY = 50
TIMES = range(EVERY, STEPS + 1, EVERY)


def path():
    return walk(np.full(STEPS, 0.01), 400)


def swapped_at(*steps):
    """Return the form of files of which some were written while the average was swapped in."""

    def form(step, weights, average):
        model, shadow = (average, weights) if step in steps else (weights, average)
        return {"model": model, "ema": shadow, "step": step}

    return form


# --- exchanged places

SWAPPED = {
    "newest": [STEPS],
    "first": [EVERY],
    "two": [600, 1250],
    "third": [*range(150, STEPS + 1, 150)],
    "most": [*range(350, STEPS + 1, EVERY)],
}


@pytest.mark.parametrize("which", SWAPPED)
def test_files_in_exchanged_places_are_named_and_turned(which, files, run):
    """Taken as they are, the newest one made an error of 6 % at a predicted one of 0.1 %."""
    steps = SWAPPED[which]
    weights = path()
    write(files, weights, ema_of(0.99), steps=TIMES, form=swapped_at(*steps))
    (audit,) = Run(files).audit()
    assert audit.verdict == "exchanged"
    assert [*audit.exchanged] == steps
    listed = ",".join(map(str, steps))
    with refused("exchanged", f"--exchanged {listed} --out run") as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)
    assert_predicted(run, weights, targets=(0.1, 0.2), low=0.0, high=2)


PLACES = {
    "folders": ("raw/step{}.pt", "ema/step{}.pt"),
    "names": ("step{}.pt", "step{}_ema.pt"),
    "saves": ("checkpoint-{}/model.pt", "checkpoint-{}/ema.pt"),
}


@pytest.mark.parametrize("steps", [(STEPS,), (EVERY, 600)])
@pytest.mark.parametrize("places", PLACES)
def test_two_files_in_exchanged_places_are_named_and_turned(places, steps, files, run):
    """With the wrong weights alone in place of them an average is 6 % off."""
    weights = path()
    averages = follow(ema_of(0.99), weights)
    for step in TIMES:
        sets = (weights[step - 1], averages[step - 1])
        for name, values in zip(PLACES[places], sets[::-1] if step in steps else sets, strict=True):
            store(files / name.format(step), {"w": torch.tensor(values, dtype=torch.float32)})
    listed = ",".join(map(str, steps))
    with refused("exchanged", f"--exchanged {listed} --out run") as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)
    assert_predicted(run, weights, targets=(0.1, 0.2), low=0.0, high=2)


@pytest.mark.parametrize("falls", [True, *each_heavy(False)])
def test_a_file_of_a_real_training_in_exchanged_places_is_named(falls, files):
    write(files, train(falls=falls), ema_of(0.99), steps=TIMES, form=swapped_at(900))
    (audit,) = Run(files).audit()
    assert [*audit.exchanged] == [900]


def test_a_straight_path_shows_no_exchange(files, run):
    """Every weight goes from one value to another by half a cosine: all differences are parallel,
    and some rate leaves next to nothing in any place."""
    steps = np.arange(1, 2001)[:, None]
    moves = np.random.default_rng(0).normal(size=400)
    weights = 1 + 0.3 * (1 - np.cos(np.pi * steps / 2000)) / 2 * moves
    decay = 0.999
    write(files, weights, by(lambda step: min(decay, ratio(step))), steps=range(100, 2001, 100))
    (audit,) = Run(files).audit(decay)
    assert not audit.exchanged
    assert not audit.is_bad
    import_checkpoints(files, run, ema_decay=decay, ema_warmup="ratio")


def test_a_given_decay_does_not_excuse_exchanged_places(files, run):
    write(files, path(), ema_of(0.99), steps=TIMES, form=swapped_at(700))
    with refused("exchanged", "--exchanged 700 "):
        import_checkpoints(files, run, ema_decay=0.99)


def test_files_that_were_turned_wrongly_are_turned_back(files, run):
    write(files, path(), ema_of(0.99), steps=TIMES, form=swapped_at(700))
    with refused("exchanged", "--exchanged 700 "):
        import_checkpoints(files, run, exchanged=(1200,))


def test_a_step_of_no_file_holds_nothing_to_exchange(files, run):
    write(files, path(), ema_of(0.99), steps=TIMES)
    with refused("exchanged 725"):
        import_checkpoints(files, run, exchanged=(725,))


# --- averages that began again


def counted_anew(begin, decay):
    """Return an EMA with a warm-up whose counter starts over at a resume."""
    return by(lambda n: min(decay, ratio(n if n < begin else n - begin + 1)))


@pytest.mark.parametrize("begin", [751, *each_heavy(620, 1012)])
@pytest.mark.parametrize("decay", [0.9999, *each_heavy(0.995)])
def test_a_warm_up_that_began_again_is_named_and_predicted(begin, decay, files, run, caplog):
    """Errors were up to 575 times the predicted ones."""
    weights = path()
    write(files, weights, counted_anew(begin, decay), steps=TIMES)
    (audit,) = Run(files).audit()
    assert audit.verdict == "set back"
    assert abs(audit.set_back_at - begin) <= EVERY
    import_checkpoints(files, run, ema_decay=decay, ema_warmup="ratio")
    assert "does not follow" in caplog.text
    assert_predicted(run, weights, targets=(0.1, 0.2), low=0.0, high=3)


def test_a_warm_up_is_no_average_that_began_again(files):
    write(files, path(), by(lambda n: min(0.9999, ratio(n))), steps=TIMES)
    (audit,) = Run(files).audit()
    assert not audit.is_bad


@pytest.mark.parametrize("decay", [0.99, 0.98])
def test_an_average_that_began_again_is_taken_with_its_decay(decay, files, run):
    """In files half a length and one length apart."""
    weights = path()
    write(files, weights, by(lambda n: 0.0 if n == 901 else decay), steps=TIMES)
    with refused("average", "of step 950 does not follow", f"--ema-decay {decay} ") as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)
    assert_predicted(run, weights, targets=(0.1, 0.2), low=0.0, high=3)


def test_a_claim_that_is_wrong_is_not_excused_by_a_new_begin(files):
    write(files, train(), ema_of(0.99), steps=TIMES)
    (audit,) = Run(files).audit(0.999)
    assert audit.verdict == "too short"


# --- few elements


@pytest.mark.parametrize("decay", [0.98, *each_heavy(0.99)])
@pytest.mark.parametrize("seed", [0, *each_heavy(1)])
def test_a_model_of_few_elements_has_a_healthy_average(seed, decay, files):
    """What a bias of one element leaves may be 0, and the motion of few is uneven."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(layers.parameters(), 0.02, momentum=0.9)
    average = copy.deepcopy(layers.state_dict())
    for step in range(1, 1001):
        x = torch.randn(16, 6)
        y = x.sin().sum(1, keepdim=True) + 0.5 * torch.randn(16, 1)
        optimizer.zero_grad()
        (layers(x) - y).square().mean().backward()
        optimizer.step()
        for name, value in layers.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        if step % EVERY == 0:
            content = {"model": layers.state_dict(), "ema": average, "step": step}
            store(files / f"step{step}.pt", content)
    (audit,) = Run(files).audit()
    assert not audit.is_bad
    assert audit.set_back_at is None
    assert audit.length == pytest.approx(1 / (1 - decay), rel=0.2)


# --- claims that are far from what files show


FAR = {
    "rate for retention": (0.05, 0.95, "too short"),
    "longer": (0.95, 0.995, "too short"),
    "shorter": (0.99, 0.8, "too long"),
}
"""The decay of an average in files 100 steps apart, the claimed one, and the verdict."""


@pytest.mark.parametrize("case", FAR)
def test_a_claim_outside_of_what_files_show_is_refused_however_vague(case, files, run):
    decay, claimed, verdict = FAR[case]
    write(files, path(), ema_of(decay), steps=range(100, STEPS + 1, 100))
    (audit,) = Run(files).audit(claimed)
    assert audit.verdict == verdict
    with refused(f"ema_decay {claimed}", "does not fit the files"):
        import_checkpoints(files, run, ema_decay=claimed)


# --- the table of `ema audit`


def test_of_many_intervals_those_that_matter_are_printed(files, ema):
    """The lengths of single intervals are those that they show, not within limits about another."""
    write(files, path(), by(lambda n: 0.0 if n == 901 else 0.998), steps=TIMES)
    done = ema("audit", files)
    assert done.code == 1
    _, _, table = done.out.partition(f" most unusual of {len(TIMES) - 1}; all by --json\n")
    _, *rows = table.splitlines()
    assert len(rows) == 10
    assert ["900", "950"] in [row.split()[:2] for row in rows]
    (audit,) = ema("audit", files, "--json").json["audits"]
    assert len(audit["intervals"]) == len(TIMES) - 1
    (restart,) = (each for each in audit["intervals"] if each["begin"] == 900)
    assert restart["found"] < 500 / 8
