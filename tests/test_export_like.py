"""Averages written back into a copy of a training's checkpoint: every other byte stays, and the
training's own loader takes it.

Each checkpoint is written by the library that a training uses, and loaded by it. The averages are
compared with a float64 sum, rounded once.
"""

import errno
import io
import json
import pickle
import shutil
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager, suppress
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checking import assert_same_tensors, heavy, refused
from factories import contents
from groups import check_group
from safetensors.torch import load_file, save_file
from snapshots.recorded import call_number, failing

from posthoc_cli import Run, files
from posthoc_cli.errors import (
    FileFormatError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    WriteError,
)

Tensors = dict[str, torch.Tensor]

TARGET = "last:2"
SHAPES = {
    "conv.weight": (4, 3, 2, 2),
    "conv.bias": (4,),
    "head.weight": (700, 900),
    "scale": (),
    "empty": (0, 3),
}
"""A tensor of more than one tile, small ones, one without axes and one without elements."""


def values(seed, prefix="", dtype=torch.float32):
    """Return tensors whose elements take 12 bits, so that sums of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        drawn = torch.randint(-2000, 2000, shape, generator=generator) / 256
        found[prefix + name] = drawn.to(dtype)
    return found


@pytest.fixture
def run(tmp_path):
    """A run of two checkpoints."""
    for step in (1, 2):
        stored(tmp_path, step, values(step))
    return Run(tmp_path / "run")


def stored(folder, step, tensors):
    run = folder / "run"
    run.mkdir(exist_ok=True)
    save_file(tensors, run / f"step{step}.safetensors")
    return Run(run)


def twice(folder, tensors):
    """Write equal checkpoints of two steps: no average is made of one."""
    stored(folder, 1, tensors)
    return stored(folder, 2, tensors)


def check_replaced(tensors, prefix=""):
    """Check that tensors are the mean of both checkpoints in float64, rounded once."""
    first = values(1)
    second = values(2)
    for name in SHAPES:
        tensor = tensors[prefix + name]
        mean = (first[name].double() + second[name].double()) / 2
        assert torch.equal(tensor, mean.to(tensor.dtype)), name


def saved(folder, **content):
    """Write a checkpoint by torch.save; return its path."""
    torch.save(content, folder / "last.pt")
    return folder / "last.pt"


@pytest.fixture
def like(tmp_path):
    return saved(tmp_path, model=values(5))


def load(path):
    """Load a checkpoint as a careful training does."""
    return torch.load(path, weights_only=True)


def copied(run, like, target=TARGET, **options):
    """Write a copy of a file next to it; return what is said about it, and what it holds."""
    out = like.with_name(f"new{like.suffix}")
    report = run.write(target, out, like=like, overwrite=True, **options)
    return report.to_dict()["like"], load(out)


END_OF_MARK = b"EMA MARK"
"""The end of what a copy has more than its checkpoint: see `snapshots/output_mark.py`."""


def check_archive(before, after, replaced):
    """Check that two archives differ in the contents of so many storages, in their CRC-32, and in
    a comment, by the standard library's reader."""
    expected = before
    members = 0
    old = zipfile.ZipFile(io.BytesIO(before))
    new = zipfile.ZipFile(io.BytesIO(after))
    for info, now in zip(old.infolist(), new.infolist(), strict=True):
        if info.CRC != now.CRC:
            begin = before.index(old.read(info), info.header_offset)
            end = begin + info.file_size
            expected = expected[:begin] + new.read(now) + expected[end:]
            expected = expected.replace(as_bytes(info.CRC), as_bytes(now.CRC))
            members += 1
    assert new.testzip() is None
    assert new.comment.endswith(END_OF_MARK)
    length = len(new.comment).to_bytes(2, "little")
    assert expected[:-2] + length + new.comment == after
    assert members == replaced


def as_bytes(crc):
    return crc.to_bytes(4, "little")


# --- files of torch.save


