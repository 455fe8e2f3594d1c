"""A sweep while files of its run come and go."""

import json

import pytest
import torch
from checking import refused
from tracker.runs import Training, track

from posthoc_cli import Run
from posthoc_cli.errors import CommandError

LENGTHS = [0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.28]


def norm(tensors):
    return float(sum(value.double().square().sum() for value in tensors.values()))


def test_while_the_training_thins_each_length_is_made_of_what_the_report_says(tmp_path):
    training = Training()
    with track(training.model, tmp_path / "run", checkpoint_every=20, max_checkpoints=8) as tracker:
        training.run(400, tracker)
        tracker.flush()
        run = Run(tmp_path / "run")

        def evaluate(tensors):
            training.run(len(training.path) + 40, tracker)
            tracker.flush()
            return norm(tensors)

        report = run.sweep(evaluate, minimize=True, sigma_rels=LENGTHS)
    assert report.t == 400
    begins = []
    for note in report.notes:
        words = note.split()
        assert note.startswith("from trial ")
        assert note.endswith("snapshots that remain")
        begins.append(int(words[2]))
    assert begins
    assert begins == sorted({*begins})
    assert begins[0] > 1
    values = {}
    for number, trial in enumerate(report.trials, 1):
        part = sum(begin <= number for begin in begins)
        assert values.setdefault((trial.sigma_rel, part), trial.value) == trial.value
    assert len(values) < len(report.trials)
    assert report.to_dict()["notes"] == [*report.notes]


def save(folder, step):
    """Save weights that move evenly, and an average of them."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(300, 50, generator=generator).cumsum(0)
    average = walk[0]
    for weights in walk[:step]:
        average = average.lerp(weights, 0.05)
    content = {
        "step": step,
        "model": {"w": walk[step - 1]},
        "ema": {"shadow": {"w": average}, "decay": 0.95},
    }
    torch.save(content, folder / f"step{step}.pt")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for step in range(10, 201, 10):
        save(folder, step)
    return folder


def test_weights_whose_file_is_gone_are_a_failed_trial(folder):
    measured = []

    def evaluate(tensors):
        measured.append(tensors)
        if len(measured) == 1:
            (folder / "step200.pt").unlink()
            save(folder, 210)
        return norm(tensors)

    report = Run(folder).sweep(evaluate, minimize=True, sigma_rels=[0.1, 0.15, 0.2, 0.25])
    failed = [trial for trial in report.trials if trial.error]
    assert [trial.target for trial in failed] == ["last weights"]
    assert "step200.pt" in failed[0].error
    assert report.notes == ("from trial 3 on made of the 20 checkpoints that remain",)


def test_if_all_files_are_replaced_by_later_ones_the_sweep_says_so_and_keeps_its_trials(
    folder, tmp_path
):
    def evaluate(tensors):
        for path in folder.iterdir():
            path.unlink()
        for step in range(210, 300, 10):
            save(folder, step)
        return norm(tensors)

    words = "t = 200", "removed while it ran", "trials are kept"
    with refused("the sweep", *words, kind=CommandError):
        Run(folder).sweep(evaluate, minimize=True, sigma_rels=LENGTHS, out=tmp_path / "out")
    _, *lines = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    targets = [json.loads(line)["target"] for line in lines]
    assert targets[:2] == ["your EMA (0.95)", "last weights"]


def test_if_all_files_are_removed_the_sweep_says_so(folder):
    def evaluate(tensors):
        for path in folder.iterdir():
            path.unlink()
        return norm(tensors)

    with refused("the sweep", "removed while it ran", kind=CommandError):
        Run(folder).sweep(evaluate, minimize=True, sigma_rels=LENGTHS)


def test_a_sweep_looks_at_its_place_once(folder, monkeypatch):
    run = Run(folder)
    run.sources  # noqa: B018

    def evaluate(tensors):
        save(folder, 210)  # a later one is of another sweep
        return norm(tensors)

    report = run.sweep(evaluate, minimize=True, sigma_rels=[0.1, 0.15, 0.2])
    assert report.t == 200
    assert not report.notes
    assert run.t == 210
