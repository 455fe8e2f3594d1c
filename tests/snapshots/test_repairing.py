"""What is broken is set aside and not lost, what is left works, and nothing is touched while somebody writes."""

from __future__ import annotations

import errno
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ema_command import Ema
from factories import (
    OTHER_RUN_ID,
    RUN_ID,
    flip_bit,
    random_walk,
    snapshot_files,
    write_run,
    write_snapshot,
)

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import DirectoryError, FileFormatError, LockedError, MismatchError, WriteError
from posthoc_cli.planning import thinned_subset
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import reconstruct
from posthoc_cli.snapshots import measurements
from posthoc_cli.snapshots.check import list_contents, verify
from posthoc_cli.snapshots.directory import find_snapshots, inspect_directory
from posthoc_cli.snapshots.lock import DirectoryLock
from posthoc_cli.snapshots.measurements import snapshot_prior
from posthoc_cli.snapshots.models import INDEX_NAME
from posthoc_cli.snapshots.repair import SIGMA_RELS, Repair, clean, plan_repair, repair
from posthoc_cli.synthesis.plan import plan_synthesis
from posthoc_cli.synthesis.sources import disk_sources


class Walk:
    """A model whose weights wander the same way whenever it is trained."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(30, 20)
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.ones_(self.model.bias)
        self.generator = torch.Generator().manual_seed(1)

    def train(self, tracker: PostHocEMA, steps: int) -> None:
        for _ in range(steps):
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=self.generator))
            tracker.update_(self.model)


@pytest.fixture(scope="session")
def _recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "run"
    torch.manual_seed(0)
    walk = Walk()
    options = {"update_every": 1, "checkpoint_every": 10, "max_checkpoints": None}
    with PostHocEMA.from_model(walk.model, folder, **options) as tracker:
        walk.train(tracker, 100)
        tracker.save_state(folder / "state.safetensors")
    return folder


@pytest.fixture
def run(_recorded: Path, tmp_path: Path) -> Path:
    """A directory of 10 times x 2 profiles, up to step 100, and a state; a copy that may be harmed."""
    return Path(shutil.copytree(_recorded, tmp_path / "run"))


def planned(run: Path) -> Repair:
    return plan_repair(verify(list_contents(run)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors") if p.is_file()}


# --- repair


@pytest.mark.parametrize("which", [(0,), (4, 5), (-1,), (-2, -1), (0, 3, 9, -1), tuple(range(18))])
def test_what_is_left_works_with_the_higher_error_bar(ema: Ema, run: Path, tmp_path: Path, which: tuple[int]) -> None:
    paths = snapshot_files(run)
    bar = plan_synthesis(disk_sources(run), [0.15]).predicted_error(0)
    for index in which:
        flip_bit(paths[index])
    plan = planned(run)
    before = contents(run)
    moved = repair(plan).moved
    assert {path.name for path in moved} == {paths[index].name for index in which}
    assert {Path(name).name: data for name, data in contents(run).items()} == {
        Path(name).name: data for name, data in before.items()
    }
    assert verify(list_contents(run)).is_fine
    assert len(find_snapshots(run)) == 20 - len(which)
    now = plan_synthesis(disk_sources(run), [0.15]).predicted_error(0)
    assert None not in (bar, now)
    assert now > 0.999 * bar  # type: ignore[operator]  # the norm that both are relative to is estimated anew
    if len(which) > 1:
        assert now > bar  # type: ignore[operator]
    result = ema("synthesize", run, "--sigma-rel", "0.15", "--out", tmp_path / "o.safetensors")
    assert result.code == 0, result.err
    if len(which) == 5:
        assert ema("error-plot", run, "--out", tmp_path / "o.png").code == 0
    result = ema("info", run, "--json")
    assert result.code == (1 if inspect_directory(run).problems else 0)


@pytest.mark.parametrize("which", [(0,), (-1,), (-2, -1)])
def test_training_goes_on_after_a_loss(run: Path, which: tuple[int]) -> None:
    for index in which:
        flip_bit(snapshot_files(run)[index])
    repair(planned(run))
    walk = Walk()
    with PostHocEMA.from_path(run, walk.model) as tracker:
        walk.train(tracker, 20)
        assert tracker.step >= 100
    found = verify(list_contents(run))
    assert found.is_fine, found
    assert max(s.info.t for s in found.snapshots) >= 110


@pytest.mark.parametrize("which", [(0,), (-1,), (4, 5, -1)])
def test_a_state_that_knew_the_lost_snapshot_goes_on_exactly(run: Path, tmp_path: Path, which: tuple[int]) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    lost = [snapshot_files(run)[index] for index in which]
    for path in lost:
        flip_bit(path)
    repair(planned(run))
    for folder in (run, whole):
        walk = Walk()
        with PostHocEMA.from_model(
            walk.model, folder, update_every=1, checkpoint_every=10, max_checkpoints=None
        ) as tracker:
            tracker.load_state(folder / "state.safetensors")
            walk.train(tracker, 20)
    assert verify(list_contents(run)).is_fine
    names = {path.name for path in snapshot_files(whole)}
    assert {path.name for path in snapshot_files(run)} == names - {path.name for path in lost}
    from safetensors.torch import load_file

    for name in sorted(names)[-4:]:
        ours, theirs = load_file(run / name), load_file(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_errors_before_and_after_are_those_of_the_solver(run: Path) -> None:
    everything = find_snapshots(run)
    flip_bit(snapshot_files(run)[7])
    os.truncate(snapshot_files(run)[8], snapshot_files(run)[8].stat().st_size - 1)
    plan = planned(run)
    left = find_snapshots_without(everything, plan.gone)
    assert plan.unknown == 0
    least = np.zeros(len(SIGMA_RELS))
    for errors, those in ((plan.before, everything), (plan.after, left)):
        assert errors is not None
        targets = [PowerFunction.from_sigma_rel(s, 100.0) for s in SIGMA_RELS]
        profiles = [s.info.profile.pure for s in those]
        expected = reconstruct(profiles, targets, prior=snapshot_prior(those), t=100.0).predicted_error
        least = np.maximum(expected, least)
        assert errors.predicted == pytest.approx(least, rel=1e-6)
        assert errors.worst >= errors.predicted.max()
        assert (errors.t, errors.solved, errors.count) == (100, len(those), len(those))
    assert plan.before is not None
    assert plan.after is not None
    assert (plan.after.predicted >= plan.before.predicted).all()
    assert np.any(plan.after.predicted > 1.01 * plan.before.predicted)


def test_of_very_many_the_errors_are_those_of_the_choice(ema: Ema, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "thinned_subset", partial(thinned_subset, most=12))
    flip_bit(snapshot_files(run)[7])
    plan = planned(run)
    for errors, count in ((plan.before, 20), (plan.after, 19)):
        assert errors is not None
        assert (errors.solved, errors.count) == (12, count)
        assert np.isfinite(errors.predicted).all()
    result = ema("verify", run, "--repair", "--yes")
    assert "at t = 100; from 12 of 19 snapshots" in result.out


def find_snapshots_without(everything: list, gone: tuple[Path, ...]) -> list:
    return [snapshot for snapshot in everything if snapshot.path not in gone]


def test_a_lost_header_is_counted_and_no_snapshot_at_all_has_no_error(run: Path) -> None:
    flip_bit(snapshot_files(run)[7], 20)
    plan = planned(run)
    assert plan.unknown == 1
    assert plan.before is not None
    for path in snapshot_files(run):
        flip_bit(path, 30)
    plan = planned(run)
    assert (plan.before, plan.after) == (None, None)
    assert len(repair(plan).moved) == 20
    assert find_snapshots(run) == []


def test_unmeasured_snapshots_are_judged_by_a_sample_that_may_be_damaged(tmp_path: Path) -> None:
    write_run(tmp_path, random_walk(40, {"w": (6, 5)}), (10, 20, 30, 40))
    flip_bit(snapshot_files(tmp_path)[3])
    plan = planned(tmp_path)
    assert plan.after is not None
    os.truncate(snapshot_files(tmp_path)[3], snapshot_files(tmp_path)[3].stat().st_size - 100)
    plan = planned(tmp_path)
    assert plan.before is None
    assert plan.after is not None


def test_states_outputs_and_what_is_no_file_go_too_and_contradictions_stay(run: Path) -> None:
    shutil.copy(snapshot_files(run)[0], run / "copy.safetensors")
    write_snapshot(run, 5, 0.05, OTHER_RUN_ID, {"w": torch.ones(3)}, name="stranger.safetensors")
    flip_bit(run / "state.safetensors")
    os.mkfifo(run / "fifo.safetensors")
    (run / "nowhere.safetensors").symlink_to("nowhere")
    (run / INDEX_NAME).write_text("{")
    plan = repair(planned(run))
    assert (plan.before, plan.after) == (None, None)
    assert {path.name for path in plan.moved} == {
        INDEX_NAME, *(f"{name}.safetensors" for name in ("state", "fifo", "nowhere"))
    }  # fmt: skip
    (run / "copy.safetensors").unlink()
    (run / "stranger.safetensors").unlink()
    found = verify(list_contents(run))
    assert found.is_fine
    assert len(found.snapshots) == 20
    assert found.notes == ("4 set aside in quarantine/ as broken; not read",)


def test_a_link_is_moved_and_not_what_it_leads_to(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    path = snapshot_files(run)[3]
    path.rename(elsewhere)
    flip_bit(elsewhere)
    path.symlink_to(elsewhere)
    (moved,) = repair(planned(run)).moved
    assert moved.is_symlink()
    assert elsewhere.exists()
    assert not elsewhere.is_symlink()


def test_nothing_in_quarantine_is_replaced(run: Path) -> None:
    path = snapshot_files(run)[3]
    kept = path.read_bytes()
    seen = set()
    for k in range(3):
        path.write_bytes(kept[: -1 - k])
        seen.add(path.read_bytes())
        repair(planned(run))
    assert {p.read_bytes() for p in (run / "quarantine").iterdir()} == seen


def test_a_quarantine_that_leads_elsewhere_is_not_used(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run / "quarantine").symlink_to(tmp_path / "elsewhere")
    flip_bit(snapshot_files(run)[0])
    with pytest.raises(DirectoryError, match="is a symbolic link"):
        repair(planned(run))
    assert len(snapshot_files(run)) == 20


def test_shards_of_an_output_in_the_directory_itself(ema: Ema, run: Path) -> None:
    options = ("--sigma-rel", "0.15", "--format", "sharded", "--max-shard-size", "1KB")
    result = ema("synthesize", run, "--out", run, *options)
    assert result.code == 0, result.err
    shards = sorted(run.glob("model-*"))
    assert len(shards) == 2
    assert verify(list_contents(run)).is_fine
    flip_bit(shards[0])
    moved = {path.name for path in repair(planned(run)).moved}
    assert moved == {INDEX_NAME, *(path.name for path in shards)}
    assert len(find_snapshots(run)) == 20
    assert verify(list_contents(run)).is_fine


def test_a_superseded_one_is_set_aside_too(run: Path) -> None:
    (run / "superseded").mkdir()
    shutil.copy(snapshot_files(run)[0], run / "superseded")
    flip_bit(run / "superseded" / snapshot_files(run)[0].name)
    (moved,) = repair(planned(run)).moved
    assert moved.parent == run / "quarantine"
    assert verify(list_contents(run)).is_fine


def test_only_in_a_snapshot_directory(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, {"w": torch.ones(3)})
    (tmp_path / "outputs").mkdir()
    from posthoc_cli.export.convert import export_file

    output = tmp_path / "outputs" / "model.safetensors"
    export_file(snapshot_files(tmp_path / "run")[0], output)
    flip_bit(output)
    for path in (tmp_path / "outputs", output, snapshot_files(tmp_path / "run")[0]):
        with pytest.raises(DirectoryError, match="is no directory of snapshots"):
            planned(path)


def test_what_has_changed_since_is_not_moved(run: Path) -> None:
    first, second = snapshot_files(run)[:2]
    flip_bit(first)
    flip_bit(second)
    plan = planned(run)
    first.unlink()
    shutil.copy(second, first.with_name("x"))
    first.with_name("x").rename(second)
    with pytest.raises(MismatchError, match="has changed since it was read; nothing was set aside; run again"):
        repair(plan)
    assert not (run / "quarantine").exists()


def test_nothing_wrong_means_nothing_to_do(run: Path) -> None:
    plan = planned(run)
    assert (plan.gone, plan.staying, plan.unknown) == ((), (), 0)
    assert plan.before is plan.after
    assert repair(plan).moved == ()
    assert not (run / "quarantine").exists()


def test_what_has_gone_since_is_passed_over(run: Path) -> None:
    flip_bit(snapshot_files(run)[0])
    plan = planned(run)
    snapshot_files(run)[0].unlink()
    assert repair(plan).moved == ()


def test_not_while_another_one_writes(run: Path) -> None:
    flip_bit(snapshot_files(run)[0])
    leftover = leave(run / ".ema-1.tmp", 7200)
    found = verify(list_contents(run))
    plan = plan_repair(found)
    with DirectoryLock(run):
        for change in (lambda: repair(plan), lambda: clean(found)):
            with pytest.raises(LockedError, match="is writing here"):
                change()
    assert len(snapshot_files(run)) == 20
    assert leftover.exists()
    assert len(repair(plan).moved) == 1
    assert clean(found).removed == (leftover,)


@pytest.mark.parametrize("operation", ["make_directory", "rename", "fsync_directory"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_repair_that_is_interrupted_loses_nothing_and_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, operation: str, after: int
) -> None:
    for path in snapshot_files(run)[:3]:
        flip_bit(path)
    before = sorted(contents(run).values())
    own, done = getattr(files.system, operation), []

    def fail(*arguments: Path) -> None:
        if len(done) == after:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done.append(arguments)
        own(*arguments)

    plan = planned(run)
    with monkeypatch.context() as patch:
        patch.setattr(files.system, operation, fail)
        try:
            repair(plan)
        except WriteError as error:
            assert "quarantine" in str(error)
    assert sorted(contents(run).values()) == before
    repair(planned(run))
    assert verify(list_contents(run)).is_fine
    assert sorted(contents(run).values()) == before
    DirectoryLock(run).release()  # it was given back


# --- leftovers


def leave(path: Path, age: float) -> Path:
    path.write_text("half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_leftovers_that_are_still_are_removed(run: Path, tmp_path: Path) -> None:
    old, young = leave(run / ".ema-1.tmp", 120), leave(run / ".ema-2.tmp", 5)
    ahead = leave(run / ".ema-3.tmp", -3600)  # by another host's clock
    (tmp_path / "precious").write_text("x")
    (run / ".ema-4.tmp").symlink_to(tmp_path / "precious")
    os.utime(run / ".ema-4.tmp", (0, 0), follow_symlinks=False)
    (run / ".ema-not-ours").write_text("x")
    before = contents(run)
    found = verify(list_contents(run))
    assert found.is_fine
    cleaning = clean(found)
    assert set(cleaning.removed) == {old, run / ".ema-4.tmp"}
    why = "was written to a moment ago; a write may be in progress"
    assert sorted(cleaning.left) == [(young, why), (ahead, why)]
    assert contents(run) == before
    assert (tmp_path / "precious").exists()
    assert (run / ".ema-not-ours").exists()
    assert not old.exists()


def test_without_a_lock_leftovers_must_be_an_hour_old(tmp_path: Path) -> None:
    young, old = leave(tmp_path / ".ema-1.tmp", 3000), leave(tmp_path / ".ema-2.tmp", 4000)
    found = verify(list_contents(tmp_path))
    assert found.files == ()
    cleaning = clean(found)
    assert cleaning.removed == (old,)
    assert young.exists()
    assert [path.name for path in tmp_path.iterdir()] == [young.name]  # nor was a lock made


def test_nothing_of_another_directory_is_moved_or_deleted(ema: Ema, run: Path, tmp_path: Path) -> None:
    """Through links in the place of `superseded` and of a folder of shards: its lock is another one."""
    other, shards = Path(shutil.copytree(run, tmp_path / "other")), tmp_path / "shards"
    result = ema(
        "synthesize", run, "--out", shards, "--sigma-rel", "0.15", "--format", "sharded", "--max-shard-size", "1KB"
    )
    assert result.code == 0, result.err
    flip_bit(snapshot_files(other)[0])
    flip_bit(min(shards.glob("*.safetensors")))
    leave(other / ".ema-1.tmp", 7200)
    leave(shards / ".ema-2.tmp", 7200)
    before = {folder: sorted(path.name for path in folder.iterdir()) for folder in (other, shards)}
    (run / "superseded").symlink_to(other)
    (run / "linked").symlink_to(shards)
    found = verify(list_contents(run))
    assert found.leftovers == ()
    assert found.superseded == 0
    assert "superseded/ is a symbolic link; not read" in found.notes
    assert repair(plan_repair(found)).moved == (run / "quarantine" / "linked",)  # the link itself
    assert clean(found).removed == ()
    assert {folder: sorted(path.name for path in folder.iterdir()) for folder in (other, shards)} == before


def test_a_file_in_the_place_of_quarantine_is_named(run: Path) -> None:
    (run / "quarantine").write_text("mine")
    flip_bit(snapshot_files(run)[0])
    with pytest.raises(DirectoryError, match=r"quarantine: is not a directory; .* move it away"):
        repair(planned(run))
    assert len(snapshot_files(run)) == 20


def test_a_leftover_that_goes_meanwhile_is_passed_over(run: Path) -> None:
    first, second = leave(run / ".ema-1.tmp", 120), leave(run / ".ema-2.tmp", 120)
    found = verify(list_contents(run))
    first.unlink()
    cleaning = clean(found)
    assert (cleaning.removed, cleaning.left) == ((second,), ())


@pytest.mark.parametrize("operation", ["unlink", "fsync_directory"])
def test_what_cannot_be_removed_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    leftover = leave(run / ".ema-1.tmp", 120)
    found = verify(list_contents(run))

    named = leftover if operation == "unlink" else run
    own = getattr(files.system, operation)

    def refuse(path: Path) -> None:
        if path == named:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        own(path)

    monkeypatch.setattr(files.system, operation, refuse)
    with pytest.raises(WriteError) as refused:
        clean(found)
    told = (
        "removed: permission denied" if operation == "unlink" else "written: permission denied; nothing partial is left"
    )
    assert str(refused.value) == f"{named}: cannot be {told}"
    DirectoryLock(run).release()  # it was given back


def test_a_folder_under_the_name_of_a_leftover_stays(run: Path) -> None:
    folder = run / ".ema-1.tmp"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    os.utime(folder, (0, 0))
    cleaning = clean(verify(list_contents(run)))
    assert cleaning.removed == ()
    assert [path for path, _ in cleaning.left] == [folder]
    assert (folder / "notes.txt").exists()


def test_a_directory_with_a_damaged_file_says_how_to_go_on(ema: Ema, run: Path, tmp_path: Path) -> None:
    flip_bit(snapshot_files(run)[0], 30)
    with pytest.raises(FileFormatError) as raised:
        find_snapshots(run)
    assert "ema verify" not in str(raised.value)
    hint = f"; `ema verify {run}` checks every file, and with --repair sets aside what is broken"
    for arguments in (
        ("synthesize", run, "--sigma-rel", "0.15", "--out", tmp_path / "o.safetensors"),
        ("error-plot", run, "--out", tmp_path / "o.png"),
        ("prune", run, "--keep", "2", "--yes"),
    ):
        assert ema(*arguments).error.endswith(hint)
    assert "ema verify" not in ema("info", snapshot_files(run)[0]).error
    shutil.rmtree(run)
    assert "ema verify" not in ema("prune", run, "--keep", "2", "--yes").error
