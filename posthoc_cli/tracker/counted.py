"""The last step of a model that a tracker has counted, and whether the model has moved since.

It is kept as long as the model: a tracker that takes an earlier one's place in the same process, as
where a notebook's cell runs again, continues from that step."""

from __future__ import annotations

import weakref
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from posthoc_cli.tracker.state import TrainingProgress

PROBES = 32
"""Parameters that are looked at, spread evenly: an optimizer that steps moves most of them. To look
at all would take longer than an update of many small tensors."""


class LastCount:
    """The last counted call of a run, and the versions that some parameters had then.

    torch counts a tensor's changes in its version, but not those of its `data`, by which averages
    are swapped in. Parameters that were replaced since, as by shards, are left out.
    """

    def __init__(self) -> None:
        self.run_id = ""
        self.progress = TrainingProgress()
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._probes: list[weakref.ref[torch.nn.Parameter]] = []
        self._versions: list[int] = []

    def note(self, model: torch.nn.Module, run_id: str, progress: TrainingProgress) -> None:
        """Note a call that was counted."""
        self.run_id = run_id
        self.progress = progress
        self.look(model)

    def look(self, model: torch.nn.Module) -> None:
        """Note the parameters as they are."""
        if self._model is None or self._model() is not model:
            self._model = weakref.ref(model)
            self._probes = _spread(model)
        self._versions = [_version(probe()) for probe in self._probes]

    @property
    def has_moved(self) -> bool:
        """Whether the model has moved since then, if it still exists."""
        now = [_version(probe()) for probe in self._probes]
        return any(
            version > before >= 0 for version, before in zip(now, self._versions, strict=True)
        )


def _spread(model: torch.nn.Module) -> list[weakref.ref[torch.nn.Parameter]]:
    parameters = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and not parameter.is_inference()
    ]
    stride = -(-len(parameters) // PROBES) or 1
    return [weakref.ref(parameter) for parameter in parameters[::stride]]


def _version(parameter: torch.nn.Parameter | None) -> int:
    return -1 if parameter is None else parameter._version


last_counts: WeakKeyDictionary[torch.nn.Module, dict[Path, LastCount]] = WeakKeyDictionary()
"""By the bare model and the directory."""
