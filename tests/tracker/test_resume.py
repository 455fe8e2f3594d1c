"""Resuming a run exactly from the tracker's own state, or from rounded snapshots; and who may write to a directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import forked
import pytest
import torch
from factories import averages_in, exact_gamma
from safetensors.torch import load_file
from tracker.runs import contents, scheduled, times, train

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import (
    DirectoryError,
    LockedError,
    MismatchError,
    ModelMismatchError,
    NotReadyError,
    WriteError,
)
from posthoc_cli.snapshots.directory import read_directory

SETTINGS: dict = {"sigma_rels": (0.05, 0.28), "update_every": 2, "checkpoint_every": 10, "checkpoint_dtype": None}


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def begun(folder: Path, last: int, **settings: object) -> tuple[torch.nn.Sequential, dict, str]:
    """Return the model, the state and the id of a run that was closed after step `last`."""
    model = network()
    with PostHocEMA.from_model(model, folder, **SETTINGS | settings) as tracker:
        train(model, tracker, 1, last)
        return model, tracker.state_dict(), tracker.run_id


@pytest.mark.usefixtures("one_run_id")
@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_run_may_be_interrupted_at_any_step(tmp_path: Path, device: str) -> None:
    """Snapshots, also where some were thinned, are byte for byte those of a run without interruption."""
    settings, last = dict(SETTINGS, checkpoint_every=4, max_checkpoints=3, device=device), 20
    model = network()
    with PostHocEMA.from_model(model, tmp_path / "complete", **settings) as tracker:
        for step in range(1, last + 1):
            train(model, tracker, step, step)
            torch.save({"model": model.state_dict(), "ema": tracker.state_dict()}, tmp_path / f"{step}.pt")
            shutil.copytree(tmp_path / "complete", tmp_path / str(step), ignore=shutil.ignore_patterns(".ema*"))
    expected = scheduled(tmp_path / "complete")
    for step in range(1, last + 1):
        checkpoint = torch.load(tmp_path / f"{step}.pt", weights_only=True)
        model = network()
        model.load_state_dict(checkpoint["model"])
        with PostHocEMA.from_model(model, tmp_path / str(step), **settings, resume="auto") as tracker:
            tracker.load_state_dict(checkpoint["ema"])
            train(model, tracker, step + 1, last)
        assert scheduled(tmp_path / str(step)) == expected


def test_an_abandoned_attempt_is_not_mixed_into_the_one_that_continues(tmp_path: Path) -> None:
    """Back to an early state, on for a while, then to a late state of the first attempt."""
    model, run = network(), tmp_path / "run"
    with PostHocEMA.from_model(model, run, **SETTINGS) as tracker:
        train(model, tracker, 1, 15)
        early = tracker.state_dict()
        train(model, tracker, 16, 35)
        late, weights = tracker.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
        first_attempt = contents(run)
        tracker.load_state_dict(early)
        for parameter in model.parameters():
            parameter.data.fill_(100.0)
        train(model, tracker, 16, 45)
        tracker.load_state_dict(late)
        model.load_state_dict(weights)
        train(model, tracker, 36, 50)
    left = contents(run)
    assert {name for name in left if int(name.partition("-")[0]) < 40} <= set(first_attempt)
    assert all(left[name] == first_attempt[name] for name in left.keys() & first_attempt.keys())
    assert times(run) == {10, 40, 50}
    assert len(list((run / "superseded").iterdir())) == 10


def test_a_reader_does_not_continue_a_run_that_has_advanced_since(tmp_path: Path) -> None:
    """Its model has other weights than when it was compared with the run."""
    model = network()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as writer:
        train(model, writer, 1, 20)
        reader = PostHocEMA.from_path(tmp_path, model)
        assert (reader.state_dict()["clock"][-2], reader.run_id) == (20, writer.run_id)
        train(model, writer, 21, 40)
    before = contents(tmp_path)
    with pytest.raises(MismatchError, match="has advanced from step 20 to 40 since this tracker was made"):
        train(model, reader, 41, 41)
    assert contents(tmp_path) == before
    reader.close()


def test_headers_count_the_error_of_resuming_from_rounded_snapshots(tmp_path: Path) -> None:
    """Squared norms add up, and fade by beta squared as averages move on; here beta = (t_resume / t)^(gamma+1)."""
    model = torch.nn.Linear(64, 64, bias=False)
    gamma, lost, last = exact_gamma(0.28), 0.0, 0
    settings = {"sigma_rels": (0.05, 0.28), "update_every": 1, "checkpoint_every": 20}
    for end in (20, 40, 60):
        tracker = PostHocEMA.from_path(tmp_path, model) if last else PostHocEMA.from_model(model, tmp_path, **settings)
        with tracker:
            train(model, tracker, last + 1, end)
            state = tracker.state_dict()
        (snapshot,) = (s for s in read_directory(tmp_path) if (s.t, s.sigma_rel) == (end, 0.28))
        lost *= ((last / end) ** (gamma + 1)) ** 2
        assert snapshot.inherited == pytest.approx(lost, rel=1e-3)
        assert state["standing"]["inherited"][1] == snapshot.inherited
        assert (snapshot.updates, state["standing"]["updates"]) == (end, end)
        exact = averages_in(state)["0.28"]["weight"]
        lost += float((load_file(snapshot.path)["weight"].double() - exact).square().sum())
        last = end
    assert lost > 0


def test_from_path_uses_the_runs_settings_and_from_model_its_arguments(tmp_path: Path) -> None:
    model, _, _ = begun(tmp_path, 10, max_checkpoints=7)
    PostHocEMA.from_path(tmp_path, model.requires_grad_(False))  # for an evaluation
    model.requires_grad_(True)
    given = SETTINGS | {"max_checkpoints": None, "checkpoint_dtype": "bf16", "checkpoint_every": 4}
    for made, expected in (
        (PostHocEMA.from_path(tmp_path), (2, 10, 7, None)),
        (PostHocEMA.from_model(model, tmp_path, **given, resume="auto"), (2, 4, None, "BF16")),
    ):
        schedule = made.settings.schedule
        kept = schedule.update_every, schedule.checkpoint_every, schedule.max_checkpoints, schedule.checkpoint_dtype
        assert (kept, made.step) == (expected, 10)


def test_a_time_without_all_profiles_is_refused_where_the_missing_one_cannot_be_reconstructed(tmp_path: Path) -> None:
    """Two snapshots of other times predict 11 %."""
    model, _, _ = begun(tmp_path, 20)
    read_directory(tmp_path)[-1].path.unlink()
    before = contents(tmp_path)
    with PostHocEMA.from_path(tmp_path, model) as tracker:
        with pytest.raises(
            DirectoryError, match=r"sigma_rel 0\.28 has no snapshot at step 20, .*at most 1 % is accepted"
        ):
            tracker.update_(model)
        assert contents(tmp_path) == before
    with PostHocEMA.from_path(tmp_path, model, step=10) as tracker:
        tracker.update_(model)
        assert tracker.step == 11
    assert len(list((tmp_path / "superseded").iterdir())) == 1


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_directory_without_snapshots_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DirectoryError, match=name):
        PostHocEMA.from_path(tmp_path / name)


def test_a_directory_of_another_run_is_refused_at_once(tmp_path: Path) -> None:
    model, _, first = begun(tmp_path, 10)
    before = contents(tmp_path)
    ways = r"restore the model's checkpoint first, .*resume='auto'.*load_state_dict.*resume=10 .*another directory"
    # Also a ValueError, for code written for pytorch-posthoc-ema.
    with pytest.raises(ValueError, match=f"{first[:8]}, up to step 10; {ways}$"):
        PostHocEMA.from_model(model, tmp_path, **SETTINGS)
    assert contents(tmp_path) == before
    with PostHocEMA.from_path(tmp_path, model) as third:  # no lock was taken
        train(model, third, 11, 12)


def test_a_directory_that_cannot_be_written_to_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Mock(return_value=False)
    monkeypatch.setattr(os, "access", access)  # root may write everywhere
    with pytest.raises(DirectoryError, match=f"{tmp_path.name}: cannot be written to"):
        PostHocEMA.from_model(network(), tmp_path / "new" / "run", **SETTINGS)
    access.assert_called_once_with(tmp_path, os.W_OK | os.X_OK)
    with pytest.raises(WriteError, match="aaa: cannot be written: file name too long"):
        PostHocEMA.from_model(network(), tmp_path / ("a" * 300), **SETTINGS)
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name in ("file", "file/run", "nowhere"):
        reason = rf"/{Path(name).parts[0]}: is not a directory; snapshots are written to the directory .*/{name};"
        with pytest.raises(DirectoryError, match=reason):
            PostHocEMA.from_model(network(), tmp_path / name, **SETTINGS)


@pytest.mark.parametrize("resume", ["auto", None])
@pytest.mark.parametrize("first", [17, 9], ids=["between snapshots", "before the first snapshot"])
def test_a_cell_that_is_run_again_continues_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int, resume: str | None
) -> None:
    """Its first tracker was interrupted and still exists, as in a notebook's list of results."""
    model, trackers = network(), []
    for last in (first, 35):
        trackers.append(PostHocEMA.from_model(model, tmp_path, **SETTINGS, resume=resume))
        train(model, trackers[-1], trackers[-1].step + 1, last)
    assert sum("an earlier tracker of this process" in text for text in caplog.messages) == 1
    assert trackers[1].state_dict()["standing"]["updates"] == 17  # at 2, 4, ..., 34: none was lost
    with pytest.raises(NotReadyError, match="a later tracker has taken the place of this one"):
        train(model, trackers[0], 18, 19)
    trackers[0].close()
    trackers[1].close()
    assert repr(trackers[1]) == f"PostHocEMA({str(tmp_path)!r}, step 35, sigma_rels 0.05, 0.28, closed)"


