"""The average that several processes ask for together.

For replicas the first process makes it, and sends it to the others. For a sharded model each
process fills its chunks: for a tracked length from its own averages, which holders of the same
elements receive from the one that keeps them; for other lengths from snapshots, by a plan of the
first process. An error in one process is raised in all of them before a model has changed.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posthoc_cli import files
from posthoc_cli.dtypes import EPS, parse_dtype, torch_dtype
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    ModelMismatchError,
    NotReadyError,
    RefusedCallError,
    VanishedError,
)
from posthoc_cli.group import Group
from posthoc_cli.reconstruction import ROUNDING, check_method
from posthoc_cli.request import Request
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.directory import find_snapshots, read_snapshot
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.source import Source
from posthoc_cli.snapshots.sources import Sources, use
from posthoc_cli.snapshots.tensorfile import TensorFile
from posthoc_cli.synthesis.plan import Plan, announce_plan, plan_synthesis
from posthoc_cli.synthesis.weights import Weights, make_weights
from posthoc_cli.targets import Target, Wanted, as_target
from posthoc_cli.tracker.model import TrackedModel, named_tensors
from posthoc_cli.tracker.pipeline import Pipeline
from posthoc_cli.tracker.processes import (
    ShardOwners,
    local_box,
    local_part,
    reshard,
)
from posthoc_cli.tracker.resume import Start

Dtype = torch.dtype | str | None


def plan_possible(
    sources: Sequence[Source],
    targets: Mapping[str, Target],
) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plan averages by label, and say why others cannot be made yet, such as a window longer than
    the run so far."""
    plans = dict[str, Plan]()
    refusals = dict[str, str]()
    for label, target in targets.items():
        try:
            plans[label] = plan_synthesis(sources, Request(target))
        except InvalidValueError as error:
            refusals[label] = str(error)
    return plans, refusals


def conversion_error(dtypes: Mapping[str, torch.dtype], boxes: Mapping[str, Box]) -> float:
    """Predict the relative error of rounding averages of these sizes to narrower dtypes than
    float32, if all elements are equally large."""
    total = 0
    squares = 0.0
    for name, dtype in dtypes.items():
        size = boxes[name].size
        total += size
        spacing = torch.finfo(dtype).eps
        if spacing > EPS["F32"]:
            squares += size * (ROUNDING * spacing) ** 2
    return math.sqrt(squares / max(1, total))


@torch.inference_mode(False)
@torch.no_grad()
def from_first(
    group: Group,
    make: Callable[[], Weights],
) -> Weights:
    """Make weights in the first process, and return them in every process, with names that share a
    tensor."""
    if group.is_alone:
        return make()
    own: list[Weights] = []  # in the first process

    def outline() -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights = make()
        own.append(weights)
        return _without_values(weights), vars(weights)

    shapes, attributes = group.from_first(outline)
    weights = Weights()
    vars(weights).update(attributes)
    sent: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        if id(shape) not in sent:
            value = own[0][name] if own else torch.empty_like(shape, device="cpu")
            group.broadcast(value, group.ranks)
            sent[id(shape)] = value
        weights[name] = sent[id(shape)]
    return weights


