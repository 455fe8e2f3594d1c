"""A callback for the `Trainer` of Lightning, with the conventions of Lightning's
`WeightAveraging`."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.trainer.states import TrainerFn

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.integrations import (
    average_blocks,
    figures,
    is_sharded,
    make_tracker,
    name_averages,
)
from posthoc_cli.targets import as_target
from posthoc_cli.tracker import PostHocEMA, was_skipped

log = logging.getLogger(__name__)


class PostHocWeightAveraging(Callback):
    """Tracks averages in `Trainer(callbacks=[PostHocWeightAveraging("run/ema", validate=0.15)])`.

    Each batch after which an optimizer has stepped counts once. With `validate`, validation within
    `fit` runs with that average; checkpoints hold it as `state_dict`, and the raw weights as
    `current_model_state`. Every checkpoint holds the exact state of `ema`, the tracker, which is
    None before training.

    Arguments:
        checkpoint_dir: the directory for the snapshots.
        validate: that average, a sigma_rel or a text such as "decay:linear:20%"; None for the raw
            weights.
        copy_at_end: copy that average into the module when training ends.
        update_every_n_steps: steps between two updates of the averages; override `should_update`
            for other rules.
        use_buffers: average all floating-point buffers; else average BatchNorm's running statistics
            and copy others.
        device: "model" for averages on the module's device, "cpu" for the host; None: see
            `PostHocEMA.from_model`.
        options: other arguments of `PostHocEMA.from_model`; `resume` is "auto" by default.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        validate: float | str | None = None,
        copy_at_end: bool = False,
        update_every_n_steps: int = 10,
        use_buffers: bool = False,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if copy_at_end and validate is None:
            raise InvalidValueError(
                "copy_at_end", "needs the length of the average", "say validate=0.15"
            )
        self._wanted = [] if validate is None else [as_target(validate)]
        self.checkpoint_dir = Path(checkpoint_dir)
        self.validate = validate
        self.copy_at_end = copy_at_end
        buffers = "average" if use_buffers else "statistics"
        self.options = {
            "update_every": update_every_n_steps,
            "buffers": buffers,
            "device": device,
            **options,
        }
        self.ema: PostHocEMA | None = None
        self._steps = 0
        self._stepped = False  # whether an optimizer has stepped in this batch
        self._resumed = False  # whether a checkpoint was loaded
        self._state: dict[str, Any] | None = None
        self._handles = ExitStack()  # hooks to remove when training ends
        self._swapped = ExitStack()  # averaged weights to swap out when validation ends

    def should_update(
        self,
        step_idx: int | None = None,
        epoch_idx: int | None = None,
    ) -> bool:
        """Return whether to call `update_` after a step, or at the end of an epoch: after each
        step; override it for other rules.

        One of the arguments is passed, counted from 0. Each update covers the time since the last
        one.
        """
        return step_idx is not None

    def setup(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
    ) -> None:
        """Refuse a second such callback, since checkpoints have room for one."""
        kinds = (
            PostHocWeightAveraging,
            getattr(callbacks, "WeightAveraging", PostHocWeightAveraging),
        )
        if (
            stage == "fit"
            and sum(isinstance(callback, kinds) for callback in trainer.callbacks) > 1
        ):
            reason = (
                "hold several that average weights, or one twice, which would overwrite "
                "each other in checkpoints"
            )
            raise InvalidValueError(
                "callbacks", reason, "leave one; averages of all lengths come from its snapshots"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the tracker, unless this is a `fast_dev_run`, and continue from the checkpoint that
        was loaded."""
        if trainer.fast_dev_run:  # such a run writes no checkpoints and no logs either
            return
        self.ema = ema = make_tracker(pl_module, self.checkpoint_dir, self.options)
        if self._state is not None:
            ema.load_state_dict(self._state)
        # `ckpt_path` is None where a tuner loads its own checkpoint, before there are averages.
        elif self._resumed and trainer.ckpt_path is not None and not ema.step:
            log.warning(
                "%s was made without this callback: the averages begin with this training",
                trainer.ckpt_path,
            )
        self._state = None
        self._resumed = False
        self._steps = max(self._steps, int(ema.t))  # with `resume`, the run's time continues
        if self._wanted and any(
            getattr(saver, "save_weights_only", 0) for saver in trainer.checkpoint_callbacks
        ):
            log.warning(
                "ModelCheckpoint(save_weights_only=True) saves raw weights: Lightning calls no "
                "callback then"
            )
        for optimizer in trainer.optimizers:
            self._handles.callback(optimizer.register_step_post_hook(self._after_step).remove)

        def log_figures(tracker: PostHocEMA) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(figures(tracker, self._wanted), step=trainer.global_step)

        ema.on_snapshot(log_figures)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *_: Any,
    ) -> None:
        """Count a step if an optimizer has taken one."""
        if not self._stepped or self.ema is None:
            return
        self._stepped = False
        self._steps += 1
        if self.should_update(step_idx=self._steps - 1):
            self.ema.update_(pl_module, t=self._steps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update at the end of the epoch if `should_update` says so and its last step was no
        update."""
        wants = self.should_update(epoch_idx=trainer.current_epoch)
        if self.ema is not None and wants and self._steps > self.ema.t:
            self.ema.update_(pl_module, t=self._steps)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap averaged weights into the module, within `fit` and except for the sanity check."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and self.ema is not None and self._wanted:
            for block in average_blocks(self.ema, pl_module, self._wanted).values():
                self._swapped.enter_context(block)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the raw weights back into the module."""
        self._swapped.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a last snapshot, and with `copy_at_end` copy the average into the module."""
        self._finish()
        if self.ema is not None and self.copy_at_end and self.ema.has_average:
            self.ema.load_into(pl_module, self._wanted[0])

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        exception: BaseException,
    ) -> None:
        """Close the tracker; log an error of the closing, which must not hide the exception."""
        try:
            self._finish()
        except Exception as error:  # noqa: BLE001  it is logged
            log.error("%s: %s", self.checkpoint_dir, error)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that Lightning saves for a callback: the number of steps so far."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = state_dict["steps"]

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Save the average as `state_dict`, the raw weights as `current_model_state`, and the
        tracker's state; for a sharded module write a snapshot, from which a training with the
        checkpoint's weights continues."""
        ema = self.ema
        if ema is None:
            return
        # such a checkpoint has one set of tensors, the raw weights
        if is_sharded(pl_module):
            if ema.has_average:
                ema.snapshot()
            return
        checkpoint["averaging_state"] = ema.state_dict()
        for block in average_blocks(ema, pl_module, self._wanted).values():
            averaged = {}
            with block:
                for name, value in pl_module.state_dict().items():
                    averaged[name] = value.detach().clone()
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = checkpoint["state_dict"] | averaged
            averages = {"state_dict": self._wanted[0]}
            checkpoint["averaging_state"] = name_averages(checkpoint["averaging_state"], averages)

    def on_load_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Keep the tracker's state for `on_train_start`, and replace the averaged weights by the
        raw ones."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._state = checkpoint.get("averaging_state")
        self._resumed = True
        if "current_model_state" in checkpoint:
            pl_module.load_state_dict(
                checkpoint["current_model_state"], strict=pl_module.strict_loading
            )

    def _after_step(
        self,
        optimizer: torch.optim.Optimizer,
        *_: Any,
    ) -> None:
        self._stepped |= not was_skipped(optimizer)

    def _finish(self) -> None:
        self._swapped.close()
        self._handles.close()
        if self.ema is not None:
            self.ema.close()
