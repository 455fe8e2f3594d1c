"""`PostHocEMA`: the hook that a training loop calls, and the averages that it gives at any time."""

from __future__ import annotations

import logging
import secrets
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

import torch

from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    NotReadyError,
    PostHocError,
    shown,
)
from posthoc_cli.planning import Candidate, Schedule, error_curve
from posthoc_cli.reconstruction import ROUNDING
from posthoc_cli.run import Run, Wanted, Weights
from posthoc_cli.snapshots import states
from posthoc_cli.snapshots.directory import find_snapshots, read_directory
from posthoc_cli.snapshots.format import Selection, check_globs, make_selection
from posthoc_cli.snapshots.sources import Snapshot, Source, chosen_up_to, source_prior
from posthoc_cli.snapshots.states import StateInfo
from posthoc_cli.synthesis.engine import check_device
from posthoc_cli.synthesis.plan import plan_synthesis, with_consistent_plan
from posthoc_cli.tracker import state
from posthoc_cli.tracker.averages import HOST, RunningAverages
from posthoc_cli.tracker.evaluation import Evaluation, Query, as_dtensors, gathered
from posthoc_cli.tracker.model_tensors import (
    ModelTensors,
    ModelWatch,
    TrackedModel,
    check_complete,
    check_model,
    collect_tensors,
    is_swapped,
    nonfinite_name,
)
from posthoc_cli.tracker.model_weights import (
    fill,
    fill_model,
    in_block,
    swapped_in,
    update_bn,
    warn_of_statistics,
)
from posthoc_cli.tracker.names import named_tensors
from posthoc_cli.tracker.optimizer import Attachment, attach
from posthoc_cli.tracker.pipeline import Pipeline, wait_for_writers
from posthoc_cli.tracker.settings import (
    Progress,
    Settings,
    check_path,
    check_sigma_rels,
    choose_writer,
    is_in_group,
    make_schedule,
)
from posthoc_cli.tracker.sharding import (
    THIS_PROCESS,
    Callers,
    Group,
    check_times,
    meet,
    mesh_of,
)
from posthoc_cli.tracker.snapshotter import run_snapshots, squared_norms
from posthoc_cli.tracker.state import Tracking
from posthoc_cli.tracker.worker import Calls

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Module = TypeVar("Module", bound=torch.nn.Module)
Dtype = torch.dtype | str | None
Stored = types.EllipsisType

log = logging.getLogger(__name__)

_FROM_SNAPSHOTS = "use the snapshots: ema synthesize, or Run(directory).average(sigma_rel), in one process"


