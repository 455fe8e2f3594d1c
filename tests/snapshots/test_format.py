"""The format as its specification tells it: an independent reader, and safetensors' own, agree with ours.

`read_by_the_book` is written from the docstring of posthoc_cli/snapshots/format.py alone.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import xxhash
from factories import OTHER_RUN_ID, RUN_ID, exact_gamma, make_info, read_snapshot, write_snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.reconstruction import Distance, Measurements, Motion
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.headers import decode_header
from posthoc_cli.snapshots.outputs import OutputInfo, decode_output, output_metadata
from posthoc_cli.snapshots.tensors import stored_name, tensor_bytes
from posthoc_cli.snapshots.writer import TensorFileWriter

BLOCK = 4_194_304
NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


@dataclass
class Book:
    """What `read_by_the_book` found: metadata, tensors (BF16 as its bits), and where they begin in the file."""

    metadata: dict[str, str]
    tensors: dict[str, np.ndarray]
    dtypes: dict[str, str]
    offsets: dict[str, int]


def read_by_the_book(path: Path) -> Book:
    """Read a file by the specification, and assert everything that it promises."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__")
    assert length % 8 == 0
    assert length <= 100_000_000

    mark = b'"ema.checksum":"'
    assert data[: 8 + length].count(mark) == 1
    digits = data.index(mark) + len(mark)
    blank = data[:digits] + b"0" * 16 + data[digits + 16 : 8 + length]
    assert metadata["ema.checksum"] == f"{xxhash.xxh3_64_intdigest(blank, seed=0):016x}"

    found, position = Book(metadata, {}, {}, {}), 0
    checksums = json.loads(metadata["ema.checksums"])
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == position
        position = end
        blocks = [payload[b : min(b + BLOCK, end)] for b in range(begin, end, BLOCK)]
        assert checksums[name] == "".join(f"{xxhash.xxh3_64_intdigest(block):016x}" for block in blocks)
        dtype = np.dtype(NUMPY_DTYPES[entry["dtype"]])
        found.tensors[name] = np.frombuffer(payload[begin:end], dtype).reshape(entry["shape"])
        found.dtypes[name], found.offsets[name] = entry["dtype"], 8 + length + begin
    assert position == len(payload)
    return found


