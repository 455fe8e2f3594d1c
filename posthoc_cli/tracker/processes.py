"""Models that several processes train: which chunk of a tensor each process averages, and the calls
that they make together.

The processes of a sharded model meet when their trackers are made, to agree on the owners of its
chunks, and at the first update, where the first process takes the directory; replicas meet when
averaged weights are asked for.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore

from posthoc_cli.devices import HOST
from posthoc_cli.errors import InvalidValueError, RankError, RefusedCallError
from posthoc_cli.group import THIS_PROCESS, Group
from posthoc_cli.snapshots.boxes import Box, row_major

# Seconds that a process waits for what another one is about to do: to make its tracker, which may
# take as long as the start of Python and of a data set, or a file that a network file system shows
# late.
PATIENCE = 60.0


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to a module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def reshard(model: nn.Module) -> list[str]:
    """Restore the sharded parameters of a `fully_shard` model: a forward pass without a backward
    pass leaves some complete.

    Return the names of those whose complete tensor something has replaced: torch frees its own, and
    would use the other one in the next pass.
    """
    modules = [*filter(is_fully_sharded, model.modules())]
    if not modules:
        return []
    complete = dict(model.named_parameters())
    for module in modules:
        module.reshard()  # type: ignore[operator]
    replaced = []
    for name, parameter in model.named_parameters():
        before = complete.get(name, parameter)
        if before is not parameter and local_tensors([before])[0].untyped_storage().nbytes():
            replaced.append(name)
    return replaced


def refresh_shards(model: nn.Module) -> None:
    """Have the modules of a `fully_shard` model take over parameters that were replaced."""
    if any(map(is_fully_sharded, model.modules())):
        model._apply(lambda tensor: tensor)  # type: ignore[no-untyped-call]


@torch.no_grad()
def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Find the part of each tensor that this process holds: the same objects each time, as
    gradients are off."""
    parts = []
    for tensor in tensors:
        parts.append(tensor.to_local() if is_sharded(tensor) else tensor)  # type: ignore[attr-defined]
    return parts


def local_part(tensor: Tensor) -> Tensor:
    """Find the elements of a tensor that this process holds, sharing their memory."""
    if not is_sharded(tensor):
        return tensor
    part, _ = local_box("", tensor)
    return part


def local_box(name: str, tensor: Tensor) -> tuple[Tensor, Box]:
    """Find the elements of a tensor that this process holds, sharing their memory, and their box in
    the tensor."""
    if not is_sharded(tensor):
        return tensor.detach(), Box.full(tuple(tensor.shape))
    dtensor: Any = tensor
    if not hasattr(dtensor, "__create_chunk_list__"):
        reason = f"is sharded, which needs torch 2.5 or newer, not {torch.__version__}"
        raise InvalidValueError("tensor", reason, value=f"{name!r}")
    for axis, placement in enumerate(dtensor.placements):
        if placement.is_partial():
            reason = f"has the placement {placement}: no process holds its values"
            raise InvalidValueError("tensor", reason, "reduce it first", value=f"{name!r}")
        if hasattr(placement, "split_factor"):
            _check_strided(name, dtensor, axis)
    with torch.no_grad():
        local = dtensor.to_local()
    (chunk,) = dtensor.__create_chunk_list__()
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
    return local.detach().view(box.shape), box


def _check_strided(name: str, dtensor: Any, axis: int) -> None:
    """Raise an InvalidValueError if a process holds several pieces of a dimension."""
    mesh = dtensor.device_mesh
    placement = dtensor.placements[axis]
    dim = placement.dim
    processes = 1  # ranks that share the dimension
    inner = 1  # ranks of the mesh's later axes
    for other_axis, other in enumerate(dtensor.placements):
        if getattr(other, "dim", None) == dim:
            size = mesh.size(other_axis)
            processes *= size
            if other_axis > axis:
                inner *= size
    rows = dtensor.shape[dim]
    if placement.split_factor == inner and rows % processes == 0:
        return
    reason = (
        f"has {rows} rows in dimension {dim}, of which {placement} gives a process several pieces"
    )
    hint = (
        f"shard it by Shard, in one mesh dimension, or make the dimension a multiple of {processes}"
    )
    raise InvalidValueError("tensor", reason, hint, value=f"{name!r}")


