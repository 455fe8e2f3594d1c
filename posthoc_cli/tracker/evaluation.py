"""One call for averaged weights: from snapshots and live averages, in one process or in all that make the call.

The first process makes the plan, of a sharded model from measurements that all have taken of their own chunks, and
tells the others. Each makes what it owns: of replicas the first one everything, of a sharded model its chunks, from the
boxes of the snapshots that it needs. The others that hold the same elements get them from their owner. An error of one
process is raised in all of them before a model has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.run import Wanted, Weights, make_weights, with_consistent_plan
from posthoc_cli.snapshots.chunks import Box
from posthoc_cli.snapshots.directory import StoredSnapshot, read_snapshot, sum_of_parts
from posthoc_cli.snapshots.format import SnapshotInfo, TensorSpec
from posthoc_cli.snapshots.reading import TensorReader
from posthoc_cli.snapshots.sources import Snapshot, Source
from posthoc_cli.synthesis.engine import check_device
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.targets import Target, as_target
from posthoc_cli.tracker.model_tensors import TrackedModel, collect_tensors, named_tensors
from posthoc_cli.tracker.model_weights import check_weights, copied_weights, fill, fill_model, on_disk
from posthoc_cli.tracker.pipeline import Pipeline
from posthoc_cli.tracker.sharding import (
    Group,
    Owners,
    as_dtensor,
    held_box,
    held_part,
    is_sharded,
    reshard,
)
from posthoc_cli.tracker.snapshotter import (
    LiveSource,
    measured,
    run_snapshots,
    with_older,
)
from posthoc_cli.tracker.tracker import Tracker

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
class Recipe:
    """How averages are made, as the first process tells the others.

    Attributes:
        specs: of the stored tensors of each average, complete.
        names: every name of each of them, its own first.
        sources: name and header checksum of each; no checksum of a live average.
        plan: without sources and targets; None where all averages are refused.
        errors: the predicted and the profile's error of each average.
        refused: why some averages cannot be made yet, by label.
    """

    specs: Mapping[str, TensorSpec]
    names: Mapping[str, Sequence[str]]
    sources: tuple[tuple[str, str], ...]
    plan: Plan | None
    errors: Sequence[tuple[float | None, float]]
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_plan(cls, plan: Plan, refused: dict[str, str]) -> Recipe:
        """The same as a plan."""
        specs = {n: TensorSpec(n, plan.output_dtype(n), plan.newest.stored[n].shape) for n in plan.tensors}
        sources = (
            (source.name, source.header.metadata["ema.checksum"] if isinstance(source, Snapshot) else "")
            for source in plan.sources
        )
        errors = [(plan.predicted_error(index), plan.profile_error(index)) for index in range(len(plan.targets))]
        return cls(specs, plan.names, tuple(sources), replace(plan, sources=(), targets=()), errors, refused)


@dataclass(frozen=True)
class Evaluation:
    """What a tracker's averages are at one call, which all processes of the group make: the first one makes everything.

    Attributes:
        tracker: that has them.
        group: the processes that make this call together.
        model: to be filled; of a sharded one it says which chunks are here.
    """

    tracker: Tracker
    group: Group
    model: torch.nn.Module | None

    def weights(self, query: Query) -> Weights:
        """An average, or of a sharded model the chunks of it that this process holds.

        Before the first update it is the weights as they are, with a warning, as of the other two.
        """
        return self._one(query, lambda sources: self._plan_from(sources, query))

    def each(self, wanted: Mapping[str, Target]) -> tuple[dict[str, Callable[[], Weights]], dict[str, str]]:
        """By label what gives each of several averages, as they are now, and why others cannot be made yet.

        They are made here, in one pass; several wait on disk.
        """

        def recipe(sources: list[Source]) -> Recipe:
            plan, refused = plan_possible(self._some(sources), wanted)
            return Recipe({}, {}, (), None, (), refused) if plan is None else Recipe.of_plan(plan, refused)

        return self._made(wanted, recipe)

    def live_weights(self, index: int) -> Weights:
        """The same as `weights` of the live average of the tracked profile of this index, as it is."""

        query, tracked = Query(self.tracker.settings.sigma_rels[index]), self._pipeline.now.tracked
        wide = torch.float64 if torch.float64 in tracked.dtypes(copied=False).values() else torch.float32

        def plan(live: list[Source]) -> Plan:
            if not live:
                raise self._not_yet("live average")
            log.info("live average of sigma_rel %g at t = %.12g: exact", query.wanted, live[index].info.t)
            return plan_synthesis([live[index]], [query.wanted], dtype=wide)

        return self._one(query, plan, live_only=True)

    def check(self, weights: Weights, own_dtypes: bool = True) -> None:
        """Raise in all processes if the weights do not fit the model in one. Alone, `swapped_in` checks it."""
        model = self.model
        if not self.group.is_alone and model is not None:
            self.group.together(lambda: check_weights(model, weights, own_dtypes))

    def fill(self, query: Query, device: torch.device | str) -> None:
        """Fill the model with an average for good, also one on the meta device; alone tensor by tensor."""
        model = self.model
        assert model is not None
        if self.group.is_alone and self.tracker.has_average:
            with_consistent_plan(
                lambda: self._plan_from(self.sources(), query), lambda plan: fill_model(model, plan, device)
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
        """The result of work on snapshots and live averages of complete tensors, of the first process, in each."""
        _, find = self._found()
        return self.group.from_first(lambda: work(find()))

    def _raw(self, dtype: torch.dtype | str | None) -> Weights:
        """The weights as they are, of the tracked model or this one, with a warning."""
        own, settings = self.tracker._tracked_model(self.model), self.tracker.settings
        if own is None:
            raise NotReadyError("no average yet", "the model that is tracked is gone")
        every, after = settings.schedule.update_every, settings.schedule.update_after_step
        given = f"update_every={every}, update_after_step={after}"
        if self.tracker._is_first("raw weights"):
            warn(f"no average yet, but the weights as they are: {settings.first_update(0)} ({given})")
        return copied_weights(collect_tensors(own, settings.selection), dtype)

    # --- what averages are made of

    @property
    def _pipeline(self) -> Pipeline:
        return self.tracker._pipeline

    def _found(self, live_only: bool = False) -> tuple[dict[str, Source], Callable[[], list[Source]]]:
        """The sources at hand here by name, and what gives the first process those of complete tensors to plan with."""
        at_hand: dict[str, Source] = {}

        def find() -> list[Source]:
            found = self.sources(live_only)
            at_hand.update((source.name, source) for source in found)
            return found

        return at_hand, find

    def sources(self, live_only: bool = False) -> list[Source]:
        """The snapshots and live averages of complete tensors that there are now."""
        if not (self._pipeline.now.resumes or self.tracker.keeps_averages):
            raise NotReadyError(
                "this process keeps no averages, the first one of its group does",
                "make the call in all processes of the group, without alone=True; or read the snapshots on disk with a "
                "new PostHocEMA.from_path(directory), before any update_ of it",
            )
        self.tracker.flush()
        if live_only:
            return [*self._pipeline.live()]
        live, snapshots = self._pipeline.live(), run_snapshots(self.tracker.checkpoint_dir, self.tracker.run_id)
        return self._going_on(with_older(measured(live, [*map(StoredSnapshot.of, snapshots)]), snapshots))

    def _going_on(self, sources: list[Source]) -> list[Source]:
        """Without those that are later than where the run goes on from."""
        if self._pipeline.now.resumes and self.tracker._start.step is not None:
            return [source for source in sources if source.info.step <= self.tracker._start.step]
        return sources

    def _plan_from(self, sources: list[Source], query: Query) -> Plan:
        plan = plan_synthesis(self._some(sources), [query.wanted], query.t, query.step, query.method, dtype=query.dtype)
        return _logged(plan)

    def _some(self, sources: list[Source]) -> list[Source]:
        """The same, or a NotReadyError if there are none."""
        if not sources:
            raise self._not_yet("average")
        return sources

    def _not_yet(self, what: str) -> NotReadyError:
        reason = f"{self.tracker.settings.first_update(self.tracker.step)}, so far {self.tracker.step:,}"
        hint = "model(model, sigma_rel=...) reads the snapshots"
        return NotReadyError(f"no {what} yet", reason, hint * (what == "live average" and self._pipeline.now.resumes))

    # --- making them

    def _one(self, query: Query, plan: Callable[[list[Source]], Plan], live_only: bool = False) -> Weights:
        """One average, as the first process plans it."""
        wanted = {"": as_target(query.wanted)}
        made, _ = self._made(wanted, lambda sources: Recipe.of_plan(plan(sources), {}), query.dtype, live_only)
        return made[""]()

    def _made(
        self,
        wanted: Mapping[str, Target],
        recipe: Callable[[list[Source]], Recipe],
        dtype: torch.dtype | str | None = None,
        live_only: bool = False,
    ) -> tuple[dict[str, Callable[[], Weights]], dict[str, str]]:
        """Make what this process owns of averages; gives what exchanges each by label, and what the recipe refuses."""
        if not self.group.from_first(lambda: self.tracker.has_average):
            raw = self._raw(dtype)
            return dict.fromkeys(wanted, lambda: raw), {}

        def tell() -> tuple[Recipe, dict[str, Source]]:
            at_hand, find = self._found(live_only)
            return self.group.from_first(lambda: recipe(find())), at_hand

        def make(told: tuple[Recipe, dict[str, Source]]) -> tuple[Recipe, dict[str, Weights]]:
            shared, at_hand = told
            targets = {label: target for label, target in wanted.items() if label not in shared.refused}
            own = self.group.together(lambda: self._own(shared, [*targets.values()], at_hand))
            return shared, dict(zip(targets, own, strict=True))

        shared, made = with_consistent_plan(tell, make)
        given = zip(made.items(), shared.errors, strict=True)
        return {label: partial(self._exchanged, shared, own, errors) for (label, own), errors in given}, shared.refused

    def _own(self, shared: Recipe, targets: Sequence[Target], at_hand: Mapping[str, Source]) -> list[Weights]:
        """What this process makes of each average: the first one everything."""
        if not self.group.leads:
            return [Weights() for _ in targets]
        return self._synthesized(shared, targets, [at_hand[name] for name, _ in shared.sources])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _synthesized(
        self, shared: Recipe, targets: Sequence[Target], sources: Sequence[Source], subset: frozenset[str] | None = None
    ) -> list[Weights]:
        """These averages from these sources, or a subset of their tensors."""
        if shared.plan is None:
            return []
        plan = replace(shared.plan, sources=tuple(sources), targets=tuple(targets), subset=subset)
        return [make_weights(plan)] if len(targets) == 1 else on_disk(plan, self.tracker.checkpoint_dir)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _exchanged(self, shared: Recipe, own: Weights, errors: tuple[float | None, float]) -> Weights:
        """What this process holds of an average, under all names, on the host: what others made, too."""
        made, holds = Weights(), self._holding()
        made.predicted_error, made.profile_error = errors
        for name, spec in shared.specs.items():
            shape, ranks = holds(spec)
            value = own.get(name)
            if value is None:
                value = torch.empty(shape, dtype=torch_dtype(spec.dtype))
            self.group.exchange(value, ranks)
            made.update(dict.fromkeys(shared.names[name], value))
        return made

    def _holding(self) -> Callable[[TensorSpec], tuple[Sequence[int], Sequence[int]]]:
        """Which shape this process holds of a tensor, and the ranks that hold the same elements, their maker first."""
        return lambda spec: (spec.shape, self.group.ranks)


@dataclass(frozen=True)
class ChunkEvaluation(Evaluation):
    """As above of a sharded model: each process makes the chunks that it owns."""

    def fill(self, query: Query, device: torch.device | str) -> None:
        """Fill the chunks here with those of an average for good."""
        self._fill_at_once(query, device, accept_meta=False)

    def _found(self, live_only: bool = False) -> tuple[dict[str, Source], Callable[[], list[Source]]]:
        """As above; at hand are the live averages of the chunks here."""
        own, joined = self._joined_live()

        def find() -> list[Source]:
            older = [] if live_only else run_snapshots(self.tracker.checkpoint_dir, self.tracker.run_id)
            return self._going_on(with_older(joined, older))

        return {source.name: source for source in own}, find

    def _joined_live(self) -> tuple[list[LiveSource], list[LiveSource]]:
        """The live averages here and, measured by all processes together, without values, those of complete tensors."""

        def measure_own() -> list[LiveSource]:
            self.tracker.flush()
            snapshotter = self._pipeline.snapshotter
            return measured(self._pipeline.live(), [] if snapshotter is None else snapshotter.stored())

        own, progress = self.group.together(measure_own), self._pipeline.progress
        told = [(source.info, dict(source.stored)) for source in own]
        parts = self.group.from_all_at(progress.step, progress.t, told)
        return own, [_joined(profile) for profile in zip(*filter(None, parts), strict=True)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _own(self, shared: Recipe, targets: Sequence[Target], at_hand: Mapping[str, Source]) -> list[Weights]:
        """What this process makes of each average: the chunks that it owns, checked."""
        tracked, tensors = self._pipeline.now.tracked, self._tensors()
        boxes = {name: tracked.box(name) for name in shared.specs if name in tracked.chunks}
        if not boxes:
            return [Weights() for _ in targets]
        for name in boxes:
            _check_spread(name, tracked, tensors.get(name))
        directory = self.tracker.checkpoint_dir
        sources = [
            at_hand[name] if name in at_hand else _Boxes.of(_read_again(directory / name, checksum), boxes)
            for name, checksum in shared.sources
        ]
        return self._synthesized(shared, targets, sources, frozenset(boxes))

    def _holding(self) -> Callable[[TensorSpec], tuple[Sequence[int], Sequence[int]]]:
        """As above: of the chunks here."""
        tensors, members = self._tensors(), self._pipeline.now.tracked.members
        assert isinstance(members, Owners)
        holders = members.holders
        return lambda spec: (
            held_part(tensors[spec.name]).shape if spec.name in tensors else spec.shape,
            holders.get(spec.name, ()),
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Those of the model by name, of which this process holds its chunks again."""
        assert self.model is not None
        reshard(self.model)
        return {found.name: found.tensor for found in named_tensors(self.model)}


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


