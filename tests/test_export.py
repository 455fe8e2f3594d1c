"""Exports in layouts that other libraries read; each is complete or absent."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
from checking import assert_same_tensors, load_output, refused
from checkpoint_layouts import filled
from factories import (
    INDEX,
    RUN_ID,
    contents,
    read_output,
    split_snapshot,
    write_output,
    write_snapshot,
)
from safetensors.torch import load_file, save_file
from snapshots.recorded import call_number, failing

from posthoc_cli import Run, export_file, import_checkpoints
from posthoc_cli.errors import (
    FileFormatError,
    InexactError,
    NonFiniteError,
    OutputExistsError,
    UnsuitableError,
    WriteError,
)
from posthoc_cli.request import FileRequest

Tensors = dict[str, torch.Tensor]

WEIGHTS = {
    "a": torch.arange(10) / 3,
    "b": torch.arange(20).reshape(4, 5) / 7,
    "var": torch.tensor([1 / 3, 2 / 3]),  # a buffer, which is never cast
    "count": torch.tensor(7),
}
COPIES = ("var", "count")


@pytest.fixture
def source(tmp_path):
    return write_output(tmp_path / "in.safetensors", WEIGHTS, COPIES)


# --- layouts
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "dtype", "own"),
    [
        ("out.safetensors", None, None, torch.float32),
        ("out", "100", "bf16", torch.bfloat16),
        ("out.pt", None, torch.float64, torch.float64),
    ],
)
def test_every_layout_holds_averages_in_the_dtype_and_copies_in_their_own(
    tmp_path,
    name,
    size,
    dtype,
    own,
    source,
):
    out = tmp_path / name
    made = export_file(source, out, dtype=dtype, max_shard_size=size)
    expected = WEIGHTS | {
        "a": WEIGHTS["a"].to(own),
        "b": WEIGHTS["b"].to(own),
    }
    assert_same_tensors(load_output(out), expected)
    assert made.tensors == 4
    assert made.nbytes == 30 * own.itemsize + 8 + 8


def test_a_folder_of_shards_is_laid_out_as_the_hugging_face_libraries_do(tmp_path, source):
    out = tmp_path / "out"
    export_file(source, out, max_shard_size="100")
    index = json.loads((out / INDEX).read_text())
    shards = {*index["weight_map"].values()}
    assert index["metadata"] == {"total_size": 40 + 80 + 8 + 8}
    assert shards == {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    for shard in shards:
        with safetensors.safe_open(out / shard, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
        held = load_file(out / shard).values()
        assert sum(tensor.nbytes for tensor in held) <= 100
    export_file(source, tmp_path / "one")
    assert contents(tmp_path / "one").keys() == {"model.safetensors"}


def test_a_name_must_not_have_the_ending_of_another_layout_but_a_folder_may(tmp_path):
    with refused("x.onnx"):
        FileRequest().find_layout(Path("x.onnx"))
    assert FileRequest().find_layout(Path("x.ckpt")) == "pt"
    path = tmp_path / "x.bin"
    options = FileRequest(layout="sharded")
    with refused(str(path), "sharded"):
        options.find_layout(path)
    path.mkdir()
    assert options.find_layout(path) == "sharded"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5 tb", 15 * 10**11),
        ("500MiB", 500 << 20),
    ],
)
def test_a_size_is_a_number_with_a_unit(text, size):
    assert FileRequest(max_shard_size=text).shard_bytes == size


@pytest.mark.parametrize("text", ["-1GB", "5 G", "nan", "1e30TB"])
def test_another_size_is_refused(text):
    with refused("max_shard_size"):
        FileRequest(max_shard_size=text)


# --- dtypes
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "message"),
    [
        (1e300, torch.float64, "float32", r"'bad'.*1e\+300"),
        (float("-inf"), torch.bfloat16, None, "in.safetensors: .*'bad'"),
    ],
)
def test_an_average_that_is_not_finite_is_refused_by_name_and_nothing_is_written(
    tmp_path,
    value,
    stored,
    dtype,
    message,
):
    tensors = {
        "w": torch.ones(2),
        "bad": torch.tensor([value], dtype=stored),
    }
    source = write_output(tmp_path / "in.safetensors", tensors)
    with pytest.raises(NonFiniteError, match=message):
        export_file(source, tmp_path / "out.safetensors", dtype=dtype)
    assert [*tmp_path.iterdir()] == [source]


def test_infinity_in_a_buffer_or_in_the_file_of_another_program_is_kept(tmp_path):
    """Attention masks hold infinity."""
    own = tmp_path / "own.safetensors"
    foreign = tmp_path / "foreign.safetensors"
    out = tmp_path / "out.safetensors"
    tensors = {
        "mask": torch.tensor([0.0, float("-inf")]),
        "ids": torch.arange(4),
    }
    export_file(write_output(own, tensors, ("mask", "ids")), out, dtype="fp16")
    assert_same_tensors(load_output(out), tensors)
    save_file(tensors, foreign)
    export_file(foreign, out, dtype="fp16", overwrite=True)
    assert_same_tensors(load_output(out), tensors | {"mask": tensors["mask"].half()})


# --- snapshots
# -------------------------------------------------------------------------------------


def test_a_snapshot_is_exported_in_the_models_own_dtypes_under_all_names(tmp_path):
    """A snapshot of parts is a folder."""
    values = {
        "w": torch.tensor([1 / 3, -2.0]).half(),
        "var": torch.tensor([0.1]),
    }
    fields = {
        "tensors": {"w": "average F32", "var": "copy F32"},
        "aliases": {"tied": "w", "var too": "var"},
    }
    snapshot = write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, values, **fields)
    of_file = tmp_path / "file.safetensors"
    of_parts = tmp_path / "parts.safetensors"
    export_file(snapshot, of_file)
    export_file(split_snapshot(snapshot, 2), of_parts)
    expected = {
        "w": values["w"].float(),
        "tied": values["w"].float(),
        "var": values["var"],
        "var too": values["var"],
    }
    assert_same_tensors(load_output(of_file), expected)
    assert_same_tensors(load_output(of_parts), expected)
    info = read_output(of_file)
    assert info.sigma_rel == 0.05
    assert info.t == 10
    assert info.method == "tracked"
    assert sorted(info.copies) == ["var", "var too"]


# --- wrong sources
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"a": torch.zeros(10)}, "'ids'"),
        ({"a": torch.zeros(10), "ids": torch.arange(4)}, "'a'"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, tensors, fault):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(10)}, folder / "a.safetensors")
    save_file(tensors, folder / "ids.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "ids": "ids.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match=fault):
        export_file(folder, tmp_path / "other.safetensors")


def test_the_run_of_an_import_is_no_model(tmp_path):
    """An average that lies in its folder is not exported in its place."""
    imported = filled(tmp_path / "checkpoints", 1, 2)
    run = tmp_path / "run"
    import_checkpoints(imported, run)
    write_output(run / "average.safetensors", WEIGHTS)
    with refused(run, kind=UnsuitableError):
        export_file(run, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["new.safetensors", "new.pt", "new"])
def test_nothing_is_written_into_the_folder_of_a_run(tmp_path, name, source):
    run = tmp_path / "run"
    write_snapshot(run, 10, 0.05, RUN_ID, WEIGHTS)
    before = contents(run)
    with refused(f"out {run / name}", f"{run} is"):
        export_file(source, run / name)
    with refused(f"out {run / name}", f"{run} is"):
        Run(run).write(0.05, run / name)
    with refused(f"out {run}", f"{run} is"):
        Run(run).write([0.04, 0.05], run)
    assert contents(run) == before


# --- existing outputs
# ------------------------------------------------------------------------------


def test_a_replaced_folder_holds_the_new_model_and_no_file_of_the_old_one(tmp_path, source):
    """Some libraries look for model.safetensors before an index, others for the index first."""
    out = tmp_path / "out"
    for size in ("60", "5GB", "100"):
        export_file(source, out, max_shard_size=size, overwrite=True)
        export_file(source, tmp_path / size, max_shard_size=size)
        assert contents(out) == contents(tmp_path / size)


def test_a_snapshot_is_not_replaced(tmp_path, source):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, WEIGHTS), copy)
    with refused(copy, "snapshot", kind=OutputExistsError):
        export_file(source, copy, overwrite=True)


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path, operation, source):
    out = tmp_path / "out"
    export_file(source, out)
    before = contents(tmp_path)
    full = failing(operation, errno.ENOSPC)
    with full, pytest.raises(WriteError) as raised:
        export_file(source, out, dtype="fp16", overwrite=True)
    assert raised.value.subject.startswith(str(out))
    assert contents(tmp_path) == before


def test_a_folder_that_holds_other_files_is_not_replaced(tmp_path, monkeypatch, source):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    (tmp_path / "folder" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for out, fact in (
        ("config", "'config.json'"),
        ("folder", "'model.safetensors'"),
        ("link", "link"),
        (".", "working directory"),
    ):
        with refused(out, fact, kind=OutputExistsError):
            export_file(source, Path(out), "sharded", overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("at", [0, 2])
def test_an_interruption_of_a_pt_file_stays_an_interruption_and_leaves_nothing(tmp_path, at):
    """torch's writer itself raises an error about unexpected positions."""
    source = write_output(tmp_path / "in.safetensors", {"w": torch.ones(100_000)})
    with failing("write", KeyboardInterrupt(), call_number(at)), pytest.raises(KeyboardInterrupt):
        export_file(source, tmp_path / "out.pt")
    assert [*tmp_path.iterdir()] == [source]