def as_dtensor(local: Tensor, like: Tensor) -> Tensor:
    """Make a DTensor in host memory of this process's part, sharded as `like` is; return `local` if
    `like` is not sharded."""
    if not is_sharded(like):
        return local
    sharded: Any = like
    # A storage of the tensor's size: torch cannot stage or deepcopy DTensors of others.
    if local.device.type == "cpu" and local.numel():
        in_bytes = local.reshape(-1).view(torch.uint8)
        local = torch.from_numpy(in_bytes.numpy()).view(local.dtype)
    dtensor: Tensor = type(sharded).from_local(
        local.view(sharded.to_local().shape),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=row_major(sharded.shape),
    )
    return dtensor.cpu()  # `from_local` has moved it to the mesh's device


def find_group(model: nn.Module, processes: Any = None) -> Group:
    """Find the processes that track a model: the given torch group, or the group of its
    DistributedDataParallel, or all."""
    if not dist.is_initialized():
        return THIS_PROCESS
    if processes is None:
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                processes = module.process_group
    ranks = dist.get_process_group_ranks(processes or dist.group.WORLD)
    rank = dist.get_rank()
    if rank not in ranks:
        reason = f"has the ranks {', '.join(map(str, ranks))}, and not rank {rank}"
        raise InvalidValueError("group", reason)
    device = next((parameter.device for parameter in model.parameters()), HOST)
    return Group(rank, tuple(ranks), device, processes)


class Members:
    """The processes that track one model. Each has the whole model: one keeps averages and writes,
    the others count."""

    is_chunked = False  # whether each process keeps chunks of the averages, see `ShardOwners`

    def __init__(self, group: Group = THIS_PROCESS, notes: Notes | None = None) -> None:
        self._group = group
        self._notes = notes
        self.keeps = group.leads  # averages, and writes them to the directory
        # among the processes that keep averages; the first has the directory's lock, and thins
        self.rank = 0
        # this process's part of snapshots, from 1, and the number of parts
        self.part: tuple[int, int] | None = None
        # of this training, set when processes meet; later trainings have larger numbers
        self.session = 0
        # of all tracked tensors of a sharded model, also of other stages of a pipeline
        self.names: frozenset[str] = frozenset()
        self.mesh: dict[str, Any] = {}  # the processes' arrangement, as a snapshot's header has it

    def select_owned(self, names: Set[str]) -> Set[str]:
        """Select the model's tensors that this process averages and writes, or has a chunk of."""
        return names

    def check_model(self, also_missing: bool = False) -> None:
        """Raise a RankError if another process tracks a model of other tensors, or has no
        tracker."""
        if self._notes is not None:
            self._notes.check(also_missing)

    def check_part(self, step: int, t: float) -> None:
        """Raise a RankError if another process writes its part of the next snapshot for another
        time."""

    def keepers(self) -> Group:
        """Find the processes that keep averages; all of them make a call."""
        return THIS_PROCESS

    def callers(self, is_tracking: bool) -> Group:
        """Find the processes that make a call for averages; this process alone before it tracks."""
        if not (is_tracking and dist.is_initialized()):
            return THIS_PROCESS
        if self._notes is not None:
            self._notes.check(also_missing=True)
        return self._group


def _store(name: str) -> PrefixStore:
    """Return a part of torch's store, which processes share without waiting for each other."""
    # torch has no public name for the store
    from torch.distributed.distributed_c10d import _get_default_store

    return PrefixStore(f"ema-{name}", _get_default_store())


