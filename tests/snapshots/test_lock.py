"""One writer per directory, which is named, and whose death releases the lock."""

import errno
import fcntl
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from ema_command import Ema
from factories import contents, tiny_model
from snapshots.recorded import failing
from tracker.runs import track, update

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import LockedError, WriteError
from posthoc_cli.snapshots.directory import LOCK_NAME, DirectoryLock

HOLDER = """
import os, sys
from pathlib import Path
from posthoc_cli.errors import LockedError
from posthoc_cli.snapshots.directory import DirectoryLock
held = DirectoryLock(Path(sys.argv[1]))
print("held", flush=True)
"""
OTHER_TRACKER = rf"another tracker of this process {os.getpid()} on "


@pytest.fixture
def held(tmp_path: Path) -> Iterator[DirectoryLock]:
    with DirectoryLock(tmp_path) as lock:
        yield lock


def refused(directory: Path, message: str) -> None:
    with pytest.raises(LockedError, match=message) as caught:
        DirectoryLock(directory)
    assert str(directory) in str(caught.value)


def test_a_second_lock_is_refused_until_the_first_is_released(
    tmp_path: Path,
    held: DirectoryLock,
) -> None:
    refused(tmp_path, OTHER_TRACKER)
    (tmp_path / "another").mkdir()
    DirectoryLock(tmp_path / "another").release()
    held.release()
    second = DirectoryLock(tmp_path)
    held.release()  # a second release has no effect
    refused(tmp_path, OTHER_TRACKER)
    second.release()


def test_another_process_is_named_and_its_lock_is_free_when_it_was_killed(tmp_path: Path) -> None:
    with forked.waiting(HOLDER, tmp_path) as process:
        refused(tmp_path, rf"process {process.pid} on .* is writing here")
        process.kill()
        process.wait()
        mine = DirectoryLock(tmp_path)
    refused(tmp_path, OTHER_TRACKER)
    mine.release()


def test_the_end_of_a_forked_child_does_not_release_the_lock_and_that_of_the_holder_does(
    tmp_path: Path,
) -> None:
    """Workers of a DataLoader are such children."""
    child = """
child = os.fork()
if child == 0:
    held.release()
    sys.exit()
os.waitpid(child, 0)
try:
    DirectoryLock(Path(sys.argv[1]))
except LockedError as error:
    print(str(os.getpid()) in (Path(sys.argv[1]) / ".ema.lock").read_text() or error)
read, write = os.pipe()
if os.fork() == 0:
    os.close(write)
    os.read(read, 1)  # has the lock's file open until its parent ends
    os._exit(0)
held.release()
DirectoryLock(Path(sys.argv[1])).release()
"""
    assert forked.check(HOLDER + child, tmp_path).out == "held\nTrue\n"
    DirectoryLock(tmp_path).release()


# --- the holder's note


@pytest.mark.parametrize(
    ("text", "holder"),
    [
        (b"process 7 on h\x1b[31m", r"process 7 on h\\x1b\[31m"),
        (b"", "another process"),
        (b"\xff", "\ufffd"),
    ],
)
@pytest.mark.usefixtures("held")
def test_the_holder_is_named_escaped_or_as_another_process(
    tmp_path: Path,
    text: bytes,
    holder: str,
) -> None:
    (tmp_path / LOCK_NAME).write_bytes(text)
    refused(tmp_path, f"^{re.escape(str(tmp_path))}: {holder} is writing here")


@pytest.mark.usefixtures("held")
def test_a_holder_that_has_not_yet_written_its_name_is_awaited(tmp_path: Path) -> None:
    note = tmp_path / LOCK_NAME
    name = note.read_bytes()
    note.write_bytes(b"")
    later = threading.Timer(0.1, lambda: note.write_bytes(name))
    later.start()
    refused(tmp_path, OTHER_TRACKER)
    later.join()


def test_a_holder_that_releases_the_lock_is_awaited(tmp_path: Path, held: DirectoryLock) -> None:
    (tmp_path / LOCK_NAME).write_bytes(b"")
    later = threading.Timer(0.1, held.release)
    later.start()
    DirectoryLock(tmp_path).release()
    later.join()


# --- errors of the system


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EIO])
def test_without_locks_in_the_file_system_a_warning_says_what_is_not_protected(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    """Any other reason is an error, and the lock is not held."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        if code == errno.EIO:
            with pytest.raises(WriteError, match="cannot be written: input/output error"):
                DirectoryLock(tmp_path)
        else:
            model = tiny_model()
            with track(model, tmp_path, checkpoint_every=1) as tracker:
                tracker.update_(model)
            (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
            reason = f"no locks on this file system ({os.strerror(code).lower()})"
            advice = "make sure that nothing else writes"
            assert record.getMessage() == f"{tmp_path}: {reason}: {advice}"
    DirectoryLock(tmp_path).release()


# --- a file system without permission to write


def test_readers_need_no_lock_and_writers_get_an_error(tmp_path: Path, ema: Ema) -> None:
    model = tiny_model()
    run = tmp_path / "run"
    out = tmp_path / "out.safetensors"
    with track(model, run, checkpoint_every=1) as tracker:
        update(tracker, model, 5)
    before = contents(run)
    with (
        failing("open_new", errno.EROFS, lambda path: path.is_relative_to(run)),
        failing("unlink", errno.EROFS),
    ):
        assert ema("verify", run).code == 0
        assert ema("prune", run, "--keep", "2", "--dry-run").code == 0
        assert PostHocEMA.from_path(run, model).state_dict(sigma_rel=0.15)
        result = ema("prune", run, "--keep", "2", "--yes")
        assert result.code == 1
        assert "cannot be removed: read-only file system" in result.error
    assert ema("synthesize", run, "--sigma-rel", "0.15", "--out", out).code == 0
    assert contents(run) == before
