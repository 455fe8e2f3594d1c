"""Models that several processes train: which chunk of a tensor each averages, and how they find each other.

The processes of a sharded model meet once, when their trackers are made, through the key-value store of their process
group. No tensor is exchanged, and nothing waits for another process afterwards but the first update, which waits for
the directory's lock. Trackers of replicas leave a note there, and gather when averaged weights are asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from posthoc_cli.errors import InvalidValueError, PostHocError, RankError, VanishedError
from posthoc_cli.snapshots.chunks import Chunk, row_major
from posthoc_cli.tracker.layout import HOST

Result = TypeVar("Result")

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that a process waits for the others to make their trackers."""

GRACE, WARNING, LIMIT = 2.0, 10.0, 300.0
"""Seconds that the first call of an evaluation waits for trackers that are not there yet; that any call waits for the
processes that have one before it warns; and before it gives up."""

_made: Counter[str] = Counter()
"""Trackers that this process has made, of sharded models and of each directory; every process in the same order."""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def check_torch() -> None:
    """Raise an InvalidValueError where this torch's DTensor lacks what is needed."""
    from torch.distributed import tensor

    if not hasattr(tensor, "DTensor"):
        hint = "install 2.5 or newer"
        raise InvalidValueError("torch", "is too old for sharded models", hint, value=torch.__version__)


def reshard(model: torch.nn.Module) -> None:
    """Give a model of `fully_shard` its sharded parameters: after a forward pass without backward some are complete."""
    for module in filter(is_fully_sharded, model.modules()):
        module.reshard()  # type: ignore[operator]


def is_fully_sharded(module: torch.nn.Module) -> bool:
    """Whether `fully_shard` has taken a module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


@torch.no_grad()
def local_tensors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What this process holds of each tensor: without gradients these are the same objects each time."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def held_part(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor that this process holds, sharing their memory."""
    return local_part("", tensor)[0] if is_sharded(tensor) else tensor