class PostHocEMA:
    """Tracks power-function averages of a model and gives the average of any other length.

    Make one with `from_model` or `from_path`. Snapshots are written beside the training; `flush` returns when all due
    ones are on disk. `close`, or the end of a `with` block, also lets another writer into the directory. Public
    attributes: `checkpoint_dir`, where the snapshots are, and `settings`, the checked arguments.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        how = "is made by PostHocEMA.from_model(model, checkpoint_dir, sigma_rels=...) for a new run, or by"
        raise InvalidValueError(
            "PostHocEMA(...)", f"{how} PostHocEMA.from_path(checkpoint_dir) for the run in a directory"
        )

    def _begin(
        self, directory: Path, settings: Settings, tracking: Tracking, model: torch.nn.Module | None,
        device: str | None, writer: bool | None, step: int | None, knows_selection: bool = True,
        stored: Sequence[Snapshot] = (),
    ) -> None:  # fmt: skip
        """Begin with checked arguments; the `step` to go on from is 0 for a new beginning of a run."""
        self.checkpoint_dir, self.settings = directory, settings
        self._members = members = tracking.tracked.members
        self._watch = ModelWatch(settings.selection, not knows_selection, members)
        if model is not None and tracking.resumes:
            try:
                self._watch.check_model(model, tracking.tracked)
            except ModelMismatchError as error:
                hint = f"the run in {self.checkpoint_dir} is of another model; use its model, or another directory"
                raise error if error.hint else error.with_hint(hint) from None
        self._model = None if model is None else weakref.ref(model)
        self._pipeline = Pipeline(settings, tracking, device)
        # Also where nobody closes it. It must not wait for a thread: that may be collecting the garbage.
        weakref.finalize(self, self._pipeline.end).atexit = False
        self._attachment: Attachment | None = None
        self._writer = choose_writer(writer, model) if members is None else members.part is not None
        self._callers = None if members is None else members.callers
        self._from_step, self._resumed_at = step, -1
        self._step_is_given, self._stored = step is not None, stored
        self._seen: tuple[Mapping[int, float], float] | None = None
        self._pending: Exception | None = None
        self._callbacks: list[Callable[[PostHocEMA], None]] = []
        self._reported = 0
        self._warned_of_statistics = False
        self._calls = Calls(directory)
        self._is_writer(model)

    @classmethod
    def from_model(
        cls, model: torch.nn.Module, checkpoint_dir: str | Path, sigma_rels: Sequence[float] = (0.05, 0.28),
        update_every: int = 10, checkpoint_every: int = 1000, update_after_step: int = 0,
        max_checkpoints: int | None = 20, checkpoint_dtype: Dtype = torch.float16, t_unit: str = "steps",
        only_trainable: bool = True, on_nonfinite: str = "raise", sigma_range: tuple[float, float] = (0.05, 0.28),
        include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None,
        copy_only: str | Sequence[str] | None = None, buffers: str = "copy",
        device: str | None = None, writer: bool | None = None, final_snapshot: bool = True, keep_state: bool = False,
        resume: str | int | None = None,
    ) -> PostHocEMA:  # fmt: skip
        """A tracker for a new run, or with `resume` of one that goes on. Nothing is written before the first `update_`.

        Arguments:
            model: to be tracked, wrapped or bare: names are those of the bare model.
            checkpoint_dir: the directory for the snapshots, made when it is missing. One run a directory.
            sigma_rels: profiles to track; two reach almost everything, see `ema error-plot`.
            update_every, update_after_step: averages are updated at multiples of the first, after the second.
            checkpoint_every: snapshots are due at multiples of it; a multiple of update_every.
            max_checkpoints: snapshots to keep of each profile: those that reconstruction needs most. None keeps all.
            checkpoint_dtype: that averages are stored in, float32 where values do not fit; None for each parameter's.
            t_unit: the unit of `t`, if you pass a clock of your own to `update_`.
            only_trainable: leave out parameters that do not require gradients.
            on_nonfinite: where a parameter holds nan or infinity, "raise" an error, or "skip" the update and warn.
            sigma_range: the range of sigma_rel that `max_checkpoints` keeps snapshots for.
            include, exclude: globs on names, such as "decoder.*": tensors that match none of the first, or one of the
                second, are left out.
            copy_only: globs on names of tensors to be copied, as buffers are, and not averaged, whether they require
                gradients or not. Every average holds the newest copy at its time.
            buffers: "copy" them, except that BatchNorm's running statistics are averaged; or "average" floating-point
                ones as if they were parameters.
            device: "model" for averages beside the parameters, updated by the training's own thread; "cpu" for averages
                on the host, updated by a thread of their own, with the same bits; None for "cpu" where a parameter is
                on an accelerator, else "model".
            writer: in a group of processes that train one model: whether this one keeps the averages and writes; the
                others only count. None for the first process of the model's DistributedDataParallel; of a model that
                is not wrapped (yet), of all processes.
            final_snapshot: write a last snapshot at `close`, at the end of a `with` block or of the process.
            keep_state: keep the exact averages beside the snapshots, in `state.safetensors`: `from_path` and `resume`
                then go on without rounding. 4 bytes an element and 6 for each profile (float64: 8 and 8), also on disk.
            resume: "auto" to go on, as `from_path` does but with these arguments, where the directory holds a run of
                this model: from the newest snapshots at or before the place of the model's weights on the run's path.
                Restore its checkpoint before; a model that is not on the path by the first `update_` is an error there.
                A number to go on from the snapshots of that call of `update_`, whatever the weights. None for a new
                run only.

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
        """
        selection = make_selection(only_trainable, include, exclude, buffers, copy_only)
        given = (update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype, sigma_range)
        profiles, timing = check_sigma_rels(sigma_rels), make_schedule(given)
        settings = Settings(profiles, timing, t_unit, selection, on_nonfinite, final_snapshot, keep_state)
        check_globs(selection, [tensor.name for tensor in named_tensors(check_model(model))])
        found = collect_tensors(model, selection)
        tracked = TrackedModel.of_model(found)
        tracked.check_header()
        directory = check_path("checkpoint_dir", checkpoint_dir)
        tracking, step = Tracking.new(secrets.token_hex(16), tracked, profiles), None
        stored: Sequence[Snapshot] = ()
        if resume is not None:
            wait_for_writers(directory, last_too=True)
            stored = state.stored_to_resume(directory, resume)
            tracking, step = state.find_run(directory, stored, settings, tracked, resume) or (tracking, None)
            settings = replace(settings, selection=selection.going_on(tracking.tracked.dtypes(copied=True)))
            found = collect_tensors(model, settings.selection)
        tracking = _joined(tracking, model, found, settings, directory, writer)
        made = cls.__new__(cls)
        made._begin(directory, settings, tracking, model, device, writer, step, stored=stored)
        if resume == "auto" and tracking.resumes:
            made._choose_start(model, is_first_call=False)
        return made

    @classmethod
    def from_path(
        cls, checkpoint_dir: str | Path, model: torch.nn.Module | None = None,
        update_every: int | Stored = ..., checkpoint_every: int | Stored = ..., update_after_step: int | Stored = ...,
        max_checkpoints: int | Stored | None = ..., checkpoint_dtype: torch.dtype | str | Stored | None = ...,
        on_nonfinite: str = "raise", sigma_range: tuple[float, float] | Stored = ...,
        device: str | None = None, sigma_rels: Sequence[float] | Stored = ...,
        writer: bool | None = None, final_snapshot: bool = True, keep_state: bool | None = None,
        step: int | None = None,
    ) -> PostHocEMA:  # fmt: skip
        """The run in a directory: to synthesize from, and to go on tracking.

        Tracking goes on at the first `update_`, from the newest snapshots at or before the place of the model's weights
        on the run's path; weights that are not on it are an error then. It goes on from the snapshots' values, rounded
        to their storage dtype (float16: 2e-4 relative), unless `keep_state` has left an exact state of their time. To
        go on exactly without one, `load_state_dict`. Due snapshots of other trackers of this process are waited for.

        Arguments:
            checkpoint_dir: a directory with snapshots.
            model: the model to go on with, or to be filled; its tensors are checked against the snapshots here and now.
            sigma_rels: the tracked profiles to go on with; the others' snapshots stay in use.
            step: go on from the snapshots of this call of `update_`, whatever the model's weights; later ones are set
                aside in the folder `superseded` when tracking begins.
            others: as in `from_model`; the default is the stored value, for `keep_state` whether there is a state.

        Raises:
            DirectoryError, FileFormatError, MismatchError, ModelMismatchError: of the directory, and of the model.
            InvalidValueError: an argument, or a `step` without snapshots; names those that have some.
        """
        directory = check_path("checkpoint_dir", checkpoint_dir)
        wait_for_writers(directory)
        stored = read_directory(directory)
        profiles = state.resumed_profiles(stored, sigma_rels)
        snapshots = state.snapshots_until(stored, profiles, step)
        newest = snapshots[-1].info
        given = (update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype, sigma_range)
        timing = make_schedule(given, newest.schedule)
        selection = (newest.selection or Selection()).going_on(newest.copies)
        kept = state.read_state_info(directory) if keep_state is None else None
        keeps = keep_state or (kept is not None and kept.run_id == newest.run_id)
        settings = Settings(profiles, timing, newest.t_unit, selection, on_nonfinite, final_snapshot, keeps)
        tracking = state.resumed_tracking(directory, snapshots, profiles)
        knows_selection = newest.selection is not None
        if model is not None:
            known = frozenset(tracking.tracked.tensors | tracking.tracked.aliases)
            found = collect_tensors(model, selection, known)  # it may be frozen, to be filled only
            tracking = _joined(tracking, model, found, settings, directory, writer)
        made = cls.__new__(cls)
        made._begin(directory, settings, tracking, model, device, writer, step, knows_selection, stored)
        return made

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
    def closed(self) -> bool:
        """Whether `close` was called: no more updates are taken, averages can still be read."""
        return self._calls.closed

    @property
    def keeps_averages(self) -> bool:
        """Whether this process keeps the averages and writes them, or only counts for another one of its group."""
        return self._is_writer(None if self._model is None else self._model())

    @property
    def run(self) -> Run:
        """The snapshots of this run on disk. Snapshots that are still being written are waited for."""
        self.flush()
        return Run(self.checkpoint_dir)

    # --- tracking ---

    def update_(self, model: torch.nn.Module, t: float | None = None) -> None:
        """Count a training step of the model, wrapped or bare. Call it after every optimizer step.

        `t` is the training time on a clock of your own (images, tokens), growing at every call; or None at every call.

        Raises:
            NonFiniteError, ModelMismatchError: a parameter holds nan or infinity, or the model has changed. No average
                is touched, and the call counts. Where averages are updated beside the training, the first comes with
                the next call.
            WriteError: an earlier snapshot could not be written; raised once, this call has done its work.
            NotReadyError: the tracker is closed, attached, in use or another process's; or the weights are averaged.
            LockedError, MismatchError, ModelMismatchError, DirectoryError, FileFormatError: at the first call: the
                directory has another writer or run, or is damaged or lacks a profile to go on from; or the model is not
                on the path of the run that is to go on. Nothing of the call has been done.
        """
        check_model(model)
        if self._attachment is not None:
            self._attachment.check_caller()
        if is_swapped(model):
            reason = "the model holds averaged weights now"
            raise NotReadyError("update_", reason, "call it outside `with ema.model(...)`")
        grad_mode = torch.is_grad_enabled()
        try:
            with self._calls.lock("update_"):
                self._calls.caller = threading.get_ident()
                self._advance(model, t)
        finally:  # a signal handler can raise just before torch.no_grad() restores it
            torch.set_grad_enabled(grad_mode)
        self._raise_pending()
        self._run_callbacks()

    def attach(self, optimizer: torch.optim.Optimizer, t: Callable[[], float] | None = None) -> Attachment:
        """Call `update_` after every step of `optimizer`, with the model that this tracker was made with.

        A step that a GradScaler skips does not count. Errors of `update_` leave `optimizer.step()`. Another tracker
        that is attached to the optimizer for the same model is closed, with a warning: when a notebook's cell runs
        again, nothing else can close it. To have two of one model, call `update_` of one of them yourself.

        Arguments:
            optimizer: the one that trains the model, may be accelerate's; of several, the one that steps last.
            t: gives the training time on a clock of your own, such as `lambda: images_seen`; None for steps.

        Returns:
            A handle whose `remove()` undoes it, as `detach()` does.

        Raises:
            InvalidValueError: not an optimizer, a second one, a tracker without model, or no `t` for this run's clock.
            NotReadyError: this tracker is closed.
            others: from closing the other tracker. This one is not attached then; the next try will succeed.
        """
        self._calls.check_open()
        self._attachment = attach(self, optimizer, self._model, t, self._attachment)
        return self._attachment

    def detach(self) -> None:
        """Undo `attach`. Nothing happens if the tracker is not attached."""
        if self._attachment is not None:
            self._attachment.remove()

    def on_snapshot(self, callback: Callable[[PostHocEMA], None]) -> None:
        """Call `callback(ema)` when new snapshots are durable, once for all profiles.

        The thread that calls `update_` does so, within its next call, or `close`. Errors of the callback leave that
        call, which has done its work. In the processes of a group that write nothing it is never called.
        """
        if not callable(callback):
            raise InvalidValueError("on_snapshot", "must be given a function of the tracker", value=shown(callback))
        self._callbacks.append(callback)

    def metrics(self, sigma_rels: float | Sequence[float] = ()) -> dict[str, float]:
        """Figures for a logger, at almost no cost: nothing is computed from tensors, and nothing is waited for.

        Arguments:
            sigma_rels: lengths, or one, whose predicted errors are wanted; headers of the snapshots on disk are read.

        Returns:
            `step` and `t`. When snapshots were written, of the last ones: `distance_0.05`, ..., how far each tracked
            average was from the weights, relative to its norm; `snapshot_bytes`; `snapshot_seconds`, which writing
            took beside the training; `snapshot_waited`, the seconds that the training waited before it. And
            `predicted_error_0.15`, ...: the expected relative error of each wanted length at the newest snapshot.
        """
        wanted = sigma_rels if isinstance(sigma_rels, Sequence) else (sigma_rels,)
        found = {"step": float(self.step), "t": self.t, **self._pipeline.figures()}
        snapshots = run_snapshots(self.checkpoint_dir, self.run_id) if wanted else []
        if snapshots:
            plan = plan_synthesis(snapshots, wanted)
            errors = [plan.predicted_error(index) for index in range(len(wanted))]
            known = zip(wanted, errors, strict=True)
            found |= {f"predicted_error_{sigma_rel:g}": error for sigma_rel, error in known if error is not None}
        return found

    def flush(self) -> None:
        """Return when all updates are in the averages and all due snapshots are durable, or this process's parts.

        Raises:
            WriteError, NonFiniteError: what went wrong since the last call; raised once.
            RankError: another process that keeps a part of the averages has failed.
        """
        self._calls.check_process()
        if self._attachment is not None:
            self._attachment.check_steps()
        self._pipeline.flush()
        self._pending = self._take_error()
        self._raise_pending()
        if self._members is not None:
            self._members.check()

    def snapshot(self) -> None:
        """Write a snapshot of every profile now, if not all updates are in the newest, and return when it is durable.

        It is marked as off the schedule: later snapshots do not depend on it, and `max_checkpoints` drops it first.

        Raises:
            NotReadyError: there was no update yet, or the tracker is closed.
            WriteError, NonFiniteError: as `flush`.
        """
        self._calls.check_open()
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
        if self._attachment is not None:
            self._attachment.check_steps()
        self.detach()
        self._calls.closed = True
        if self._calls.is_forked:
            return  # the threads and the directory belong to another process
        self._pipeline.refuse(self._calls.closed_error())
        try:
            self._pipeline.end()
            self.flush()
            self._run_callbacks()
        finally:
            self._pipeline.close()

    def __enter__(self) -> PostHocEMA:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        writes = self._pipeline.snapshotter is not None and not self._calls.closed
        if error is not None and self.settings.final_snapshot and writes:
            ended = "%s: %s ended the training at step %d; a last snapshot is written"
            log.warning(ended, self.checkpoint_dir, type(error).__name__, self.step)
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
        self, sigma_rel: Wanted, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None, full: bool = False, alone: bool = False,
    ) -> Weights: ...  # fmt: skip

    def state_dict(
        self, sigma_rel: Wanted | None = None, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None, full: bool = False, alone: bool = False,
    ) -> Weights | dict[str, Any]:  # fmt: skip
        """Averaged weights as a state dict; without `sigma_rel`, the tracker's own state.

        That state (averages in full precision, clock, counters, schedule, run) goes with your training checkpoint;
        `load_state_dict` continues from it exactly. In the processes of a group that do not write it is empty. Of a
        model that is sharded over processes all of them make the call, and each gets what it owns, as DTensors in host
        memory: torch.distributed.checkpoint saves and loads them, also for another arrangement of processes.

        Arguments:
            sigma_rel: length of the average, in (0, 0.2887); or another target, such as `targets.Beta(0.9999)` or
                `targets.Window(1000)`; or any object with `density` and `tail`.
            t, step: time of the average, or its number of calls; by default that of a live tracker, or the newest.
            dtype: dtype of the averages; None for each parameter's own.
            method: the solver, "minvar" or "paper"; None for the first.
            full: of a model that is sharded over processes, complete tensors in rank 0, gathered one by one; nothing
                in the others.
            alone: see `model`.

        Returns:
            Copies of the tensors by name, on the CPU, with their `predicted_error`. Of a sharded model, whose processes
            all make the call, DTensors as its parameters are.

        Raises:
            InvalidValueError, NotReadyError, FileFormatError, MismatchError, RankError.
        """
        if sigma_rel is not None:
            model, query = self._model_of_chunks(), Query(sigma_rel, t, step, dtype, method)
            evaluation = self._evaluation(model, alone, f"state_dict({query}{', full' * full})")
            made = evaluation.weights(model, query)
            if self._members is None or model is None:
                return made
            return gathered(made, model, self._members, evaluation.group) if full else as_dtensors(made, model)
        if self._members is None and not self.keeps_averages:
            return {}
        _, own, info = self._state("state_dict()")
        return state.pack_state(own, info, self._model_of_chunks())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from a tracker's own state, as `state_dict()` gave it.

        Snapshots that are later than the state, or of another attempt that went on from an earlier one, are moved to
        the folder `superseded`. This tracker's settings hold from here on: another `update_every` or
        `checkpoint_every`, or fewer `sigma_rels`; every profile stays exact. On an error nothing is changed. Of a model
        that is sharded over processes all of them make the call; each takes what it owns, of complete tensors, too.

        Raises:
            InvalidValueError, ModelMismatchError, NonFiniteError: not such a state, or one that does not fit.
            LockedError, MismatchError: another writer, or another run, has the directory.
            RankError: another process failed.
        """
        self._calls.check_open()
        if self._members is not None or self.keeps_averages or state:
            self._load(nullcontext(state))
        else:  # the writer has other averages from here on than those on disk
            self._pipeline.set(replace(self._pipeline.now, resumes=False))

    def save_state(self, path: str | Path) -> None:
        """Write the tracker's own state to a safetensors file: complete or not at all, durable, checksummed.

        An older state under that name is replaced when the new one is durable. The averages are copied first: training
        may go on. In a group of processes all may make the call, with the same path; one writes. Of a model that is
        sharded over processes all make it, and each writes what it owns to a folder of that name.

        Raises:
            OutputExistsError, WriteError: the path holds anything but a state, or the system refused. Nothing partial
                is left, and an older state is as it was.
            RankError: another process failed, or is at another step.
        """
        path = check_path("path", path)
        if self._members is None and not self.keeps_averages:
            return
        group, own, info = self._state(f"save_state({str(path)!r})")
        if self._members is None:
            state.write_state(path, own, info)
            return
        save = group.from_first(lambda: states.begin_save(path))
        try:
            group.together(lambda: state.write_state(path, own, info, save) if self.keeps_averages else None)
        except PostHocError:
            group.from_first(lambda: states.remove_saves(path, lambda one: one == save))
            raise
        group.from_first(lambda: states.remove_saves(path, lambda one: one != save))

    def load_state(self, path: str | Path) -> None:
        """Continue exactly from what `save_state` has written, as `load_state_dict` does. Tensors are read one by one.

        A process that keeps no averages takes the counters, or nothing if the file is on another machine's disk. Any
        number of processes may load what any other has saved; each reads what it owns.

        Raises:
            FileFormatError: no such file, not a state, damaged, or a folder without all parts.
            others: as `load_state_dict`.
        """
        path = check_path("path", path)
        if self._members is not None or self.keeps_averages or path.exists():
            self._calls.check_open()
            self._load(state.open_state(path, self._pipeline.now.tracked))
        else:
            self.load_state_dict({})

    @in_block
    def model(
        self, model: Module, sigma_rel: Wanted, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None, alone: bool = False,
    ) -> Iterator[Module]:  # fmt: skip
        """The model itself with averaged weights, in eval mode, for the `with` block.

        After the block weights, buffers, train or eval mode and device are as before, also on an error. The model's own
        weights are kept in host memory meanwhile. Blocks may be nested. Arguments as in `state_dict`, except that
        without `dtype` the weights take the dtypes that the model has. To keep averaged weights, save them within the
        block, or use `ema.state_dict(sigma_rel=...)`: the model's tensors hold its own weights again after it.

        In a group of processes all that have made a tracker of this directory make the call, between the same two calls
        of `update_`. Of a sharded model each fills the chunks that it holds; no complete tensor is made. Replicas get
        the weights that their writer has made. An error of one is raised in all. With `alone=True` the writer of
        replicas makes them for itself.

        Raises:
            NotReadyError: the block is used without `with`; or no average exists yet.
            InvalidValueError, ModelMismatchError: an argument, a tensor on the meta device, or of another shape.
            RankError: another process failed, is at another step, or does not make the call within 300 s.
        """
        query, own_dtypes = Query(sigma_rel, t, step, dtype, method), dtype is None
        evaluation = self._evaluation(model, alone, f"model({query})")
        weights = evaluation.weights(model, query)
        evaluation.check(model, weights, own_dtypes)
        with swapped_in(model, weights, own_dtypes):
            yield model
            self._warn_of_statistics(model, weights)

    @in_block
    def averaged(self, model: Module, tracked: float, alone: bool = False) -> Iterator[Module]:
        """As `model`, with the live average of a tracked profile: it is exact, and no snapshot is read.

        Raises:
            InvalidValueError, ModelMismatchError: as in `model`; or `tracked` is no tracked profile.
            NotReadyError: there was no update yet, or none since `from_path`; or there is no `with`.
        """
        index = self.settings.tracked_index(tracked)
        evaluation = self._evaluation(model, alone, f"averaged(tracked={self.settings.sigma_rels[index]:g})")
        weights = evaluation.live_weights(model, index)
        evaluation.check(model, weights)
        with swapped_in(model, weights):
            yield model
            self._warn_of_statistics(model, weights)

    def _warn_of_statistics(self, model: torch.nn.Module, weights: Weights) -> None:
        """Warn once, at the end of a block."""
        if not self._warned_of_statistics:
            copies = self._pipeline.now.tracked.dtypes(copied=True)
            self._warned_of_statistics = warn_of_statistics(model, weights, copies, stacklevel=6)

    def load_into(
        self, model: torch.nn.Module, sigma_rel: Wanted, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None, device: torch.device | str = "cpu", alone: bool = False,
    ) -> None:  # fmt: skip
        """Fill a model with averaged weights for good, on any device, also a model on `meta`.

        Memory for one tensor at a time is enough. Everything is computed twice, first only to check that it can be: an
        error leaves the model as it was. Parameters stay the same objects, so that the optimizer keeps its state, and
        later updates average the new weights: between two training steps this is the switch of Switch EMA. In a group
        of processes all make the call, as that of `model`, and each needs memory for the weights that it gets.

        Arguments:
            device: where tensors on `meta` that an average fills are created; a warning names those that stay there.
                Those of a sharded model are refused.
            alone: see `model`.

        Raises:
            ModelMismatchError, NonFiniteError, others: as in `model` and `state_dict`; nothing has changed.
        """
        query, own_dtypes = Query(sigma_rel, t, step, dtype, method), dtype is None
        evaluation = self._evaluation(model, alone, f"load_into({query})")
        if evaluation.group.is_alone and self._members is None:
            with_consistent_plan(partial(evaluation.plan, query), lambda plan: fill_model(model, plan, device))
            return
        weights = evaluation.weights(model, query)
        evaluation.check(model, weights, own_dtypes, accept_meta=self._members is None)
        fill(model, weights, weights.items(), own_dtypes, check_device(device))

    update_bn = staticmethod(update_bn)

    def reconstruction_error(
        self, sigma_range: tuple[float, float] = (0.05, 0.28), method: str | None = None
    ) -> Figure:
        """A figure of the reconstruction error against sigma_rel: of the current averages, or before of the schedule.

        `sigma_range` is the lowest and highest sigma_rel, `method` the solver; None for the default one.
        """
        from posthoc_cli import plots

        evaluation = self._evaluation(None, self._members is None, "reconstruction_error()")
        curve = error_curve(evaluation.of_sources(self._candidate), sigma_range, method=method)
        return plots.error_figure([curve], profile_error=method == "paper")

    def _candidate(self, sources: list[Source]) -> Candidate:
        if sources:
            last = max(source.info.t for source in sources)
            chosen, _ = chosen_up_to(sources, last)
            of_all = f" of {len(sources):,}" * (len(chosen) < len(sources))
            label = f"{len(chosen):,}{of_all} averages up to t = {last:,.12g}"
            profiles = [source.info.profile.pure for source in chosen]
            return Candidate(label, profiles, source_prior(chosen), self.settings.t_unit)
        schedule = self.settings.schedule
        every, count = schedule.checkpoint_every, schedule.max_checkpoints or 20
        rounding = ROUNDING * EPS[schedule.checkpoint_dtype or "F32"]
        return Candidate.of_schedule(Schedule(self.settings.sigma_rels, count * every, every, count, rounding))

    # --- one call of `update_` ---

    def _advance(self, model: torch.nn.Module, t: float | None) -> None:
        self._calls.check_open()
        if self._members is not None and self.settings.snapshot_is_due(self.step + 1):
            self._members.check()
        # Errors of work beside the training since the last call; they stay if this call fails itself.
        self._pending = self._take_error()
        pipeline, settings = self._pipeline, self.settings
        if pipeline.now.resumes:
            self._choose_start(model, is_first_call=True)
        if not self._is_writer(model):
            progress = self._after(t)
            if self._members is None and settings.update_is_due(progress.step):
                check_complete(model)
            elif self._members is not None and (pipeline.now.resumes or not self.step):  # the first call
                self._members.wait_for_writer()
            self._refused_anywhere(None, progress)
            pipeline.count(progress)
            return
        if pipeline.snapshotter is None or pipeline.now.resumes:
            self._become_writer()
        progress = self._after(t)
        if settings.update_is_due(progress.step) or settings.snapshot_is_due(progress.step):
            # Before anything is counted: a wait for a slow disk can be interrupted, with nothing done.
            pipeline.wait_for_turn(settings.snapshot_is_due(progress.step))
            self._pending = self._take_error()
            progress = self._after(t)  # the last update may have been interrupted after it was handed over
        if not settings.update_is_due(progress.step):
            pipeline.count(progress)
            return
        tracked = pipeline.now.tracked
        try:
            tensors = self._watch.tensors(model, tracked)
            self._watch.check(tensors, tracked)
        except PostHocError:
            pipeline.leave_out(progress, writes=False)
            raise
        else:
            skipped = self._refused_anywhere(tensors, progress)
            if skipped is not None:
                pipeline.leave_out(progress)
            else:
                skipped = pipeline.update(tensors, progress)
                pipeline.warn_of_waiting(stacklevel=3)
        if skipped is not None:
            settings.skip_update(skipped, stacklevel=3)

    def _refused_anywhere(self, tensors: ModelTensors | None, progress: Progress) -> NonFiniteError | None:
        """Why all processes of a sharded model leave an update out; None if they do not, or each raises an error."""
        if self._members is None or self.settings.on_nonfinite == "raise":
            return None
        if not self.settings.update_is_due(progress.step):
            return None
        name = None if tensors is None else nonfinite_name(tensors.averaged)
        if not self._members.any(name is not None):
            return None
        where = "a parameter in another process" if name is None else f"parameter {name!r}"
        return NonFiniteError(where, f"holds nan or infinity at step {progress.step}; no average has taken it in")

    def _after(self, t: float | None) -> Progress:
        """The progress after one more call."""
        last = self._pipeline.progress
        try:
            return last.after(t, self.settings)
        except InvalidValueError as error:
            if last.step != self._resumed_at or not isinstance(t, int | float) or t > last.t:
                raise
            hint = "the averages go on from there; for an earlier checkpoint there is from_path(..., step=N)"
            raise error.with_hint(hint) from error

    def _choose_start(self, model: torch.nn.Module, is_first_call: bool) -> None:
        """Go on from the newest snapshots at or before the model's place on the run's path.

        The first call of `update_` decides, for all processes alike: a model may be restored after its tracker was
        made. When that is made, a place on the path is taken, so that `step` is right, and any other one waits.

        Raises:
            ModelMismatchError: at the first call, if the model is not on the path, and no step was named.
        """
        if self._from_step == 0:
            return
        group, tracked = self._chunk_holders("update_" if is_first_call else "from_model"), self._pipeline.now.tracked
        parts = group.from_all(self._watch.sample(model, tracked))
        own = {number: value for part in parts if part is not None for number, value in part.items()}
        if self._seen is not None and self._is_near(own):
            return
        wants, log_it = self.settings.sigma_rels, group.leads and self._writer is not False
        # One that only counts must not see what the writer sets aside meanwhile.
        stored = self._stored if self._writer is False else find_snapshots(self.checkpoint_dir)
        place = group.from_first(lambda: None if None in parts else state.find_place(stored, wants, own))
        if place is None:
            if is_first_call and log_it:
                unknown = (
                    "%s: whether the model is on the run's path cannot be checked: its snapshots hold no sample of it"
                )
                log.warning(unknown, self.checkpoint_dir)
            return
        found, newest = place
        if self._step_is_given:
            if log_it and found.step != self._from_step:
                where = (
                    "not on the run's path"
                    if found.step is None
                    else f"those of step {found.step:,}, or a little later"
                )
                text = "%s: the averages go on from step %d, as asked; the model's weights are %s"
                log.warning(text, self.checkpoint_dir, self._from_step, where)
            return
        if found.step is None:
            error = state.off_path(self.checkpoint_dir, found, newest)
            if is_first_call:
                raise error
            if log_it:
                log.info("%s", error)
            return
        step = None if found.step == newest else found.step
        if step is not None or self._from_step is not None:
            until = state.snapshots_until(stored, wants, step)
            progress = state.resumed_tracking(self.checkpoint_dir, until, wants).progress
            self._pipeline.set(replace(self._pipeline.now, progress=progress))
        self._from_step, self._seen = step, (own, found.reach)
        if log_it:
            log.log(
                logging.INFO if step is None else logging.WARNING,
                "%s: continuing at step %d, where the model's weights are%s", self.checkpoint_dir, found.step,
                "" if step is None else f"; later snapshots, up to step {newest:,}, will be set aside",
            )  # fmt: skip

    def _is_near(self, sample: Mapping[int, float]) -> bool:
        """Whether the model is about where it was when this tracker was made: the first step may be a large one."""
        before, reach = self._seen or ({}, 0.0)
        moved = sum((value - before[number]) ** 2 for number, value in sample.items())
        return moved <= (3 * reach) ** 2 * sum(value**2 for value in sample.values())

    def _become_writer(self) -> None:
        """At the first call: become the directory's writer and, in a resumed run, load its averages."""
        with self._pipeline.as_writer(self.checkpoint_dir, self.run_id) as snapshotter:
            now = self._pipeline.now
            if not now.resumes:
                return
            found = self._stored_state()
            progress = found.progress
            snapshotter.set_aside_others(progress.t, known=found.snapshots)
            if progress.step != now.progress.step:
                log.warning(
                    "%s: the run has gone on since from_path looked, from step %d to %d; the averages go on from "
                    "there, and the model should be of then, too",
                    self.checkpoint_dir, now.progress.step, progress.step,
                )  # fmt: skip
            self._resumed_at = progress.step
            self._pipeline.set(found)

    def _is_writer(self, model: torch.nn.Module | None) -> bool:
        """Whether this process keeps averages: decided for good when the tracker is made, or once there is a group."""
        if self._writer is None and self._pipeline.snapshotter is None:
            self._writer = choose_writer(None, model)
        keeps = self._writer is not False
        if self._callers is None and model is not None and is_in_group():
            self._callers = Callers.of_replicas(self.checkpoint_dir, keeps)
        return keeps

    def _run_callbacks(self) -> None:
        """Call the callbacks if snapshots have become durable."""
        written = self._pipeline.written
        if written != self._reported:
            self._reported = written
            for callback in self._callbacks:
                callback(self)

    def _take_error(self) -> Exception | None:
        """The error to be raised by this call or the next one."""
        return self._pending or self._pipeline.take_error()

    def _raise_pending(self) -> None:
        failure, self._pending = self._pending, None
        if failure is not None:
            raise failure

    # --- state ---

    def _state(self, call: str) -> tuple[Group, Tracking, StateInfo]:
        """Who makes a call for it, and what a tracker would continue from; its tensors are copies of this process's."""
        group = self._chunk_holders(call)
        own = group.together(self._own_state)
        times, inherited = zip(*group.from_all(((self.step, self.t), own.averages.standing.inherited)), strict=True)
        check_times(times)
        # Each process knows the rounding of its own part, and part of them have no average.
        total = tuple(map(sum, zip(*inherited, strict=True)))
        info = group.from_first(lambda: state.state_info(self._with_snapshots(own), self.settings))
        return group, own, replace(info, inherited=total)

    def _own_state(self) -> Tracking:
        self.flush()
        if self._pipeline.now.resumes:
            return self._stored_state()
        reading = self._pipeline.read(exact=True)
        self._pipeline.flush()  # the snapshots of that time are on disk now
        return reading

    def _with_snapshots(self, reading: Tracking) -> Tracking:
        snapshotter = self._pipeline.snapshotter
        return reading if snapshotter is None else replace(reading, snapshots=snapshotter.checksums)

    def _stored_state(self) -> Tracking:
        """The state in the directory to go on from."""
        now = self._pipeline.now
        if self._from_step == 0:
            return replace(now, progress=Progress(), resumes=False)
        return state.load_from_directory(self.checkpoint_dir, self.settings, now.tracked, self._from_step)

    def _load(self, opened: AbstractContextManager[Mapping[str, Any]]) -> None:
        """Continue from a state; of several processes all do, or none."""
        group = self._chunk_holders("load_state_dict(...)")
        with self._calls.lock("load_state_dict"):
            self._calls.caller = threading.get_ident()
            loaded = group.together(lambda: self._unpacked(opened))
            norms = _norms(group, loaded)
            group.together(lambda: self._begin_from(loaded, norms))
            self._pipeline.set(loaded)

    def _unpacked(self, opened: AbstractContextManager[Mapping[str, Any]]) -> Tracking:
        self.flush()
        with opened as stored:
            loaded = state.unpack_state(stored, self.settings, self._pipeline.now.tracked)
        if self.keeps_averages:
            return loaded
        return replace(loaded, averages=RunningAverages.none_yet(self.settings.sigma_rels))

    def _begin_from(self, loaded: Tracking, norms: Callable[[], Mapping[float, float]]) -> None:
        """Become the directory's writer, and set aside what is not of the state's training."""
        if self.keeps_averages:
            with self._pipeline.as_writer(self.checkpoint_dir, loaded.run_id) as snapshotter:
                snapshotter.read_again()
                known = loaded.snapshots | snapshotter.holding(loaded.averages, norms)
                snapshotter.set_aside_others(loaded.progress.t, known)

    # --- averages ---

    def _evaluation(self, model: torch.nn.Module | None, alone: bool, call: str) -> Evaluation:
        """What the averages are now, for one call, and who makes it."""
        group = self._gathered(model, alone, call)
        return Evaluation(
            self.checkpoint_dir, self.settings, self._pipeline, self.flush, self.keeps_averages, self._from_step, group
        )

    def _gathered(self, model: torch.nn.Module | None, alone: bool, call: str) -> Group:
        """The processes that make an evaluation together, all of which call; or this one alone."""
        if self._members is not None:
            if alone:
                raise InvalidValueError("alone", "each process keeps a part of the averages only", value=True)
            return self._chunk_holders(call)
        if alone or self._callers is None or self._pipeline.now.resumes or not torch.distributed.is_initialized():
            return THIS_PROCESS  # before tracking goes on, each process reads what is on disk
        own = model if self._model is None else self._model() or model
        tensor = None if own is None else next(own.parameters(), None)
        return self._callers.gather(HOST if tensor is None else tensor.device, call)

    def _chunk_holders(self, call: str) -> Group:
        """The processes that keep parts of the averages, all of which call; this one alone where it keeps all."""
        if self._members is None:
            return THIS_PROCESS
        if not torch.distributed.is_initialized():
            reason = "need all processes of the model, and their group was destroyed"
            raise NotReadyError("averages of which each process keeps a part", reason, _FROM_SNAPSHOTS)
        return self._members.callers.gather(self._members.device, call)

    def _model_of_chunks(self) -> torch.nn.Module | None:
        """The model, if it is still there; of a sharded one it must be."""
        model = None if self._model is None else self._model()
        if self._members is not None and model is None:
            raise NotReadyError("state_dict", "the model, whose parameters say where each chunk is, is gone")
        return model


