"""The average that a tracker is asked for, made by one process, or by several that make the call together.

The first process makes the plan, of a sharded model for complete tensors, and sends it to the others. Each makes what
it owns: of replicas the first one everything, of a sharded model its chunks, from the boxes of the snapshots that it
needs. Other holders of the same elements receive them from their owner. An error in one process is raised in all of
them before a model has changed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

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
from posthoc_cli.snapshots.directory import find_snapshots, read_snapshot, sum_of_parts
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import Entry
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.targets import Target, as_target
from posthoc_cli.tracker.filling import copied_weights
from posthoc_cli.tracker.model import TrackedModel, collect_tensors, named_tensors
from posthoc_cli.tracker.pipeline import Pipeline
from posthoc_cli.tracker.processes import (
    Group,
    Members,
    ShardOwners,
    as_dtensor,
    held_box,
    held_part,
    is_sharded,
    reshard,
)
from posthoc_cli.tracker.resuming import Start
from posthoc_cli.tracker.snapshotter import LiveSource
from posthoc_cli.tracker.state import Settings

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """The members of `PostHocEMA` that its averages are made with."""

    checkpoint_dir: Path
    settings: Settings
    _members: Members
    _pipeline: Pipeline
    _start: Start

    @property
    def run_id(self) -> str: ...  # noqa: D102

    @property
    def step(self) -> int: ...  # noqa: D102

    @property
    def has_average(self) -> bool: ...  # noqa: D102

    @property
    def keeps_averages(self) -> bool: ...  # noqa: D102

    def flush(self) -> None: ...  # noqa: D102

    def _tracked_model(self, default: torch.nn.Module | None = None) -> torch.nn.Module | None: ...

    def _is_first_warning(self, cause: str) -> bool: ...


class _Shared(NamedTuple):
    """What all processes need of a plan: its sources cannot be sent, nor its targets, which may be a user's objects.

    Attributes:
        plan: the plan without sources and targets.
        errors: the predicted error and the profile error.
        entries: the dtype and the complete shape of each stored tensor.
        names: all names of each of these tensors, its stored name first.
        sources: the name and header checksum of each source; the checksum of a live average is empty.
    """

    plan: Plan
    errors: tuple[float | None, float]
    entries: Mapping[str, Entry]
    names: Mapping[str, Sequence[str]]
    sources: Sequence[tuple[str, str]]


def make_average(
    ema: Tracker, group: Group, model: torch.nn.Module | None, wanted: Wanted, *,
    t: float | None = None, step: int | None = None, dtype: torch.dtype | str | None = None, method: str | None = None,
    use: Callable[[Plan], Weights] = make_weights,
) -> Weights:  # fmt: skip
    """Return an average, of a sharded `model` the chunks of it that this process holds.

    A tracked length at the present time is the live average alone. Before the first update these are the raw weights,
    with a warning. A process that is alone makes it by `use`.
    """
    if not group.from_first(lambda: ema.has_average):
        return _raw_weights(ema, model, dtype)
    target = as_target(wanted)
    is_now = t is None and step is None and not ema._pipeline.tracking.resumes
    live = ema.settings.tracked_index(target.sigma_rel) if is_now and target.sigma_rel is not None else None

    def plan_from(sources: list[Source]) -> Plan:
        _check_any(ema, sources)
        if live is None:
            return logged(plan_synthesis(sources, [wanted], t, step, method, dtype=dtype))
        info, plan = sources[live].info, plan_synthesis([sources[live]], [wanted], method=method, dtype=dtype)
        if isinstance(info, Snapshot) and info.inherited:  # as after rounding
            return logged(plan)
        log.info("live average of sigma_rel %g at t = %.12g: exact", info.sigma_rel, info.t)
        return plan

    def shared(sources: list[Source]) -> _Shared:
        plan = plan_from(sources)
        return _Shared(
            replace(plan, sources=(), targets=()),
            (plan.predicted_error(0), plan.profile_error(0)),
            {name: Entry(plan.output_dtype(name), plan.newest.entries[name].shape) for name in plan.tensors},
            plan.names,
            [(source.name, source.checksum if isinstance(source, Snapshot) else "") for source in plan.sources],
        )

    is_live = live is not None
    if group.is_alone and not ema._members.is_chunked:
        return with_consistent_plan(lambda: plan_from(_sources(ema, is_live)), use)
    return with_consistent_plan(
        lambda: _in_first(ema, group, shared, is_live), lambda planned: _exchanged(ema, group, model, target, *planned)
    )


def from_sources(ema: Tracker, group: Group, work: Callable[[list[Source]], Result]) -> Result:
    """Return in each process what `work` returns in the first one, for the sources of complete tensors."""
    return _in_first(ema, group, work, False)[0]


def refused(ema: Tracker, group: Group, wanted: Mapping[str, Target]) -> dict[str, str]:
    """Return the reasons why some averages cannot be made yet, by label."""

    def plan(sources: list[Source]) -> dict[str, str]:
        _check_any(ema, sources)
        return plan_possible(sources, wanted)[1]

    return from_sources(ema, group, plan) if group.from_first(lambda: ema.has_average) else {}


def plan_possible(sources: Sequence[Source], wanted: Mapping[str, Target]) -> tuple[Plan | None, dict[str, str]]:
    """Plan several averages, and say why others cannot be made yet, such as a window longer than the run so far."""
    refusals: dict[str, str] = {}
    try:
        return logged(plan_synthesis(sources, [*wanted.values()])), refusals
    except InvalidValueError:
        for label, target in wanted.items():
            try:
                plan_synthesis(sources, [target])
            except InvalidValueError as error:
                refusals[label] = str(error)
    possible = [target for label, target in wanted.items() if label not in refusals]
    return (logged(plan_synthesis(sources, possible)) if possible else None), refusals


def logged(plan: Plan) -> Plan:
    """Log the predicted errors of a plan."""
    for index, target in enumerate(plan.targets):
        error = plan.predicted_error(index)
        predicted = "unknown" if error is None else f"{error:.2g}"
        log.info("average of %s at t = %.12g: predicted error %s", target.title, plan.t, predicted)
    if plan.choice is not None:
        log.info("made from %s", plan.choice)
    return plan


def _raw_weights(ema: Tracker, model: torch.nn.Module | None, dtype: torch.dtype | str | None) -> Weights:
    """Return the raw weights of the tracked model, or else of `model`, with a warning."""
    tracked, settings = ema._tracked_model(model), ema.settings
    if tracked is None:
        raise NotReadyError("no average yet", "the tracked model no longer exists")
    every, after = settings.schedule.update_every, settings.schedule.update_after_step
    if ema._is_first_warning("raw weights"):
        options = f"update_every={every}, update_after_step={after}"
        warn(f"no average yet, so the raw weights are used: {settings.first_update(0)} ({options})")
    return copied_weights(collect_tensors(tracked, settings.selection), dtype)


# --- sources


def run_snapshots(directory: Path, run_id: str) -> list[Snapshot]:
    """Return the snapshots of a run on disk; none if the directory belongs to another run."""
    snapshots = find_snapshots(directory)
    return snapshots if snapshots and snapshots[0].run_id == run_id else []


def _check_any(ema: Tracker, sources: Sequence[Source]) -> None:
    if not sources:
        reason = f"{ema.settings.first_update(ema.step)}, so far {ema.step:,}"
        raise NotReadyError("no average yet", reason)


def _sources(ema: Tracker, live_only: bool, live: Sequence[LiveSource] | None = None) -> list[Source]:
    """Return the live averages, and unless `live_only` the snapshots of others up to their time."""
    resumes, start = ema._pipeline.tracking.resumes, ema._start.step
    if live is None:
        if not (resumes or ema.keeps_averages):
            raise NotReadyError(
                "this process keeps no averages, the first one of its group does",
                "read the snapshots on disk with a new PostHocEMA.from_path(directory), before any update_ of it",
            )
        ema.flush()
        live = ema._pipeline.live()
    if live_only:
        return [*live]
    last = start if resumes and start is not None else math.inf
    now, profiles = live[0].info.t if live else math.inf, {source.info.sigma_rel for source in live}
    stored = [s for s in run_snapshots(ema.checkpoint_dir, ema.run_id) if s.step <= last]
    return [*live, *(s for s in stored if s.t < now or (s.t == now and s.sigma_rel not in profiles))]


def _in_first(
    ema: Tracker, group: Group, work: Callable[[list[Source]], Result], live_only: bool
) -> tuple[Result, dict[str, Source]]:
    """Return in each process what `work` returns in the first one, and the sources in this process by name.

    These are the live averages of its chunks of a sharded model; in the first of others all.
    """
    live: Sequence[LiveSource] | None = None
    local: dict[str, Source] = {}
    if ema._members.is_chunked:
        own, progress = group.together(lambda: _flushed(ema)), ema._pipeline.progress
        local = {source.name: source for source in own}
        parts = group.from_all_at(progress.step, progress.t, [(source.info, dict(source.entries)) for source in own])
        live = [_joined(profile) for profile in zip(*filter(None, parts), strict=True)]

    def in_first() -> Result:
        sources = _sources(ema, live_only, live)
        if live is None:
            local.update((source.name, source) for source in sources)
        return work(sources)

    return group.from_first(in_first), local


def _flushed(ema: Tracker) -> list[LiveSource]:
    ema.flush()
    return ema._pipeline.live()


def _joined(parts: Sequence[tuple[Snapshot, Mapping[str, Entry]]]) -> LiveSource:
    """Return the live average of complete tensors, without values, from the headers of its owners' chunks."""
    entries = {
        name: entry._replace(shape=info.chunks[name].shape) for info, part in parts for name, entry in part.items()
    }
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
    return LiveSource(joined, entries, lambda _: [])


