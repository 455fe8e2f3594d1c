"""How outputs are written: averages of a run by one process, or by the ranks of a torchrun job; and
exported models.

In a job the first rank makes the folder, and each rank writes some of the shards into it. Tensors
are divided into shards by headers alone, so every rank knows the whole division. Ranks exchange no
tensors: they only report by torch.distributed whether they succeeded. A rank that has died is
noticed by the launcher, which ends the others, or by the ranks that wait for it: no output appears,
and the job is run again.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from posthoc_cli import files
from posthoc_cli.errors import (
    FileFormatError,
    OutputExistsError,
    PostHocError,
    RankError,
    WriteError,
)
from posthoc_cli.export.like import Copy, Like, Replacement
from posthoc_cli.export.options import OutputOptions
from posthoc_cli.export.outputs import (
    FOLDERS,
    DistributedFolder,
    FileOutput,
    PickledFile,
    SafetensorsFile,
    Shards,
    cut_shards,
)
from posthoc_cli.resources import ProgressBar, no_bar, worker_count
from posthoc_cli.snapshots.sources import counted
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry, TensorFileWriter, read_file
from posthoc_cli.synthesis.engine import check_device, cut_tiles, make_tiles
from posthoc_cli.synthesis.plan import Combination, Plan, nbytes

# --- processes


def is_rank() -> bool:
    """Return whether this process is one of several ranks of a torchrun job."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(map(os.environ.get, wanted)) and os.environ["WORLD_SIZE"] != "1"


