"""Damage and malice end in a FileFormatError that names the file, before a value is used."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from factories import RUN_ID, exact_gamma, read_snapshot, write_snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, VanishedError
from posthoc_cli.reconstruction import Distance, Measurements
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.headers import decode_header, file_kind
from posthoc_cli.snapshots.outputs import OutputInfo, decode_output, output_metadata
from posthoc_cli.snapshots.reader import TensorFile, read_header, read_small_file
from posthoc_cli.snapshots.tensors import tensor_bytes, tensor_from_bytes
from posthoc_cli.snapshots.writer import TensorFileWriter

BLOCK = 4_194_304
VALUES = {"a": torch.tensor([1.0, -2.5]), "b": torch.tensor([7], dtype=torch.int16)}


def small_snapshot(directory: Path) -> Path:
    return write_snapshot(
        directory, 10, 0.05, RUN_ID, VALUES, aliases={"tied": "a"}, left_out=("frozen",), sigma_rels=(0.05, 0.28),
        measurements=Measurements(7.25, 1e-7, (Distance(10.0, 0.28, 0.5, 0.0), Distance(5.0, 0.05, 0.25, 1e-8))),
    )  # fmt: skip


def small_output(directory: Path) -> Path:
    info = OutputInfo(
        RUN_ID,
        "sigma_rel 0.1",
        0.1,
        exact_gamma(0.1),
        10.0,
        "steps",
        "paper",
        1e-3,
        None,
        (("x.safetensors", 1.0),),
        ("b",),
    )
    path = directory / "output.safetensors"
    specs = [fmt.TensorSpec("a", "F32", (2,)), fmt.TensorSpec("b", "I16", (1,))]
    with TensorFileWriter(path, specs, output_metadata(info)) as writer:
        for name, value in VALUES.items():
            writer.write(name, tensor_bytes(value))
        writer.commit()
    return path


def read_everything(path: Path) -> tuple[object, dict[str, bytes]]:
    """All that a file says and holds."""
    with TensorFile(path) as file:
        kinds: dict[str | None, Callable[..., object]] = {
            "snapshot": decode_snapshot,
            "output": decode_output,
        }
        info = kinds[file_kind(file.header)](path, file.header)
        return info, {name: file.read(name).tobytes() for name in file.header.tensors}


# --- accidents


def test_a_file_that_shrinks_under_a_reader_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = small_snapshot(tmp_path)
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FileFormatError, match=r"'b': the file became shorter"):
            file.read("b")


def test_a_file_that_shrinks_while_its_header_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = small_snapshot(tmp_path), files.system.read
    monkeypatch.setattr(files.system, "read", lambda file, view, at: real(file, view, at) if at == 0 else 0)
    with pytest.raises(FileFormatError, match="became shorter"):
        read_header(path)


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_disk_that_cannot_read_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """The header's length, the header, a tensor."""
    path, real, calls = small_snapshot(tmp_path), files.system.read, iter(range(1, 99))

    def fail(descriptor: int, view: memoryview, offset: int) -> int:
        if next(calls) == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, view, offset)

    monkeypatch.setattr(files.system, "read", fail)
    with pytest.raises(FileFormatError, match="cannot be read: input/output error") as caught:
        read_everything(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("read", [read_header, lambda path: read_small_file(path, 10**6)])
def test_whoever_reads_says_what_could_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    path = small_snapshot(tmp_path)

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(files.system, "read", refuse)
        with pytest.raises(FileFormatError, match=rf"^{path}: cannot be read: input/output error$"):
            read(path)
    path.unlink()
    with pytest.raises(VanishedError, match=rf"^{path}: cannot be opened: no such file or directory$"):
        read(path)


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [
        (errno.ENOENT, VanishedError, "no such file or directory"), (errno.ESTALE, VanishedError, "stale file handle"),
        (errno.EACCES, FileFormatError, "permission denied"),
        (errno.EMFILE, FileFormatError, "too many open files; raise"),
    ],
)  # fmt: skip
def test_why_a_file_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, code: int, kind: type[FileFormatError], told: str
) -> None:
    def refuse(_: Path) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.system, "open", refuse)
    with pytest.raises(FileFormatError) as caught:
        read_header(Path("x"))
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"x: cannot be opened: {told}")
    assert ("raise the limit" in str(caught.value)) == (code == errno.EMFILE)