# --- what each process makes


@torch.inference_mode(False)
@torch.no_grad()
def _exchanged(
    ema: Tracker, group: Group, model: torch.nn.Module | None, target: Target, shared: _Shared,
    local: Mapping[str, Source],
) -> Weights:  # fmt: skip
    """Return all that this process holds of an average, under all names, on the host, after exchanging it."""
    members, weights = ema._members, Weights()
    weights.predicted_error, weights.profile_error = shared.errors
    plan, tensors, holders = replace(shared.plan, targets=(target,)), dict[str, torch.Tensor](), None
    if isinstance(members, ShardOwners):
        assert model is not None
        reshard(model)  # so that this process holds its chunks
        tensors, holders = {tensor.name: tensor.tensor for tensor in named_tensors(model)}, members.holders
        tracked = ema._pipeline.tracking.tracked
        boxes = {name: tracked.box(name) for name in shared.entries if name in tracked.chunks}
        plan, makes_any = replace(plan, subset=frozenset(boxes), boxes=boxes), bool(boxes)
    else:
        boxes, makes_any = {}, group.leads

    def make_own() -> Weights:
        for name in boxes:
            _check_chunk(name, tracked, tensors.get(name))
        sources = tuple(
            local.get(name) or _read_again(ema.checkpoint_dir / name, checksum) for name, checksum in shared.sources
        )
        return make_weights(replace(plan, sources=sources))

    own = group.together(make_own if makes_any else Weights)
    for name, entry in shared.entries.items():
        shape = held_part(tensors[name]).shape if name in tensors else entry.shape
        value = own[name] if name in own else torch.empty(shape, dtype=torch_dtype(entry.dtype))
        group.exchange(value, group.ranks if holders is None else holders.get(name, ()))
        weights.update(dict.fromkeys(shared.names[name], value))
    return weights


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
