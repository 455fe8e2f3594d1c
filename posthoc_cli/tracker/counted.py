"""The last step of a model that a tracker has counted, and whether an optimizer has stepped since.

It is kept as long as the model: a tracker that takes an earlier one's place in the same process, as
where a notebook's cell runs again, continues from that step."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch._compile import _disable_dynamo as not_compiled
from torch.optim.optimizer import register_optimizer_step_pre_hook

from posthoc_cli.tracker.attach import changes_weights
from posthoc_cli.tracker.clock import TrainingProgress


class LastCount:
    """The last counted call of a run. `has_moved` tells whether an optimizer has stepped since that
    has a parameter of the model."""

    def __init__(self) -> None:
        self.run_id = ""
        self.progress = TrainingProgress()
        self.has_moved = False
        self._parameters: frozenset[int] = frozenset()  # their ids
        # whether each optimizer, of so many groups, has one of them
        self._optimizers: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, bool]] = (
            WeakKeyDictionary()
        )

    def watch(self, model: torch.nn.Module) -> None:
        """Look at the steps that are taken of a model's parameters from now on."""
        self.has_moved = False
        self._parameters = frozenset(map(id, model.parameters()))
        self._optimizers.clear()
        _watching.add(self)

    def note(self, model: torch.nn.Module, run_id: str, progress: TrainingProgress) -> None:
        """Note a call that was counted."""
        if self not in _watching:
            self.watch(model)
        self.run_id = run_id
        self.progress = progress
        self.has_moved = False

    def begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that an optimizer is about to step."""
        groups, is_own = self._optimizers.get(optimizer, (0, False))
        if groups != len(optimizer.param_groups):
            is_own = self._has_parameter(optimizer)
            self._optimizers[optimizer] = len(optimizer.param_groups), is_own
        if is_own and not self.has_moved:
            self.has_moved = changes_weights(optimizer)

    def _has_parameter(self, optimizer: torch.optim.Optimizer) -> bool:
        for group in optimizer.param_groups:
            if any(id(parameter) in self._parameters for parameter in group["params"]):
                return True
        return False


last_counts: WeakKeyDictionary[torch.nn.Module, dict[Path, LastCount]] = WeakKeyDictionary()
"""By the bare model and the directory."""

_watching: WeakSet[LastCount] = WeakSet()


@not_compiled
def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let those that watch know of a step: before it, since a hook after it may count it."""
    for last in [*_watching]:
        last.begin_step(optimizer)


register_optimizer_step_pre_hook(_before_step)
