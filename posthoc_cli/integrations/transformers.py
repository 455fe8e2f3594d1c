"""A callback for the `Trainer` of transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import save_fsdp_model
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.integrations import (
    averaged,
    figures,
    find_state,
    make_tracker,
    new_state,
    was_left_out,
)
from posthoc_cli.profiles import check_sigma_rel
from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)

FOLDER = "ema"  # the averaged model within a checkpoint

_installed: WeakKeyDictionary[Trainer, str | None] = WeakKeyDictionary()
"""The trainers with a callback, and the checkpoint that each goes on from."""


class PostHocCallback(TrainerCallback, ExportableState):
    """Tracks averages in a trainer: `PostHocCallback("run/ema").install(trainer)`.

    Each step that the optimizer has taken counts. A checkpoint of the trainer holds the tracker's exact state, and
    `train(resume_from_checkpoint=...)` continues from it. The tracker is closed when training ends.

    Arguments:
        checkpoint_dir: the directory for the snapshots.
        evaluate: the length of the average to evaluate as well; None for none. Each evaluation runs a second time with
            averaged weights, whose metrics have the prefix `eval_ema`. With one of them as `metric_for_best_model`,
            checkpoints hold the averaged model, and `load_best_model_at_end` loads it. Before the first update the
            weights are evaluated and saved as they are. Other callbacks see one evaluation with the metrics of both.
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
        self._saved = -1  # the last step whose checkpoint has the state

    def install(self, trainer: Trainer) -> PostHocCallback:
        """Add the callback to a trainer. Nothing happens the second time.

        A callback alone is not told of checkpoints before they are pushed, nor where a training goes on from: this
        trainer's methods `train`, `save_model` and `evaluate` tell it.

        Raises:
            InvalidValueError: the trainer has another one.
            NotReadyError: this release of transformers has changed.
        """
        present = trainer.callback_handler.callbacks
        if self not in present:
            _check_alone([*present, self])
            trainer.add_callback(self)
        if trainer not in _installed:
            _watch(trainer)
        return self

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps."""
        given = {"checkpoint_dir": self.checkpoint_dir, "evaluate": self.evaluate, "folders": self.folders}
        options = {name: _plain(value) for name, value in self.options.items()}
        return {"args": given | options, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """Make the tracker, and continue from a checkpoint."""
        trainer = next((one for one in [*_installed] if one.state is state), None)
        if trainer is None:
            hint = "say PostHocCallback(...).install(trainer), in place of callbacks=[...]"
            raise NotReadyError("PostHocCallback", "was not installed", hint)
        _check_alone(trainer.callback_handler.callbacks)
        folder = _installed[trainer]
        name = type(self).__name__
        stored = state.stateful_callbacks.get(name)
        ema, tracked = self.ema, self._model and self._model()
        if ema is None or ema.closed or not args.auto_find_batch_size or tracked is not model:
            has_state = folder is not None and stored is not None
            self.ema = ema = make_tracker(
                model, self.checkpoint_dir, state.is_world_process_zero, self.options, has_state
            )
            self._model = ref(model)
            # Not a subclass's `log`, such as TRL's, which logs and forgets its own figures, too.
            ema.on_snapshot(lambda tracker: Trainer.log(trainer, figures(tracker, self.evaluate)))
        else:  # memory was too short: the loop begins again, with the weights as they are
            log.warning("training begins again with smaller batches; its averages go on from step %d", ema.step)
        if folder is not None:
            if stored is None:
                log.warning("%s was saved without this callback: its averages begin here", folder)
            else:
                ema.load_state(find_state(folder) or new_state(folder, model))
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
        """Warn if the checkpoint was saved in another way than by the trainer's `save_model`."""
        if self.ema is not None and self._saved != state.global_step:
            log.warning("the checkpoint of step %d lacks the state of the averages", state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write a last snapshot, and let others into the directory; averages can still be read."""
        if self.ema is not None:
            self.ema.close()

    def _save(self, trainer: Trainer, folder: Path) -> None:
        ema, sigma_rel = self.ema, self.evaluate
        assert ema is not None
        ema.save_state(new_state(folder, trainer.model))
        if sigma_rel is not None and (self.folders or _chooses_average(trainer.args)):
            with averaged(ema, trainer.model, sigma_rel):
                trainer.save_model(str(folder / FOLDER), _internal_call=True)
                if trainer.is_fsdp_enabled:  # as the trainer does itself, to load the best model
                    plugin = trainer.accelerator.state.fsdp_plugin
                    save_fsdp_model(plugin, trainer.accelerator, trainer.model, str(folder / FOLDER))
        self._saved = trainer.state.global_step


def _watch(trainer: Trainer) -> None:
    """Have a trainer's callback told of resumed checkpoints, of saved ones, and of evaluations."""
    train, save_model, evaluate = trainer.train, trainer.save_model, trainer.evaluate
    load_best = getattr(trainer, "_load_best_model", None)
    if load_best is None:
        reason = f"found no Trainer._load_best_model in transformers {transformers.__version__}"
        raise NotReadyError("install", reason, "use a release that the guide `trainers` names")

    def train_on(resume_from_checkpoint: str | bool | None = None, *given: Any, **others: Any) -> Any:
        found = resume_from_checkpoint
        _installed[trainer] = get_last_checkpoint(trainer.args.output_dir) if found is True else found or None
        return train(resume_from_checkpoint, *given, **others)

    def save_both(output_dir: str | None = None, *given: Any, **others: Any) -> None:
        """Save the state, too, where this is the first part of a checkpoint."""
        save_model(output_dir, *given, **others)
        callback, name = _callback_of(trainer), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        if callback is not None and callback.ema is not None and output_dir and Path(output_dir).name == name:
            callback._save(trainer, Path(output_dir))

    def evaluate_both(
        eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **others: Any
    ) -> dict[str, float]:
        callback = _callback_of(trainer)
        # With several sets, `evaluate` calls itself for each.
        if callback is None or callback._is_nested or callback.ema is None or callback.evaluate is None:
            return evaluate(eval_dataset, ignore_keys, metric_key_prefix, **others)  # type: ignore[no-any-return]
        callback._is_nested = True
        try:
            with _told_once(trainer) as metrics:
                metrics |= evaluate(eval_dataset, ignore_keys, metric_key_prefix, **others)
                with averaged(callback.ema, trainer.model, callback.evaluate):
                    metrics |= evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_ema", **others)
            return metrics
        finally:
            callback._is_nested = False

    def load_best_average() -> None:
        callback, best = _callback_of(trainer), trainer.state.best_model_checkpoint
        if callback is None or callback.evaluate is None or not _chooses_average(trainer.args):
            load_best()
            return
        trainer.accelerator.wait_for_everyone()  # the first process may be writing the folder
        try:
            trainer.state.best_model_checkpoint = str(Path(best) / FOLDER)
            load_best()
        finally:
            trainer.state.best_model_checkpoint = best

    trainer.train, trainer.save_model = train_on, save_both
    trainer.evaluate, trainer._load_best_model = evaluate_both, load_best_average
    _installed[trainer] = None


def _callback_of(trainer: Trainer) -> PostHocCallback | None:
    """The trainer's callback, which `restore_callback_states_from_checkpoint` may have made anew; None if removed."""
    return next((one for one in trainer.callback_handler.callbacks if isinstance(one, PostHocCallback)), None)


def _check_alone(callbacks: Iterable[TrainerCallback]) -> None:
    """Raise an InvalidValueError for two of ours, or one twice, which would count each step twice."""
    if sum(isinstance(one, PostHocCallback) for one in callbacks) > 1:
        reason = "hold PostHocCallback twice, and a checkpoint has room for the state of one"
        hint = "leave one out, or trainer.remove_callback(PostHocCallback); its snapshots give averages of all lengths"
        raise InvalidValueError("callbacks", reason, hint)


@contextmanager
def _told_once(trainer: Trainer) -> Iterator[dict[str, float]]:
    """Callbacks are told of all evaluations in the block by one `on_evaluate`, with the metrics that the block fills.

    Early stopping counts the calls, and would miss its metric in one of them.
    """
    handler, metrics = trainer.callback_handler, dict[str, float]()
    tell, told = handler.on_evaluate, []

    def note(args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any) -> TrainerControl:
        told.append(metrics)
        for one in handler.callbacks:
            if isinstance(one, ProgressCallback):  # each evaluation has a bar of its own
                one.on_evaluate(args, state, control)
        return control

    handler.on_evaluate = note
    try:
        yield metrics
    finally:
        handler.on_evaluate = tell
    if told:
        trainer.control = tell(trainer.args, trainer.state, trainer.control, dict(metrics))  # one changes what it gets


def _chooses_average(args: TrainingArguments) -> bool:
    """Whether the best model is the best average."""
    metric = args.metric_for_best_model or ""
    return bool(args.load_best_model_at_end) and metric.removeprefix("eval_").startswith("ema_")


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
