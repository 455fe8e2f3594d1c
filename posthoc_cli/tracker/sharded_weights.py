"""Averaged weights in several processes, all of which make the call.

Of replicas the process that keeps the averages makes the weights, and the others get them. Of a sharded model each
process makes the chunks that it owns: rank 0 makes the plan, from measurements that all have taken of their own chunks;
each owner reads the boxes of the snapshots that it needs; ranks that hold the same elements get them from their owner.
An error of one process is raised in all of them before a model has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from posthoc_cli import files
from posthoc_cli.errors import (
    FileFormatError,
    ModelMismatchError,
    PostHocError,
    RankError,
    VanishedError,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.run import Weights
from posthoc_cli.snapshots.chunks import Box, Chunk
from posthoc_cli.snapshots.directory import read_snapshot, sum_of_parts
from posthoc_cli.snapshots.format import SnapshotInfo, TensorSpec
from posthoc_cli.snapshots.reader import OpenSnapshot, Snapshot
from posthoc_cli.snapshots.tensors import torch_dtype
from posthoc_cli.synthesis.engine import synthesize
from posthoc_cli.synthesis.plan import Plan, Source
from posthoc_cli.targets import Target
from posthoc_cli.tracker.model_tensors import TrackedModel, check_model
from posthoc_cli.tracker.names import named_tensors
from posthoc_cli.tracker.sharding import Group, Members, as_dtensor, held_part, is_sharded, local_part
from posthoc_cli.tracker.snapshotter import LiveSource

Result = TypeVar("Result")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SharedPlan:
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
    def of(cls, plan: Plan) -> SharedPlan:
        """The same as a plan."""
        specs = {n: TensorSpec(n, plan.output_dtype(n), plan.newest.stored[n].shape) for n in plan.tensors}
        checksums = [
            source.header.metadata["ema.checksum"] if isinstance(source, Snapshot) else "" for source in plan.sources
        ]
        sources = tuple((source.name, checksum) for source, checksum in zip(plan.sources, checksums, strict=True))
        return cls(specs, plan.names, sources, replace(plan, sources=(), targets=()))

    @classmethod
    def of_live(cls, source: LiveSource) -> SharedPlan:
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

    def open(self) -> AbstractContextManager[OpenSnapshot]:
        return self.snapshot.open(self.boxes)


# --- what all processes do together


def together(group: Group, work: Callable[[], Result]) -> Result:
    """The result of work that every process does. An error of one is raised in all.

    Raises:
        VanishedError: in all processes, where that is all that went wrong; they may try again.
        RankError: another process failed; names it.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  raised again below, when the others know
        failure = error
    own = None if failure is None else (_in_words(failure), isinstance(failure, VanishedError))
    found = from_all(group, own)
    failed = [(rank, *one) for rank, one in zip(sorted(group.ranks), found, strict=True) if one is not None]
    if failure is not None and (not isinstance(failure, VanishedError) or all(vanished for *_, vanished in failed)):
        raise failure
    for rank, message, vanished in sorted(failed, key=lambda one: one[2]):
        raise VanishedError(f"rank {rank}", message) if vanished else RankError(f"rank {rank}", message)
    return result


def from_first(group: Group, work: Callable[[], Result]) -> Result:
    """The result, or the error, of work that the first process does, in every process."""
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    first = group.ranks[0]
    if group.leads:
        try:
            outcome = [work(), None]
        except Exception as error:  # noqa: BLE001  raised again below, when the others know
            failure = error
            outcome = [None, error if isinstance(error, PostHocError) else RankError(f"rank {first}", _in_words(error))]
    dist.broadcast_object_list(outcome, first, group=group.handle)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, PostHocError) else f"{type(error).__name__}: {error}"


