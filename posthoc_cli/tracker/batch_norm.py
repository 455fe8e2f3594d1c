"""BatchNorm statistics for weights that they were not measured with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import swa_utils

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.tracker.model_tensors import check_model


def update_bn(model: torch.nn.Module, loader: Iterable[Any]) -> None:
    """Measure the statistics of a model's BatchNorm layers anew, on one pass over `loader`.

    They were measured along the training, of other weights than the averaged ones. Every batch counts alike
    (`torch.optim.swa_utils.update_bn`). Modes and momenta are as before afterwards; if the pass fails, the
    statistics are, too. A model without such layers is left alone, and `loader` unread.

    Arguments:
        model: in any mode, on any device.
        loader: gives the model's inputs, or lists or tuples that begin with them; tensors on any device.

    Raises:
        InvalidValueError: not a model, or a loader that gives nothing.
    """
    layers = [module for module in check_model(model).modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    with ExitStack() as always, ExitStack() as on_error:
        for module in model.modules():
            always.callback(setattr, module, "training", module.training)
        for layer in layers:
            always.callback(setattr, layer, "momentum", layer.momentum)
            for buffer in layer.buffers(recurse=False):
                on_error.callback(_restore, buffer, buffer.detach().clone())
        batches = _Batches(loader, _device(model))
        with torch.no_grad():
            swa_utils.update_bn(batches, model)
        if not batches.count:
            raise InvalidValueError("update_bn", "the loader gave no batch to measure BatchNorm statistics on")
        on_error.pop_all()


class _Batches:
    """A loader's batches on the model's device, counted."""

    def __init__(self, loader: Iterable[Any], device: torch.device | None) -> None:
        self._loader = loader
        self._device = device
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.count += 1
            inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
            yield _moved(inputs, self._device)


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _device(model: torch.nn.Module) -> torch.device | None:
    """Where the model's first tensor is."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return None if tensor is None else tensor.device


@torch.no_grad()
def _restore(buffer: torch.Tensor, values: torch.Tensor) -> None:
    buffer.copy_(values)