def test_a_part_of_a_tensor_is_read_as_it_is(tmp_path: Path) -> None:
    with TensorFile(small_snapshot(tmp_path)) as file:
        assert file.read_unverified("a", 4, 8).tobytes() == struct.pack("<f", -2.5)
        assert file.read_unverified("b", 0, 2).tobytes() == struct.pack("<h", 7)
        assert file.read_unverified("b", 1, 1).size == 0


def test_a_file_that_was_replaced_since_it_was_planned_with_is_refused(tmp_path: Path) -> None:
    planned = read_snapshot(small_snapshot(tmp_path))
    planned.path.unlink()
    write_snapshot(tmp_path, 10, 0.05, RUN_ID, {**VALUES, "a": VALUES["a"] + 1}, name=planned.path.name)
    with pytest.raises(FileFormatError, match="was replaced"):
        TensorFile(planned.path, planned.header)
    TensorFile(planned.path).close()


@pytest.mark.parametrize("make", [small_snapshot, small_output])
def test_a_file_of_another_content_and_the_same_size_was_replaced(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Also one whose header has the same checksum written in it, wrongly."""
    path = make(tmp_path)
    header = read_header(path)
    TensorFile(path, header).close()
    start = bytearray(path.read_bytes())
    other = start.replace(b'"ema.t":"10.0"', b'"ema.t":"11.0"')
    assert other != start
    path.write_bytes(other)
    with pytest.raises(FileFormatError, match="damaged header: its checksum does not match"):
        TensorFile(path, header)
    digits = other.index(fmt.CHECKSUM_MARK) + len(fmt.CHECKSUM_MARK)
    other[digits : digits + 16] = b"0" * 16
    length = 8 + int.from_bytes(other[:8], "little")
    other[digits : digits + 16] = xxhash.xxh3_64_hexdigest(bytes(other[:length])).encode()
    path.write_bytes(other)
    assert read_header(path).file_bytes == header.file_bytes
    with pytest.raises(FileFormatError, match="was replaced while it was being used"):
        TensorFile(path, header)


# --- what is no file


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_dangling(path: Path) -> None:
    path.symlink_to("missing")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "not a regular file"),
        (make_fifo, "not a regular file"),
        (make_dangling, "no such file"),
        (make_loop, "symbolic link"),
        (Path.touch, "truncated"),
    ],
)
def test_something_else_in_place_of_a_file_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / "x")
    with pytest.raises(FileFormatError, match=reason):
        read_header(tmp_path / "x")


def test_a_path_that_no_system_accepts_is_refused() -> None:
    with pytest.raises(FileFormatError, match="cannot be opened"):
        read_header(Path("a\0b"))


# --- headers that lie


def craft(path: Path, header: bytes | Any, payload: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of exactly this header, without checksums, as a stranger may make it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)
    return path


def entry(begin: Any = 0, end: Any = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


PLAIN = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (b'{"a":%b,"a":%b}' % (PLAIN, PLAIN), 4),
        (b'{"__metadata__":{"k":"1","k":"1"},"a":%b}' % PLAIN, 4),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6),  # overlap
        ({"a": entry(0, 4), "b": entry(2, 6)}, 8),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 8),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12),  # gap
        ({"a": entry(4, 8)}, 8),
        ({"a": entry(4, 0)}, 4),
        ({"a": entry(-4, 0)}, 0),
        ({"a": entry(False, 4)}, 4),
        ({"a": entry(0, True, "U8")}, 1),
        ({"a": entry(0.0, 4.0)}, 4),
        ({"a": entry("0", "4")}, 4),
        ({"a": entry(2**63, 2**63 + 4)}, 4),
        ({"a": entry(0, 4, shape=[-1])}, 4),
        ({"a": entry(0, 4, shape=[-1, -1])}, 4),
        ({"a": entry(0, 1, "U8", shape=[True])}, 1),
        ({"a": entry(0, 4, shape=[1.0])}, 4),
        ({"a": entry(0, 4, shape=[2])}, 4),
        ({"a": entry(0, 4, shape=[2**62, 2**62])}, 4),
        ({"a": entry(0, 0, shape=[0, 2**62, 2**62])}, 0),
        ({"a": entry(0, 4, shape=[1] * 65)}, 4),
        ({"a": entry(0, 4, shape=1)}, 4),
        ({"a": entry(0, 4, "F13")}, 4),
        ({"a": entry(0, 4, ["F32"])}, 4),
        ({"a": entry(0, 4, None)}, 4),
        ({"a": {**entry(), "extra": 1}}, 4),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4),
        ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, 4),
        ({"a": None}, 0),
        ({"a": [0, 4]}, 0),
        ({"a": entry(0, 10 * 2**30, shape=[10 * 2**28])}, 900),
        ({"__metadata__": {"k": 1}}, 0),
        ({"__metadata__": []}, 0),
        ({"__metadata__": None}, 0),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}', 4),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%b]}}' % (b"9" * 5000), 4),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, 0),
        (b"[]", 0),
        (b"null", 0),
        (b"", 0),
        (b"{", 0),
        (b"{}{}", 0),
        (b"{'a':1}", 0),
        (b"\xff\xfe{}", 0),
        (b"\xef\xbb\xbf{}", 0),
        (b'{"\xc3\x28":%b}' % PLAIN, 4),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, size: int) -> None:
    path = craft(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(FileFormatError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [3, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_cannot_be_is_refused_before_anything_is_allocated(tmp_path: Path, length: int) -> None:
    path = craft(tmp_path / "x.safetensors", b"{}", length=length)
    if length == 10**8 + 1:
        os.truncate(path, 2 * length)  # the header would fit; the rest of the file is a hole
    with pytest.raises(FileFormatError, match=f"header would take {length:,} bytes"):
        read_header(path)


def test_foreign_files_of_safetensors_itself_are_read(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 2), "n": torch.tensor(5), "e": torch.empty(0, 2), "h": torch.ones(3).bfloat16()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        for name, tensor in tensors.items():
            found = file.header.tensors[name]
            assert torch.equal(tensor_from_bytes(file.read(name), found.dtype, found.shape), tensor)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\nb", "\x1b[31mred", "nul\0", "\ud800"])
def test_a_name_is_never_a_path_and_is_shown_escaped(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = craft(folder / "x.safetensors", {name: entry(0, 8)}, bytes(8))
    with pytest.raises(FileFormatError) as caught:
        read_header(path)
    assert repr(name) in str(caught.value)
    assert all(character.isprintable() for character in str(caught.value))
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "x.safetensors"]


# --- metadata that lies, under a checksum that is right


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the header (metadata in "__metadata__") of a file of ours, and make its checksum right again."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    metadata = header["__metadata__"]
    if "ema.checksum" in metadata:
        metadata["ema.checksum"] = "0" * 16
    text = json.dumps(header, separators=(",", ":")).encode()
    blank = struct.pack("<Q", len(text)) + text
    right = xxhash.xxh3_64_hexdigest(blank).encode()
    mark = b'"ema.checksum":"'
    path.write_bytes(blank.replace(mark + b"0" * 16, mark + right) + data[8 + length :])
    return path


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["__metadata__"].update({key: value})


def set_entry(key: str, name: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    """Change one object in a metadata value that is JSON."""

    def change(header: dict[str, Any]) -> None:
        value = json.loads(header["__metadata__"][key])
        value[name] = {**value.get(name, {}), **fields}
        header["__metadata__"][key] = json.dumps(value)

    return change


def test_forging_alone_changes_nothing(tmp_path: Path) -> None:
    path = small_snapshot(tmp_path)
    before = read_everything(path)
    assert read_everything(forge(path, lambda _: None)) == before


SNAPSHOT_KEYS = [
    "ema.version", "ema.run_id", "ema.sigma_rel", "ema.gamma", "ema.sigma_rels", "ema.t", "ema.t_unit", "ema.step",
    "ema.t_first", "ema.max_interval", "ema.schedule", "ema.tensors", "ema.aliases", "ema.left_out", "ema.checksums",
    "ema.checksum",
]  # fmt: skip
OUTPUT_KEYS = [
    "ema.version", "ema.run_id", "ema.sigma_rel", "ema.gamma", "ema.t", "ema.t_unit", "ema.method",
    "ema.profile_error", "ema.predicted_error", "ema.snapshots", "ema.copies", "ema.checksums", "ema.checksum",
]  # fmt: skip
BOTH_KINDS = [(small_snapshot, key) for key in SNAPSHOT_KEYS] + [(small_output, key) for key in OUTPUT_KEYS]


@pytest.mark.parametrize(("make", "key"), BOTH_KINDS)
def test_a_missing_key_is_named(tmp_path: Path, make: Callable[[Path], Path], key: str) -> None:
    path = forge(make(tmp_path), lambda header: header["__metadata__"].pop(key))
    with pytest.raises(FileFormatError, match=key if key != "ema.checksum" else "has no checksum"):
        read_everything(path)


NUMBERS = ["", "x", "nan", "inf", "-inf", "1e999", "--1", "0x10", "1,5"]
WHOLE = ["", "1.5", "-1", "1e3", "\u0663", "9" * 20, "nan"]
OBJECTS = ["", "{", "[]", "null", "1", '{"a":1,"a":1}', "{'a':1}", "[" * 10**5, '"\ud800"', "NaN"]
LISTS = ["", "{", "{}", "null", "[" * 10**5, "[1]", '[["a"]]', '[{"a":1}]', "[null]", '["\ud800', "[NaN]"]


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [(small_snapshot, key, v) for key in ("ema.sigma_rel", "ema.gamma", "ema.t", "ema.t_first") for v in NUMBERS]
    + [(small_snapshot, "ema.step", value) for value in WHOLE]
    + [(small_snapshot, key, v) for key in ("ema.schedule", "ema.tensors", "ema.aliases") for v in OBJECTS]
    + [(small_snapshot, "ema.measurements", value) for value in OBJECTS]
    + [(small_snapshot, "ema.clock", value) for value in LISTS]
    + [(small_snapshot, key, value) for key in ("ema.left_out", "ema.sigma_rels") for value in LISTS]
    + [(small_output, key, value) for key in ("ema.snapshots", "ema.copies") for value in LISTS]
    + [(small_output, key, value) for key in ("ema.profile_error", "ema.predicted_error") for value in NUMBERS],
)  # fmt: skip
def test_a_value_that_is_malformed_is_named(tmp_path: Path, make: Callable[[Path], Path], key: str, value: str) -> None:
    path = forge(make(tmp_path), set_key(key, value))
    with pytest.raises(FileFormatError, match=key) as caught:
        read_everything(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert all(character.isprintable() for character in str(caught.value))


@pytest.mark.parametrize(
    "change",
    [
        set_key("ema.version", "2"),
        set_key("ema.run_id", "short"),
        set_key("ema.run_id", "\x1b[31m" + "0" * 27),
        set_key("ema.sigma_rel", "0.2887"),
        set_key("ema.sigma_rel", "-0.1"),
        set_key("ema.sigma_rel", "1e-320"),
        set_key("ema.gamma", "16.9"),
        set_key("ema.t", "-10"),
        set_key("ema.t", "0.5"),  # before the first update, at 1
        set_key("ema.t_first", "0"),
        set_key("ema.step", "0"),
        set_key("ema.max_interval", "-1"),
        set_key("ema.max_interval", "10.5"),
        set_key("ema.schedule", '{"update_every":1}'),
        set_key("ema.schedule", json.dumps({**vars(fmt.TrackingSchedule()), "update_every": True})),
        set_key("ema.schedule", json.dumps({**vars(fmt.TrackingSchedule()), "update_every": None})),
        set_key("ema.schedule", json.dumps({**vars(fmt.TrackingSchedule()), "max_checkpoints": 1.0})),
        set_key("ema.schedule", json.dumps({**vars(fmt.TrackingSchedule()), "checkpoint_dtype": "F13"})),
        set_key("ema.schedule", json.dumps({**vars(fmt.TrackingSchedule()), "checkpoint_dtype": ["F16"]})),
        set_key("ema.tensors", "{}"),
        set_key("ema.aliases", '{"tied":"missing"}'),
        set_key("ema.aliases", '{"a":"b"}'),
        set_key("ema.aliases", '{"tied":["a"]}'),
        set_key("ema.aliases", '{"tied":null}'),
        set_entry("ema.tensors", "a", role="sum"),
        set_entry("ema.tensors", "a", role=["average"]),
        set_entry("ema.tensors", "a", dtype="F13"),
        set_entry("ema.tensors", "a", dtype="I64"),  # an average of whole numbers
        set_entry("ema.tensors", "b", role="average"),
        set_entry("ema.tensors", "b", dtype="F16"),  # a copy of another dtype than its bytes
        set_entry("ema.tensors", "c", role="copy", dtype="F32"),
        set_key("ema.checksums", "{}"),
        set_key("ema.checksums", "[]"),
        set_key("ema.checksums", '{"a":1,"b":1}'),
        set_key("ema.checksums", json.dumps({"a": "0" * 32, "b": "0" * 16})),
        set_key("ema.checksums", json.dumps({"a": "0" * 16, "b": "0" * 16})),
        set_key("ema.checksums", '"\ud800"'),
        set_key("ema.format", "output"),
        set_key("ema.format", "elsewhere"),
    ],
)  # fmt: skip
def test_a_snapshot_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = forge(small_snapshot(tmp_path), change)
    with pytest.raises(FileFormatError) as caught, TensorFile(path) as file:
        decode_snapshot(path, file.header)
        for name in file.header.tensors:
            file.read(name)
    assert str(caught.value).startswith(f"{path}: ")
    assert all(character.isprintable() for character in str(caught.value))


def measured(**changes: Any) -> str:
    """The measurements of `small_snapshot`, but for `changes`; those of its distances as `distance_...`."""
    raw: dict[str, Any] = {"norm": 7.25, "rounding": 1e-7}
    distance: dict[str, Any] = {"t": 10.0, "sigma_rel": 0.28, "squared": 0.5, "rounding": 0.0}
    distance |= {key.removeprefix("distance_"): changes.pop(key) for key in list(changes) if "distance_" in key}
    return json.dumps({**raw, "distances": [distance, {**distance, "t": 5.0, "sigma_rel": 0.05}], **changes})


DISTANCE = {"t": 10.0, "sigma_rel": 0.28, "squared": 0.5, "rounding": 0.0}


def motion(**changes: Any) -> str:
    return json.dumps({"edges": [1, 5, 10], "walk": [2, 0.5], "noise": [0, 1e-3], **changes})


IMPOSSIBLE = {
    "ema.measurements": [
        (measured(norm=-1), "norm -1 must be a finite number, at least 0"),
        (measured(norm=True), "norm True"),
        (measured(norm="1"), "norm '1' must"),
        (measured(norm=None), "norm None"),
        (measured(rounding=10**400), "rounding an int of many digits"),
        (measured(norm=1).replace("1,", "1e999,", 1), "norm inf"),
        (measured(norm=float("nan")), "NaN is not JSON"),
        (measured(distance_squared=-1e-300), "squared -1e-300"),
        (measured(distance_rounding=float("inf")), "Infinity is not JSON"),
        (measured(distance_t=10.5), "t 10.5: must lie in [1, 10]"),
        (measured(distance_t=0), "t 0: must lie in [1, 10]"),
        (measured(distance_t=-1), "t -1"),
        (measured(distance_t=[1]), "t a list"),
        (measured(distance_sigma_rel=0.1), "sigma_rel 0.1, none of the tracked 0.05, 0.28"),
        (measured(distance_sigma_rel=0.05), "the snapshot itself, sigma_rel 0.05 at t = 10"),
        (measured(distance_extra=1), "must have t, sigma_rel, squared, rounding, and nothing else"),
        (measured(extra=1), "must have norm, rounding, and nothing else"),
        (measured(arithmetic=-1), "arithmetic -1 must be a finite number, at least 0"),
        (measured(distances=[DISTANCE, DISTANCE]), "the same t and sigma_rel twice"),
        (measured(distances=[{**DISTANCE, "t": t} for t in range(1, 7)]), "a list of at most 5 for 2 profiles"),
        (measured(distances={}), "distances must be a list"),
        (measured(distances=[1]), "must have t, sigma_rel"),
        ('{"norm":1,"rounding":0}', "distances must be a list"),
        ('{"rounding":0,"distances":[]}', "must have norm, rounding"),
    ],
    "ema.motion": [
        (motion(walk=[-1, 1]), "walk must be a list of finite numbers, at least 0"),
        (motion(noise=[0, "1"]), "noise must be a list"),
        (motion(edges={}), "edges must be a list"),
        (motion(walk=[1, 10**400]), "walk must be a list"),
        (motion(extra=1), "must have edges, walk, noise, and nothing else"),
        (motion(walk=[1]), "must have 1 to 1,000 values of walk, as many of noise, and one more"),
        (motion(noise=[1, 1, 1]), "must have 1 to 1,000 values"),
        (motion(edges=[1, 10]), "must have 1 to 1,000 values"),
        (motion(edges=[1], walk=[], noise=[]), "must have 1 to 1,000 values"),
        (motion(edges=[*range(1, 1003)], walk=[1] * 1001, noise=[0] * 1001), "must have 1 to 1,000 values"),
        (motion(edges=[0, 5, 10]), "must grow from above 0 to at most 10"),
        (motion(edges=[1, 5, 11]), "must grow from above 0 to at most 10"),
        (motion(edges=[1, 1, 10]), "must grow"),
        ("[]", "is not a JSON object"),
        (motion(walk=[float("nan"), 1]), "NaN is not JSON"),
    ],
    "ema.sigma_rels": [
        ("[]", "is not a list of numbers"),
        ("[true]", "is not a list of numbers"),
        ("[0.28,0.05]", "must grow, each profile once"),
        ("[0.05,0.05,0.28]", "must grow, each profile once"),
        ("[0.05,0.3]", "sigma_rel 0.3: must lie in (0, 0.2887)"),
        ("[0.1,0.28]", "0.1, 0.28 must include the snapshot's own 0.05"),
        (
            "[0.1,0.11,0.12,0.13,0.14,0.15,0.16,0.17]",
            ": 0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17 must include the snapshot's own 0.05",
        ),
        (
            "[0.1,0.11,0.12,0.13,0.14,0.15,0.16,0.17,0.18]",
            ": 0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, ... must include the snapshot's own 0.05",
        ),
    ],
    "ema.clock": [
        ("[]", "must end with the snapshot's own pair, step 10 at t = 10"),
        ("[[4,4.5]]", "must end with the snapshot's own pair"),
        ("[[10,10.5]]", "must end with the snapshot's own pair"),
        ("[[4,4.5],[10,10],[11,11]]", "must end with the snapshot's own pair"),
        ("[4,10]", "a whole step and its time, not 4"),
        ("[[4,4.5,1],[10,10]]", "a whole step and its time, not a list"),
        ("[[4.0,4.5],[10,10]]", "a whole step"),
        ("[[true,4.5],[10,10]]", "a whole step"),
        ('[[4,"4"],[10,10]]', "a whole step"),
        ("[[4,1e999],[10,10]]", "a whole step"),
        ("[[4,1" + "0" * 400 + "],[10,10]]", "a whole step"),
        ("[[4,NaN],[10,10]]", "NaN is not JSON"),
        ("[[0,0.5],[10,10]]", "must grow from above 0: step 0 at t = 0.5 comes after step 0 at t = 0"),
        ("[[-1,0.5],[10,10]]", "must grow from above 0"),
        ("[[1,0],[10,10]]", "must grow from above 0"),
        ("[[1,-1],[10,10]]", "must grow from above 0"),
        ("[[4,4.5],[4,5],[10,10]]", "step 4 at t = 5 comes after step 4 at t = 4.5"),
        ("[[4,4.5],[5,4.5],[10,10]]", "step 5 at t = 4.5 comes after step 4 at t = 4.5"),
        ("[[1" + "0" * 400 + ",4.5],[10,10]]", "must grow from above 0"),
        (json.dumps([[k, k] for k in range(1, 1002)]), "has 1,001 pairs; at most 1,000 are allowed"),
    ],
}


@pytest.mark.parametrize(("key", "text", "told"), [(key, *case) for key, cases in IMPOSSIBLE.items() for case in cases])
def test_a_value_that_cannot_be_is_refused_in_one_short_line(tmp_path: Path, key: str, text: str, told: str) -> None:
    path = forge(small_snapshot(tmp_path), set_key(key, text))
    with pytest.raises(FileFormatError) as caught:
        read_snapshot(path)
    assert caught.value.subject == str(path)
    assert key in caught.value.reason
    assert told in caught.value.reason
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) < 250


def test_a_motion_too_large_to_use_is_read_as_none(tmp_path: Path) -> None:
    forged = forge(small_snapshot(tmp_path), set_key("ema.motion", motion(walk=[1e200, 1])))
    assert read_snapshot(forged).info.motion is None


def test_a_snapshot_without_measurements_is_one_too(tmp_path: Path) -> None:
    path = forge(small_snapshot(tmp_path), lambda header: header["__metadata__"].pop("ema.measurements"))
    assert read_snapshot(path).info.measurements is None


def test_a_clock_that_can_be_is_read(tmp_path: Path) -> None:
    path = forge(small_snapshot(tmp_path), set_key("ema.clock", "[[1,7],[10,10]]"))
    assert read_snapshot(path).info.clock == ((1, 7.0), (10, 10.0))
    assert read_snapshot(small_snapshot(tmp_path / "without")).info.clock == ()
    knots = [[k, k / 2] for k in range(1, 1001)]
    path = write_snapshot(tmp_path / "long", 500, 0.05, RUN_ID, VALUES, step=1000)
    assert len(read_snapshot(forge(path, set_key("ema.clock", json.dumps(knots)))).info.clock) == 1000


@pytest.mark.parametrize(
    ("square", "usable"), [(0, True), (1e-119, True), (1e119, True), (1e-121, False), (1e121, False), (1e300, False)]
)
@pytest.mark.parametrize("which", ["norm", "rounding", "weights", "arithmetic", "distance"])
def test_measurements_of_absurd_weights_are_as_good_as_none(
    tmp_path: Path, which: str, square: float, usable: bool
) -> None:
    measured = {"norm": 1.0, "rounding": 1e-7, "weights": 1.0, "arithmetic": 0.0}
    distance = {"t": 5.0, "sigma_rel": 0.05, "squared": 0.5, "rounding": 0.0}
    if which == "distance":
        distance["squared"] = square
    else:
        measured[which] = square
    path = forge(
        small_snapshot(tmp_path), set_key("ema.measurements", json.dumps(measured | {"distances": [distance]}))
    )
    assert (read_snapshot(path).info.measurements is not None) == usable


@pytest.mark.parametrize("coefficient", ["1" * 400, "1e999", "true", '"1"', "null"])
def test_a_coefficient_that_is_no_finite_number_is_refused(tmp_path: Path, coefficient: str) -> None:
    text = f'[{{"file":"x","coefficient":{coefficient}}}]'
    path = forge(small_output(tmp_path), set_key("ema.snapshots", text))
    with pytest.raises(FileFormatError, match=r"ema\.snapshots"):
        read_everything(path)


def test_a_snapshot_without_any_metadata_is_a_foreign_file(tmp_path: Path) -> None:
    path = craft(tmp_path / "x.safetensors", {"a": entry()}, bytes(4))
    with pytest.raises(FileFormatError, match=r"not a snapshot of this package: has no ema\.format"):
        read_snapshot(path)


# --- fuzz


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just(2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=500)
@given(
    path=st.sampled_from([("a",), ("a", "dtype"), ("a", "shape"), ("a", "data_offsets"), ("new",)]), value=json_values
)
def test_any_header_of_a_stranger_is_refused_or_tiles_the_payload(path: Sequence[str], value: Any) -> None:
    header: dict[str, Any] = {"a": entry(0, 4), "b": entry(4, 8)}
    place: Any = header
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    start = bytes(8) + json.dumps(header).encode()
    try:
        found = decode_header(Path("x"), start, len(start) + 8)
    except FileFormatError as error:
        assert str(error).isprintable()
        return
    assert sum(tensor.nbytes for tensor in found.tensors.values()) == 8
