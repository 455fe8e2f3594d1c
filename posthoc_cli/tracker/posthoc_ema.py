"""`PostHocEMA`: the hook that a training loop calls, and the averages that it returns at any time.

    training's thread             averages' thread           snapshots' thread
    -----------------             ----------------           -----------------
    update_(model)
      names, shapes checked  ->   means, folds
      returns (CPU: when done)    a snapshot is due: rounded ->  measured, written, thinned
    model, state_dict        ->   tiles of one update's averages
    flush, close             ->   (waits for both)

The averages' thread alone changes and reads averages, one job at a time, so that every reader, from
any thread or signal handler, sees those of one update; the snapshots' thread alone writes. Nobody
else holds a lock."""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

# Compiled code must not trace file operations and threads. Unlike torch.compiler.disable, this does
# not import torch's compiler where no optimizer has done so, which takes two seconds.
from torch._compile import _disable_dynamo as not_compiled

from posthoc_cli.dtypes import parse_dtype, torch_dtype
from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NotReadyError,
    PostHocError,
    kept_messages,
    log_kept_messages,
    shown,
    warn,
)
from posthoc_cli.reconstruction import check_method
from posthoc_cli.run import Run, Wanted, Weights, as_targets, make_weights, with_consistent_plan
from posthoc_cli.snapshots.directory import find_snapshots
from posthoc_cli.snapshots.snapshot import (
    Snapshot,
    are_equal,
    encode_path,
    joined_paths,
    make_selection,
    places,
    statistics_notice,
)
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.targets import as_target
from posthoc_cli.tracker import averaged
from posthoc_cli.tracker.attach import (
    Attachment,
    LastCount,
    last_counts,
    stepping_optimizer,
)
from posthoc_cli.tracker.clock import Settings, TrainingProgress
from posthoc_cli.tracker.filling import check_weights, fill_in, is_swapped, swapped_in
from posthoc_cli.tracker.memory import HOST
from posthoc_cli.tracker.model import (
    ModelWatch,
    check_model,
    collect_tensors,
    into_dtensors,
    unwrapped,
)
from posthoc_cli.tracker.pipeline import Pipeline, wait_for_writers
from posthoc_cli.tracker.processes import Group
from posthoc_cli.tracker.resume import Start, check_path, sample_of_all
from posthoc_cli.tracker.snapshotter import LiveSource
from posthoc_cli.tracker.state import StateInfo, Tracking, pack_state, unpack_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")
Dtype = torch.dtype | str | None

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
        self._watch = ModelWatch(self.settings.selection, self._members)
        self._model: weakref.ref[nn.Module] | None = None
        self._pipeline = Pipeline(self.checkpoint_dir, self.settings, start.tracking, device)
        # For a tracker that nobody closes. It must not wait for a thread: garbage may be collected
        # in that thread.
        weakref.finalize(self, self._pipeline.abandon).atexit = False
        # weak: the optimizer's hook holds the attachment, which holds the tracker
        self._attachment: weakref.ref[Attachment] | None = None
        self._pending: Exception | None = None
        self._callbacks: list[Callable[[Any], None]] = []
        self._reported = 0
        self._warned_of: set[str] = set()
        self._has_begun = False  # whether this process is a writer, or knows the writers
        self._last = LastCount()
        _all.add(self)
        if model is not None:
            self._track(model)

    def _track(self, model: nn.Module) -> None:
        """Become a tracker of the model."""
        bare: Any = unwrapped(model)
        self._model = weakref.ref(bare)
        if self._start.tracking.resumes:
            self._start.counted = self._counted_before(model)
            self._choose_start(model, is_first_call=False)
        hooks: Any = bare._load_state_dict_post_hooks
        if not any(isinstance(hook, _RestoredHook) for hook in hooks.values()):
            bare.register_load_state_dict_post_hook(_RestoredHook())

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
    ) -> PostHocEMA:
        """Return a tracker for a new run, or with `resume` for an existing one. The first `update_`
        begins to write.

        Of replicas in several processes the first one keeps and writes the averages, and the others
        only count steps; of a sharded model each process keeps and writes its part. `metrics` tells
        the memory.

        Arguments:
            model: the model to track, wrapped or bare: names are those of the bare model.
            checkpoint_dir: the directory for the snapshots, created if it is missing. One run per
                directory.
            sigma_rels: profiles to track; two reach almost everything between them, see `ema
                error-plot`.
            update_every, update_after_step: averages are updated at multiples of the first, after
                the second.
            checkpoint_every: snapshots are due at its multiples; it must be a multiple of
                update_every, whose default of 10 is else reduced to their common divisor, with a
                warning.
            max_checkpoints: number of snapshots to keep of each profile, those that matter most;
                None keeps all.
            checkpoint_dtype: dtype of stored averages, float32 where values do not fit; None for
                each parameter's.
            t_unit: the unit of `t`, if you pass your own clock to `update_`.
            include, exclude: globs on names, such as "decoder.*": only tensors that match the
                first, also those that require no gradients, and none that match the second. By
                default all that require gradients.
            buffers: "statistics" to average BatchNorm's running statistics and copy other buffers,
                with their values at the time of the average; "copy" all of them; or "average"
                floating-point ones like parameters.
            device: "model" for averages on the parameters' devices, updated by the training thread;
                "cpu" for averages on the host, updated by background threads; None for "cpu" on
                accelerators.
            resume: "auto" to continue the directory's run, if it holds one, from the newest
                snapshots at whose time the network had the model's weights, exactly or as float16
                or bfloat16, or from the last step that an earlier tracker of this model and
                directory has counted in this process, which is closed; for any other weights the
                first `update_` raises an error, unless `load_state_dict` was called. A number to
                continue from the snapshots of that call of `update_`, whatever the weights; 0 to
                begin anew, with the directory's snapshots set aside at the first `update_`. None
                for a new run.

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
            DirectoryError, MismatchError: the directory is not writable, or it holds a run and
                `resume` is None.
        """
        settings = Settings.checked(
            sigma_rels,
            update_every,
            checkpoint_every,
            update_after_step,
            max_checkpoints,
            checkpoint_dtype,
            t_unit,
            make_selection(include, exclude, buffers),
        )
        directory = check_path(checkpoint_dir)
        if resume is not None:
            _end_earlier(directory)
        wait_for_writers(directory)
        tracker = cls(
            Start.of_model(check_model(model), directory, settings, resume), model, device
        )
        tracker._last.watch(unwrapped(model))
        return tracker

    @classmethod
    def from_path(
        cls,
        checkpoint_dir: str | Path,
        model: nn.Module | None = None,
        step: int | None = None,
        device: str | None = None,
    ) -> PostHocEMA:
        """Return a tracker of the run in a directory, with its settings: to synthesize from, or to
        continue tracking.

        Tracking continues as with `resume="auto"` of `from_model`, or from the snapshots of a
        `step`, whatever the weights; later ones are moved to the folder `superseded` at the first
        `update_`. The model's tensors are checked against the snapshots. The call closes an earlier
        tracker of the model and the directory in this process, and waits for due snapshots of
        others.
        """
        directory = check_path(checkpoint_dir)
        if model is not None:
            _end_earlier(directory, check_model(model))
        wait_for_writers(directory)
        return cls(Start.of_run(directory, model, step), model, device)

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
        """Whether an update has been due. Before the first one, calls for averages return the raw
        weights and warn."""
        if self._pipeline.tracking.resumes:
            return self._start.step != 0
        return self._pipeline.progress.updated > 0

    @property
    def run(self) -> Run:
        """This run's snapshots on disk, as a `Run`, once those that are being written are
        complete."""
        self.flush()
        return Run(self.checkpoint_dir)

    def tracks(self, model: nn.Module) -> bool:
        """Return whether `model`, wrapped or bare, is the one that this tracker has taken updates
        from."""
        has_taken = self.step > 0 and not self._pipeline.tracking.resumes
        return has_taken and self._tracked_model() is unwrapped(check_model(model))

    # --- tracking

    @not_compiled
    def update_(
        self,
        model: nn.Module,
        t: float | None = None,
    ) -> None:
        """Count a training step of the model, wrapped or bare. Call it after every optimizer step.

        `t` is the training time on your own clock (images, tokens), larger at every call; or None
        at every call. An error of the first call, such as another writer, means that the call has
        no effect.

        Raises:
            NonFiniteError, ModelMismatchError: a parameter holds nan or infinity, or the model has
                changed. The averages stay, and the call counts. An average on the host raises the
                NonFiniteError at the next call.
            WriteError: an earlier snapshot could not be written. Raised once; this call has done
                its work.
            NotReadyError: the tracker is closed, attached or in use, or the model holds averaged
                weights.
        """
        if self._attached is not None:
            reason = "this tracker is attached to an optimizer and is updated by its steps"
            raise NotReadyError(
                "update_", reason, "leave out either this call or attach(), or detach() first"
            )
        self._count(check_model(model), t)

    def _count(
        self,
        model: nn.Module,
        t: float | None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Count a training step, unless `found_inf` says that a GradScaler has skipped it."""
        _check_raw(model, "update_")
        if _is_capturing():
            reason = "a CUDA graph is being captured, which would count and average this step once"
            raise NotReadyError("update_", reason, "call it after graph.replay()")
        grad_mode = torch.is_grad_enabled()
        try:
            with self._pipeline.lock("update_"):
                self._begin(model)
                before = self._pipeline.latest
                try:
                    self._advance(model, t, found_inf)
                finally:
                    if self._pipeline.latest is not before:
                        self._last.run_id = self.run_id
                        self._last.progress = self._pipeline.latest
                        of_model = last_counts.setdefault(unwrapped(model), {})
                        of_model[self.checkpoint_dir] = self._last
        finally:  # a signal handler can raise just before torch.no_grad() restores the mode
            torch.set_grad_enabled(grad_mode)
        self._raise_pending()
        self._run_callbacks()

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        t: Callable[[], float] | None = None,
    ) -> Attachment:
        """Call `update_` after every step of `optimizer`, with the model that this tracker was made
        with.

        A step that a GradScaler skips does not count. `optimizer.step()` raises the errors of
        `update_`. Of several optimizers take the one that steps last. `t` returns the training time
        on your own clock, such as `lambda: images_seen`. The handle's `remove()` detaches the
        tracker, as `detach()` does.
        """
        self._pipeline.check_open()

        stepping = stepping_optimizer(optimizer)
        if self._model is None:
            reason = "this tracker was made without a model"
            raise InvalidValueError("attach", reason, "pass the model to from_model or from_path")
        unit = self.settings.t_unit
        if not callable(t) and (t is not None or unit != "steps"):
            reason = f"t {t!r}: must be a function that returns the training time in {unit}"
            raise InvalidValueError("attach", reason, "such as attach(optimizer, t=lambda: seen)")
        before = self._attached
        if before is not None and before.optimizer is not stepping:
            kind = type(before.optimizer).__name__
            reason = f"this tracker is attached to another optimizer ({kind})"
            hint = (
                "of several that train one model, attach to the one that steps last in an "
                "iteration, or detach() first"
            )
            raise InvalidValueError("attach", reason, hint)

        def update(time: float | None, found_inf: Tensor | None) -> None:
            self._count(self._present_model("attach"), time, found_inf)

        for tracker in [*_all]:  # also an earlier one, as of a notebook's cell that has run again
            if tracker.checkpoint_dir == self.checkpoint_dir:
                tracker.detach()
        attachment = Attachment(stepping, update, t)
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
                "on_snapshot", "must be given a function of the tracker", value=shown(callback)
            )
        self._callbacks.append(callback)

    @not_compiled
    def snapshot(self) -> None:
        """Write a snapshot of every profile now unless the newest ones hold this call; wait until
        it is durable.

        Call it when you save a checkpoint of the model, so that `resume="auto"` can continue from
        that checkpoint. Between two updates it takes in the model's weights first. Thinning spares
        it until five later times have some.
        """
        self._pipeline.check_open()
        model = self._tracked_model()
        progress = self._pipeline.progress
        if model is not None and self.keeps_averages and 0 < progress.updated < progress.step:
            _check_raw(model, "snapshot")
            with self._pipeline.lock("snapshot"):
                self._pipeline.wait_for_turn(writes_too=False)
                self._take_in(model, replace(progress, updated=progress.step))
        has_begun = progress.updated > 0 or self._pipeline.tracking.resumes
        if self.keeps_averages and not has_begun:
            raise NotReadyError("snapshot", "there was no update yet")
        if self._pipeline.snapshotter is not None:
            self._pipeline.write_missing()
        self.flush()

    @not_compiled
    def flush(self) -> None:
        """Wait until all updates are in the averages and all due snapshots, or this process's
        parts, are durable.

        Raises:
            WriteError, NonFiniteError: an error since the last call, raised once.
            RankError: another process that keeps a part of the averages has failed.
        """
        self._pipeline.check_process()
        self._pipeline.flush()
        self._note_error()
        self._raise_pending()
        self._members.check()

    def metrics(
        self,
        sigma_rels: Wanted | Sequence[Wanted] = (),
    ) -> dict[str, float]:
        """Return figures for a logger, without computing on tensors, and without waiting.

        `step` and `t`; `bytes`, the memory on all devices; of the last snapshots `snapshot_bytes`,
        `snapshot_seconds` of writing in the background, and `snapshot_waited`, seconds that
        training waited before; and for each of these lengths or targets that the run is long enough
        for `predicted_error_0.15`, at the newest snapshot.
        """
        targets = {target.label: target for target in as_targets(sigma_rels)}
        figures = {"step": float(self.step), "t": self.t}
        figures |= self._pipeline.figures()
        snapshots = self._stored() if targets else []
        plans, _ = averaged.plan_possible(snapshots, targets if snapshots else {})
        for label, plan in plans.items():
            error = plan.predicted_error(0)
            if error is not None:
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
        Others are made of it and of snapshots. After the block weights, buffers, train or eval mode
        and device are as before, also on an error. Meanwhile the model's raw weights are kept in
        host memory. The weights take the model's dtypes. Blocks may be nested. The arguments are
        those of `state_dict`.

        In a group of processes all that have made a tracker of this directory make the call,
        between the same two calls of `update_`, within 300 s; an error in one is raised in all.
        Each fills the chunks that it holds.
        """
        asked = {"t": t, "step": step, "method": method}
        return AveragedModel(partial(self._evaluated, model, sigma_rel, asked))

    @contextmanager
    def _evaluated(
        self,
        model: Module,
        sigma_rel: Wanted,
        asked: dict[str, Any],
    ) -> Iterator[Module]:
        group, weights = self._average("model", check_model(model), sigma_rel, asked)
        if not group.is_alone:  # else `swapped_in` checks
            group.together(lambda: check_weights(model, weights))
        with swapped_in(model, weights):
            notice = statistics_notice(self._pipeline.tracking.tracked.dtypes(copied=True))
            if notice is not None and self._is_first_warning("statistics"):
                warn(notice)
            yield model

    def models(
        self,
        model: Module,
        sigma_rels: Wanted | Sequence[Wanted],
    ) -> dict[str, AbstractContextManager[Module]]:
        """Return by label ("0.15", "decay-linear-20%") blocks like that of `model`, each made when
        it is entered.

        Targets that the run is too short for, such as a window of more steps, are left out, with a
        warning. In a group of processes all make the call, and enter the blocks in their order.
        """
        targets = {target.label: target for target in as_targets(sigma_rels)}
        group = self._callers("models", check_model(model), [*targets.values()], {})

        def find_refusals() -> dict[str, str]:
            if not self.has_average:
                return {}
            sources: Sequence[Source]
            if self._members.is_chunked:
                sources = self._stored() or self._live()
            else:
                sources = self._sources()
            _, reasons = averaged.plan_possible(sources, targets)
            return reasons

        refusals = group.from_first(find_refusals)
        blocks = {}
        for label, target in targets.items():
            if label not in refusals:
                blocks[label] = self.model(model, target)
            elif self.keeps_averages and self._is_first_warning(label):
                reason = refusals[label]
                log.warning("%s; there is no average of it at step %d", reason, self.step)
        return blocks

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
        """Return averaged weights, copies by name on the CPU with their `predicted_error`; or the
        tracker's own state.

        Without `sigma_rel` it is that state: save it in your training checkpoint; `load_state_dict`
        continues from it exactly. In processes that keep no averages it is empty. For a sharded
        model all processes make the call, and each gets the chunks that it owns, as DTensors in
        host memory, which torch.distributed.checkpoint reshards.

        Arguments:
            sigma_rel: length of the average, in (0, 0.2887); or another target, such as
                `targets.Beta(0.9999)`, or its text form, "beta:0.9999"; or any object with a
                function `tail`.
            t, step: time of the average, or its number of calls; by default that of a live tracker,
                or the newest.
            dtype, method: dtype of the averages, by default each parameter's own; the solver,
                "minvar" or "paper".
        """
        asked = {"t": t, "step": step, "dtype": dtype, "method": method}
        if sigma_rel is None:
            for name, value in asked.items():
                if value is not None:
                    reason = f"must be given with {name}, which is of an average"
                    raise InvalidValueError("sigma_rel", reason)
            return self._own_state()
        model = self._chunked_model()
        _, weights = self._average("state_dict", model, sigma_rel, asked)
        if model is not None:
            into_dtensors(weights, model)
        return weights

    @not_compiled
    def load_into(
        self,
        model: nn.Module,
        sigma_rel: Wanted,
        t: float | None = None,
        step: int | None = None,
        method: str | None = None,
    ) -> None:
        """Fill a model with averaged weights permanently. The arguments are those of `model`.

        Parameters stay the same objects, so that the optimizer keeps its state, and later updates
        average the new weights: between two training steps this is the switch of Switch EMA. An
        error leaves the model unchanged, as that of a call within a block of `model`, whose end
        would undo it.
        """
        _check_raw(check_model(model), "load_into")
        asked = {"t": t, "step": step, "method": method}
        group, weights = self._average("load_into", model, sigma_rel, asked)
        targets = group.together(lambda: check_weights(model, weights))
        fill_in(targets, weights)

    def reconstruction_error(
        self,
        sigma_range: tuple[float, float] = (0.05, 0.28),
        method: str | None = None,
    ) -> Figure:
        """Return a figure of the snapshots' error against sigma_rel, from the lowest to the highest
        of a range."""
        from posthoc_cli import plots

        curve = self.run.error_curve(sigma_range, method=method)
        return plots.error_figure([curve], profile_error=method == "paper")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from a tracker's own state, which `state_dict()` returned. An error
        changes nothing.

        Later snapshots, or those of another attempt that continued from an earlier state, move to
        the folder `superseded`. This tracker's settings hold, such as another `update_every`, or
        fewer `sigma_rels`. Where the model has other weights than the network had then, the first
        `update_` warns. For a sharded model all processes make the call, also with a state of
        complete tensors.
        """
        self._pipeline.check_open()
        now = self._pipeline.tracking
        if not (self._has_state or state):
            # The writer loads the state. This process only counts, and must not resume from disk
            # any more.
            progress = replace(now.progress, updated=max(1, self.step))
            self._pipeline.set(replace(now, progress=progress, resumes=False))
            return
        group = self._members.keepers("load_state_dict(...)")

        def unpack() -> tuple[Tracking, tuple[float, ...]]:
            self.flush()
            return unpack_state(state, self.settings, now.tracked)

        with self._pipeline.lock("load_state_dict"):
            loaded, weights = group.together(unpack)
            self._become_writer(group, loaded.run_id, lambda: loaded)
            self._start.recorded = np.array(weights, np.float32)
            model = self._tracked_model()
            if weights and model is not None:
                self._start.sample = self._watch.sample(model, loaded.tracked)

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Return whether the model has the weights that the network had when a tracker's own state
        was taken, as far as it knows them; of a sharded model all processes make the call."""
        recorded = np.array(state.get("weights", ()), np.float32)
        group = self._members.keepers("fits(...)")
        model = self._present_model("fits")
        own = group.together(lambda: self._first_sample(model))
        return not recorded.size or are_equal(sample_of_all(group, own), recorded)

    @not_compiled
    def close(self) -> None:
        """Write a last snapshot if there were updates since the newest, `flush`, release the
        directory, and detach.

        The averages can still be read. The end of a `with` block or of the process does the same.
        """
        self.detach()
        if self._pipeline.is_forked:
            return  # the threads and the directory belong to another process
        if self._has_begun:
            self._last.progress = self._pipeline.progress
            self._members.note_end(self.step)
        self._note_uncounted(is_end=sys.exc_info()[0] is None)
        if self.step and not self.has_average:
            log.warning("%s: no snapshot: %s", self.checkpoint_dir, self.settings.first_update(0))
        try:
            self._pipeline.end()
            self.flush()
            self._run_callbacks()
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
        raise NotReadyError(
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

    def _begin(self, model: nn.Module) -> None:
        """Become the directory's writer at the first call."""
        self._note_error()
        if self._pipeline.tracking.resumes:
            self._choose_start(model, is_first_call=True)
        if not self._has_begun:
            self._last.watch(unwrapped(model))
            self._members.check_model()
            now = self._pipeline.tracking

            def read() -> Tracking | None:
                return self._start.read(now) if now.resumes and self.keeps_averages else None

            self._become_writer(self._members.keepers("update_"), now.run_id, read)
        if self._start.recorded.size and self._has_state:
            self._note_other_network(model)

    def _advance(
        self,
        model: nn.Module,
        t: float | None,
        found_inf: Tensor | None,
    ) -> None:
        settings = self.settings
        if found_inf is not None:
            if self._pipeline.defer(found_inf, t):
                return
            if bool(found_inf):
                self._pipeline.count(self._pipeline.progress)
                return
        progress = self._pipeline.progress.after(t, settings)
        if settings.snapshot_is_due(progress.step):
            self._members.check()
        if settings.update_is_due(progress.step) and not self.keeps_averages:
            self._watch.check_kind(model)
        elif settings.update_is_due(progress.step):
            # Nothing is counted during the wait: if it is interrupted, as for a slow disk, the call
            # has no effect.
            self._pipeline.wait_for_turn(settings.snapshot_is_due(progress.step))
            self._note_error()
            # The last update may have been interrupted after it was queued.
            progress = self._pipeline.progress.after(t, settings)
            if settings.update_is_due(progress.step):
                self._take_in(model, progress)
                return
        self._pipeline.count(progress)

    def _become_writer(
        self,
        group: Group,
        run_id: str,
        read: Callable[[], Tracking | None],
    ) -> None:
        """Become a writer of the directory, if this process keeps averages, and continue from the
        state of `read`."""

        begin = partial(self._pipeline.begin, run_id, read) if self.keeps_averages else read
        if (loaded := group.first_then_others(begin)) is not None:
            self._pipeline.set(loaded)
        self._has_begun = True

    def _take_in(self, model: nn.Module, progress: TrainingProgress) -> None:
        """Queue the model's values for the averages; a model that has changed counts the call."""
        try:
            tensors = self._watch.tensors(model, self._pipeline.tracking.tracked)
        except PostHocError:
            self._pipeline.set(replace(self._pipeline.tracking, progress=progress))
            raise
        self._pipeline.update(tensors, progress)

    def _note_uncounted(self, is_end: bool = False) -> None:
        """Warn, once, of steps of the model that were not counted.

        The call for a single step may be about to come, except at an end without an error: an
        interrupt leaves a step without its call. A tracker that has counted none may only read.
        """
        step = self._last.progress.step
        if self.closed or not self.keeps_averages:
            return
        steps = self._last.steps
        missed = steps > 0 if is_end else step > 0 and steps > 1
        if missed and self._is_first_warning("uncounted"):
            log.warning(
                "%s: the model has moved since step %d, the last that was counted: call update_ "
                "after every step, or attach the optimizer that takes them",
                self.checkpoint_dir,
                step,
            )

    def _counts(self, model: nn.Module | None) -> bool:
        """Return whether this tracker counts steps, or is to, of this model if one is given."""
        counts = self._has_begun or self._attached is not None
        return counts and (model is None or self._tracked_model() is unwrapped(model))

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

    def _note_error(self) -> None:
        """Note an error of background work since the last call; it stays pending if this call fails
        itself."""
        self._pending = self._pending or self._pipeline.take_error()

    def _raise_pending(self) -> None:
        if kept_messages:
            log_kept_messages()
        failure = self._pending
        self._pending = None
        if failure is not None:
            raise failure

    # --- where a resumed run continues

    def _counted_before(self, model: nn.Module) -> TrainingProgress | None:
        """Return the last call that an earlier tracker of this model and directory has counted in
        this process."""
        last = last_counts.get(unwrapped(model), {}).get(self.checkpoint_dir)
        if last is None or last.run_id != self.run_id:
            return None
        if last.steps:
            log.warning(
                "%s: the model has moved since step %d, the last that was counted",
                self.checkpoint_dir,
                last.progress.step,
            )
        return last.progress

    def _choose_start(self, model: nn.Module, is_first_call: bool) -> None:
        """Note the model's values, and resume from the newest time at which the network had them,
        see `Start.choose`."""
        start = self._start
        now = self._pipeline.tracking
        group = self._members.keepers("update_" if is_first_call else "this tracker")
        if start.sample is None:
            start.sample = group.together(lambda: self._first_sample(model))
        if start.is_given:
            return
        if is_first_call:
            wait_for_writers(self.checkpoint_dir)
        chosen = start.choose(now, group, self.keeps_averages, is_first_call)
        if chosen is not now:
            self._pipeline.set(chosen)

    def _first_sample(self, model: nn.Module) -> dict[int, float]:
        try:
            return self._watch.sample(model, self._pipeline.tracking.tracked)
        except ModelMismatchError as error:
            hint = (
                f"the run in {self.checkpoint_dir} is of another model; use its model, or another "
                f"directory"
            )
            raise error if error.hint else error.with_hint(hint) from None

    def _note_other_network(self, model: nn.Module) -> None:
        """Warn if the model is not the network of the loaded state or of the given step."""
        group = self._members.keepers("update_")
        tracked = self._pipeline.tracking.tracked
        present = group.together(lambda: self._watch.sample(model, tracked))
        if self._start.is_other_network(group, present) and group.leads:
            log.warning(
                "%s: the averages continue from step %d; the model has other weights than the "
                "network had then",
                self.checkpoint_dir,
                self._pipeline.progress.step,
            )

    # --- the tracker's own state

    @property
    def _has_state(self) -> bool:
        return self._members.is_chunked or self.keeps_averages

    def _own_state(self) -> dict[str, Any]:
        if not self._has_state:
            return {}
        group = self._members.keepers(f"state_dict() at {self._pipeline.progress}")

        def read() -> Tracking:
            self.flush()
            if self._pipeline.tracking.resumes:
                return self._start.read(self._pipeline.tracking)
            tracking = self._pipeline.read_exactly()
            self._pipeline.flush()  # now the snapshots of that time are on disk
            return tracking

        tracking = group.together(read)
        averages = tracking.averages
        snapshotter = self._pipeline.snapshotter
        # Each process knows the path of its own part, and some processes have no average.
        own_path = encode_path(averages.known_path, exact=True)
        paths = group.from_all(own_path)
        weights = self._present_weights(group)

        def read_info() -> StateInfo:
            stored = tracking.snapshots if snapshotter is None else snapshotter.checksums
            return StateInfo(
                run_id=tracking.run_id,
                t_unit=self.settings.t_unit,
                sigma_rels=averages.sigma_rels,
                standing=averages.standing,
                step=tracking.progress.step,
                t=tracking.progress.t,
                sketch=joined_paths([path for path in paths if path]),
                snapshots=tuple(sorted(stored)),
                weights=weights,
            )

        return pack_state(tracking, group.from_first(read_info), self._chunked_model())

    def _present_weights(self, group: Group) -> tuple[float, ...]:
        """Return the network's sampled weights at the last call; empty if they are unknown."""
        now = self._pipeline.tracking
        recorded = self._start.recorded
        model = self._tracked_model()
        if recorded.size or not self._pipeline.progress.updated:
            return tuple(recorded.tolist())
        own: dict[int, float] = {}
        if model is not None and not now.resumes and not is_swapped(model):
            with suppress(ModelMismatchError):
                own = self._watch.sample(model, now.tracked)
        values = sample_of_all(group, own)
        count = len(places(now.tracked.complete_shapes))
        if len(values) < count or not np.isfinite(values).all():
            return ()
        return tuple(values.tolist())

    # --- one average from sources

    def _average(
        self,
        call: str,
        model: nn.Module | None,
        length: Wanted,
        given: Mapping[str, Any],
    ) -> tuple[Group, Weights]:
        """Return the processes that make a call, and the average; of a sharded `model` the chunks
        in this process.

        A tracked length at the present time is the live average alone.
        """
        self._note_uncounted()
        asked = {name: value for name, value in given.items() if value is not None}
        group = self._callers(call, model, [length], asked)
        if not group.from_first(lambda: self.has_average):
            return group, self._raw_weights(model, asked.get("dtype"))
        live = self._live_index(length, asked)
        if self._members.is_chunked:
            assert model is not None
            return group, self._chunks(group, model, length, live, asked)

        def plan() -> Plan:
            sources: list[Source] = self._sources()
            if live is not None:
                sources = sources[live : live + 1]
            return averaged.logged(plan_synthesis(sources, [length], **asked))

        return group, averaged.from_first(group, lambda: with_consistent_plan(plan, make_weights))

    def _live_index(
        self,
        length: Wanted,
        asked: Mapping[str, Any],
    ) -> int | None:
        """Return the index of the live average that is wanted; None if it is to be made."""
        sigma_rel = as_target(length).sigma_rel
        if sigma_rel is None or self._pipeline.tracking.resumes or {"t", "step"} & asked.keys():
            return None
        for index, tracked in enumerate(self.settings.sigma_rels):
            if math.isclose(sigma_rel, tracked, rel_tol=1e-6):  # float32's
                return index
        return None

    def _chunks(
        self,
        group: Group,
        model: nn.Module,
        length: Wanted,
        live: int | None,
        asked: Mapping[str, Any],
    ) -> Weights:
        """Return the chunks in this process of an average of a sharded model."""
        tracked = self._pipeline.tracking.tracked
        tensors = group.together(lambda: averaged.chunks_of(model, tracked))
        members: Any = self._members
        if live is not None:

            def own() -> Weights:
                sources = self._live()
                if not sources:
                    return Weights()
                source = sources[live]
                return make_weights(plan_synthesis([source], [source.sigma_rel], **asked))

            return averaged.with_replicas(group, group.together(own), tensors, members)
        group.together(self.flush)

        def plan() -> averaged.SentPlan:
            return averaged.to_send(self._plan_stored(length, asked))

        return with_consistent_plan(
            lambda: group.from_first(plan),
            lambda sent: averaged.read_chunks(group, sent, length, tensors, self.checkpoint_dir),
        )

    def _plan_stored(
        self,
        length: Wanted,
        asked: Mapping[str, Any],
    ) -> Plan:
        """Plan an average from snapshots alone; warn once if the newest are behind."""
        stored = self._stored()
        if not stored:
            reason = "of a sharded model other lengths than the tracked ones need a snapshot"
            raise NotReadyError("no snapshot yet", reason, "ema.snapshot() writes one")
        step = stored[-1].step
        now = self._pipeline.progress
        is_present = not {"t", "step"} & asked.keys()
        if is_present and step < now.updated and self._is_first_warning("behind"):
            log.warning(
                "%s: averages of other lengths than the tracked ones are those of the newest "
                "snapshots, of step %d: ema.snapshot() writes some of the present step",
                self.checkpoint_dir,
                step,
            )
        return averaged.logged(plan_synthesis(stored, [length], **asked))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _raw_weights(
        self,
        model: nn.Module | None,
        dtype: Dtype,
    ) -> Weights:
        """Return copies of the weights of the tracked model, or else of `model`, on the host, with
        a warning."""
        tracked = self._present_model("no average yet", model)
        if self._is_first_warning("raw weights"):
            warn(f"no average yet, so the raw weights are used: {self.settings.first_update(0)}")
        stored = parse_dtype(dtype)
        tensors = collect_tensors(tracked, self.settings.selection)
        own_dtype = None if stored is None else torch_dtype(stored)
        weights = Weights()
        for name, value in tensors.averaged.items():
            weights[name] = value.to("cpu", own_dtype, copy=True)
        for name, value in tensors.copied.items():
            weights[name] = value.to("cpu", copy=True)
        for alias, name in tensors.tracked.aliases.items():
            weights[alias] = weights[name]
        return weights

    def _sources(self) -> list[Source]:
        """Return the live averages, and the snapshots of others up to their time; at least one."""
        if not (self._pipeline.tracking.resumes or self.keeps_averages):
            reason = "this process keeps no averages, the first one of its group does"
            hint = (
                "read the snapshots on disk with a new PostHocEMA.from_path(directory), "
                "before any update_ of it"
            )
            raise NotReadyError(reason, hint)
        live = self._live()
        now = live[0].t if live else math.inf
        sources: list[Source] = [*live]
        sources += [snapshot for snapshot in self._stored() if snapshot.t < now]
        if not sources:
            raise NotReadyError(
                "no average yet", f"{self.settings.first_update(self.step)}, so far {self.step:,}"
            )
        return sources

    def _stored(self) -> list[Snapshot]:
        """Return the run's snapshots on disk, up to the step from which it is to resume; none if
        the directory belongs to another run."""
        last = self._start.step if self._pipeline.tracking.resumes else None
        snapshots = find_snapshots(self.checkpoint_dir)
        if last is not None:
            snapshots = [snapshot for snapshot in snapshots if snapshot.step <= last]
        return [snapshot for snapshot in snapshots if snapshot.run_id == self.run_id]

    def _live(self) -> list[LiveSource]:
        self.flush()
        return self._pipeline.live()

    def _callers(
        self,
        call: str,
        model: nn.Module | None,
        lengths: Sequence[Wanted],
        asked: Mapping[str, Any],
    ) -> Group:
        """Return the processes that make a call for averages, of parts or as replicas, after
        checking its options."""
        check_method(asked.get("method"))
        parse_dtype(asked.get("dtype"))
        tracked = self._tracked_model(model)
        parameter = None if tracked is None else next(tracked.parameters(), None)
        device = HOST if parameter is None else parameter.device
        arguments = [as_target(length).title for length in lengths]
        arguments += [f"{name}={value}" for name, value in asked.items()]
        is_tracking = not self._pipeline.tracking.resumes
        asks = f"{call}({', '.join(arguments)})"
        return self._members.callers(asks, self._pipeline.progress, is_tracking, device)

    def _tracked_model(
        self,
        default: nn.Module | None = None,
    ) -> nn.Module | None:
        """Return the model that this tracker was made with if it still exists, else `default`."""
        model = None if self._model is None else self._model()
        return default if model is None else model  # no `or`: it would ask for a model's length

    def _present_model(
        self,
        call: str,
        default: nn.Module | None = None,
    ) -> nn.Module:
        """Return the same model, which a call needs."""
        model = self._tracked_model(default)
        if model is None:
            raise NotReadyError(call, "the model that this tracker was made with no longer exists")
        return model

    def _chunked_model(self) -> nn.Module | None:
        """Return the sharded model, whose parameters say where each chunk is; None if the model is
        not sharded."""
        return self._present_model("state_dict") if self._members.is_chunked else None


class AveragedModel(AbstractContextManager[Module]):
    """A `with` block in which a model holds averaged weights, made whenever it is entered."""

    def __init__(
        self,
        make: Callable[[], AbstractContextManager[Module]],
    ) -> None:
        self._make = make
        self._entered = list[AbstractContextManager[Module]]()

    @not_compiled
    def __enter__(self) -> Module:
        block = self._make()
        averaged = block.__enter__()
        self._entered.append(block)
        return averaged

    @not_compiled
    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)

    def __call__(self, *_: object, **__: object) -> NoReturn:
        hint = "with ema.model(model, sigma_rel) as averaged: averaged(...)"
        raise NotReadyError("model", "holds averaged weights only within a `with` block", hint)


def _is_capturing() -> bool:
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())


