"""A callback for the `Trainer` of transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import save_fsdp_model
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.integrations import average_blocks, figures, make_tracker, read_state, write_state
from posthoc_cli.targets import as_target
from posthoc_cli.tracker import PostHocEMA, was_skipped

log = logging.getLogger(__name__)

# The callback that tracks each model, and the state of the training in which it does.
_tracking: WeakKeyDictionary[torch.nn.Module, tuple[PostHocCallback, TrainerState]] = (
    WeakKeyDictionary()
)


class PostHocCallback(TrainerCallback):
    """Tracks averages in a trainer: `Trainer(..., callbacks=[PostHocCallback("run/ema")])`.

    Each step that the optimizer has taken counts. A checkpoint of the trainer holds the tracker's
    exact state, and `train(resume_from_checkpoint=...)` continues from it. `ema` is the tracker,
    None before training, which closes it.

    Arguments:
        checkpoint_dir: the directory for the snapshots.
        evaluate: an average to evaluate too, a sigma_rel or a text such as "decay:linear:20%", or a
            list; it needs `install`. Each evaluation runs again with averaged weights, whose
            metrics have the prefix `eval_ema`, of a list `eval_ema_0.15`. With one of them as
            `metric_for_best_model`, checkpoints hold the averaged model, and
            `load_best_model_at_end` loads it. Before the first update there is none.
        options: other arguments of `PostHocEMA.from_model`; `resume` is "auto" by default.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        evaluate: float | str | Sequence[float | str] | None = None,
        **options: Any,
    ) -> None:
        lengths: Any = evaluate if isinstance(evaluate, list | tuple) else [evaluate]
        if evaluate is None:
            lengths = []
        targets = [as_target(length) for length in lengths]
        self._lengths = {target.label: target for target in targets}
        # Of metrics, and of folders.
        self._names = {
            label: f"ema_{label}" if lengths is evaluate else "ema" for label in self._lengths
        }
        self.checkpoint_dir = str(checkpoint_dir)
        self.evaluate = evaluate
        self.options = options
        self.ema: PostHocEMA | None = None
        self._installed: Callable[[], Trainer | None] = lambda: None  # the trainer of `install`
        self._has_skipped = False

    def install(self, trainer: Trainer) -> PostHocCallback:
        """Add the callback to a trainer, so that it can evaluate and save averages. A second call
        does nothing."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._installed = ref(trainer)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Make the tracker, and continue from a checkpoint."""
        owner, training = _tracking.get(model, (None, None))
        if training is state:
            reason = "hold two PostHocCallback, and a checkpoint has room for the state of one"
            hint = (
                "leave one out, or trainer.remove_callback(PostHocCallback); one yields "
                "averages of all lengths"
            )
            raise InvalidValueError("callbacks", reason, hint)
        trainer = self._installed()
        if trainer is not None and trainer.state is not state:
            trainer = None
        if self._lengths and trainer is None:
            reason = "needs the trainer, which its callbacks are not passed"
            hint = (
                "call PostHocCallback(..., evaluate=...).install(trainer), in place of "
                "callbacks=[...]"
            )
            raise NotReadyError("evaluate", reason, hint)
        ema = self.ema
        if ema is None or ema.closed or not args.auto_find_batch_size or owner is not self:
            self.ema = ema = make_tracker(model, self.checkpoint_dir, self.options)
        else:  # memory ran out: the trainer begins the loop again, with the present weights
            log.warning(
                "training begins again with smaller batches; its averages continue from step %d",
                ema.step,
            )
        _tracking[model] = self, state
        if trainer is not None:
            callbacks = trainer.callback_handler.callbacks
            # other callbacks' `on_evaluate` sees its metrics
            callbacks.remove(self)
            callbacks.insert(0, self)
            ema.on_snapshot(self._log_figures)
        if state.global_step:
            # which is of another training if the trainer has resumed from one elsewhere
            read_state(ema, _checkpoint(args, state), of_model=True)
        stepping = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        if isinstance(stepping, torch.optim.Optimizer):
            stepping.register_step_post_hook(self._after_optimizer_step)

    def _log_figures(self, tracker: PostHocEMA) -> None:
        trainer = self._installed()
        if trainer is not None:
            # Not the `log` of a subclass such as TRL's, which would log its pending figures and
            # clear them.
            Trainer.log(trainer, figures(tracker, self._lengths.values()))

    def _after_optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        *_: Any,
    ) -> None:
        self._has_skipped = was_skipped(optimizer)

    def on_step_end(
        self,
        *_: Any,
        model: Any = None,
        optimizer: Any = None,
        **__: Any,
    ) -> None:
        """Count the step, unless a GradScaler has skipped it."""
        if (
            self.ema is not None
            and not self._has_skipped
            and not getattr(optimizer, "step_was_skipped", False)
        ):
            self.ema.update_(model)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Evaluate the averages on the same data, and add their metrics to the weights' metrics."""
        trainer = self._installed()
        if self.ema is None or not self._lengths or trainer is None:
            return
        named = (name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime"))
        # "eval", or for one of several sets "eval_name"
        prefix = min(named, key=len, default="eval")
        losses_only = True if trainer.compute_metrics is None else None
        lengths = [*self._lengths.values()]
        for label, block in average_blocks(self.ema, trainer.model, lengths).items():
            for callback in trainer.callback_handler.callbacks:
                # end its bar: each evaluation has its own
                if isinstance(callback, ProgressCallback):
                    callback.on_evaluate(args, state, control)
            name = self._names[label]
            own = f"{prefix}_{name}"
            if prefix.startswith("eval"):
                own = prefix.replace("eval", f"eval_{name}", 1)
            with block:
                result = trainer.evaluation_loop(
                    eval_dataloader, "Evaluation", losses_only, metric_key_prefix=own
                )
            trainer.log(result.metrics)
            metrics.update(result.metrics)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        model: Any = None,
        **__: Any,
    ) -> None:
        """Add the tracker's state to the checkpoint that was just saved, and the averaged model if
        its metric chooses the best one."""
        if self.ema is None:
            return
        if state.is_hyper_param_search:
            log.warning(
                "checkpoints of trials, as of step %d, lack the state of the averages",
                state.global_step,
            )
            return
        folder = _checkpoint(args, state)
        trainer = self._installed()
        chosen = None if trainer is None else self._choose_label(args)
        averages = {} if chosen is None else {self._names[chosen]: self._lengths[chosen]}
        write_state(self.ema, folder, model, averages=averages)
        if trainer is None or chosen is None:
            return
        path = str(folder / self._names[chosen])
        for block in average_blocks(self.ema, trainer.model, [self._lengths[chosen]]).values():
            with block:
                trainer.save_model(path, _internal_call=True)
                # in the form from which the trainer loads its best model
                if trainer.is_fsdp_enabled:
                    save_fsdp_model(
                        trainer.accelerator.state.fsdp_plugin,
                        trainer.accelerator,
                        trainer.model,
                        path,
                    )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Write a last snapshot, release the directory, and load the best average if requested."""
        if self.ema is None:
            return
        self.ema.close()
        best = state.best_model_checkpoint
        chosen = self._choose_label(args)
        trainer = self._installed()
        if best is not None and chosen is not None and trainer is not None:
            trainer.accelerator.wait_for_everyone()  # the first process may be writing the folder
            try:
                state.best_model_checkpoint = str(Path(best) / self._names[chosen])
                trainer._load_best_model()
            finally:
                state.best_model_checkpoint = best

    def _choose_label(self, args: TrainingArguments) -> str | None:
        """Find the label of the average whose metric chooses the best model, or None."""
        metric = (args.metric_for_best_model or "").removeprefix("eval_")
        fitting = [label for label, name in self._names.items() if metric.startswith(f"{name}_")]
        return max(fitting, key=len, default=None) if args.load_best_model_at_end else None


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
