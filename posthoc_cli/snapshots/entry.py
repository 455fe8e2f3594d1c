"""A stored tensor: its dtype, shape and place in a file, its bytes and its values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from posthoc_cli.dtypes import DTYPES, ITEM_BYTES, torch_dtype
from posthoc_cli.snapshots.boxes import row_major

if TYPE_CHECKING:
    import torch

BLOCK = 131_072
"""Elements of a block, which has a checksum of its own: the tiles of a synthesis consist of blocks,
for any dtype."""

MAX_TENSORS = 200_000
"""The largest number of tensors in a file: twice as many as the largest models have. It bounds the
time to read a header."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored tensor: its dtype (a safetensors name), its shape and, if it is in a file, where it
    begins there.

    `strides` has the stride of each dimension, in elements; it is empty if the tensor is stored in
    row-major order.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    strides: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // BLOCK)

    @property
    def block_bytes(self) -> int:
        return BLOCK * ITEM_BYTES[self.dtype]

    @property
    def reach(self) -> int:
        """The number of elements from the first to the last in the file."""
        if not self.strides:
            return self.size
        reach = 1
        for length, step in zip(self.shape, self.strides, strict=True):
            reach += (length - 1) * step
        return reach

    def view(
        self,
        data: npt.NDArray[np.uint8],
    ) -> npt.NDArray[Any]:
        """View the elements in the bytes of the file from `begin` on."""
        dtype = items(self.dtype)
        stored = data[: self.reach * dtype.itemsize].view(dtype)
        strides = self.strides or row_major(self.shape)
        steps = [dtype.itemsize * step for step in strides]
        return as_strided(stored, self.shape, steps)


def is_sizes(value: Any) -> bool:
    """Return whether a JSON value is a list of valid sizes or offsets, such as a shape."""
    return isinstance(value, list | tuple) and all(
        type(size) is int and 0 <= size < 2**60 for size in value
    )


def items(dtype: str) -> np.dtype[Any]:
    """Choose the NumPy dtype for copying elements bit by bit."""
    return np.dtype(f"u{ITEM_BYTES[dtype]}")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View the row-major bytes of a tensor if it is contiguous and on the CPU; else copy them."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_from_bytes(
    data: npt.NDArray[np.uint8],
    dtype: str,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Make a tensor that shares the memory of these bytes."""
    import torch

    if data.size == 0:
        # torch gives empty arrays the stride 0 and refuses to view them as another dtype.
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.from_numpy(data).view(torch_dtype(dtype)).reshape(shape)


def decode_values(
    data: npt.NDArray[np.uint8],
    dtype: str,
) -> npt.NDArray[np.float64]:
    """Decode little-endian bytes as float64; a complex number becomes two."""
    # NumPy lacks these dtypes; torch is imported only here, since that takes a second
    if dtype.startswith("F8"):
        # torch needs writable memory
        exact = tensor_from_bytes(data.copy(), dtype, data.shape).double()
        return exact.numpy()
    if dtype == "BF16":  # the upper half of a float32
        halves = data.view("<u2").astype(np.uint32)
        values = (halves << 16).view(np.float32)
    else:
        name = "float32" if dtype == "C64" else DTYPES[dtype].torch_name
        values = data.view(name)
    with np.errstate(invalid="ignore"):  # converting a signalling nan sets a floating-point flag
        return values.astype(np.float64)
