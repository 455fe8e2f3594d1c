"""Models that several processes hold in chunks: which chunk of a tensor is here, and which process averages it.

The processes meet once, when their trackers are made, through the key-value store of their process group. No tensor is
exchanged, and nothing waits for another process afterwards but the first update, which waits for the directory's lock.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
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
        owned: names of the tensors whose chunk here this process averages and writes.
        part: number of the files that it writes, from 1; None if it owns nothing.
        parts: how many files a snapshot has.
        run_id: of the run.
    """

    rank: int
    owned: frozenset[str]
    part: int | None
    parts: int
    run_id: str
    store: Store

    def announce(self, key: str, message: str) -> None:
        """Leave a message for the other processes, if the group is still there."""
        with suppress(RuntimeError):  # the group was destroyed, or its first process has ended
            self.store.set(key, message)

    def wait_for(self, key: str, what: str) -> str:
        """The message under a key, when it is there.

        Raises:
            RankError: rank 0 did not leave it in time.
        """
        return _wait(self.store, key, 0, what)

    def check(self) -> None:
        """Raise a RankError if another process has announced that it failed."""
        try:
            failed = self.store.get("failed").decode() if self.store.check(["failed"]) else ""
        except RuntimeError:
            return  # as in `announce`
        rank, _, reason = failed.partition(": ")
        if failed and rank != f"rank {self.rank}":
            raise RankError(rank, reason, "its part of the snapshots is missing; training can go on without a tracker")


def meet(chunks: Mapping[str, Chunk | None], options: Mapping[str, str], run_id: str) -> Members:
    """Decide with the other processes who owns which chunk. Each process calls it, in the same order of trackers.

    A chunk belongs to the lowest rank that holds it; a chunk without elements to nobody, unless its tensor has none.

    Arguments:
        chunks: what is here of each tensor; None for all of it.
        options: what must be the same in every process, by what a user would call it.
        run_id: of the run to begin, or of the one that was found; rank 0's counts.

    Raises:
        RankError: a process did not come, or has other options; names it.
    """
    global _meetings
    _meetings += 1
    rank, world = dist.get_rank(), dist.get_world_size()
    store = PrefixStore(f"ema-{_meetings}", _get_default_store())
    held = {name: _digest(name, chunk) for name, chunk in chunks.items() if _has_elements(chunk)}
    store.set(f"here/{rank}", json.dumps({"options": dict(options), "held": list(held.values())}))
    if rank == 0:
        try:
            owned = _owned(store, world, options)
        except RankError as error:
            refusal = json.dumps({"rank": error.subject, "reason": error.reason})
            for other in range(1, world):
                store.set(f"answer/{other}", refusal)
            raise
        parts = [other for other in range(world) if owned[other]]
        answers: list[dict[str, Any]] = [
            {
                "owned": owned[other],
                "part": parts.index(other) + 1 if other in parts else None,
                "parts": len(parts),
                "run_id": run_id,
            }
            for other in range(world)
        ]
        for other in range(1, world):
            store.set(f"answer/{other}", json.dumps(answers[other]))
        own = answers[0]
    else:
        own = json.loads(_wait(store, f"answer/{rank}", 0, "made no tracker", 2 * PATIENCE))
        if "reason" in own:
            raise RankError(own["rank"], own["reason"])
    names = list(held)
    return Members(rank, frozenset(names[k] for k in own["owned"]), own["part"], own["parts"], own["run_id"], store)


def _has_elements(chunk: Chunk | None) -> bool:
    return chunk is None or chunk.box.size > 0 or math.prod(chunk.complete) == 0


def _digest(name: str, chunk: Chunk | None) -> str:
    place = [] if chunk is None else [chunk.complete, chunk.box.offset, chunk.box.shape]
    return hashlib.sha256(json.dumps([name, place]).encode()).hexdigest()[:16]


def _owned(store: Store, world: int, options: Mapping[str, str]) -> list[list[int]]:
    """For each rank the positions, among the chunks that it holds, of those that no lower rank holds."""
    taken: set[str] = set()
    owned = []
    for rank in range(world):
        what = "made no tracker of this model; call from_model or from_path in every process"
        here = json.loads(_wait(store, f"here/{rank}", rank, what))
        for option, value in options.items():
            if here["options"][option] != value:
                raise RankError(f"rank {rank}", f"has {option} {here['options'][option]}, and rank 0 has {value}")
        owned.append([index for index, digest in enumerate(here["held"]) if digest not in taken])
        taken.update(here["held"])
    return owned


def _wait(store: Store, key: str, rank: int, what: str, seconds: float = PATIENCE) -> str:
    try:
        store.wait([key], timedelta(seconds=seconds))
        return str(store.get(key).decode())
    except RuntimeError as error:
        raise RankError(f"rank {rank}", f"{what} (waited {seconds:.0f} s)") from error
