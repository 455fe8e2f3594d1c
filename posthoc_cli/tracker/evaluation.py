"""One call for averaged weights: from snapshots and live averages, in one process or in all that make the call.

Of replicas the process that keeps the averages makes the weights, and the others get them. Of a sharded model each
process makes the chunks that it owns: rank 0 makes the plan, from measurements that all have taken of their own chunks;
each owner reads the boxes of the snapshots that it needs; ranks that hold the same elements get them from their owner.
An error of one process is raised in all of them before a model has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import torch_dtype
from posthoc_cli.errors import FileFormatError, InvalidValueError, ModelMismatchError, NotReadyError, VanishedError
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.run import Wanted, Weights, make_weights, with_consistent_plan
from posthoc_cli.snapshots.chunks import Box, Chunk
from posthoc_cli.snapshots.directory import read_snapshot, sum_of_parts
from posthoc_cli.snapshots.format import SnapshotInfo, TensorSpec
from posthoc_cli.snapshots.reading import TensorReader
from posthoc_cli.snapshots.sources import Snapshot, Source
from posthoc_cli.synthesis.engine import synthesize
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.targets import Target, as_target
from posthoc_cli.tracker.model_tensors import TrackedModel, check_model
from posthoc_cli.tracker.model_weights import check_weights, on_disk
from posthoc_cli.tracker.names import named_tensors
from posthoc_cli.tracker.pipeline import Pipeline
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.sharding import (
    Group,
    Members,
    as_dtensor,
    check_times,
    held_part,
    is_sharded,
    local_part,
    reshard,
)
from posthoc_cli.tracker.snapshotter import (
    LiveSource,
    current_sources,
    measured,
    run_snapshots,
    with_older,
)

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """Which average is wanted; the arguments of `PostHocEMA.state_dict`."""

    wanted: Wanted
    t: float | None = None
    step: int | None = None
    dtype: torch.dtype | str | None = None
    method: str | None = None

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if name != "wanted" and value is not None}
        return ", ".join([as_target(self.wanted).title, *(f"{name}={value}" for name, value in given.items())])


@dataclass(frozen=True)
class Evaluation:
    """What a tracker's averages are at one call.

    Attributes:
        directory: of the snapshots.
        settings, pipeline: of the tracker.
        flush: returns when all updates are in the averages, and all due snapshots durable.
        keeps: whether this process keeps averages.
        from_step: the call of `update_` that the run goes on from, until it does; None for the newest snapshots.
        group: the processes that make this call together.
    """

    directory: Path
    settings: Settings
    pipeline: Pipeline
    flush: Callable[[], None]
    keeps: bool
    from_step: int | None
    group: Group

    def weights(self, model: torch.nn.Module | None, query: Query) -> Weights:
        """An average, or of a sharded model the chunks of it that this process holds; all of the group call it."""
        if self._is_spread:
            return self._chunks(model, query)
        return _from_keeper(self.group, lambda: self.planned(query, make_weights))

    def each(
        self, model: torch.nn.Module, wanted: Mapping[str, Target]
    ) -> tuple[dict[str, Callable[[], Weights]], dict[str, str]]:
        """By label what gives each of several averages, as they are now, and why others cannot be made yet.

        Those of complete tensors are made here, in one pass; several wait on disk.
        """
        queries = {label: Query(target) for label, target in wanted.items()}
        if self._is_spread:
            refused = self.of_sources(lambda sources: plan_possible(self._some(sources), wanted)[1])
            made = {label: partial(self.weights, model, query) for label, query in queries.items()}
            return {label: make for label, make in made.items() if label not in refused}, refused
        kept: dict[str, Weights] = {}

        def write(planned: tuple[Plan | None, dict[str, str]]) -> dict[str, str]:
            plan, refused = planned
            if plan is not None:
                labels = [label for label in wanted if label not in refused]
                made = [make_weights(plan)] if len(labels) == 1 else on_disk(plan, self.directory)
                kept.update(zip(labels, made, strict=True))
            return refused

        refused = self.group.from_first(
            lambda: with_consistent_plan(lambda: plan_possible(self._some(self.sources()), wanted), write)
        )
        take = {label: partial(kept.__getitem__, label) for label in wanted if label not in refused}
        return {label: partial(_from_keeper, self.group, own) for label, own in take.items()}, refused

    def live_weights(self, model: torch.nn.Module, index: int) -> Weights:
        """The same of the live average of the tracked profile of this index, as it is."""
        if self._is_spread:
            return self._live_chunks(model, index)
        return _from_keeper(self.group, lambda: self._complete_live(index))

    def check(
        self, model: torch.nn.Module, weights: Weights, own_dtypes: bool = True, accept_meta: bool = False
    ) -> None:
        """Raise in all processes if the weights do not fit the model in one. Alone, whoever fills the model checks."""
        if not self.group.is_alone:
            self.group.together(lambda: check_weights(model, weights, own_dtypes, accept_meta))

    def planned(self, query: Query, use: Callable[[Plan], Result]) -> Result:
        """What `use` makes of how complete tensors of an average are made."""
        return with_consistent_plan(lambda: self._plan_from(self.sources(), query), use)

    def of_sources(self, work: Callable[[list[Source]], Result]) -> Result:
        """The result of work on snapshots and live averages; of a sharded model that of rank 0, in every process."""
        if not self._is_spread:
            return work(self.sources())
        joined = self._joined_live()[1]
        return self.group.from_first(lambda: work(self._joined_sources(joined)))

    # --- complete tensors

    def sources(self) -> list[Source]:
        """The snapshots and live averages of complete tensors that there are now."""
        if not self.pipeline.now.resumes:  # else the writer, too, has only what is on disk
            self._check_keeps()
        self.flush()
        return self._going_on(current_sources(self.directory, self.pipeline.now.run_id, self.live()))

    def _going_on(self, sources: list[Source]) -> list[Source]:
        """Without those that are later than where the run goes on from."""
        if self.pipeline.now.resumes and self.from_step is not None:
            return [source for source in sources if source.info.step <= self.from_step]
        return sources

    def live(self) -> list[LiveSource]:
        """The live averages that this process keeps, see `Pipeline.live`."""
        return self.pipeline.live()

    def _complete_live(self, index: int) -> Weights:
        self._check_keeps()
        self.flush()
        sources = self.live()
        if not sources:
            raise self._not_yet("live average")
        tensors, info = sources[index].tensors, sources[index].info
        log.info("live average of sigma_rel %g at t = %.12g: exact", info.sigma_rel, info.t)
        return Weights({**tensors, **{alias: tensors[name] for alias, name in info.aliases.items()}})

    # --- chunks, of which every process keeps some

    @property
    def _is_spread(self) -> bool:
        return self.pipeline.now.tracked.members is not None

    def _chunks(self, model: torch.nn.Module | None, query: Query) -> Weights:
        assert model is not None
        target = as_target(query.wanted)
        own, joined = self._joined_live()

        def plan() -> _SharedPlan:
            return _SharedPlan.of(self._plan_from(self._joined_sources(joined), query))

        reshard(model)
        tracked = self.pipeline.now.tracked
        return with_consistent_plan(
            lambda: self.group.from_first(plan),
            lambda shared: _make_chunks(self.group, shared, target, own, tracked, model, self.directory),
        )

    def _live_chunks(self, model: torch.nn.Module, index: int) -> Weights:
        own, joined = self._joined_live()

        def live() -> _SharedPlan:
            if not joined:
                raise self._not_yet("live average")
            return _SharedPlan.of_live(joined[index])

        reshard(model)
        shared = self.group.from_first(live)
        return _make_chunks(self.group, shared, None, own, self.pipeline.now.tracked, model, self.directory)

    def _joined_sources(self, joined: Sequence[LiveSource]) -> list[Source]:
        """In rank 0 the snapshots and live averages of complete tensors."""
        return self._going_on(with_older(joined, run_snapshots(self.directory, self.pipeline.now.run_id)))

    def _joined_live(self) -> tuple[list[LiveSource], list[LiveSource]]:
        """The live averages here and, measured by all processes together, without values, those of complete tensors."""

        def measure_own() -> list[LiveSource]:
            self.flush()
            snapshotter = self.pipeline.snapshotter
            return measured(self.live(), [] if snapshotter is None else snapshotter.stored())

        own, progress = self.group.together(measure_own), self.pipeline.progress
        told = (progress.step, progress.t), [(source.info, dict(source.stored)) for source in own]
        times, parts = zip(*self.group.from_all(told), strict=True)
        check_times(times)
        return own, [_joined(profile) for profile in zip(*filter(None, parts), strict=True)]

    # --- plans and refusals

    def _plan_from(self, sources: list[Source], query: Query) -> Plan:
        plan = plan_synthesis(self._some(sources), [query.wanted], query.t, query.step, query.method, dtype=query.dtype)
        return _logged(plan)

    def _some(self, sources: list[Source]) -> list[Source]:
        """The same, or a NotReadyError if there are none."""
        if not sources:
            raise self._not_yet("average")
        return sources

    def _not_yet(self, what: str) -> NotReadyError:
        schedule, step = self.settings.schedule, self.pipeline.progress.step
        every = schedule.update_every
        first = (max(schedule.update_after_step, step) // every + 1) * every
        reason = f"the first update is at call {first:,} of update_, so far {step:,}"
        hint = "model(model, sigma_rel=...) reads the snapshots"
        return NotReadyError(f"no {what} yet", reason, hint * (what == "live average" and self.pipeline.now.resumes))

    def _check_keeps(self) -> None:
        if not self.keeps:
            raise NotReadyError(
                "this process keeps no averages, the first one of its group does",
                "make the call in all processes of the group, without alone=True; or read the snapshots on disk with a "
                "new PostHocEMA.from_path(directory), before any update_ of it",
            )


def plan_possible(sources: Sequence[Source], wanted: Mapping[str, Target]) -> tuple[Plan | None, dict[str, str]]:
    """How several averages are made, and why others cannot be yet: a window may be longer than the run is by now."""
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


# --- what all processes of a group call ---


def _joined(parts: Sequence[tuple[SnapshotInfo, Mapping[str, TensorSpec]]]) -> LiveSource:
    """The live average of complete tensors, from what its owners say of their chunks, without values."""
    specs = {name: replace(spec, shape=info.chunks[name].shape) for info, own in parts for name, spec in own.items()}
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


@torch.inference_mode(False)
@torch.no_grad()
def _from_keeper(group: Group, make: Callable[[], Weights]) -> Weights:
    """Weights that the first process makes, in every process: exchanged one by one."""
    if group.is_alone:
        return make()
    own = Weights()

    def describe() -> tuple[dict[str, str], dict[str, tuple[torch.Size, torch.dtype]], float | None, float]:
        nonlocal own
        own = make()
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(value), name) for name, value in own.items()}
        specs = {name: (own[name].shape, own[name].dtype) for name in first.values()}
        return names, specs, own.predicted_error, own.profile_error

    names, specs, predicted, profile = group.from_first(describe)
    values = {}
    for name, (shape, dtype) in specs.items():
        values[name] = own[name] if group.leads else torch.empty(shape, dtype=dtype)
        group.exchange(values[name], group.ranks)
    made = Weights((name, values[first]) for name, first in names.items())
    made.predicted_error, made.profile_error = predicted, profile
    return made


@dataclass(frozen=True)
class _SharedPlan:
    """What all processes make of complete tensors, as rank 0 tells the others.

    Attributes:
        specs: of the stored tensors, as they will be.
        names: every name of each of them, its own first.
        sources: name and header checksum of each; none of a live average.
        plan: without sources and targets; None for the first source as it is.
    """

    specs: Mapping[str, TensorSpec]
    names: Mapping[str, Sequence[str]]
    sources: tuple[tuple[str, str], ...]
    plan: Plan | None

    @classmethod
    def of(cls, plan: Plan) -> _SharedPlan:
        """The same as a plan."""
        specs = {n: TensorSpec(n, plan.output_dtype(n), plan.newest.stored[n].shape) for n in plan.tensors}
        sources = (
            (source.name, source.header.metadata["ema.checksum"] if isinstance(source, Snapshot) else "")
            for source in plan.sources
        )
        return cls(specs, plan.names, tuple(sources), replace(plan, sources=(), targets=()))

    @classmethod
    def of_live(cls, source: LiveSource) -> _SharedPlan:
        """A live average as it is."""
        names = {name: [name] for name in source.stored}
        for alias, name in source.info.aliases.items():
            names[name].append(alias)
        return cls({**source.stored}, names, ((source.name, ""),), None)


@dataclass(frozen=True)
class _Boxes:
    """A source of a synthesis: boxes of a snapshot's tensors as if they were tensors."""

    snapshot: Snapshot
    boxes: Mapping[str, Box]

    @property
    def name(self) -> str:
        return self.snapshot.name

    @property
    def info(self) -> SnapshotInfo:
        return self.snapshot.info

    @property
    def profile(self) -> PowerFunction:
        return self.snapshot.profile

    @property
    def stored(self) -> Mapping[str, TensorSpec]:
        entries = self.snapshot.stored
        return {name: TensorSpec(name, entries[name].dtype, box.shape) for name, box in self.boxes.items()}

    def open(self) -> AbstractContextManager[TensorReader]:
        return self.snapshot.open(self.boxes)


