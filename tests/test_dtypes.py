"""The names of the dtypes of safetensors files for users and in torch."""

from __future__ import annotations

import pytest
import torch

from posthoc_cli.dtypes import WORDS, parse_dtype, stored_name, torch_dtype
from posthoc_cli.errors import InvalidValueError


def test_a_dtype_that_the_format_lacks_is_refused_with_the_tensor() -> None:
    with pytest.raises(InvalidValueError, match=r"tensor 'w': dtype .* cannot be stored"):
        stored_name(torch.complex128, "w")


def test_dtypes_of_averages_are_given_as_words_or_torch_dtypes() -> None:
    assert parse_dtype(None) is parse_dtype("keep") is None
    assert {word: torch_dtype(str(parse_dtype(word))) for word in WORDS} == {
        "float64": torch.float64, "fp64": torch.float64, "float32": torch.float32, "fp32": torch.float32,
        "float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    }  # fmt: skip
    assert parse_dtype(torch.bfloat16) == "BF16"


@pytest.mark.parametrize("dtype", ["int8", "half", "F32", "", torch.int64, torch.float8_e4m3fn])
def test_another_dtype_is_refused_for_averages(dtype: torch.dtype | str) -> None:
    with pytest.raises(InvalidValueError, match="must be one of float64"):
        parse_dtype(dtype)