@dataclass(frozen=True)
class _Boxes:
    """A source of a synthesis: boxes of a snapshot's tensors as if they were tensors."""

    name: str
    info: SnapshotInfo
    profile: PowerFunction
    stored: Mapping[str, TensorSpec]
    open: Callable[[], AbstractContextManager[TensorReader]]

    @classmethod
    def of(cls, snapshot: Snapshot, boxes: Mapping[str, Box]) -> _Boxes:
        """These boxes of a snapshot."""
        stored = {name: TensorSpec(name, snapshot.stored[name].dtype, box.shape) for name, box in boxes.items()}
        return cls(snapshot.name, snapshot.info, snapshot.profile, stored, partial(snapshot.open, boxes))


def _check_spread(name: str, tracked: TrackedModel, tensor: torch.Tensor | None) -> None:
    """Raise a ModelMismatchError unless a model holds the chunk here that this process owns."""
    expected = tracked.complete_shape(name), tracked.box(name)
    if tensor is not None and (tuple(tensor.shape), held_box(name, tensor)[1]) == expected:
        return
    reason = "is missing in the model, of another shape, or spread over the processes in another way than when tracked"
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


def as_dtensors(chunks: Weights, model: torch.nn.Module, full: bool = False) -> Weights:
    """The same with DTensors in place of chunks, spread as the model's parameters, on the host.

    With `full` complete tensors in rank 0, gathered one after the other, and none in the others.
    """
    made = Weights()
    made.predicted_error, made.profile_error = chunks.predicted_error, chunks.profile_error
    leads = torch.distributed.get_rank() == 0
    done: dict[int, torch.Tensor] = {}  # by the chunk that its names share
    for found in named_tensors(model):
        chunk = chunks.get(found.name)
        if chunk is None:
            continue
        if id(chunk) not in done:
            value: Any = as_dtensor(chunk, found.tensor)
            if full and is_sharded(value):
                whole = value.to(value.device_mesh.device_type).full_tensor()
                value = whole.cpu() if leads else chunk
            done[id(chunk)] = value
        if leads or not full:
            made[found.name] = done[id(chunk)]
    return made
