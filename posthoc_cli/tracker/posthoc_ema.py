"""`PostHocEMA`: the hook that a training loop calls, and the averages that it gives at any time."""

from __future__ import annotations

import logging
import secrets
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from posthoc_cli.run import Run, Wanted, Weights, as_targets
from posthoc_cli.snapshots.directory import find_snapshots, read_directory
from posthoc_cli.snapshots.format import joined_paths
from posthoc_cli.snapshots.measurements import source_prior
from posthoc_cli.snapshots.path import Found
from posthoc_cli.snapshots.selection import Selection, check_globs, make_selection
from posthoc_cli.snapshots.sources import Snapshot, Source, chosen_up_to
from posthoc_cli.snapshots.states import StateInfo
from posthoc_cli.synthesis.engine import check_device
from posthoc_cli.tracker import state
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.evaluation import Evaluation, Query, as_dtensors, gathered, plan_possible
from posthoc_cli.tracker.layout import HOST
from posthoc_cli.tracker.model_tensors import (
    ModelTensors,
    ModelWatch,
    TrackedModel,
    check_complete,
    check_model,
    collect_tensors,
    is_swapped,
    nonfinite_error,
    nonfinite_name,
)
from posthoc_cli.tracker.model_weights import (
    Block,
    copied_weights,
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
    check_place,
    check_sigma_rels,
    is_first_of_group,
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
from posthoc_cli.tracker.snapshotter import run_snapshots
from posthoc_cli.tracker.staging import squared_norms
from posthoc_cli.tracker.state import Tracking
from posthoc_cli.tracker.worker import Calls

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Module = TypeVar("Module", bound=torch.nn.Module)
Dtype = torch.dtype | str | None

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
        device: str | None, step: int | None, stored: Sequence[Snapshot], knows_selection: bool = True,
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
        self._writer = is_first_of_group(model) if members is None else members.part is not None
        self._callers = None if members is None else members.callers
        self._from_step, self._resumed_at = step, -1
        self._step_is_given, self._stored = step is not None, stored
        self._seen: tuple[Mapping[int, float], float] | None = None
        self._pending: Exception | None = None
        self._callbacks: list[Callable[[PostHocEMA], None]] = []
        self._reported = 0
        self._warned_of_raw = self._warned_of_statistics = False
        self._warned_of_targets: frozenset[str] = frozenset()
        self._calls = Calls(directory)
        self._is_writer(model)
        if model is not None and tracking.resumes and not self._step_is_given:
            self._choose_start(model, is_first_call=False)

    @classmethod
    def from_model(
        cls, model: torch.nn.Module, checkpoint_dir: str | Path, sigma_rels: Sequence[float] = (0.05, 0.28),
        update_every: int = 10, checkpoint_every: int = 1000, update_after_step: int = 0,
        max_checkpoints: int | None = 20, checkpoint_dtype: Dtype = torch.float16, t_unit: str = "steps",
        on_nonfinite: str = "raise", include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None, buffers: str = "statistics",
        device: str | None = None, keep_state: bool = False, resume: str | int | None = None,
    ) -> PostHocEMA:  # fmt: skip
        """A tracker for a new run, or with `resume` of one that goes on. Nothing is written before the first `update_`.

        Of two profiles of float32 or bfloat16 parameters it holds 16 bytes a parameter, 4 more from the first float16
        snapshots on, and with averages on the host the model once more; `metrics()["bytes"]` tells what it holds. In a
        group of processes that train one model the first one of its DistributedDataParallel, or of all processes where
        it is not wrapped, keeps the averages and writes; the others only count. Of a model that is sharded over
        processes each keeps and writes its part.

        Arguments:
            model: to be tracked, wrapped or bare: names are those of the bare model.
            checkpoint_dir: the directory for the snapshots, made when it is missing. One run a directory.
            sigma_rels: profiles to track; two reach almost everything between them, see `ema error-plot`.
            update_every, update_after_step: averages are updated at multiples of the first, after the second.
            checkpoint_every: snapshots are due at multiples of it; a multiple of update_every.
            max_checkpoints: snapshots to keep of each profile: those that reconstruction needs most for the lengths
                between the tracked ones. None keeps all.
            checkpoint_dtype: that averages are stored in, float32 where values do not fit; None for each parameter's.
            t_unit: the unit of `t`, if you pass a clock of your own to `update_`.
            on_nonfinite: where a parameter holds nan or infinity, "raise" an error, or "skip" the update and warn.
            include: globs on names, such as "decoder.*": only matching tensors are tracked, those that require no
                gradients, too. None: all but parameters that require no gradients.
            exclude: globs on names of tensors to be left out.
            buffers: "statistics" to average BatchNorm's running statistics and copy others; "copy" all of them, so that
                every average holds the newest copy at its time; or "average" floating-point ones as parameters are.
            device: "model" for averages beside the parameters, updated by the training's own thread; "cpu" for averages
                on the host, updated by a thread of their own, with the same bits; None for "cpu" where a parameter is
                on an accelerator, else "model".
            keep_state: keep the exact averages beside the snapshots, in `state.safetensors`: `from_path` and `resume`
                then go on without rounding. 4 bytes an element and 6 for each profile (float64: 8 and 8), also on disk.
            resume: "auto" to go on where the directory holds a run of this model: from the newest snapshots at or
                before the place of the model's weights on the run's path. Restore its checkpoint before; a model that
                is not on the path by the first `update_`, or `load_state_dict`, is an error there. A number to go on
                from the snapshots of that call of `update_`, whatever the weights. None for a new run only.

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
            DirectoryError, MismatchError: nobody can write to the directory, or it holds a run and `resume` is None.
            others: of a run that is to go on, as `from_path`.
        """
        profiles = check_sigma_rels(sigma_rels)
        given = (update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype)
        selection = make_selection(include, exclude, buffers)
        settings = Settings(profiles, make_schedule(profiles, *given), t_unit, selection, on_nonfinite, keep_state)
        check_globs(selection, [tensor.name for tensor in named_tensors(check_model(model))])
        directory = check_path("checkpoint_dir", checkpoint_dir)
        wait_for_writers(directory, last_too=resume is not None)
        stored = [] if resume is None else state.stored_to_resume(directory, resume)
        if stored:
            settings = replace(settings, selection=selection.going_on(stored[-1].info.roles))
        found = collect_tensors(model, settings.selection)
        if found.chunks or is_first_of_group(model) is not False:
            check_place(directory)
            if resume is None:
                state.check_no_run(directory)
        tracked = TrackedModel.of_model(found)
        tracked.check_header()
        start = None if resume is None else state.find_run(directory, stored, settings, tracked, resume)
        tracking, step = start or (Tracking.new(secrets.token_hex(16), tracked, profiles), None)
        tracking = _joined(tracking, model, found, settings, directory)
        made = cls.__new__(cls)
        made._begin(directory, settings, tracking, model, device, step, stored)
        return made

    @classmethod
    def from_path(
        cls, checkpoint_dir: str | Path, model: torch.nn.Module | None = None, step: int | None = None,
        device: str | None = None,
    ) -> PostHocEMA:  # fmt: skip
        """The run in a directory, with its own settings: to synthesize from, and to go on tracking.

        Tracking goes on at the first `update_`, from the newest snapshots at or before the place of the model's weights
        on the run's path; weights that are not on it are an error then. It goes on from the snapshots' values, rounded
        to their storage dtype (float16: 2e-4 relative), unless `keep_state` has left an exact state of their time. To
        go on exactly without one, `load_state_dict`; with other settings, `from_model(..., resume=...)`. Due snapshots
        of other trackers of this process are waited for.

        Arguments:
            checkpoint_dir: a directory with snapshots.
            model: the model to go on with, or to be filled; its tensors are checked against the snapshots here and now.
            step: go on from the snapshots of this call of `update_`, whatever the model's weights; later ones are set
                aside in the folder `superseded` when tracking begins.
            device: as in `from_model`.

        Raises:
            DirectoryError, FileFormatError, MismatchError, ModelMismatchError: of the directory, and of the model.
            InvalidValueError: an argument, or a `step` without snapshots; names those that have some.
        """
        directory = check_path("checkpoint_dir", checkpoint_dir)
        wait_for_writers(directory)
        stored = read_directory(directory)
        profiles = stored[-1].info.sigma_rels
        snapshots = state.snapshots_until(stored, profiles, step)
        newest, kept = snapshots[-1].info, state.read_state_info(directory)
        selection = (newest.selection or Selection()).going_on(newest.roles)
        keeps_state = kept is not None and kept.run_id == newest.run_id
        settings = Settings(profiles, newest.schedule, newest.t_unit, selection, keep_state=keeps_state)
        tracking = state.resumed_tracking(directory, snapshots, profiles)
        if model is not None:
            known = frozenset(tracking.tracked.tensors | tracking.tracked.aliases)
            found = collect_tensors(model, selection, known)  # it may be frozen, to be filled only
            tracking = _joined(tracking, model, found, settings, directory)
        made = cls.__new__(cls)
        made._begin(directory, settings, tracking, model, device, step, stored, newest.selection is not None)
        return made

    def __repr__(self) -> str:
        profiles = ", ".join(f"{sigma_rel:g}" for sigma_rel in self.settings.sigma_rels)
        closed = ", closed" * self.closed
        return f"PostHocEMA({str(self.checkpoint_dir)!r}, step {self.step:,}, sigma_rels {profiles}{closed})"

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
    def has_average(self) -> bool:
        """Whether an update was due by now. Before, calls for averages give the weights as they are, and warn."""
        return self._pipeline.now.resumes or self._pipeline.progress.updated > 0

    def tracks(self, model: torch.nn.Module) -> bool:
        """Whether this tracker has taken in a model, wrapped or bare, so that it holds the raw weights of now."""
        own = None if self._model is None or self._pipeline.now.resumes or not self.step else self._model()
        return own is not None and [*map(id, own.parameters())] == [*map(id, check_model(model).parameters())]

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

    def metrics(self, sigma_rels: Wanted | Sequence[Wanted] = ()) -> dict[str, float]:
        """Figures for a logger, at almost no cost: nothing is computed from tensors, and nothing is waited for.

        Arguments:
            sigma_rels: lengths or other targets, or one, whose predicted errors are wanted; headers of the snapshots on
                disk are read.

        Returns:
            `step` and `t`; `bytes`, the memory that the tracker holds, on the host and on accelerators. When snapshots
            were written, of the last ones: `distance_0.05`, ..., how far each tracked average was from the weights,
            relative to its norm; `snapshot_bytes`; `snapshot_seconds`, which writing took beside the training;
            `snapshot_waited`, the seconds that the training waited before it. And
            `predicted_error_0.15`, ...: the expected relative error of each wanted length at the newest snapshot, of
            those that the run is long enough for.
        """
        wanted = {target.label: target for target in as_targets(sigma_rels)}
        found = {"step": float(self.step), "t": self.t, **self._pipeline.figures()}
        snapshots = run_snapshots(self.checkpoint_dir, self.run_id) if wanted else []
        if snapshots:
            plan, _ = plan_possible(snapshots, wanted)
            errors = (
                [] if plan is None else [(one.label, plan.predicted_error(i)) for i, one in enumerate(plan.targets)]
            )
            found |= {f"predicted_error_{label}": error for label, error in errors if error is not None}
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

        If averages were updated since the newest snapshot, a last one is written, as by `snapshot`. The end of a `with`
        block or of the process does the same.
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
        if error is not None and writes:
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
            "save its state, ema.state_dict(), within a checkpoint; to copy or save a module that holds it, keep the "
            "tracker outside of the module",
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
            made = self._raw(evaluation, model, dtype, 3) or evaluation.weights(model, query)
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
            self._load(state)
        else:  # the writer has other averages from here on than those on disk
            progress = replace(self._pipeline.now.progress, updated=max(1, self.step))
            self._pipeline.set(replace(self._pipeline.now, progress=progress, resumes=False))

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
        weights = self._raw(evaluation, model, dtype, 5) or evaluation.weights(model, query)
        evaluation.check(model, weights, own_dtypes)
        with swapped_in(model, weights, own_dtypes):
            yield model
            self._warn_of_statistics(model, weights)

    def models(self, model: Module, sigma_rels: Wanted | Sequence[Wanted]) -> dict[str, Block[Module]]:
        """For each of several lengths a block as `model` gives one, all from one pass over the snapshots.

        That pass is made now. Its results wait in a file without a name beside the snapshots, of the model's size for
        each length; memory is needed as for one. A sharded model takes a pass when each block begins. In a group of
        processes all make the call, and enter the blocks in their order.

        Arguments:
            sigma_rels: lengths, or other targets as in `state_dict`, or their text forms, such as "decay:linear:20%".

        Returns:
            The blocks by the targets' labels, such as "0.15" and "decay-linear-20%". Targets that the run is too short
            for, such as a window of more steps, are left out, with a warning.

        Raises:
            InvalidValueError, NotReadyError, WriteError, RankError: an argument, no room on disk, and as `model`.
        """
        wanted = {target.label: target for target in as_targets(sigma_rels)}
        evaluation = self._evaluation(model, False, f"models({', '.join(wanted)})")
        raw = self._raw(evaluation, model, None, 3)
        if raw is not None:
            made: dict[str, Callable[[], Weights]] = dict.fromkeys(wanted, lambda: raw)
        else:
            made, refused = evaluation.each(model, wanted)
            for label in refused.keys() - self._warned_of_targets if self.keeps_averages else ():
                log.warning("%s; there is no average of it at step %d", refused[label], self.step)
            self._warned_of_targets |= refused.keys()
        return {label: Block("model", partial(self._filled, model, evaluation, make)) for label, make in made.items()}

    @contextmanager
    def _filled(self, model: Module, evaluation: Evaluation, make: Callable[[], Weights]) -> Iterator[Module]:
        weights = make()
        evaluation.check(model, weights)
        with swapped_in(model, weights):
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
        weights = self._raw(evaluation, model, None, 5) or evaluation.live_weights(model, index)
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
        if evaluation.group.is_alone and self._members is None and self.has_average:
            evaluation.planned(query, lambda plan: fill_model(model, plan, device))
            return
        weights = self._raw(evaluation, model, dtype, 3) or evaluation.weights(model, query)
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
            profiles = [source.profile for source in chosen]
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
        if self._pipeline.now.resumes:
            self._choose_start(model, is_first_call=True)
        if not self._is_writer(model):
            self._only_count(model, t)
            return
        if self._pipeline.snapshotter is None or self._pipeline.now.resumes:
            self._become_writer()
        progress = self._after_waiting(t)
        if self.settings.update_is_due(progress.step):
            self._take_in(model, progress)
        else:
            self._pipeline.count(progress)

    def _only_count(self, model: torch.nn.Module, t: float | None) -> None:
        """One call in a process that keeps no averages."""
        progress = self._after(t)
        if self._members is None:
            if self.settings.update_is_due(progress.step):
                check_complete(model)
        elif self._pipeline.now.resumes or not self.step:  # the first call
            self._members.wait_for_writer()
        self._refused_anywhere(None, progress)
        self._pipeline.count(progress)

    def _after_waiting(self, t: float | None) -> Progress:
        """The progress after one more call, when the pipeline can take what is due then.

        Nothing is counted before: a wait for a slow disk can be interrupted, with nothing done.
        """
        progress, settings = self._after(t), self.settings
        writes_too = settings.snapshot_is_due(progress.step)
        if writes_too or settings.update_is_due(progress.step):
            self._pipeline.wait_for_turn(writes_too)
            self._pending = self._take_error()
            progress = self._after(t)  # the last update may have been interrupted after it was handed over
        return progress

    def _take_in(self, model: torch.nn.Module, progress: Progress) -> None:
        """Hand the model's values over, or leave them out as `on_nonfinite` says."""
        tracked = self._pipeline.now.tracked
        try:
            tensors = self._watch.tensors(model, tracked)
            self._watch.check(tensors, tracked)
        except PostHocError:
            self._pipeline.leave_out(progress, writes=False)
            raise
        skipped = self._refused_anywhere(tensors, progress)
        if skipped is None:
            skipped = self._pipeline.update(tensors, progress)
            self._pipeline.warn_of_waiting(stacklevel=4)
        else:
            self._pipeline.leave_out(progress)
        if skipped is not None:
            self.settings.skip_update(skipped, stacklevel=4)

    def _refused_anywhere(self, tensors: ModelTensors | None, progress: Progress) -> NonFiniteError | None:
        """Why all processes of a sharded model leave an update out; None if they do not, or each raises an error."""
        if self._members is None or self.settings.on_nonfinite == "raise":
            return None
        if not self.settings.update_is_due(progress.step):
            return None
        name = None if tensors is None else nonfinite_name(tensors.averaged)
        if not self._members.any(name is not None):
            return None
        return nonfinite_error(name, self._pipeline.now.tracked.tensors, progress.step)

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
        group = self._chunk_holders("update_" if is_first_call else "this tracker")
        own = None if self._from_step == 0 else self._sample_of(model, group)
        if self._from_step == 0 or (own is not None and self._is_near(own)):
            return
        logs = group.leads and self._writer is not False
        # One that only counts must not see what the writer sets aside meanwhile.
        stored = self._stored if self._writer is False else find_snapshots(self.checkpoint_dir)
        place = group.from_first(lambda: state.find_place(stored, self.settings.sigma_rels, own or {}))
        if place is None or own is None:
            if is_first_call and logs:
                log.warning(
                    "%s: whether the model is on the run's path cannot be checked: its snapshots hold no sample of it",
                    self.checkpoint_dir,
                )
        elif self._step_is_given:
            if logs:
                self._say_where(place[0])
        elif place[0].step is not None:
            self._start_at(place[0], place[1], stored, logs)
            self._seen = own, place[0].reach
        else:
            error = state.off_path(self.checkpoint_dir, *place)
            if is_first_call:
                raise error
            if logs:
                log.info("%s", error)

    def _sample_of(self, model: torch.nn.Module, group: Group) -> Mapping[int, float] | None:
        """The model's values at the elements that snapshots sample; None where one is not as it was tracked."""
        parts = group.from_all(self._watch.sample(model, self._pipeline.now.tracked))
        known = [part for part in parts if part is not None]
        return {number: value for part in known for number, value in part.items()} if len(known) == len(parts) else None

    def _say_where(self, found: Found) -> None:
        """Warn that the model is elsewhere than where the run goes on from, as was asked."""
        if found.step != self._from_step:
            where = f"those of step {found.step:,}, or a little later" if found.step else "not on the run's path"
            text = "%s: the averages go on from step %d, as asked; the model's weights are %s"
            log.warning(text, self.checkpoint_dir, self._from_step, where)

    def _start_at(self, found: Found, newest: int, stored: Sequence[Snapshot], logs: bool) -> None:
        """Go on from a place on the path."""
        step = None if found.step == newest else found.step
        if step is not None or self._from_step is not None:
            until = state.snapshots_until(stored, self.settings.sigma_rels, step)
            progress = state.resumed_tracking(self.checkpoint_dir, until, self.settings.sigma_rels).progress
            self._pipeline.set(replace(self._pipeline.now, progress=progress))
        self._from_step = step
        if logs:
            log.log(
                logging.INFO if step is None else logging.WARNING,
                "%s: continuing at step %d, where the model's weights are%s", self.checkpoint_dir, found.step,
                "" if step is None else f"; later snapshots, up to step {newest:,}, will be set aside",
            )  # fmt: skip

    def _is_near(self, sample: Mapping[int, float]) -> bool:
        """Whether the model is about where it was when this tracker was made: the first step may be a large one."""
        if self._seen is None:
            return False
        before, reach = self._seen
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
            self._writer = is_first_of_group(model)
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
        told = (self.step, self.t), own.averages.standing.inherited, state.sketch_of(own.averages)
        times, inherited, sketches = zip(*group.from_all(told), strict=True)
        check_times(times)
        # Each process knows the rounding and the path of its own part, and some of them have no average.
        total, sketch = tuple(map(sum, zip(*inherited, strict=True))), joined_paths([*filter(None, sketches)])
        info = group.from_first(lambda: state.state_info(self._with_snapshots(own), self.settings))
        return group, own, replace(info, inherited=total, sketch=sketch)

    def _own_state(self) -> Tracking:
        self.flush()
        if self._pipeline.now.resumes:
            return self._stored_state()
        reading = self._pipeline.read_exactly()
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

    def _load(self, stored: Mapping[str, Any]) -> None:
        """Continue from a state; of several processes all do, or none."""
        group = self._chunk_holders("load_state_dict(...)")
        with self._calls.lock("load_state_dict"):
            self._calls.caller = threading.get_ident()
            loaded = group.together(lambda: self._unpacked(stored))
            norms = _norms(group, loaded)
            group.together(lambda: self._begin_from(loaded, norms))
            self._pipeline.set(loaded)

    def _unpacked(self, stored: Mapping[str, Any]) -> Tracking:
        self.flush()
        loaded = state.unpack_state(stored, self.settings, self._pipeline.now.tracked)
        if self.keeps_averages:
            return loaded
        return replace(loaded, averages=RunningAverages.none_yet(self.settings.sigma_rels))

    def _begin_from(self, loaded: Tracking, norms: Mapping[float, float]) -> None:
        """Become the directory's writer, and set aside what is not of the state's training."""
        if self.keeps_averages:
            with self._pipeline.as_writer(self.checkpoint_dir, loaded.run_id) as snapshotter:
                snapshotter.read_again()
                known = loaded.snapshots | snapshotter.holding(loaded.averages, norms)
                snapshotter.set_aside_others(loaded.progress.t, known)

    # --- averages ---

    def _raw(
        self, evaluation: Evaluation, model: torch.nn.Module | None, dtype: Dtype, stacklevel: int
    ) -> Weights | None:
        """Before the first update: the weights as they are, of the tracked model or this one, with a warning."""
        if evaluation.group.from_first(lambda: self.has_average):
            return None
        own = (None if self._model is None else self._model()) or model
        if own is None:
            raise NotReadyError("no average yet", "the model that is tracked is gone")
        schedule = self.settings.schedule
        every, after = schedule.update_every, schedule.update_after_step
        if not self._warned_of_raw:
            self._warned_of_raw = True
            warnings.warn(
                "posthoc_cli: no average yet, but the weights as they are: the first update is at call "
                f"{(after // every + 1) * every:,} of update_ (update_every={every}, update_after_step={after})",
                RuntimeWarning,
                stacklevel,
            )
        return copied_weights(collect_tensors(own, self.settings.selection), dtype)

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


def _norms(group: Group, state: Tracking) -> dict[float, float]:
    """The squared norms of averages by sigma_rel, of which processes add theirs."""
    averages = state.averages
    every = group.from_all({} if averages.tensors is None else squared_norms(averages, state.tracked.weights))
    return {sigma_rel: sum(own.get(sigma_rel, 0.0) for own in every) for sigma_rel in averages.sigma_rels}


def _joined(
    tracking: Tracking, model: torch.nn.Module, found: ModelTensors, settings: Settings, directory: Path
) -> Tracking:
    """The same for what this process keeps, when the processes have met, if each keeps a part; else itself."""
    if not found.chunks:
        return tracking
    if settings.keep_state:
        reason = "must be False where each process keeps a part of the averages"
        raise InvalidValueError("keep_state", reason, "save the exact averages with ema.state_dict()", value=True)
    if tracking.resumes:
        tracking.tracked.check(TrackedModel.of_model(found))
    values = vars(settings) | vars(settings.schedule) | vars(settings.selection)
    left_out = ("schedule", "selection", "only_trainable")  # the last one says whether there is an `include`
    options = {name: str(value) for name, value in values.items() if name not in left_out}
    started = f"run {tracking.run_id[:8]} at step {tracking.progress.step}" if tracking.resumes else "nothing"
    options |= {"checkpoint_dir": str(directory), "to go on from": started}
    tensors = found.averaged | found.copied
    members = meet(tensors, found.chunks, options, tracking.run_id, mesh_of(model))
    everywhere = TrackedModel.of_model(found).complete_shapes
    own = replace(TrackedModel.of_model(found.of(members), members), everywhere=everywhere)
    return replace(tracking, run_id=members.run_id, tracked=own)