def join_live(group: Group, live: Sequence[LiveSource], now: tuple[int, float]) -> list[LiveSource]:
    """In rank 0 the live averages of complete tensors, measured, without values; in the others none.

    Raises:
        RankError: a process is at another step or time than `now`; names it.
    """
    own = now, [(source.info, dict(source.stored)) for source in live]
    every = [own] * dist.get_world_size()
    dist.gather_object(own, every if group.leads else None)

    def join() -> list[LiveSource]:
        check_times([other for other, _ in every])
        return [_joined(profile) for profile in zip(*(parts for _, parts in every if parts), strict=True)]

    made: list[LiveSource] = []  # in the first one only
    from_first(group, lambda: made.extend(join()))
    return made


def check_times(times: Sequence[tuple[int, float]]) -> None:
    """Raise a RankError for a process that is at another step or t than rank 0."""
    first, t_first = times[0]
    for rank, (step, t) in enumerate(times):
        if step != first:
            hint = "make this call in every process between the same two calls of update_"
            raise RankError(f"rank {rank}", f"is at step {step} of update_, and rank 0 at step {first}", hint)
        if t != t_first:
            reason = f"is at t = {t:,.12g} at step {step}, and rank 0 at t = {t_first:,.12g}"
            raise RankError(f"rank {rank}", reason, "pass the same t to update_ in every process")


def from_all(group: Group, value: Result) -> list[Result]:
    """The value of each process of a group, by rank."""
    every = [value] * len(group.ranks)
    dist.all_gather_object(every, value, group=group.handle)
    return every


def _joined(parts: Sequence[tuple[SnapshotInfo, Mapping[str, TensorSpec]]]) -> LiveSource:
    """The live average of complete tensors, from what its owners say of their chunks; its tensors are on meta."""
    tensors: dict[str, torch.Tensor] = {}
    for info, specs in parts:
        for name, spec in specs.items():
            tensors[name] = torch.empty(info.chunks[name].shape, dtype=torch_dtype(spec.dtype), device="meta")
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
    return LiveSource(joined, tensors, {})


# --- replicas


@torch.inference_mode(False)
@torch.no_grad()
def from_keeper(group: Group, make: Callable[[], Weights]) -> Weights:
    """Weights that the first process makes, in every process: exchanged one by one."""
    own = Weights()

    def describe() -> tuple[dict[str, str], dict[str, tuple[torch.Size, torch.dtype]], float | None, float]:
        nonlocal own
        own = make()
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(value), name) for name, value in own.items()}
        specs = {name: (own[name].shape, own[name].dtype) for name in first.values()}
        return names, specs, own.predicted_error, own.profile_error

    names, specs, predicted, profile = from_first(group, describe)
    values = {}
    for name, (shape, dtype) in specs.items():
        values[name] = own[name] if group.leads else torch.empty(shape, dtype=dtype)
        _exchange(values[name], group.ranks, group)
    made = Weights((name, values[first]) for name, first in names.items())
    made.predicted_error, made.profile_error = predicted, profile
    return made


# --- chunks


def make_chunks(
    group: Group, shared: SharedPlan, target: Target | None, live: Sequence[LiveSource], tracked: TrackedModel,
    model: torch.nn.Module, directory: Path,
) -> Weights:  # fmt: skip
    """What this process holds of each tensor that is made, under all names, on the host. Every process calls it.

    Of replicas that share the averages out it is all of them.

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
    own = together(group, lambda: _own_chunks(shared, target, live, tracked, tensors, directory))
    made = Weights()
    for name in sorted(shared.specs):  # in one order in all processes
        value = own.get(name) if members.shares is None else None
        if value is None:
            shape = held_part(tensors[name]).shape
            value = torch.empty(shape, dtype=torch_dtype(shared.specs[name].dtype))
        if members.shares is None:
            _exchange(value, members.holders.get(name, ()), group)
        for rank, rows in () if members.shares is None else members.shares[name]:
            if rank == group.rank:
                value[rows] = own[name]
            _exchange(value[rows], [rank, *(other for other in group.ranks if other != rank)], group)
        for alias in shared.names[name]:
            made[alias] = value
    if shared.plan is not None and target is not None:
        plan = replace(shared.plan, targets=(target,))
        made.predicted_error, made.profile_error = plan.predicted_error(0), plan.profile_error(0)
    return made


@torch.inference_mode(False)
@torch.no_grad()
def _own_chunks(
    shared: SharedPlan, target: Target | None, live: Sequence[LiveSource], tracked: TrackedModel,
    model: Tensors, directory: Path,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The chunks that this process owns of tensors that the model has, too."""
    boxes = {name: tracked.box(name) for name in shared.specs if name in tracked.chunks}
    shares = tracked.members and tracked.members.shares  # each process has all of the model then, and keeps a part
    for name, spec in shared.specs.items():
        _check_spread(name, spec.shape, boxes.get(name) if shares is None else None, model)
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