def _make_chunks(
    group: Group, shared: _SharedPlan, target: Target | None, live: Sequence[LiveSource], tracked: TrackedModel,
    model: torch.nn.Module, directory: Path,
) -> Weights:  # fmt: skip
    """What this process holds of each tensor that is made, under all names, on the host. Every process calls it.

    Arguments:
        group: the processes that call.
        shared: what is made.
        target: of the plan; None for a live average.
        live: the live averages here.
        tracked: what this process owns.
        model: whose parameters are spread as those of the tracked model.
        directory: of the snapshots.
    """
    members = tracked.members
    assert members is not None
    tensors = {found.name: found.tensor for found in named_tensors(check_model(model))}
    own = group.together(lambda: _own_chunks(shared, target, live, tracked, tensors, directory))
    made = Weights()
    for name in sorted(shared.specs):  # in one order in all processes
        value = own.get(name)
        if value is None:
            shape = held_part(tensors[name]).shape
            value = torch.empty(shape, dtype=torch_dtype(shared.specs[name].dtype))
        group.exchange(value, members.holders.get(name, ()))
        for alias in shared.names[name]:
            made[alias] = value
    if shared.plan is not None and target is not None:
        plan = replace(shared.plan, targets=(target,))
        made.predicted_error, made.profile_error = plan.predicted_error(0), plan.profile_error(0)
    return made


