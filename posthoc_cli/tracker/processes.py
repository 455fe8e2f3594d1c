"""Models that several processes train: which chunk of a tensor each process averages, and how the
processes meet.

Those of a sharded model meet when their trackers are made, to agree on the owners of its chunks,
and at the first update, where the first process takes the directory; replicas meet when averaged
weights are asked for.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store

from posthoc_cli.errors import (
    InvalidValueError,
    NotReadyError,
    PostHocError,
    RankError,
    VanishedError,
)
from posthoc_cli.snapshots.tensorfile import Box, row_major
from posthoc_cli.tracker.clock import TrainingProgress
from posthoc_cli.tracker.memory import HOST

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# seconds after a tracker was made in which the trackers of other processes must be made, too:
# longer than processes differ in what they import, and mostly over at the first evaluation
GRACE = 30.0
# seconds that a call waits for processes that have one before it warns, and gives up
WARNING = 10.0
LIMIT = 300.0

# the meeting points that this process has made, each named for a purpose or a directory: those of
# one name in the same order in all processes
_made: list[str] = []


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to a module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def reshard(model: nn.Module) -> None:
    """Restore the sharded parameters of a `fully_shard` model: a forward pass without backward
    leaves some complete."""
    for module in filter(is_fully_sharded, model.modules()):
        module.reshard()  # type: ignore[operator]


@torch.no_grad()
def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of each tensor that this process holds: the same objects each time, as
    gradients are off."""
    parts = []
    for tensor in tensors:
        parts.append(tensor.to_local() if is_sharded(tensor) else tensor)  # type: ignore[attr-defined]
    return parts


