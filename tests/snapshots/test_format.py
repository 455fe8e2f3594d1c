"""The format agrees with its specification: an independent reader, and that of safetensors, read
the same.

`read_by_the_book` is written from the docstring of posthoc_cli/snapshots/tensorfile.py alone.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import xxhash
from factories import OTHER_RUN_ID, RUN_ID, exact_gamma, make_info, write_snapshot, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.snapshot import TrackingSchedule, decode_snapshot
from posthoc_cli.snapshots.tensorfile import read_file

BLOCK = 131_072
NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


@dataclass
class Book:
    """The object of the header, checksums, tensors (BF16 as bits), and offsets in the file."""

    content: dict[str, Any]
    sums: dict[str, str]
    tensors: dict[str, np.ndarray]
    offsets: dict[str, int]


def read_by_the_book(path: Path) -> Book:
    """Read a file by the specification, and check everything that it promises."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    payload = data[8 + length :]
    metadata = header.pop("__metadata__")
    assert length % 8 == 0
    assert length <= 100_000_000

    begin = data.index(metadata["ema.checksum"].encode())
    assert data[8:begin] == b'{"__metadata__":{"ema.checksum":"'
    blank = data[:begin] + b"0" * 16 + data[begin + 16 : 8 + length]
    assert metadata["ema.checksum"] == f"{xxhash.xxh3_64_intdigest(blank, seed=0):016x}"

    content = json.loads(metadata["ema"])
    sums = content.pop("sums")
    found = Book(content, {}, {}, {})
    position = 0
    at = 0
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        entry = header[name]
        dtype = np.dtype(NUMPY_DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        assert begin == position
        position = end
        data = payload[begin:end]
        own_sums = sums_of_blocks(data, BLOCK * dtype.itemsize)
        assert sums[at : at + len(own_sums)] == own_sums
        at += len(own_sums)
        found.sums[name] = own_sums
        found.tensors[name] = np.frombuffer(data, dtype).reshape(entry["shape"])
        found.offsets[name] = 8 + length + begin
    assert position == len(payload)
    assert at == len(sums)
    return found


def sums_of_blocks(data: bytes, size: int) -> str:
    sums = ""
    for begin in range(0, len(data), size):
        sums += f"{xxhash.xxh3_64_intdigest(data[begin : begin + size]):016x}"
    return sums


def every_dtype() -> dict[str, torch.Tensor]:
    """Return a tensor of each dtype of NumPy or torch with its extreme values; also 0-d, empty and
    transposed ones."""
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ints = (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
    tensors = {}
    for dtype in floats:
        info = torch.finfo(dtype)
        values = [0.0, -0.0, info.max, info.tiny, 1 / 3]
        tensors[str(dtype)] = torch.tensor(values, dtype=dtype)
    for dtype in ints:
        info = torch.iinfo(dtype)
        tensors[str(dtype)] = torch.tensor([info.min, 1, info.max], dtype=dtype)
    return tensors | {
        "torch.bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(3, 0, 2),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "of three blocks": torch.arange(2 * BLOCK + 3.0),
    }


def as_bits(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array; BF16, which NumPy lacks, as its bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


# --- readers of the format agree


def test_readers_by_the_specification_and_of_safetensors_find_every_tensor(tmp_path: Path) -> None:
    tensors = every_dtype()
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, tensors)
    book = read_by_the_book(path)
    by_torch = safetensors.torch.load_file(path)
    assert book.tensors.keys() == by_torch.keys() == tensors.keys()
    assert len(book.sums["of three blocks"]) == 3 * 16
    # The value in xxHash's test vectors for empty input, which pins "XXH3, 64 bits, seed 0".
    assert xxhash.xxh3_64_hexdigest(b"") == "2d06800538d394c2"
    for name, tensor in tensors.items():
        assert np.array_equal(book.tensors[name], as_bits(tensor))
        assert book.offsets[name] % tensor.element_size() == 0
        assert by_torch[name].dtype == tensor.dtype
        assert np.array_equal(as_bits(by_torch[name]), as_bits(tensor))
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
        last_rows = opened.get_slice("transposed")[1:]
    assert torch.equal(last_rows, tensors["transposed"][1:])
    del tensors["torch.bfloat16"]  # NumPy lacks it
    by_numpy = safetensors.numpy.load_file(write_snapshot(tmp_path, 20, 0.05, RUN_ID, tensors))
    assert by_numpy.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(by_numpy[name], tensor.numpy())


# --- metadata


def test_the_metadata_of_a_snapshot_is_as_specified(tmp_path: Path) -> None:
    values = {
        "w": torch.zeros(2, dtype=torch.float16),
        "seen": torch.tensor(3),
    }
    path = write_snapshot(
        tmp_path,
        1234.5,
        0.1,
        RUN_ID,
        values,
        t_unit="images",
        step=77,
        t_first=0.1,
        max_interval=32.5,
        updates=12,
        aliases={"tied": "w"},
        left_out=("frozen",),
        tensors={"w": "average BF16"},
        schedule=TrackingSchedule(5, 10, 15, None, "F16"),
        sigma_rels=(0.1, 0.28),
        measurements=Measurements(1 / 3, 1e-9),
    )
    assert read_by_the_book(path).content == {
        "kind": "snapshot",
        "format": 3,
        "run_id": RUN_ID,
        "sigma_rel": 0.1,
        "gamma": exact_gamma(0.1),
        "sigma_rels": [0.1, 0.28],
        "t": 1234.5,
        "t_unit": "images",
        "step": 77,
        "t_first": 0.1,
        "max_interval": 32.5,
        "updates": 12,
        "schedule": {
            "update_every": 5,
            "checkpoint_every": 10,
            "update_after_step": 15,
            "max_checkpoints": None,
            "checkpoint_dtype": "F16",
            "sigma_range": [0.05, 0.28],
        },
        "tensors": {"average BF16": ["w"], "copy I64": ["seen"]},
        "aliases": {"tied": "w"},
        "left_out": ["frozen"],
        "measurements": {"norm": 1 / 3, "rounding": 1e-9},
    }


letters = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
names = st.text(letters, min_size=1, max_size=20).filter(lambda n: n != "__metadata__")
sums = st.just(0.0) | st.floats(1e-100, 1e100)


@settings(deadline=None, max_examples=50)
@given(
    tensor_names=st.lists(names, min_size=2, max_size=4, unique=True),
    t=st.floats(1e-9, 1e18),
    off_schedule=st.booleans(),
    sigma_rel=st.floats(1e-3, 0.288).filter(lambda s: s != 0.28),
    unit=names.filter(str.isprintable),
    measurements=st.none() | st.builds(Measurements, sums, sums),
)
def test_the_metadata_of_a_snapshot_is_read_back_exactly(
    tensor_names: list[str],
    t: float,
    off_schedule: bool,
    sigma_rel: float,
    unit: str,
    measurements: Measurements | None,
) -> None:
    alias, *stored = tensor_names
    tensors = dict.fromkeys(stored, torch.zeros(1))
    info = make_info(
        tensors,
        t,
        sigma_rel,
        OTHER_RUN_ID,
        step=10**18 - 1,
        t_first=t / 3,
        t_unit=unit,
        aliases={alias: stored[0]},
        left_out=tuple(tensor_names),
        measurements=measurements,
        sigma_rels=tuple(sorted({sigma_rel, 0.28, 0.2885})),
        off_schedule=off_schedule,
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, tensors, info, overwrite=False)
        file = read_file(path)
    assert decode_snapshot(file) == info
    assert ("off_schedule" in file.content) == off_schedule
