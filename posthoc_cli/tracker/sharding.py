"""Models that several processes hold in chunks: which chunk of a tensor is here, and which process averages it.

The processes meet once, when their trackers are made, through the key-value store of their process group. No tensor is
exchanged, and nothing waits for another process afterwards but the first update, which waits for the directory's lock.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from posthoc_cli.errors import InvalidValueError, RankError
from posthoc_cli.snapshots.chunks import Chunk

PATIENCE = 60.0
"""Seconds that a process waits for the others."""

_meetings = 0
"""Trackers of sharded models that this process has made; every process makes them in the same order."""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def reshard(model: torch.nn.Module) -> None:
    """Give a model of `fully_shard` its sharded parameters: after a forward pass without backward some are complete."""
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


@torch.no_grad()
def local_tensors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What this process holds of each tensor: without gradients these are the same objects each time."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def held_part(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor that this process holds, sharing their memory."""
    return local_part("", tensor)[0] if is_sharded(tensor) else tensor


def local_part(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Chunk | None]:
    """The elements of a tensor that this process holds, sharing their memory, and which they are; None for all.

    Raises:
        InvalidValueError: no box of the tensor is here; names the tensor and its placement.
    """
    if not is_sharded(tensor):
        return tensor.detach(), None
    found: Any = tensor
    for axis, placement in enumerate(found.placements):
        if placement.is_partial():
            reason = f"has the placement {placement}: no process holds its values"
            raise InvalidValueError("tensor", reason, "reduce it first", value=f"{name!r}")
        if type(placement).__name__ == "_StridedShard":
            _check_even(name, found, axis)
    with torch.no_grad():
        local = found.to_local()
    (place,) = found.__create_chunk_list__()
    return local.detach().view(tuple(place.sizes)), Chunk(tuple(found.shape), tuple(place.offsets))


def _check_even(name: str, tensor: Any, axis: int) -> None:
    dimension = tensor.placements[axis].dim
    sharing = [
        tensor.device_mesh.size(other)
        for other, placement in enumerate(tensor.placements)
        if getattr(placement, "dim", None) == dimension
    ]
    if tensor.shape[dimension] % math.prod(sharing):
        raise InvalidValueError(
            "tensor",
            f"has {tensor.shape[dimension]} rows in dimension {dimension}, which {' x '.join(map(str, sharing))} "
            f"processes share unevenly by {tensor.placements[axis]}",
            "make the dimension a multiple of the processes, or shard it over one mesh dimension",
            value=f"{name!r}",
        )


@dataclass(frozen=True)
class Members:
    """The processes that track one model together, as they have met.

    Attributes:
        rank: of this process.
        holders: by name, the ranks that hold the same chunk of a tensor as this process, growing. The first of them
            owns it: it averages and writes it.
        part: number of the files that it writes, from 1, and how many a snapshot has; None if it owns nothing.
        run_id: of the run.
        mesh: the processes' arrangement, as a snapshot's header has it.
        device: where the process group exchanges tensors.
    """

    rank: int
    holders: Mapping[str, tuple[int, ...]]
    part: tuple[int, int] | None
    run_id: str
    mesh: dict[str, Any]
    device: torch.device
    store: Store

    @cached_property
    def owned(self) -> frozenset[str]:
        """Names of the tensors whose chunk here this process averages and writes."""
        return frozenset(name for name, ranks in self.holders.items() if ranks[0] == self.rank)

    def announce(self, key: str, message: str) -> None:
        """Leave a message for the other processes, if the group is still there."""
        with suppress(RuntimeError):  # it was destroyed, or its first process has ended
            self.store.set(key, message)

    def wait_for_writer(self) -> None:
        """Return when rank 0 holds the directory; a RankError says why not, or that it has not come in time."""
        refused = _wait(self.store, "writer", 0, "has not taken the directory yet")
        if refused:
            raise RankError("rank 0", refused)

    def check(self) -> None:
        """Raise a RankError if another process has announced that it failed."""
        failed = ""
        with suppress(RuntimeError):  # as in `announce`
            failed = self.store.get("failed").decode() if self.store.check(["failed"]) else ""
        rank, _, reason = failed.partition(": ")
        if failed and rank != f"rank {self.rank}":
            raise RankError(rank, reason, "snapshots lack its part from here on; make new trackers to go on")

    def any(self, flag: bool) -> bool:
        """Whether any process says so; each calls it. The one collective operation of tracking."""
        found = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())