def test_a_cell_that_makes_a_new_model_is_refused_and_leaves_the_first_tracker_unchanged(tmp_path: Path) -> None:
    """Two networks are never averaged together."""
    model = network()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        train(model, tracker, 1, 17)
        with pytest.raises(MismatchError, match=r"up to step 16; .* for a new run name another directory"):
            PostHocEMA.from_model(network(), tmp_path, **SETTINGS)
        train(model, tracker, 18, 20)
        other = network().state_dict()
        tracker.flush()
        model.load_state_dict(other)  # the same tensors with another network's values
        with pytest.raises(MismatchError, match="holds snapshots"):
            PostHocEMA.from_model(model, tmp_path, **SETTINGS)
        again = PostHocEMA.from_model(model, tmp_path, **SETTINGS, resume="auto")
        with pytest.raises(LockedError, match="is writing here"):
            again.update_(model)
    with pytest.raises(ModelMismatchError, match="its weights are those of no snapshot"):
        again.update_(model)
    with pytest.raises(MismatchError, match="holds snapshots"):  # the tracker is closed: a finished run
        PostHocEMA.from_model(model, tmp_path, **SETTINGS)


def test_one_writer_and_any_number_of_readers(tmp_path: Path) -> None:
    model = network()
    writer = PostHocEMA.from_model(model, tmp_path, **SETTINGS)
    train(model, writer, 1, 10)
    reader = PostHocEMA.from_path(tmp_path, model)
    assert set(reader.state_dict(sigma_rel=0.15)) == set(model.state_dict())
    writer.close()
    reader.update_(model)
    del reader  # a garbage-collected tracker releases the directory
    with PostHocEMA.from_path(tmp_path, model) as again:
        train(model, again, 11, 20)


