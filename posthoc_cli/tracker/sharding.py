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
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NotReadyError,
    PostHocError,
    RankError,
    VanishedError,
)
from posthoc_cli.snapshots.chunks import Box, Chunk, row_major
from posthoc_cli.tracker.layout import HOST

Result = TypeVar("Result")

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that a process waits for the others to make their trackers."""

GRACE, WARNING, LIMIT = 2.0, 10.0, 300.0
"""Seconds that the first call of an evaluation waits for trackers that are not there yet; that any call waits for the
processes that have one before it warns; and before it gives up."""

_FROM_SNAPSHOTS = "use the snapshots: ema synthesize, or Run(directory).average(sigma_rel), in one process"

_ABSENT = "made no tracker of this model"
_NO_WRITER = "has not taken the directory yet"

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


def held_box(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Box]:
    """As `local_part`, with the box of the complete tensor that these elements are."""
    local, chunk = local_part(name, tensor)
    shape = tuple(local.shape)
    return local, Box.whole(shape) if chunk is None else chunk.box(shape)


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

    def from_all_at(self, step: int, t: float, value: Result) -> list[Result]:
        """The same in processes that are at one step and t; a RankError names one that is not."""
        times, values = zip(*self.from_all(((step, t), value)), strict=True)
        first, t_first = times[0]
        for rank, (other, t_other) in enumerate(times):
            if other != first:
                hint = "make this call in every process between the same two calls of update_"
                raise RankError(f"rank {rank}", f"is at step {other} of update_, and rank 0 at step {first}", hint)
            if t_other != t_first:
                reason = f"is at t = {t_other:,.12g} at step {other}, and rank 0 at t = {t_first:,.12g}"
                raise RankError(f"rank {rank}", reason, "pass the same t to update_ in every process")
        return [*values]

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of work that every process does. An error of one is raised in all, before anyone goes on.

        Raises:
            VanishedError: in all processes, where that is all that went wrong; they may try again.
            RankError: another process failed; names it.
        """
        if self.is_alone:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  raised again below, when the others know
            failure = error
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


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, PostHocError) else f"{type(error).__name__}: {error}"


THIS_PROCESS = Group()


class Callers:
    """Trackers of several processes that belong together, which gather when a call needs all of them.

    They do so through the store: a process that does not make the call is named, where a collective operation would
    wait for it in silence. Making a tracker waits for nobody. The one that `keeps` averages makes the plan.
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

        A RankError names a process that has a tracker and does not come, or makes another call.
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


class Members:
    """The processes that track one model: who keeps its averages, and what they tell each other.

    Here each has the model complete: one of them, or the only one, keeps the averages and writes, and the others count.
    Which one is decided for good when the tracker is made, or once there is a group.

    Attributes:
        is_chunked: whether each process keeps chunks of the averages, see `Owners`.
        rank: of this process among those that keep averages; the first one has the directory's lock, and thins.
        part: number of the files that it writes, from 1, and how many a snapshot has; None for complete ones, or none.
        session: of this training, from when the processes met; later ones have larger numbers.
        names: of all tensors of the model that are tracked, where some are tracked elsewhere.
        mesh: the processes' arrangement, as a snapshot's header has it.
    """

    is_chunked = False

    def __init__(self) -> None:
        self.rank, self.session = 0, 0
        self.part: tuple[int, int] | None = None
        self.names: frozenset[str] = frozenset()
        self.mesh: dict[str, Any] = {}
        self._keeps: bool | None = None
        self._callers: Callers | None = None  # of the other replicas' trackers

    def keeps(self, model: torch.nn.Module | None, directory: Path) -> bool:
        """Whether this process keeps averages, and writes them to a directory."""
        if self._keeps is None:
            self._keeps = is_first_of_group(model)
        keeps = self._keeps is not False
        if self._callers is None and model is not None and _is_in_group():
            self._callers = Callers.of_replicas(directory, keeps)
        return keeps

    def owned(self, here: Set[str]) -> Set[str]:
        """Of these tensors of the model, those that this process averages and writes, wholly or its chunk of them."""
        return here

    def check_kind(self, model: torch.nn.Module) -> None:
        """Raise a ModelMismatchError if the model is sharded whose tracker was made before, or without it."""
        if any(map(is_sharded, model.parameters())):
            reason = "is sharded over processes, and was not when this tracker was made"
            hint = (
                "shard the model first; then make the tracker in every process, with from_model or "
                "from_path(path, model)"
            )
            raise ModelMismatchError("model", reason, hint)

    @contextmanager
    def taking_directory(self) -> Iterator[None]:
        """A block in which this process becomes the directory's writer, or one of them."""
        yield
        self._keeps = True

    def wait_for_writer(self) -> None:
        """Return when the directory has its writer, where another process needs that."""

    def announce_failure(self, error: BaseException) -> None:
        """Let the other processes know that this one's part is missing."""

    def check(self) -> None:
        """Raise a RankError if another process has announced that it failed."""

    def keepers(self, _call: str) -> Group:
        """The processes that keep averages, all of which make a call; this one alone where it keeps all."""
        return THIS_PROCESS

    def askers(self, call: str, alone: bool, is_tracking: bool, device: torch.device) -> Group:
        """The processes that make a call for averages; `alone`, or before tracking begins here, this one."""
        if alone or self._callers is None or not is_tracking or not dist.is_initialized():
            return THIS_PROCESS
        return self._callers.gather(device, call)