class Notes:
    """What each process has noted of its tracker of a directory, in torch's store: a collective
    would wait much longer for a process that has no tracker."""

    def __init__(
        self, group: Group, directory: Path, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._ranks = group.ranks
        self._directory = directory
        self._store = _store(_digest(str(directory)))
        self._tensors = _digest(repr(sorted(shapes.items())))
        self._store.set(str(group.rank), self._tensors)

    def check(self, also_missing: bool) -> None:
        """Raise a RankError for a process whose model has other tensors, or, with `also_missing`,
        that has no tracker after some patience: replicas need not be in step."""
        if not dist.is_initialized():
            return
        until = time.monotonic() + PATIENCE
        for rank in self._ranks:
            while also_missing and not self._has_note(rank) and time.monotonic() < until:
                time.sleep(0.05)
            if self._has_note(rank):
                if self._store.get(str(rank)).decode() != self._tensors:
                    reason = "tracks a model of other tensors, as of a stage of a pipeline"
                    hint = (
                        "shard stages with fully_shard, or give each its own directory and `group`"
                    )
                    raise RankError(f"rank {rank}", reason, hint)
            elif also_missing:
                reason = f"has no tracker of {self._directory}"
                hint = "make one in every process, or pass the `group` of the processes that do"
                raise RankError(f"rank {rank}", reason, hint)

    def _has_note(self, rank: int) -> bool:
        return bool(self._store.check([str(rank)]))


class ShardOwners(Members):
    """The processes that track one sharded model; each keeps the averages of the chunks that it
    owns.

    All processes make this object, in the same order of trackers, with the tensors of which they
    hold a chunk. The owner of a chunk is the first rank that holds it (`holders`, by name,
    ascending); a chunk without elements has none, unless its tensor has no
    elements. Stages of a pipeline have tensors of their own: `shapes` are the complete ones of the
    weights of all. A RankError names a process that has other `options`.
    """

    is_chunked = True

    def __init__(
        self,
        group: Group,
        model: nn.Module,
        tracked: Any,  # a TrackedModel
        options: Mapping[str, str],
        run_id: str,
    ) -> None:
        super().__init__(group)
        self.rank = group.ranks.index(group.rank)
        self.mesh = _largest_mesh(model)
        digests = _chunk_digests(tracked)
        own = _Presence(
            options=options,
            digests=[*digests.values()],
            run_id=run_id,
            session=time.time_ns(),
            names=tracked.known_names,
            shapes=tracked.complete_shapes,
        )
        presences = dict(zip(group.ranks, group.from_all(own), strict=True))
        first = presences[group.ranks[0]]
        for rank, presence in presences.items():
            for option, value in first.options.items():
                other = presence.options[option]
                if other != value:
                    reason = f"has {option} {other}, and rank {group.ranks[0]} has {value}"
                    raise RankError(f"rank {rank}", reason)
        self.run_id = first.run_id
        self.session = first.session
        self._parts = 0  # of snapshots, that this process has written
        self._store = _store(f"parts-{self.session}")
        self._divide(presences, digests)

    def _divide(
        self,
        presences: Mapping[int, _Presence],
        digests: Mapping[str, str],
    ) -> None:
        """Divide the chunks among the processes."""
        self.shapes = dict[str, tuple[int, ...]]()
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, presence in presences.items():
            self.names |= presence.names
            self.shapes |= presence.shapes
            for digest in presence.digests:
                holders[digest].append(rank)
        self.holders = dict[str, tuple[int, ...]]()
        self._owned = set[str]()
        own_rank = self._group.rank
        for name, digest in digests.items():
            ranks = tuple(holders[digest])
            self.holders[name] = ranks
            if ranks[0] == own_rank:
                self._owned.add(name)
        owners = sorted({first for first, *_ in holders.values()})
        self.keeps = own_rank in owners
        if self.keeps:
            self.part = owners.index(own_rank) + 1, len(owners)

    def select_owned(self, names: Set[str]) -> Set[str]:
        """Select the tensors whose chunk this process owns, and tensors that did not exist when the
        processes met."""
        return self._owned | (names - self.names)

    def check_part(self, step: int, t: float) -> None:
        self._parts += 1
        own = f"step {step:,}, t = {t:.17g}"
        first = own
        with suppress(RuntimeError):  # the group was destroyed, or its first process has ended
            first = self._store.compare_set(f"{self._parts}", "", own).decode()
        if first != own:
            reason = f"has a part of a snapshot of {own}, and another process of {first}"
            hint = "call update_ equally often in every process, with the same t"
            raise RankError(f"rank {self._group.rank}", reason, hint)

    def keepers(self) -> Group:
        if not dist.is_initialized():
            reason = (
                "averages of which each process keeps a part need all processes of the model, and "
                "their group was destroyed"
            )
            hint = (
                "use the snapshots: ema synthesize, or Run(directory).average(sigma_rel), in "
                "one process"
            )
            raise RefusedCallError("PostHocEMA", reason, hint)
        return self._group

    def callers(self, is_tracking: bool) -> Group:  # noqa: ARG002
        return self.keepers()


class _Presence(NamedTuple):
    """What a process tells the others when the processes of a sharded model meet."""

    options: Mapping[str, str]
    digests: Sequence[str]  # each identifies a chunk that the process holds, in all processes
    run_id: str
    session: int
    names: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]


def _chunk_digests(tracked: Any) -> dict[str, str]:
    """Compute the digest of each chunk of a TrackedModel in this process that may have an owner."""
    digests = {}
    for name, box in tracked.boxes.items():
        shape = tracked.shapes[name]
        if box.size or not math.prod(shape):
            digests[name] = _digest(repr((name, shape, box)))
    return digests


def _largest_mesh(model: nn.Module) -> dict[str, Any]:
    """Describe the arrangement of the processes, as a snapshot's header has it."""
    meshes: list[Any] = []
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            meshes.append(mesh)
    if not meshes:
        return {}
    largest = max(meshes, key=lambda mesh: mesh.size())
    return {"shape": list(largest.mesh.shape), "names": largest.mesh_dim_names}


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:16]