def as_dtensor(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A DTensor in host memory of what this process holds, spread as `like` is; a plain tensor for a plain one."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    spread: Any = like
    found = DTensor.from_local(
        _with_own_storage(local).view(spread.to_local().shape), spread.device_mesh, spread.placements,
        run_check=False, shape=spread.shape, stride=row_major(spread.shape),
    )  # fmt: skip
    return found.cpu()  # it was moved to the mesh's device


def _with_own_storage(local: torch.Tensor) -> torch.Tensor:
    """The same memory as a whole storage: torch can neither stage nor deepcopy DTensors of a part of one."""
    if local.device.type != "cpu" or not local.numel():  # on a device by torch.set_default_device: it is its own
        return local
    values = torch.from_numpy(local.reshape(-1).view(torch.uint8).numpy())
    return values.view(local.dtype).view(local.shape)


def local_part(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Chunk | None]:
    """The elements of a tensor that this process holds, sharing their memory, and which they are; None for all.

    Raises:
        InvalidValueError: no box of the tensor is here; names the tensor and its placement.
    """
    if not is_sharded(tensor):
        return tensor.detach(), None
    check_torch()
    from torch.distributed.tensor import Shard

    found: Any = tensor
    for axis, placement in enumerate(found.placements):
        if placement.is_partial():
            reason = f"has the placement {placement}: no process holds its values"
            raise InvalidValueError("tensor", reason, "reduce it first", value=f"{name!r}")
        if not placement.is_replicate() and type(placement) is not Shard:
            _check_strided(name, found, axis)
    with torch.no_grad():
        local = found.to_local()
    (place,) = found.__create_chunk_list__()
    return local.detach().view(tuple(place.sizes)), Chunk(tuple(found.shape), tuple(place.offsets))


def _check_strided(name: str, tensor: Any, axis: int) -> None:
    """Raise an InvalidValueError unless the rows here are next to each other."""
    strided, mesh = tensor.placements[axis], tensor.device_mesh
    rows, sizes = tensor.shape[strided.dim], []
    inner = 1
    for other, placement in enumerate(tensor.placements):
        if getattr(placement, "dim", None) == strided.dim:
            sizes.append(mesh.size(other))
            inner *= mesh.size(other) if other > axis else 1
    what = f"has {rows} rows in dimension {strided.dim}, which {' x '.join(map(str, sizes))} processes share"
    if strided.split_factor != inner:
        reason, hint = f"{what} by {strided}, each in several pieces", "shard it by Shard"
    elif rows % math.prod(sizes):
        reason = f"{what} unevenly by {strided}"
        hint = "make the dimension a multiple of the processes, or shard it over one mesh dimension"
    else:
        return
    raise InvalidValueError("tensor", reason, hint, value=f"{name!r}")


# --- calls of several processes


@dataclass(frozen=True)
class Group:
    """Processes that make one call together, or one that makes it alone.

    Attributes:
        rank: of this process.
        ranks: of all of them. The first makes the plan and, of replicas, the averages.
        handle: of these processes for `torch.distributed`; None for all.
        device: where they exchange tensors.
    """

    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    handle: dist.ProcessGroup | None = None
    device: torch.device = HOST

    @property
    def leads(self) -> bool:
        """Whether this process is the first."""
        return self.rank == self.ranks[0]

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return len(self.ranks) == 1

    def from_all(self, value: Result) -> list[Result]:
        """The value of each process, by rank."""
        every = [value] * len(self.ranks)
        if not self.is_alone:
            dist.all_gather_object(every, value, group=self.handle)
        return every

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of work that every process does. An error of one is raised in all, before anyone goes on.

        Raises:
            VanishedError: in all processes, where that is all that went wrong; they may try again.
            RankError: another process failed; names it.
        """
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            if self.is_alone:
                raise
            failure = error  # raised again below, when the others know
        own = None if failure is None else (_in_words(failure), isinstance(failure, VanishedError))
        every = zip(sorted(self.ranks), self.from_all(own), strict=True)
        failed = [(rank, *one) for rank, one in every if one is not None]
        if failure is not None and (not isinstance(failure, VanishedError) or all(vanished for *_, vanished in failed)):
            raise failure
        for rank, message, vanished in sorted(failed, key=lambda one: one[2]):
            raise VanishedError(f"rank {rank}", message) if vanished else RankError(f"rank {rank}", message)
        return result

    def from_first(self, work: Callable[[], Result]) -> Result:
        """The result, or the error, of work that the first process does, in every process."""
        if self.is_alone:
            return work()
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.leads:
            try:
                outcome[0] = work()
            except Exception as error:  # noqa: BLE001  raised again below, when the others know
                failure = error
                told = error if isinstance(error, PostHocError) else RankError(f"rank {self.rank}", _in_words(error))
                outcome[1] = told
        dist.broadcast_object_list(outcome, self.ranks[0], group=self.handle)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def exchange(self, value: torch.Tensor, ranks: Sequence[int]) -> None:
        """Fill `value`, in these processes of the group, with that of the first of them."""
        if len(ranks) < 2 or not value.numel():
            return
        room = value.contiguous().reshape(-1).view(torch.uint8).to(self.device)
        if len(ranks) == len(self.ranks):
            dist.broadcast(room, ranks[0], group=self.handle)
        elif self.rank == ranks[0]:
            for other in ranks[1:]:
                dist.send(room, other)
        else:
            dist.recv(room, ranks[0])
        if self.rank != ranks[0]:
            value.copy_(room.cpu().view(value.dtype).view(value.shape))


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


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, PostHocError) else f"{type(error).__name__}: {error}"


THIS_PROCESS = Group()


class Callers:
    """Trackers of several processes that belong together, which gather when a call needs all of them.

    They do so through the store: a process that does not make the call is named, where a collective operation would
    wait for it in silence. Making a tracker waits for nobody.

    Arguments:
        store: of these trackers alone.
        keeps: whether this process makes the plan; one of them does.
        hint: what to do where not all make the call.
    """

    def __init__(self, store: Store, keeps: bool, hint: str = "make this call in every process") -> None:
        self._store, self._keeps, self._hint = store, keeps, hint
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._known: dict[int, bool] = {}
        self._handles: dict[tuple[int, ...], Any] = {}
        self._calls = 0
        self._graceful = True
        store.set(f"made/{self._rank}", "keeps" if keeps else "counts")

    @classmethod
    def of_replicas(cls, directory: Path, keeps: bool) -> Callers:
        """The trackers of one directory, the first, second and so on that each process makes."""
        name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        hint = f"make it in every process, with a tracker of {directory}; or in the first one only, with alone=True"
        return cls(_new_store(name), keeps, hint)

    def gather(self, device: torch.device, call: str) -> Group:
        """The processes that make this `call`; only this one where no other has a tracker, or none keeps averages.

        Raises:
            RankError: a process that has a tracker does not come, or makes another call; names it.
        """
        began = time.monotonic()
        while len(made := self._made()) < self._world and self._keeps and self._graceful:
            self._graceful = time.monotonic() - began < GRACE
            time.sleep(0.02)
        if len(made) == (1 if self._keeps else self._world) and any(made.values()) == self._keeps:
            return Group(self._rank, (self._rank,), device=device)
        self._calls += 1
        place = f"call/{self._calls}"
        self._store.set(f"{place}/{self._rank}", call)
        try:
            self._wait_for_all(place)
            for sign in self._signs(place) if self._keeps else []:
                if (other := self._store.get(sign).decode()) != call:
                    reason = f"asks for {other}, and rank {self._rank} for {call}"
                    raise RankError(f"rank {sign.rpartition('/')[2]}", reason, "make the same call in every process")
        except BaseException as error:
            if self._keeps:  # the others wait for its answer
                named, reason, hint = f"rank {self._rank}", f"left this call by {type(error).__name__}", self._hint
                if isinstance(error, RankError):
                    named, reason, hint = error.subject, error.reason, error.hint
                self._store.set(f"{place}/answer", json.dumps([named, reason, hint]))
            raise
        if self._keeps:
            self._store.set(f"{place}/answer", json.dumps([self._rank, *sorted(made.keys() - {self._rank})]))
        answer = json.loads(self._store.get(f"{place}/answer"))
        if isinstance(answer[0], str):
            raise RankError(*answer)
        if self._rank not in answer:
            raise RankError(f"rank {self._rank}", "had made no tracker yet when the others made this call", self._hint)
        ranks, everyone = tuple(answer), len(answer) == self._world
        if not everyone and ranks not in self._handles:
            self._handles[ranks] = dist.new_group(sorted(ranks), use_local_synchronization=True)
        return Group(self._rank, ranks, None if everyone else self._handles[ranks], device)

    def _wait_for_all(self, place: str) -> None:
        """Return when all have come, in those that keep no averages when the one that does has answered."""
        began, pause, warned = time.monotonic(), 0.001, False
        while not self._store.check(self._signs(place) if self._keeps else [f"{place}/answer"]):
            if time.monotonic() - began > (LIMIT if warned else WARNING):
                absent = [sign for sign in self._signs(place) if not self._store.check([sign])]
                names = " and ".join(f"rank {sign.rpartition('/')[2]}" for sign in absent) or "the other processes"
                if warned:
                    raise RankError(names, f"did not make this call within {LIMIT:.0f} s", self._hint)
                log.warning("waiting for %s: %s", names, self._hint)
                warned = True
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)

    def _signs(self, place: str) -> list[str]:
        """What each process leaves in the store when it makes a call. Any may be the one that keeps averages."""
        made = self._made()
        return [f"{place}/{rank}" for rank in (made if any(made.values()) else range(self._world))]

    def _made(self) -> dict[int, bool]:
        """The ranks that have made a tracker, and whether each keeps averages."""
        for rank in range(self._world):
            if rank not in self._known and self._store.check([f"made/{rank}"]):
                self._known[rank] = self._store.get(f"made/{rank}") == b"keeps"
        return self._known


@dataclass(frozen=True)
class Members:
    """The processes that track one model together, as they have met.

    Attributes:
        rank: of this process.
        callers: their trackers, to make calls together.
        holders: by name, the ranks that hold the same chunk of a tensor as this process, growing. The first of them
            owns it: it averages and writes it.
        part: number of the files that it writes, from 1, and how many a snapshot has; None if it owns nothing.
        run_id: of the run.
        session: of this training, from when they met; later ones have larger numbers.
        names: of all tensors of the model that are tracked, here or elsewhere.
        mesh: the processes' arrangement, as a snapshot's header has it.
        device: where the process group exchanges tensors.
    """

    rank: int
    callers: Callers
    holders: Mapping[str, tuple[int, ...]]
    part: tuple[int, int] | None
    run_id: str
    session: int
    names: frozenset[str]
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
        if refused := _wait(self.store, "writer", 0, "has not taken the directory yet"):
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
        mesh: as in `Members`.

    Raises:
        RankError: a process did not come, or has other options; names it.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    store = _new_store("members")
    callers = Callers(store, keeps=rank == 0)
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
        parts, session = [other for other in range(world) if other in owners], time.time_ns()
        for other in range(world):
            part = [parts.index(other) + 1, len(parts)] if other in parts else None
            own = sorted(set(numbers[other]))
            table = {"sets": [sets[number] for number in own], "held": [own.index(number) for number in numbers[other]]}
            store.set(f"answer/{other}", json.dumps({**table, "part": part, "run_id": run_id, "session": session}))
    answer = json.loads(_wait(store, f"answer/{rank}", 0, "made no tracker of this model", 2.0))
    if "reason" in answer:
        raise RankError(answer["rank"], answer["reason"])
    device = next((tensor.device for tensor in tensors.values()), HOST)
    holders = {name: tuple(answer["sets"][number]) for name, number in zip(held, answer["held"], strict=True)}
    number = answer["part"] and tuple(answer["part"])
    ids = answer["run_id"], answer["session"]
    return Members(rank, callers, holders, number, *ids, frozenset(tensors), mesh, device, store)


@contextmanager
def led(take: Callable[[], Callable[[], object]], what: str) -> Iterator[None]:
    """A block that no process leaves before all have done it; rank 0 holds something meanwhile.

    Each process comes, in the same order.

    Arguments:
        take: takes it, and returns what releases it.
        what: the block does, for people.

    Raises:
        RankError: a process did not come, or failed; names it.
    """
    rank, world, store = dist.get_rank(), dist.get_world_size(), _new_store("led")
    own, held = f"done/{rank}", ExitStack()
    try:
        if rank == 0:
            own = "led"
            held.callback(take())
            store.set("led", "")
            own = "done/0"
        elif refused := _wait(store, "led", 0, "made no tracker of this model"):
            raise RankError("rank 0", refused)
        store.set(f"here/{rank}", "")
        for other in range(world):
            _wait(store, f"here/{other}", other, "made no tracker of this model")
        yield
        store.set(own, "")
        for other in range(world):
            if failed := _wait(store, f"done/{other}", other, f"has not {what}", 60.0):
                raise RankError(f"rank {other}", failed)
    except BaseException as error:
        store.set(own, str(error))
        raise
    finally:
        held.close()


def mesh_of(model: torch.nn.Module) -> dict[str, Any]:
    """The largest arrangement of processes that a model's parameters are sharded over, as a header has it."""
    meshes: list[Any] = [found.device_mesh for found in model.parameters() if hasattr(found, "device_mesh")]
    mesh = max(meshes, key=lambda one: one.mesh.numel(), default=None)
    return {} if mesh is None else {"shape": list(mesh.mesh.shape), "names": mesh.mesh_dim_names}


def _new_store(name: str) -> Store:
    # torch has no public name for it. Without this one no tracker can be made in a group, and others can.
    from torch.distributed.distributed_c10d import _get_default_store

    _made[name] += 1
    return PrefixStore(f"ema-{name}-{_made[name]}", _get_default_store())


def _digest(name: str, shape: tuple[int, ...], chunk: Chunk | None) -> str:
    place = [] if chunk is None else [chunk.shape, chunk.offset, shape]
    return hashlib.sha256(json.dumps([name, place]).encode()).hexdigest()[:16]


def _holders(store: Store, world: int, options: Mapping[str, str]) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """The sets of ranks that hold a chunk, and for each rank the number of the set of each chunk that it holds."""
    holding: dict[str, list[int]] = defaultdict(list)
    held = []
    for rank in range(world):
        what = "made no tracker of this model; call from_model or from_path in every process, with the same arguments"
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
