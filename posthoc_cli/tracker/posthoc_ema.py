"""`PostHocEMA`: the hook that a training loop calls, and the averages that it gives at any time."""

from __future__ import annotations

import gc
import logging
import math
import os
import secrets
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

import torch

from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    LockedError,
    NonFiniteError,
    NotReadyError,
    PostHocError,
    WriteError,
    shown,
)
from posthoc_cli.planning import Candidate, Schedule, error_curve
from posthoc_cli.profiles import Profile, check_sigma_rel
from posthoc_cli.reconstruction import ROUNDING
from posthoc_cli.run import Run, Weights, make_weights
from posthoc_cli.snapshots.directory import find_snapshots, read_directory
from posthoc_cli.snapshots.format import Selection, check_globs, make_selection, of_newest_segment
from posthoc_cli.snapshots.measurements import chosen_up_to
from posthoc_cli.synthesis.plan import Plan, plan_synthesis, with_consistent_plan
from posthoc_cli.synthesis.sources import Source, source_prior
from posthoc_cli.targets import Target
from posthoc_cli.tracker import model_weights
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.model_tensors import ModelWatch, TrackedModel, check_model, collect_tensors
from posthoc_cli.tracker.model_weights import fill_model, in_block, is_swapped, swapped_in
from posthoc_cli.tracker.names import named_tensors
from posthoc_cli.tracker.optimizer import Attachment, close_predecessors, stepping_optimizer
from posthoc_cli.tracker.pipeline import Pipeline, Update, wait_for_writers
from posthoc_cli.tracker.settings import (
    Settings,
    absolute_directory,
    check_device,
    check_sigma_rels,
    choose_writer,
    is_in_group,
    make_schedule,
    next_time,
    override_schedule,
    warn_of_assumption,
)
from posthoc_cli.tracker.snapshotter import LiveSource, Snapshotter, current_sources, exact_state, live_sources
from posthoc_cli.tracker.state import (
    Progress,
    TrackerState,
    Tracking,
    check_profiles,
    keeps_state,
    load_from_directory,
    open_state,
    pack_state,
    resumed_profiles,
    resumed_tracking,
    snapshots_until,
    unpack_state,
    write_state,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Module = TypeVar("Module", bound=torch.nn.Module)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Beginning:
    """What a tracker begins with; the arguments of `from_model` and `from_path`, checked.

    `from_step` is the call to go on from: None for the newest snapshots, 0 for a new beginning of a run.
    """

    directory: Path
    settings: Settings
    tracking: Tracking
    model: torch.nn.Module | None
    device: str | None
    writer: bool | None
    from_step: int | None = None
    knows_selection: bool = True


class PostHocEMA:
    """Tracks power-function averages of a model and gives the average of any other length.

    Make one with `from_model` or `from_path`. Snapshots are written beside the training; `flush` returns when all due
    ones are on disk. `close`, or the end of a `with` block, also lets another writer into the directory.

    Attributes:
        checkpoint_dir: where the snapshots are.
        settings: the checked arguments.
    """

    def __init__(self, beginning: Any = None, *_: Any, **__: Any) -> None:
        if not isinstance(beginning, _Beginning):
            raise InvalidValueError(
                "PostHocEMA(...)",
                "is made by PostHocEMA.from_model(model, checkpoint_dir, sigma_rels=...) for a new run, or "
                "by PostHocEMA.from_path(checkpoint_dir) for the run in a directory",
            )
        settings, tracking, model = beginning.settings, beginning.tracking, beginning.model
        self.checkpoint_dir = beginning.directory
        self.settings = settings
        self._watch = ModelWatch(settings.selection, settings.on_change == "follow", not beginning.knows_selection)
        if model is not None and tracking.resumes:
            self._watch.check(model, tracking.tracked)
        self._model = None if model is None else weakref.ref(model)
        self._pipeline = Pipeline(settings, tracking, check_device(beginning.device))
        # Also where nobody closes it. It must not wait for a thread: that may be collecting the garbage.
        weakref.finalize(self, self._pipeline.end).atexit = False
        self._attachment: Attachment | None = None
        self._writer = choose_writer(beginning.writer, model)
        self._from_step = beginning.from_step
        self._resumed_at: int | None = None
        self._pending: Exception | None = None
        self._lock = threading.Lock()  # held by the call that changes something
        self._caller = 0
        self._closed = False
        self._process = os.getpid()

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module,
        checkpoint_dir: str | Path,
        sigma_rels: Sequence[float] = (0.05, 0.28),
        update_every: int = 10,
        checkpoint_every: int = 1000,
        update_after_step: int = 0,
        max_checkpoints: int | None = 20,
        checkpoint_dtype: torch.dtype | str | None = torch.float16,
        t_unit: str = "steps",
        only_trainable: bool = True,
        on_nonfinite: str = "raise",
        sigma_range: tuple[float, float] = (0.05, 0.28),
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        copy_only: str | Sequence[str] | None = None,
        buffers: str = "copy",
        on_change: str = "raise",
        device: str | None = None,
        writer: bool | None = None,
        final_snapshot: bool = True,
        keep_state: bool = False,
        resume: str | int | None = None,
        schedule: Schedule | None = None,
    ) -> PostHocEMA:
        """A tracker for a new run, or with `resume` of one that goes on. Nothing is written before the first `update_`.

        Arguments:
            model: to be tracked, wrapped or bare: names are those of the bare model.
            checkpoint_dir: the directory for the snapshots, made when it is missing. One run a directory.
            sigma_rels: profiles to track; two reach almost everything, see `ema error-plot`.
            update_every: averages are updated at the calls that are multiples of it.
            checkpoint_every: snapshots are due at the calls that are multiples of it; a multiple of update_every.
            update_after_step: no update up to this call.
            max_checkpoints: snapshots to keep of each profile: those that reconstruction needs most. None keeps all.
            checkpoint_dtype: the dtype that averages are stored in; None for each parameter's own. A tensor whose
                values do not fit into it is stored in float32.
            t_unit: the unit of `t`, if you pass a clock of your own to `update_`.
            only_trainable: leave out parameters that do not require gradients.
            on_nonfinite: what an update does when a parameter holds nan or infinity: "raise" an error, "skip" the
                update, or skip it and "warn". Such a value never enters an average.
            sigma_range: the range of sigma_rel that `max_checkpoints` keeps snapshots for.
            include: globs on names, such as "decoder.*": tensors that match none of them are left out.
            exclude: globs on names: tensors that match one of them are left out.
            copy_only: globs on names: tensors that match one of them are copied, as buffers are, and not averaged,
                whether they require gradients or not. Every average holds the newest copy at its time.
            buffers: "copy" them, "average" floating-point ones as if they were parameters, or "skip" them.
            on_change: what an update does when parameters were frozen, unfrozen, added or changed: "raise" an error
                that names one, or "follow", which begins a new segment of snapshots. Unchanged tensors keep their
                averages, new ones start fresh; a synthesis uses only the segment of its time.
            device: where the averages are: "model", beside the parameters and updated by the training's own thread,
                or "cpu", on the host and updated by a thread of their own; None for "cpu" where a parameter is on an
                accelerator, else "model". For a model on the CPU both give the same bits.
            writer: in a group of processes that train one model, each of which may make a tracker and call it:
                whether this one keeps the averages and writes. The others only count. None for the first process of
                the model's DistributedDataParallel; of a model that is not wrapped (yet), of all processes.
            final_snapshot: write a last snapshot at `close`, at the end of a `with` block or of the process, if
                averages were updated since the newest one. See `snapshot`.
            keep_state: keep the exact averages beside the snapshots, in `state.safetensors`, replaced after each time
                of snapshots: `from_path` and `resume` then go on without rounding. It takes 12 bytes an element and
                profile (16 for float64 parameters) on disk and in host memory.
            resume: "auto" to go on, as `from_path` does but with these arguments, where the directory holds a run; it
                must be of this model. A number to go on from the snapshots of that call of `update_`. None for a new
                run only: the first `update_` is refused where there is another one.
            schedule: a plan, whose `sigma_rels`, `checkpoint_every` and `max_checkpoints` replace these arguments.

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
        """
        if schedule is not None:
            if (sigma_rels, checkpoint_every, max_checkpoints) != ((0.05, 0.28), 1000, 20):
                raise InvalidValueError(
                    "schedule", "sets sigma_rels, checkpoint_every and max_checkpoints", "leave these arguments out"
                )
            sigma_rels, checkpoint_every = schedule.sigma_rels, schedule.checkpoint_every
            max_checkpoints = schedule.max_checkpoints
        selection = make_selection(only_trainable, include, exclude, buffers, copy_only)
        profiles = check_sigma_rels(sigma_rels)
        tracking_schedule = make_schedule(
            update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype, sigma_range
        )
        settings = Settings(
            profiles, tracking_schedule, t_unit, selection, on_nonfinite, on_change, final_snapshot, keep_state
        )
        check_globs(selection, [tensor.name for tensor in named_tensors(check_model(model))])
        tracked = TrackedModel.of_model(collect_tensors(model, selection))
        tracked.check_header()
        directory = absolute_directory(checkpoint_dir)
        found = None if resume is None else _find_run(directory, settings, tracked, resume)
        averages = RunningAverages.none_yet(settings.sigma_rels)
        tracking, step = found or (Tracking(secrets.token_hex(16), Progress(), tracked, averages), None)
        tracker = cls(_Beginning(directory, settings, tracking, model, device, writer, step))
        warn_of_assumption(writer, model)
        return tracker

    @classmethod
    def from_path(
        cls,
        checkpoint_dir: str | Path,
        model: torch.nn.Module | None = None,
        update_every: int | types.EllipsisType = ...,
        checkpoint_every: int | types.EllipsisType = ...,
        update_after_step: int | types.EllipsisType = ...,
        max_checkpoints: int | types.EllipsisType | None = ...,
        checkpoint_dtype: torch.dtype | str | types.EllipsisType | None = ...,
        on_nonfinite: str = "raise",
        sigma_range: tuple[float, float] | types.EllipsisType = ...,
        device: str | None = None,
        on_change: str = "raise",
        sigma_rels: Sequence[float] | types.EllipsisType = ...,
        writer: bool | None = None,
        final_snapshot: bool = True,
        keep_state: bool | None = None,
        step: int | None = None,
    ) -> PostHocEMA:
        """The run in a directory: to synthesize from, and to go on tracking.

        Tracking goes on at the first `update_` from the newest snapshots, with the schedule that they hold unless
        an argument says otherwise. The averages then are those snapshots' values, rounded to their storage dtype
        (float16: 2e-4 relative), unless `keep_state` has left an exact state of their time beside them; to go on
        exactly without one, restore `state_dict()` with `load_state_dict`. If a tracker of this process is writing to
        the directory, this first waits for its due snapshots.

        Arguments:
            checkpoint_dir: a directory with snapshots.
            model: the model to go on with; checked against the snapshots here and now.
            sigma_rels: the tracked profiles to go on with; the others' snapshots stay in use.
            keep_state: as in `from_model`; None: if the directory has a state of this run.
            step: go on from the snapshots of this call of `update_`, as the training's own checkpoint may be of then.
                Later ones are set aside in the folder `superseded` when tracking begins.
            others: as in `from_model`; the default is the stored value.

        Raises:
            DirectoryError, FileFormatError, MismatchError: what is wrong with the directory.
            ModelMismatchError: the model is another one; names the tensor.
            InvalidValueError: an argument, or a `step` without snapshots; names those that have some.
        """
        directory = absolute_directory(checkpoint_dir)
        wait_for_writers(directory)
        stored = read_directory(directory)
        profiles = resumed_profiles(stored, sigma_rels)
        snapshots = snapshots_until(stored, profiles, step)
        newest = snapshots[-1].info
        given = (update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype, sigma_range)
        schedule, selection = override_schedule(newest.schedule, *given), newest.selection or Selection()
        keeps = keeps_state(directory, newest.run_id) if keep_state is None else keep_state
        settings = Settings(
            profiles, schedule, newest.t_unit, selection, on_nonfinite, on_change, final_snapshot, keeps
        )
        tracking = resumed_tracking(directory, snapshots, profiles)
        knows_selection = newest.selection is not None
        return cls(_Beginning(directory, settings, tracking, model, device, writer, step, knows_selection))

    @property
    def run_id(self) -> str:
        """32 hexadecimal digits that all snapshots of this run carry."""
        return self._pipeline.now.run_id

    @property
    def step(self) -> int:
        """Calls of `update_` so far in this run."""
        return self._pipeline.progress.step

    @property
    def t(self) -> float:
        """Training time of the last call."""
        return self._pipeline.progress.t

    @property
    def keeps_averages(self) -> bool:
        """Whether this process keeps the averages and writes them, or only counts for another one of its group."""
        self._decide_writer(None if self._model is None else self._model())
        return self._writer is not False

    @property
    def run(self) -> Run:
        """The snapshots of this run on disk. Snapshots that are still being written are waited for."""
        self.flush()
        return Run(self.checkpoint_dir)

    # --- tracking ---

    def update_(self, model: torch.nn.Module, t: float | None = None) -> None:
        """Count a training step of the model. Call it after every optimizer step.

        Arguments:
            model: the model, as it is now, wrapped or bare.
            t: training time on a clock of your own (images, tokens), growing at every call; leave it out at
                every call for steps.

        Raises:
            NonFiniteError: a parameter holds nan or infinity (`on_nonfinite="raise"`). No average is touched. Where the
                averages are updated beside the training, the error comes with the next call.
            ModelMismatchError: names, shapes or dtypes have changed. No average is touched.
            WriteError: a snapshot that was due at an earlier call could not be written; raised once. Nothing partial
                is left, and training may go on: this call has done its work, and later snapshots are tried again.
            NotReadyError: the tracker is closed, is attached to an optimizer or is a forked process's copy, the model
                holds averaged weights, or a call is under way: of another thread, or below a signal handler.
            LockedError, MismatchError, DirectoryError, FileFormatError: at the first call: another writer holds
                the directory, it holds another run, what is in it is damaged, it cannot be read or written, or at no
                time is there a snapshot of every profile to go on from. Nothing of the call has been done.
        """
        check_model(model)
        if self._attachment is not None:
            self._attachment.check_caller()
        if is_swapped(model):
            raise NotReadyError(
                "update_", "the model holds averaged weights now", "call it outside `with ema.model(...)`"
            )
        self._check_free("update_")
        with self._lock:
            self._caller = threading.get_ident()
            self._advance(model, t)
        failure, self._pending = self._pending, None
        if failure is not None:
            raise failure

    def attach(self, optimizer: torch.optim.Optimizer, t: Callable[[], float] | None = None) -> Attachment:
        """Call `update_` after every step of `optimizer`, with the model that this tracker was made with.

        A step that a GradScaler skips does not count. Errors of `update_` leave `optimizer.step()`. Attaching to the
        same optimizer again changes nothing but `t`. Another tracker that is attached to the optimizer for the same
        model is closed, with a warning: when a notebook's cell runs again, nothing else can close its last tracker. To
        have two of one model, call `update_` of one of them yourself.

        Arguments:
            optimizer: the one that trains the model; of several, the one that steps last in an iteration. It may be
                accelerate's `AcceleratedOptimizer`; another wrapper may make steps that are none of the training's.
            t: gives the training time on a clock of your own, such as `lambda: images_seen`; None for steps.

        Returns:
            A handle whose `remove()` undoes it, as `detach()` does.

        Raises:
            InvalidValueError: not an optimizer, a second one, a tracker without model, or no `t` for this run's clock.
            others: from closing the other tracker. This one is not attached then; the next try will succeed.
        """
        if t is not None and not callable(t):
            raise InvalidValueError("attach", f"t {t!r}: must be a function that gives the training time, or None")
        if t is None and self.settings.t_unit != "steps":
            raise InvalidValueError(
                "attach", f"this run counts {self.settings.t_unit}", "give it the clock: attach(optimizer, t=function)"
            )
        if self._model is None:
            raise InvalidValueError(
                "attach", "this tracker was made without a model", "give it to from_model or from_path"
            )
        stepping = stepping_optimizer(optimizer)
        if self._attachment is not None:
            self._attachment.check_alone(stepping)
        close_predecessors(stepping, self, self._model)
        self.detach()
        self._attachment = Attachment(stepping, self, self._model, t)
        return self._attachment

    def detach(self) -> None:
        """Undo `attach`. Nothing happens if the tracker is not attached."""
        if self._attachment is not None:
            self._attachment.remove()

    def flush(self) -> None:
        """Return when all updates are in the averages and all due snapshots are durable.

        Raises:
            WriteError, NonFiniteError: what went wrong since the last call; raised once.
        """
        self._check_process()
        self._pipeline.flush()
        failure, self._pending = self._take_error(), None
        if failure is not None:
            raise failure

    def snapshot(self) -> None:
        """Write a snapshot of every profile now, and return when they are durable.

        They are marked as off the schedule: later snapshots do not depend on them, and `max_checkpoints` drops them
        first. Nothing is written if the newest snapshots hold all updates.

        Raises:
            NotReadyError: there was no update yet, or the tracker is closed.
            WriteError, NonFiniteError: as `flush`.
        """
        self._check_open()
        if self._pipeline.snapshotter is not None:
            self._pipeline.write_missing()
        elif self.keeps_averages and not self._pipeline.now.resumes:
            raise NotReadyError("snapshot", "there was no update yet")
        self.flush()

    def close(self) -> None:
        """Finish as `flush`, release the directory, and detach. Averages can still be read.

        If averages were updated since the newest snapshot, a last one is written, as by `snapshot`, except with
        `final_snapshot=False`. The end of a `with` block or of the process does the same.
        """
        self.detach()
        self._closed = True
        if self._process != os.getpid():
            return  # the threads and the directory belong to another process
        self._pipeline.refuse(self._closed_error())
        try:
            self._pipeline.end()
            self.flush()
        finally:
            self._pipeline.close()
            if self._pipeline.snapshotter is not None:
                self._pipeline.snapshotter.close()

    def __enter__(self) -> PostHocEMA:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        writes = self._pipeline.snapshotter is not None and not self._closed
        if error is not None and self.settings.final_snapshot and writes:
            log.warning(
                "%s: %s ended the training at step %d; a last snapshot is written",
                self.checkpoint_dir,
                type(error).__name__,
                self.step,
            )
        try:
            self.close()
        except PostHocError:
            if error is None:  # else the block's own error says more; this one was logged when it came
                raise

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied: the threads and the directory's lock cannot be."""
        raise NotReadyError(
            "PostHocEMA",
            "a tracker can be neither saved nor copied as an object",
            "save its state: ema.state_dict() within a checkpoint, ema.save_state(path) as a file of its own; to copy "
            "or save a module that holds it, keep the tracker outside of the module",
        )

    # --- averages of any length, and the tracker's own state ---

    @overload
    def state_dict(self) -> dict[str, Any]: ...

    @overload
    def state_dict(
        self,
        sigma_rel: float | Target | Profile,
        t: float | None = None,
        step: int | None = None,
        dtype: torch.dtype | str | None = None,
        method: str | None = None,
    ) -> Weights: ...

    def state_dict(
        self,
        sigma_rel: float | Target | Profile | None = None,
        t: float | None = None,
        step: int | None = None,
        dtype: torch.dtype | str | None = None,
        method: str | None = None,
    ) -> Weights | dict[str, Any]:
        """Averaged weights as a state dict; without `sigma_rel`, the tracker's own state.

        The tracker's own state (averages in full precision, clock, counters, schedule, run) goes with your
        training checkpoint; `load_state_dict` continues from it exactly. In the processes of a group that do not
        write it is empty, and an empty one may be loaded there.

        Arguments:
            sigma_rel: length of the average, in (0, 0.2887); or another target, such as `targets.Beta(0.9999)` or
                `targets.Window(1000)`; or any object with `density` and `tail`.
            t: time of the average; by default the current time of a live tracker, else that of the last snapshot.
            step: the same time as a number of calls of `update_`.
            dtype: dtype of the averages; None for each parameter's own.
            method: the solver, "minvar" or "paper"; None for the first.

        Returns:
            A dict of tensors on the CPU by name, with their `predicted_error`; it can also be used in a `with`
            statement. The tensors are copies: they stay as they are while training goes on.

        Raises:
            InvalidValueError, NotReadyError, FileFormatError, MismatchError.
        """
        if sigma_rel is not None:
            return with_consistent_plan(partial(self._plan, sigma_rel, t, step, dtype, method), make_weights)
        return pack_state(self._state(), self.settings) if self.keeps_averages else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from a tracker's own state, as `state_dict()` gave it.

        Snapshots in the directory that are later than the state, or belong to another attempt that went on from an
        earlier state, are moved to its folder `superseded`. From here on this tracker's settings hold: they may have
        another `update_every` or `checkpoint_every`, or fewer `sigma_rels`, than those that the state was saved with,
        and every profile stays exact. On an error nothing is changed.

        Raises:
            InvalidValueError: not such a state, one of a process that keeps no averages, without a profile that this
                tracker has, or of another clock.
            ModelMismatchError: of another model.
            NonFiniteError: an average in it holds nan or infinity.
            LockedError, MismatchError: another writer, or another run, has the directory.
        """
        self._check_open()
        self._check_free("load_state_dict")
        with self._lock:
            self._caller = threading.get_ident()
            self.flush()
            self._load(state)

    def save_state(self, path: str | Path) -> None:
        """Write the tracker's own state to a safetensors file: complete or not at all, durable, checksummed.

        The averages are copied first, so that training may go on, and written one after the other. An older state under
        that name is replaced when the new one is durable. The file may lie in the snapshot directory. In a group of
        processes all may make the call, with the same path: those that keep no averages write nothing.

        Raises:
            OutputExistsError: the path holds anything but a state.
            WriteError: the system refused; nothing partial is left, and an older state is as it was.
        """
        path = _checked_path(path)
        if self.keeps_averages:
            write_state(path, self._state(), self.settings)

    def load_state(self, path: str | Path) -> None:
        """Continue exactly from a file of `save_state`, as `load_state_dict` does. Tensors are read one by one.

        A process that keeps no averages takes the counters, or nothing if the file is on another machine's disk.

        Raises:
            FileFormatError: no such file, not a state, or damaged.
            others: as `load_state_dict`.
        """
        path = _checked_path(path)
        if self.keeps_averages or path.exists():
            with open_state(path) as state:
                self.load_state_dict(state)

    @in_block
    def model(
        self,
        model: Module,
        sigma_rel: float | Target | Profile,
        t: float | None = None,
        step: int | None = None,
        dtype: torch.dtype | str | None = None,
        method: str | None = None,
    ) -> Iterator[Module]:
        """The model itself with averaged weights, in eval mode, for the `with` block.

        After the block weights, buffers, train or eval mode and device are as before, also on an error; parameters
        that are not tracked do not change. The model's own weights are kept in host memory meanwhile. Blocks may be
        nested. The predicted error is logged. Arguments as in `state_dict`, except that without `dtype` the
        weights take the dtypes that the model has.

        The block gives the model itself: `averaged.state_dict()` refers to its tensors, which hold its own weights
        again after the block. To keep the averaged ones, save them within the block, or use
        `ema.state_dict(sigma_rel=...)`.

        Raises:
            NotReadyError: the block is used without `with`; or no average exists yet.
            InvalidValueError: an argument, or a tensor of the model is on the meta device; `load_into` fills those.
            ModelMismatchError: the model has no such tensor, or in another shape.
        """
        weights = with_consistent_plan(partial(self._plan, sigma_rel, t, step, dtype, method), make_weights)
        with swapped_in(model, weights, own_dtypes=dtype is None):
            yield model

    @in_block
    def averaged(self, model: Module, tracked: float) -> Iterator[Module]:
        """As `model`, with the live average of a tracked profile: it is exact, and no snapshot is read.

        Arguments:
            model: as in `model`.
            tracked: sigma_rel of the profile.

        Raises:
            InvalidValueError: `tracked` is none of the tracked profiles, which are listed.
            NotReadyError: there was no update yet, or none since `from_path`; or there is no `with`.
            ModelMismatchError: as in `model`.
        """
        source = self._tracked_source(tracked)
        names = {name: name for name in source.tensors} | source.info.aliases
        log.info("live average of sigma_rel %g at t = %.12g: exact", source.info.sigma_rel, source.info.t)
        with swapped_in(model, {alias: source.tensors[name] for alias, name in names.items()}):
            yield model

    def load_into(
        self,
        model: torch.nn.Module,
        sigma_rel: float | Target | Profile,
        t: float | None = None,
        step: int | None = None,
        dtype: torch.dtype | str | None = None,
        method: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Fill a model with averaged weights for good, on any device, also a model on `meta`.

        Memory for one tensor at a time is enough. Everything is computed twice: first only to check that it can be, so
        that an error leaves the model as it was. A tensor on `meta` that an average fills is created on `device`; a
        warning names those that stay on `meta`.

        Between two training steps this is the switch of Switch EMA: parameters stay the same objects, so that the
        optimizer keeps them and its state, and later updates average the new weights.

        Arguments:
            device: where tensors that are on `meta` are created.
            others: as in `model`.

        Raises:
            ModelMismatchError: the model has no such tensor, or in another shape.
            InvalidValueError, NotReadyError, FileFormatError, MismatchError, NonFiniteError: as `state_dict`.
        """
        with_consistent_plan(
            partial(self._plan, sigma_rel, t, step, dtype, method),
            lambda plan: fill_model(model, plan, device),
        )

    def update_bn(self, model: torch.nn.Module, loader: Iterable[Any]) -> None:
        """Recompute a model's BatchNorm statistics for the weights that it has now.

        A snapshot holds a copy of the training's statistics, which belong to the raw weights. Within `with
        ema.model(...)` or `ema.averaged(...)` the new statistics last until the end of the block; after `load_into`
        they stay.

        Arguments:
            model: in any mode, on any device; without BatchNorm layers nothing happens.
            loader: yields the model's inputs, or lists or tuples whose first item they are.

        Raises:
            InvalidValueError: the loader yields nothing. After any error the statistics are as before.
        """
        model_weights.update_bn(model, loader)

    def reconstruction_error(
        self, sigma_range: tuple[float, float] = (0.05, 0.28), method: str | None = None
    ) -> Figure:
        """A figure of the reconstruction error against sigma_rel: of the current averages, or before of the schedule.

        Arguments:
            sigma_range: lowest and highest sigma_rel.
            method: the solver; None for the default one.
        """
        from posthoc_cli import plots

        sources = of_newest_segment(self._sources())
        if sources:
            last = max(source.info.t for source in sources)
            chosen, _ = chosen_up_to(sources, last)
            counted = f"{len(chosen):,} of {len(sources):,}" if len(chosen) < len(sources) else f"{len(sources):,}"
            label = f"{counted} averages up to t = {last:,.12g}"
            profiles = [source.info.profile.pure for source in chosen]
            candidate = Candidate.of_run(label, profiles, source_prior(chosen), self.settings.t_unit)
        else:
            schedule = self.settings.schedule
            every, count = schedule.checkpoint_every, schedule.max_checkpoints or 20
            rounding = ROUNDING * EPS[schedule.checkpoint_dtype or "F32"]
            plan = Schedule(self.settings.sigma_rels, count * every, every, count, rounding)
            candidate = Candidate.of_schedule(plan)
        curve = error_curve(candidate, sigma_range, method=method)
        return plots.error_figure([curve], profile_error=method == "paper")

    # --- one call of `update_` ---

    def _advance(self, model: torch.nn.Module, t: float | None) -> None:
        self._check_open()
        # Errors of work beside the training since the last call; they stay if this call fails itself.
        self._pending = self._take_error()
        self._decide_writer(model)
        if self._writer is False:
            self._count_only(t)
            return
        if self._pipeline.snapshotter is None or self._pipeline.now.resumes:
            self._begin()
        settings, progress = self.settings, self._after(t)
        if settings.update_is_due(progress.step) or settings.snapshot_is_due(progress.step):
            # Before anything is counted: a wait for a slow disk can be interrupted, with nothing done.
            self._pipeline.wait_for_turn(settings.snapshot_is_due(progress.step))
            self._pending = self._take_error()
            progress = self._after(t)  # the last update may have been interrupted after it was handed over
        is_due = settings.snapshot_is_due(progress.step)
        if settings.update_is_due(progress.step):
            self._update(model, progress, is_due)
        elif is_due and self._pipeline.now.averages.exist:
            self._pipeline.leave_out(progress, is_due)
        else:
            self._pipeline.count(progress)

    def _update(self, model: torch.nn.Module, progress: Progress, is_due: bool) -> None:
        tracked = self._pipeline.now.tracked
        refused: NonFiniteError | None
        try:
            tensors = self._watch.tensors(model, tracked)
            change = self._watch.change(tensors, tracked)
        except NonFiniteError as error:  # a new segment cannot begin with it
            self._pipeline.leave_out(progress, is_due)
            refused = error
        except PostHocError:
            self._pipeline.leave_out(progress, False)
            raise
        else:
            refused = self._pipeline.update(Update(tensors, progress, is_due, change))
            self._pipeline.warn_of_waiting(stacklevel=4)
        if refused is not None:
            self.settings.skip_update(refused, stacklevel=4)

    def _count_only(self, t: float | None) -> None:
        """A call in a process that keeps no averages."""
        progress, now = self._after(t), self._pipeline.now
        if now.resumes:  # the writer's averages differ from those on disk from here on
            self._pipeline.set(replace(now, progress=progress, resumes=False))
        else:
            self._pipeline.count(progress)

    def _after(self, t: float | None) -> Progress:
        """The progress after one more call."""
        last = self._pipeline.progress
        try:
            time = next_time(self.settings, last.own_clock, last.t, last.step + 1, t)
        except InvalidValueError as error:
            if last.step != self._resumed_at or not isinstance(t, int | float) or t > last.t:
                raise
            raise error.with_hint(
                "the averages go on from there; for an earlier checkpoint there is from_path(..., step=N)"
            ) from error
        return last.after(time, t is not None, self.settings.update_is_due(last.step + 1))

    def _begin(self) -> None:
        """At the first call: become the directory's writer and, in a resumed run, load its averages."""
        with self._as_writer(self.run_id) as snapshotter:
            now = self._pipeline.now
            if not now.resumes:
                return
            found = self._stored_state()
            progress = found.tracking.progress
            snapshotter.set_aside_others(progress.t, known=found.snapshots)
            if progress.step != now.progress.step:
                log.warning(
                    "%s: the run has gone on since from_path looked, from step %d to %d; the averages go on from "
                    "there, and the model should be of then, too",
                    self.checkpoint_dir,
                    now.progress.step,
                    progress.step,
                )
            self._resumed_at = progress.step
            self._pipeline.set(found.tracking)

    @contextmanager
    def _as_writer(self, run_id: str) -> Iterator[Snapshotter]:
        """The directory's writer; if the block fails, this tracker stays one only if it was one before."""
        pipeline, before = self._pipeline, self._pipeline.snapshotter
        snapshotter = before or self._open_snapshotter()
        try:
            snapshotter.check_run(run_id)
            pipeline.snapshotter = snapshotter
            yield snapshotter
        except BaseException:
            if before is None:
                pipeline.snapshotter = None
                snapshotter.close()
            raise

    def _open_snapshotter(self) -> Snapshotter:
        wait_for_writers(self.checkpoint_dir)  # a forgotten tracker may still be writing its last snapshot
        try:
            try:
                return Snapshotter(self.checkpoint_dir, self.settings)
            except LockedError:
                # The holder may be garbage, such as the tracker of a notebook cell that was run again: one that is
                # attached to an optimizer with a scheduler stays until the collector runs.
                gc.collect()
                wait_for_writers(self.checkpoint_dir)
                return Snapshotter(self.checkpoint_dir, self.settings)
        except WriteError as error:  # a WriteError of `update_` would say that the call has done its work
            raise DirectoryError(error.subject, error.reason, error.hint) from error
        except LockedError as error:
            if not is_in_group():
                raise
            raise error.with_hint(
                "in a group of processes one writes: from_model(..., writer=rank == 0), and the same for from_path"
            ) from error

    def _decide_writer(self, model: torch.nn.Module | None) -> None:
        """Decide, for good, who keeps the averages: when the tracker is made, or once there is a group."""
        if self._writer is None and self._pipeline.snapshotter is None:
            self._writer = choose_writer(None, model)

    def _check_free(self, name: str) -> None:
        """Raise a NotReadyError while another call is under way; two that begin at once take turns."""
        self._check_process()
        if self._lock.locked():
            beneath = self._caller == threading.get_ident()
            where = "this thread, beneath a signal handler," if beneath else "another thread"
            raise NotReadyError(
                name, f"{where} is calling the tracker", "call update_ from one thread, after every step"
            )

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise NotReadyError(
                self.checkpoint_dir,
                "this process was forked from the one that has the tracker, and its threads",
                "call it there, or read the snapshots with PostHocEMA.from_path",
            )

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> NotReadyError:
        return NotReadyError(self.checkpoint_dir, "this tracker was closed", "go on with PostHocEMA.from_path")

    def _take_error(self) -> Exception | None:
        """The error to be raised by this call or the next one."""
        return self._pending or self._pipeline.take_error()

    # --- state ---

    def _state(self) -> TrackerState:
        """What a tracker would continue from; its tensors are copies."""
        self.flush()
        if self._pipeline.now.resumes:
            return self._stored_state()
        reading = self._pipeline.read_exactly()
        self._pipeline.flush()  # the snapshots of that time are on disk now
        snapshotter = self._pipeline.snapshotter
        return exact_state(reading, [] if snapshotter is None else snapshotter.checksums)

    def _stored_state(self) -> TrackerState:
        """The state in the directory to go on from."""
        now = self._pipeline.now
        if self._from_step == 0:
            return TrackerState(replace(now, progress=Progress(), resumes=False))
        return load_from_directory(self.checkpoint_dir, self.settings, now.tracked, self._from_step)

    def _load(self, state: Mapping[str, Any]) -> None:
        if not (self.keeps_averages or state):
            return
        loaded = unpack_state(state, self.settings, self._pipeline.now.tracked)
        tracking = loaded.tracking
        if self.keeps_averages:
            with self._as_writer(tracking.run_id) as snapshotter:
                known = loaded.snapshots | snapshotter.holding(tracking.averages)
                snapshotter.set_aside_others(tracking.progress.t, known)
        else:
            tracking = replace(tracking, averages=RunningAverages.none_yet(self.settings.sigma_rels))
        self._pipeline.set(tracking)

    # --- synthesis ---

    def _sources(self) -> list[Source]:
        """The snapshots and live averages that there are now."""
        resumes = self._pipeline.now.resumes
        if not resumes:  # else the writer, too, has only what is on disk
            self._check_keeps()
        self.flush()
        sources = current_sources(self.checkpoint_dir, self.run_id, self._live_sources())
        if resumes and self._from_step is not None:
            return [source for source in sources if source.info.step <= self._from_step]
        return sources

    def _live_sources(self) -> list[LiveSource]:
        return live_sources(self.settings, self._pipeline.read())

    def _tracked_source(self, tracked: float) -> LiveSource:
        """The live average of a tracked profile."""
        try:
            wanted = check_sigma_rel(tracked)
        except InvalidValueError as error:
            raise InvalidValueError("tracked", error.reason, error.hint, value=error.value) from error
        known = self.settings.sigma_rels
        if not any(math.isclose(wanted, sigma_rel, rel_tol=1e-6) for sigma_rel in known):
            raise InvalidValueError(
                "tracked",
                f"must be one of the tracked profiles, {', '.join(f'{s:g}' for s in known)}",
                f"for any other use model(model, sigma_rel={tracked:g})",
                value=f"{tracked:g}",
            )
        self._check_keeps()
        self.flush()
        for source in self._live_sources():
            if math.isclose(wanted, source.info.sigma_rel, rel_tol=1e-6):  # 0.05 of float32 is the same profile
                return source
        raise self._not_yet("live average")

    def _check_keeps(self) -> None:
        if not self.keeps_averages:
            raise NotReadyError(
                "this process keeps no averages, the first one of its group does, or the one that was made "
                "with writer=True",
                "make them there and broadcast them, or read the snapshots on disk with a new "
                "PostHocEMA.from_path(directory), before any update_ of it",
            )

    def _plan(
        self,
        sigma_rel: float | Target | Profile,
        t: float | None,
        step: int | None,
        dtype: torch.dtype | str | None,
        method: str | None,
    ) -> Plan:
        sources = self._sources()
        if not sources:
            raise self._not_yet("average")
        plan = plan_synthesis(sources, [sigma_rel], t, step, method, dtype=dtype)
        error = plan.predicted_error(0)
        predicted = "unknown" if error is None else f"{error:.2g}"
        log.info("average of %s at t = %.12g: predicted error %s", plan.targets[0].title, plan.t, predicted)
        if plan.choice is not None:
            log.info("made from %s", plan.choice)
        return plan

    def _not_yet(self, what: str) -> NotReadyError:
        schedule = self.settings.schedule
        every = schedule.update_every
        first = (max(schedule.update_after_step, self.step) // every + 1) * every
        return NotReadyError(f"no {what} yet", f"the first update is at call {first} of update_, so far {self.step}")


def _find_run(
    directory: Path, settings: Settings, tracked: TrackedModel, resume: str | int
) -> tuple[Tracking, int | None] | None:
    """What a directory holds to go on with, and the call to go on from; None if it holds nothing, and may.

    Raises:
        InvalidValueError: `resume`, or its run has another clock or no such profiles.
    """
    if isinstance(resume, str) and resume != "auto":
        raise InvalidValueError(
            "resume", "must be 'auto', a call of update_ that has snapshots, or None", value=f"{resume!r}"
        )
    wait_for_writers(directory, last_too=True)
    stored = find_snapshots(directory) if resume == "auto" else read_directory(directory)
    if not stored:
        return None
    newest, schedule, sigma_rels = stored[-1].info, settings.schedule, settings.sigma_rels
    if newest.t_unit != settings.t_unit:
        found = shown(newest.t_unit)
        raise InvalidValueError("t_unit", f"the run in {directory} counts {found}", value=f"{settings.t_unit!r}")
    check_profiles(newest.sigma_rels, sigma_rels)
    is_first = newest.step <= schedule.update_after_step + schedule.checkpoint_every
    if resume == "auto" and is_first and len(stored) < len(sigma_rels):
        # Killed while it wrote its first snapshots: they are set aside when it begins again.
        averages = RunningAverages.none_yet(sigma_rels)
        return Tracking(newest.run_id, Progress(), tracked, averages, resumes=True), 0
    step = None if isinstance(resume, str) else resume
    return resumed_tracking(directory, snapshots_until(stored, sigma_rels, step), sigma_rels), step


def _checked_path(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InvalidValueError("path", "must be the path of a file", value=f"{path!r}")
    return Path(path)
