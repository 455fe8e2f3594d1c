"""A file appears complete or not at all, whichever operation the system refuses."""

import errno
import functools
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from snapshots.recorded import call_number, failing

from posthoc_cli import PostHocEMA, Run, files
from posthoc_cli.errors import InvalidValueError, OutputExistsError, WriteError
from posthoc_cli.integrations import make_tracker

NEW = b"new content"
OLD = b"old content"
STEPS_OF_A_NEW_FILE = ("open_new", "write", "fsync", "link", "unlink", "fsync_directory")


def first(operation: str, error: int | BaseException = errno.EIO) -> AbstractContextManager[None]:
    """Let the first call of an operation fail within the block."""
    return failing(operation, error, call_number(0))


def free_descriptor() -> int:
    with open(os.devnull) as file:  # noqa: PTH123
        return file.fileno()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_published_file_holds_what_was_written_at_any_offset_and_no_temporary_is_left(
    tmp_path: Path,
) -> None:
    with files.PendingFile(tmp_path / "a") as pending:
        pending.write_at(b"world", 6)
        pending.write_at(memoryview(b"hello "), 0)
        assert names(tmp_path) == [pending.temporary.name]  # the final name does not exist yet
        assert pending.temporary.name.startswith(".ema-")
        pending.publish()
    assert (tmp_path / "a").read_bytes() == b"hello world"
    assert names(tmp_path) == ["a"]


def write_folder(path: Path) -> None:
    with files.PendingFolder(path) as pending:
        (pending.temporary / "b").write_bytes(NEW)
        pending.publish()


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (
            lambda path: files.write_atomically(path, NEW),
            ["fsync", "link", "unlink", "fsync_directory"],
        ),
        (
            lambda path: files.write_atomically(path, NEW, True),
            ["fsync", "rename", "fsync_directory"],
        ),
        (write_folder, ["fsync", "fsync_directory", "rename", "fsync_directory"]),
    ],
)
def test_content_is_synced_before_the_name_and_the_directory_after_it(
    tmp_path: Path,
    write: Callable[[Path], None],
    expected: list[str],
) -> None:
    steps: list[str] = []
    with ExitStack() as stack:
        for operation in ("fsync", "link", "rename", "unlink", "fsync_directory"):
            # fails never
            stack.enter_context(
                failing(operation, 0, lambda *_, name=operation: steps.append(name))
            )
        write(tmp_path / "a")
    assert steps == expected


