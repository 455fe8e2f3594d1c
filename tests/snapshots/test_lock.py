"""One writer per directory, which is named, and whose death releases the lock."""

import errno
import fcntl
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager, suppress
from unittest import mock

import forked
import pytest
from checking import refused
from factories import contents
from snapshots.recorded import failing

from posthoc_cli import Run
from posthoc_cli.errors import LockedError, WriteError
from posthoc_cli.snapshots.directory import LOCK_NAME, DirectoryLock

HOLDER = """
import sys
from pathlib import Path
from posthoc_cli.snapshots.directory import DirectoryLock
held = DirectoryLock(Path(sys.argv[1]))
print("held", flush=True)
"""
OTHER_TRACKER = f"this process {os.getpid()} "


@pytest.fixture
def held(tmp_path):
    with DirectoryLock(tmp_path) as lock:
        yield lock


def test_a_second_lock_is_refused_until_the_first_is_released(tmp_path, held):
    with refused(tmp_path, OTHER_TRACKER, kind=LockedError):
        DirectoryLock(tmp_path)
    held.release()
    with DirectoryLock(tmp_path):
        held.release()  # a second release has no effect
        with refused(tmp_path, OTHER_TRACKER, kind=LockedError):
            DirectoryLock(tmp_path)


def test_another_process_is_named_and_its_lock_is_free_when_it_was_killed(tmp_path):
    with (
        forked.waiting(HOLDER, tmp_path) as process,
        refused(tmp_path, f"process {process.pid} ", kind=LockedError),
    ):
        DirectoryLock(tmp_path)
    DirectoryLock(tmp_path).release()


def test_the_end_of_a_forked_child_does_not_release_the_lock_and_that_of_the_holder_does(tmp_path):
    """Workers of a DataLoader are such children."""
    program = forked.program("forking_holder")
    assert forked.check(program, tmp_path).out == "True\n"
    DirectoryLock(tmp_path).release()


# --- the holder's note


@pytest.mark.parametrize(
    ("text", "holder"),
    [
        (b"process 7 on h\x1b[31m", r"process 7 on h\x1b[31m"),
        (b"", "another process"),
        (b"\xff", "\ufffd"),
    ],
)
@pytest.mark.usefixtures("held")
def test_the_holder_is_named_escaped_or_as_another_process(tmp_path, text, holder):
    (tmp_path / LOCK_NAME).write_bytes(text)
    with refused(tmp_path, f": {holder} ", kind=LockedError):
        DirectoryLock(tmp_path)


# --- errors of the system


def refuse_locks(monkeypatch, code):
    refusal = mock.Mock(side_effect=OSError(code, os.strerror(code)))
    monkeypatch.setattr(fcntl, "flock", refusal)


def test_without_locks_in_the_file_system_a_warning_says_what_is_not_protected(
    tmp_path, caplog, monkeypatch
):
    refuse_locks(monkeypatch, errno.ENOLCK)
    DirectoryLock(tmp_path).release()
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path}: no locks on this file system")


def test_any_other_reason_is_an_error_and_the_lock_is_not_held(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        refuse_locks(patched, errno.EIO)
        with refused(tmp_path, "input/output error", kind=WriteError):
            DirectoryLock(tmp_path)
    DirectoryLock(tmp_path).release()


# --- a full disk


@contextmanager
def limited_file_size(folder):
    """Make a folder in which no file can be written to."""
    folder.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def small_file_system(folder):
    """Make a folder that is a file system of its own, with room for the run."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")

    def fill():
        with suppress(OSError), (folder / "other").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        yield fill
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("disk", [limited_file_size, small_file_system])
def test_a_full_disk_is_freed_by_pruning(run, tmp_path, ema, disk):
    with disk(tmp_path / "disk") as fill:
        folder = tmp_path / "disk" / "run"
        shutil.copytree(run, folder)
        before = len(Run(folder).snapshots)
        fill()
        result = ema("prune", folder, "--keep", "2", "--yes")
        after = len(Run(folder).snapshots)
    assert result.code == 0, result.error
    assert after < before


# --- a file system without permission to write


def test_a_pruning_without_permission_to_delete_is_one_line(run, ema):
    before = contents(run)
    with failing("unlink", errno.EROFS):
        assert ema("prune", run, "--keep", "2", "--dry-run").code == 0
        result = ema("prune", run, "--keep", "2", "--yes")
    assert result.code == 1
    assert "read-only file system" in result.error
    assert contents(run).items() >= before.items()
