"""Damaged and hostile checkpoints: one clear line, nothing executed, nothing written."""

import copyreg
import dataclasses
import json
import os
import pickle
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edm2_layout
import pytest
import torch
from checkpoint_layouts import LAYOUTS, distributed
from safetensors.torch import save_file
from torture.hostile import Bomb

from posthoc_cli import Run, errors

Write = Callable[[str], Path]


def read(run: Path) -> str:
    """Return the message of the error that a synthesis ends with; empty if it succeeds."""
    try:
        Run(run).average(0.2)
    except errors.PostHocError as error:
        text = str(error)
        assert "\n" not in text
        return text
    return ""


@pytest.mark.parametrize("place", ["archive", "plain", "root", "distributed", "metadata", "edm2"])
def test_a_bomb_is_read_as_data(place: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    marker = tmp_path / "executed"
    bomb = Bomb(marker)
    run.mkdir()
    for step in (10, 20):
        weights = {"w": torch.full((3,), float(step))}
        content = {"state_dict": weights, "bomb": bomb, marker: [bomb]}
        if place == "plain":
            (run / f"step{step}.pt").write_bytes(pickle.dumps(content))
        elif place in ("archive", "root"):
            torch.save(content if place == "archive" else bomb, run / f"step{step}.pt")
        elif place == "edm2":
            net = edm2_layout.network()
            net.logvar.bomb = bomb
            edm2_layout.save(run / f"network-snapshot-{step:07d}-0.050.pkl", net)
        else:
            distributed(run / f"step-{step}", weights | {"step": bomb})
            if place == "metadata":
                (run / f"step-{step}" / ".metadata").write_bytes(pickle.dumps(bomb))
    message = read(run)
    assert not marker.exists()
    wanted = {
        "root": "holds no tensors",
        "metadata": "is no metadata of torch.distributed.checkpoint",
    }
    assert wanted.get(place, "") in message
    assert bool(message) == (place in wanted)


_MANY_CALLS = b"%sq\x00%sq\x0100]q\x02(" + b"h\x00h\x01R" * 100_000 + b"e."
"""Many calls of a name with the same arguments."""
_DOUBLED = b")" + b"q\x09h\x09\x86" * 5_000
"""A tuple of two equal tuples, 5,000 levels deep, whose hash takes forever."""

OPCODES = {
    "long text": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x",
    "long number": b"\x80\x04\x8b" + (2**31 - 1).to_bytes(4, "little"),
    "no mark": b"\x80\x04Nt.",
    "unknown opcode": b"\x80\x04\xff.",
    "nested dicts": b"\x80\x04}" + b"\x8c\x00}" * 500_000 + b"s" * 500_000 + b".",
    "doubled key": b"\x80\x04}" + _DOUBLED + b"Ns.",
    "doubled dicts": b"\x80\x04}"
    + b"".join(b"q\x00}(\x8c\x01ah\x00\x8c\x01bh\x00u" for _ in range(60))
    + b".",
    "doubled key of a call": b"\x80\x02ccollections\nOrderedDict\n]" + _DOUBLED + b"N\x86a\x85R.",
    "doubled storage": b"\x80\x02ctorch.storage\n_load_from_bytes\n" + _DOUBLED + b"\x85R.",
    "doubled in a set": b"\x80\x04\x8f(" + _DOUBLED + b"\x90.",
    "key of many digits": b"\x80\x04}\x8b"
    + (10**6).to_bytes(4, "little")
    + b"\x7f" * 10**6
    + b"Ns.",
    "many arguments": b"\x80\x04" + _MANY_CALLS % (b"cx\ny\n", b"(" + b"N" * 100_000 + b"t"),
    "many pairs": b"\x80\x04"
    + _MANY_CALLS
    % (
        b"ccollections\nOrderedDict\n",
        b"](" + b"".join(b"M%c\x00K\x01\x86" % i for i in range(256)) * 200 + b"e\x85",
    ),
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
    "empty dicts": b"\x80\x04](" + b"}" * 3_000_000 + b"e.",
    "long names again and again": b"\x80\x02X\x10\x27\x00\x00"
    + b"k" * 10_000
    + b"q\x000}("
    + b"".join(b"X\x05\x00\x00\x00%05dK\x01" % i for i in range(3000))
    + b"u"
    + b"q\x010}h\x00h\x01s" * 90
    + b".",
    "float keys again and again": b"\x80\x04}("
    + b"".join(b"G" + struct.pack(">d", i) + b"N" for i in range(20_000))
    + b"uq\x00}("
    + b"".join(b"J" + struct.pack("<i", i) + b"h\x00" for i in range(100_000))
    + b"u.",
    "bytes beyond all files": b"\x80\x04\x8e" + (2**63 - 1).to_bytes(8, "little") + b".",
    "long class again and again": b"\x80\x04X\x40\x42\x0f\x00"
    + b"k" * 1_000_000
    + b"q\x00"
    + b"h\x00h\x00\x93" * 20_000
    + b".",
    "stream in itself": b"\x80\x04ctorch.storage\n_load_from_bytes\nC\x05\x80\x04N..\x85R.",
}


@pytest.mark.parametrize("what", OPCODES)
def test_a_pickle_that_is_none_is_one_line_at_once(what: str, tmp_path: Path) -> None:
    started = time.process_time()
    (tmp_path / "step1.pt").write_bytes(OPCODES[what])
    assert read(tmp_path).startswith(f"{tmp_path / 'step1.pt'}: ")
    assert time.process_time() - started < 10


EMPTY_OBJECTS = b'{"w":[' + b",".join([b"{}"] * 1_000_000) + b"]}"
"""A header that would take 64 bytes of memory for 3 of the file: 24 MB took 1.2 GB."""

LARGE: dict[str, tuple[bytes, int]] = {
    **{
        f"{what}.pt": (OPCODES[what], 50_000_000)
        for what in ("empty dicts", "long names again and again")
    },
    "header.safetensors": (len(EMPTY_OBJECTS).to_bytes(8, "little") + EMPTY_OBJECTS, 0),
}
"""Files, and the memory that may be used in addition to a multiple of their length."""


@pytest.mark.parametrize("name", LARGE)
def test_what_a_pickle_makes_is_limited_by_its_length(name: str, tmp_path: Path) -> None:
    """So is what the header of a safetensors file makes."""
    content, more = LARGE[name]
    (tmp_path / f"step1-{name}").write_bytes(content)
    tracemalloc.start()
    try:
        assert "than its length explains" in read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < more + (64 if more else 4) * len(content)
    finally:
        tracemalloc.stop()


def test_what_a_pickle_could_reach_is_left_as_it_was(tmp_path: Path) -> None:
    """Functions in the registry of extensions, and attributes of the functions in place of
    torch's."""
    copyreg.add_extension("os", "getpid", 0x7FFF1234)
    extension = b"\x84" + (0x7FFF1234).to_bytes(4, "little")
    # from now on the registry has it in a cache
    assert pickle.loads(b"\x80\x02" + extension + b")R.") == os.getpid()
    (tmp_path / "step1.pt").write_bytes(b"\x80\x02}(X\x01\x00\x00\x00w" + extension + b")Ru.")
    assert "damaged pickle" in read(tmp_path)
    attributes = b"N}X\x0c\x00\x00\x00__defaults__)s\x86b"
    rebuild = b"ctorch._utils\n_rebuild_tensor\n"
    (tmp_path / "step1.pt").write_bytes(b"\x80\x02" + rebuild + attributes + b".")
    assert "holds no tensors" in read(tmp_path)
    torch.save({"w": torch.ones(3)}, tmp_path / "step1.pt", _use_new_zipfile_serialization=False)
    assert "is of torch.save before release 1.6" in read(tmp_path)
    (tmp_path / "step1.pt").write_bytes(b"GGUF" + bytes(100))
    assert read(tmp_path).endswith("or of another kind: begins with b'GGUF'")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_always_found(layout: str, write: Write) -> None:
    """`torture.hostile` tries other damage."""
    run = write(layout)
    assert read(run) == ""
    paths = [path for path in run.rglob("*") if path.is_file() and path.name != "rng_state.pth"]
    path = max(paths, key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)
    assert read(run).startswith(str(run))


SHARD = "-00001-of-00002.safetensors"


def test_shards_lead_nowhere_else(write: Write, tmp_path: Path) -> None:
    run = write("transformers")
    index, shard = (
        run / "checkpoint-20" / f"model{end}" for end in (".safetensors.index.json", SHARD)
    )
    content = json.loads(index.read_text())
    shutil.copy(shard, tmp_path / "other.safetensors")
    for name, problem in (
        ("../../other.safetensors", "is not the name of a file"),
        (str(tmp_path / "other.safetensors"), "is not the name of a file"),
        (shard.name, "tensor 'x': is not in it, as the index says"),
    ):
        index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {"x": name}}))
        assert problem in read(run)
    index.write_text(json.dumps(content))
    for make, problem in (
        (lambda: None, f"{shard.name}: cannot be opened: no such file"),
        (
            lambda: shard.symlink_to(shard.name),
            "cannot be opened: too many levels of symbolic links",
        ),
        (lambda: os.mkfifo(shard), "is not a regular file"),
    ):
        shard.unlink(missing_ok=True)
        make()
        assert problem in read(run)


