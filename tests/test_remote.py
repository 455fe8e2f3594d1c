"""Files by URL: each command does the same as with the files on a disk, and writes nothing there.

`memory://` is a store of `fsspec` in this process.
"""

import io
import shutil
import socket
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import torch
from checking import assert_same_tensors
from factories import random_walk, split_snapshot, write_run
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocError, Run, files, remote, synthesize
from posthoc_cli.errors import FileFormatError, MissingDependencyError, RemoteError

STEPS = (10, 20, 30, 40)
SHAPES = {"large": (400, 350), "small": (7,), "scalar": ()}
"""Tensors of more and of fewer bytes than small reads share."""
STORE = "memory://bucket"
RUN = f"{STORE}/run"
FILE = f"{RUN}/0000000000000040-0.05.safetensors"


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "run").mkdir()
    write_run(folder / "run", random_walk(max(STEPS), SHAPES), STEPS, dtype=torch.float16)
    shutil.copytree(folder / "run", folder / "parted")
    for path in sorted((folder / "parted").iterdir()):
        split_snapshot(path)
    (folder / "pickles").mkdir()
    for step in STEPS:
        weights = {"w": torch.full((3,), float(step))}
        place = folder / f"folders/checkpoint-{step}"
        place.mkdir(parents=True)
        save_file(weights, place / "model.safetensors")
        torch.save({"state_dict": weights, "global_step": step}, folder / f"pickles/step{step}.pt")
    return folder


@pytest.fixture
def memory():
    """An empty store in memory."""
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture
def store(memory, _made):
    """A store with a run, the same in parts, and checkpoints of two layouts."""
    for path in _made.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/{path.relative_to(_made)}", path.read_bytes())
    return memory


@pytest.mark.parametrize("name", ["run", "parted"])
@pytest.mark.usefixtures("store")
def test_averages_of_a_run_in_a_store_equal_averages_of_its_copy_on_a_disk(_made, name):
    on_disk = Run(_made / name)
    in_store = Run(f"{STORE}/{name}")
    expected = on_disk.average(0.15)
    average = in_store.average(0.15)
    assert average.predicted_error == expected.predicted_error
    assert_same_tensors(average, expected)
    other = {"path": "", "bytes": 0}
    assert in_store.info() | other == on_disk.info() | other


@pytest.mark.parametrize("place", ["folders", "folders/checkpoint-*", "pickles/step*.pt"])
@pytest.mark.usefixtures("store")
def test_checkpoints_in_a_store_are_averaged(place):
    average = Run(f"{STORE}/{place}").average("last:3")
    assert average["w"].tolist() == [30.0, 30.0, 30.0]


@pytest.mark.usefixtures("store")
def test_each_command_takes_a_url(ema, tmp_path):
    synthesis = ["synthesize", RUN, "--sigma-rel", "0.1", "--out", tmp_path / "out.safetensors"]
    assert ema("info", RUN, "--json").json["path"] == RUN
    assert "would read " in ema(*synthesis, "--dry-run").out
    assert ema(*synthesis).code == 0
    assert "all intact" in ema("verify", f"{STORE}/parted").out
    assert ema("export", FILE, "--out", tmp_path / "model.pt").code == 0
    assert ema("error-plot", RUN, "--out", tmp_path / "error.png").code == 0


class _Handler(SimpleHTTPRequestHandler):
    """Serves ranges, which `SimpleHTTPRequestHandler` does not."""

    def send_head(self):
        wanted = self.headers.get("Range")
        body = super().send_head()
        if wanted is None or body is None or self.command == "HEAD":
            return body
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        with body:
            data = body.read()[int(first) : int(last) + 1]
        self.server.ranges.append(len(data))
        return io.BytesIO(data)

    def send_header(self, name, value):
        if name == "Content-Length" and self.command == "GET":
            self.close_connection = True  # the end of the connection ends the answer
            return
        super().send_header(name, value)

    def log_message(self, *_):
        """Log nothing."""


@pytest.fixture
def server(_made):
    handler = partial(_Handler, directory=_made)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.ranges = []
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_snapshot_of_a_server_is_read_by_ranges(server, _made, tmp_path, ema):
    pytest.importorskip("aiohttp")
    path = next((_made / "run").glob("*40-0.05.safetensors"))
    url = f"http://127.0.0.1:{server.server_port}/run/{path.name}"
    out = tmp_path / "copy.safetensors"
    done = ema("export", url, "--out", out)
    assert done.code == 0, done.err
    assert_same_tensors(load_file(out), load_file(path))
    assert len(server.ranges) > 1
    assert max(server.ranges) < path.stat().st_size
    absent = ema("info", f"{url}.none")
    assert absent.code == 2
    assert "no such file" in absent.error


def test_without_a_server_the_error_is_one_line(ema):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    url = f"http://127.0.0.1:{port}/m.safetensors"
    assert url in ema("info", url).error