def test_a_state_of_another_run_is_refused_once_this_one_has_begun(tmp_path: Path) -> None:
    _, state, other = begun(tmp_path / "other", 10)
    model, run = network(), tmp_path / "run"
    with PostHocEMA.from_model(model, run, **SETTINGS) as tracker:
        train(model, tracker, 1, 10)
        tracker.flush()
        before = contents(run)
        with pytest.raises(MismatchError, match=f"{tracker.run_id[:8]}.*{other[:8]}"):
            tracker.load_state_dict(state)
        assert contents(run) == before
        train(model, tracker, 11, 20)
    assert times(run) == {10, 20}


def test_a_closed_tracker_reads_but_does_not_write(tmp_path: Path) -> None:
    model = network()
    tracker = PostHocEMA.from_model(model, tmp_path, **SETTINGS)
    train(model, tracker, 1, 10)
    state = tracker.state_dict()
    assert not tracker.closed
    tracker.close()
    tracker.close()
    assert tracker.closed
    assert set(tracker.state_dict(sigma_rel=0.15)) == set(model.state_dict())
    with pytest.raises(NotReadyError, match="was closed"):
        tracker.update_(model)
    with PostHocEMA.from_path(tmp_path, model) as other:
        train(model, other, 11, 20)
        other.flush()
        before = contents(tmp_path)
        with pytest.raises(NotReadyError, match="was closed"):
            tracker.load_state_dict(state)
        assert contents(tmp_path) == before


