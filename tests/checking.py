"""Statements that many tests make: what an error says, and that two states hold the same
tensors."""

import io
import json
import os
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file

from posthoc_cli.errors import InvalidValueError

Module = TypeVar("Module", bound=torch.nn.Module)

heavy = pytest.mark.skipif("EMA_HEAVY" not in os.environ, reason="needs EMA_HEAVY=1, as in .ci/run")
"""Marks tests of many seconds, which the gate runs, and `make test` leaves out."""


def each_heavy(*values):
    """Mark parameters of a test, beside others that every run takes."""
    return [pytest.param(value, marks=heavy) for value in values]


@contextmanager
def refused(subject, *words, kind=InvalidValueError):
    """Expect an error of this kind about `subject`, with its value or without, in one line that
    contains these words: facts, such as numbers, names and commands."""
    with pytest.raises(kind) as raised:
        yield raised
    error = raised.value
    assert str(subject) in (error.subject, f"{error.subject} {error.value}"), error
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


def assert_same_tensors(found, expected):
    """Assert that both have the same names, and the same dtype and bits for each."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def load_output(path):
    """Load an output with the usual library: torch for .pt, safetensors for files and shards."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return load_file(path / "model.safetensors" if path.is_dir() else path)
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = {name: load_file(path / name) for name in sorted(set(weight_map.values()))}
    assert sorted(weight_map) == sorted(name for shard in shards.values() for name in shard)
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
