"""Readers, which take no lock, while a writer thins the snapshots."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ema_command import Ema
from factories import random_walk, snapshot_files, write_run
from safetensors.torch import load_file
from snapshots.recorded import failing, record

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import PostHocError, RankError, VanishedError
from posthoc_cli.tracker.processes import Group


def average(folder: Path) -> torch.Tensor:
    return PostHocEMA.from_path(folder).state_dict(sigma_rel=0.15)["0.weight"]


@contextmanager
def one_vanishing(run: Path, listings: int) -> Iterator[list[Path]]:
    """Delete a snapshot, not the newest, as a writer that thins does, once all headers were read so many times."""
    paths, opened, removed = snapshot_files(run), Counter[Path](), list[Path]()

    def remove(path: Path) -> bool:
        opened[path] += 1
        if opened[path] > listings and not removed:  # for its tensors
            removed.append(paths[len(paths) // 2])
            removed[0].unlink()
        return False

    with failing("open", errno.ENOENT, remove):
        yield removed


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("way", ["state_dict", "command"])
def test_weights_are_made_from_the_remaining_snapshots(
    tmp_path: Path, way: str, measured: bool, ema: Ema, caplog: pytest.LogCaptureFixture
) -> None:
    """Without measurements in headers, planning itself reads tensors."""
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    if measured:
        record(run, 20, checkpoint_every=2)
    else:
        write_run(run, random_walk(80, {"0.weight": (3,)}), range(10, 81, 10))
    with one_vanishing(run, 2 if way == "state_dict" else 1) as removed:  # from_path reads headers, too
        if way == "state_dict":
            found, said = average(run), caplog.text
        else:
            result = ema("synthesize", run, "--sigma-rel", "0.15", "--out", out)
            assert result.code == 0
            found, said = load_file(out)["0.weight"], result.err
    assert f"{removed[0]}: cannot be opened: no such file or directory; planning again" in said
    assert torch.equal(found, average(run))
    assert not list(tmp_path.rglob(".ema-*.tmp"))


def test_an_open_file_that_another_host_removes_is_planned_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a local file system the file would stay readable; a client of a network file system gets ESTALE."""
    record(tmp_path, 20, checkpoint_every=2)
    expected = average(tmp_path)
    once = iter([True])
    with failing("read", errno.ESTALE, lambda _file, _view, at: at > 8 and next(once, False)):  # beyond the header
        assert torch.equal(average(tmp_path), expected)
    (warning,) = caplog.records
    assert ".safetensors: cannot be read: stale file handle; planning again" in warning.getMessage()


@pytest.mark.parametrize(
    ("own", "other", "raised"),
    [
        (VanishedError("a", "is gone"), (False, 1, "broke"), RankError),
        (VanishedError("a", "is gone"), (True, 1, "b: is gone"), VanishedError),
        (RankError("a", "broke"), (True, 1, "b: is gone"), RankError),
        (None, (True, 1, "b: is gone"), VanishedError),
    ],
)
def test_processes_try_again_only_if_snapshots_vanished_and_nothing_else_failed(
    own: Exception | None, other: tuple[bool, int, str], raised: type[Exception]
) -> None:
    """All processes of a group must do the same."""

    class Two(Group):
        def from_all(self, value: Any) -> list[Any]:
            return [value, other]

    def work() -> None:
        if own is not None:
            raise own

    with pytest.raises(PostHocError) as caught:
        Two(0, (0, 1)).together(work)
    assert type(caught.value) is raised
