"""A file appears complete or not at all, whichever operation the system refuses."""

import errno
import os
import pickle
import stat
from pathlib import Path
from unittest import mock

import pytest
import torch
from checking import refused
from snapshots.recorded import call_number, failing

from posthoc_cli import PostHocEMA, Run, files
from posthoc_cli.errors import OutputExistsError, WriteError

NEW = b"new content"
OLD = b"old content"


def first(operation, error=errno.EIO):
    """Let the first call of an operation fail within the block."""
    return failing(operation, error, call_number(0))


def free_descriptor():
    with open(os.devnull) as file:  # noqa: PTH123
        return file.fileno()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_published_file_holds_what_was_written_at_any_offset_and_no_temporary_is_left(tmp_path):
    with files.PendingFile(tmp_path / "a") as pending:
        pending.write_at(b"world", 6)
        pending.write_at(memoryview(b"hello "), 0)
        assert names(tmp_path) == [pending.temporary.name]
        assert pending.temporary.name.startswith(".ema-")
        pending.publish()
    assert (tmp_path / "a").read_bytes() == b"hello world"
    assert names(tmp_path) == ["a"]


def replace(path):
    files.write_atomically(path, NEW, overwrite=True)


def write_new(path):
    files.write_atomically(path, NEW)


def write_folder(path):
    with files.PendingFolder(path) as pending:
        (pending.temporary / "b").write_bytes(NEW)
        pending.publish()


@pytest.mark.parametrize(
    ("write", "steps"),
    [
        (write_new, "open_new write fsync close link unlink fsync_directory"),
        (replace, "open_new write fsync close rename fsync_directory"),
        (write_folder, "make_directory open fsync close fsync_directory rename fsync_directory"),
    ],
)
def test_content_is_synced_before_the_name_and_the_directory_after_it(
    tmp_path, monkeypatch, write, steps
):
    system = mock.Mock(wraps=files.FileSystem())
    monkeypatch.setattr(files, "system", system)
    write(tmp_path / "a")
    assert [name for name, _, _ in system.method_calls] == steps.split()


def test_the_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_new(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [errno.ENOSPC, KeyboardInterrupt()])
@pytest.mark.parametrize(
    "operation", ["open_new", "write", "fsync", "link", "unlink", "fsync_directory"]
)
def test_a_refused_step_or_ctrl_c_leaves_nothing(tmp_path, operation, error):
    before = free_descriptor()
    with first(operation, error), pytest.raises((WriteError, KeyboardInterrupt)):
        write_new(tmp_path / "a")
    assert names(tmp_path) == []
    write_new(tmp_path / "a")  # the next attempt succeeds
    assert free_descriptor() == before  # none stays open


def test_the_end_of_a_forked_child_removes_no_file_of_its_parent(tmp_path, monkeypatch):
    with files.PendingFile(tmp_path / "a") as pending:
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: 1)
            files.remove_unfinished()
        pending.publish()


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_a_refused_step_of_a_replacement_keeps_the_old_file(tmp_path, operation):
    (tmp_path / "a").write_bytes(OLD)
    with first(operation), refused(tmp_path / "a", kind=WriteError) as raised:
        replace(tmp_path / "a")
    assert pickle.loads(pickle.dumps(raised.value)).errno == errno.EIO
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == OLD


