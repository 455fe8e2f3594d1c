"""Damaged and hostile checkpoints: one clear line, nothing executed, nothing written."""

import copyreg
import dataclasses
import itertools
import json
import os
import pickle
import shutil
import time
import tracemalloc
import zipfile
from pathlib import Path

import edm2_layout
import pytest
import torch
from checking import assert_same_tensors, heavy
from checkpoint_layouts import LAYOUTS, distributed
from saved import exported, store, values_of
from torture.hostile import Bomb

from posthoc_cli import PostHocError, Run
from posthoc_cli.checkpoints.pickles import read_pickled
from posthoc_cli.snapshots.opened_file import OpenedFile


def read(run):
    """Return the message of the error that reading all values ends with; empty if it succeeds."""
    try:
        for source in Run(run).sources:
            values_of(source)
    except PostHocError as error:
        text = str(error)
        assert "\n" not in text
        return text
    return ""


WEIGHTS = {"w": torch.ones(3)}


def with_bombs(bomb):
    return {
        "state_dict": WEIGHTS,
        "bomb": bomb,
        Path(bomb): [bomb],
    }


def archive(run, bomb):
    torch.save(with_bombs(bomb), run / "step10.pt")


def plain(run, bomb):
    content = pickle.dumps(with_bombs(bomb))
    (run / "step10.pt").write_bytes(content)


def edm2(run, bomb):
    net = edm2_layout.network()
    net.logvar.bomb = bomb
    edm2_layout.save(run / "network-snapshot-0000010-0.050.pkl", net)


def of_torch_distributed(run, bomb):
    distributed(run / "step-10", WEIGHTS | {"step": bomb})


def root(run, bomb):
    torch.save(bomb, run / "step10.pt")


def metadata(run, bomb):
    of_torch_distributed(run, bomb)
    (run / "step-10" / ".metadata").write_bytes(pickle.dumps(bomb))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (archive, ""),
        (plain, ""),
        (edm2, ""),
        (of_torch_distributed, ""),
        (root, "step10.pt: "),
        (metadata, ".metadata: "),
    ],
)
def test_a_bomb_is_read_as_data(write, message, run, tmp_path):
    marker = tmp_path / "executed"
    run.mkdir()
    write(run, Bomb(marker))
    said = read(run)
    assert not marker.exists()
    assert message in said
    assert bool(said) == bool(message)


_DOUBLED = b")" + b"q\x09h\x09\x86" * 5_000
"""A tuple of two equal tuples, 5,000 levels deep, whose hash takes forever."""

OPCODES = {
    "long text": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x",
    "unknown opcode": b"\x80\x04\xff.",
    "nested dicts": b"\x80\x04}" + b"\x8c\x00}" * 100_000 + b"s" * 100_000 + b".",
    "doubled key": b"\x80\x04}" + _DOUBLED + b"Ns.",
    "doubled dicts": b"\x80\x04}"
    + b"".join(b"q\x00}(\x8c\x01ah\x00\x8c\x01bh\x00u" for _ in range(60))
    + b".",
    "doubled key of a call": b"\x80\x02ccollections\nOrderedDict\n]" + _DOUBLED + b"N\x86a\x85R.",
    "doubled in a set": b"\x80\x04\x8f(" + _DOUBLED + b"\x90.",
    "key of many digits": b"\x80\x04}\x8b"
    + (10**6).to_bytes(4, "little")
    + b"\x7f" * 10**6
    + b"Ns.",
    "many arguments": b"\x80\x04cx\ny\nq\x00("
    + b"N" * 50_000
    + b"tq\x0100]q\x02("
    + b"h\x00h\x01R" * 25_000
    + b"e.",
    "calls itself": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00"
    b"(h\x00N]q\x01(h\x00Nh\x01NeNtR.",
    "lone surrogate": b"\x80\x04}\x8c\x01w\x8c\x03\xed\xa0\x80s.",
    "persistent": b"\x80\x04\x8c\x01xQ.",
    "tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89NtR.",
    "big-endian": b"".join(
        pickle.dumps(one) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False})
    ),
    "long tuple as a key": b"\x80\x04("
    + b"K\x01" * 8_000
    + b"tq\x00}("
    + b"h\x00N" * 8_000
    + b"u.",
    "long class again and again": b"\x80\x04X\x40\x42\x0f\x00"
    + b"k" * 1_000_000
    + b"q\x00"
    + b"h\x00h\x00\x93" * 20_000
    + b".",
    "stream in itself": b"\x80\x04ctorch.storage\n_load_from_bytes\nC\x05\x80\x04N..\x85R.",
}


@pytest.mark.parametrize("what", OPCODES)
def test_a_malformed_pickle_is_refused_quickly_in_one_line(what, tmp_path):
    started = time.process_time()
    (tmp_path / "step1.pt").write_bytes(OPCODES[what])
    assert read(tmp_path).startswith(f"{tmp_path / 'step1.pt'}: ")
    assert time.process_time() - started < 10


