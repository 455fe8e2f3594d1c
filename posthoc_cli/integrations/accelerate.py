"""A tracker that `Accelerator.save_state` and `load_state` take along."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from accelerate import Accelerator

from posthoc_cli.integrations import figures, make_tracker, read_state, write_state
from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, checkpoint_dir: str | Path, optimizer: Any = None, **options: Any
) -> PostHocEMA:
    """A tracker whose exact state is in every checkpoint of the accelerator.

    Call it in every process, before or after `accelerator.prepare`; for a model under FSDP2, afterwards. Of several
    models each has its own directory, and the calls have the same order whenever the script runs. A second tracker of
    one model closes the first one, with a warning, and takes its place in checkpoints.

    Arguments:
        model: wrapped or bare.
        checkpoint_dir: the directory for the snapshots.
        optimizer: the one whose steps count, wrapped or bare: those that `accumulate` or a GradScaler leaves out do
            not. None: call `ema.update_(model)` after each step that was taken.
        options: others of `PostHocEMA.from_model`; `resume` is "auto" by default.

    Raises:
        InvalidValueError: an argument, as in `from_model` and `attach`.
    """
    ema = make_tracker(model, checkpoint_dir, options)
    if optimizer is not None:
        ema.attach(optimizer)
    ema.on_snapshot(lambda tracker: accelerator.log(figures(tracker), step=tracker.step))

    number = _free_place(accelerator, model)

    def save(models: object, weights: object, folder: str) -> None:
        write_state(ema, folder, model, number)

    def load(models: object, folder: str) -> None:
        if not read_state(ema, folder, number) and accelerator.is_main_process:
            log.warning("%s was saved without this tracker: its averages begin here", folder)

    hooks = ExitStack()
    hooks.callback(accelerator.register_save_state_pre_hook(save).remove)
    hooks.callback(accelerator.register_load_state_pre_hook(load).remove)
    _prepared[accelerator][number : number + 1] = [_Place(ref(ema), ref(_bare(accelerator, model)), hooks)]
    return ema


@dataclass
class _Place:
    """A tracker's place in an accelerator's checkpoints, and the hooks that put it there."""

    tracker: ref[PostHocEMA]
    model: ref[torch.nn.Module]
    hooks: ExitStack

    @property
    def is_free(self) -> bool:
        """Whether its tracker will take in nothing any more."""
        tracker = self.tracker()
        return tracker is None or tracker.closed or self.model() is None


_prepared: WeakKeyDictionary[Accelerator, list[_Place]] = WeakKeyDictionary()


def _free_place(accelerator: Accelerator, model: torch.nn.Module) -> int:
    """The place of a new tracker in checkpoints: that of one which was closed, or of the same model, or a new one.

    As when a cell runs again, perhaps with another directory since the first one had a run. The earlier tracker is
    closed, and no checkpoint saves or loads it any more.
    """
    places, bare = _prepared.setdefault(accelerator, []), _bare(accelerator, model)
    same = [number for number, place in enumerate(places) if place.model() is bare]
    free = [number for number, place in enumerate(places) if place.is_free]
    number = next(iter(same + free), len(places))
    for place in places[number : number + 1]:
        earlier = place.tracker()
        if earlier is not None and not earlier.closed:
            log.warning("%s: this tracker is closed, as another one of its model replaces it", earlier.checkpoint_dir)
            earlier.close()
        place.hooks.close()
    return number


def _bare(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    bare: torch.nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
    return bare