def _check_raw(model: nn.Module, call: str) -> None:
    if is_swapped(model):
        raise NotReadyError(
            call, "the model holds averaged weights now", "call it outside `with ema.model(...)`"
        )


_all: WeakSet[PostHocEMA] = WeakSet()


def _end_earlier(
    directory: Path,
    model: nn.Module | None = None,
) -> None:
    """Close the trackers of a directory in this process that count steps, or those of a model."""
    for tracker in [*_all]:
        is_same = str(tracker.checkpoint_dir) == os.path.realpath(directory)
        if tracker.closed or not is_same or not tracker._counts(model):
            continue
        log.warning(
            "%s: its earlier tracker is closed at step %d, as another one takes its place",
            directory,
            tracker.step,
        )
        try:
            tracker.close()
        except PostHocError as error:
            log.error("%s", error)


@atexit.register
def _note_uncounted_steps() -> None:
    """Warn of uncounted steps of trackers that the end of the process closes."""
    for tracker in [*_all]:
        if not tracker._pipeline.is_forked:
            tracker._note_uncounted(is_end=not hasattr(sys, "last_value"))


class _RestoredHook:
    """The hook that a tracker adds to its model. In a pickle or a copy of the model a method of the
    standard library takes its place that does nothing: they need no release of this package."""

    def __call__(self, model: nn.Module, _: object) -> None:
        """Handle the end of the model's `load_state_dict`."""
        for tracker in [*_all]:
            if tracker._tracked_model() is not model:
                continue
            resumes = tracker._pipeline.tracking.resumes
            start = tracker._start
            start.counted = None
            tracker._last.watch(model)
            if (resumes or start.recorded.size) and not tracker.closed:
                start.sample = tracker._watch.sample(model, tracker._pipeline.tracking.tracked)
                # else other processes would have to take part
                if resumes and not tracker._members.is_chunked:
                    tracker._choose_start(model, is_first_call=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