def held_part(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor that this process holds, sharing their memory."""
    if not is_sharded(tensor):
        return tensor
    part, _ = held_box("", tensor)
    return part


def held_box(name: str, tensor: Tensor) -> tuple[Tensor, Box]:
    """Return the elements of a tensor that this process holds, sharing their memory, and their box
    in the tensor."""
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
    """Raise an InvalidValueError if a process's rows are apart."""
    mesh = dtensor.device_mesh
    placement = dtensor.placements[axis]
    dim = placement.dim
    processes = 1  # that share the dimension
    inner = 1  # those of the mesh's later axes
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
    """Return a DTensor in host memory of this process's part, sharded as `like` is; `local` if
    `like` is not."""
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


@dataclass(frozen=True)
class Group:
    """Processes that make one call together, or one alone; the first of `ranks` makes what others
    take."""

    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    device: torch.device = HOST
    processes: Any = None  # torch's group of these ranks; None for all of the training

    @property
    def leads(self) -> bool:
        return self.rank == self.ranks[0]

    @property
    def is_alone(self) -> bool:
        return len(self.ranks) == 1

    def from_all(self, value: Result) -> list[Result]:
        values = [value] * len(self.ranks)
        if not self.is_alone:
            dist.all_gather_object(values, value, self.processes)
        return values

    def together(self, work: Callable[[], Result]) -> Result:
        """Return the result of work in every process; if one fails, all raise its error or a
        RankError with it.

        If nothing else went wrong in any of them, all raise a VanishedError: they may try again.
        """
        if self.is_alone:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  raised again below, when the other processes know
            failure = error
        own_vanished = isinstance(failure, VanishedError)
        own = None
        if failure is not None:
            own = own_vanished, self.rank, _describe(failure)
        failed = sorted(filter(None, self.from_all(own)))
        if not failed:
            return result
        vanished, rank, message = failed[0]
        if failure is None or vanished != own_vanished:
            kind = VanishedError if vanished else RankError
            failure = kind(f"rank {rank}", message)
        raise failure

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Do work in the first process; return its result in every process, or raise errors as
        `together` does."""
        if self.is_alone:
            return work()

        def work_first() -> list[Result]:
            return [work()] if self.leads else []

        sent = [self.together(work_first)]
        dist.broadcast_object_list(sent, self.ranks[0], self.processes)
        (result,) = sent[0]
        return result

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        """Do work in the first process, then in the others, and return its result; an error in one
        is raised in all."""
        done: list[Result] = []
        self.from_first(lambda: done.append(work()))
        return self.together(lambda: done[0] if done else work())

    def exchange(self, value: Tensor, ranks: Sequence[int]) -> None:
        """Copy `value` of the first of these ranks to the others, in place; all of these ranks call
        this."""
        if len(ranks) < 2 or not value.numel():
            return
        in_bytes = value.contiguous().reshape(-1).view(torch.uint8)
        buffer = in_bytes.to(self.device)
        if len(ranks) == len(self.ranks):
            dist.broadcast(buffer, ranks[0], self.processes)
        elif self.rank == ranks[0]:
            for other in ranks[1:]:
                dist.send(buffer, other)
        else:
            dist.recv(buffer, ranks[0])
        if self.rank != ranks[0]:
            received = buffer.cpu().view(value.dtype)
            value.copy_(received.view(value.shape))


def _describe(error: BaseException) -> str:
    """Return the message of an error, with its type unless it is this package's."""
    return str(error) if isinstance(error, PostHocError) else f"{type(error).__name__}: {error}"


THIS_PROCESS = Group()


_STAGES = (
    "shard stages of a pipeline by fully_shard, or give each its own directory, and wrap it in "
    "DistributedDataParallel with the group of its replicas"
)


class Rendezvous:
    """A meeting point for trackers of several processes, of which the one that `keeps` averages
    leads.

    It is in the group's store, so that errors can name a process that is missing; a collective
    would wait in silence. A process `keeps` averages, `counts` steps, or `abstains`: it has no
    tracker.
    """

    def __init__(
        self,
        name: str,
        role: str,
        hint: str,
        tensors: str = "",
    ) -> None:
        # torch has no public name for the store. A release without this name could not make
        # trackers in a group.
        from torch.distributed.distributed_c10d import _get_default_store

        _made.append(name)
        self._name = name
        self._number = _made.count(name)
        self.store: Store = PrefixStore(f"ema-{name}-{self._number}", _get_default_store())
        self._all: Store = PrefixStore("ema-all", _get_default_store())
        self._hint = hint
        self._calls = 0
        self._is_behind = False  # whether steps were seen that the averages lack
        self._rank = dist.get_rank()
        self._ranks: Sequence[int] = range(dist.get_world_size())  # those that take part
        self._tensors = tensors  # identifies the tensors of this process's model
        self._begin = time.monotonic()
        if tensors:
            self.store.set(f"tensors/{self._rank}", tensors)
        self.store.set(f"made/{self._rank}", role)
        self._all.set(f"made/{self._rank}", " ".join(_made))

    def check_tensors(self) -> None:
        """Raise a RankError if the model of this process or of rank 0, as far as trackers are made,
        has other tensors than another one.

        Of two processes, the one whose first update is the later sees the other's tracker.
        """
        for rank, tensors in self._values("tensors").items():
            if 0 in (rank, self._rank) and tensors != self._tensors:
                reason = f"has other tensors than rank {self._rank}, as stages of a pipeline have"
                raise RankError(f"rank {rank}", reason, _STAGES)

    def check_keeper(self) -> None:
        """Raise a RankError if no process keeps averages, as far as trackers are made when
        `_wait_for_trackers` returns."""
        self._wait_for_trackers(lambda: "keeps" in self._values("made").values())
        if "keeps" not in self._values("made").values():
            reason = "only counts steps, and no process that keeps averages has made a tracker"
            raise RankError(f"rank {self._rank}", reason, f"{self._hint}; {_STAGES}")

    def gather(self, device: torch.device, call: str) -> Group:
        """Return all processes, which make this `call`; a RankError names one that does not, or
        makes another one."""
        self._check_in_time()
        self._calls += 1
        prefix = f"call/{self._calls}"
        self._wait_for_calls(prefix, call)
        keepers = [rank for rank, role in self._values("made").items() if role == "keeps"]
        first = next(iter(keepers), self._ranks[0])
        calls = self._values(prefix)
        for rank, other in calls.items():
            if other.startswith("left"):
                raise RankError(f"rank {rank}", other, self._hint)
            if other != calls[first]:
                reason = f"{other}, and rank {first} {calls[first].removeprefix('asks ')}"
                hint = "make the same call in every process, between the same calls of update_"
                raise RankError(f"rank {rank}", reason, hint)
        others = [rank for rank in self._ranks if rank != first]
        return Group(self._rank, (first, *others), device, self._processes)

    def _wait_for_calls(self, prefix: str, call: str) -> None:
        self.store.set(f"{prefix}/{self._rank}", f"asks for {call}")
        try:
            absent = self._wait(
                lambda: self._is_set(prefix) and self._is_set("made"), prefix, LIMIT, WARNING
            )
            if absent:
                reason = f"did not make this call within {LIMIT:.0f} s"
                raise RankError(absent, reason, self._hint)
        except BaseException as error:
            self.store.set(f"{prefix}/{self._rank}", f"left this call by {type(error).__name__}")
            raise

    def note_steps(self, occasion: str, step: int) -> None:
        """Warn, once, if the process that keeps averages has counted fewer steps than another one,
        in the process that comes last to an occasion."""
        key = f"{occasion} {self._calls}"
        self.store.set(f"{key}/{self._rank}", str(step))
        if not self._is_set(key):
            return
        roles = self._values("made")
        steps = {rank: int(value) for rank, value in self._values(key).items()}
        most = max(steps.values())
        for rank, counted in steps.items():
            if roles[rank] == "keeps" and counted < most and not self._is_behind:
                self._is_behind = True
                log.warning(
                    "rank %d keeps the averages, and has counted %d steps, another one %d: they "
                    "lack the rest; of uneven inputs, as with DDP's join, give it the most",
                    rank,
                    counted,
                    most,
                )

    @cached_property
    def _processes(self) -> Any:
        """torch's group of the processes that take part; None for all of the training."""
        if len(self._ranks) == dist.get_world_size():
            return None
        return dist.new_group([*self._ranks], use_local_synchronization=True)

    @cached_property
    def is_alone(self) -> bool:
        """Whether no other process has made a tracker of this directory when `_wait_for_trackers`
        returns; they are told. Else those that have made one take part from here on."""
        self._wait_for_trackers(lambda: False)
        trackers = [rank for rank, role in self._values("made").items() if role != "abstains"]
        if len(trackers) > 1:
            if self._all_have_made_theirs():
                self._ranks = trackers
            return False
        self.store.set("alone", str(self._rank))
        return True

    def _wait_for_trackers(self, are_enough: Callable[[], bool]) -> None:
        """Wait for trackers of other processes: until there are enough, all have made theirs, or
        `GRACE` seconds are over since this one was made."""
        left = self._begin + GRACE - time.monotonic()
        self._wait(lambda: are_enough() or self._all_have_made_theirs(), "made", left, 1.0)

    def _wait(
        self,
        is_over: Callable[[], bool],
        prefix: str,
        seconds: float,
        patience: float,
    ) -> str:
        """Wait, and after `patience` warn; return "" or, after these seconds, the names of the
        processes that lack a key."""
        began = time.monotonic()
        pause = 0.001
        while not is_over():
            passed = time.monotonic() - began
            if passed > min(patience, seconds):
                late = [rank for rank in self._ranks if not self._has(prefix, rank)]
                absent = " and ".join(f"rank {rank}" for rank in late)
                if passed > seconds:
                    return absent
                log.warning("waiting for %s, at most %.0f s: %s", absent, seconds, self._hint)
                patience = seconds
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)
        return ""

    def _check_in_time(self) -> None:
        if self.store.check(["alone"]):
            other = self.store.get("alone").decode()
            reason = "evaluates alone: it found no other tracker of this directory"
            raise RankError(f"rank {other}", reason, self._hint)

    def _all_have_made_theirs(self) -> bool:
        """Return whether each process has made this tracker, or as many as this one, of other
        directories: it is of a model of its own then."""
        if self._is_set("made"):
            return True
        keys = [f"made/{rank}" for rank in self._ranks]
        if not self._all.check(keys):
            return False
        for value in self._all.multi_get(keys):
            names = value.decode().split()
            if len(names) < len(_made) and names.count(self._name) < self._number:
                return False
        return True

    def _is_set(self, prefix: str) -> bool:
        """Return whether every process has set a key, by one request."""
        keys = [f"{prefix}/{rank}" for rank in self._ranks]
        return bool(self.store.check(keys))

    def _has(self, prefix: str, rank: int) -> bool:
        return bool(self.store.check([f"{prefix}/{rank}"]))

    def _values(self, prefix: str) -> dict[int, str]:
        """Return the values of a key by rank, of the processes that have set it: by two requests if
        all have."""
        ranks = self._ranks
        if not self._is_set(prefix):
            ranks = [rank for rank in ranks if self._has(prefix, rank)]
        values = self.store.multi_get([f"{prefix}/{rank}" for rank in ranks])
        return {rank: value.decode() for rank, value in zip(ranks, values, strict=True)}