def _check_spread(name: str, shape: tuple[int, ...], box: Box | None, model: Tensors) -> None:
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


def _exchange(value: torch.Tensor, ranks: Sequence[int], group: Group) -> None:
    """Fill `value`, in these processes of a group, with that of the first of them."""
    if len(ranks) < 2 or not value.numel():
        return
    room = value.contiguous().reshape(-1).view(torch.uint8).to(group.device)
    if len(ranks) == len(group.ranks):
        dist.broadcast(room, ranks[0], group=group.handle)
    elif group.rank == ranks[0]:
        for other in ranks[1:]:
            dist.send(room, other)
    else:
        dist.recv(room, ranks[0])
    if group.rank != ranks[0]:
        value.copy_(room.cpu().view(value.dtype).view(value.shape))


# --- complete tensors, and DTensors


def as_dtensors(chunks: Weights, model: torch.nn.Module) -> Weights:
    """The same with DTensors in place of chunks, spread as the model's parameters."""
    made = _like(chunks)
    for found in named_tensors(model):
        if found.name in chunks:
            made[found.name] = as_dtensor(chunks[found.name], found.tensor)
    return made


def gathered(chunks: Weights, model: torch.nn.Module, members: Members) -> Weights:
    """In rank 0 the complete tensors, one after the other on the host; in the others none."""
    places: list[dict[str, Box]] = [{}] * dist.get_world_size()
    tensors = {found.name: found.tensor for found in named_tensors(model) if found.name in chunks}
    own = {}
    for name in members.owned & chunks.keys():
        _, chunk = local_part(name, tensors[name])
        if chunk is not None:
            own[name] = chunk.box(tuple(chunks[name].shape))
    dist.all_gather_object(places, own)
    made = _like(chunks)
    whole: dict[int, torch.Tensor] = {}  # by the chunk that its names share
    for name in sorted(chunks):
        value, owners = chunks[name], [rank for rank, held in enumerate(places) if name in held]
        if is_sharded(tensors[name]) and owners:
            whole[id(value)] = _gather(name, value, tuple(tensors[name].shape), places, owners, members)
    for name in chunks if members.rank == 0 else ():
        made[name] = whole.get(id(chunks[name]), chunks[name])
    return made


def _gather(
    name: str, value: torch.Tensor, shape: tuple[int, ...], places: Sequence[Mapping[str, Box]],
    owners: Sequence[int], members: Members,
) -> torch.Tensor:  # fmt: skip
    """In rank 0 the complete tensor of its chunks."""
    complete = torch.empty(shape if members.rank == 0 else (0,), dtype=value.dtype)
    for rank in owners:
        box = places[rank][name]
        if members.rank == 0:
            here = complete[tuple(map(slice, box.offset, box.end))]
            if rank == 0:
                here.copy_(value)
            elif box.size:
                room = torch.empty(box.size * value.dtype.itemsize, dtype=torch.uint8, device=members.device)
                dist.recv(room, rank)
                here.copy_(room.cpu().view(value.dtype).view(box.shape))
        elif members.rank == rank and box.size:
            dist.send(value.contiguous().reshape(-1).view(torch.uint8).to(members.device), 0)
    return complete


def _like(chunks: Weights) -> Weights:
    made = Weights()
    made.predicted_error, made.profile_error = chunks.predicted_error, chunks.profile_error
    return made