COUNT = 200_000
MANY = 1_200_000  # more than the free memory holds
ENTRIES = b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(20_000))
REPEATS = {
    "names": b"X\x10\x27\x00\x00"
    + b"k" * 10_000
    + b"q\x000}("
    + b"".join(b"X\x05\x00\x00\x00%05dK\x01" % i for i in range(3000))
    + b"u"
    + b"q\x010}h\x00h\x01s" * 90,
    "keys of all dicts around": b"}" + b"\x8c\x00}" * 2000 + b"(" + ENTRIES + b"u" + b"s" * 2000,
    "marks": b"(" * 10 * COUNT,
    "memo": b"N" + b"\x94" * 15 * COUNT,
    "strings of bytes": b"(" + b"C\x00" * COUNT,
    "objects": b"cx\ny\nq\x00)q\x01(" + b"h\x00h\x01R" * COUNT,
    "imported names": b"(" + b"cx\ny\n" * MANY,
    "calls without arguments": b"cx\ny\nq\x00(" + b"h\x00)R" * MANY,
    "objects without __init__": b"cx\ny\nq\x00(" + b"h\x00)\x81" * MANY,
    "arguments": b"cx\ny\nq\x00(" + b"N" * 100 + b"tq\x01(" + b"h\x00h\x01R" * COUNT,
    "dicts of calls": b"ccollections\nOrderedDict\nq\x00(" + b"h\x00)R" * COUNT,
    "sets": b"(" + b"\x8f" * COUNT,
}
"""Pickles in which a few bytes repeat what takes more."""
EMPTY_OBJECTS = b'{"w":[' + b",".join([b"{}"] * 1_000_000) + b"]}"
"""A header that would take 64 bytes of memory for 3 of the file: 24 MB took 1.2 GB."""
OBJECTS = len(EMPTY_OBJECTS).to_bytes(8, "little") + EMPTY_OBJECTS


def read_traced(run):
    """Return the message of an error, and the most bytes of memory in use before it."""
    tracemalloc.start()
    try:
        message = read(run)
        _, used = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return message, used


@heavy
@pytest.mark.parametrize("what", REPEATS)
def test_the_memory_of_a_refused_file_is_limited_by_its_length(what, tmp_path):
    """64 MB are free, and 4 bytes a byte; the memory of an item is at most thrice its cost."""
    content = b"\x80\x04" + REPEATS[what] + b"."
    (tmp_path / "step1.pt").write_bytes(content)
    message, used = read_traced(tmp_path)
    assert message.startswith(f"{tmp_path / 'step1.pt'}: ")
    assert used < 60_000_000 + 12 * len(content)


def test_the_memory_of_a_refused_header_is_limited_by_its_length(tmp_path):
    (tmp_path / "step1.safetensors").write_bytes(OBJECTS)
    message, used = read_traced(tmp_path)
    assert "than its length explains" in message
    assert used < 4 * len(OBJECTS)


LARGEST = 2**61 - 1
SAME_HASH = [b"\x8a\x08" + (k * LARGEST).to_bytes(8, "little", signed=True) for k in range(-3, 4)]
"""Ints that Python's hash takes for one, as opcodes."""


def test_no_key_of_a_dict_has_a_hash_that_a_file_can_choose(tmp_path):
    """7**6 tuples of six such ints took 51 s: each was compared with all before it."""
    tuples = [b"(" + b"".join(ints) + b"tN" for ints in itertools.product(SAME_HASH, repeat=3)]
    ints = [key + b"N" for key in SAME_HASH]
    content = b"\x80\x04}(" + b"".join(tuples + ints) + b"\x8c\x01wNu."
    path = tmp_path / "step1.pkl"
    path.write_bytes(content)
    with OpenedFile(path) as file:
        keys = list(read_pickled(file, 0, file.size))
    assert keys == [*(str(k * LARGEST) for k in range(-3, 4)), "w"]


def test_a_pickle_of_too_many_objects_is_refused(tmp_path):
    content = b"\x80\x04](" + b"}" * 3_000_000 + b"e."
    (tmp_path / "step1.pt").write_bytes(content)
    assert "than its length explains" in read(tmp_path)


def test_a_function_in_the_registry_of_extensions_is_not_called(tmp_path):
    code = 0x7FFF1234
    copyreg.add_extension("os", "getpid", code)
    extension = b"\x84" + code.to_bytes(4, "little")
    # from now on the registry has it in a cache
    assert pickle.loads(b"\x80\x02" + extension + b")R.") == os.getpid()
    content = b"\x80\x02}(X\x01\x00\x00\x00w" + extension + b")Ru."
    (tmp_path / "step1.pt").write_bytes(content)
    assert "damaged pickle" in read(tmp_path)