CONTENT = {
    "model": values(5),
    "ema": values(6),
    "optimizer": {"state": {0: {"exp_avg": values(9)["head.weight"]}}},
    "step": 7,
}
"""What a training saves."""


def test_a_file_of_torch_save_keeps_every_other_byte(tmp_path, run):
    like = saved(tmp_path, **CONTENT)
    said, loaded = copied(run, like)
    assert said["kept"] == []
    check_archive(like.read_bytes(), (tmp_path / "new.pt").read_bytes(), 4)
    check_replaced(loaded["ema"])


def test_the_copy_of_a_file_without_an_ending_may_have_any_name(tmp_path, run):
    like = tmp_path / "checkpoint-7"
    out = tmp_path / "averaged.pt"
    torch.save(values(5), like)
    run.write(TARGET, out, like=like)
    check_replaced(load(out))


def test_a_file_of_pickle_dump_keeps_every_other_byte(tmp_path, run):
    like = tmp_path / "last.pkl"
    out = tmp_path / "averaged.pkl"
    like.write_bytes(pickle.dumps(CONTENT))
    run.write(TARGET, out, like=like)
    content = out.read_bytes()
    assert content.endswith(END_OF_MARK)
    assert content[like.stat().st_size - 1 :].startswith(b".{")  # the last opcode, then the mark
    loaded = pickle.loads(content)
    check_replaced(loaded["ema"])
    assert_same_tensors(loaded["model"], CONTENT["model"])


def test_tensors_in_other_orders_and_in_one_storage_are_written_in_place(tmp_path, run):
    channels_last = torch.zeros(4, 2, 2, 3)
    matrix = torch.full((900, 1400), 7.0)
    state = (
        values(5)
        | {
            "conv.weight": channels_last.permute(0, 3, 1, 2),
            "head.weight": matrix[:, ::2].t(),  # every second column, transposed
            "conv.bias": matrix[:4, 1],
        }
    )
    like = saved(tmp_path, model=state, matrix=matrix)
    _, loaded = copied(run, like)
    check_archive(like.read_bytes(), (tmp_path / "new.pt").read_bytes(), 3)
    check_replaced(loaded["model"])
    between = loaded["matrix"][:, 3::2]
    assert (between == 7).all()


def test_elements_with_bytes_in_common_are_refused(tmp_path, run):
    """One byte cannot hold the values of several elements."""
    row = torch.zeros(1, 900)
    repeated = values(5) | {"head.weight": row.expand(700, 900)}
    shared = values(5)
    shared["conv.bias"] = shared["head.weight"][0, 2:6]
    for state, names in ((repeated, "'head.weight'"), (shared, "'head.weight' and 'conv.bias'")):
        like = saved(tmp_path, model=state)
        with nothing_left(tmp_path), refused(like, names, kind=MismatchError):
            copied(run, like)


def test_two_names_of_one_tensor_are_one_place(tmp_path):
    """A run may have one of them, or both with equal values."""
    weights = torch.arange(6.0)
    like = saved(tmp_path, a=weights, b=weights)
    ones = torch.ones(6)
    one_of_them = {"a": ones}
    both = {"a": ones, "b": ones.clone()}
    for tensors in (one_of_them, both):
        _, loaded = copied(twice(tmp_path, tensors), like, "last:1")
        assert_same_tensors(loaded, both)
    other = twice(tmp_path, {"a": ones, "b": weights})
    with refused(like, "'a' and 'b'", kind=MismatchError):
        copied(other, like, "last:1")


def test_a_tensor_that_the_average_shares_with_the_weights_or_lacks_stays_and_is_named(
    tmp_path,
    run,
    ema,
):
    weights = values(5)
    average = values(6) | {"conv.bias": weights["conv.bias"]}
    del average["scale"]
    like = saved(tmp_path, model=weights, ema=average)
    out = tmp_path / "new.pt"
    words = ("--target", TARGET, "--like", like, "--out", out)
    done = ema("synthesize", run.directory, *words)
    assert "not written: 2 tensors (conv.bias, scale)" in done.err
    loaded = load(out)
    assert_same_tensors(loaded["model"], weights)
    left = run.average(TARGET)
    for name in average.keys() - {"conv.bias"}:
        left[name] = loaded["ema"][name]
    check_replaced(left)


