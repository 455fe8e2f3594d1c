"""The format agrees with its specification: an independent reader, and that of safetensors, read
the same.

`read_by_the_book` is written from the docstring of posthoc_cli/snapshots/tensorfile.py alone.
"""

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xxhash
from factories import RUN_ID, exact_gamma, make_info, read_snapshot, write_snapshot, write_tensors

from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.snapshot import TrackingSchedule

BLOCK = 131_072
NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


@dataclass
class Book:
    """The object of the header, and tensors (BF16 as bits)."""

    content: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read_by_the_book(path):
    """Read a file by the specification, and check everything that it promises."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    payload = data[8 + length :]
    metadata = header.pop("__metadata__")
    assert length % 8 == 0

    begin = data.index(metadata["ema.checksum"].encode())
    assert data[8:begin] == b'{"__metadata__":{"ema.checksum":"'
    blank = data[:begin] + b"0" * 16 + data[begin + 16 : 8 + length]
    assert metadata["ema.checksum"] == f"{xxhash.xxh3_64_intdigest(blank, seed=0):016x}"

    content = json.loads(metadata["ema"])
    sums = ""
    tensors = {}
    position = 0
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        entry = header[name]
        dtype = np.dtype(NUMPY_DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        assert begin == position
        assert (8 + length + begin) % dtype.itemsize == 0
        position = end
        sums += sums_of_blocks(payload[begin:end], BLOCK * dtype.itemsize)
        tensors[name] = np.frombuffer(payload[begin:end], dtype).reshape(entry["shape"])
    assert position == len(payload)
    assert content.pop("sums") == sums
    return Book(content, tensors)


def sums_of_blocks(data, size):
    sums = ""
    for begin in range(0, len(data), size):
        sums += f"{xxhash.xxh3_64_intdigest(data[begin : begin + size]):016x}"
    return sums


def every_dtype():
    """Return a tensor of each dtype of NumPy or torch with its extreme values; also 0-d, empty and
    transposed ones."""
    tensors = {
        "torch.bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(3, 0, 2),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "of three blocks": torch.arange(2 * BLOCK + 3.0),
    }
    for name in ("float64", "float32", "float16", "bfloat16"):
        dtype = getattr(torch, name)
        info = torch.finfo(dtype)
        values = [0.0, -0.0, info.max, info.tiny, 1 / 3]
        tensors[name] = torch.tensor(values, dtype=dtype)
    for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"):
        dtype = getattr(torch, name)
        info = torch.iinfo(dtype)
        tensors[name] = torch.tensor([info.min, 1, info.max], dtype=dtype)
    return tensors


def as_bits(tensor):
    """Return a tensor as a NumPy array; BF16, which NumPy lacks, as its bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


# --- readers of the format agree


def test_readers_by_the_specification_and_of_safetensors_find_every_tensor(tmp_path):
    tensors = every_dtype()
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, tensors)
    by_the_book = read_by_the_book(path).tensors
    by_torch = safetensors.torch.load_file(path)
    assert by_the_book.keys() == by_torch.keys() == tensors.keys()
    # The value in xxHash's test vectors for empty input, which pins "XXH3, 64 bits, seed 0".
    assert xxhash.xxh3_64_hexdigest(b"") == "2d06800538d394c2"
    for name, tensor in tensors.items():
        assert np.array_equal(by_the_book[name], as_bits(tensor))
        assert by_torch[name].dtype == tensor.dtype
        assert np.array_equal(as_bits(by_torch[name]), as_bits(tensor))


# --- metadata

SMALL = {
    "w\n\u202e": torch.zeros(2, dtype=torch.float16),
    "seen": torch.tensor(3),
}


def test_the_metadata_of_a_snapshot_are_as_specified_and_read_back_exactly(tmp_path):
    plain = {
        "t_unit": "images",
        "step": 10**18 - 1,
        "t_first": 0.1,
        "max_interval": 1e18 / 3,
        "updates": 12,
        "aliases": {"tied": "w\n\u202e"},
    }
    info = make_info(
        SMALL,
        1234.5 + 1e-12,
        0.1,
        left_out=("frozen",),
        schedule=TrackingSchedule(5, 10, 15, None, "F16"),
        sigma_rels=(0.1, 0.28),
        measurements=Measurements(1 / 3, 1e-100),
        **plain,
    )
    path = tmp_path / "x.safetensors"
    write_tensors(path, SMALL, info, overwrite=False)
    assert read_snapshot(path) == info
    content = read_by_the_book(path).content
    assert (
        content.pop("schedule").items()
        >= {
            "update_every": 5,
            "checkpoint_every": 10,
            "update_after_step": 15,
            "max_checkpoints": None,
            "checkpoint_dtype": "F16",
            "sigma_range": [0.05, 0.28],
        }.items()
    )
    assert content == plain | {
        "kind": "snapshot",
        "format": 4,
        "run_id": RUN_ID,
        "sigma_rel": 0.1,
        "gamma": exact_gamma(0.1),
        "sigma_rels": [0.1, 0.28],
        "t": 1234.5 + 1e-12,
        "tensors": {"average F16": ["w\n\u202e"], "copy I64": ["seen"]},
        "left_out": ["frozen"],
        "measurements": {"norm": 1 / 3, "rounding": 1e-100},
    }
