"""Pruning deletes the snapshots that are needed least, and never endangers those that stay."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from factories import contents, flip_bit, rewrite_snapshot
from snapshots.recorded import call_number, failing, record

from posthoc_cli import Run, disk_sources, error_curve, files, plan_synthesis
from posthoc_cli.errors import FileFormatError, MismatchError
from posthoc_cli.reconstruction import choose_evenly
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.prune import plan_pruning, prune
from posthoc_cli.snapshots.sampling import source_prior


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
    return read_directory(run)


def errors_of(snapshots, ends=(0.05, 0.28)):
    profiles = [snapshot.profile for snapshot in snapshots]
    return error_curve("", profiles, source_prior(snapshots), ends, points=41)


# --- the choice


def test_the_newest_time_stays(snapshots):
    assert [*plan_pruning(snapshots, keep=1).kept] == snapshots[-2:]


def test_the_newest_time_with_all_profiles_stays(snapshots):
    *stored, _ = snapshots
    assert [*plan_pruning(stored, keep=1).kept] == stored[-3:]


def test_the_errors_are_those_of_the_directory_before_and_after(run, snapshots):
    ends = (0.1, 0.2)
    pruning = plan_pruning(snapshots, keep=3, sigma_range=ends)
    assert pruning.source == "measured"
    before = errors_of(snapshots, ends)
    np.testing.assert_allclose(pruning.before.predicted_error, before.predicted_error, rtol=1e-12)
    prune(run, pruning)
    left = read_directory(run)
    assert len(left) == 6
    assert errors_of(left, ends).worst == pytest.approx(pruning.after.worst, rel=0.15)
    assert pruning.after.worst > pruning.before.worst


# --- deleting


def replace(path):
    rewrite_snapshot(path, updates=7)


@pytest.mark.parametrize(
    ("harm", "kind"),
    [(flip_bit, FileFormatError), (replace, MismatchError)],
)
def test_nothing_is_deleted_when_a_survivor_is_damaged(run, snapshots, harm, kind):
    """Nor if a survivor was replaced."""
    pruning = plan_pruning(snapshots, keep=4)
    harm(pruning.kept[-1].path)
    before = contents(run)
    with pytest.raises(kind):
        prune(run, pruning)
    assert contents(run).items() >= before.items()


def test_what_is_said_to_be_deleted_is_so_on_the_disk(run, snapshots, monkeypatch):
    synced = list[Path]()
    monkeypatch.setattr(files.system, "fsync_directory", synced.append)
    prune(run, plan_pruning(snapshots, keep=4))
    assert synced == [run]


def test_an_interruption_leaves_a_directory_that_works(run, snapshots):
    pruning = plan_pruning(snapshots, keep=4)
    is_next = call_number(7)

    def fails(path):
        return path.suffix == ".safetensors" and is_next()

    with failing("unlink", KeyboardInterrupt(), fails), pytest.raises(KeyboardInterrupt):
        prune(run, pruning)
    left = read_directory(run)
    assert len(left) == 24 - 7
    assert errors_of(left).worst <= 1.05 * pruning.after.worst
    Run(run).prune(keep=4)
    assert len(read_directory(run)) == 8


# --- the choice of the snapshots that a reconstruction uses if there are very many


def test_a_synthesis_uses_the_choice_up_to_its_time(run, snapshots, monkeypatch):
    few = partial(choose_evenly, most=8)
    monkeypatch.setattr("posthoc_cli.snapshots.sources.choose_evenly", few)
    plan = plan_synthesis(disk_sources(run), [0.15], 210.0)
    assert plan.choice == "8 of 20 snapshots up to t = 210, evenly in time"
    profiles = [snapshot.profile for snapshot in snapshots[:20]]
    chosen = [profiles[index].t for index in few(profiles)]
    assert [source.t for source in plan.sources] == chosen
    assert plan_synthesis(disk_sources(run), [0.15], 80.0).choice is None
