"""A tracker that `Accelerator.save_state` and `load_state` take along."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from accelerate import Accelerator

from posthoc_cli.integrations import figures, find_state, make_tracker, new_state
from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)

_prepared: WeakKeyDictionary[Accelerator, list[ref[PostHocEMA]]] = WeakKeyDictionary()


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, checkpoint_dir: str | Path, optimizer: Any = None, **options: Any
) -> PostHocEMA:
    """A tracker whose exact state is in every checkpoint of the accelerator, in safetensors files and not as a pickle.

    Call it in every process, before or after `accelerator.prepare`; for a model under FSDP2, afterwards. Of several
    models each has its own directory, and the calls have the same order whenever the script runs.

    Arguments:
        model: wrapped or bare.
        checkpoint_dir: the directory for the snapshots.
        optimizer: the one whose steps count, wrapped or bare: those that `accumulate` or a GradScaler leaves out do
            not. None: call `ema.update_(model)` after each step that was taken.
        options: others of `PostHocEMA.from_model`.

    Raises:
        InvalidValueError: an argument, as in `from_model` and `attach`.
    """
    ema = make_tracker(model, checkpoint_dir, accelerator.is_main_process, options)
    if optimizer is not None:
        ema.attach(optimizer)
    ema.on_snapshot(lambda tracker: accelerator.log(figures(tracker, None), step=tracker.step))

    number = _number(accelerator, ema)

    def replaced() -> bool:
        return _prepared[accelerator][number]() is not ema

    def save(models: object, weights: object, folder: str) -> None:
        if not replaced():
            ema.save_state(new_state(folder, model, number))

    def load(models: object, folder: str) -> None:
        if replaced():
            return
        if (stored := find_state(folder, number)) is not None:
            ema.load_state(stored)
        elif accelerator.is_main_process:
            log.warning("%s was saved without this tracker: its averages begin here", folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return ema


def _number(accelerator: Accelerator, ema: PostHocEMA) -> int:
    """The place of a tracker in checkpoints: that of one which was closed, as when a cell runs again, or a new one."""
    places = _prepared.setdefault(accelerator, [])
    trackers = [place() for place in places]
    number = next((i for i, one in enumerate(trackers) if one is None or one.closed), len(places))
    places[number : number + 1] = [ref(ema)]
    return number