def test_a_replacement_whose_name_may_not_last_is_complete_and_an_error(tmp_path):
    (tmp_path / "a").write_bytes(OLD)
    with first("fsync_directory"), pytest.raises(WriteError):
        replace(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == NEW


@pytest.mark.parametrize(("make", "overwrite"), [(Path.touch, False), (os.mkfifo, True)])
def test_a_taken_name_is_refused_at_the_start(tmp_path, make, overwrite):
    make(tmp_path / "a")
    with refused(tmp_path / "a", kind=OutputExistsError):
        files.PendingFile(tmp_path / "a", overwrite)
    assert names(tmp_path) == ["a"]


def publish_beside_another(path):
    """Publish a file after another process has made one of its name."""
    with files.PendingFile(path) as pending:
        path.write_bytes(OLD)
        with refused(path, kind=OutputExistsError):
            pending.publish()
    assert names(path.parent) == ["a"]
    assert path.read_bytes() == OLD


def test_a_file_that_appears_before_publish_is_not_replaced(tmp_path):
    publish_beside_another(tmp_path / "a")


def test_without_hard_links_a_file_is_renamed_and_none_replaced(tmp_path):
    with failing("link", errno.EPERM):
        write_new(tmp_path / "b")
        (tmp_path / "b").unlink()
        publish_beside_another(tmp_path / "a")


@pytest.mark.parametrize("name", ["x" * 300, "missing/a", "file/a"])
def test_a_name_that_cannot_be_written_is_refused_before_any_work(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        files.PendingFile(tmp_path / name)
    assert names(tmp_path) == ["file"]


def test_a_directory_is_made_with_its_parents_and_each_entry_is_synced(tmp_path):
    with mock.patch.object(files.system, "fsync_directory") as sync:
        files.make_directory(tmp_path / "a" / "b")
        files.make_directory(tmp_path / "a" / "b")  # an existing directory is no error
    assert sync.call_args_list == [mock.call(tmp_path), mock.call(tmp_path / "a")]
    assert (tmp_path / "a" / "b").is_dir()
    with first("fsync_directory"), pytest.raises(WriteError):
        files.make_directory(tmp_path / "c" / "d")
    assert names(tmp_path) == ["a"]


def test_a_file_system_that_cannot_sync_directories_is_accepted(tmp_path):
    with mock.patch("os.fsync") as sync:
        sync.side_effect = OSError(errno.EINVAL, "Invalid argument")
        files.system.fsync_directory(tmp_path)
        sync.side_effect = OSError(errno.EIO, "Input/output error")
        with pytest.raises(OSError, match="Input/output"):
            files.system.fsync_directory(tmp_path)


@pytest.mark.parametrize("operation", ["close", "unlink"])
def test_a_discard_that_a_signal_interrupts_is_completed_by_an_outer_handler(tmp_path, operation):
    pending = files.PendingFile(tmp_path / "x")
    with failing(operation, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        pending.discard()
    assert len(names(tmp_path)) == 1
    pending.discard()
    assert names(tmp_path) == []


def test_a_discard_that_is_refused_is_completed_at_the_end_of_the_process(tmp_path):
    pending = files.PendingFile(tmp_path / "x")
    with failing("unlink", errno.EACCES):
        pending.discard()
    assert len(names(tmp_path)) == 1
    files.remove_unfinished()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("write", "place", "operation", "error"),
    [
        (write_new, files.system, "link", errno.EEXIST),
        (write_new, files.system, "link", errno.EIO),
        (write_new, files.system, "unlink", errno.ENOENT),
        (replace, os, "replace", errno.ENOENT),
        (write_folder, os, "replace", errno.EIO),
    ],
)
def test_an_operation_that_succeeded_without_an_answer_is_no_error(
    tmp_path, write, place, operation, error
):
    """As by a network file system that repeats a request."""
    do = getattr(place, operation)

    def do_and_lose_the_answer(*paths):
        do(*paths)
        raise OSError(error, os.strerror(error))

    with mock.patch.object(place, operation, do_and_lose_the_answer):
        write(tmp_path / "a")
    assert names(tmp_path) == ["a"]


# --- URLs


def test_a_tracker_writes_to_no_url(tmp_path, monkeypatch):
    """Taken for a path it would be a folder `s3:` in the working directory."""
    monkeypatch.chdir(tmp_path)
    with refused("checkpoint_dir s3://bucket/run"):
        PostHocEMA.from_model(torch.nn.Linear(2, 2), Path("s3://bucket/run"))
    with refused("checkpoint_dir s3://bucket/run"):
        PostHocEMA.from_path("s3://bucket/run")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    ("url", "subject"),
    [
        ("file:///tmp/run", "file://"),
        ("ftp://user:secret@a/b?secret", "ftp://"),
        ("s3://key:secret@bucket/run", "s3://"),
        ("https://host/a?sig=secret", "https://"),
    ],
)
def test_a_url_that_names_no_place_in_a_store_is_an_error(url, subject, kind):
    with refused(subject) as caught:
        Run(kind(url))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["s3:", "1:/x", "./s3:/x", "C:/x", "~/s3:/"])
def test_a_path_with_a_colon_is_no_url(name):
    assert files.check_path("x", name) == Path(name).expanduser()