@torch.inference_mode(False)
@torch.no_grad()
def _own_chunks(
    shared: _SharedPlan, target: Target | None, live: Sequence[LiveSource], tracked: TrackedModel,
    model: Mapping[str, torch.Tensor], directory: Path,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The chunks that this process owns of tensors that the model has, too."""
    boxes = {name: tracked.box(name) for name in shared.specs if name in tracked.chunks}
    for name, spec in shared.specs.items():
        _check_spread(name, spec.shape, boxes.get(name), model)
    if not boxes:
        return {}
    at_hand = {source.name: source for source in live}
    sources: list[Source] = [
        _Boxes(_read_again(directory / name, checksum), boxes) if checksum else at_hand[name]
        for name, checksum in shared.sources
    ]
    if shared.plan is None or target is None:
        made = {name: tensor for name, tensor in at_hand[shared.sources[0][0]].tensors.items() if name in boxes}
    else:
        plan = replace(shared.plan, sources=tuple(sources), targets=(target,), subset=frozenset(boxes))
        made = {name: value for name, (value,) in synthesize(plan) if name in boxes}
    return made


def _check_spread(name: str, shape: tuple[int, ...], box: Box | None, model: Mapping[str, torch.Tensor]) -> None:
    """Raise a ModelMismatchError unless a model has the tensor, and here the chunk of it that this process owns."""
    if name not in model:
        raise ModelMismatchError(f"tensor {name!r}", "is in the averaged weights, but the model has no such tensor")
    if tuple(model[name].shape) != shape:
        reason = f"has the shape {list(model[name].shape)} in the model, {list(shape)} in the averaged weights"
        raise ModelMismatchError(f"tensor {name!r}", reason)
    local, chunk = local_part(name, model[name])
    here = (chunk or Chunk(shape, (0,) * len(shape))).box(tuple(local.shape))
    if box not in (None, here):
        reason = "is spread over the processes in another way than in the tracked model"
        raise ModelMismatchError(f"tensor {name!r}", reason)


def _read_again(path: Path, checksum: str) -> Snapshot:
    """The snapshot that rank 0 has planned with."""
    try:
        snapshot = read_snapshot(path)
    except FileFormatError as error:
        if files.is_gone(path):
            raise VanishedError(path, "was removed while it was being used") from error
        raise
    if snapshot.header.metadata["ema.checksum"] != checksum:
        raise FileFormatError(path, "was replaced while it was being used", "run again")
    return snapshot


def as_dtensors(chunks: Weights, model: torch.nn.Module) -> Weights:
    """The same with DTensors in place of chunks, spread as the model's parameters."""
    made = _like(chunks)
    for found in named_tensors(model):
        if found.name in chunks:
            made[found.name] = as_dtensor(chunks[found.name], found.tensor)
    return made


def gathered(chunks: Weights, model: torch.nn.Module, members: Members, group: Group) -> Weights:
    """In rank 0 the complete tensors, one after the other on the host; in the others none."""
    tensors = {found.name: found.tensor for found in named_tensors(model) if found.name in chunks}
    own = {}
    for name in members.owned & chunks.keys():
        _, chunk = local_part(name, tensors[name])
        if chunk is not None:
            own[name] = chunk.box(tuple(chunks[name].shape))
    places = group.from_all(own)
    made = _like(chunks)
    whole: dict[int, torch.Tensor] = {}  # by the chunk that its names share
    for name in sorted(chunks):
        value, boxes = chunks[name], {rank: held[name] for rank, held in enumerate(places) if name in held}
        if is_sharded(tensors[name]) and boxes:
            whole[id(value)] = _gather(value, tensors[name].shape, boxes, group)
    for name in chunks if group.leads else ():
        made[name] = whole.get(id(chunks[name]), chunks[name])
    return made


def _gather(value: torch.Tensor, shape: tuple[int, ...], boxes: Mapping[int, Box], group: Group) -> torch.Tensor:
    """In rank 0 the complete tensor of the chunks that these ranks hold, in each of them `value`."""
    complete = torch.empty(shape if group.leads else (0,), dtype=value.dtype)
    for rank, box in boxes.items():
        if group.rank in (0, rank):
            part = value if group.rank == rank else torch.empty(box.shape, dtype=value.dtype)
            group.exchange(part, sorted({0, rank}, reverse=True))
            if group.leads:
                complete[tuple(map(slice, box.offset, box.end))] = part
    return complete


def _like(chunks: Weights) -> Weights:
    made = Weights()
    made.predicted_error, made.profile_error = chunks.predicted_error, chunks.profile_error
    return made
