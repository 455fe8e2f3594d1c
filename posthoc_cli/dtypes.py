"""The dtypes that safetensors files hold, what torch and users call them. The only table; it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from posthoc_cli.errors import InvalidValueError, check_word

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """One dtype.

    Attributes:
        torch_name: its name in torch and NumPy.
        nbytes: bytes of an element.
        mantissa_bits: stored bits of the mantissa; 0 for what is no real floating-point number.
        lowest_exponent: of normal numbers 2**exponent * 1.xxx; below it the spacing stays what it is there.
        first_nonfinite: the bits, without the sign, of the first number that is not finite; all above are not, either.
    """

    torch_name: str
    nbytes: int
    mantissa_bits: int = 0
    lowest_exponent: int = 0
    first_nonfinite: int = 0


DTYPES = {
    "F64": Dtype("float64", 8, 52, -1022, 0x7FF << 52),
    "F32": Dtype("float32", 4, 23, -126, 0xFF << 23),
    "F16": Dtype("float16", 2, 10, -14, 0x1F << 10),
    "BF16": Dtype("bfloat16", 2, 7, -126, 0xFF << 7),
    "F8_E4M3": Dtype("float8_e4m3fn", 1, 3, -6, 0x7F),
    "F8_E5M2": Dtype("float8_e5m2", 1, 2, -14, 0x7C),
    "C64": Dtype("complex64", 8),
    "I64": Dtype("int64", 8), "I32": Dtype("int32", 4), "I16": Dtype("int16", 2), "I8": Dtype("int8", 1),
    "U64": Dtype("uint64", 8), "U32": Dtype("uint32", 4), "U16": Dtype("uint16", 2), "U8": Dtype("uint8", 1),
    "BOOL": Dtype("bool", 1),
}  # fmt: skip
"""By their names in safetensors."""

ITEM_BYTES = {name: dtype.nbytes for name, dtype in DTYPES.items()}

EPS = {name: 2.0**-dtype.mantissa_bits for name, dtype in DTYPES.items() if dtype.mantissa_bits}
"""Distance from 1 to the next number. An average's own dtype, and what it is stored as, is one of these."""

WORDS = {
    "float64": "F64", "fp64": "F64", "float32": "F32", "fp32": "F32", "float16": "F16", "fp16": "F16",
    "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip
"""What users call the dtypes of results."""


def parse_dtype(dtype: torch.dtype | str | None, option: str = "dtype") -> str | None:
    """The safetensors name of a dtype given by a user's word or as torch's; None for None and "keep".

    Raises:
        InvalidValueError: listing the accepted words; its subject is `option`.
    """
    word = "keep" if dtype is None else str(dtype).removeprefix("torch.")
    check_word(option, word, [*WORDS, "keep"])
    return WORDS.get(word)


_NAMES = {f"torch.{dtype.torch_name}": name for name, dtype in DTYPES.items()}


def stored_name(dtype: torch.dtype, tensor: str = "") -> str:
    """The safetensors name of a dtype; an InvalidValueError names the `tensor` if it has none."""
    if str(dtype) not in _NAMES:
        where = f"tensor {tensor!r}" if tensor else "tensor"
        raise InvalidValueError(where, f"dtype {dtype} cannot be stored; one of {', '.join(_NAMES)} can")
    return _NAMES[str(dtype)]


@lru_cache
def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a safetensors name."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name].torch_name)
    return dtype
