"""A tracker whose state `Accelerator.save_state` saves and `load_state` loads."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from accelerate import Accelerator

from posthoc_cli.integrations import figures, make_tracker, read_state, write_state
from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    checkpoint_dir: str | Path,
    optimizer: Any = None,
    **options: Any,
) -> PostHocEMA:
    """Return a tracker whose exact state is saved in every checkpoint of the accelerator.

    Call it in every process, before or after `accelerator.prepare`; for a model under FSDP2,
    afterwards. Give each of several models its own directory, and make the calls in the same order
    whenever the script runs. A second tracker of one model closes the first one, with a warning,
    and takes its place in checkpoints.

    Arguments:
        model: the model to track, wrapped or bare.
        checkpoint_dir: the directory for the snapshots.
        optimizer: the optimizer whose steps count, wrapped or bare: steps that `accumulate` or a
            GradScaler skips do not. None: call `ema.update_(model)` after each step that was taken.
        options: other arguments of `PostHocEMA.from_model`; `resume` is "auto" by default.
    """
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    places = _prepared.setdefault(accelerator, [])
    # A place in checkpoints is free of the same model's tracker, or else of one that is closed or
    # has lost its model.
    free = [number for number, (_, other, _) in enumerate(places) if other() is bare]
    for number, (tracker, other, _) in enumerate(places):
        if other() is None or (earlier := tracker()) is None or earlier.closed:
            free.append(number)
    number = [*free, len(places)][0]
    for tracker, _, earlier_hooks in places[number : number + 1]:
        earlier_hooks.close()
        # as when a notebook's cell runs again
        if (earlier := tracker()) is not None and not earlier.closed:
            log.warning(
                "%s: closed, as another tracker of its model replaces this one",
                earlier.checkpoint_dir,
            )
            earlier.close()
    ema = make_tracker(model, checkpoint_dir, options)
    if optimizer is not None:
        ema.attach(optimizer)
    ema.on_snapshot(lambda tracker: accelerator.log(figures(tracker), step=tracker.step))

    held = ref(model)  # the accelerator, which keeps the hooks, may release the model

    def save(models: object, weights: object, folder: str) -> None:
        tracked = held()
        if tracked is not None:
            write_state(ema, folder, tracked, number)

    def load(models: object, folder: str) -> None:
        if not read_state(ema, folder, number) and accelerator.is_main_process:
            log.warning(
                "%s was saved without this tracker: the averages begin with this training", folder
            )

    hooks = ExitStack()
    hooks.callback(accelerator.register_save_state_pre_hook(save).remove)
    hooks.callback(accelerator.register_load_state_pre_hook(load).remove)
    places[number : number + 1] = [(ref(ema), ref(bare), hooks)]
    return ema


# the hooks put the tracker into checkpoints
_Place = tuple[ref[PostHocEMA], ref[torch.nn.Module], ExitStack]
_prepared: WeakKeyDictionary[Accelerator, list[_Place]] = WeakKeyDictionary()
