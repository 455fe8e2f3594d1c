"""Averaged weights from snapshots and live averages, made in one process or in a group that makes the call.

The first process makes the plan, for a sharded model from measurements that all processes have taken of their chunks,
and sends it to the others. Each process synthesizes what it owns: of replicas the first one everything, of a sharded
model its chunks, from the boxes of the snapshots that it needs. Other holders of the same elements receive them from
their owner. An error in one process is raised in all of them before a model has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import torch_dtype
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    ModelMismatchError,
    NotReadyError,
    VanishedError,
    warn,
)
from posthoc_cli.run import Wanted, Weights, make_weights, with_consistent_plan
from posthoc_cli.snapshots.directory import read_snapshot, sum_of_parts
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import Box, Entry
from posthoc_cli.synthesis.engine import check_device
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.targets import SigmaRel, Target, as_target
from posthoc_cli.tracker.model_tensors import TrackedModel, collect_tensors, named_tensors
from posthoc_cli.tracker.model_weights import check_weights, copied_weights, fill, fill_model
from posthoc_cli.tracker.pipeline import Pipeline
from posthoc_cli.tracker.resuming import Start
from posthoc_cli.tracker.sharding import Group, ShardOwners, as_dtensor, held_box, held_part, is_sharded, reshard
from posthoc_cli.tracker.snapshotter import LiveSource, run_snapshots, with_snapshots
from posthoc_cli.tracker.state import Settings

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class TrackerOfAverages(Protocol):
    """The members of `PostHocEMA` that a synthesis of its averages uses."""

    checkpoint_dir: Path
    settings: Settings
    _pipeline: Pipeline
    _start: Start

    @property
    def step(self) -> int: ...  # noqa: D102

    @property
    def run_id(self) -> str: ...  # noqa: D102

    @property
    def has_average(self) -> bool: ...  # noqa: D102

    @property
    def keeps_averages(self) -> bool: ...  # noqa: D102

    def flush(self) -> None: ...  # noqa: D102

    def _tracked_model(self, default: torch.nn.Module | None = None) -> torch.nn.Module | None: ...

    def _is_first_warning(self, cause: str) -> bool: ...


@dataclass(frozen=True)
class Query:
    """The average that is wanted; the arguments of `PostHocEMA.state_dict`."""

    wanted: Wanted
    t: float | None = None
    step: int | None = None
    dtype: torch.dtype | str | None = None
    method: str | None = None

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if name != "wanted" and value is not None}
        return ", ".join([as_target(self.wanted).title, *(f"{name}={value}" for name, value in given.items())])


@dataclass(frozen=True)
class Recipe:
    """A plan for an average in the form that the first process sends to the others.

    Attributes:
        specs: the specs of an average's stored tensors, complete.
        names: all names of each of these tensors, its stored name first.
        sources: the name and header checksum of each source; the checksum of a live average is empty.
        plan: the plan without sources and targets.
        errors: the predicted error and the profile error.
    """

    specs: Mapping[str, Entry]
    names: Mapping[str, Sequence[str]]
    sources: tuple[tuple[str, str], ...]
    plan: Plan
    errors: tuple[float | None, float]

    @classmethod
    def of_plan(cls, plan: Plan) -> Recipe:
        """Return the recipe for a plan."""
        specs = {n: Entry(plan.output_dtype(n), plan.newest.entries[n].shape) for n in plan.tensors}
        sources = ((source.name, source.checksum if isinstance(source, Snapshot) else "") for source in plan.sources)
        errors = plan.predicted_error(0), plan.profile_error(0)
        return cls(specs, plan.names, tuple(sources), replace(plan, sources=(), targets=()), errors)


@dataclass(frozen=True)
class Synthesizer:
    """Makes a tracker's averages for one call by all processes of a group, of which the first synthesizes everything.

    Attributes:
        tracker: the tracker of the averages.
        group: the processes that make this call together.
        model: the model to fill; a sharded one says which chunks this process holds.
    """

    tracker: TrackerOfAverages
    group: Group
    model: torch.nn.Module | None

    def weights(self, query: Query) -> Weights:
        """Return an average, or for a sharded model the chunks of it that this process holds.

        Before the first update, return the raw weights, with a warning.
        """
        return self._one(query, lambda sources: self._plan_from(sources, query), self._is_live(query))

    def _is_live(self, query: Query) -> bool:
        """Return whether a live average is wanted: that of a tracked length, at the present time."""
        is_now = query.t is None and query.step is None and not self._pipeline.tracking.resumes
        return is_now and self._index(query) is not None

    def _index(self, query: Query) -> int | None:
        target = as_target(query.wanted)
        return self.tracker.settings.tracked_index(target.sigma_rel) if isinstance(target, SigmaRel) else None

    def refused(self, wanted: Mapping[str, Target]) -> dict[str, str]:
        """Return the reasons why some averages cannot be made yet, by label."""
        if not self.group.from_first(lambda: self.tracker.has_average):
            return {}
        return self.of_sources(lambda sources: plan_possible(self._checked(sources), wanted)[1])

    def check(self, weights: Weights, own_dtypes: bool = True) -> None:
        """Raise an error in all processes if the weights do not fit in one; `swapped_in` checks a single process."""
        model = self.model
        if not self.group.is_alone and model is not None:
            self.group.together(lambda: check_weights(model, weights, own_dtypes))

    def fill(self, query: Query, device: torch.device | str) -> None:
        """Fill the model with an average permanently, also a model on `meta`; a single process, tensor by tensor."""
        model = self.model
        assert model is not None
        if self.group.is_alone and self.tracker.has_average:
            live_only = self._is_live(query)
            with_consistent_plan(
                lambda: self._plan_from(self.sources(live_only), query), lambda plan: fill_model(model, plan, device)
            )
        else:
            self._fill_at_once(query, device, accept_meta=True)

    def _fill_at_once(self, query: Query, device: torch.device | str, accept_meta: bool) -> None:
        model = self.model
        assert model is not None
        weights, own_dtypes = self.weights(query), query.dtype is None
        self.group.together(lambda: check_weights(model, weights, own_dtypes, accept_meta))
        fill(model, weights, weights.items(), own_dtypes, check_device(device))

    def of_sources(self, work: Callable[[list[Source]], Result]) -> Result:
        """Return in each process what `work` returns in the first one, for the sources of complete tensors."""
        return self._shared(work)[0]

    def _raw(self, dtype: torch.dtype | str | None) -> Weights:
        """Return the raw weights of the tracked model, or else of `self.model`, with a warning."""
        model, settings = self.tracker._tracked_model(self.model), self.tracker.settings
        if model is None:
            raise NotReadyError("no average yet", "the tracked model no longer exists")
        every, after = settings.schedule.update_every, settings.schedule.update_after_step
        if self.tracker._is_first_warning("raw weights"):
            options = f"update_every={every}, update_after_step={after}"
            warn(f"no average yet, so the raw weights are used: {settings.first_update(0)} ({options})")
        return copied_weights(collect_tensors(model, settings.selection), dtype)

    # --- the sources of averages

    @property
    def _pipeline(self) -> Pipeline:
        return self.tracker._pipeline

    def _shared(
        self, work: Callable[[list[Source]], Result], live_only: bool = False
    ) -> tuple[Result, dict[str, Source]]:
        """Return what `of_sources` returns, and the sources from which this process synthesizes, by name."""
        local: dict[str, Source] = {}

        def work_in_first() -> Result:
            sources = self.sources(live_only)
            local.update((source.name, source) for source in sources)
            return work(sources)

        return self.group.from_first(work_in_first), local

    def sources(self, live_only: bool = False) -> list[Source]:
        """Return the present snapshots and live averages of complete tensors."""
        if not (self._pipeline.tracking.resumes or self.tracker.keeps_averages):
            raise NotReadyError(
                "this process keeps no averages, the first one of its group does",
                "read the snapshots on disk with a new PostHocEMA.from_path(directory), before any update_ of it",
            )
        self.tracker.flush()
        if live_only:
            return [*self._pipeline.live()]
        live, snapshots = self._pipeline.live(), run_snapshots(self.tracker.checkpoint_dir, self.tracker.run_id)
        return self._until_start(with_snapshots(live, snapshots))

    def _until_start(self, sources: list[Source]) -> list[Source]:
        """Return the sources that are not later than the call from which the run is to be resumed."""
        if self._pipeline.tracking.resumes and self.tracker._start.step is not None:
            return [source for source in sources if source.info.step <= self.tracker._start.step]
        return sources

    def _plan_from(self, sources: list[Source], query: Query) -> Plan:
        sources = self._checked(sources)
        if self._is_live(query):
            source = sources[self._index(query) or 0]
            plan = plan_synthesis([source], [query.wanted], method=query.method, dtype=query.dtype)
            if isinstance(source.info, Snapshot) and source.info.inherited:  # as after rounding
                return _logged(plan)
            log.info("live average of sigma_rel %g at t = %.12g: exact", source.info.sigma_rel, source.info.t)
            return plan
        return _logged(plan_synthesis(sources, [query.wanted], query.t, query.step, query.method, dtype=query.dtype))

    def _checked(self, sources: list[Source]) -> list[Source]:
        """Return the sources, or raise a NotReadyError if there are none."""
        if not sources:
            reason = f"{self.tracker.settings.first_update(self.tracker.step)}, so far {self.tracker.step:,}"
            raise NotReadyError("no average yet", reason)
        return sources

    # --- synthesizing them

    def _one(self, query: Query, plan: Callable[[list[Source]], Plan], live_only: bool = False) -> Weights:
        """Return one average, by the plan that the first process makes."""
        if not self.group.from_first(lambda: self.tracker.has_average):
            return self._raw(query.dtype)

        def make(shared_and_local: tuple[Recipe, dict[str, Source]]) -> Weights:
            shared, local = shared_and_local
            part = self.group.together(lambda: self._own_part(shared, as_target(query.wanted), local))
            return self._exchanged(shared, part)

        return with_consistent_plan(lambda: self._shared(lambda s: Recipe.of_plan(plan(s)), live_only), make)

    def _own_part(self, shared: Recipe, target: Target, local: Mapping[str, Source]) -> Weights:
        """Return what this process synthesizes of an average: the first process everything."""
        if not self.group.leads:
            return Weights()
        return self._synthesized(shared, target, [local[name] for name, _ in shared.sources])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _synthesized(
        self, shared: Recipe, target: Target, sources: Sequence[Source], boxes: Mapping[str, Box] | None = None
    ) -> Weights:
        """Return an average from these sources, or boxes of some of its tensors."""
        subset = None if boxes is None else frozenset(boxes)
        return make_weights(
            replace(shared.plan, sources=tuple(sources), targets=(target,), subset=subset, boxes=boxes or {})
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _exchanged(self, shared: Recipe, part: Weights) -> Weights:
        """Return all that this process holds of an average, under all names, on the host, after exchanging it."""
        weights, shape_and_ranks = Weights(), self._shape_and_ranks()
        weights.predicted_error, weights.profile_error = shared.errors
        for name, spec in shared.specs.items():
            shape, ranks = shape_and_ranks(name, spec)
            value = part.get(name)
            if value is None:
                value = torch.empty(shape, dtype=torch_dtype(spec.dtype))
            self.group.exchange(value, ranks)
            weights.update(dict.fromkeys(shared.names[name], value))
        return weights

    def _shape_and_ranks(self) -> Callable[[str, Entry], tuple[Sequence[int], Sequence[int]]]:
        """Return a function from a spec to the shape of this process's part and the ranks that hold it, owner first."""
        return lambda _, spec: (spec.shape, self.group.ranks)


