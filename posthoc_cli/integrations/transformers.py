"""A callback for the `Trainer` of transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import save_fsdp_model
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.integrations import (
    averaged,
    figures,
    find_state,
    local_of,
    make_tracker,
    new_state,
    was_left_out,
)
from posthoc_cli.profiles import check_sigma_rel
from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)

FOLDER = "ema"  # the averaged model within a checkpoint


class PostHocCallback(TrainerCallback, ExportableState):
    """Tracks averages in `Trainer(callbacks=[PostHocCallback("run/ema")])`.

    Each step that the optimizer has taken counts. A checkpoint of the trainer holds the tracker's exact state, and
    `train(resume_from_checkpoint=...)` continues from it. The tracker is closed when training ends.

    Arguments:
        checkpoint_dir: the directory for the snapshots.
        evaluate: the length of the average to evaluate as well, see `install`; None for none.
        folders: save the model with that average in each checkpoint, as the folder `ema` for `from_pretrained`.
        options: others of `PostHocEMA.from_model`.

    Attributes:
        ema: the tracker, from the beginning of the training on; None before.
    """

    def __init__(
        self, checkpoint_dir: str | Path, evaluate: float | None = None, folders: bool = False, **options: Any
    ) -> None:
        if folders and evaluate is None:
            raise InvalidValueError("folders", "needs the length of the average to save", "say evaluate=0.15")
        if evaluate is not None:
            evaluate = check_sigma_rel(evaluate)
        schedule = options.pop("schedule", None)
        if schedule is not None:  # a checkpoint lists arguments as JSON
            options |= {name: getattr(schedule, name) for name in ("sigma_rels", "checkpoint_every", "max_checkpoints")}
        self.checkpoint_dir, self.evaluate, self.folders, self.options = str(checkpoint_dir), evaluate, folders, options
        self.ema: PostHocEMA | None = None
        self._model: ref[torch.nn.Module] | None = None
        self._is_nested, self._is_left_out = False, False

    def install(self, trainer: Trainer) -> PostHocCallback:
        """Add the callback to a trainer, and evaluation under the average to its `evaluate`.

        Each evaluation runs a second time with averaged weights, whose metrics have the prefix `eval_ema`. With one of
        them as `metric_for_best_model`, checkpoints hold the averaged model, and `load_best_model_at_end` loads it.
        Before the first update the weights are evaluated and saved as they are.

        Raises:
            InvalidValueError: the callback was made without `evaluate`.
        """
        if self.evaluate is None:
            raise InvalidValueError("install", "needs the length of the average", "PostHocCallback(..., evaluate=0.15)")
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        evaluate, load_best = trainer.evaluate, trainer._load_best_model

        def evaluate_both(
            eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **others: Any
        ) -> dict[str, float]:
            callback = _callback_of(trainer)
            if callback._is_nested:  # with several sets, `evaluate` calls itself for each
                return evaluate(eval_dataset, ignore_keys, metric_key_prefix, **others)  # type: ignore[no-any-return]
            callback._is_nested = True
            try:
                metrics = dict(evaluate(eval_dataset, ignore_keys, metric_key_prefix, **others))
                ema, sigma_rel = callback.ema, callback.evaluate
                if ema is not None and sigma_rel is not None:
                    with averaged(ema, trainer.model, sigma_rel):
                        metrics |= evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_ema", **others)
                return metrics
            finally:
                callback._is_nested = False

        def load_best_average() -> None:
            if not _chooses_average(trainer.args):
                load_best()
                return
            trainer.accelerator.wait_for_everyone()  # the first process may be writing the folder
            best = trainer.state.best_model_checkpoint
            try:
                trainer.state.best_model_checkpoint = str(Path(best) / FOLDER)
                load_best()
            finally:
                trainer.state.best_model_checkpoint = best

        trainer.evaluate, trainer._load_best_model = evaluate_both, load_best_average
        return self

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps. Within the saving of a checkpoint, puts the tracker's state there first.

        `on_save` comes too late: after the checkpoint was pushed, and old ones deleted.
        """
        trainer, folder = (local_of("_save_checkpoint", name) for name in ("self", "output_dir"))
        if folder is not None and self.ema is not None:
            self._save(trainer, Path(folder))
        given = {"checkpoint_dir": self.checkpoint_dir, "evaluate": self.evaluate, "folders": self.folders}
        options = {name: _plain(value) for name, value in self.options.items()}
        return {"args": given | options, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """Make the tracker, and continue from a checkpoint. The folder is in no argument, but in the caller's frame."""
        loop = "_inner_training_loop"
        trainer, folder = (local_of(loop, name) for name in ("self", "resume_from_checkpoint"))
        if _callback_of(trainer) is not self:
            reason = "hold two of PostHocCallback, and a checkpoint has room for the state of one"
            raise InvalidValueError("callbacks", reason, "leave one out; its snapshots give averages of all lengths")
        if self.evaluate is not None and trainer.evaluate.__name__ != "evaluate_both":
            hint = f"PostHocCallback(..., evaluate={self.evaluate:g}).install(trainer), in place of callbacks=[...]"
            raise NotReadyError("evaluate", "this callback was not installed", hint)
        name = type(self).__name__
        stored = state.stateful_callbacks.get(name)
        ema, tracked = self.ema, self._model and self._model()
        if ema is None or ema.closed or not args.auto_find_batch_size or tracked is not model:
            self.ema = ema = make_tracker(model, self.checkpoint_dir, state.is_world_process_zero, self.options)
            self._model = ref(model)
            # Not a subclass's `log`, such as TRL's, which logs and forgets its own figures, too.
            ema.on_snapshot(lambda tracker: Trainer.log(trainer, figures(tracker, self.evaluate)))
        else:  # memory was too short: the loop begins again, with the weights as they are
            log.warning("training begins again with smaller batches; its averages go on from step %d", ema.step)
        if folder is not None:
            if stored is None:
                log.warning("%s was saved without this callback: its averages begin here", folder)
            else:
                ema.load_state(find_state(folder) or new_state(folder, model, self.options))
        if stored is None:  # the trainer expects it when it saves
            state.stateful_callbacks[name] = self.state()
        stepping = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        if isinstance(stepping, torch.optim.Optimizer):
            stepping.register_step_post_hook(lambda one, *_: setattr(self, "_is_left_out", was_left_out(one)))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """Count the step, unless a GradScaler has skipped it."""
        if self.ema is None or self._is_left_out or getattr(optimizer, "step_was_skipped", False):
            return
        logs_too = control.should_log
        self.ema.update_(model)
        control.should_log = logs_too  # `Trainer.log` has cleared it where figures were logged

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save together with the process that writes `trainer_state.json`: the others are not asked for their state."""
        if self.ema is not None and not args.should_save:
            trainer = local_of("_maybe_log_save_evaluate", "self")
            self._save(trainer, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write a last snapshot, and let others into the directory; averages can still be read."""
        if self.ema is not None:
            self.ema.close()

    def _save(self, trainer: Trainer, folder: Path) -> None:
        ema, sigma_rel = self.ema, self.evaluate
        assert ema is not None
        ema.save_state(new_state(folder, trainer.model, self.options))
        if sigma_rel is not None and (self.folders or _chooses_average(trainer.args)):
            with averaged(ema, trainer.model, sigma_rel):
                trainer.save_model(str(folder / FOLDER), _internal_call=True)
                if trainer.is_fsdp_enabled:  # as the trainer does itself, to load the best model
                    plugin = trainer.accelerator.state.fsdp_plugin
                    save_fsdp_model(plugin, trainer.accelerator, trainer.model, str(folder / FOLDER))


def _callback_of(trainer: Trainer) -> PostHocCallback:
    """The trainer's callback, which `restore_callback_states_from_checkpoint` may have made anew."""
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, PostHocCallback))


def _chooses_average(args: TrainingArguments) -> bool:
    """Whether the best model is the best average."""
    metric = args.metric_for_best_model or ""
    return bool(args.load_best_model_at_end) and metric.removeprefix("eval_").startswith("ema_")


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
