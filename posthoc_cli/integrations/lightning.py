"""A callback for the `Trainer` of Lightning, on the conventions of its own `WeightAveraging`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, __version__, callbacks
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.integrations import (
    check_found,
    figures,
    is_sharded,
    lengths,
    make_tracker,
    read_state,
    was_left_out,
    write_state,
)
from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)


class PostHocWeightAveraging(Callback):
    """Tracks averages in `Trainer(callbacks=[PostHocWeightAveraging("run/ema", validate=0.15)])`.

    Each batch after which an optimizer has stepped counts once. With `validate`, validation within `fit` runs under
    that average, and checkpoints hold it as `state_dict`, beside the raw weights as `current_model_state`; those of
    `ModelParallelStrategy` hold the raw weights. The tracker's exact state is in every checkpoint.

    Arguments:
        checkpoint_dir: the directory for the snapshots.
        validate: the average for validation and in checkpoints, a sigma_rel or a text such as "decay:linear:20%"; None
            for the raw weights. Each of a list is validated beside the raw weights, by one more pass that other
            callbacks do not see, with metrics such as `ema_0.15_val_loss`; checkpoints hold the one whose metric
            `ModelCheckpoint` monitors, else raw weights, as of one that training is too short for still.
        copy_at_end: copy that average into the module when training ends.
        update_every_n_steps: steps between two updates of the averages, see `should_update` for others.
        update_starting_at_step, update_starting_at_epoch: no update before both.
        use_buffers: average all floating-point buffers; else BatchNorm's running statistics, and others are copied.
        device: "model" for averages beside the parameters, "cpu" on the host; None as `PostHocEMA.from_model` does.
        options: others of `PostHocEMA.from_model`; `resume` is "auto" by default.

    Attributes:
        ema: the tracker, from the beginning of the training on; None before.
    """

    def __init__(
        self, checkpoint_dir: str | Path, validate: float | str | Sequence[float | str] | None = None,
        copy_at_end: bool = False, update_every_n_steps: int = 10, update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None, use_buffers: bool = False, device: str | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        if copy_at_end and (validate is None or isinstance(validate, list | tuple)):
            raise InvalidValueError("copy_at_end", "needs one length of the average", "say validate=0.15")
        self._lengths = lengths(validate)
        self._single = None if isinstance(validate, list | tuple) else next(iter(self._lengths.values()), None)
        self._saved = self._single  # the average in checkpoints
        self._found: dict[str, Any] = {}  # metrics of several
        self.checkpoint_dir, self.validate, self.copy_at_end = Path(checkpoint_dir), validate, copy_at_end
        self.update_starting_at_step, self.update_starting_at_epoch = update_starting_at_step, update_starting_at_epoch
        buffers = "average" if use_buffers else "statistics"
        self.options = {"update_every": update_every_n_steps, "buffers": buffers, "device": device, **options}
        self.ema: PostHocEMA | None = None
        self._steps, self._stepped = 0, False
        self._state: dict[str, Any] | None = None
        self._resumed = False
        self._handles = ExitStack()  # what the training's end undoes
        self._swapped = ExitStack()  # what validation's end undoes
        self._epoch = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to hand the weights over after a step, or at the end of an epoch; to be overridden.

        One argument is given, counted from 0. Averages have the right profile whatever this answers: each update
        stands for the time since the one before it. `update_every_n_steps` counts what is handed over.
        """
        return (
            step_idx is not None
            and step_idx >= (self.update_starting_at_step or 0)
            and self._epoch >= (self.update_starting_at_epoch or 0)
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback of this kind, since checkpoints have room for one average, and releases without what
        `validate=[...]` needs.

        And have `save_checkpoint` tell where it saves, which callbacks are not told.
        """
        kinds = (PostHocWeightAveraging, getattr(callbacks, "WeightAveraging", PostHocWeightAveraging))
        if stage == "fit" and len([one for one in trainer.callbacks if isinstance(one, kinds)]) > 1:
            reason = "hold several that average weights, or one twice, which would overwrite each other in checkpoints"
            raise InvalidValueError("callbacks", reason, "leave one; its snapshots give averages of all lengths")
        if self._single is None and self._lengths:
            loop = getattr(getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None), "val_loop", None)
            found = {f"val_loop.{name}": hasattr(loop, name) for name in ("run", "skip", "setup_data")}
            check_found("validate", f"lightning {__version__}", found)
        if trainer not in _saving:
            _watch_saving(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the tracker, and continue from the checkpoint that was loaded. A `fast_dev_run` has none."""
        if trainer.fast_dev_run:  # it leaves neither checkpoints nor logs either
            return
        saves_folders = getattr(trainer.strategy, "_save_distributed_checkpoint", False)
        if is_sharded(pl_module) and not saves_folders:
            reason = "saves a checkpoint to one file, and processes of a sharded model save theirs to a folder"
            raise InvalidValueError("strategy", reason, "use ModelParallelStrategy(save_distributed_checkpoint=True)")
        self.ema = ema = make_tracker(pl_module, self.checkpoint_dir, self.options)
        if self._state is not None:
            ema.load_state_dict(self._state)
        # A tuner loads a checkpoint of its own, before there are averages.
        elif (
            self._resumed and trainer.ckpt_path is not None and not read_state(ema, trainer.ckpt_path) and not ema.step
        ):
            log.warning("%s was made without this callback: its averages begin here", trainer.ckpt_path)
        self._state, self._resumed = None, False
        self._steps = max(self._steps, int(ema.t))  # with `resume`, the run's own time goes on
        if self._lengths and any(getattr(one, "save_weights_only", 0) for one in trainer.checkpoint_callbacks):
            log.warning("ModelCheckpoint(save_weights_only=True) saves raw weights: Lightning asks no callback then")
        if self._single is None and self._lengths:
            self._saved = self._monitored(trainer)
            self._validate_each(trainer, pl_module)
        for optimizer in trainer.optimizers:
            self._handles.callback(optimizer.register_step_post_hook(self._after_step).remove)

        def log_figures(tracker: PostHocEMA) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(figures(tracker, self._lengths.values()), step=trainer.global_step)

        ema.on_snapshot(log_figures)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count a step if an optimizer has taken one."""
        if not self._stepped or self.ema is None:
            return
        self._stepped, self._epoch = False, trainer.current_epoch
        self._steps += 1
        if self.should_update(step_idx=self._steps - 1):
            self.ema.update_(pl_module, t=self._steps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask whether to update at the end of the epoch, unless its last step was handed over."""
        wants = self.should_update(epoch_idx=trainer.current_epoch)
        if self.ema is not None and wants and self._steps > self.ema.t:
            self.ema.update_(pl_module, t=self._steps)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module averaged weights, within `fit` and except for sanity checking."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and self.ema is not None and self._single is not None:
            for block in self.ema.models(pl_module, [self._single]).values():
                self._swapped.enter_context(block)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its own weights back, and log the metrics of several averages."""
        self._swapped.close()
        found, self._found = self._found, {}
        pl_module.log_dict(found)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a last snapshot, and copy the average into the module where asked."""
        self._finish()
        if self.ema is not None and self._single is not None and self.copy_at_end:
            self.ema.load_into(pl_module, self._single)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish as at the end; an error of that must not hide the exception."""
        try:
            self._finish()
        except Exception as error:  # noqa: BLE001  it is logged
            log.error("%s: %s", self.checkpoint_dir, error)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps of a callback: the steps so far."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same of a checkpoint."""
        self._steps = state_dict["steps"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average in the place of the raw weights, and the tracker's state beside both.

        A checkpoint that is a folder keeps the raw weights: Lightning saves one set of tensors there.
        """
        ema = self.ema
        if ema is None:
            return
        if is_sharded(pl_module):
            folder = trainer.strategy.broadcast(_saving[trainer])
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_state(ema, folder, pl_module)
            return
        checkpoint["averaging_state"] = ema.state_dict()
        for block in ema.models(pl_module, [self._saved]).values() if self._saved and ema.has_average else ():
            with block:
                averaged = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = checkpoint["state_dict"] | averaged

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the state for the training to come, and load the raw weights over the averaged ones."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._state, self._resumed = checkpoint.get("averaging_state"), True
        if "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._stepped |= not was_left_out(optimizer)

    def _monitored(self, trainer: Trainer) -> float | str | None:
        """The average of a list that checkpoints hold: the one whose metric chooses them."""
        monitors = [one.monitor for one in trainer.checkpoint_callbacks if getattr(one, "monitor", None)]
        fitting = ([label for label in self._lengths if one.startswith(f"ema_{label}_")] for one in monitors)
        chosen = [*dict.fromkeys(max(labels, key=len, default="") for labels in fitting)]
        if len(chosen) > 1:
            what = f"the average {chosen[0]}" if chosen[0] else "the raw weights"
            log.warning("every checkpoint holds %s, though other metrics choose some of them", what)
        return self._lengths.get(chosen[0]) if chosen else None

    def _validate_each(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have each validation of this training begin with one of every average."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        run = loop.run

        def run_each() -> Any:
            loop.setup_data()
            if loop.skip or self.ema is None:
                return run()
            others, loggers, known = trainer.callbacks, trainer.loggers, trainer.callback_metrics
            before = dict(known)
            try:  # no callback or logger sees these passes
                trainer.callbacks, trainer.loggers = [], [_Silent(trainer.log_dir)] if loggers else []
                for label, block in self.ema.models(pl_module, [*self._lengths.values()]).items():
                    known.clear()
                    with block:
                        run()
                    for name, value in known.items():
                        self._found[f"ema_{label}_{name}".replace("/dataloader_idx", "_dataloader_idx")] = value
            finally:
                trainer.callbacks, trainer.loggers = others, loggers
                known.clear()
                known.update(before)
            return run()

        loop.run = run_each
        self._handles.callback(vars(loop).pop, "run", None)

    def _finish(self) -> None:
        self._swapped.close()
        self._handles.close()
        if self.ema is not None:
            self.ema.close()


class _Silent(DummyLogger):
    """A logger that takes everything and keeps nothing, so that a module's own calls of it go on working."""

    def __init__(self, save_dir: str | None) -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self) -> str | None:
        """The folder of the loggers that it stands for."""
        return self._save_dir


_saving: WeakKeyDictionary[Trainer, Any] = WeakKeyDictionary()
"""The path of the last checkpoint that each trainer has begun to save."""


def _watch_saving(trainer: Trainer) -> None:
    save = trainer.save_checkpoint

    def save_checkpoint(filepath: Any, *given: Any, **others: Any) -> None:
        _saving[trainer] = filepath
        save(filepath, *given, **others)

    _saving[trainer] = None
    trainer.save_checkpoint = save_checkpoint