class Owners(Members):
    """The processes that track one sharded model, as they have met; each keeps the averages of the chunks that it owns.

    Each process makes this object, in the same order of trackers, with what is here of each tensor, and where that
    belongs, if it is not all of it. A chunk belongs to the lowest rank that holds it; one without elements to nobody,
    unless its tensor has none. A RankError names a process that does not come, or has other `options`.

    Attributes:
        holders: by name, the ranks that hold the same chunk of a tensor as this process, growing; its owner first.
        run_id: of the run; of a new one that of rank 0.
    """

    is_chunked = True

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], chunks: Mapping[str, Chunk], options: Mapping[str, str], run_id: str,
        mesh: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.rank, self.names, self.mesh = dist.get_rank(), frozenset(tensors), mesh
        self._device = next((tensor.device for tensor in tensors.values()), HOST)
        self._store = _new_store("members")
        self._all_callers = Callers(self._store, keeps=self.rank == 0)
        held = {
            name: _digest(name, tuple(tensor.shape), chunks.get(name))
            for name, tensor in tensors.items()
            if tensor.numel() or name not in chunks or not math.prod(chunks[name].shape)
        }
        self._store.set(f"here/{self.rank}", json.dumps([dict(options), [*held.values()]]))
        with _rank_0_first(self._store, "met", _ABSENT, 2.0):
            if self.rank == 0:
                _tell_owners(self._store, options, run_id)
        self.run_id, self.session, part, holders = json.loads(self._store.get(f"answer/{self.rank}"))
        self.part, names = part and tuple(part), [*held]
        self.holders = {names[number]: tuple(ranks) for ranks, numbers in holders for number in numbers}
        self._owned = frozenset(name for name, ranks in self.holders.items() if ranks[0] == self.rank)

    def keeps(self, *_: object) -> bool:
        """Whether this process owns a chunk."""
        return self.part is not None

    def owned(self, here: Set[str]) -> Set[str]:
        """Those whose chunk here this process owns, and what was not there when the processes met."""
        return self._owned | (here - self.names)

    def check_kind(self, model: torch.nn.Module) -> None:
        """Nothing: the chunks are compared with those that were tracked."""

    @contextmanager
    def taking_directory(self) -> Iterator[None]:
        """As above: rank 0 first."""
        with _rank_0_first(self._store, "writer", _NO_WRITER):
            try:
                yield
            except BaseException as error:
                if self.rank:
                    self.announce_failure(error)
                raise

    def wait_for_writer(self) -> None:
        """Return when rank 0 holds the directory; a RankError says why not, or that it has not come in time."""
        _wait_for_rank_0(self._store, "writer", _NO_WRITER)

    def announce_failure(self, error: BaseException) -> None:
        """As above."""
        _announce(self._store, "failed", f"rank {self.rank}: {_in_words(error)}")

    def check(self) -> None:
        """As above."""
        failed = ""
        with suppress(RuntimeError):  # as in `_announce`
            failed = self._store.get("failed").decode() if self._store.check(["failed"]) else ""
        rank, _, reason = failed.partition(": ")
        if failed and rank != f"rank {self.rank}":
            raise RankError(rank, reason, "snapshots lack its part from here on; make new trackers to go on")

    def keepers(self, call: str) -> Group:
        """All processes of the model."""
        if not dist.is_initialized():
            reason = "need all processes of the model, and their group was destroyed"
            raise NotReadyError("averages of which each process keeps a part", reason, _FROM_SNAPSHOTS)
        return self._all_callers.gather(self._device, call)

    def askers(self, call: str, alone: bool, *_: object) -> Group:
        """All processes of the model."""
        if alone:
            raise InvalidValueError("alone", "each process keeps a part of the averages only", value=True)
        return self.keepers(call)

    def any(self, flag: bool) -> bool:
        """Whether any process says so; each calls it. The one collective operation of tracking."""
        found = torch.tensor(float(flag), device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())