def _norms(group: Group, state: Tracking) -> Callable[[], Mapping[float, float]]:
    """Gives the squared norms of averages; of several processes these add theirs now."""
    if group.is_alone:
        return partial(squared_norms, state)
    every = group.from_all(squared_norms(state))
    total = {sigma_rel: sum(one.get(sigma_rel, 0.0) for one in every) for sigma_rel in state.averages.sigma_rels}
    return lambda: total


def _joined(
    tracking: Tracking,
    model: torch.nn.Module,
    found: ModelTensors,
    settings: Settings,
    directory: Path,
    writer: bool | None,
) -> Tracking:
    """The same for what this process keeps, when the processes have met, if each keeps a part; else itself."""
    if not found.chunks:
        return tracking
    for name, value, wanted, hint in (
        ("writer", writer, None, "every process keeps and writes what it owns"),
        ("keep_state", settings.keep_state, False, "save the exact averages with ema.state_dict() or ema.save_state()"),
    ):
        if value != wanted:
            reason = f"must be {wanted!r} where each process keeps a part of the averages"
            raise InvalidValueError(name, reason, hint, value=f"{value!r}")
    if tracking.resumes:
        tracking.tracked.check(TrackedModel.of_model(found))
    values = vars(settings) | vars(settings.schedule) | vars(settings.selection)
    options = {name: str(value) for name, value in values.items() if name not in ("schedule", "selection")}
    started = f"run {tracking.run_id[:8]} at step {tracking.progress.step}" if tracking.resumes else "nothing"
    options |= {"checkpoint_dir": str(directory), "to go on from": started}
    tensors = found.averaged | found.copied
    members = meet(tensors, found.chunks, options, tracking.run_id, mesh_of(model))
    everywhere = TrackedModel.of_model(found).complete_shapes
    own = replace(TrackedModel.of_model(found.of(members), members), everywhere=everywhere)
    return replace(tracking, run_id=members.run_id, tracked=own)
