"""`PostHocEMA`: the hook that a training loop calls, and the averages that it gives at any time."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch

from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning import Candidate, Schedule, error_curve
from posthoc_cli.reconstruction import ROUNDING
from posthoc_cli.run import Run, Wanted, Weights, as_targets
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.selection import Selection, check_globs, make_selection
from posthoc_cli.snapshots.sources import Source, chosen_up_to, source_prior
from posthoc_cli.tracker import going_on
from posthoc_cli.tracker.evaluation import ChunkEvaluation, Evaluation, Query, as_dtensors, plan_possible
from posthoc_cli.tracker.going_on import Start
from posthoc_cli.tracker.layout import HOST
from posthoc_cli.tracker.model_tensors import ModelTensors, TrackedModel, check_model, collect_tensors, named_tensors
from posthoc_cli.tracker.model_weights import (
    WithStatement,
    swapped_in,
    update_bn,
    warn_of_statistics,
)
from posthoc_cli.tracker.pipeline import is_followed, wait_for_writers
from posthoc_cli.tracker.sharding import Group, Owners, is_first_of_group, mesh_of
from posthoc_cli.tracker.snapshotter import run_snapshots
from posthoc_cli.tracker.state import Settings, Tracking
from posthoc_cli.tracker.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Module = TypeVar("Module", bound=torch.nn.Module)
Dtype = torch.dtype | str | None

log = logging.getLogger(__name__)


class PostHocEMA(Tracker):
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
        snapshots on, and with averages on the host the model once more, see `metrics`. Of replicas in several processes
        the first one, of the model's DistributedDataParallel or of all, keeps the averages and writes; the others only
        count. Of a model that is sharded over processes each keeps and writes its part.

        Arguments:
            model: to be tracked, wrapped or bare: names are those of the bare model.
            checkpoint_dir: the directory for the snapshots, made when it is missing; or a URL, s3://, gs:// or az://,
                see `ema guide remote`. One run a directory.
            sigma_rels: profiles to track; two reach almost everything between them, see `ema error-plot`.
            update_every, update_after_step: averages are updated at multiples of the first, after the second.
            checkpoint_every: snapshots are due at multiples of it; a multiple of update_every.
            max_checkpoints: snapshots to keep of each profile: those that reconstruction needs most for the lengths
                between the tracked ones. None keeps all.
            checkpoint_dtype: that averages are stored in, float32 where values do not fit; None for each parameter's.
            t_unit: the unit of `t`, if you pass a clock of your own to `update_`.
            on_nonfinite: where a parameter holds nan or infinity, "raise" an error, or "skip" the update and warn. Both
                leave averages as they are, but for some last digits of the mean of the last updates.
            include: globs on names, such as "decoder.*": only matching tensors are tracked, those that require no
                gradients, too. None: all but parameters that require no gradients.
            exclude: globs on names of tensors to be left out.
            buffers: "statistics" to average BatchNorm's running statistics and copy others, as they are at the time of
                the average; "copy" all of them; or "average" floating-point ones as parameters are.
            device: "model" for averages beside the parameters, updated by the training's own thread; "cpu" for averages
                on the host, updated by a thread of their own, with the same bits; None for "cpu" where a parameter is
                on an accelerator.
            keep_state: keep the exact averages beside the snapshots, in `state.safetensors`: `from_path` and `resume`
                then go on without rounding. 4 bytes an element and 6 for each profile (float64: 8 and 8), also on disk.
            resume: "auto" to go on where the directory holds a run of this model: from the newest snapshots at or
                before the place of the model's weights on the run's path. Restore its checkpoint before; a model that
                is not on the path by the first `update_`, or `load_state_dict`, is an error there. A number to go on
                from the snapshots of that call of `update_`, whatever the weights. None for a new run; "auto" where a
                tracker of this process writes averages of this very model there, as when a notebook's cell runs again.

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
            DirectoryError, MismatchError: nobody can write to the directory, or it holds a run and `resume` is None.
            others: of a run that is to go on, as `from_path`.
        """
        selection = make_selection(include, exclude, buffers)
        settings = Settings.checked(
            sigma_rels, update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype,
            t_unit, selection, on_nonfinite, keep_state,
        )  # fmt: skip
        check_globs(selection, [tensor.name for tensor in named_tensors(check_model(model))])
        directory = going_on.check_path(checkpoint_dir)
        in_group = is_first_of_group(model) is not None
        if resume is None and not in_group and is_followed(directory, collect_tensors(model, selection)):
            resume = "auto"  # a notebook's cell that is run again
        wait_for_writers(directory, last_too=True)
        going_on.finish_uploads(directory, model)
        stored = [] if resume is None else going_on.stored_to_resume(directory, resume)
        if stored:
            settings = replace(settings, selection=selection.going_on(stored[-1].info.roles))
        found = collect_tensors(model, settings.selection)
        if found.chunks or is_first_of_group(model) is not False:
            going_on.check_place(directory, is_new=resume is None)
        tracked = TrackedModel.of_model(found)
        tracked.check_header()
        start = None if resume is None else going_on.find_run(directory, stored, settings, tracked, resume)
        tracking, step = start or (Tracking.new(secrets.token_hex(16), tracked, settings.sigma_rels), None)
        tracking = _joined(tracking, model, found, settings, directory)
        made = cls.__new__(cls)
        made._begin(directory, settings, tracking, model, device, Start(directory, settings, step, stored))
        return made

    @classmethod
    def from_path(
        cls, checkpoint_dir: str | Path, model: torch.nn.Module | None = None, step: int | None = None,
        device: str | None = None,
    ) -> PostHocEMA:  # fmt: skip
        """The run in a directory, with its own settings: to synthesize from, and to go on tracking.

        Tracking goes on at the first `update_`, as with `resume="auto"` of `from_model`: from values rounded to the
        snapshots' dtype (float16: 2e-4 relative), unless `keep_state` has left an exact state of their time. To go on
        exactly without one, `load_state_dict`; with other settings, `from_model`. Due snapshots of other trackers of
        this process are waited for.

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
        directory = going_on.check_path(checkpoint_dir)
        wait_for_writers(directory)
        going_on.finish_uploads(directory, model)
        stored = read_directory(directory)
        profiles = stored[-1].info.sigma_rels
        snapshots = going_on.snapshots_until(stored, profiles, step)
        newest, kept = snapshots[-1].info, going_on.read_state_info(directory)
        selection = (newest.selection or Selection()).going_on(newest.roles)
        keeps_state = kept is not None and kept.run_id == newest.run_id
        settings = Settings(profiles, newest.schedule, newest.t_unit, selection, keep_state=keeps_state)
        tracking = going_on.resumed_tracking(directory, snapshots, profiles)
        if model is not None:
            found = collect_tensors(model, selection, tracking.tracked.known_names)  # it may be frozen, to be filled
            tracking = _joined(tracking, model, found, settings, directory)
        made = cls.__new__(cls)
        made._begin(directory, settings, tracking, model, device, Start(directory, settings, step, stored))
        return made

    @property
    def run(self) -> Run:
        """The snapshots of this run on disk. Snapshots that are still being written are waited for."""
        self.flush()
        return Run(self.checkpoint_dir)

    def metrics(self, sigma_rels: Wanted | Sequence[Wanted] = ()) -> dict[str, float]:
        """Figures for a logger, at almost no cost: nothing is computed from tensors, and nothing is waited for.

        Arguments:
            sigma_rels: lengths or other targets, or one, whose predicted errors are wanted; headers of the snapshots on
                disk are read.

        Returns:
            `step` and `t`; `bytes`, the memory that the tracker holds, on the host and on accelerators. Of the last
            snapshots: `distance_0.05`, ..., how far each tracked average was from the weights, relative to its norm;
            `snapshot_bytes`; `snapshot_seconds`, which writing took beside the training; `snapshot_waited`, the seconds
            that the training waited before it. `predicted_error_0.15`, ...: of each wanted length that the run is long
            enough for, the expected relative error at the newest snapshot.
        """
        wanted = {target.label: target for target in as_targets(sigma_rels)}
        found = {"step": float(self.step), "t": self.t, **self._pipeline.figures()}
        snapshots = run_snapshots(self.checkpoint_dir, self.run_id) if wanted else []
        plan, _ = plan_possible(snapshots, wanted) if snapshots else (None, {})
        for index, target in enumerate(() if plan is None else plan.targets):
            if plan is not None and (error := plan.predicted_error(index)) is not None:
                found[f"predicted_error_{target.label}"] = error
        return found

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

        That state goes with your training checkpoint; `load_state_dict` continues from it exactly. In processes that
        keep no averages it is empty. Of a model that is sharded over processes all of them make the call, and each gets
        what it owns, as DTensors in host memory: torch.distributed.checkpoint saves and loads them, also for another
        arrangement of processes.

        Arguments:
            sigma_rel: length of the average, in (0, 0.2887); or another target, such as `targets.Beta(0.9999)`, or its
                text form, "beta:0.9999"; or any object with `density` and `tail`.
            t, step: time of the average, or its number of calls; by default that of a live tracker, or the newest.
            dtype: dtype of the averages; None for each parameter's own.
            method: the solver, "minvar" or "paper"; None for the first.
            full: of a sharded model, complete tensors in rank 0, gathered one by one; nothing in the others.
            alone: see `model`.

        Returns:
            Copies of the tensors by name, on the CPU, with their `predicted_error`. Of a sharded model, whose processes
            all make the call, DTensors as its parameters are.

        Raises:
            InvalidValueError, NotReadyError, FileFormatError, MismatchError, RankError.
        """
        if sigma_rel is None:
            return self._own_state()
        model, query = self._chunked_model(), Query(sigma_rel, t, step, dtype, method)
        made = self._evaluation(model, alone, f"state_dict({query}{', full' * full})").weights(query)
        return made if model is None else as_dtensors(made, model, full)

    def model(
        self, model: Module, sigma_rel: Wanted, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None, alone: bool = False,
    ) -> WithStatement[Module]:  # fmt: skip
        """The model itself with averaged weights, in eval mode, for the `with` block.

        After the block weights, buffers, train or eval mode and device are as before, also on an error. The model's own
        weights are kept in host memory meanwhile. Blocks may be nested. Arguments as in `state_dict`, except that
        without `dtype` the weights take the dtypes that the model has. To keep averaged weights, save them within the
        block, or use `ema.state_dict(sigma_rel=...)`.

        In a group of processes all that have made a tracker of this directory make the call, between the same two calls
        of `update_`. Of a sharded model each fills the chunks that it holds; no complete tensor is made. An error of
        one is raised in all. With `alone=True` the writer of replicas makes the weights for itself.

        Raises:
            NotReadyError: no average exists yet.
            InvalidValueError, ModelMismatchError: an argument, a tensor on the meta device, or of another shape.
            RankError: another process failed, is at another step, or does not make the call within 300 s.
        """

        def make() -> tuple[Evaluation, Weights]:
            query = Query(sigma_rel, t, step, dtype, method)
            evaluation = self._evaluation(check_model(model), alone, f"model({query})")
            return evaluation, evaluation.weights(query)

        return WithStatement(partial(self._filled, model, make, own_dtypes=dtype is None))

    def models(self, model: Module, sigma_rels: Wanted | Sequence[Wanted]) -> dict[str, WithStatement[Module]]:
        """For each of several lengths a block as `model` gives one, all from one pass over the snapshots.

        That pass is made now. Its results wait in a file without a name beside the snapshots, of the model's size for
        each length; memory is needed as for one. In a group of processes all make the call, and enter the blocks in
        their order.

        Arguments:
            sigma_rels: lengths, or other targets as in `state_dict`, or their text forms, such as "decay:linear:20%".

        Returns:
            The blocks by the targets' labels, such as "0.15" and "decay-linear-20%". Targets that the run is too short
            for, such as a window of more steps, are left out, with a warning.

        Raises:
            InvalidValueError, NotReadyError, WriteError, RankError: an argument, no room on disk, and as `model`.
        """
        wanted = {target.label: target for target in as_targets(sigma_rels)}
        evaluation = self._evaluation(check_model(model), False, f"models({', '.join(wanted)})")
        made, refused = evaluation.each(wanted)
        for label in refused if self.keeps_averages else ():
            if self._is_first(label):
                log.warning("%s; there is no average of it at step %d", refused[label], self.step)

        def block(make: Callable[[], Weights]) -> WithStatement[Module]:
            return WithStatement(partial(self._filled, model, lambda: (evaluation, make())))

        return {label: block(make) for label, make in made.items()}

    def averaged(self, model: Module, tracked: float, alone: bool = False) -> WithStatement[Module]:
        """As `model`, with the live average of a tracked profile: it is exact, and no snapshot is read.

        Raises:
            InvalidValueError, ModelMismatchError: as in `model`; or `tracked` is no tracked profile.
            NotReadyError: there was no update yet, or none since `from_path`.
        """

        def make() -> tuple[Evaluation, Weights]:
            index = self.settings.tracked_index(tracked)
            call = f"averaged(tracked={self.settings.sigma_rels[index]:g})"
            evaluation = self._evaluation(check_model(model), alone, call)
            return evaluation, evaluation.live_weights(index)

        return WithStatement(partial(self._filled, model, make))

    @contextmanager
    def _filled(
        self, model: Module, make: Callable[[], tuple[Evaluation, Weights]], own_dtypes: bool = True
    ) -> Iterator[Module]:
        """The model with the weights that are made, and a warning, once, of running statistics that are copies."""
        evaluation, weights = make()
        evaluation.check(weights, own_dtypes)
        with swapped_in(model, weights, own_dtypes):
            yield model
            if "statistics" not in self._told:
                copies = self._pipeline.now.tracked.dtypes(copied=True)
                self._told |= {"statistics"} if warn_of_statistics(model, weights, copies) else set()

    def load_into(
        self, model: torch.nn.Module, sigma_rel: Wanted, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None, device: torch.device | str = "cpu", alone: bool = False,
    ) -> None:  # fmt: skip
        """Fill a model with averaged weights for good, on any device, also a model on `meta`.

        Memory for one tensor at a time is enough, in a group of processes for the weights that each gets. Everything is
        computed twice, first only to check that it can be: an error leaves the model as it was. Parameters stay the
        same objects, so that the optimizer keeps its state, and later updates average the new weights: between two
        training steps this is the switch of Switch EMA.

        Arguments:
            device: where tensors on `meta` that an average fills are created; a warning names those that stay there.
                Those of a sharded model are refused.
            alone: see `model`.

        Raises:
            ModelMismatchError, NonFiniteError, others: as in `model` and `state_dict`; nothing has changed.
        """
        query = Query(sigma_rel, t, step, dtype, method)
        self._evaluation(check_model(model), alone, f"load_into({query})").fill(query, device)

    update_bn = staticmethod(update_bn)

    def reconstruction_error(
        self, sigma_range: tuple[float, float] = (0.05, 0.28), method: str | None = None
    ) -> Figure:
        """A figure of the reconstruction error against sigma_rel: of the current averages, or before of the schedule.

        `sigma_range` is the lowest and highest sigma_rel, `method` the solver; None for the default one.
        """
        from posthoc_cli import plots

        candidate = self._evaluation_by(self._members.keepers("reconstruction_error()"), None).of_sources(
            self._candidate
        )
        curve = error_curve(candidate, sigma_range, method=method)
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

    def _evaluation(self, model: torch.nn.Module | None, alone: bool, call: str) -> Evaluation:
        """One call for averages, by all processes that keep parts of them or replicas, or by this one alone."""
        own = self._tracked_model(model)
        tensor = None if own is None else next(own.parameters(), None)
        device = HOST if tensor is None else tensor.device
        return self._evaluation_by(self._members.askers(call, alone, not self._pipeline.now.resumes, device), model)

    def _evaluation_by(self, group: Group, model: torch.nn.Module | None) -> Evaluation:
        return (ChunkEvaluation if self._members.is_chunked else Evaluation)(self, group, model)


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
    members = Owners(found.averaged | found.copied, found.chunks, options, tracking.run_id, mesh_of(model))
    everywhere = TrackedModel.of_model(found).complete_shapes
    own = replace(TrackedModel.of_model(found.of(members), members), everywhere=everywhere)
    return replace(tracking, run_id=members.run_id, tracked=own)
