"""One writer a directory, by name, and free again when it has died."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from ema_command import Ema
from factories import refuse_for_space, tiny_model

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import DirectoryError, LockedError, WriteError
from posthoc_cli.snapshots import lock
from posthoc_cli.snapshots.lock import DirectoryLock

HOLDER = """
import sys
from pathlib import Path
from posthoc_cli.snapshots.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print("held", flush=True)
"""


def test_a_second_lock_in_the_same_process_is_refused_and_names_the_holder(tmp_path: Path) -> None:
    first = DirectoryLock(tmp_path)
    with pytest.raises(
        LockedError, match=rf"another tracker of this process \({os.getpid()}, lock taken 0 s ago\)"
    ) as caught:
        DirectoryLock(tmp_path)
    assert str(tmp_path) in str(caught.value)
    first.release()


def test_a_released_lock_is_free_and_releasing_twice_does_no_harm(tmp_path: Path) -> None:
    first = DirectoryLock(tmp_path)
    first.release()
    second = DirectoryLock(tmp_path)
    first.release()
    with pytest.raises(LockedError, match=str(os.getpid())):
        DirectoryLock(tmp_path)
    second.release()


def test_directories_are_locked_each_on_its_own(tmp_path: Path) -> None:
    locks = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        locks.append(DirectoryLock(tmp_path / name))
    for held in locks:
        held.release()


def test_another_process_is_named_and_its_lock_is_taken_over_with_a_warning_when_it_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with forked.waiting(HOLDER, tmp_path) as process:
        with pytest.raises(LockedError, match=rf"process {process.pid} on .* \(lock taken \d s ago\) is writing here"):
            DirectoryLock(tmp_path)
        process.kill()
        process.wait()
        assert not caplog.records
        mine = DirectoryLock(tmp_path)
    (record,) = caplog.records
    assert f"process {process.pid} on " in record.getMessage()
    assert "died without releasing it; taken over" in record.getMessage()
    with pytest.raises(LockedError, match="another tracker of this process"):
        DirectoryLock(tmp_path)
    mine.release()


def test_a_process_that_ends_without_a_release_has_not_died(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = "import sys; from pathlib import Path; from posthoc_cli.snapshots.lock import DirectoryLock\n"
    script += "held = DirectoryLock(Path(sys.argv[1]))\n"
    forked.check(script, tmp_path)
    DirectoryLock(tmp_path).release()
    assert not caplog.records


@pytest.mark.parametrize(
    ("hours", "words"),
    [(-1, "0 s"), (0.02, "72 s"), (0.034, "2 minutes"), (1.99, "119 minutes"), (30, "30 hours"), (72, "3 days")],
)
def test_the_age_of_a_lock_is_told_and_a_strangers_host_is_shown_escaped(
    tmp_path: Path, hours: float, words: str
) -> None:
    held = DirectoryLock(tmp_path)
    note = {"host": "h\x1b[31m", "process": 7, "since": time.time() - 3600 * hours}
    (tmp_path / lock.HOLDER_NAME).write_text(json.dumps(note))
    with pytest.raises(LockedError, match=rf"process 7 on h\\x1b\[31m \(lock taken {words} ago"):
        DirectoryLock(tmp_path)
    held.release()


@pytest.mark.parametrize("since", [float("nan"), float("inf"), -float("inf")])
def test_a_time_that_is_no_number_is_not_told(tmp_path: Path, since: float) -> None:
    held = DirectoryLock(tmp_path)
    (tmp_path / lock.HOLDER_NAME).write_text(json.dumps({"host": "h", "process": 7, "since": since}))
    with pytest.raises(LockedError, match=r"process 7 on h \(lock taken at an unknown time\) is writing"):
        DirectoryLock(tmp_path)
    held.release()


# --- notes without a lock


def leave_note(directory: Path, **changes: object) -> None:
    """As a holder leaves it that was killed, or whose machine lost power."""
    note = {"host": socket.gethostname(), "process": 2**22 + 1, "since": time.time() - 3600, **changes}
    (directory / lock.LOCK_NAME).touch()
    (directory / lock.HOLDER_NAME).write_text(json.dumps(note))


def taken_over(directory: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The warning, after training has gone on in the directory."""
    model = tiny_model()
    with PostHocEMA.from_model(model, directory, update_every=1, checkpoint_every=1) as tracker:
        tracker.update_(model)
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert not (directory / lock.HOLDER_NAME).exists()
    return record.getMessage()


def test_a_note_from_before_a_reboot_is_taken_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave_note(tmp_path)
    warning = taken_over(tmp_path, caplog)
    assert f"process 4194305 on {socket.gethostname()} (lock taken 60 minutes ago) died without rel" in warning