@pytest.mark.parametrize(
    ("mask", "mode"),
    [
        (0o022, 0o644),
        (0o077, 0o600),
    ],
)
def test_the_mode_follows_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        files.write_atomically(tmp_path / "a", NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


@pytest.mark.parametrize("code", [errno.ENOSPC, None])
@pytest.mark.parametrize("operation", STEPS_OF_A_NEW_FILE)
def test_a_refused_step_or_ctrl_c_leaves_nothing_and_names_the_file_and_the_reason(
    tmp_path: Path,
    operation: str,
    code: int | None,
) -> None:
    kind = KeyboardInterrupt if code is None else WriteError
    before = free_descriptor()
    with first(operation, code or KeyboardInterrupt()), pytest.raises(kind) as caught:
        files.write_atomically(tmp_path / "a", NEW)
    assert names(tmp_path) == []
    if isinstance(caught.value, WriteError):
        assert caught.value.errno == code
        assert str(tmp_path / "a") in str(caught.value)
        assert os.strerror(code or 0).lower() in str(caught.value)
    files.write_atomically(tmp_path / "a", NEW)  # the next attempt succeeds
    assert free_descriptor() == before  # none stays open


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("operation", ["open_new", "write", "fsync", "rename", "fsync_directory"])
def test_a_refused_step_of_a_replacement_keeps_the_old_file(
    tmp_path: Path,
    operation: str,
    existing: bool,
) -> None:
    """After the last step the new file is complete, and the failure is still raised."""
    if existing:
        (tmp_path / "a").write_bytes(OLD)
    with first(operation), pytest.raises(WriteError, match="nothing partial" if existing else None):
        files.write_atomically(tmp_path / "a", NEW, overwrite=True)
    assert names(tmp_path) == ["a"] * existing
    assert not existing or (tmp_path / "a").read_bytes() == (
        NEW if operation == "fsync_directory" else OLD
    )


@pytest.mark.parametrize(
    "make", [Path.touch, Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")]
)
def test_a_taken_name_is_refused_at_the_start(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a")
    with pytest.raises(OutputExistsError, match=r"a: (already exists|is )"):
        # these are never replaced
        files.PendingFile(tmp_path / "a", overwrite=make in (Path.mkdir, os.mkfifo))
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("appears", [False, True])
def test_a_file_that_appears_before_publish_is_not_replaced(
    tmp_path: Path,
    appears: bool,
    links: bool,
) -> None:
    """This also holds on a file system without hard links."""
    with (
        nullcontext() if links else first("link", errno.EPERM),
        files.PendingFile(tmp_path / "a") as pending,
    ):
        pending.write_at(NEW, 0)
        if appears:
            (tmp_path / "a").write_bytes(OLD)
        with pytest.raises(OutputExistsError) if appears else nullcontext():
            pending.publish()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == (OLD if appears else NEW)


@pytest.mark.parametrize("name", ["x" * 300, "missing/a", "file/a"])
def test_a_name_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path,
    name: str,
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        files.PendingFile(tmp_path / name)
    assert names(tmp_path) == ["file"]


def test_a_directory_is_made_with_its_parents_and_each_entry_is_synced(tmp_path: Path) -> None:
    synced: list[Path] = []
    with failing("fsync_directory", 0, synced.append):  # fails never
        files.make_directory(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
        files.make_directory(tmp_path / "a" / "b")  # an existing directory is no error
    assert synced == [tmp_path, tmp_path / "a"]
    with first("fsync_directory"), pytest.raises(WriteError, match="input/output error"):
        files.make_directory(tmp_path / "c" / "d")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_directories_is_accepted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    def cannot(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", cannot)
    with pytest.raises(OSError, match="nput/output") if code == errno.EIO else nullcontext():
        files.system.fsync_directory(tmp_path)


@pytest.mark.parametrize("operation", ["close", "unlink"])
def test_a_discard_that_a_signal_interrupts_is_completed_by_an_outer_handler(
    tmp_path: Path,
    operation: str,
) -> None:
    pending = files.PendingFile(tmp_path / "x")
    with failing(operation, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        pending.discard()
    assert len(names(tmp_path)) == 1
    pending.discard()
    assert names(tmp_path) == []


def test_a_discard_that_is_refused_is_completed_at_the_end_of_the_process(tmp_path: Path) -> None:
    pending = files.PendingFile(tmp_path / "x")
    with failing("unlink", errno.EACCES):
        pending.discard()
    assert len(names(tmp_path)) == 1
    files.remove_unfinished()
    assert names(tmp_path) == []


@pytest.mark.parametrize("url", ["hf://user/model", Path("s3://bucket/run")])
def test_a_tracker_writes_to_no_url(
    url: str | Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Taken for a path it would be a folder `hf:` in the working directory."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    for call in (
        lambda: PostHocEMA.from_model(model, url),
        lambda: PostHocEMA.from_path(url),
        lambda: make_tracker(model, url, {}),  # which all integrations use
    ):
        with pytest.raises(
            InvalidValueError, match=r"^checkpoint_dir [hs].*: must be a folder of this machine"
        ):
            call()
    assert names(tmp_path) == []


UNKNOWN = "is a URL of an unknown kind"
SECRET = "holds credentials"
URLS = {
    "file:///tmp/run": ("file://tmp/run", UNKNOWN), "az+v2.1://a": (r"az\+v2.1://a", UNKNOWN),
    "ftp://user:secret@a/b?secret": ("ftp://a/b", UNKNOWN),
    "s3://key@": ("s3:", "must name a " "bucket"),
    "s3://key:secret@bucket/run": ("s3://bucket/run", SECRET),
}  # fmt: skip


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_that_names_no_place_in_a_store_is_an_error(
    url: str,
    kind: Callable[[str], str | Path],
) -> None:
    shown, reason = URLS[url]
    for call in (files.expanded, Run, functools.partial(files.given_path, "x")):
        with pytest.raises(InvalidValueError, match=f"^{shown}: {reason}") as caught:
            call(kind(url))
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["s3:", "1:/x", "./s3:/x", "C:/x", "~/s3:/"])
def test_a_path_with_a_colon_is_no_url(name: str) -> None:
    assert files.given_path("x", name) == Path(name).expanduser()


@pytest.mark.parametrize("error", [errno.EEXIST, errno.EIO, errno.ESTALE])
def test_a_link_that_was_made_though_its_answer_was_lost_is_no_other_s_file(
    tmp_path: Path,
    error: int,
) -> None:
    """As by a network file system that repeats a request."""
    path = tmp_path / "table.csv"
    own = files.system.link

    def link(source: Path, target: Path) -> None:
        own(source, target)
        raise OSError(error, os.strerror(error))

    with mock.patch.object(files.system, "link", link):
        files.write_atomically(path, b"ours")
        assert path.read_bytes() == b"ours"
        assert [*tmp_path.iterdir()] == [path]
        with pytest.raises(OutputExistsError, match="already exists"):
            files.write_atomically(path, b"others")
    path.unlink()

    def link_late(source: Path, target: Path) -> None:
        target.write_bytes(b"of another")
        raise OSError(errno.EEXIST, "File exists")

    with (
        mock.patch.object(files.system, "link", link_late),
        pytest.raises(OutputExistsError, match="already exists"),
    ):
        files.write_atomically(path, b"ours")
    assert path.read_bytes() == b"of another"