def test_an_average_in_the_bytes_of_the_weights_is_no_average(tmp_path, run):
    weights = values(5)
    said, loaded = copied(run, saved(tmp_path, model=weights, ema=weights))
    assert said["replaced"] == "weights"
    check_replaced(loaded["model"])


def test_a_counter_of_another_dtype_stays(tmp_path):
    tensors = {
        "w": torch.ones(2),
        "count": torch.tensor(5),
    }
    run = twice(tmp_path, tensors)
    count = torch.tensor(3, dtype=torch.int32)
    said, loaded = copied(run, saved(tmp_path, w=torch.zeros(2), count=count), "last:1")
    assert said["kept"] == ["count"]
    assert loaded["count"] == 3
    assert loaded["w"].tolist() == [1, 1]


def test_one_of_several_averages_is_named(tmp_path, run):
    like = saved(tmp_path, model=values(4), ema1=values(5), ema2=values(6))
    _, loaded = copied(run, like, average="ema2")
    check_replaced(loaded["ema2"])
    assert_same_tensors(loaded["ema1"], values(5))


# --- safetensors, folders


def test_a_safetensors_file_keeps_its_header(tmp_path, run):
    like = tmp_path / "model.safetensors"
    out = tmp_path / "new.safetensors"
    state = values(5, "model.", torch.float16)
    state["model.frozen"] = torch.ones(2)
    save_file(state, like, {"format": "pt", "note": "mine"})
    report = run.write(TARGET, out, like=like)
    assert report.copied.kept == ["model.frozen"]
    header = read_header(out)
    assert header["__metadata__"].pop("ema.output")
    assert list(header.items()) == list(read_header(like).items())
    loaded = load_file(out)
    check_replaced(loaded, "model.")
    assert torch.equal(loaded["model.frozen"], torch.ones(2))


def read_header(path):
    """Read the header of a safetensors file, as its format says."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_the_output_of_a_trainer_is_copied_without_its_checkpoints(tmp_path, run, ema):
    like = tmp_path / "out"
    out = tmp_path / "new"
    for step in (10, 20):
        (like / f"checkpoint-{step}").mkdir(parents=True)
        torch.save(values(step), like / f"checkpoint-{step}/pytorch_model.bin")
    (like / "config.json").write_text("{}")
    (like / "tf_model.h5").write_bytes(b"old")
    torch.save(values(5), like / "pytorch_model.bin")
    words = ("--target", TARGET, "--like", like, "--out", out)
    done = ema("synthesize", run.directory, *words)
    assert "a copy of out, in which the weights are replaced" in done.err
    assert "not copied: checkpoint-10, checkpoint-20, tf_model.h5" in done.err
    assert contents(out).keys() == {"config.json", "pytorch_model.bin"}
    check_replaced(load(out / "pytorch_model.bin"))


def changed_files(before, after):
    """Return the names of the files that differ in two folders, which have the same names."""
    old = contents(before)
    new = contents(after)
    assert old.keys() == new.keys()
    return {name for name in old if old[name] != new[name]}


def test_the_average_of_diffusers_in_a_folder_of_its_own(tmp_path, run):
    like = tmp_path / "checkpoint-500"
    for seed, name in ((5, "unet"), (6, "unet_ema")):
        folder = like / name
        folder.mkdir(parents=True)
        save_file(values(seed), folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text("{}")
    for replaced in ("unet_ema", "unet"):
        out = tmp_path / replaced
        run.write(TARGET, out, like=like, raw=replaced == "unet")
        name = f"{replaced}/diffusion_pytorch_model.safetensors"
        assert changed_files(like, out) == {name}
        check_replaced(load_file(out / name))


# --- torch.distributed.checkpoint


def loaded_distributed(folder, *keys):
    """Load a folder into tensors with other values, as a training does."""
    state = {key: values(3) for key in keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


SHARDED = """
from torch.distributed.tensor import Shard, distribute_tensor
import torch.distributed.checkpoint as dcp
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
content = torch.load(arguments[0])
for tensors in content.values():
    for number, (name, tensor) in enumerate(tensors.items()):
        axis = min(number % 2, tensor.dim() - 1)
        if axis >= 0:
            tensors[name] = distribute_tensor(tensor, mesh, [Shard(axis)])