def _without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make tensors of these dtypes and shapes on the meta device, without values."""
    empty = {id(tensor): tensor.to("meta") for tensor in tensors.values()}
    return {name: empty[id(tensor)] for name, tensor in tensors.items()}


# --- chunks of a sharded model


def index_chunks(
    model: nn.Module,
    tracked: TrackedModel,
) -> dict[str, Tensor]:
    """Find a sharded model's tensors by name; raise a ModelMismatchError if an owned chunk is not
    where it was when it was tracked."""
    reshard(model)
    tensors = {tensor.name: tensor.tensor for tensor in named_tensors(model)}
    for name, box in tracked.boxes.items():
        tensor = tensors.get(name)
        actual = None
        if tensor is not None:
            _, own_box = local_box(name, tensor)
            actual = tuple(tensor.shape), own_box
        if actual != (tracked.shapes[name], box):
            where = "spread over the processes in another way than when tracked"
            reason = f"is missing in the model, of another shape, or {where}"
            raise ModelMismatchError(f"tensor {name!r}", reason)
    return tensors


@torch.inference_mode(False)
@torch.no_grad()
def with_replicas(
    group: Group,
    own: Weights,
    tensors: Mapping[str, Tensor],
    members: ShardOwners,
) -> Weights:
    """Collect the chunks of all `tensors` that this process holds, from its `own` averages and from
    other processes."""
    own_dtypes = {name: value.dtype for name, value in own.items()}
    answers = group.from_all((own_dtypes, vars(own)))
    dtype = ChainMap(*[dtypes for dtypes, _ in answers])
    weights = Weights(own)
    for _, attributes in answers:
        vars(weights).update(attributes)
    for name in sorted(members.holders):  # in the same order in all processes
        value = own.get(name)
        if value is None:
            value = _empty_part(tensors[name], dtype[name])
        group.broadcast(value, members.holders[name])
        weights[name] = value
    _add_names(weights, tensors, dtype)
    return weights


def _add_names(
    weights: Weights,
    tensors: Mapping[str, Tensor],
    dtype: Mapping[str, torch.dtype],
) -> None:
    """Add further names of tied tensors, and chunks without elements."""
    names = {id(tensors[name]): name for name in weights}
    for name, tensor in tensors.items():
        if id(tensor) not in names and name in dtype:
            weights[name] = _empty_part(tensor, dtype[name])
            names[id(tensor)] = name
        elif id(tensor) in names:
            weights[name] = weights[names[id(tensor)]]


def _empty_part(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(local_part(tensor).shape, dtype=dtype)


def _read_again(path: Path, checksum: str) -> Snapshot:
    """Read the header of a snapshot that the first process has planned with; raise an error if the
    snapshot was replaced."""
    try:
        snapshot = read_snapshot(path)
    except FileFormatError as error:
        if files.is_absent(path):
            raise VanishedError(path, "was removed while it was being used") from error
        raise
    if snapshot.identity != checksum:
        raise FileFormatError(path, "was replaced while it was being used", "run again")
    return snapshot


@dataclass(frozen=True)
class SentPlan:
    """A plan as the first process sends it: without its target, which may be a user's object, and
    with the newest header as its only source."""

    plan: Plan
    used: Sequence[tuple[str, str]]  # the name and the identity of each source
    identity: str  # of the sources that it was made from


def reduce_to_send(plan: Plan, sources: Sources) -> SentPlan:
    """Reduce a plan from these sources to what the first process sends."""
    newest: Any = plan.newest
    header = replace(newest, files=(), sketch="", sample="")
    nothing: Any = None  # of the sources, which the others read anew
    used = [(source.name, source.identity) for source in plan.sources]
    return SentPlan(
        replace(plan, sources=(header,), targets=(), chosen=nothing), used, sources.identity
    )


@dataclass(frozen=True)
class _ReceivedPlan:
    """A plan that the first process has sent, and may send again."""

    sent: SentPlan
    receive: Callable[[], SentPlan]

    @property
    def identity(self) -> str:
        return self.sent.identity

    @property
    def files(self) -> list[TensorFile]:
        return [file for source in self.sent.plan.sources for file in source.files]

    def again(self) -> _ReceivedPlan:
        return replace(self, sent=self.receive())


@torch.inference_mode(False)
@torch.no_grad()
def read_chunks(
    group: Group,
    sent: SentPlan,
    length: Wanted,
    tensors: Mapping[str, Tensor],
    directory: Path,
) -> Weights:
    """Read the chunks of all `tensors` that this process holds from snapshots in a directory."""
    plan = sent.plan
    boxes: dict[str, Box] = {}
    for name, tensor in tensors.items():
        if name in plan.newest.tensors:  # else of another name, or not tracked
            boxes[name] = local_box(name, tensor)[1]

    def make() -> Weights:
        sources = tuple(_read_again(directory / name, checksum) for name, checksum in sent.used)
        target = as_target(length)
        own = replace(
            plan, sources=sources, targets=(target,), boxes=boxes, subset=frozenset(boxes)
        )
        return make_weights(own)

    return group.together(make)


# --- one average: a tracked one from memory, any other from snapshots


class AverageReader:
    """Reads averages for a tracker in the processes that ask together: of the tracked lengths from
    memory, of any other from snapshots."""

    def __init__(self, start: Start, pipeline: Pipeline) -> None:
        self._start = start
        self._directory = start.directory
        self._settings = start.settings
        self._members = start.tracking.tracked.members
        self._pipeline = pipeline

    @property
    def has_average(self) -> bool:
        """Whether an update has been due."""
        if self._pipeline.tracking.resumes:
            return self._start.step != 0
        return self._pipeline.progress.updated > 0

    def find_refusals(self, targets: Mapping[str, Target]) -> dict[str, str]:
        """Say of each target by label why there can be no average yet, in all processes that make
        the call."""
        group = self._callers({})
        group.together(self._pipeline.flush)
        return group.from_first(lambda: self._find_refusals(targets))

    def _find_refusals(self, targets: Mapping[str, Target]) -> dict[str, str]:
        if not self.has_average:
            reason = self._settings.first_update(self._pipeline.progress.step)
            return dict.fromkeys(targets, reason)
        others = {}
        for label, target in targets.items():
            if self._tracked_profile(target, {}) is None:
                others[label] = target
        stored = self._list_stored() if others else []
        if not stored:
            return dict.fromkeys(others, "no snapshot yet")
        _, reasons = plan_possible(stored, others)
        return reasons

    def predict_errors(self, targets: Sequence[Target]) -> dict[str, float]:
        """Predict the errors of averages at the newest snapshot, by label, without waiting."""
        by_label = {target.label: target for target in targets}
        snapshots = self._list_stored() if targets else []
        plans, _ = plan_possible(snapshots, by_label if snapshots else {})
        errors = {}
        for label, plan in plans.items():
            error = plan.predicted_error(0)
            if error is not None:
                errors[label] = error
        return errors

    def read(
        self,
        model: nn.Module | None,
        length: Wanted,
        given: Mapping[str, Any],
    ) -> tuple[Group, Weights]:
        """Make an average, in the processes that make the call; for a sharded `model` the chunks in
        this process."""
        asked = {name: value for name, value in given.items() if value is not None}
        group = self._callers(asked)
        if not group.from_first(lambda: self.has_average):
            step = self._pipeline.progress.step
            reason = f"has no average yet: {self._settings.first_update(step)}, so far {step:,}"
            raise NotReadyError(self._directory, reason, "has_average says when there is one")
        profile = self._tracked_profile(length, asked)
        if self._members.is_chunked:
            assert model is not None
            return group, self._chunks(group, model, length, profile, asked)

        def make() -> Weights:
            if profile is not None:
                return self._from_memory(profile, asked.get("dtype"))

            def average(sources: Sources) -> Weights:
                plan = plan_synthesis(sources, Request(length, **asked))
                announce_plan(plan)
                return make_weights(plan)

            return use(self._take_durable(), average)

        return group, from_first(group, make)

    def _tracked_profile(
        self,
        length: Wanted,
        asked: Mapping[str, Any],
    ) -> int | None:
        """Find the index of the tracked length that is wanted at the present time, else None."""
        sigma_rel = as_target(length).sigma_rel
        if sigma_rel is None or self._pipeline.tracking.resumes or {"t", "step"} & asked.keys():
            return None
        for index, tracked in enumerate(self._settings.sigma_rels):
            if math.isclose(sigma_rel, tracked, rel_tol=1e-6):  # float32's
                return index
        return None

    def _from_memory(self, profile: int, dtype: Dtype) -> Weights:
        """Read a tracked average as it is now, rounded once; for a sharded model this process's
        part."""
        if not self._members.keeps:
            reason = "this process keeps no averages, the first one of its group does"
            hint = "read the snapshots with PostHocEMA.from_path"
            raise RefusedCallError(self._directory, reason, hint)
        self._pipeline.flush()
        tracked = self._pipeline.tracking.tracked
        stored = parse_dtype(dtype)
        own = tracked.dtypes(copied=False)
        if stored is not None:
            own = dict.fromkeys(own, torch_dtype(stored))
        weights = Weights(self._pipeline.read(profile, own))
        for alias, name in tracked.aliases.items():
            weights[alias] = weights[name]
        weights.t = self._pipeline.progress.t
        converted = conversion_error(own, tracked.boxes)
        weights.predicted_error = math.hypot(self._pipeline.predict_error(profile), converted)
        return weights

    def _chunks(
        self,
        group: Group,
        model: nn.Module,
        length: Wanted,
        profile: int | None,
        asked: Mapping[str, Any],
    ) -> Weights:
        """Make the chunks in this process of an average of a sharded model."""
        tracked = self._pipeline.tracking.tracked
        tensors = group.together(lambda: index_chunks(model, tracked))
        members: Any = self._members
        if profile is not None:

            def own() -> Weights:
                return (
                    self._from_memory(profile, asked.get("dtype")) if members.keeps else Weights()
                )

            return with_replicas(group, group.together(own), tensors, members)
        group.together(self._pipeline.flush)

        def plan() -> SentPlan:
            sources = self._take_durable()
            made = plan_synthesis(sources, Request(length, **asked))
            announce_plan(made)
            return reduce_to_send(made, sources)

        def read_plan(received: _ReceivedPlan) -> Weights:
            return read_chunks(group, received.sent, length, tensors, self._directory)

        receive = partial(group.from_first, plan)
        return use(_ReceivedPlan(receive(), receive), read_plan)

    def _take_durable(self) -> Sources:
        """Take the run's durable snapshots, at least one: the writer's from its memory."""
        self._pipeline.flush()
        known = self._pipeline.known_snapshots
        if not known:
            return self._read_durable()
        sources = Sources.of(known)
        return replace(sources, read=partial(self._take_again, sources.identity))

    def _take_again(self, identity: str) -> Sources:
        """Take them again; if they are the same, somebody else has deleted one, and the directory
        says what is left."""
        sources = self._take_durable()
        return self._read_durable() if sources.identity == identity else sources

    def _read_durable(self) -> Sources:
        """Read the run's durable snapshots, at least one."""
        stored = self.read_stored()
        if not stored:
            reason = "has no snapshot yet, and other lengths than the tracked ones are made of them"
            raise NotReadyError(self._directory, reason, "ema.snapshot() writes one")
        return Sources(self._directory, tuple(stored), self._read_durable)

    def _list_stored(self) -> Sequence[Snapshot]:
        """List the run's snapshots: the writer's from its memory."""
        return self._pipeline.known_snapshots or self.read_stored()

    def read_stored(self) -> list[Snapshot]:
        """Read the run's snapshots on disk, up to the step from which it is to resume; none if the
        directory belongs to another run."""
        last = self._start.step if self._pipeline.tracking.resumes else None
        snapshots = find_snapshots(self._directory)
        if last is not None:
            snapshots = [snapshot for snapshot in snapshots if snapshot.step <= last]
        run_id = self._pipeline.tracking.run_id
        return [snapshot for snapshot in snapshots if snapshot.run_id == run_id]

    def _callers(self, asked: Mapping[str, Any]) -> Group:
        """Find the processes that make a call for averages, after checking its options."""
        check_method(asked.get("method"))
        parse_dtype(asked.get("dtype"))
        return self._members.callers(is_tracking=not self._pipeline.tracking.resumes)
