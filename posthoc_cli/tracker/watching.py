"""A model's tensors, looked through once, and again only when they are others than before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from posthoc_cli.tracker.model_tensors import ModelTensors


class WatchedModel:
    """The tensors that were found in a model, as long as they stay the same.

    What is compared at every update, in place of walking through the modules: the names and objects that the modules
    hold, where the parameters' values are and how they lie, their shapes, dtypes and whether they require gradients.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._contents: list[dict[str, Any]] = []
        self._filled: list[dict[str, Any]] = []
        self._state_tensors: list[torch.Tensor] = []
        self._held: list[object] = []
        self._state: tuple[object, ...] = ()
        self._tensors: ModelTensors | None = None

    def tensors(self, model: torch.nn.Module, collect: Callable[[torch.nn.Module], ModelTensors]) -> ModelTensors:
        """What `collect` finds in the model: the object of the last call, unless it had to be called again."""
        if self._tensors is not None and self._model is not None and self._model() is model and self._is_same():
            return self._tensors
        self._tensors = None
        found = collect(model)
        self._model = weakref.ref(model)  # it may go before the tracker does
        self._contents = [
            contents
            for module in model.modules()
            for contents in (module._parameters, module._buffers, module._modules)
        ]
        self._state_tensors = [*model.parameters(), *model.buffers()]
        self._filled = [contents for contents in self._contents if contents]
        self._held = [*chain.from_iterable(map(dict.values, self._filled))]
        self._state = self._now()
        self._tensors = found
        return found

    def _is_same(self) -> bool:
        return self._now() == self._state

    def _now(self) -> tuple[object, ...]:
        """What would be another if the tensors were others. `_held` keeps ids from being given again."""
        tensors = self._state_tensors
        return (
            [*map(len, self._contents)],
            [*chain.from_iterable(self._filled)],
            [*map(id, chain.from_iterable(map(dict.values, self._filled)))],
            [p.data_ptr() for p in tensors],
            [p.requires_grad for p in tensors],
            [p.dtype for p in tensors],
            [p.shape for p in tensors],
            [p.stride() for p in tensors if p.layout == torch.strided],
        )