def meet(
    tensors: Mapping[str, torch.Tensor],
    chunks: Mapping[str, Chunk],
    options: Mapping[str, str],
    run_id: str,
    mesh: dict[str, Any],
) -> Members:
    """Decide with the other processes who owns which chunk. Each process calls it, in the same order of trackers.

    A chunk belongs to the lowest rank that holds it; one without elements to nobody, unless its tensor has none.

    Arguments:
        tensors: what is here of each tensor.
        chunks: where it belongs, if it is not all of it.
        options: what must be the same in every process, by what a user would call it.
        run_id: of the run to begin, or of the one that was found; rank 0's counts.

    Raises:
        RankError: a process did not come, or has other options; names it.
    """
    global _meetings
    _meetings += 1
    rank, world = dist.get_rank(), dist.get_world_size()
    store = PrefixStore(f"ema-{_meetings}", _get_default_store())
    held = {
        name: _digest(name, tuple(tensor.shape), chunks.get(name))
        for name, tensor in tensors.items()
        if tensor.numel() or name not in chunks or not math.prod(chunks[name].shape)
    }
    store.set(f"here/{rank}", json.dumps({"options": dict(options), "held": list(held.values())}))
    if rank == 0:
        try:
            sets, numbers = _holders(store, world, options)
        except RankError as error:
            refusal = json.dumps({"rank": error.subject, "reason": error.reason})
            for other in range(1, world):
                store.set(f"answer/{other}", refusal)
            raise
        owners = {ranks[0] for ranks in sets}
        parts = [other for other in range(world) if other in owners]
        for other in range(world):
            part = [parts.index(other) + 1, len(parts)] if other in parts else None
            own = sorted(set(numbers[other]))
            table = {"sets": [sets[number] for number in own], "held": [own.index(number) for number in numbers[other]]}
            store.set(f"answer/{other}", json.dumps({**table, "part": part, "run_id": run_id}))
    answer = json.loads(_wait(store, f"answer/{rank}", 0, "made no tracker of this model", 2.0))
    if "reason" in answer:
        raise RankError(answer["rank"], answer["reason"])
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    holders = {name: tuple(answer["sets"][number]) for name, number in zip(held, answer["held"], strict=True)}
    return Members(rank, holders, answer["part"] and tuple(answer["part"]), answer["run_id"], mesh, device, store)


def mesh_of(model: torch.nn.Module) -> dict[str, Any]:
    """The largest arrangement of processes that a model's parameters are sharded over, as a header has it."""
    meshes: list[Any] = [found.device_mesh for found in model.parameters() if hasattr(found, "device_mesh")]
    mesh = max(meshes, key=lambda one: one.mesh.numel(), default=None)
    return {} if mesh is None else {"shape": list(mesh.mesh.shape), "names": mesh.mesh_dim_names}


def _digest(name: str, shape: tuple[int, ...], chunk: Chunk | None) -> str:
    place = [] if chunk is None else [chunk.shape, chunk.offset, shape]
    return hashlib.sha256(json.dumps([name, place]).encode()).hexdigest()[:16]


def _holders(store: Store, world: int, options: Mapping[str, str]) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """The sets of ranks that hold a chunk, and for each rank the number of the set of each chunk that it holds."""
    holding: dict[str, list[int]] = defaultdict(list)
    held = []
    for rank in range(world):
        what = "made no tracker of this model; call from_model or from_path in every process"
        here = json.loads(_wait(store, f"here/{rank}", rank, what))
        for option, value in options.items():
            if here["options"][option] != value:
                raise RankError(f"rank {rank}", f"has {option} {here['options'][option]}, and rank 0 has {value}")
        held.append(here["held"])
        for digest in here["held"]:
            holding[digest].append(rank)
    sets: dict[tuple[int, ...], int] = {}
    numbers = {digest: sets.setdefault(tuple(ranks), len(sets)) for digest, ranks in holding.items()}
    return [*sets], [[numbers[digest] for digest in digests] for digests in held]


def _wait(store: Store, key: str, rank: int, what: str, patience: float = 1.0) -> str:
    seconds = patience * PATIENCE
    try:
        store.wait([key], timedelta(seconds=seconds))
        return str(store.get(key).decode())
    except RuntimeError as error:
        raise RankError(f"rank {rank}", f"{what} (waited {seconds:.0f} s)") from error