def test_chunks_lead_nowhere_else(tmp_path: Path) -> None:
    for step in (10, 20):
        distributed(tmp_path / f"step-{step}", {"w": torch.full((300,), float(step))})
    metadata = tmp_path / "step-10" / ".metadata"
    whole = metadata.read_bytes()
    assert whole.count(b"__0_0.distcp") == 1
    for name in (b"../0.distcp\x00", b"/etc/passwds", b"./__0.distcp"):
        metadata.write_bytes(whole.replace(b"__0_0.distcp", name))
        assert "is not the name of a file in its folder" in read(tmp_path)
    content = pickle.loads(whole)
    ((index, place),) = content.storage_data.items()
    content.storage_data = {index: place, dataclasses.replace(index, fqn="other"): place}
    content.state_dict_metadata |= {"other": content.state_dict_metadata["w"]}
    metadata.write_bytes(pickle.dumps(content))
    assert "__0_0.distcp: tensor 'other': shares bytes with another object" in read(tmp_path)
    metadata.write_bytes(whole.replace(b"__0_0.distcp", b"__1_0.distcp"))
    assert "__1_0.distcp: cannot be opened" in read(tmp_path)


DISTRIBUTED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "a shape of texts": ({"sizes": ["x"]}, {}, {}, "its shape, or that of a chunk, is"),
    "a hole": ({"sizes": torch.Size([299])}, {}, {}, "'w': "),
    "another shape": (
        {"sizes": torch.Size([200])},
        {"size": torch.Size([200])},
        {},
        "'w': holds no tensor of shape [200]",
    ),
    "no place": ({}, {}, {"relative_path": None}, "'w': its place is missing"),
    "a far end": ({}, {}, {"length": 10**9}, "'w': truncated: it would end beyond"),
    "compressed": ({}, {}, {"transform_descriptors": ["zstd"]}, "compressed or encrypted"),
}


