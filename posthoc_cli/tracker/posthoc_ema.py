"""`PostHocEMA`: the hook that a training loop calls, and the averages that it returns at any time.

    training's thread             averages' thread           snapshots' thread
    -----------------             ----------------           -----------------
    update_(model)
      names, shapes checked  ->   means, folds
      returns (CPU: when done)    a snapshot is due: rounded ->  measured, written, thinned
    model, state_dict        ->   tiles of one update's averages
    flush, close             ->   (waits for both)

The averages' thread alone changes and reads averages, one job at a time, so that every reader, from
any thread, sees the averages of one update; the snapshots' thread alone writes. A call holds the
tracker: other threads wait for its end, and a call from within it, as from a signal handler, is
refused."""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, overload
from weakref import WeakSet

import numpy as np
import torch
from torch import nn

# Compiled code must not trace file operations and threads. Unlike torch.compiler.disable, this does
# not import torch's compiler where no optimizer has done so, which takes two seconds.
from torch._compile import _disable_dynamo as not_compiled

from posthoc_cli.devices import is_capturing
from posthoc_cli.errors import (
    InvalidValueError,
    NotReadyError,
    PostHocError,
    RefusedCallError,
    quote,
)
from posthoc_cli.run import Run
from posthoc_cli.snapshots.directory import DirectoryLock
from posthoc_cli.snapshots.selection import make_selection, statistics_notice
from posthoc_cli.snapshots.snapshot import recorded_weights
from posthoc_cli.snapshots.weights_sample import are_equal
from posthoc_cli.synthesis.weights import Weights
from posthoc_cli.targets import Wanted, as_targets
from posthoc_cli.tracker.arguments import Settings
from posthoc_cli.tracker.attach import Attachment
from posthoc_cli.tracker.background import CallLock
from posthoc_cli.tracker.filling import (
    AveragedModel,
    Module,
    check_raw,
    check_weights,
    fill_in,
    is_swapped,
)
from posthoc_cli.tracker.model import (
    ModelWatch,
    check_model,
    into_dtensors,
    unwrap,
)
from posthoc_cli.tracker.pipeline import Pipeline, wait_for_writers
from posthoc_cli.tracker.progress import TrainingProgress
from posthoc_cli.tracker.reading import AverageReader, Dtype
from posthoc_cli.tracker.resume import (
    Start,
    check_path,
)
from posthoc_cli.tracker.saving import OwnState
from posthoc_cli.tracker.state import Tracking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_MAKE = (
    "is made by PostHocEMA.from_model(model, checkpoint_dir, sigma_rels=...) for a new run, or by "
    "PostHocEMA.from_path(checkpoint_dir) for the run in a directory"
)


