"""What a tracker holds of its snapshots in memory: the same as a reader finds on disk, so that an
average of another length is planned without a look at the directory."""

import threading
from collections import Counter
from unittest import mock

import pytest
import torch
from checking import assert_same_tensors
from torch import nn
from tracker.runs import Training, track

from posthoc_cli import PostHocEMA, Run, files

SETTINGS = {"checkpoint_every": 20, "max_checkpoints": 6}


def plain(folder):
    training = Training()
    tracker = track(training.model, folder, **SETTINGS)
    training.run(400, tracker)
    return training, tracker


def resumed(folder):
    training, tracker = plain(folder)
    tracker.close()
    tracker = PostHocEMA.from_path(folder, training.model)
    training.run(460, tracker)
    return training, tracker


def off_schedule(folder):
    training, tracker = plain(folder)
    training.run(407, tracker)
    tracker.snapshot()
    training.run(430, tracker)
    return training, tracker


def half_precision(folder):
    layers = nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Linear(24, 4)
    training = Training(model=nn.Sequential(*layers).to(torch.bfloat16))
    tracker = track(training.model, folder, **SETTINGS)
    training.run(400, tracker)
    return training, tracker


TRAININGS = [plain, resumed, off_schedule, half_precision]


@pytest.mark.parametrize("begin", TRAININGS)
def test_the_average_from_memory_is_that_from_disk(begin, tmp_path):
    _, tracker = begin(tmp_path / "run")
    tracker.flush()
    held = sorted(tracker._pipeline.known_snapshots, key=lambda each: (each.t, each.sigma_rel))
    stored = Run(tmp_path / "run").snapshots
    assert held == stored
    for ours, theirs in zip(held, stored, strict=True):
        assert (ours.path, ours.identity) == (theirs.path, theirs.identity)
        assert dict(ours.entries) == dict(theirs.entries)
        assert [file.sums for file in ours.files] == [file.sums for file in theirs.files]
    made = tracker.average(0.15)
    expected = Run(tmp_path / "run").average(0.15)
    assert_same_tensors(made, expected)
    assert made.predicted_error == expected.predicted_error
    tracker.close()


def test_an_average_of_another_length_opens_each_file_once_and_lists_nothing(tmp_path, monkeypatch):
    _, tracker = plain(tmp_path / "run")
    tracker.flush()
    system = files.FileSystem()
    watched = mock.Mock(wraps=system)
    monkeypatch.setattr(files, "system", watched)
    tracker.average(0.15)
    opened = Counter(str(call.args[0]) for call in watched.open.call_args_list)
    assert {*opened.values()} == {1}
    assert not watched.list.called
    tracker.close()


def test_a_snapshot_that_somebody_has_deleted_is_left_out(tmp_path, caplog):
    _, tracker = plain(tmp_path / "run")
    tracker.flush()
    Run(tmp_path / "run").snapshots[4].path.unlink()
    made = tracker.average(0.15)
    assert caplog.text.count("planning again") == 1
    assert_same_tensors(made, Run(tmp_path / "run").average(0.15))
    tracker.close()


def test_averages_are_made_while_another_thread_trains_and_thins(tmp_path):
    training, tracker = plain(tmp_path / "run")
    failures = []
    stop = threading.Event()

    def read():
        while not stop.is_set():
            try:
                tracker.average(0.15)
            except BaseException as error:  # noqa: BLE001
                failures.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        training.run(800, tracker)
    finally:
        stop.set()
        reader.join()
    assert not failures
    tracker.close()