@dataclass(frozen=True)
class ChunkSynthesizer(Synthesizer):
    """Makes averages of a sharded model for one call: each process synthesizes the chunks that it owns."""

    def fill(self, query: Query, device: torch.device | str) -> None:
        """Fill the chunks that this process holds with those of an average permanently."""
        self._fill_at_once(query, device, accept_meta=False)

    def _shared(
        self, work: Callable[[list[Source]], Result], live_only: bool = False
    ) -> tuple[Result, dict[str, Source]]:
        """Return the result, and the live averages of the chunks that this process owns, by name."""
        local, complete = self._live_sources()

        def work_in_first() -> Result:
            older = [] if live_only else run_snapshots(self.tracker.checkpoint_dir, self.tracker.run_id)
            return work(self._until_start(with_snapshots(complete, older)))

        return self.group.from_first(work_in_first), {source.name: source for source in local}

    def _live_sources(self) -> tuple[list[LiveSource], list[LiveSource]]:
        """Return the live averages of this process's chunks, and those of complete tensors, which have no values."""

        def measure() -> list[LiveSource]:
            self.tracker.flush()
            return self._pipeline.live()

        local, progress = self.group.together(measure), self._pipeline.progress
        headers = [(source.info, dict(source.entries)) for source in local]
        parts = self.group.from_all_at(progress.step, progress.t, headers)
        return local, [_joined(profile) for profile in zip(*filter(None, parts), strict=True)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _own_part(self, shared: Recipe, target: Target, local: Mapping[str, Source]) -> Weights:
        """Return the chunks of an average that this process owns, after checking that the model holds them."""
        tracked, tensors = self._pipeline.tracking.tracked, self._tensors()
        boxes = {name: tracked.box(name) for name in shared.specs if name in tracked.chunks}
        if not boxes:
            return Weights()
        for name in boxes:
            _check_chunk(name, tracked, tensors.get(name))
        directory = self.tracker.checkpoint_dir
        sources = [
            local[name] if name in local else _read_again(directory / name, checksum)
            for name, checksum in shared.sources
        ]
        return self._synthesized(shared, target, sources, boxes)

    def _shape_and_ranks(self) -> Callable[[str, Entry], tuple[Sequence[int], Sequence[int]]]:
        """Return a function from a spec to this process's shape of it and the ranks that hold it, owner first."""
        tensors, members = self._tensors(), self._pipeline.tracking.tracked.members
        assert isinstance(members, ShardOwners)
        holders = members.holders
        return lambda name, spec: (
            held_part(tensors[name]).shape if name in tensors else spec.shape,
            holders.get(name, ()),
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the model by name, after resharding it so that this process holds its chunks."""
        assert self.model is not None
        reshard(self.model)
        return {tensor.name: tensor.tensor for tensor in named_tensors(self.model)}


def plan_possible(sources: Sequence[Source], wanted: Mapping[str, Target]) -> tuple[Plan | None, dict[str, str]]:
    """Plan several averages, and say why others cannot be made yet, such as a window longer than the run so far."""
    refused: dict[str, str] = {}
    try:
        return _logged(plan_synthesis(sources, [*wanted.values()])), refused
    except InvalidValueError:
        for label, target in wanted.items():
            try:
                plan_synthesis(sources, [target])
            except InvalidValueError as error:
                refused[label] = str(error)
    possible = [target for label, target in wanted.items() if label not in refused]
    return (_logged(plan_synthesis(sources, possible)) if possible else None), refused


def _logged(plan: Plan) -> Plan:
    for index, target in enumerate(plan.targets):
        error = plan.predicted_error(index)
        predicted = "unknown" if error is None else f"{error:.2g}"
        log.info("average of %s at t = %.12g: predicted error %s", target.title, plan.t, predicted)
    if plan.choice is not None:
        log.info("made from %s", plan.choice)
    return plan


def _joined(parts: Sequence[tuple[Snapshot, Mapping[str, Entry]]]) -> LiveSource:
    """Return the live average of complete tensors, without values, from the headers of its owners' chunks."""
    specs = {name: spec._replace(shape=info.chunks[name].shape) for info, part in parts for name, spec in part.items()}
    infos = [info for info, _ in parts]
    joined = replace(
        infos[0],
        tensors={name: tensor for info in infos for name, tensor in info.tensors.items()},
        aliases={alias: name for info in infos for alias, name in info.aliases.items()},
        measurements=sum_of_parts([info.measurements for info in infos]),
        inherited=sum(info.inherited for info in infos),
        part=None,
        chunks={},
    )
    return LiveSource(joined, specs, lambda _: [])


def _check_chunk(name: str, tracked: TrackedModel, tensor: torch.Tensor | None) -> None:
    """Raise a ModelMismatchError unless the model holds the chunk of a tensor that this process owns."""
    expected = tracked.complete_shape(name), tracked.box(name)
    if tensor is not None and (tuple(tensor.shape), held_box(name, tensor)[1]) == expected:
        return
    reason = "is missing in the model, of another shape, or spread over the processes in another way than when tracked"
    raise ModelMismatchError(f"tensor {name!r}", reason)


def _read_again(path: Path, checksum: str) -> Snapshot:
    """Read the header of a snapshot that rank 0 has planned with; raise an error if it was replaced meanwhile."""
    try:
        snapshot = read_snapshot(path)
    except FileFormatError as error:
        if files.is_absent(path):
            raise VanishedError(path, "was removed while it was being used") from error
        raise
    if snapshot.checksum != checksum:
        raise FileFormatError(path, "was replaced while it was being used", "run again")
    return snapshot


def as_dtensors(chunks: Weights, model: torch.nn.Module, full: bool = False) -> Weights:
    """Return the weights with DTensors on the host in place of chunks, sharded like the model's parameters.

    With `full`, return complete tensors in rank 0, gathered one after the other, and none in the other ranks.
    """
    weights = Weights()
    weights.predicted_error, weights.profile_error = chunks.predicted_error, chunks.profile_error
    leads = torch.distributed.get_rank() == 0
    converted: dict[int, torch.Tensor] = {}  # by the chunk, which tied names share
    for tensor in named_tensors(model):
        chunk = chunks.get(tensor.name)
        if chunk is None:
            continue
        if id(chunk) not in converted:
            value: Any = as_dtensor(chunk, tensor.tensor)
            if full and is_sharded(value):
                complete = value.to(value.device_mesh.device_type).full_tensor()
                value = complete.cpu() if leads else chunk
            converted[id(chunk)] = value
        if leads or not full:
            weights[tensor.name] = converted[id(chunk)]
    return weights