@pytest.mark.parametrize("what", DISTRIBUTED)
def test_metadata_that_do_not_fit_are_one_line(what: str, tmp_path: Path) -> None:
    """Attributes of the chunk, of the tensor or of the place are changed."""
    distributed(tmp_path / "step-10", {"w": torch.full((300,), 1.0)})
    metadata, (*changes, problem) = tmp_path / "step-10" / ".metadata", DISTRIBUTED[what]
    content = pickle.loads(metadata.read_bytes())
    tensor, (place,) = content.state_dict_metadata["w"], content.storage_data.values()
    for changed, change in zip((tensor.chunks[0], tensor, place), changes, strict=True):
        vars(changed).update(change)
    metadata.write_bytes(pickle.dumps(content))
    assert problem in read(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "dtype", "problem"),
    [
        ([[0], [3]], "float32", ""),
        ([[0], [2]], "float32", "'w': "),
        ([[0], [3]], "float16", "are of several dtypes"),
        ([[0], [3, 0]], "float32", "must give its offsets"),
    ],
)
def test_chunks_make_a_complete_tensor_of_one_dtype(
    tmp_path: Path,
    offsets: Any,
    dtype: str,
    problem: str,
) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    for part, offset in enumerate(offsets):
        info = json.dumps({"w": {"saved_offsets": offset}})
        values = torch.ones(3, dtype=getattr(torch, dtype) if part else torch.float32)
        save_file({"w": values}, folder / f"model-{part}.safetensors", {"DCP_SHARDING_INFO": info})
    message = read(tmp_path)
    assert problem in message
    assert bool(problem) == bool(message)


def test_a_name_that_no_tensor_can_have_is_refused(tmp_path: Path) -> None:
    for name in ("", "__metadata__", "a\0b", "\ud800"):
        torch.save({"w": torch.ones(3), name: torch.ones(2)}, tmp_path / "step1.pt")
        assert "a model's tensor cannot have this name" in read(tmp_path)
    torch.save(torch.ones(3), tmp_path / "step1.pt")
    assert read(tmp_path) == f"{tmp_path / 'step1.pt'}: holds no tensors with names"


