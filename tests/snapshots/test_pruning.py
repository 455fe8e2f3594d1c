"""Pruning deletes the snapshots that are needed least, and never endangers those that stay."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from factories import contents, flip_bit, rewrite_snapshot
from snapshots.recorded import call_number, failing, network, record, train

from posthoc_cli import PostHocEMA, Run, files
from posthoc_cli.errors import FileFormatError, MismatchError
from posthoc_cli.reconstruction import choose_evenly


@pytest.fixture(scope="session")
def _measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured") / "run"
    return record(folder, 240, scale=0.01, checkpoint_every=20, checkpoint_dtype="float16")


@pytest.fixture
def run(_measured, tmp_path):
    """A run of 12 times x 2 profiles with measurements."""
    return Path(shutil.copytree(_measured, tmp_path / "run"))


@pytest.fixture
def snapshots(run):
    return Run(run).snapshots


# --- the choice


def test_the_newest_time_stays(run, snapshots):
    Run(run).prune(keep=1)
    assert Run(run).snapshots == snapshots[-2:]


def test_the_newest_time_with_all_profiles_stays(run, snapshots):
    *stored, last = snapshots
    last.path.unlink()
    Run(run).prune(keep=1)
    assert Run(run).snapshots == stored[-3:]


def test_the_time_that_the_tracker_was_told_to_keep_stays(tmp_path):
    model = network()
    options = {"update_every": 1, "checkpoint_every": 10, "max_checkpoints": None}
    with PostHocEMA.from_model(model, tmp_path, **options) as tracker:
        train(tracker, model, 34)
        tracker.snapshot()
        train(tracker, model, 26)
    Run(tmp_path).prune(keep=1)
    assert {snapshot.step for snapshot in Run(tmp_path).snapshots} == {34, 60}


def test_the_errors_are_those_of_the_directory_before_and_after(run):
    ends = (0.1, 0.2)
    before = Run(run).error_curve(ends)
    pruning = Run(run).prune(keep=3, sigma_range=ends)
    assert pruning.source == "measured"
    assert pruning.before.worst == pytest.approx(before.worst, rel=1e-3)
    assert len(Run(run).snapshots) == 6
    assert Run(run).error_curve(ends).worst == pytest.approx(pruning.after.worst, rel=0.15)
    assert pruning.after.worst > pruning.before.worst


# --- deleting


def replace(path):
    rewrite_snapshot(path, updates=7)


@pytest.mark.parametrize(
    ("harm", "kind"),
    [(flip_bit, FileFormatError), (replace, MismatchError)],
)
def test_nothing_is_deleted_when_a_survivor_is_damaged(run, harm, kind):
    """Nor if a survivor was replaced."""
    before = {}

    def agree(pruning):
        harm(pruning.kept[-1].path)
        before.update(contents(run))
        return True

    with pytest.raises(kind):
        Run(run).prune(keep=4, agree=agree)
    assert before
    assert contents(run).items() >= before.items()


def test_pruning_syncs_the_directory(run, monkeypatch):
    synced = list[Path]()
    monkeypatch.setattr(files.system, "fsync_directory", synced.append)
    Run(run).prune(keep=4)
    assert synced == [run]


def test_an_interruption_leaves_a_directory_that_works(run):
    pruning = Run(run).prune(keep=4, dry_run=True)
    is_next = call_number(7)

    def fails(path):
        return path.suffix == ".safetensors" and is_next()

    with failing("unlink", KeyboardInterrupt(), fails), pytest.raises(KeyboardInterrupt):
        Run(run).prune(keep=4)
    assert len(Run(run).snapshots) == 24 - 7
    assert Run(run).error_curve((0.05, 0.28)).worst <= 1.05 * pruning.after.worst
    Run(run).prune(keep=4)
    assert len(Run(run).snapshots) == 8


# --- the choice of the snapshots that a reconstruction uses if there are very many


def test_a_synthesis_uses_the_choice_up_to_its_time(run, snapshots, monkeypatch):
    few = partial(choose_evenly, most=8)
    monkeypatch.setattr("posthoc_cli.snapshots.sources.choose_evenly", few)
    plan = Run(run).plan(0.15, t=210)
    assert plan.choice == "8 of 20 snapshots up to t = 210, evenly in time"
    profiles = [snapshot.profile for snapshot in snapshots[:20]]
    chosen = [profiles[index].t for index in few(profiles)]
    assert [source.t for source in plan.sources] == chosen
    assert Run(run).plan(0.15, t=80).choice is None
