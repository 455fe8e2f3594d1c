"""Pruning deletes the snapshots that are needed least, and never endangers those that stay."""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import contents, flip_bit, random_walk, rewrite_snapshot, write_run
from snapshots.recorded import call_number, failing, record

from posthoc_cli import (
    PostHocEMA,
    Window,
    disk_sources,
    error_curve,
    files,
    plan_synthesis,
    synthesize,
)
from posthoc_cli.errors import FileFormatError, MismatchError, WriteError
from posthoc_cli.planning import ErrorCurve, removal_order, times_of, unused_times
from posthoc_cli.reconstruction import thinned_subset
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.prune import plan_pruning, prune
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.sources import source_prior


@pytest.fixture(scope="session")
def _measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "run"
    return record(folder, 240, scale=0.01, checkpoint_every=20, checkpoint_dtype="float16")


@pytest.fixture
def run(_measured: Path, tmp_path: Path) -> Path:
    """A run of 12 times x 2 profiles with measurements."""
    return Path(shutil.copytree(_measured, tmp_path / "run"))


@pytest.fixture
def unmeasured(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    walk = random_walk(80, {"w": (6, 5), "b": (3,)})
    write_run(folder, walk, range(10, 81, 10), dtype=torch.float16)
    return folder


def errors_of(
    snapshots: Sequence[Snapshot],
    ends: tuple[float, float] = (0.05, 0.28),
) -> ErrorCurve:
    profiles = [snapshot.profile for snapshot in snapshots]
    return error_curve("", profiles, source_prior(snapshots), ends, points=41)


def keys(snapshots: Sequence[Snapshot]) -> set[tuple[float, float]]:
    return {(s.t, s.sigma_rel) for s in snapshots}


def in_order_of_need(snapshots: Sequence[Snapshot], keep: int) -> list[Snapshot]:
    """Return the snapshots of the times that go one after the other; the newest time stays."""
    profiles = [snapshot.profile for snapshot in snapshots]
    times = times_of(profiles)
    order = removal_order(profiles, source_prior(snapshots), times, keep, times[-1:])
    return [snapshots[index] for time in order for index in time.indices]


def without(snapshots: Sequence[Snapshot], gone: Sequence[Snapshot]) -> list[Snapshot]:
    return [snapshot for snapshot in snapshots if snapshot not in gone]


def without_newest(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Return all but the newest snapshot of 0.28."""
    last = snapshots[-1]
    assert last.sigma_rel == 0.28
    return without(snapshots, [last])


# --- the choice


@pytest.mark.parametrize("wish", [{"keep": 1}, {"max_error": 0.9}])
def test_the_newest_time_stays_and_the_newest_with_all_profiles(
    run: Path,
    wish: dict[str, Any],
) -> None:
    snapshots = read_directory(run)
    both = plan_pruning(snapshots, **wish)
    assert [*both.kept][-2:] == snapshots[-2:]
    alone = without_newest(snapshots)
    one = plan_pruning(alone, **wish)
    assert [*one.kept][-3:] == alone[-3:]


def test_max_error_keeps_as_few_as_suffice(run: Path) -> None:
    snapshots = read_directory(run)
    # here an exchange would raise the worst error above the bound
    close = plan_pruning(snapshots, max_error=9.1e-3)
    assert errors_of(close.kept).worst == pytest.approx(close.after.worst, rel=1e-9)
    assert close.after.worst <= 4.55e-3
    pruning = plan_pruning(snapshots, max_error=2e-3)
    assert pruning.before.worst <= pruning.after.worst <= 1e-3
    assert any(s.t < 240.0 for s in pruning.kept)
    one_more = len(pruning.to_delete) + 2  # a time has two
    gone = in_order_of_need(snapshots, 1)[:one_more]
    too_few = without(snapshots, gone)
    # half of `max_error`, since a prediction may be too low by 2
    assert errors_of(too_few).worst > 1e-3


def test_exchanges_find_better_ones_than_deleting_the_least_needed_one_after_another(
    run: Path,
) -> None:
    snapshots = read_directory(run)
    greedy = without(snapshots, in_order_of_need(snapshots, 4))
    exchanged = plan_pruning(snapshots, keep=4).kept
    assert errors_of(exchanged).worst < 0.9 * errors_of(greedy).worst


@pytest.mark.parametrize(
    ("folder", "source", "change"),
    [
        ("run", "measured", 0.15),
        ("unmeasured", "sampled", 1.0),
    ],
)
def test_the_errors_are_those_of_the_directory_before_and_after(
    folder: str,
    source: str,
    change: float,
    request: pytest.FixtureRequest,
) -> None:
    """The survivors predict about the same error, if their headers keep the measurements of
    all."""
    path: Path = request.getfixturevalue(folder)
    snapshots = read_directory(path)
    pruning = plan_pruning(snapshots, keep=3)
    assert pruning.source == source
    expected = errors_of(snapshots).predicted_error
    np.testing.assert_allclose(pruning.before.predicted_error, expected, rtol=1e-12)
    prune(path, pruning)
    left = read_directory(path)
    assert len(left) == 6
    assert len({snapshot.t for snapshot in left}) == 3
    assert errors_of(left).worst == pytest.approx(pruning.after.worst, rel=change)
    assert pruning.after.worst > pruning.before.worst


def test_the_errors_are_those_of_the_range(run: Path) -> None:
    snapshots = read_directory(run)
    ends = (0.1, 0.2)
    narrow = plan_pruning(snapshots, keep=3, sigma_range=ends)
    assert narrow.before.worst == pytest.approx(errors_of(snapshots, ends).worst, rel=1e-12)
    for curve in (narrow.before, narrow.after):
        widths = curve.sigma_rels.tolist()
        assert (widths[0], widths[-1]) == ends


# --- deleting


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (flip_bit, FileFormatError),
        (lambda path: rewrite_snapshot(path, updates=7), MismatchError),
        (Path.unlink, MismatchError),
    ],
)
def test_nothing_is_deleted_when_a_survivor_is_damaged(
    run: Path,
    harm: Callable[[Path], None],
    kind: type[Exception],
) -> None:
    """Nor if a survivor was replaced or deleted."""
    pruning = plan_pruning(read_directory(run), keep=4)
    victim = pruning.kept[-1].path
    harm(victim)
    before = contents(run)
    message = str(victim) if kind is FileFormatError else "has changed"
    with pytest.raises(kind, match=message):
        prune(run, pruning)
    assert contents(run).items() >= before.items()


def test_what_is_said_to_be_deleted_is_so_on_the_disk(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synced = list[Path]()
    monkeypatch.setattr(files.system, "fsync_directory", synced.append)
    prune(run, plan_pruning(read_directory(run), keep=4))
    assert synced == [run]


@pytest.mark.parametrize(
    ("stop", "after"), [(KeyboardInterrupt(), 7), (OSError(5, "Input/output error"), 0)]
)
def test_an_interruption_leaves_a_directory_that_works(
    run: Path,
    stop: BaseException,
    after: int,
) -> None:
    pruning = plan_pruning(read_directory(run), keep=4)
    is_next = call_number(after)

    def fails(path: Path) -> bool:
        return path.suffix == ".safetensors" and is_next()

    with failing("unlink", stop, fails), pytest.raises((KeyboardInterrupt, WriteError)):
        prune(run, pruning)
    left = read_directory(run)
    assert len(left) == 24 - after
    assert keys(left) >= keys(pruning.kept)
    assert errors_of(left).worst <= 1.05 * pruning.after.worst
    with PostHocEMA.from_path(run) as tracker:
        tracker.state_dict(sigma_rel=0.15)
    prune(run, plan_pruning(left, keep=4))
    assert len(read_directory(run)) == 8


# --- the choice of the snapshots that a reconstruction uses if there are very many


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("many") / "run", 200, scale=0.01, checkpoint_every=5)


@pytest.fixture
def _twenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reconstructions use at most 20 snapshots."""
    few = partial(thinned_subset, most=20)
    monkeypatch.setattr("posthoc_cli.snapshots.sources.thinned_subset", few)
    monkeypatch.setattr("posthoc_cli.snapshots.prune.unused_times", partial(unused_times, most=20))


def chosen_times(run: Path, t: float) -> list[float]:
    profiles = [snapshot.profile for snapshot in read_directory(run) if snapshot.t <= t]
    return [profiles[index].t for index in thinned_subset(profiles, 20)]


@pytest.mark.usefixtures("_twenty")
def test_a_synthesis_uses_the_choice_up_to_its_time_whatever_its_targets(many: Path) -> None:
    sources = disk_sources(many)
    alone = plan_synthesis(sources, [0.15], 143.0)
    company = plan_synthesis(sources[::-1], [0.02, 0.15, Window(30)], 143.0)
    for plan in (alone, company):
        assert plan.solved == 20
        assert plan.choice == "20 of 56 snapshots up to t = 143, evenly in time"
        assert [source.t for source in plan.sources] == chosen_times(many, 143.0)
    one = dict(synthesize(alone))["0.weight"][0]
    other = dict(synthesize(company))["0.weight"][1]
    torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
    few = plan_synthesis(sources, [0.15], 50.0)
    assert few.solved == 20
    assert few.available == 20
    assert few.choice is None


@pytest.mark.usefixtures("_twenty")
def test_pruning_first_deletes_what_no_reconstruction_uses_and_training_does_not_resume_from(
    many: Path,
) -> None:
    snapshots = read_directory(many)
    used = chosen_times(many, 200.0)
    unused = [snapshot for snapshot in snapshots if snapshot.t not in used]
    pruned = plan_pruning(snapshots, keep=3)
    assert keys(pruned.to_delete[:60]) == keys(unused)
    assert len(pruned.kept) == 6
    alone = without_newest(snapshots)
    kept = plan_pruning(alone, keep=1).kept
    assert [*kept] == alone[-3:]