@pytest.mark.parametrize(
    "call", [b"(S'{}'\nios\nmkdir\n.", b"(cos\nmkdir\nS'{}'\no.", b"cos\nmkdir\n(S'{}'\ntR."]
)
def test_a_function_that_older_protocols_name_is_not_called(call, tmp_path):
    place = tmp_path / "made"
    content = call.replace(b"{}", os.fsencode(place))
    (tmp_path / "step10.pt").write_bytes(content)
    assert read(tmp_path)
    assert not place.exists()


def test_the_functions_in_place_of_torchs_are_left_as_they_were(tmp_path):
    attributes = b"N}X\x0c\x00\x00\x00__defaults__)s\x86b"
    rebuild = b"ctorch._utils\n_rebuild_tensor\n"
    (tmp_path / "step1.pt").write_bytes(b"\x80\x02" + rebuild + attributes + b".")
    assert "step1.pt: " in read(tmp_path)
    torch.save(WEIGHTS, tmp_path / "step1.pt")
    assert read(tmp_path) == ""


def test_a_file_of_an_old_torch_is_named(tmp_path):
    torch.save(WEIGHTS, tmp_path / "step1.pt", _use_new_zipfile_serialization=False)
    assert "1.6" in read(tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "step1.pt").write_bytes(b"GGUF" + bytes(100))
    assert "is of a kind that cannot be read (llama.cpp)" in read(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_always_found(layout, write):
    """`torture.hostile` tries other damage."""
    run = write(layout)
    sizes = {path: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    largest = max(sizes, key=sizes.get)
    os.truncate(largest, sizes[largest] // 2)
    assert read(run).startswith(str(run))


def test_an_index_leads_to_no_other_folder(write, tmp_path):
    shutil.copy(write("transformers") / SHARD, tmp_path / "other.safetensors")
    message = read_with_shard(tmp_path / "run", "../../other.safetensors")
    assert "is not the name of a file" in message


SHARD = "checkpoint-20/model-00001-of-00002.safetensors"


def read_with_shard(run, name):
    """Read a run whose index has one more tensor, 'x', in a shard of this name."""
    index = run / "checkpoint-20" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = name
    index.write_text(json.dumps(content))
    return read(run)


def test_a_tensor_that_a_shard_lacks_is_named(write):
    run = write("transformers")
    message = read_with_shard(run, Path(SHARD).name)
    assert "'x'" in message


def test_a_shard_that_is_no_file_is_named(write):
    run = write("transformers")
    shard = run / SHARD
    shard.unlink()
    assert f"{shard.name}: " in read(run)
    os.mkfifo(shard)
    assert f"{shard.name}: is not a regular file" in read(run)


@pytest.fixture
def metadata_of_chunks(tmp_path):
    """Return the metadata of a checkpoint of torch.distributed with one tensor in one chunk."""
    distributed(tmp_path / "step-10", {"w": torch.ones(300)})
    return tmp_path / "step-10" / ".metadata"


def read_with(metadata, change):
    """Read a checkpoint after a change of its metadata."""
    content = pickle.loads(metadata.read_bytes())
    change(content)
    metadata.write_bytes(pickle.dumps(content))
    return read(metadata.parent.parent)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (b"../0.distcp\x00", "is not the name of a file in its folder"),
        (b"/etc/passwds", "is not the name of a file in its folder"),
        (b"__1_0.distcp", "__1_0.distcp: cannot be opened"),
    ],
)
def test_chunks_are_read_from_their_own_folder_only(name, problem, metadata_of_chunks, tmp_path):
    whole = metadata_of_chunks.read_bytes()
    assert whole.count(b"__0_0.distcp") == 1
    metadata_of_chunks.write_bytes(whole.replace(b"__0_0.distcp", name))
    assert problem in read(tmp_path)


def test_chunks_that_share_bytes_are_refused(metadata_of_chunks):
    def change(content):
        ((index, place),) = content.storage_data.items()
        other = dataclasses.replace(index, fqn="other")
        content.storage_data[other] = place
        content.state_dict_metadata["other"] = content.state_dict_metadata["w"]

    message = read_with(metadata_of_chunks, change)
    assert "__0_0.distcp: is shorter" in message


@pytest.mark.parametrize(
    ("size", "of_chunk", "problem"),
    [
        ([300], ["x"], "its shape"),
        ([300], [299], "'w': "),
        ([200], [200], "'w': holds no tensor of shape [200]"),
    ],
)
def test_a_chunk_that_does_not_fill_its_tensor_is_refused(
    size,
    of_chunk,
    problem,
    metadata_of_chunks,
):
    def change(content):
        tensor = content.state_dict_metadata["w"]
        tensor.size = torch.Size(size)
        vars(tensor.chunks[0])["sizes"] = of_chunk

    assert problem in read_with(metadata_of_chunks, change)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("relative_path", None, "'w': its place is missing"),
        ("length", 10**9, "'w': truncated: it would end beyond"),
        ("transform_descriptors", ["zstd"], "compressed or encrypted"),
    ],
)
def test_a_chunk_without_a_valid_place_is_refused(name, value, problem, metadata_of_chunks):
    def change(content):
        (place,) = content.storage_data.values()
        vars(place)[name] = value

    assert problem in read_with(metadata_of_chunks, change)


