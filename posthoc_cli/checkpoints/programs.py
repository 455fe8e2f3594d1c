"""The names that programs use in their checkpoints: of values, files and folders."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

Unit = Literal["steps", "epochs", "images", ""]


@dataclass(frozen=True)
class Program:
    """The names of one program; empty where it has none of its own."""

    step: str = ""  # the value that states the step; `*` is the last item of a list
    unit: Unit = "steps"  # what this value counts
    epoch: str = ""  # the value that states the epoch
    # the values that show that it has written a file, if it counts epochs from 0
    from_0: frozenset[str] = frozenset()
    # the values that show that the model in a file is an average by default
    in_place: frozenset[str] = frozenset()
    model: str = ""  # the file of a model, though its name seems to say a state
    # patterns of files of a training's state: that hold an average among other things, or
    average_state: str = ""
    weights_state: str = ""  # the weights, so that they count where nothing else is a checkpoint


PROGRAMS = {
    "Lightning or transformers": Program(step="global_step"),
    "DeepSpeed": Program(step="global_steps"),
    "": Program(step="step", epoch="epoch"),
    "torch-ema, k-diffusion or others": Program(step="steps"),
    "nanoGPT or others": Program(step="iter_num"),
    "Megatron or others": Program(step="iteration", model="model_optim_rng.pt"),
    "torchtitan": Program(step="train_state.step"),
    "mmengine": Program(step="meta.iter", epoch="meta.epoch"),
    "kohya": Program(step="ss_steps"),
    "ai-toolkit": Program(step="training_info.step"),
    "ACE": Program(step="num_batches_seen"),
    "Composer": Program(step="state.timestamp.Timestamp.batch"),
    "fairseq": Program(step="optimizer_history.*.num_updates"),
    "accelerate": Program(average_state=r"custom_checkpoint_\d+\.pkl"),
    "SpeechBrain": Program(step="optimizer_step"),
    "icefall": Program(step="batch_idx_train"),
    "EDM": Program(step="state.cur_nimg", unit="images", weights_state=r"training-state-\d+\.pt"),
    "RT-DETR or D-FINE": Program(epoch="last_epoch"),
    "nnU-Net": Program(epoch="current_epoch"),
    "YOLOX": Program(epoch="start_epoch", in_place=frozenset({"start_epoch", "best_ap"})),
    "timm": Program(from_0=frozenset({"arch", "version", "epoch"})),
}
"""A row for each program, or several; of several steps in a file the first row's counts. `step` is
of loops of one's own, too."""

_ROWS = PROGRAMS.values()
STEP_VALUES = {row.step: row.unit for row in _ROWS if row.step}
EPOCH_VALUES = [row.epoch for row in _ROWS if row.epoch]
COUNTERS = {name.rpartition(".")[2] for name in STEP_VALUES}
COUNTERS |= {"decay", "initted", "n_averaged", "updates"}
"""Last keys of values that trainings store as tensors of one element."""
FROM_0 = [row.from_0 for row in _ROWS if row.from_0]
MODEL_FILES = {row.model for row in _ROWS if row.model}
AVERAGE_STATES = re.compile("|".join(row.average_state for row in _ROWS if row.average_state))
WEIGHTS_STATES = re.compile("|".join(row.weights_state for row in _ROWS if row.weights_state))


def program_of_averages(values: Set[str]) -> str:
    """Return the program that wrote a file with these values, and saves its average in place of the
    weights by default; empty if there is none."""
    for name, row in PROGRAMS.items():
        if row.in_place and values >= row.in_place:
            return name
    return ""


def program_of(value: str) -> str:
    """Return the program, or several, that states steps or images in a value of this name; empty if
    many do."""
    for name, row in PROGRAMS.items():
        if value and value == row.step:
            return name
    return ""
