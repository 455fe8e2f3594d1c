"""Convert between torch tensors and the bytes and dtype names of safetensors. The one module here that needs torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.snapshots.format import parse_dtype_word

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def stored_name(dtype: torch.dtype, tensor: str = "") -> str:
    """The safetensors name of a dtype.

    Raises:
        InvalidValueError: safetensors has none; `tensor` is named.
    """
    if dtype not in _NAMES:
        where = f"tensor {tensor!r}" if tensor else "tensor"
        raise InvalidValueError(where, f"dtype {dtype} cannot be stored; one of {', '.join(map(str, _NAMES))} can")
    return _NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a safetensors name."""
    return _DTYPES[name]


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype for averages, from a dtype or a user's word; None for None and "keep": each tensor's own.

    Raises:
        InvalidValueError: listing the accepted words.
    """
    if dtype is None:
        return None
    name = parse_dtype_word(dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch."))
    return None if name is None else _DTYPES[name]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major; a view where it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_from_bytes(data: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of these bytes; it shares their memory."""
    if data.size == 0:
        # torch gives an empty array the stride 0, which it then refuses to view as another dtype.
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.from_numpy(data).view(_DTYPES[dtype]).reshape(shape)


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values`, rounded once, to nearest even.

    torch takes float64 to 16 bits by way of float32, which rounds twice. Rounded to odd there, values stay on their
    side of any tie between two numbers of 16 bits.
    """
    if values.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return values.to(dtype)
    near = values.to(torch.float32)
    exact = near.to(torch.float64)
    bits = near.view(torch.int32)
    # The number before, in magnitude, where it was rounded away from 0; then an odd last bit where it was rounded.
    odd = (bits - (exact.abs() > values.abs()).to(torch.int32)) | ((exact != values) & ~values.isnan()).to(torch.int32)
    return torch.where(values.isfinite(), odd.view(torch.float32), near).to(dtype)
