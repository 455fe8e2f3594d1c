"""A tracker holds no memory of a model that is gone, nor, once closed, of one that exists."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # else the first call imports it, which keeps frames until a collection

from posthoc_cli import PostHocEMA


class Weights(torch.nn.Module):
    """A model whose memory belongs to an array, which tells when nothing uses it any more."""

    def __init__(self) -> None:
        super().__init__()
        array = np.zeros((300, 300), np.float32)
        self.weight = torch.nn.Parameter(torch.from_numpy(array))
        # a storage of torch holds no reference to an object of Python that one can watch
        self.array = weakref.ref(array)

    def replace(self) -> None:
        self.weight.data = torch.zeros(300, 300)


@pytest.fixture(autouse=True)
def _without_collection() -> Iterator[None]:
    """Memory goes with its last reference, not at the next garbage collection."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def do_nothing(ema: PostHocEMA, model: Any) -> None:
    pass


def evaluate(ema: PostHocEMA, model: Any) -> None:
    with ema.model(model, 0.05):
        pass
    ema.state_dict(0.1)


def save(ema: PostHocEMA, model: Any) -> None:
    ema.load_state_dict(ema.state_dict())
    ema.snapshot()


def wrap(ema: PostHocEMA, model: Any) -> None:
    ema.update_(torch.nn.DataParallel(model))
    ema.update_(model)


USES = [do_nothing, evaluate, save, wrap]


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("use", USES)
def test_the_memory_of_a_deleted_model_is_free(tmp_path: Path, use: Any, device: str) -> None:
    model = Weights()
    ema = PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=2, device=device)
    for _ in range(3):
        ema.update_(model)
    use(ema, model)
    ema.flush()
    array = model.array
    del model
    assert array() is None
    assert ema.state_dict(0.05)["weight"].shape == (300, 300)
    ema.close()


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_closed_tracker_holds_no_memory_of_its_model(tmp_path: Path, device: str) -> None:
    model = Weights()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, device=device) as ema:
        for _ in range(3):
            ema.update_(model)
    model.replace()
    assert model.array() is None
    assert ema.state_dict(0.05)["weight"].shape == (300, 300)


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_memory_that_a_model_has_replaced_is_free_after_the_next_update(
    tmp_path: Path, device: str
) -> None:
    model = Weights()
    ema = PostHocEMA.from_model(model, tmp_path, update_every=1, device=device)
    ema.update_(model)
    model.replace()
    ema.update_(model)
    ema.flush()
    assert model.array() is None


def test_a_reader_holds_no_memory_of_the_model_that_it_fills(tmp_path: Path) -> None:
    model = Weights()
    with PostHocEMA.from_model(model, tmp_path, update_every=1) as ema:
        ema.update_(model)
    other = Weights()
    reader = PostHocEMA.from_path(tmp_path, other)
    reader.load_into(other, 0.05)
    array = other.array
    del other
    assert array() is None
