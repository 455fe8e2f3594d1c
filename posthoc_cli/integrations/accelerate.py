"""A tracker whose state `Accelerator.save_state` saves and `load_state` loads."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from accelerate import Accelerator

from posthoc_cli.integrations import figures, make_tracker, read_state, write_state
from posthoc_cli.tracker import PostHocEMA


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    checkpoint_dir: str | Path,
    optimizer: Any = None,
    **options: Any,
) -> PostHocEMA:
    """Make a tracker whose exact state is saved in every checkpoint of the accelerator.

    Call it in every process, before or after `accelerator.prepare`; for a model under FSDP2,
    afterwards. Give each of several models its own directory, and make the calls in the same order
    whenever the script runs. A second tracker of one directory, as of a notebook's cell that runs
    again, takes the place of the first one.

    Arguments:
        model: the model to track, wrapped or bare.
        checkpoint_dir: the directory for the snapshots.
        optimizer: the optimizer whose steps count, wrapped or bare: steps that `accumulate` or a
            GradScaler skips do not. None: call `ema.update_(model)` after each step that was taken.
        options: other arguments of `PostHocEMA.from_model`; `resume` is "auto" by default.
    """
    prepared = _prepared.setdefault(accelerator, {})
    directory = Path(checkpoint_dir).absolute()
    # the place in checkpoints
    number, earlier_hooks = prepared.get(directory, (len(prepared), ExitStack()))
    ema = make_tracker(model, checkpoint_dir, options)
    earlier_hooks.close()
    if optimizer is not None:
        # the wrapper of `accelerator.prepare` may skip its own steps
        ema.attach(getattr(optimizer, "optimizer", optimizer))
    ema.on_snapshot(lambda tracker: accelerator.log(figures(tracker), step=tracker.step))

    model_of = ref(model)  # the accelerator, which keeps the hooks, may release the model

    def save(models: object, weights: object, folder: str) -> None:
        tracked = model_of()
        if tracked is not None:
            write_state(ema, folder, tracked, number)

    def load(models: object, folder: str) -> None:
        read_state(ema, folder, number)

    hooks = ExitStack()
    hooks.callback(accelerator.register_save_state_pre_hook(save).remove)
    hooks.callback(accelerator.register_load_state_pre_hook(load).remove)
    prepared[directory] = number, hooks
    return ema


_prepared: WeakKeyDictionary[Accelerator, dict[Path, tuple[int, ExitStack]]] = WeakKeyDictionary()
"""By directory, the number of its tracker in checkpoints, and the hooks that put it there."""