# --- nothing is written to a store


def test_a_run_in_a_store_is_not_pruned_there(store, ema):
    before = dict(store.store)
    assert ema("prune", RUN, "--keep", "2", "--dry-run").code == 0
    assert f"{RUN}: " in ema("prune", RUN, "--keep", "2", "--yes").error
    assert store.store == before


@pytest.mark.parametrize(
    "command",
    [
        ["synthesize", RUN, "--sigma-rel", "0.1", "--out", "s3://bucket/a.safetensors"],
        ["export", FILE, "--out", "hf://org/model/a.pt"],
        ["import", RUN, "--out", "s3://bucket/new"],
    ],
)
@pytest.mark.usefixtures("store")
def test_an_output_in_a_store_is_refused(ema, command):
    assert f"out {command[-1]}: " in ema(*command).error


def test_an_import_on_this_machine_refers_to_files_in_a_store(store, tmp_path, ema):
    run = tmp_path / "run"
    command = ("import", f"{STORE}/folders", "--out", run)
    assert ema(*command).code == 0
    assert Run(run).average("last:2")["w"].tolist() == [35.0, 35.0, 35.0]
    assert "is this import already" in ema(*command).out
    store.pipe_file("/bucket/folders/checkpoint-20/model.safetensors", b"replaced")
    with pytest.raises(FileFormatError, match="replaced"):
        Run(run).average("last:2")


# --- failures


REPLACED = f"{STORE}/folders/checkpoint-40/model.safetensors"


def replace_checkpoint(store):
    """Put another file of the same size in the place of a checkpoint, which has no checksums."""
    store.pipe_file(REPLACED, store.open(REPLACED).read()[:-1] + b"\1")


def test_a_checkpoint_that_is_replaced_after_its_header_was_read_is_an_error(store):
    plan = Run(f"{STORE}/folders").plan("last:2")
    replace_checkpoint(store)
    with pytest.raises(FileFormatError, match="replaced"):
        list(synthesize(plan))


def test_a_checkpoint_that_is_replaced_while_its_values_are_read_is_an_error(store, monkeypatch):
    plan = Run(f"{STORE}/folders").plan("last:2")
    cat_file = type(store).cat_file

    def replace_after_reading(self, name, **options):
        data = cat_file(self, name, **options)
        if name == REPLACED:
            replace_checkpoint(store)
        return data

    monkeypatch.setattr(type(store), "cat_file", replace_after_reading)
    with pytest.raises(FileFormatError, match="changed"):
        list(synthesize(plan))


@pytest.mark.usefixtures("store")
def test_an_answer_that_is_too_short_is_an_error(store, monkeypatch):
    cat_file = type(store).cat_file
    monkeypatch.setattr(type(store), "cat_file", lambda *a, **k: cat_file(*a, **k)[:-1])
    with pytest.raises(RemoteError, match=r"[\d,]+ bytes of [\d,]+"):
        Run(RUN).average(0.1)


@pytest.mark.parametrize("failure", [OSError("slow down\nlater"), PermissionError("denied")])
@pytest.mark.usefixtures("store")
def test_a_failed_request_is_one_line_and_leaves_nothing(
    store, monkeypatch, ema, tmp_path, failure
):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(type(store), "cat_file", fail)
    error = ema("synthesize", RUN, "--sigma-rel", "0.1", "--out", tmp_path / "a.safetensors").error
    assert RUN in error
    assert str(failure).splitlines()[0] in error
    assert not list(tmp_path.iterdir())


def test_a_store_whose_library_is_missing_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingDependencyError, match=r"^gs://bucket/run.*gcsfs"):
        Run("gs://bucket/run").info()


# --- paths


def test_ranges_have_their_length_up_to_the_end_of_the_file(memory):
    memory.pipe_file("/bucket/a b%20+ü", b"0123456789" * 100_000)
    file = remote.RemoteBytes(remote.remote_path(f"{STORE}/a b%20+ü"))
    assert file.size == 1_000_000
    for begin, count in ((2, 5), (262_140, 8), (400_000, 300_000), (999_995, 100), (1_000_000, 1)):
        view = memoryview(bytearray(count))
        done = 0
        while more := file.read(view[done:], begin + done):
            done += more
        end = min(begin + count, file.size)
        assert bytes(view[:done]) == (b"0123456789" * 100_000)[begin:end]


def test_a_path_that_was_listed_and_is_gone_is_absent(store):
    listed = next(remote.remote_path(RUN).iterdir())
    store.rm_file(f"/bucket/run/{listed.name}")
    assert files.is_absent(listed)


def test_functions_that_do_not_know_about_urls_fail_and_touch_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = remote.remote_path(RUN)
    for call in (path.mkdir, path.touch, path.read_bytes):
        with pytest.raises(PostHocError, match=f"{RUN}: "):
            call()
    assert not list(tmp_path.iterdir())