class PostHocEMA:
    """Tracks power-function averages of a model and makes the average of any other length from
    them.

    Make one with `from_model` or `from_path`. A background thread writes the snapshots; `flush`
    waits until all due ones are on disk. `close`, or the end of a `with` block, also releases the
    directory to other writers. Public attributes: `checkpoint_dir`, the directory of the snapshots,
    and `settings`, the checked arguments.
    """

    def __init__(
        self,
        start: object = None,
        model: nn.Module | None = None,
        device: Any = None,
        **_: object,
    ) -> None:
        if not isinstance(start, Start):
            raise InvalidValueError("PostHocEMA(...)", _MAKE)
        self.checkpoint_dir = start.directory
        self.settings = start.settings
        self._start = start
        self._members = start.tracking.tracked.members
        self._watch = ModelWatch(self.settings.selection, self._members, model)
        self._pipeline = Pipeline(self.checkpoint_dir, self.settings, start.tracking, device)
        self._reader = AverageReader(start, self._pipeline)
        self._own_state = OwnState(start, self._pipeline, self._watch)
        # For a tracker that nobody closes. It must not wait for a thread: garbage may be collected
        # in that thread.
        weakref.finalize(self, self._pipeline.abandon).atexit = False
        # weak: the optimizer's hook holds the attachment, which holds the tracker
        self._attachment: weakref.ref[Attachment] | None = None
        self._lock = CallLock()
        self._callbacks: list[Callable[[Any], None]] = []
        self._reported = 0
        self._warned_of: set[str] = set()
        self._is_filled = False  # whether `load_into` has replaced the model's weights
        _all.add(self)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        checkpoint_dir: str | Path,
        sigma_rels: Sequence[float] = (0.05, 0.28),
        update_every: int = 10,
        checkpoint_every: int = 1000,
        update_after_step: int = 0,
        max_checkpoints: int | None = 20,
        checkpoint_dtype: Dtype = torch.float16,
        t_unit: str = "steps",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        buffers: str = "statistics",
        device: str | None = None,
        resume: str | int | None = None,
        group: Any = None,
    ) -> PostHocEMA:
        """Make a tracker for a new run, or with `resume` for an existing one. The first `update_`
        begins to write.

        With replicas in several processes the first one keeps and writes the averages, and the
        others only count steps; with a sharded model each process keeps and writes its part.
        `metrics` shows the memory in use.

        Arguments:
            model: the model to track, wrapped or bare; names are the bare model's.
            checkpoint_dir: the directory for the snapshots, created if it is missing. One run per
                directory.
            sigma_rels: profiles to track. Two reach almost every length between them; `ema
                error-plot` shows how exactly.
            update_every, update_after_step: averages are updated at the calls that are multiples of
                the first and come after the second.
            checkpoint_every: snapshots are due at its multiples. It must be a multiple of
                `update_every`; the default of 10 is reduced to a common divisor, with a warning.
            max_checkpoints: number of snapshots to keep of each profile; the least useful ones are
                removed. None keeps all.
            checkpoint_dtype: dtype of stored averages, float32 for values that do not fit in it;
                None for each parameter's own.
            t_unit: the unit of `t`, if you pass your own clock to `update_`.
            include, exclude: globs on names, such as "decoder.*". Only tensors that match the
                first are tracked, even if they require no gradients, and none that match the
                second. By default all that require gradients.
            buffers: "statistics" averages BatchNorm's running statistics and copies other buffers
                as they are at the time of the average; "copy" copies all buffers; "average"
                averages floating-point buffers like parameters.
            device: "model" keeps averages on the parameters' devices, where the training thread
                updates them; "cpu" on the host, where background threads do. None means "cpu" for
                models on accelerators.
            resume: "auto" continues the run in the directory, if there is one, from the newest
                snapshots at whose time the network had the model's present weights, exactly or as
                float16 or bfloat16; for other weights the first `update_` raises an error, unless
                `load_state_dict` was called. A number continues from the snapshots of that call of
                `update_`, and warns about other weights. 0 begins anew: the first `update_` sets
                the directory's snapshots aside. None begins a new run. With `resume` an earlier
                tracker of the directory in this process is closed first, and writes a snapshot of
                its model's weights, so that a notebook's cell can be run again.
            group: the torch.distributed group of the processes that make this tracker; by default
                the group of the model's DistributedDataParallel, else all processes.

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
            DirectoryError, MismatchError: the directory is not writable, or it holds a run and
                `resume` is None.
        """
        settings = Settings.from_arguments(
            sigma_rels=sigma_rels,
            update_every=update_every,
            checkpoint_every=checkpoint_every,
            update_after_step=update_after_step,
            max_checkpoints=max_checkpoints,
            checkpoint_dtype=checkpoint_dtype,
            t_unit=t_unit,
            selection=make_selection(include, exclude, buffers),
        )
        directory = check_path(checkpoint_dir)
        if resume is not None:
            _close_earlier(directory)
        wait_for_writers(directory)
        return cls(
            Start.for_model(check_model(model), directory, settings, resume, group), model, device
        )

    @classmethod
    def from_path(
        cls,
        checkpoint_dir: str | Path,
        model: nn.Module | None = None,
        step: int | None = None,
        device: str | None = None,
        group: Any = None,
    ) -> PostHocEMA:
        """Make a tracker of the run in a directory, with its settings: to synthesize from, or to
        continue tracking.

        Tracking continues as with `resume="auto"` of `from_model`, or from the snapshots of a
        `step`. The first `update_` moves later snapshots to the folder `superseded`. The model's
        tensors are checked against the snapshots. The call waits for snapshots that other trackers
        of this process still have to write.
        """
        directory = check_path(checkpoint_dir)
        if model is not None:
            check_model(model)
        wait_for_writers(directory)
        return cls(Start.for_run(directory, model, step, group), model, device)

    def __repr__(self) -> str:
        profiles = ", ".join(f"{sigma_rel:g}" for sigma_rel in self.settings.sigma_rels)
        closed = ", closed" if self.closed else ""
        return (
            f"PostHocEMA({str(self.checkpoint_dir)!r}, step {self.step:,}, sigma_rels "
            f"{profiles}{closed})"
        )

    @property
    def run_id(self) -> str:
        """The 32 hexadecimal digits that identify this run in the headers of its snapshots."""
        return self._pipeline.tracking.run_id

    @property
    def step(self) -> int:
        """The number of calls of `update_` so far in this run."""
        return self._pipeline.progress.step

    def __getattr__(self, name: str) -> Any:
        hint = ""
        if name in ("update", "update_parameters"):
            hint = ": call ema.update_(model) after each step of the optimizer"
        message = f"'PostHocEMA' object has no attribute {name!r}{hint}"
        raise AttributeError(message, name=name, obj=self)

    @property
    def t(self) -> float:
        """The training time of the last call of `update_`."""
        return self._pipeline.progress.t

    @property
    def closed(self) -> bool:
        """Whether `close` was called. A closed tracker takes no updates; its averages can still be
        read."""
        return self._pipeline.closed

    @property
    def keeps_averages(self) -> bool:
        """Whether this process keeps and writes averages. Other processes of its group only count
        the steps."""
        return self._members.keeps

    @property
    def has_average(self) -> bool:
        """Whether an update has been due. Before the first one, calls for averages raise a
        NotReadyError."""
        return self._reader.has_average

    @property
    def run(self) -> Run:
        """This run's snapshots on disk, as a `Run`, once those that are being written are
        complete."""
        self.flush()
        return Run(self.checkpoint_dir)

    def tracks(self, model: nn.Module) -> bool:
        """Return whether `model`, wrapped or bare, is the model that this tracker has taken updates
        from."""
        has_taken = self.step > 0 and not self._pipeline.tracking.resumes
        return has_taken and self._watch.model is unwrap(check_model(model))

    # --- tracking

    @not_compiled
    def update_(
        self,
        model: nn.Module,
        t: float | None = None,
    ) -> None:
        """Count a training step of the model, wrapped or bare. Call it after every optimizer step.

        `t` is the training time on your own clock (images, tokens), larger at every call; or None
        at every call. If the first call fails, as when another process is writing to the directory,
        it has no effect.

        Raises:
            NonFiniteError, ModelMismatchError: a parameter holds nan or infinity, or the model has
                changed. The averages stay, and the call counts. An average on the host raises the
                NonFiniteError at the next call.
            WriteError: an earlier snapshot could not be written. Raised once; this call has done
                its work.
            RefusedCallError: the tracker is closed, attached or in use, or the model holds averaged
                weights.
        """
        if self._attached is not None:
            reason = "this tracker is attached to an optimizer and is updated by its steps"
            raise RefusedCallError(
                "update_", reason, "leave out either this call or attach(), or detach() first"
            )
        self._count(check_model(model), t)

    def _count(
        self,
        model: nn.Module,
        t: float | None,
    ) -> None:
        """Count a training step."""
        check_raw(model, "update_")
        if is_capturing():
            reason = "a CUDA graph is being captured, which would count and average this step once"
            raise RefusedCallError("update_", reason, "call it after graph.replay()")
        grad_mode = torch.is_grad_enabled()
        try:
            with self._call("update_"):
                self._pipeline.check_open()
                self._watch.check_kind(model, self._pipeline.tracking.tracked)
                self._begin()
                self._advance(model, t)
        finally:  # a signal handler can raise just before torch.no_grad() restores the mode
            torch.set_grad_enabled(grad_mode)
        self._pipeline.raise_noted()
        self._run_callbacks()

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        t: Callable[[], float] | None = None,
    ) -> Attachment:
        """Call `update_` after every step of `optimizer`, with the model that this tracker was made
        with.

        A step that a GradScaler skips does not count. `optimizer.step()` raises the errors of
        `update_`. If you have several optimizers, attach to the one that steps last. `t` returns
        the training time on your own clock, such as `lambda: images_seen`. `remove()` of the
        returned object detaches the tracker, as `detach()` does.
        """
        self._pipeline.check_open()
        if not isinstance(optimizer, torch.optim.Optimizer):
            reason = f"must be given a torch.optim.Optimizer, not {type(optimizer).__name__}"
            hint = "call ema.update_(model) after each step that was taken"
            raise InvalidValueError("attach", reason, hint)
        if not self._watch.has_model:
            reason = "this tracker was made without a model"
            raise InvalidValueError("attach", reason, "pass the model to from_model or from_path")
        unit = self.settings.t_unit
        if not callable(t) and (t is not None or unit != "steps"):
            reason = f"t {t!r}: must be a function that returns the training time in {unit}"
            raise InvalidValueError("attach", reason, "such as attach(optimizer, t=lambda: seen)")
        before = self._attached
        if before is not None and before.optimizer is not optimizer:
            reason = "this tracker is attached to another optimizer"
            hint = "of several, attach to the one that steps last; or detach() first"
            raise InvalidValueError("attach", reason, hint)
        self.detach()

        def update(time: float | None) -> None:
            self._count(self._watch.find_model("attach"), time)

        attachment = Attachment(optimizer, update, t)
        self._attachment = weakref.ref(attachment)
        return attachment

    def detach(self) -> None:
        """Undo `attach`. Do nothing if the tracker is not attached."""
        if self._attached is not None:
            self._attached.remove()

    def on_snapshot(self, callback: Callable[[Any], None]) -> None:
        """Register `callback(ema)`: the next `update_` or `close` calls it, last, when new
        snapshots are durable."""
        if not callable(callback):
            raise InvalidValueError(
                "on_snapshot", "must be given a function of the tracker", value=quote(callback)
            )
        self._callbacks.append(callback)

    @not_compiled
    def snapshot(self, keep: bool = True) -> None:
        """Write a snapshot of every profile now, unless the newest snapshots hold this call, and
        wait until it is durable.

        Call it when you save a checkpoint of the model, so that `resume="auto"` can continue from
        that checkpoint. Between two updates it takes in the model's weights first. Thinning keeps
        it until the next such call, also in a continued run; with `keep=False`, as for an
        evaluation, it is thinned like any other snapshot.
        """
        with self._call("snapshot"):
            self._pipeline.check_open()
            model = self._watch.model
            # the last call may have been interrupted after it had queued an update
            self._pipeline.wait_for_turn(writes_too=False)
            progress = self._pipeline.progress
            if model is not None and self.keeps_averages and 0 < progress.updated < progress.step:
                check_raw(model, "snapshot")
                self._take_in(model, replace(progress, updated=progress.step))
            has_begun = progress.updated > 0 or self._pipeline.tracking.resumes
            if self.keeps_averages and not has_begun:
                raise NotReadyError("snapshot", "there was no update yet")
            if self._pipeline.snapshotter is not None:
                self._pipeline.write_missing()
                if keep:
                    self._pipeline.keep_present()
            self._pipeline.flush()

    @not_compiled
    def flush(self) -> None:
        """Wait until all updates are in the averages and all due snapshots, or this process's
        parts, are durable.

        Raises:
            WriteError, NonFiniteError: an error since the last call, raised once.
        """
        with self._call("flush"):
            self._pipeline.flush()

    def metrics(
        self,
        sigma_rels: Wanted | Sequence[Wanted] = (),
    ) -> dict[str, float]:
        """Return figures for a logger, without computing on tensors, and without waiting.

        They are `step` and `t`; `bytes`, the memory on all devices; `snapshot_bytes` and
        `snapshot_seconds`, the size of the last snapshots and the time to write them in the
        background; `snapshot_waited`, the seconds that training waited before; and for each given
        length or target for which the run is long enough `predicted_error_0.15`, at the newest
        snapshot.
        """
        figures = {"step": float(self.step), "t": self.t}
        figures |= self._pipeline.figures()
        for label, error in self._reader.predict_errors(as_targets(sigma_rels)).items():
            figures[f"predicted_error_{label}"] = error
        return figures

    # --- averaged weights

    def model(
        self,
        model: Module,
        sigma_rel: Wanted,
        t: float | None = None,
        step: int | None = None,
        method: str | None = None,
    ) -> AbstractContextManager[Module]:
        """Give the model averaged weights, in eval mode, for a `with` block.

        A tracked length, without `t` or `step`, is the current average: exact, and from memory.
        Other averages are made of snapshots, at the time of the newest; the block's object says
        this time, `t`, once it is entered. After the block weights, buffers, train or eval mode and
        gradients are as before, in the same objects and memory, even after an error, and where the
        block has converted, moved or replaced tensors. So are class, attributes and hooks of
        modules that it has rebuilt, as by `remove_weight_norm` or `fuse`; those of others stay as
        the block leaves them. A model that can no longer hold its weights is a ModelMismatchError,
        whose `weights` are the raw ones. Meanwhile the model's raw weights are kept in host memory.
        The weights take the model's dtypes. A second block of the same model is refused. The
        arguments are as for `state_dict`.

        In a group of processes all make the call, between the same two calls of `update_`; an error
        in one is raised in all. Each fills the chunks that it holds.
        """
        asked = {"t": t, "step": step, "method": method}

        def make() -> Weights:
            check_model(model)
            with self._call("model"):
                group, weights = self._reader.read(model, sigma_rel, asked)
                group.together(lambda: check_weights(model, weights))
            notice = statistics_notice(self._pipeline.tracking.tracked.dtypes(copied=True))
            if notice is not None and self._is_first_warning("statistics"):
                log.warning("%s", notice)
            return weights

        return AveragedModel(model, make)

    def models(
        self,
        model: Module,
        sigma_rels: Wanted | Sequence[Wanted],
    ) -> dict[str, AbstractContextManager[Module]]:
        """Make a block as `model` does for each length, by label ("0.15", "decay-linear-20%"). Each
        average is made when its block is entered.

        Targets that cannot be made yet, such as a window of more steps than the run has, are left
        out, with a warning. In a group of processes all make the call, and enter the blocks in
        their order.
        """
        targets = {target.label: target for target in as_targets(sigma_rels)}
        check_model(model)
        with self._call("models"):
            refusals = self._reader.find_refusals(targets)
        blocks = {}
        for label, target in targets.items():
            if label not in refusals:
                blocks[label] = self.model(model, target)
            elif self.keeps_averages and self._is_first_warning(label):
                reason = refusals[label]
                log.warning("%s: no average of %s at step %d", reason, label, self.step)
        return blocks

    @not_compiled
    def average(
        self,
        sigma_rel: Wanted,
        t: float | None = None,
        step: int | None = None,
        dtype: Dtype = None,
        method: str | None = None,
    ) -> Weights:
        """Return averaged weights, copied to the CPU, by name, with their `t` and
        `predicted_error`.

        For a sharded model all processes make the call, and each gets the chunks that it owns, as
        DTensors in host memory.

        Arguments:
            sigma_rel: length of the average, in (0, 0.2887); or another target, such as
                `targets.Beta(0.9999)`, or its text form, "beta:0.9999"; or any object with a
                function `tail`.
            t, step: time of the average, or its number of calls. By default a tracked length is
                taken now, any other at the time of the newest snapshots.
            dtype, method: dtype of the averages, by default each parameter's own; and the solver,
                "minvar" or "paper".
        """
        asked = {"t": t, "step": step, "dtype": dtype, "method": method}
        return self._average("average", sigma_rel, asked)

    def _average(self, call: str, sigma_rel: Wanted, asked: Mapping[str, Any]) -> Weights:
        model = self._watch.find_sharded_model(call)
        with self._call(call):
            _, weights = self._reader.read(model, sigma_rel, asked)
        if model is not None:
            into_dtensors(weights, model)
        return weights

    @overload
    def state_dict(self) -> dict[str, Any]: ...

    @overload
    def state_dict(
        self,
        sigma_rel: Wanted,
        t: float | None = None,
        step: int | None = None,
        dtype: Dtype = None,
        method: str | None = None,
    ) -> Weights: ...

    @not_compiled
    def state_dict(
        self,
        sigma_rel: Wanted | None = None,
        t: float | None = None,
        step: int | None = None,
        dtype: Dtype = None,
        method: str | None = None,
    ) -> Weights | dict[str, Any]:
        """Return the tracker's own state; or with `sigma_rel`, as other libraries have it, the
        weights that `average` returns.

        Save the state in your training checkpoint; `load_state_dict` continues from it exactly. In
        processes that keep no averages it is empty. For a sharded model all processes make the
        call, and each gets the chunks that it owns, as DTensors in host memory, which
        torch.distributed.checkpoint reshards.
        """
        asked = {"t": t, "step": step, "dtype": dtype, "method": method}
        if sigma_rel is not None:
            return self._average("state_dict", sigma_rel, asked)
        for name, value in asked.items():
            if value is not None:
                reason = f"must be given with {name}, which is of an average"
                raise InvalidValueError("sigma_rel", reason)
        with self._call("state_dict"):
            return self._own_state.pack()

    @not_compiled
    def load_into(
        self,
        model: nn.Module,
        sigma_rel: Wanted,
        t: float | None = None,
        step: int | None = None,
        method: str | None = None,
    ) -> None:
        """Fill a model with averaged weights permanently. The arguments are as for `model`.

        Parameters stay the same objects, so that the optimizer keeps its state, and later updates
        average the new weights: between two training steps this is the switch of Switch EMA. An
        error leaves the model unchanged. A call within a block of `model` is such an error: the end
        of the block would undo it.
        """
        check_raw(check_model(model), "load_into")
        asked = {"t": t, "step": step, "method": method}
        with self._call("load_into"):
            group, weights = self._reader.read(model, sigma_rel, asked)
            targets = group.together(lambda: check_weights(model, weights))
            fill_in(targets, weights)
        self._is_filled = True

    def reconstruction_error(
        self,
        sigma_range: tuple[float, float] = (0.05, 0.28),
        method: str | None = None,
    ) -> Figure:
        """Draw the snapshots' error against sigma_rel, from the lowest to the highest of a
        range."""
        from posthoc_cli import plots

        curve = self.run.error_curve(sigma_range, method=method)
        return plots.error_figure([curve], profile_error=method == "paper")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from a tracker's own state, which `state_dict()` returned. An error
        changes nothing.

        Later snapshots move to the folder `superseded`. This tracker's settings hold, such as
        another `update_every`, or fewer `sigma_rels`. Load the model's weights first: weights other
        than the network had then are a warning. For a sharded model all processes make the call,
        also with a state of complete tensors.
        """
        with self._call("load_state_dict"):
            self._pipeline.check_open()
            self._own_state.restore(state)

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Return whether the model has the weights that the network had when a tracker's own state
        was taken, if it knows them. For a sharded model all processes make the call."""
        return self._own_state.fits(state)

    @not_compiled
    def close(self) -> None:
        """Write a last snapshot if there were updates since the newest, `flush`, release the
        directory, and detach.

        The averages can still be read. The end of a `with` block or of the process does the same.
        """
        was_attached = self._attached is not None
        self.detach()
        if self._pipeline.is_forked:
            return  # the threads and the directory belong to another process
        with self._call("close"):
            self._close(was_attached)
        self._run_callbacks()

    def _close(self, was_attached: bool) -> None:
        self._warn_of_moved_weights()
        if (self.step or was_attached) and not self.has_average:
            log.warning("%s: no snapshot: %s", self.checkpoint_dir, self.settings.first_update(0))
        try:
            self._pipeline.end()
            self._pipeline.flush()
        finally:
            self._watch.forget()
            self._pipeline.close()
            # one was raised, and all are in the log: later reads have nothing to do with them
            while self._pipeline.take_error() is not None:
                pass

    def __enter__(self) -> PostHocEMA:
        return self

    def __exit__(
        self,
        kind: object,
        error: BaseException | None,
        trace: object,
    ) -> None:
        try:
            self.close()
        except PostHocError:
            # else the block's own error says more; this one was logged when it was raised
            if error is None:
                raise

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse pickling and copying: the threads and the directory's lock cannot be copied."""
        hint = (
            "save its state, ema.state_dict(), within a checkpoint, and keep the tracker "
            "outside of the module"
        )
        raise RefusedCallError(
            "PostHocEMA", "a tracker can be neither saved nor copied as an object", hint
        )

    @property
    def _attached(self) -> Attachment | None:
        """The attachment to an optimizer that still exists, until it is removed."""
        attachment = None if self._attachment is None else self._attachment()
        if attachment is None or attachment.optimizer is None:
            return None
        return attachment

    # --- one call of `update_`

    def _call(self, name: str) -> AbstractContextManager[Any]:
        """Make a block that holds the tracker for the time of a call."""
        self._pipeline.check_process()
        return self._lock.hold(name)

    def _begin(self) -> None:
        """Become the directory's writer at the first call."""
        self._pipeline.note_error()
        if self._start.refusal is not None and self._pipeline.tracking.resumes:
            if self._members.keeps and self._members.rank == 0:
                # snapshots of unknown weights may belong to another training that still runs
                DirectoryLock(self.checkpoint_dir).release()
            raise self._start.refusal
        self._is_filled = False
        if not self._pipeline.has_begun:
            self._members.check_model()
            now = self._pipeline.tracking

            def read() -> Tracking | None:
                if not now.resumes:
                    return None
                # a process that only counts has no averages to load
                return self._start.read(now) if self.keeps_averages else replace(now, resumes=False)

            self._pipeline.begin(self._members.keepers(), now.run_id, read)

    def _advance(
        self,
        model: nn.Module,
        t: float | None,
    ) -> None:
        settings = self.settings
        progress = self._pipeline.progress.after(t, settings)
        if settings.update_is_due(progress.step) and not self.keeps_averages:
            self._watch.check_sharding(model)
            if settings.snapshot_is_due(progress.step):
                self._members.check_model(also_missing=True)
        elif settings.update_is_due(progress.step):
            # Nothing is counted during the wait: if it is interrupted, as for a slow disk, the call
            # has no effect.
            self._pipeline.wait_for_turn(settings.snapshot_is_due(progress.step))
            self._pipeline.note_error()
            # The last update may have been interrupted after it was queued.
            progress = self._pipeline.progress.after(t, settings)
            if settings.update_is_due(progress.step):
                self._take_in(model, progress)
                return
        self._pipeline.count(progress)

    def _take_in(self, model: nn.Module, progress: TrainingProgress) -> None:
        """Queue the model's values for the averages; a model that has changed counts the call."""
        try:
            tensors = self._watch.tensors(model, self._pipeline.tracking.tracked)
        except PostHocError:
            self._pipeline.count(progress)
            raise
        self._pipeline.update(tensors, progress)

    def _warn_of_moved_weights(self) -> None:
        """Warn if the model has moved since the last counted step, where that was an update."""
        model = self._watch.model
        tracking = self._pipeline.tracking
        if model is None or self.closed or self._is_filled or is_swapped(model):
            return
        before = self._pipeline.sample
        if before is None or tracking.averages.standing.step != self.step:
            return
        with suppress(PostHocError):  # of a model that has changed
            now = [*self._watch.sample(model, tracking.tracked).values()]
            if not np.array_equal(np.array(now, np.float32), before, equal_nan=True):
                log.warning(
                    "%s: the weights have moved since step %d, the last that was counted; if they "
                    "were trained, call update_ after every step, or attach the optimizer that "
                    "takes them",
                    self.checkpoint_dir,
                    self.step,
                )

    def _keep_present(self) -> None:
        """Write a snapshot of the model's present weights, unless one has them."""
        model = self._watch.model
        tracking = self._pipeline.tracking
        if model is None or tracking.resumes or not self.has_average:
            return
        self.flush()
        sample = np.array([*self._watch.sample(model, tracking.tracked).values()], np.float32)
        stored = self._reader.read_stored()
        recorded = recorded_weights(stored).values() if stored else ()
        if not any(are_equal(sample, own) for own in recorded):
            self.snapshot(keep=False)

    def _is_first_warning(self, cause: str) -> bool:
        is_first = cause not in self._warned_of
        self._warned_of.add(cause)
        return is_first

    def _run_callbacks(self) -> None:
        writer = self._pipeline.snapshotter
        written = 0 if writer is None else writer.times_written
        if written != self._reported:
            self._reported = written
            for callback in self._callbacks:
                callback(self)


_all: WeakSet[PostHocEMA] = WeakSet()


def _close_earlier(directory: Path) -> None:
    """Close the trackers of a directory in this process, with a snapshot of their models' present
    weights."""
    for tracker in [*_all]:
        is_same = str(tracker.checkpoint_dir) == os.path.realpath(directory)
        if tracker.closed or not is_same or not (tracker._pipeline.has_begun or tracker._attached):
            continue
        log.warning(
            "%s: its earlier tracker is closed at step %d, as another one takes its place",
            directory,
            tracker.step,
        )
        for end in (tracker._keep_present, tracker.close):
            try:
                end()
            except PostHocError as error:
                log.error("%s", error)


@atexit.register
def _warn_at_exit() -> None:
    """Warn of trackers that the end of the process closes."""
    for tracker in [*_all]:
        if not tracker._pipeline.is_forked:
            tracker._warn_of_moved_weights()