def test_a_disk_that_is_full_is_named_and_nothing_is_left(tmp_path):
    """Within a tensor: torch's writer itself raises an error about unexpected positions."""
    source = write_output(tmp_path / "in.safetensors", {"w": torch.ones(100_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with refused(tmp_path / "out.pt", "file too large", kind=WriteError):
            export_file(source, tmp_path / "out.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.iterdir()] == [source]


# --- files of a model folder


@pytest.fixture
def run(tmp_path):
    return Run(filled(tmp_path / "run", 1, 2))


def make_folder(folder):
    (folder / "assets").mkdir(parents=True)
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    for name in ("config.json", "assets/merges.txt", ".gitattributes"):
        (folder / name).write_text(f'"{name}"')
    return folder


def test_a_folder_of_the_hubs_cache_is_copied_as_files(tmp_path, run):
    """Its files are links to blobs."""
    blobs = make_folder(tmp_path / "models--a--b" / "blobs")
    like = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    out = tmp_path / "out"
    (like / "assets").mkdir(parents=True)
    for name in contents(blobs):
        (blobs / name).rename(blobs / Path(name).name)
        (like / name).symlink_to(blobs / Path(name).name)
    run.write(0.2, out, like=like)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    found = contents(out)
    model = load_file(out / "model.safetensors")
    assert torch.equal(model["w"], run.average(0.2)["w"])
    assert found == contents(like) | {"model.safetensors": found["model.safetensors"]}
    weights = like / "model.safetensors"
    weights.unlink()
    weights.symlink_to(make_folder(tmp_path / "other") / "model.safetensors")
    check_refused(run, like, "model.safetensors")


def test_links_to_a_folder_and_to_its_own_files_are_followed(tmp_path, run):
    """A repository's .git and weights in another format are not copied. The model's folder is named
    as those of other checkpoints."""
    folder = make_folder(tmp_path / "folder/step-10")
    out = tmp_path / "out/step-10"
    (folder / ".git").mkdir()
    (folder / ".git/config").touch()
    (folder / "pytorch_model.bin").touch()
    (folder / "vocab.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to("folder")
    run.write(0.2, out.parent, like=tmp_path / "link")
    assert not (out / "vocab.json").is_symlink()
    left_out = contents(folder).keys() - contents(out).keys()
    assert left_out == {".git/config", "pytorch_model.bin"}


def test_the_rounding_to_a_folders_dtype_is_part_of_the_error(tmp_path, run):
    like = make_folder(tmp_path / "like")
    save_file({"w": torch.zeros(3, dtype=torch.bfloat16)}, like / "model.safetensors")
    with pytest.raises(InexactError, match=r" 0\.15\d* %"):
        run.write(0.28, tmp_path / "new", max_error=1e-3, like=like)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("extra.json", "/dev/zero"),
        ("assets/a.json", "../../secret.json"),
    ],
)
def test_no_link_out_of_the_folder_is_followed(tmp_path, run, name, target):
    """A secret would be in a folder that is uploaded; a device would fill the disk or block."""
    (tmp_path / "secret.json").write_text("a token")
    like = make_folder(tmp_path / "like")
    (like / name).symlink_to(target)
    check_refused(run, like, name)


@pytest.mark.timeout(60)
def test_a_pipe_in_the_folder_is_not_read(tmp_path, run):
    like = make_folder(tmp_path / "like")
    os.mkfifo(like / "a pipe.json")
    check_refused(run, like, "a pipe.json")


def check_refused(run, like, name):
    out = like.parent / "new"
    with refused(f"like {like}", name):
        run.write(0.2, out, like=like)
    assert not out.exists()


@pytest.mark.parametrize("name", ["new.safetensors/", "new.pt/"])
def test_a_name_that_ends_in_a_slash_is_that_of_a_folder(tmp_path, name):
    source = write_output(tmp_path / "in.safetensors", {"w": torch.ones(2)})
    with refused(f"out {tmp_path}/{name}"):
        export_file(source, f"{tmp_path}/{name}")