class Members:
    """The processes that track one model, of which each has all: one keeps averages and writes,
    others count."""

    is_chunked = False  # whether each process keeps chunks of the averages, see `ShardOwners`

    def __init__(
        self,
        model: nn.Module | None = None,
        directory: Path | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.keeps = is_first_of_group(model)  # averages, and writes them to the directory
        # among those that keep averages; the first has the directory's lock, and thins
        self.rank = 0
        # this process's part of snapshots, from 1, and the number of parts
        self.part: tuple[int, int] | None = None
        # of this training, set when processes meet; later trainings have larger numbers
        self.session = 0
        # of all tracked tensors of a sharded model, also of other stages of a pipeline
        self.names: frozenset[str] = frozenset()
        self.mesh: dict[str, Any] = {}  # the processes' arrangement, as a snapshot's header has it
        self._meeting: Rendezvous | None = None
        if model is not None and dist.is_initialized() and dist.get_world_size() > 1:
            # The first, second, ... tracker of a directory that each process makes meet.
            hint = f"make it in every process, with a tracker of {directory}"
            named_shapes = sorted((shapes or {}).items())
            tensors = _digest(repr(named_shapes))
            role = "keeps" if self.keeps else "counts"
            self._meeting = Rendezvous(_digest(str(directory)), role, hint, tensors)

    def owned(self, names: Set[str]) -> Set[str]:
        """Return those of the model's tensors that this process averages and writes, or has a chunk
        of."""
        return names

    def announce_failure(self, error: BaseException) -> None:
        """Announce to the other processes that this one's part is missing."""

    def check_model(self) -> None:
        """Raise a RankError if another process tracks a model of other tensors."""
        if self._meeting is not None and dist.is_initialized():
            self._meeting.check_tensors()

    def check(self) -> None:
        """Raise a RankError if another process has announced a failure, or if none writes."""
        if self._meeting is not None and not self.keeps and dist.is_initialized():
            self._meeting.check_keeper()

    def check_part(self, _step: int, _t: float) -> None:
        """Raise a RankError if another process writes its part of the next snapshot for another
        time."""

    def keepers(self, _call: str) -> Group:
        """Return the processes that keep averages, all of which make this call."""
        return THIS_PROCESS

    def callers(
        self,
        call: str,
        now: TrainingProgress,
        is_tracking: bool,
        device: torch.device,
    ) -> Group:
        """Return the processes that make a call for averages; this one before it tracks."""
        meeting = self._meeting
        if meeting is None or not is_tracking or not dist.is_initialized():
            return THIS_PROCESS
        if meeting.is_alone:
            return THIS_PROCESS
        meeting.note_steps("asks", now.step)
        return meeting.gather(device, call)

    def note_end(self, step: int) -> None:
        """Warn if other processes have counted more steps than the one that keeps the averages."""
        if self._meeting is not None and dist.is_initialized():
            with suppress(RuntimeError):  # the group's first process has ended
                self._meeting.note_steps("ends", step)


class ShardOwners(Members):
    """The processes that track one sharded model; each keeps the averages of the chunks that it
    owns.

    All processes make this object, in the same order of trackers, with the tensors of which they
    hold a chunk. The owner of a chunk is the lowest rank that holds it (`holders`, by name,
    ascending); a chunk without elements has none, unless its tensor has no
    elements. Stages of a pipeline have tensors of their own: `shapes` are the complete ones of the
    weights of all. A RankError names a process that has other `options`.
    """

    is_chunked = True

    def __init__(
        self,
        model: nn.Module,
        tracked: Any,  # a TrackedModel
        options: Mapping[str, str],
        run_id: str,
    ) -> None:
        super().__init__()
        self.rank = dist.get_rank()
        self.mesh = _largest_mesh(model)
        self._parts = 0  # of snapshots, that this process has written
        self._device = next((parameter.device for parameter in model.parameters()), HOST)
        hint = "call from_model, from_path or update_ in every process, with the same arguments"
        role = "keeps" if self.rank == 0 else "counts"
        self._owners_meeting = Rendezvous("members", role, hint)
        digests = _chunk_digests(tracked)
        own = _Presence(
            options=options,
            digests=[*digests.values()],
            run_id=run_id,
            session=time.time_ns(),
            names=tracked.known_names,
            shapes=tracked.complete_shapes,
        )
        presences = self.keepers("a tracker of this model").from_all(own)
        _check_options(presences)
        self.run_id = presences[0].run_id
        self.session = presences[0].session
        self._divide(presences, digests)

    def _divide(
        self,
        presences: Sequence[_Presence],
        digests: Mapping[str, str],
    ) -> None:
        """Divide the chunks among the processes."""
        self.shapes = dict[str, tuple[int, ...]]()
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, presence in enumerate(presences):
            self.names |= presence.names
            self.shapes |= presence.shapes
            for digest in presence.digests:
                holders[digest].append(rank)
        self.holders = dict[str, tuple[int, ...]]()
        self._owned = set[str]()
        for name, digest in digests.items():
            ranks = tuple(holders[digest])
            self.holders[name] = ranks
            if ranks[0] == self.rank:
                self._owned.add(name)
        owners = sorted({first for first, *_ in holders.values()})
        self.keeps = self.rank in owners
        if self.keeps:
            self.part = owners.index(self.rank) + 1, len(owners)

    def owned(self, names: Set[str]) -> Set[str]:
        """Return the tensors whose chunk this process owns, and those that did not exist when the
        processes met."""
        return self._owned | (names - self.names)

    def announce_failure(self, error: BaseException) -> None:
        with suppress(RuntimeError):  # the group was destroyed, or its first process has ended
            self._owners_meeting.store.set("failed", f"rank {self.rank}: {_describe(error)}")

    def check(self) -> None:
        failed = ""
        store = self._owners_meeting.store
        with suppress(RuntimeError):  # as in `announce_failure`
            if store.check(["failed"]):
                failed = store.get("failed").decode()
        rank, _, reason = failed.partition(": ")
        if failed and rank != f"rank {self.rank}":
            raise RankError(
                rank, reason, "snapshots lack its part from here on; make new trackers to continue"
            )

    def check_part(self, step: int, t: float) -> None:
        self._parts += 1
        own = f"step {step:,}, t = {t:.17g}"
        first = own
        with suppress(RuntimeError):  # as in `announce_failure`
            store = self._owners_meeting.store
            first = store.compare_set(f"part/{self._parts}", "", own).decode()
        if first != own:
            reason = f"has a part of a snapshot of {own}, and another process of {first}"
            hint = "call update_ equally often in every process, with the same t"
            raise RankError(f"rank {self.rank}", reason, hint)

    def keepers(self, call: str) -> Group:
        if not dist.is_initialized():
            reason = "need all processes of the model, and their group was destroyed"
            hint = (
                "use the snapshots: ema synthesize, or Run(directory).average(sigma_rel), in "
                "one process"
            )
            raise NotReadyError("averages of which each process keeps a part", reason, hint)
        return self._owners_meeting.gather(self._device, call)

    def callers(self, call: str, now: TrainingProgress, *_: object) -> Group:
        return self.keepers(f"{call} at {now}")


class _Presence(NamedTuple):
    """What a process tells the others when those of a sharded model meet."""

    options: Mapping[str, str]
    digests: Sequence[str]  # each identifies a chunk that the process holds, in all processes
    run_id: str
    session: int
    names: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]