def test_a_note_of_another_host_may_be_of_one_that_is_running(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a mount that keeps locks to one host the lock is free, whoever writes elsewhere."""
    leave_note(tmp_path, host="node-7", process=os.getpid())
    warning = taken_over(tmp_path, caplog)
    assert f"process {os.getpid()} on node-7 (lock taken 60 minutes ago) has not released it, and holds no" in warning
    assert warning.endswith("taken over: make sure that it is not running any more")


def test_a_clock_that_is_ahead_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave_note(tmp_path, since=time.time() + 86_400)
    assert "(lock taken 0 s ago) died" in taken_over(tmp_path, caplog)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_in_the_file_system_a_warning_says_what_is_not_protected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    warning = taken_over(tmp_path, caplog)
    assert f"{tmp_path}: no locks on this file system ({os.strerror(code).lower()})" in warning
    assert warning.endswith("make sure that nothing else writes")
    caplog.clear()
    first = DirectoryLock(tmp_path)
    second = DirectoryLock(tmp_path)
    assert "holds no lock that can be seen here" in caplog.records[-1].getMessage()
    second.release()
    first.release()


def test_another_refusal_of_the_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(WriteError, match="cannot be written: input/output error"):
        DirectoryLock(tmp_path)


# --- a medium that is read-only


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes the system refuse every change in a directory, as a medium that was mounted read-only does."""

    def mount(directory: Path) -> None:
        def inside(path: object) -> bool:
            return not isinstance(path, int) and Path(os.fsdecode(path)).is_relative_to(directory)  # type: ignore[arg-type]

        def refused(name: str) -> None:
            real = getattr(os, name)

            def call(path: object, *arguments: object, **options: object) -> object:
                opened = name != "open" or bool(int(arguments[0]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))  # type: ignore[call-overload]
                if opened and (inside(path) or (name in ("link", "rename", "replace") and inside(arguments[0]))):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
                return real(path, *arguments, **options)

            monkeypatch.setattr(os, name, call)

        for name in ("open", "mkdir", "unlink", "rmdir", "rename", "replace", "link"):
            refused(name)

    return mount


def test_readers_need_no_lock_and_writers_are_told(tmp_path: Path, ema: Ema, read_only: Callable[[Path], None]) -> None:
    model, run, out = tiny_model(), tmp_path / "run", tmp_path / "out"
    out.mkdir()
    with PostHocEMA.from_model(model, run, update_every=1, checkpoint_every=1) as tracker:
        for _ in range(5):
            tracker.update_(model)
    before = {path: path.read_bytes() for path in run.iterdir()}
    read_only(run)
    for words in (
        ["info"],
        ["verify"],
        ["error-plot", "--out", str(out / "e.png")],
        ["synthesize", "--sigma-rel", "0.15", "--out", str(out / "m.safetensors")],
        ["prune", "--keep", "2", "--dry-run"],
    ):
        result = ema(words[0], str(run), *words[1:])
        assert result.code == 0, result
    tracker = PostHocEMA.from_path(run, model)
    assert tracker.state_dict(sigma_rel=0.15)
    with pytest.raises(DirectoryError, match=r"run: cannot be written: read-only file system; nothing partial is left"):
        tracker.update_(model)
    refused = ema("prune", str(run), "--keep", "2", "--yes")
    assert refused.code == 1
    assert refused.error == f"{run}: cannot be written: read-only file system; nothing partial is left"
    assert {path: path.read_bytes() for path in run.iterdir()} == before


# --- the note


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"process":"x","host":1}', "\udcff"])
def test_a_holder_that_cannot_be_read_is_another_process(tmp_path: Path, text: str) -> None:
    held = DirectoryLock(tmp_path)
    (tmp_path / lock.HOLDER_NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(LockedError, match="another process is writing here"):
        DirectoryLock(tmp_path)
    held.release()


def test_a_forked_child_that_ends_does_not_free_the_lock_of_its_parent(tmp_path: Path) -> None:
    """As the workers of a DataLoader do."""
    held = DirectoryLock(tmp_path)
    script = (
        "import os, sys; from pathlib import Path; from posthoc_cli.snapshots.lock import DirectoryLock\n"
        "held = DirectoryLock(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0: held.release(); sys.exit()\n"
        "os.waitpid(child, 0)\n"
        "try: DirectoryLock(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    held.release()
    assert forked.check(script, tmp_path).out == "LockedError\n"


def test_a_lock_that_cannot_be_taken_is_told_and_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file: cannot be written"):
        DirectoryLock(tmp_path / "file")

    with monkeypatch.context() as patched:
        patched.setattr(files.system, "write", refuse_for_space)
        with pytest.raises(WriteError, match="no space left") as caught:
            DirectoryLock(tmp_path)
    DirectoryLock(tmp_path).release()  # although `caught` keeps the failed one alive
    assert caught.value.errno == errno.ENOSPC


def test_a_second_tracker_is_refused_at_its_first_update_and_goes_on_after_the_first_was_closed(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    settings = {"update_every": 1, "final_snapshot": False}
    first, second = (PostHocEMA.from_model(model, tmp_path / "ema", **settings) for _ in range(2))
    first.update_(model)
    with pytest.raises(LockedError, match="another tracker of this process"):
        second.update_(model)
    first.close()
    second.update_(model)
    second.close()
