"""Convert between torch tensors and the bytes and dtype names of safetensors. The one module here that needs torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli import dtypes
from posthoc_cli.errors import InvalidValueError

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype.torch_name) for name, dtype in dtypes.DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def stored_name(dtype: torch.dtype, tensor: str = "") -> str:
    """The safetensors name of a dtype; an InvalidValueError names the `tensor` if it has none."""
    if dtype not in _NAMES:
        where = f"tensor {tensor!r}" if tensor else "tensor"
        raise InvalidValueError(where, f"dtype {dtype} cannot be stored; one of {', '.join(map(str, _NAMES))} can")
    return _NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a safetensors name."""
    return _DTYPES[name]


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype for averages, from a dtype or a user's word; None for None and "keep": each tensor's own."""
    name = dtypes.parse_dtype(dtype)
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