@pytest.mark.parametrize(
    "setting",
    [
        {"decay": "much"},
        {"num_updates": float("inf")},
        {"power": "x"},
        {"inv_gamma": 0},
        {"min_decay": [1]},
    ],
)
def test_an_ema_whose_settings_are_no_numbers_is_one_line(
    setting: dict[str, Any],
    tmp_path: Path,
) -> None:
    """In a file of torch-ema, or in the configuration of diffusers' EMA."""
    if setting.keys() & {"decay", "num_updates"}:
        average = {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(3)]} | setting
        torch.save({"model": {"w": torch.ones(3)}, "ema": average}, tmp_path / "step5.pt")
    else:
        for name in ("unet", "unet_ema"):
            (tmp_path / "checkpoint-5" / name).mkdir(parents=True)
            save_file({"w": torch.ones(3)}, tmp_path / "checkpoint-5" / name / "model.safetensors")
        config = {"decay": 0.9, "optimization_step": 5, "use_ema_warmup": True} | setting
        (tmp_path / "checkpoint-5" / "unet_ema" / "config.json").write_text(json.dumps(config))
    assert "holds an EMA whose settings cannot be read" in read(tmp_path)


def test_archives_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "step1.pt"
    torch.save({"w": torch.ones(300)}, path)
    members = {
        info.filename: zipfile.ZipFile(path).read(info) for info in zipfile.ZipFile(path).infolist()
    }

    def refusal(
        compression: int = zipfile.ZIP_STORED,
        twice: bool = False,
        **changed: bytes,
    ) -> str:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(name, changed.get(name.rpartition("/")[2].replace(".", "_"), data))
            if twice:
                with pytest.warns(UserWarning, match="Duplicate"):
                    archive.writestr("step1/data/0", b"")
        return read(tmp_path)

    assert refusal() == ""
    assert "compressed or encrypted" in refusal(zipfile.ZIP_DEFLATED)
    assert "two members of one name" in refusal(twice=True)
    assert "big-endian" in refusal(byteorder=b"big")
    assert "damaged pickle" in refusal(data_pkl=b"\x80\x02(.")
    assert "a tensor reaches beyond its storage" in refusal(**{"0": b"short"})
    del members["step1/data/0"]
    assert "it has no 'data/0'" in refusal()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", b"x")
    assert "not of torch.save" in read(tmp_path)


def test_a_tensor_that_repeats_few_bytes_stays_small(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(3, 4)}, tmp_path / "step2.pt")
    assert Run(tmp_path).average(0.2)["w"].shape == (3, 4)
    torch.save({"w": torch.ones(1).expand(2**38)}, tmp_path / "step2.pt")
    reason = "a tensor of shape [274877906944] that repeats 4 bytes"
    assert f"step2.pt: cannot be read as tensors: {reason}" in read(tmp_path)


def test_tensors_that_share_bytes_cost_no_more_than_a_few_times_their_file(tmp_path: Path) -> None:
    """A file of 4 MB could hold 1,000 tensors of 4 MB, in one storage or in members of a zip; views
    and tied weights are read.
    """
    values = torch.arange(1_000_000.0)
    path = tmp_path / "step2.pt"
    few, many = ({f"w{i}": values[i : 990_000 + i] for i in range(count)} for count in (4, 1000))
    torch.save(few | {"tied": values[:990_000]}, path)
    assert torch.equal(Run(tmp_path).average(0.2)["w3"], few["w3"])
    torch.save(many, path)
    assert "its tensors share bytes, and would take" in read(tmp_path)
    torch.save(
        {name: torch.full((i + 1,), 1.0) for i, name in enumerate(many)} | {"all": values}, path
    )
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        for info in archive.infolist():
            info.header_offset = (
                largest.header_offset if "/data/" in info.filename else info.header_offset
            )
        archive.comment = b"x"  # which makes it write the changed directory
    started = time.process_time()
    assert Run(path).sources[0].file_bytes < 9 * path.stat().st_size
    assert time.process_time() - started < 10


def test_two_thousand_files(tmp_path: Path) -> None:
    for step in range(1, 2001):
        save_file({"w": torch.ones(3)}, tmp_path / f"step{step}.safetensors")
    started = time.process_time()
    sources = Run(tmp_path).sources
    assert (len(sources), sources[-1].step) == (2000, 2000)
    assert time.process_time() - started < 20
