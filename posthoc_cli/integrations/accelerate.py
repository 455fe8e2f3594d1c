"""A tracker that `Accelerator.save_state` and `load_state` take along."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from posthoc_cli.integrations import figures, find_state, make_tracker, new_state
from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, checkpoint_dir: str | Path, optimizer: Any = None, **options: Any
) -> PostHocEMA:
    """A tracker whose exact state is in every checkpoint of the accelerator, in safetensors files and not as a pickle.

    Call it in every process, before or after `accelerator.prepare`; for a model under FSDP2, afterwards.

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

    def save(models: object, weights: object, folder: str) -> None:
        ema.save_state(new_state(folder, model, options))

    def load(models: object, folder: str) -> None:
        if (stored := find_state(folder)) is not None:
            ema.load_state(stored)
        elif accelerator.is_main_process:
            log.warning("%s was saved without this tracker: its averages begin here", folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return ema
