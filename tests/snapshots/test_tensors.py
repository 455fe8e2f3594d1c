"""Tensors to bytes and back, bit for bit."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from posthoc_cli.dtypes import ITEM_BYTES, WORDS
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.snapshots.tensors import (
    parse_dtype,
    round_to,
    stored_name,
    tensor_bytes,
    tensor_from_bytes,
    torch_dtype,
)

SHAPES = [(), (1,), (0,), (3, 0, 2), (2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(ITEM_BYTES))
def test_any_bytes_are_a_tensor_of_any_dtype_and_come_back(name: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape)) * ITEM_BYTES[name]
    data = np.random.default_rng(0).integers(0, 2 if name == "BOOL" else 256, count, dtype=np.uint8)
    tensor = tensor_from_bytes(data, name, shape)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch_dtype(name), shape)
    assert stored_name(tensor.dtype) == name
    assert bytes(tensor_bytes(tensor)) == data.tobytes()


def test_the_bytes_are_row_major_whatever_the_memory_is_and_copied_only_then() -> None:
    grid = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    expected = struct.pack("<6h", 0, 3, 1, 4, 2, 5)
    assert bytes(tensor_bytes(grid.T)) == expected
    assert bytes(tensor_bytes(grid.repeat(1, 2)[:, :3].T)) == expected
    assert bytes(tensor_bytes(torch.tensor(7, dtype=torch.int16).expand(2))) == struct.pack("<2h", 7, 7)
    assert bytes(tensor_bytes(torch.nn.Parameter(torch.tensor([1.0])))) == struct.pack("<f", 1.0)
    view = np.frombuffer(tensor_bytes(grid), np.int16)
    grid[0, 1] = 9
    assert view[1] == 9


@pytest.mark.parametrize("dtype", [torch.complex128, torch.quint8])
def test_a_dtype_that_the_format_lacks_is_refused_with_the_tensor(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidValueError, match=r"tensor 'w': dtype .* cannot be stored"):
        stored_name(dtype, "w")


def test_dtypes_of_averages_are_given_as_words_or_as_such() -> None:
    assert parse_dtype(None) is parse_dtype("keep") is None
    assert {word: parse_dtype(word) for word in WORDS} == {
        "float64": torch.float64, "fp64": torch.float64, "float32": torch.float32, "fp32": torch.float32,
        "float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    }  # fmt: skip
    assert parse_dtype(torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "half", "F32", "", torch.int64, torch.float8_e4m3fn])
def test_another_dtype_is_refused_for_averages(dtype: torch.dtype | str) -> None:
    with pytest.raises(InvalidValueError, match="must be one of float64"):
        parse_dtype(dtype)


def test_float64_is_rounded_once_to_sixteen_bits() -> None:
    numbers = np.random.default_rng(0).normal(size=2000).astype(np.float16)
    numbers = np.concatenate([numbers, np.array([0.0, 6e-8, 65504.0, 2.0**-24], np.float16)])
    ties = (numbers.astype(np.float64) + np.nextafter(numbers, np.float16(1)).astype(np.float64)) / 2
    near = np.concatenate([ties, ties * (1 + 2.0**-45), ties * (1 - 2.0**-45), [65519.9999999, 65520.0, 1e300, 1e-300]])
    values = np.concatenate([near, -near, [np.inf, -np.inf, np.nan, 0.0, -0.0]])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    found = round_to(torch.from_numpy(values), torch.float16).numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize(
    ("value", "rounded"), [(1 + 2**-8 + 2**-40, 1 + 2**-7), (1 + 2**-8, 1.0), (-(1 + 2**-8 + 2**-40), -(1 + 2**-7))]
)
def test_float64_is_rounded_once_to_bfloat16(value: float, rounded: float) -> None:
    assert round_to(torch.tensor([value], dtype=torch.float64), torch.bfloat16).item() == rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_what_torch_rounds_once_is_what_torch_rounds(dtype: torch.dtype) -> None:
    values = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for own in (values, values.float()):
        rounded = round_to(own, dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.double(), own.to(dtype).double())
