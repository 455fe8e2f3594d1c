"""Statements that many tests make: what an error says, and that two states hold the same tensors."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

from posthoc_cli.errors import InvalidValueError, PostHocError

Module = TypeVar("Module", bound=torch.nn.Module)


@contextmanager
def refused(subject: str, *words: str, kind: type[PostHocError] = InvalidValueError) -> Iterator[None]:
    """The block raises an error of this kind about `subject`, in one line that has all of these words."""
    with pytest.raises(kind) as raised:
        yield
    assert raised.value.subject == subject
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def assert_same_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Same names, and the same dtype and bits under each."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def saved_and_loaded(module: Module) -> Module:
    """The module after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: Module = torch.load(file, weights_only=False)
    return loaded