def every_dtype() -> dict[str, torch.Tensor]:
    """A tensor of each dtype that NumPy or torch can name, with its extremes; 0-d, empty and transposed ones."""
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    tensors = {
        str(d): torch.tensor([0.0, -0.0, torch.finfo(d).max, torch.finfo(d).tiny, 1 / 3], dtype=d) for d in floats
    }
    tensors |= {str(d): torch.tensor([torch.iinfo(d).min, 1, torch.iinfo(d).max], dtype=d) for d in whole}
    return tensors | {
        "torch.bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(3, 0, 2),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }


def as_bits(tensor: torch.Tensor) -> np.ndarray:
    """The same as NumPy sees it; BF16, which NumPy lacks, as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# --- readers of the format agree


def test_a_reader_written_from_the_specification_finds_every_tensor_and_checksum(tmp_path: Path) -> None:
    tensors = every_dtype()
    book = read_by_the_book(write_snapshot(tmp_path, 10, 0.05, RUN_ID, tensors))
    assert book.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert book.dtypes[name] == stored_name(tensor.dtype)
        assert np.array_equal(book.tensors[name], as_bits(tensor))


def test_a_tensor_above_a_block_has_a_checksum_for_each_of_its_blocks(tmp_path: Path) -> None:
    large = torch.arange(2 * BLOCK // 4 + 3, dtype=torch.float32)
    book = read_by_the_book(write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"large": large}))
    assert len(json.loads(book.metadata["ema.checksums"])["large"]) == 3 * 16
    assert np.array_equal(book.tensors["large"], large.numpy())


def test_every_tensor_is_aligned_to_its_item_size(tmp_path: Path) -> None:
    book = read_by_the_book(write_snapshot(tmp_path, 10, 0.05, RUN_ID, every_dtype()))
    for name, offset in book.offsets.items():
        assert offset % np.dtype(NUMPY_DTYPES[book.dtypes[name]]).itemsize == 0


def test_safetensors_reads_our_files_to_the_same_tensors(tmp_path: Path) -> None:
    tensors = every_dtype()
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, tensors)
    by_torch = safetensors.torch.load_file(path)
    assert by_torch.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert by_torch[name].dtype == tensor.dtype
        assert np.array_equal(as_bits(by_torch[name]), as_bits(tensor))
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
        assert opened.get_slice("transposed")[1:].tolist() == tensors["transposed"][1:].tolist()


def test_the_numpy_reader_of_safetensors_reads_our_files_to_the_same_arrays(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in every_dtype().items() if tensor.dtype != torch.bfloat16}
    by_numpy = safetensors.numpy.load_file(write_snapshot(tmp_path, 10, 0.05, RUN_ID, tensors))
    assert by_numpy.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(by_numpy[name], tensor.numpy())


# --- what the metadata says


def test_the_metadata_of_a_snapshot_is_what_the_specification_lists(tmp_path: Path) -> None:
    values = {"w": torch.zeros(2, dtype=torch.float16), "seen": torch.tensor(3)}
    path = write_snapshot(
        tmp_path, 1234.5, 0.1, RUN_ID, values,
        t_unit="images", step=77, t_first=0.1, max_interval=32.5, aliases={"tied": "w"}, left_out=("frozen",),
        tensors={"w": fmt.TrackedTensor("average", "BF16"), "seen": fmt.TrackedTensor("copy", "I64")},
        schedule=fmt.TrackingSchedule(5, 10, 15, None, "F16"), sigma_rels=(0.1, 0.28),
        clock=((3, 0.1), (77, 1234.5)),
        measurements=Measurements(
            1 / 3, 1e-9, (Distance(1234.5, 0.28, 0.5, 0.0), Distance(999.0, 0.1, 2.0, 1e-9)), 0.25
        ),
        motion=Motion(np.array([0.1, 600.0, 1234.5]), np.array([2.0, 0.5]), np.array([0.0, 1e-3])),
    )  # fmt: skip
    metadata = read_by_the_book(path).metadata
    assert {key: value for key, value in metadata.items() if not key.startswith("ema.checksum")} == {
        "format": "pt",
        "ema.format": "snapshot",
        "ema.version": "1",
        "ema.run_id": RUN_ID,
        "ema.sigma_rel": "0.1",
        "ema.gamma": repr(exact_gamma(0.1)),
        "ema.sigma_rels": "[0.1,0.28]",
        "ema.t": "1234.5",
        "ema.t_unit": "images",
        "ema.step": "77",
        "ema.clock": "[[3,0.1],[77,1234.5]]",
        "ema.t_first": "0.1",
        "ema.max_interval": "32.5",
        "ema.schedule": (
            '{"update_every":5,"checkpoint_every":10,"update_after_step":15,'
            '"max_checkpoints":null,"checkpoint_dtype":"F16","sigma_range":[0.05,0.28]}'
        ),
        "ema.tensors": '{"w":{"role":"average","dtype":"BF16"},"seen":{"role":"copy","dtype":"I64"}}',
        "ema.aliases": '{"tied":"w"}',
        "ema.left_out": '["frozen"]',
        "ema.measurements": (
            '{"norm":0.3333333333333333,"rounding":1e-09,"distances":['
            '{"t":1234.5,"sigma_rel":0.28,"squared":0.5,"rounding":0.0},'
            '{"t":999.0,"sigma_rel":0.1,"squared":2.0,"rounding":1e-09}],"weights":0.25}'
        ),
        "ema.motion": '{"edges":[0.1,600.0,1234.5],"walk":[2.0,0.5],"noise":[0.0,0.001]}',
    }


names = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda n: n != "__metadata__"
)
times = st.floats(1e-9, 1e18)


@settings(deadline=None)
@given(
    tensor_names=st.lists(names, min_size=2, max_size=4, unique=True),
    t=times,
    early=st.floats(1e-6, 0.999),
    known=st.booleans(),
    interval=st.floats(0, 1),
    sigma_rel=st.floats(1e-3, 0.288).filter(lambda s: s != 0.28),
    step=st.integers(2, 10**18 - 1),
    unit=names.filter(str.isprintable),
    sums=st.none() | st.lists(st.just(0.0) | st.floats(1e-100, 1e100), min_size=4, max_size=4),
)
def test_what_a_snapshot_says_comes_back_exactly(
    tensor_names: list[str],
    t: float,
    early: float,
    known: bool,
    interval: float,
    sigma_rel: float,
    step: int,
    unit: str,
    sums: list[float] | None,
) -> None:
    measurements = None
    if sums is not None:
        distances = (Distance(t, 0.2885, sums[2], 0.0), Distance(early * t, 0.28, sums[2], sums[3]))
        measurements = Measurements(sums[0], sums[1], distances, sums[3] if known else None)
    alias, *stored = tensor_names
    values = {name: torch.zeros(1) for name in stored}
    info = make_info(
        values, t, sigma_rel, OTHER_RUN_ID, step=step, t_first=t * early, max_interval=t * interval, t_unit=unit,
        aliases={alias: stored[0]}, left_out=tuple(tensor_names), measurements=measurements,
        sigma_rels=tuple(sorted({sigma_rel, 0.28, 0.2885})), clock=((step // 2, t * early), (step, t)) if known else (),
    )  # fmt: skip
    entries = fmt.lay_out([fmt.TensorSpec(name, "F32", (1,)) for name in stored])
    start = fmt.encode_header(entries, fmt.snapshot_metadata(info), dict.fromkeys(stored, "0" * 16))
    header = decode_header(Path("x"), start, len(start) + 4 * len(stored))
    assert decode_snapshot(Path("x"), header) == info


@pytest.mark.parametrize("predicted_error", [None, 1.5e-4])
def test_what_an_output_says_comes_back_exactly(predicted_error: float | None) -> None:
    info = OutputInfo(
        RUN_ID, "sigma_rel 0.15", 0.15, exact_gamma(0.15), 1e15 / 3, "tokens", "paper", 1e-3, predicted_error,
        (("a.safetensors", 1 / 3), ("b.safetensors", -2e-17)), ("norm.running_mean",),
    )  # fmt: skip
    start = fmt.encode_header({}, output_metadata(info), {})
    assert decode_output(Path("x"), decode_header(Path("x"), start, len(start))) == info


def test_names_that_look_like_the_format_itself_do_no_harm(tmp_path: Path) -> None:
    tricky = [
        "ema.checksum",
        '"ema.checksum":"',
        '","x":"',
        "ema.checksums",
        "../../x",
        "line\nbreak\x01\x1b[31m",
        "ß→𝛾",
    ]
    values = {name: torch.full((2,), float(k)) for k, name in enumerate(tricky)}
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, values)
    assert {name: array.tolist() for name, array in read_by_the_book(path).tensors.items()} == {
        name: [float(k)] * 2 for k, name in enumerate(tricky)
    }
    assert safetensors.torch.load_file(path).keys() == values.keys()


# --- what cannot be written


def write(path: Path, specs: list[fmt.TensorSpec], metadata: dict[str, str]) -> None:
    with TensorFileWriter(path, specs, metadata) as writer:
        for spec in specs:
            writer.write(spec.name, tensor_bytes(torch.zeros(spec.shape)))
        writer.commit()


@pytest.mark.parametrize("specs", [["a", "a"], ["__metadata__"]])
def test_a_name_that_is_taken_is_refused(tmp_path: Path, specs: list[str]) -> None:
    with pytest.raises(InvalidValueError, match="must be unique"):
        write(tmp_path / "a.safetensors", [fmt.TensorSpec(name, "F32", (1,)) for name in specs], {})
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_text_is_refused_in_a_short_message(tmp_path: Path) -> None:
    specs = [fmt.TensorSpec(name, "F32", (1,)) for name in ("x" * 10_000, "half \ud800 a pair")]
    with pytest.raises(InvalidValueError, match=r"half .*ud800") as caught:
        write(tmp_path / "a.safetensors", specs, {})
    assert len(str(caught.value)) < 200
    assert not list(tmp_path.iterdir())


def test_a_header_that_readers_would_refuse_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="100,000,000"):
        write(tmp_path / "a.safetensors", [], {"note": "x" * 100_000_000})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_is_never_written(number: float) -> None:
    info = OutputInfo(RUN_ID, "sigma_rel 0.1", 0.1, 7.0, 1.0, "steps", "paper", 0.0, None, (("a", number),))
    with pytest.raises(ValueError, match="JSON"):
        output_metadata(info)


# --- words for dtypes


@pytest.mark.parametrize(
    ("word", "name"),
    [("float32", "F32"), ("fp32", "F32"), ("bf16", "BF16"), ("fp16", "F16"), ("float64", "F64"), ("keep", None)],
)
def test_the_words_for_dtypes(word: str, name: str | None) -> None:
    assert parse_dtype(word) == name


@pytest.mark.parametrize("word", ["int8", "half", "F32", ""])
def test_another_word_is_refused_with_those_that_are_accepted(word: str) -> None:
    with pytest.raises(InvalidValueError, match=r"float16.*keep"):
        parse_dtype(word)


def test_checksums_are_those_of_xxh3_over_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmt, "BLOCK_BYTES", 4)
    expected: list[Any] = [f"{xxhash.xxh3_64_intdigest(part):016x}" for part in (b"abcd", b"efgh", b"i")]
    assert fmt.block_checksums(b"abcdefghi") == expected
    assert len(fmt.blank_checksums(9)) == 3 * 16
    assert fmt.block_checksums(b"") == []
    # The value that xxHash's own test vectors give for no input, so that "XXH3, 64 bits, seed 0" is pinned.
    assert xxhash.xxh3_64_hexdigest(b"") == "2d06800538d394c2"


@pytest.mark.parametrize("where", ["tensors", "aliases", "left_out"])
def test_a_name_with_a_zero_byte_is_refused_before_a_file_appears(tmp_path: Path, where: str) -> None:
    values = {"a\0" if where == "tensors" else "a": torch.ones(1)}
    others = {"tensors": {}, "aliases": {"aliases": {"b\0": "a"}}, "left_out": {"left_out": ("b\0",)}}[where]
    with pytest.raises(InvalidValueError, match="zero byte"):
        write_snapshot(tmp_path, 10, 0.05, RUN_ID, values, **others)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sums", [(5e-324, 1.0), (1e308, 1.0), (1.0, 1e200)])
def test_measurements_too_far_from_1_to_reckon_with_are_read_as_none(sums: tuple[float, float]) -> None:
    """Of float64 weights of 1e100 and more, say: the snapshot is as good as any other."""
    info = make_info({"a": torch.ones(1)}, measurements=Measurements(*sums, ()))
    path = Path("x")
    entries = fmt.lay_out([fmt.TensorSpec("a", "F32", (1,))])
    start = fmt.encode_header(entries, fmt.snapshot_metadata(info), {"a": "0" * 16})
    assert decode_snapshot(path, decode_header(path, start, len(start) + 4)).measurements is None


def test_updates_and_inherited_error_come_back_and_may_be_missing(tmp_path: Path) -> None:
    values = {"a": torch.zeros(2)}
    path = write_snapshot(tmp_path / "with", 8, 0.1, RUN_ID, values, updates=3, inherited=1.0 / 3)
    assert (read_snapshot(path).info.updates, read_snapshot(path).info.inherited) == (3, 1.0 / 3)
    path = write_snapshot(tmp_path / "without", 8, 0.1, RUN_ID, values)
    assert (read_snapshot(path).info.updates, read_snapshot(path).info.inherited) == (None, 0.0)
    assert {"ema.updates", "ema.inherited"}.isdisjoint(read_snapshot(path).header.metadata)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("updates", "0", r"ema\.updates: 0 must lie in \[1, 8\]"),
        ("updates", "9", r"ema\.updates: 9 must lie in \[1, 8\]"),
        ("updates", "-1", r"ema\.updates: must be a whole number, at least 0, not -1"),
        ("inherited", "-0.5", r"ema\.inherited: must be a finite number, at least 0, not -0\.5"),
        ("inherited", "nan", r"damaged ema\.inherited"),
        ("inherited", "1e999", r"ema\.inherited: must be a finite number, at least 0, not inf"),
        ("off_schedule", "yes", r"ema\.off_schedule: must be true, not 'yes'"),
    ],
)
def test_optional_values_that_cannot_be_are_refused(tmp_path: Path, field: str, value: str, message: str) -> None:
    path = write_snapshot(tmp_path, 8, 0.1, RUN_ID, {"a": torch.zeros(2)})
    header = read_snapshot(path).header
    with pytest.raises(FileFormatError, match=message):
        decode_snapshot(path, replace(header, metadata=header.metadata | {f"ema.{field}": value}))


def test_a_snapshot_says_whether_it_is_off_the_schedule(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, 8, 0.1, RUN_ID, {"a": torch.zeros(2)}, off_schedule=True)
    assert read_snapshot(path).info.off_schedule