WRITER = """
import sys, torch
from posthoc_cli import PostHocEMA
model = torch.nn.Linear(2, 2)
tracker = PostHocEMA.from_model(model, sys.argv[1], update_every=1, checkpoint_every=1)
tracker.update_(model)
tracker.flush()
print("ready", flush=True)
"""


def test_another_process_is_named_and_its_death_frees_the_directory(tmp_path: Path) -> None:
    with forked.waiting(WRITER, tmp_path) as holder:
        model = torch.nn.Linear(2, 2)
        tracker = PostHocEMA.from_path(tmp_path, model, step=1)
        with pytest.raises(LockedError, match=f"process {holder.pid} on "):
            tracker.update_(model)
        holder.kill()
        holder.wait()
    with tracker:
        tracker.update_(model)


def test_the_error_figure_is_of_the_averages(tmp_path: Path) -> None:
    def labels(figure) -> list[str]:  # type: ignore[no-untyped-def]
        return figure.axes[0].get_legend_handles_labels()[1]

    model = network()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, max_checkpoints=5) as tracker:
        with pytest.raises(NotReadyError, match="no average yet"):
            tracker.reconstruction_error()
        train(model, tracker, 1, 20)
        figure = tracker.reconstruction_error(sigma_range=(0.1, 0.2))
        assert "4 averages up to t = 20" in labels(figure)
        low, high = figure.axes[0].get_xlim()
        assert 0.098 < low <= 0.1 and 0.2 <= high < 0.203
    assert "4 averages up to t = 20" in labels(PostHocEMA.from_path(tmp_path).reconstruction_error())


@pytest.mark.parametrize("resumes", ["load_state_dict", "from_path"])
def test_a_failing_resume_releases_the_directory(tmp_path: Path, resumes: str) -> None:
    model = network()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        train(model, tracker, 1, 15)
        early = tracker.state_dict()
        train(model, tracker, 16, 20)
    (tmp_path / "superseded").write_text("a file where the folder should be")
    failed = PostHocEMA.from_path(tmp_path, model, step=10)
    with pytest.raises(DirectoryError, match=r"superseded: is a link or no directory; .* move it away"):
        failed.load_state_dict(early) if resumes == "load_state_dict" else failed.update_(model)
    (tmp_path / "superseded").unlink()
    with PostHocEMA.from_path(tmp_path, model, step=10) as tracker:  # although `failed` still exists
        train(model, tracker, 11, 12)