def _is_in_group() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_of_group(model: torch.nn.Module | None) -> bool | None:
    """Whether this process keeps the averages of a model and writes them; None where that is not known yet.

    That is the first process of the group in which DistributedDataParallel, or FSDP without sharding, holds the model.
    Of a model without wrapper it is the first of all processes: training scripts make their tracker before they wrap
    the model, and the processes must not all write to one directory.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None  # there may be a group later
    modules = () if model is None else model.modules()
    replicated = (one for one in modules if is_fsdp(one) or isinstance(one, torch.nn.parallel.DistributedDataParallel))
    return dist.get_rank(getattr(next(replicated, None), "process_group", None)) <= 0


def is_fsdp(module: torch.nn.Module) -> bool:
    """Whether a module is a wrapper of the first FSDP (`fully_shard` wraps nothing)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what nobody has imported wraps nothing
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


@contextmanager
def led(take: Callable[[], Callable[[], object]], what: str) -> Iterator[None]:
    """A block that no process leaves before all have done it; rank 0 holds something meanwhile.

    `take` takes that, and returns what releases it; `what` says what the block does. A RankError names a process that
    does not come, or fails.
    """
    rank, world, store = dist.get_rank(), dist.get_world_size(), _new_store("led")
    with ExitStack() as held:
        with _rank_0_first(store, "led", _ABSENT):
            if rank == 0:
                held.callback(take())
        try:
            store.set(f"here/{rank}", "")
            for other in range(world):
                _wait(store, f"here/{other}", other, _ABSENT)
            yield
        except BaseException as error:
            store.set(f"done/{rank}", _in_words(error))
            raise
        store.set(f"done/{rank}", "")
        for other in range(world):
            if failed := _wait(store, f"done/{other}", other, f"has not {what}", 60.0):
                raise RankError(f"rank {other}", failed)


@contextmanager
def _rank_0_first(store: Store, key: str, what: str, patience: float = 1.0) -> Iterator[None]:
    """A block that each process does when rank 0 has done it; the error of that is raised in all of them."""
    rank = dist.get_rank()
    if rank:
        _wait_for_rank_0(store, key, what, patience)
    try:
        yield
    except BaseException as error:
        if rank == 0:
            told = (error.subject, error.reason) if isinstance(error, RankError) else ("rank 0", _in_words(error))
            _announce(store, key, json.dumps(told))
        raise
    if rank == 0:
        _announce(store, key, "")


def _wait_for_rank_0(store: Store, key: str, what: str, patience: float = 1.0) -> None:
    """Return when rank 0 has done a block of `_rank_0_first`; raise its error, or that it has not in time."""
    if refused := _wait(store, key, 0, what, patience):
        raise RankError(*json.loads(refused))


def _announce(store: Store, key: str, message: str) -> None:
    with suppress(RuntimeError):  # the group was destroyed, or its first process has ended
        store.set(key, message)


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


def _tell_owners(store: Store, options: Mapping[str, str], run_id: str) -> None:
    """In rank 0: wait for all processes, and tell each of them its part, and which ranks hold each of its chunks."""
    holding: dict[str, list[int]] = defaultdict(list)
    held: list[list[str]] = []
    what = f"{_ABSENT}; call from_model or from_path in every process, with the same arguments"
    for rank in range(dist.get_world_size()):
        own, digests = json.loads(_wait(store, f"here/{rank}", rank, what))
        for option, value in options.items():
            if own[option] != value:
                raise RankError(f"rank {rank}", f"has {option} {own[option]}, and rank 0 has {value}")
        held.append(digests)
        for digest in digests:
            holding[digest].append(rank)
    owners, session = sorted({ranks[0] for ranks in holding.values()}), time.time_ns()
    for rank, digests in enumerate(held):
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, digest in enumerate(digests):
            alike[tuple(holding[digest])].append(number)
        part = (owners.index(rank) + 1, len(owners)) if rank in owners else None
        store.set(f"answer/{rank}", json.dumps([run_id, session, part, [*alike.items()]]))


def _digest(name: str, shape: tuple[int, ...], chunk: Chunk | None) -> str:
    place = [] if chunk is None else [chunk.shape, chunk.offset, shape]
    return hashlib.sha256(json.dumps([name, place]).encode()).hexdigest()[:16]


def _wait(store: Store, key: str, rank: int, what: str, patience: float = 1.0) -> str:
    seconds = patience * PATIENCE
    try:
        store.wait([key], timedelta(seconds=seconds))
        return str(store.get(key).decode())
    except RuntimeError as error:
        raise RankError(f"rank {rank}", f"{what} (waited {seconds:.0f} s)") from error