@dataclass(frozen=True)
class Ranks:
    """The processes of a torchrun job, or this process alone."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @contextmanager
    def together(self) -> Iterator[list[Any]]:
        """Run the block in all ranks, and raise a RankError if that of another one failed.

        It gets a list, which afterwards holds in all ranks what the first rank has put into it.
        """
        failure = None
        shared = list[Any]()
        try:
            yield shared
        except PostHocError as error:
            failure = error
        results: list[Any] = [(failure and str(failure), shared)] * self.world
        try:
            if self.group is not None:
                dist.all_gather_object(results, results[0], self.group)
        except RuntimeError as error:
            raise failure or RankError(
                "another process of this job",
                "failed or died; nothing was finished",
            ) from error
        for rank, (text, _) in enumerate(results):
            if text:
                raise failure or RankError(f"rank {rank}", f"failed: {text}")
        shared[:] = results[0][1]


ALONE = Ranks()


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """Connect the ranks of a torchrun job for the block; raise RankError if they do not meet."""
    wait = timedelta(minutes=30)  # for other ranks to begin, or to finish their current shards
    # or torch prints a stack trace when a rank has died
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    is_own = not dist.is_initialized()
    try:
        if is_own:
            dist.init_process_group("gloo", timeout=wait)
        group = dist.new_group(backend="gloo", timeout=wait)
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        reason = f"did not meet by torch.distributed: {line[:200]}"
        raise RankError("the processes of this job", reason) from error
    if dist.get_rank():  # the first rank logs for all
        logging.getLogger("posthoc_cli").setLevel(logging.ERROR)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group(None if is_own else group)


# --- a synthesis


@dataclass(frozen=True)
class SynthesisReport:
    """The plan of a synthesis, and its result."""

    plan: Plan
    outputs: tuple[Path, ...] = ()  # one per target; empty in a dry run
    copied: Replacement | None = None  # the checkpoint that they are copies of
    device: str = "cpu"  # computed the sums
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        report = self.plan.to_dict()
        for index, target in enumerate(report["targets"]):
            target["output"] = str(self.outputs[index]) if self.outputs else None
            target["seconds"] = self.seconds
            target["bytes"] = self.plan.nbytes
        left_out = [name for name in self.plan.newest.left_out if not name.endswith("_extra_state")]
        sources = counted(self.plan.sources)
        if self.plan.last != self.plan.t:
            sources += f" (the newest is of {self.plan.last:,.12g})"
        report |= {
            "device": self.device,
            "sources": sources,
            "choice": self.plan.choice,
            "read_bytes": self.plan.read_bytes,
            "left_out": left_out,
        }
        if self.copied is not None:
            report["like"] = self.copied.to_dict()
        return report


def write_synthesis(
    plan: Plan,
    paths: Sequence[Path],
    options: OutputOptions = OutputOptions(),
    like: Like | None = None,
    ranks: Ranks = ALONE,
    progress: ProgressBar = no_bar,
) -> SynthesisReport | None:
    """Synthesize every target of a plan into its path, if there are any. Returns None in all ranks
    but one.

    In a job this rank's share of the files is made. `like` is what outputs are copies of.
    """
    started = time.perf_counter()
    device, workers = _resources(options, ranks)
    copied = None
    if like is not None:
        plan, copied = like.fitted(plan)
    if paths:
        infos = [plan.output_info(index) for index in range(len(plan.targets))]
        headers = dict(zip(paths, (info.encoded() for info in infos), strict=True))
        bar = no_bar if ranks.rank else progress
        with bar("synthesizing", plan.read_bytes // ranks.world) as advance:
            writing = Writing(plan.passes(), headers, options, copied, ranks)
            writing.write(advance, device, workers)
    if ranks.rank:
        return None
    seconds = time.perf_counter() - started
    return SynthesisReport(plan, tuple(paths), copied, str(device), seconds)


def _resources(options: OutputOptions, ranks: Ranks) -> tuple[torch.device, int | None]:
    """Return the device and the number of threads of this process; those of one machine share its
    cores, and each uses another device."""
    if ranks.world == 1:
        return check_device(options.device), options.workers
    device = options.device
    if str(device) == "cuda":
        rank = int(os.environ.get("LOCAL_RANK", 0))
        device = f"cuda:{rank % max(1, torch.cuda.device_count())}"
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return check_device(device), max(1, worker_count() // count)


# --- outputs

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Writing:
    """Outputs to write: all hold the same tensors."""

    parts: Sequence[Combination]
    headers: Mapping[Path, Mapping[str, Any]]  # of each output
    options: OutputOptions
    copied: Replacement | None = None  # what they are copies of
    ranks: Ranks = ALONE

    @cached_property
    def layout(self) -> str:
        return self.options.layout_of(next(iter(self.headers)))

    @cached_property
    def entries(self) -> dict[str, Entry]:
        entries = dict[str, Entry]()
        for plan in self.parts:
            entries |= plan.entries
        return entries

    @cached_property
    def shards(self) -> tuple[dict[str, list[str]], bytes]:
        return cut_shards(self.entries, self.options.shard_bytes, self.ranks.world)

    def write(
        self,
        advance: Callable[[int], object],
        device: torch.device = CPU,
        workers: int | None = None,
    ) -> None:
        """Write the outputs, and create their folder.

        `advance` is called with the number of bytes just read. No output appears before all are
        complete. Raises OutputExistsError, and WriteError, before anything is written if the
        outputs do not fit on the disk.
        """
        is_first = self.ranks.rank == 0
        with ExitStack() as stack:
            folders = {}
            with self.ranks.together() as places:
                if is_first:
                    folders = self._begin(stack)
                    places += [folder.temporary for folder in folders.values()]
            with self.ranks.together():
                outputs = []
                for path, place in zip(self.headers, places or self.headers, strict=True):
                    outputs.append(self._open(stack, path, place, folders.get(path)))
                parts = [self._own(plan) for plan in self.parts]
                tiles = cut_tiles(parts, len(outputs), device)
                with closing(make_tiles(parts, tiles, outputs, device, workers)) as made:
                    for tile in made:
                        advance(tile.stored_bytes)
                for output in outputs:
                    output.complete()
            with self.ranks.together():
                if is_first:
                    for output in outputs:
                        output.publish()

    def _begin(self, stack: ExitStack) -> dict[Path, files.PendingFolder]:
        """Check that outputs may be written, and begin those that are folders."""
        parent = next(iter(self.headers)).parent
        stack.enter_context(files.new_directory(parent))
        each = nbytes(self.entries) if self.copied is None else self.copied.nbytes
        needed = len(self.headers) * each
        free = shutil.disk_usage(parent).free
        if needed > free:
            reason = f"the output takes {needed:,} bytes, and {free:,} are free on this disk"
            raise WriteError(parent, reason, errno=errno.ENOSPC)
        files.remove_leftovers(parent)
        folders = {}
        for path in self.headers:
            if self.options.overwrite:
                _check_no_snapshot(path)
            if self.layout in FOLDERS or (self.copied is not None and self.copied.like.is_folder):
                replaces = FOLDERS.get(self.layout) if self.options.overwrite else None
                folders[path] = stack.enter_context(files.PendingFolder(path, replaces))
        return folders

    def _open(
        self,
        stack: ExitStack,
        path: Path,
        place: Path,
        folder: files.PendingFolder | None,
    ) -> FileOutput:
        """Begin the files of an output; `place` is the path, or the folder's until then."""
        overwrite = self.options.overwrite
        if self.copied is not None:
            return Copy(stack, self.copied, path, overwrite, folder)
        if self.layout == "pt":
            return PickledFile(self.parts, stack.enter_context(files.PendingFile(path, overwrite)))
        if self.layout == "dcp" and folder is not None:
            return DistributedFolder(self.parts, folder)
        header = self.headers[path]
        if self.layout == "safetensors":
            writer = TensorFileWriter(path, self.entries, header, {}, overwrite)
            return SafetensorsFile(stack.enter_context(writer))
        shards, index = self.shards
        writers = []
        for name in [*shards][self.ranks.rank :: self.ranks.world]:
            entries = {tensor: self.entries[tensor] for tensor in shards[name]}
            writer = TensorFileWriter(place / name, entries, header, {})
            writers.append(stack.enter_context(writer))
        return Shards(writers, index, folder)

    def _own(self, plan: Combination) -> Combination:
        """Return what this rank makes."""
        if self.ranks.world == 1:
            return plan
        shards, _ = self.shards
        own = set(chain(*[*shards.values()][self.ranks.rank :: self.ranks.world]))
        subset = [name for name, aliases in plan.names.items() if not own.isdisjoint(aliases)]
        return replace(plan, subset=frozenset(subset))


def _check_no_snapshot(path: Path) -> None:
    kind = None
    if path.suffix == SUFFIX and path.is_file():
        with suppress(FileFormatError):
            kind = read_file(path).kind
    if kind == "snapshot":
        reason = "is a snapshot of a run and is not replaced"
        raise OutputExistsError(path, reason, "choose another name")
