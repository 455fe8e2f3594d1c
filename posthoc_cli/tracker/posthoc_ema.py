"""`PostHocEMA`: the hook that a training loop calls, and the averages that it returns at any time."""

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
from posthoc_cli.tracker import resuming
from posthoc_cli.tracker.layout import HOST
from posthoc_cli.tracker.model_tensors import ModelTensors, TrackedModel, check_model, collect_tensors, named_tensors
from posthoc_cli.tracker.model_weights import WithStatement, swapped_in, update_bn, warn_of_statistics
from posthoc_cli.tracker.pipeline import state_of_tracker, wait_for_writers
from posthoc_cli.tracker.resuming import Start
from posthoc_cli.tracker.sharding import Group, ShardOwners, is_first_of_group, mesh_of
from posthoc_cli.tracker.snapshotter import run_snapshots
from posthoc_cli.tracker.state import Settings, Tracking
from posthoc_cli.tracker.synthesizer import ChunkSynthesizer, Query, Synthesizer, as_dtensors, plan_possible
from posthoc_cli.tracker.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Module = TypeVar("Module", bound=torch.nn.Module)
Dtype = torch.dtype | str | None

log = logging.getLogger(__name__)


class PostHocEMA(Tracker):
    """Tracks power-function averages of a model and makes the average of any other length from them.

    Make one with `from_model` or `from_path`. A background thread writes the snapshots; `flush` waits until all due
    ones are on disk. `close`, or the end of a `with` block, also releases the directory to other writers. Public
    attributes: `checkpoint_dir`, the directory of the snapshots, and `settings`, the checked arguments.
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
        device: str | None = None, resume: str | int | None = None,
    ) -> PostHocEMA:  # fmt: skip
        """Return a tracker for a new run, or with `resume` for an existing one. The first `update_` begins to write.

        For two profiles of float32 or bfloat16 parameters it holds 16 bytes a parameter, 4 more from the first float16
        snapshots on, and for averages on the host one more copy of the model, see `metrics`. Among replicas in several
        processes the first one, of the model's DistributedDataParallel or of all, keeps and writes the averages; the
        others only count steps. Of a sharded model each process keeps and writes its part.

        Arguments:
            model: the model to track, wrapped or bare: names are those of the bare model.
            checkpoint_dir: the directory for the snapshots, created if it is missing. One run per directory.
            sigma_rels: profiles to track; two reach almost everything between them, see `ema error-plot`.
            update_every, update_after_step: averages are updated at multiples of the first, after the second.
            checkpoint_every: snapshots are due at its multiples; it must be a multiple of update_every, whose default
                of 10 is else reduced to their common divisor, with a warning.
            max_checkpoints: number of snapshots to keep of each profile: those that reconstruction needs most for the
                lengths between the tracked ones. None keeps all.
            checkpoint_dtype: dtype of stored averages, float32 where values do not fit; None for each parameter's.
            t_unit: the unit of `t`, if you pass your own clock to `update_`.
            on_nonfinite: where a parameter holds nan or infinity, "raise" an error, or "skip" the update and warn. Both
                leave the averages unchanged, except for some last digits of the mean of the last updates.
            include: globs on names, such as "decoder.*": only matching tensors are tracked, also those that require no
                gradients. None: all but parameters that require no gradients.
            exclude: globs on names of tensors to leave out.
            buffers: "statistics" to average BatchNorm's running statistics and copy other buffers, with their values at
                the time of the average; "copy" all of them; or "average" floating-point ones like parameters.
            device: "model" for averages on the parameters' devices, updated by the training thread; "cpu" for averages
                on the host, updated by a background thread, with the same bits; None for "cpu" where a parameter is
                on an accelerator.
            resume: "auto" to continue the directory's run of this model, if it holds one, from the newest snapshots at
                whose time the network had the model's weights, exactly or as float16 or bfloat16. Restore the model's
                checkpoint first: for any other weights the first `update_` raises an error, unless `load_state_dict`
                was called. A number to continue from the snapshots of that call of `update_`, whatever the weights.
                None for a new run, or to continue exactly where a tracker of this process writes averages of this
                very model to the directory, as when a notebook's cell runs again.

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
            DirectoryError, MismatchError: the directory is not writable, or it holds a run and `resume` is None.
            others: for a run to be resumed, see `from_path`.
        """
        selection = make_selection(include, exclude, buffers)
        settings = Settings.checked(
            sigma_rels, update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype,
            t_unit, selection, on_nonfinite,
        )  # fmt: skip
        check_globs(selection, [tensor.name for tensor in named_tensors(check_model(model))])
        directory = resuming.check_path(checkpoint_dir)
        in_group = is_first_of_group(model) is not None
        earlier = None
        if resume in (None, "auto") and not in_group:  # a notebook's cell that is run again continues exactly
            earlier = state_of_tracker(directory, collect_tensors(model, selection))
            resume = resume if earlier is None else "auto"
        wait_for_writers(directory, last_too=earlier is None)
        stored = [] if resume is None else resuming.stored_to_resume(directory, resume)
        if stored:
            settings = replace(settings, selection=selection.resumed(stored[-1].info.roles))
        tensors = collect_tensors(model, settings.selection)
        if tensors.chunks or is_first_of_group(model) is not False:
            resuming.check_directory(directory, is_new=resume is None)
        tracked = TrackedModel.of_model(tensors)
        tracked.check_header()
        start = None if resume is None else resuming.find_run(directory, stored, settings, tracked, resume)
        tracking, step = start or (Tracking.new(secrets.token_hex(16), tracked, settings.sigma_rels), None)
        tracking = _with_members(tracking, model, tensors, settings, directory)
        tracker = cls.__new__(cls)
        tracker._begin(directory, settings, tracking, model, device, Start(directory, settings, step, stored))
        if earlier is not None:
            tracker.load_state_dict(earlier)
        return tracker

    @classmethod
    def from_path(
        cls, checkpoint_dir: str | Path, model: torch.nn.Module | None = None, step: int | None = None,
        device: str | None = None,
    ) -> PostHocEMA:  # fmt: skip
        """Return a tracker of the run in a directory, with its settings: to synthesize from, or to continue tracking.

        Tracking continues at the first `update_`, as with `resume="auto"` of `from_model`: from values rounded to the
        snapshots' dtype (float16: 2e-4 relative). To continue exactly, use `load_state_dict`; with other settings, use
        `from_model`. The call waits for due snapshots of other trackers of this process.

        Arguments:
            checkpoint_dir: a directory with snapshots.
            model: the model to continue with, or to fill; this call checks its tensors against the snapshots.
            step: continue from the snapshots of this call of `update_`, whatever the model's weights; later snapshots
                are moved to the folder `superseded` when tracking begins.
            device: see `from_model`.

        Raises:
            DirectoryError, FileFormatError, MismatchError, ModelMismatchError: the directory or the model is unfit.
            InvalidValueError: an argument, or a `step` without snapshots; the message names the steps with snapshots.
        """
        directory = resuming.check_path(checkpoint_dir)
        wait_for_writers(directory)
        stored = read_directory(directory)
        profiles = stored[-1].info.sigma_rels
        snapshots = resuming.snapshots_until(stored, step)
        newest = snapshots[-1].info
        selection = (newest.selection or Selection()).resumed(newest.roles)
        on_nonfinite = "skip" if newest.skip_nonfinite else "raise"
        settings = Settings(profiles, newest.schedule, newest.t_unit, selection, on_nonfinite)
        tracking = resuming.resumed_tracking(snapshots, profiles)
        if model is not None:
            # By the names in the snapshots: a model that is only to be filled may be frozen.
            tensors = collect_tensors(model, selection, tracking.tracked.known_names)
            tracking = _with_members(tracking, model, tensors, settings, directory)
        tracker = cls.__new__(cls)
        tracker._begin(directory, settings, tracking, model, device, Start(directory, settings, step, stored))
        return tracker

    @property
    def run(self) -> Run:
        """This run's snapshots on disk, as a `Run`, once those that are being written are complete."""
        self.flush()
        return Run(self.checkpoint_dir)

    def metrics(self, sigma_rels: Wanted | Sequence[Wanted] = ()) -> dict[str, float]:
        """Return figures for a logger, at almost no cost: without computing on tensors, and without waiting.

        Arguments:
            sigma_rels: one or more lengths or other targets whose predicted errors are wanted; the headers of the
                snapshots on disk are read for them.

        Returns:
            `step` and `t`; `bytes`, the memory that the tracker holds, on the host and on accelerators. For the last
            snapshots: `distance_0.05`, ..., the distance of each tracked average from the weights, relative to its
            norm; `snapshot_bytes`; `snapshot_seconds`, the time it took to write them in the background;
            `snapshot_waited`, the seconds that the training waited before. `predicted_error_0.15`, ...: for each wanted
            length that the run is long enough for, the expected relative error at the newest snapshot.
        """
        wanted = {target.label: target for target in as_targets(sigma_rels)}
        figures = {"step": float(self.step), "t": self.t, **self._pipeline.figures()}
        snapshots = run_snapshots(self.checkpoint_dir, self.run_id) if wanted else []
        plan, _ = plan_possible(snapshots, wanted) if snapshots else (None, {})
        if plan is not None:
            errors = {target.label: plan.predicted_error(index) for index, target in enumerate(plan.targets)}
            figures |= {f"predicted_error_{label}": error for label, error in errors.items() if error is not None}
        return figures

    @overload
    def state_dict(self) -> dict[str, Any]: ...

    @overload
    def state_dict(
        self, sigma_rel: Wanted, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None, full: bool = False,
    ) -> Weights: ...  # fmt: skip

    def state_dict(
        self, sigma_rel: Wanted | None = None, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None, full: bool = False,
    ) -> Weights | dict[str, Any]:  # fmt: skip
        """Return averaged weights as a state dict; without `sigma_rel`, the tracker's own state.

        Save that state in your training checkpoint; `load_state_dict` continues from it exactly. In processes that
        keep no averages it is empty. For a sharded model all processes make the call, and each gets the chunks that it
        owns, as DTensors in host memory: torch.distributed.checkpoint saves and loads them, also for another
        arrangement of processes.

        Arguments:
            sigma_rel: length of the average, in (0, 0.2887); or another target, such as `targets.Beta(0.9999)`, or its
                text form, "beta:0.9999"; or any object with `density` and `tail`.
            t, step: time of the average, or its number of calls; by default that of a live tracker, or the newest.
            dtype: dtype of the averages; None for each parameter's own.
            method: the solver, "minvar" or "paper"; None for the first.
            full: for a sharded model, complete tensors in rank 0, gathered one by one, and none in other ranks.

        Returns:
            Copies of the tensors by name, on the CPU, with their `predicted_error`. For a sharded model, whose
            processes all make the call, DTensors sharded like its parameters.

        Raises:
            InvalidValueError, NotReadyError, FileFormatError, MismatchError, RankError.
        """
        if sigma_rel is None:
            return self._own_state()
        model, query = self._chunked_model(), Query(sigma_rel, t, step, dtype, method)
        weights = self._synthesizer(model, f"state_dict({query}{', full' * full})").weights(query)
        return weights if model is None else as_dtensors(weights, model, full)

    def model(
        self, model: Module, sigma_rel: Wanted, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None,
    ) -> WithStatement[Module]:  # fmt: skip
        """Return a context manager that gives the model averaged weights, in eval mode, for a `with` block.

        A tracked length, without `t` or `step`, is the current average: exact, and from memory. Others are made of it
        and of snapshots. After the block weights, buffers, train or eval mode and device are as before, also on an
        error. Meanwhile the model's raw weights are kept in host memory. Blocks may be nested. The arguments are those
        of `state_dict`, except that without `dtype` the weights take the model's dtypes. To keep averaged weights, save
        them within the block, or use `ema.state_dict(sigma_rel=...)`.

        In a group of processes all that have made a tracker of this directory make the call, between the same two calls
        of `update_`. Of a sharded model each process fills the chunks that it holds; no complete tensor is made. An
        error in one process is raised in all. A tracker that only one process has made needs no other.

        Raises:
            NotReadyError: no average exists yet.
            InvalidValueError, ModelMismatchError: an argument, or a tensor on the meta device or of another shape.
            RankError: another process failed, is at another step, or does not make the call within 300 s.
        """

        def make() -> tuple[Synthesizer, Weights]:
            query = Query(sigma_rel, t, step, dtype, method)
            synthesizer = self._synthesizer(check_model(model), f"model({query})")
            return synthesizer, synthesizer.weights(query)

        return WithStatement(partial(self._filled, model, make, own_dtypes=dtype is None))

    def models(self, model: Module, sigma_rels: Wanted | Sequence[Wanted]) -> dict[str, WithStatement[Module]]:
        """Return a context manager like that of `model` for each of several lengths, made when its block is entered.

        In a group of processes all make the call, and enter the blocks in their order.

        Arguments:
            sigma_rels: lengths, or other targets as in `state_dict`, or their text forms, such as "decay:linear:20%".

        Returns:
            The context managers by the targets' labels, such as "0.15" and "decay-linear-20%". Targets that the run is
            too short for, such as a window of more steps, are left out, with a warning.

        Raises:
            InvalidValueError, NotReadyError, RankError: an argument, and see `model`.
        """
        wanted = {target.label: target for target in as_targets(sigma_rels)}
        synthesizer = self._synthesizer(check_model(model), f"models({', '.join(wanted)})")
        refused = synthesizer.refused(wanted)
        for label, reason in refused.items() if self.keeps_averages else ():
            if self._is_first_warning(label):
                log.warning("%s; there is no average of it at step %d", reason, self.step)
        return {label: self.model(model, target) for label, target in wanted.items() if label not in refused}

    @contextmanager
    def _filled(
        self, model: Module, make: Callable[[], tuple[Synthesizer, Weights]], own_dtypes: bool = True
    ) -> Iterator[Module]:
        """Give the model the weights that `make` returns, and warn, once, of running statistics that are copies."""
        synthesizer, weights = make()
        synthesizer.check(weights, own_dtypes)
        with swapped_in(model, weights, own_dtypes):
            yield model
            if "statistics" not in self._warned_of:
                copies = self._pipeline.tracking.tracked.dtypes(copied=True)
                self._warned_of |= {"statistics"} if warn_of_statistics(model, weights, copies) else set()

    def load_into(
        self, model: torch.nn.Module, sigma_rel: Wanted, t: float | None = None, step: int | None = None,
        dtype: Dtype = None, method: str | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """Fill a model with averaged weights permanently, on any device, also a model on `meta`.

        This needs memory for one tensor, in a group of processes for the weights that each process gets. Names, shapes
        and `dtype` are checked before the first tensor is filled. Parameters stay the same objects, so that the
        optimizer keeps its state, and later updates average the new weights: between two training steps this is the
        switch of Switch EMA.

        Arguments:
            device: where to create the tensors on `meta` that an average fills; a warning names the others. Tensors on
                `meta` of a sharded model are refused.

        Raises:
            ModelMismatchError, others: see `model` and `state_dict`; nothing has changed.
            FileFormatError, NonFiniteError: a snapshot is damaged, or a value does not fit the model's dtype; the
                tensors before it are filled.
        """
        query = Query(sigma_rel, t, step, dtype, method)
        self._synthesizer(check_model(model), f"load_into({query})").fill(query, device)

    update_bn = staticmethod(update_bn)

    def reconstruction_error(
        self, sigma_range: tuple[float, float] = (0.05, 0.28), method: str | None = None
    ) -> Figure:
        """Return a figure of reconstruction error against sigma_rel, of the averages or, before any, of the schedule.

        `sigma_range` is the lowest and highest sigma_rel, `method` the solver; None for the default one.
        """
        from posthoc_cli import plots

        keepers = self._members.keepers("reconstruction_error()")
        candidate = self._synthesizer_of(keepers, None).of_sources(self._candidate)
        curve = error_curve(candidate, sigma_range, method=method)
        return plots.error_figure([curve], profile_error=method == "paper")

    def _candidate(self, sources: list[Source]) -> Candidate:
        if sources:
            last = max(source.info.t for source in sources)
            chosen, _ = chosen_up_to(sources, last)
            of_all = f" of {len(sources):,}" * (len(chosen) < len(sources))
            label = f"{len(chosen):,}{of_all} averages up to t = {last:,.12g}"
            profiles = [source.profile for source in chosen]
            return Candidate(label, profiles, source_prior(chosen))
        schedule = self.settings.schedule
        every, count = schedule.checkpoint_every, schedule.max_checkpoints or 20
        rounding = ROUNDING * EPS[schedule.checkpoint_dtype or "F32"]
        return Candidate.of_schedule(Schedule(self.settings.sigma_rels, count * every, every, count, rounding))

    def _synthesizer(self, model: torch.nn.Module | None, call: str) -> Synthesizer:
        """Begin a call for averages, by all processes that keep parts of them or replicas."""
        tracked = self._tracked_model(model)
        parameter = None if tracked is None else next(tracked.parameters(), None)
        device = HOST if parameter is None else parameter.device
        group = self._members.callers(call, not self._pipeline.tracking.resumes, device)
        return self._synthesizer_of(group, model)

    def _synthesizer_of(self, group: Group, model: torch.nn.Module | None) -> Synthesizer:
        return (ChunkSynthesizer if self._members.is_chunked else Synthesizer)(self, group, model)


def _with_members(
    tracking: Tracking, model: torch.nn.Module, tensors: ModelTensors, settings: Settings, directory: Path
) -> Tracking:
    """Return `tracking`, of a sharded model for the part that this process keeps, after a rendezvous of all."""
    if not tensors.chunks:
        return tracking
    if tracking.resumes:
        tracking.tracked.check(TrackedModel.of_model(tensors))
    values = vars(settings) | vars(settings.schedule) | vars(settings.selection)
    left_out = ("schedule", "selection", "only_trainable")  # the last one says whether there is an `include`
    options = {name: str(value) for name, value in values.items() if name not in left_out}
    start = f"run {tracking.run_id[:8]} at step {tracking.progress.step}" if tracking.resumes else "nothing"
    options |= {"checkpoint_dir": str(directory), "to resume": start}
    members = ShardOwners(tensors.averaged | tensors.copied, tensors.chunks, options, tracking.run_id, mesh_of(model))
    everywhere = TrackedModel.of_model(tensors).complete_shapes
    part = replace(TrackedModel.of_model(tensors.of(members), members), everywhere=everywhere)
    return replace(tracking, run_id=members.run_id, tracked=part)