VALUES = torch.arange(1_000_000.0)


def views(count):
    return {f"w{begin}": VALUES[begin : 990_000 + begin] for begin in range(count)}


def with_ema(**settings):
    average = {
        "decay": 0.9,
        "num_updates": 3,
        "shadow_params": [torch.ones(3)],
    }
    return {
        "model": WEIGHTS,
        "ema": average | settings,
    }


TWO = torch.ones(2)
NO_SETTINGS = "holds an EMA whose settings cannot be read"
NO_NAME = "a model's tensor cannot have this name"
REFUSED = [
    (torch.ones(3), "step1.pt: holds no tensors with names"),
    ({"": TWO}, NO_NAME),
    ({"__metadata__": TWO}, NO_NAME),
    ({"a\0b": TWO}, NO_NAME),
    ({"\ud800": TWO}, NO_NAME),
    ({"state_dict": {"s": TWO.to_sparse()}}, "'state_dict.s': "),
    ({"c": TWO.to(torch.complex128)}, "ComplexDoubleStorage"),
    ({"actor": {"w": TWO}, "critic": {"w": TWO}}, "it has tensors under 'actor', 'critic'"),
    ({"optimizer_state_dict": {"exp_avg": TWO}}, "no weights, only tensors under 'optimizer_st"),
    (with_ema(decay="much"), NO_SETTINGS),
    (with_ema(num_updates=float("inf")), NO_SETTINGS),
    ({"w": torch.ones(1).expand(2**38)}, "of shape [274877906944] that repeats 4 bytes"),
    (views(1000), "its tensors share bytes, and would take"),  # a file of 4 MB could hold 4 GB
]


@pytest.mark.parametrize(("content", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_a_content_that_is_no_model_is_refused_by_name(content, reason, tmp_path):
    torch.save(content, tmp_path / "step1.pt")
    assert reason in read(tmp_path)


@pytest.mark.parametrize("setting", [{"power": "x"}, {"inv_gamma": 0}, {"min_decay": [1]}])
def test_a_configuration_of_diffusers_that_has_no_numbers_is_one_line(setting, tmp_path):
    folder = tmp_path / "checkpoint-5" / "unet_ema"
    for place in (folder, tmp_path / "checkpoint-5" / "unet"):
        store(place / "model.safetensors", WEIGHTS)
    config = {
        "decay": 0.9,
        "optimization_step": 5,
        "use_ema_warmup": True,
    }
    (folder / "config.json").write_text(json.dumps(config | setting))
    assert "holds an EMA whose settings cannot be read" in read(tmp_path)


def list_members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def read_archive(path, members, compression=0):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return read(path.parent)


@pytest.fixture
def archived(tmp_path):
    """Return a file of torch.save, written anew as another program would."""
    path = tmp_path / "step1.pt"
    torch.save({"w": torch.ones(300)}, path)
    assert read_archive(path, list_members(path)) == ""
    return path


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step1/byteorder": b"big"}, "big-endian"),
        ({"step1/data.pkl": b"\x80\x02(."}, "damaged pickle"),
        ({"step1/data/0": b"short"}, "a tensor reaches beyond its storage"),
        ({"step1/data/0": None}, "it has no 'data/0'"),
        ({"step1/data.pkl": None}, "not of torch.save"),
    ],
)
def test_an_archive_whose_members_do_not_fit_is_named(change, problem, archived):
    """None of a member that it lacks."""
    members = list_members(archived) | change
    left = {name: data for name, data in members.items() if data is not None}
    assert problem in read_archive(archived, left)


def test_a_compressed_archive_is_named(archived):
    message = read_archive(archived, list_members(archived), zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted" in message


def test_an_archive_with_two_members_of_one_name_is_refused(archived):
    with (
        zipfile.ZipFile(archived, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("step1/data/0", b"")
    assert "two members of one name" in read(archived.parent)


def test_views_tied_weights_and_repeated_bytes_are_read(tmp_path):
    content = views(4)
    content["tied"] = content["w0"]
    content["repeated"] = torch.ones(1).expand(3, 4)
    torch.save(content, tmp_path / "step2.pt")
    assert_same_tensors(exported(tmp_path / "step2.pt", raw=True), content)