dcp.save(content | {"step": 3}, checkpoint_id=arguments[1])
"""


def test_a_folder_of_torch_distributed_checkpoint_keeps_every_other_byte(tmp_path, run):
    """Two processes have written chunks of its tensors."""
    like = tmp_path / "like"
    out = tmp_path / "new"
    content = {
        "model": values(5),
        "ema": values(6),
        "optim": values(9),
    }
    torch.save(content, tmp_path / "content.pt")
    check_group(SHARDED, 2, tmp_path / "group", tmp_path / "content.pt", like)
    run.write(TARGET, out, like=like)
    changed = changed_files(like, out)
    assert changed == {".metadata", *(path.name for path in like.glob("*.distcp"))}
    metadata = (out / ".metadata").read_bytes()
    assert metadata.startswith((like / ".metadata").read_bytes())
    assert metadata.endswith(END_OF_MARK)
    loaded = loaded_distributed(out, *content)
    check_replaced(loaded["ema"])
    assert_same_tensors(loaded["model"], values(5))
    assert_same_tensors(loaded["optim"], values(9))
    for name in changed - {".metadata"}:
        check_archives((out / name).read_bytes())


def check_archives(content):
    """Check the checksums of all archives in a file."""
    while content:
        end = content.index(b"PK\5\6") + 22
        archive = zipfile.ZipFile(io.BytesIO(content[:end]))
        assert archive.testzip() is None
        content = content[end:]


# --- what does not fit


@contextmanager
def nothing_left(folder):
    """Check that a block changes no file in a folder."""
    before = contents(folder)
    yield
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("tensors", "fact"),
    [
        ({"conv.bias": torch.zeros(5)}, "[5]"),
        ({"conv.bias": torch.zeros(4, dtype=torch.int32)}, "quantized"),
        (values(5, "a.") | values(5, "b."), "a. and b."),
    ],
)
def test_tensors_that_do_not_fit_are_errors_before_anything_is_written(tmp_path, tensors, fact):
    weights = {"conv.bias": torch.zeros(4)}
    like = saved(tmp_path, model=tensors)
    run = twice(tmp_path, weights)
    with nothing_left(tmp_path), refused(like, fact, kind=MismatchError):
        run.write("last:1", tmp_path / "new.pt", like=like)


def test_a_value_that_the_dtype_cannot_hold_is_refused_by_name(tmp_path):
    """torch itself would write 448, the largest value of eight bits."""
    tensors = {
        "a": torch.tensor([448.0]),
        "b": torch.tensor([470.0]),
    }
    run = twice(tmp_path, tensors)
    like = tmp_path / "like.safetensors"
    eight_bits = torch.ones(1).to(torch.float8_e4m3fn)
    save_file({"a": eight_bits, "b": eight_bits.clone()}, like)
    with nothing_left(tmp_path), refused("tensor 'b'", kind=NonFiniteError):
        run.write("last:1", tmp_path / "new.safetensors", like=like)


def test_an_existing_file_is_replaced_only_with_overwrite(tmp_path, run, like):
    with nothing_left(tmp_path), pytest.raises(OutputExistsError):
        run.write(TARGET, like, like=like)


def test_a_file_of_this_package_and_a_folder_to_replace_are_refused(tmp_path, run):
    own = tmp_path / "own.safetensors"
    run.write(TARGET, own)
    with refused(f"like {own}"):
        run.write(TARGET, tmp_path / "new.safetensors", like=own)
    with refused("overwrite"):
        run.write(TARGET, tmp_path / "new", like=run.directory, overwrite=True)


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_a_checkpoint_is_replaced_by_its_whole_copy_or_stays(operation, tmp_path, run, like):
    run.write(TARGET, tmp_path / "new.pt", like=like)
    whole = (tmp_path / "new.pt").read_bytes()
    names = contents(tmp_path).keys()
    for at in range(0, 12, 3):
        states = (like.read_bytes(), whole)
        with failing(operation, errno.ENOSPC, call_number(at)), suppress(WriteError):
            run.write(TARGET, like, like=like, overwrite=True)
        assert like.read_bytes() in states
        assert contents(tmp_path).keys() == names


def test_several_targets_make_a_file_each_for_which_the_disk_must_have_room(
    tmp_path,
    run,
    like,
    monkeypatch,
):
    """Each copy has the size of the checkpoint, not only that of the average."""
    content = {
        "model": values(5),
        "optimizer": torch.zeros(10**6),
    }
    torch.save(content, like)
    needed = 2 * like.stat().st_size
    usage = Mock(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    new = tmp_path / "new"
    with nothing_left(tmp_path), refused(new, f" {needed:,} bytes", kind=WriteError):
        run.write(["last:1", "last:2"], new, like=like)
    usage.free = needed
    run.write(["last:1", "last:2"], new, like=like)
    assert contents(new).keys() == {"last-1.pt", "last-2.pt"}
    first = load(new / "last-1.pt")
    second = load(new / "last-2.pt")
    assert_same_tensors(first["model"], values(2))
    check_replaced(second["model"])


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("open_new", "replaced"),
        ("write", "changed"),
    ],
)
def test_a_checkpoint_that_a_training_replaces_meanwhile_is_noticed(
    tmp_path,
    run,
    monkeypatch,
    call,
    problem,
    like,
):
    """Before the copy begins, and while it is made."""
    original = getattr(files.system, call)

    def after_a_change(*arguments):
        with like.open("ab") as file:
            file.write(b" ")
        return original(*arguments)

    monkeypatch.setattr(files.system, call, after_a_change)
    with refused(like, problem, kind=FileFormatError):
        copied(run, like)
    assert not (tmp_path / "new.pt").exists()


def test_an_archive_of_another_writer_has_its_checksums_in_local_headers(tmp_path, run, like):
    other = tmp_path / "other.pt"
    with zipfile.ZipFile(like) as old, zipfile.ZipFile(other, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    _, loaded = copied(run, other)
    check_archive(other.read_bytes(), (tmp_path / "new.pt").read_bytes(), 4)
    check_replaced(loaded["model"])


@heavy
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """The tensors are of 40 MB, and so is the state of the optimizer."""
    state = {"w": torch.ones(10_000_000)}
    moments = {"m": torch.zeros(10_000_000)}
    run = twice(tmp_path, state)
    like = saved(tmp_path, model=state, optimizer=moments)
    peaks = []
    for options in ({}, {"like": like}):
        tracemalloc.start()
        run.write("last:1", tmp_path / f"new{len(peaks)}.pt", **options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000_000


# --- the other commands


def test_an_export_writes_any_model_into_a_checkpoint(tmp_path, run, ema):
    source = tmp_path / "made.safetensors"
    out = tmp_path / "new.pt"
    like = saved(
        tmp_path,
        model=values(5, "module."),
        ema=values(6, "module."),
    )
    run.write(TARGET, source)
    done = ema("export", source, "--like", like, "--out", out)
    assert "a copy of last.pt, in which the average is replaced; the weights stay" in done.err
    check_replaced(load(out)["ema"], "module.")
