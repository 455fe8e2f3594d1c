"""The dtypes of safetensors files with their names in torch and for users. The only such table; it
imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from posthoc_cli.errors import InvalidValueError, check_word

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """The properties of a dtype."""

    torch_name: str  # in torch and NumPy
    nbytes: int  # of an element
    mantissa_bits: int = 0  # stored ones; 0 for dtypes that are not real floating-point numbers
    # the smallest of normal numbers 2**exponent * 1.xxx; subnormal ones have its spacing
    lowest_exponent: int = 0


DTYPES = {
    "F64": Dtype("float64", 8, 52, -1022),
    "F32": Dtype("float32", 4, 23, -126),
    "F16": Dtype("float16", 2, 10, -14),
    "BF16": Dtype("bfloat16", 2, 7, -126),
    "F8_E4M3": Dtype("float8_e4m3fn", 1, 3, -6),
    "F8_E5M2": Dtype("float8_e5m2", 1, 2, -14),
    "C64": Dtype("complex64", 8),
    "I64": Dtype("int64", 8),
    "I32": Dtype("int32", 4),
    "I16": Dtype("int16", 2),
    "I8": Dtype("int8", 1),
    "U64": Dtype("uint64", 8),
    "U32": Dtype("uint32", 4),
    "U16": Dtype("uint16", 2),
    "U8": Dtype("uint8", 1),
    "BOOL": Dtype("bool", 1),
}
"""The dtypes by their names in safetensors files."""

ITEM_BYTES = {name: dtype.nbytes for name, dtype in DTYPES.items()}

EPS = {name: 2.0**-dtype.mantissa_bits for name, dtype in DTYPES.items() if dtype.mantissa_bits}
"""The distance from 1 to the next number. The model's and the stored dtype of an average are among
these."""

WORDS = {
    "float64": "F64", "fp64": "F64", "float32": "F32", "fp32": "F32", "float16": "F16",
    "fp16": "F16", "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip
"""The words by which users name the dtypes of results."""


def parse_dtype(
    dtype: torch.dtype | str | None,
    option: str = "dtype",
) -> str | None:
    """Find the safetensors name of a word or a torch dtype; None for None and "keep"."""
    word = "keep" if dtype is None else str(dtype).removeprefix("torch.")
    check_word(option, word, [*WORDS, "keep"])
    return WORDS.get(word)


_NAMES = {f"torch.{dtype.torch_name}": name for name, dtype in DTYPES.items()}


def stored_name(dtype: torch.dtype, tensor: str = "") -> str:
    """Find the safetensors name of a dtype; an InvalidValueError about `tensor` if it has none."""
    name = _NAMES.get(str(dtype))
    if name is None:
        reason = f"dtype {dtype} cannot be stored; one of {', '.join(_NAMES)} can"
        raise InvalidValueError(f"tensor {tensor!r}", reason)
    return name


@lru_cache
def torch_dtype(name: str) -> torch.dtype:
    """Find the torch dtype with this safetensors name."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name].torch_name)
    return dtype