def _chunk_digests(tracked: Any) -> dict[str, str]:
    """Return the digest of each chunk of a TrackedModel in this process that may have an owner."""
    digests = {}
    for name, box in tracked.boxes.items():
        shape = tracked.shapes[name]
        if box.size or not math.prod(shape):
            digests[name] = _digest(repr((name, shape, box)))
    return digests


def _check_options(presences: Sequence[_Presence]) -> None:
    for rank, presence in enumerate(presences):
        for option, value in presences[0].options.items():
            other = presence.options[option]
            if other != value:
                raise RankError(f"rank {rank}", f"has {option} {other}, and rank 0 has {value}")


def _largest_mesh(model: nn.Module) -> dict[str, Any]:
    """Return the arrangement of the processes, as a snapshot's header has it."""
    meshes: list[Any] = []
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            meshes.append(mesh)
    if not meshes:
        return {}
    largest = max(meshes, key=lambda mesh: mesh.size())
    return {"shape": list(largest.mesh.shape), "names": largest.mesh_dim_names}


def abstain(directory: Path) -> None:
    """Announce that this process makes no tracker of an absolute directory, so that the one that
    does waits for no other."""
    if dist.is_initialized():
        Rendezvous(_digest(str(directory)), "abstains", "")


def is_first_of_group(model: nn.Module | None) -> bool:
    """Return whether this process keeps a model's averages: the first of its
    DistributedDataParallel's group, or, as scripts may make their tracker before they wrap the
    model, of all."""
    if not dist.is_initialized():
        return True
    group = None
    for module in () if model is None else model.modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            group = module.process_group
            break
    return dist.get_rank(group) <= 0


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:16]
