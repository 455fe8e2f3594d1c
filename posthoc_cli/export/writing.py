"""How outputs are written: averages of a run by one process, or by the ranks of a torchrun job; and
exported models.

An output is a temporary file or folder, which gets its name when it is complete. In a job the first
rank makes the folder, and each rank writes some of the shards into it; to an object store each
sends its own. A plan is divided into shards by headers alone, so every rank knows the whole
division. Ranks exchange no tensors: they only report by torch.distributed whether they succeeded. A
rank that has died is noticed by the launcher, which ends the others, or by the ranks that wait for
it: no output appears, and the job is run again.
"""

from __future__ import annotations

import errno
import logging
import operator
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
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
from posthoc_cli.export.copying import Copy
from posthoc_cli.export.layouts import (
    FOLDERS,
    Arrangement,
    Copied,
    Others,
    OutputOptions,
    arranged,
    layout_of,
)
from posthoc_cli.export.like import Like
from posthoc_cli.export.outputs import DistributedOutput, PickledOutput, SafetensorsOutput
from posthoc_cli.resources import ProgressBar, no_bar, worker_count
from posthoc_cli.snapshots.sources import counted
from posthoc_cli.snapshots.tensorfile import SUFFIX, TensorFileWriter, read_file
from posthoc_cli.synthesis.engine import Progress, check_device, synthesize_into
from posthoc_cli.synthesis.plan import Plan

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
                "another process of this job", "failed or died; nothing was finished"
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
        reason = (
            f"did not meet by torch.distributed: {str(error).strip().partition(chr(10))[0][:200]}"
        )
        raise RankError("the processes of this job", reason) from error
    if dist.get_rank():  # the first rank logs for all
        logging.getLogger("posthoc_cli").setLevel(logging.ERROR)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group(None if is_own else group)


# --- outputs


class _PendingOutput:
    """One output, written file by file under another name; the end of `stack` removes what was not
    published.

    The first rank of a job is the owner of the folder, and the others get its `place`.
    """

    def __init__(
        self,
        stack: ExitStack,
        path: Path,
        arrangement: Arrangement,
        header: Mapping[str, Any],
        overwrite: bool,
        is_owner: bool,
    ) -> None:
        self._stack = stack
        self._path = path
        self._arrangement = arrangement
        self._header = header
        self._overwrite = overwrite
        self._file: Any = None  # the current one
        self._folder: Any = None
        if overwrite:
            _check_no_snapshot(path)
        if is_owner:
            files.remove_leftovers(path.parent)
            layout = arrangement.layout
            if layout in FOLDERS:
                pending = files.PendingFolder(path, FOLDERS[layout] if overwrite else None)
                self._folder = stack.enter_context(pending)
        self.place = path if self._folder is None else self._folder.temporary

    def begin(self, name: str) -> Any:
        """Begin a file, and return what takes its tensors."""
        layout = self._arrangement.layout
        place = self.place / name
        copied = self._arrangement.copied
        if copied is not None:
            pending = {file: self._pending(place / name) for file, name in copied.files.items()}
            self._file = Copy(copied.places, pending)
        elif layout == "pt":
            self._file = PickledOutput(self._pending(place))
        elif layout == "dcp":
            self._file = DistributedOutput(self._folder)
        else:
            entries = self._arrangement.parts[name]
            files.make_directory(place.parent)
            writer = TensorFileWriter(place, entries, self._header, {}, self._overwrite)
            self._file = SafetensorsOutput(self._stack.enter_context(writer), entries)
        return self._file

    def _pending(self, path: Path) -> files.PendingFile:
        files.make_directory(path.parent)
        return self._stack.enter_context(files.PendingFile(path, self._overwrite))

    def finish(self) -> None:
        """Finish the file; in the folder it gets its name."""
        self._file.complete()
        if self._arrangement.layout in FOLDERS:
            self._file.publish()

    def publish(self, others: Others) -> None:
        """Add the other files of a folder, and give the output its name."""
        if self._folder is None:
            self._file.publish()
            return
        for name, other in others.items():
            place = self.place / name
            files.make_directory(place.parent)
            if isinstance(other, bytes):
                files.write_atomically(place, other)
                continue
            with files.reported_as_write_error(other, "copied"):
                shutil.copyfile(other, place)
        self._folder.publish()


def _check_no_snapshot(path: Path) -> None:
    kind = None
    if path.suffix == SUFFIX and path.is_file():
        with suppress(FileFormatError):
            kind = read_file(path).kind
    if kind == "snapshot":
        reason = "is a snapshot of a run and is not replaced"
        raise OutputExistsError(path, reason, "choose another name")


def _check_room(
    place: Path,
    arrangement: Arrangement,
    count: int,
) -> None:
    """Raise a WriteError unless the disk has room for outputs."""
    needed = count * (sum(arrangement.sizes) + arrangement.bytes_beside)
    free = shutil.disk_usage(place).free
    if needed > free:
        reason = f"the output takes {needed:,} bytes, and {free:,} are free on this disk"
        raise WriteError(place, reason, errno=errno.ENOSPC)


def write_outputs(
    paths: Sequence[Path],
    arrangement: Arrangement,
    headers: Sequence[Mapping[str, Any]],
    fill: Callable[[Sequence[Any], Iterable[str]], None],
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Write outputs of the same tensors, each with its header, and create their folder.

    `fill` writes the tensors of a file into that of each output. No output appears before all are
    complete. Raises OutputExistsError, and WriteError, before anything is written if the outputs
    do not fit on the disk.
    """
    is_owner = ranks.rank == 0
    outputs = list[_PendingOutput]()
    with ExitStack() as stack:
        with ranks.together() as places:
            if is_owner:
                stack.enter_context(files.new_directory(paths[0].parent))
                _check_room(paths[0].parent, arrangement, len(paths))
            for path, header in zip(paths, headers, strict=True):
                output = _PendingOutput(stack, path, arrangement, header, overwrite, is_owner)
                outputs.append(output)
                places.append(output.place)
        with ranks.together():
            if not is_owner:
                for output, place in zip(outputs, places, strict=True):
                    output.place = place
            for name in [*arrangement.parts][ranks.rank :: ranks.world]:
                fill([output.begin(name) for output in outputs], arrangement.parts[name])
                for output in outputs:
                    output.finish()
        with ranks.together():
            if is_owner:
                for output in outputs:
                    output.publish(arrangement.others)


# --- the synthesis


@dataclass(frozen=True)
class SynthesisReport:
    """The plan of a synthesis, and its result."""

    plan: Plan
    outputs: tuple[Path, ...] = ()  # one per target; empty in a dry run
    copied: Copied | None = None  # the checkpoint that they are copies of
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
    """Synthesize every target of a plan into its path; see also `write_outputs`. Returns None in
    all ranks but one.

    In a job this rank's share of the files is made. `like` is what outputs are copies of.
    """
    started = time.perf_counter()
    device, workers = _resources(options, ranks)
    arrangement = None
    if like is not None:
        plan, arrangement = _arranged_like(plan, like)
    elif paths:
        layout = "sharded" if options.distributed else layout_of(paths[0], options.layout)
        arrangement = arranged(layout, plan.entries, options, ranks.world)
    if arrangement is not None and paths:
        bar = no_bar if ranks.rank else progress
        with bar("synthesizing", plan.read_bytes // ranks.world) as advance:
            fill = _Filling(plan, device, workers, advance)
            infos = [plan.output_info(index) for index in range(len(plan.targets))]
            headers = [info.encoded() for info in infos]
            write_outputs(paths, arrangement, headers, fill, options.overwrite, ranks)
    if ranks.rank:
        return None
    return SynthesisReport(
        plan,
        outputs=tuple(paths),
        copied=None if arrangement is None else arrangement.copied,
        device=str(device),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Filling:
    """What synthesizes tensors into outputs."""

    plan: Plan
    device: torch.device
    workers: int | None
    advance: Progress

    def __call__(self, outputs: Sequence[Any], names: Iterable[str]) -> None:
        wanted = {*names}
        subset = set[str]()
        for name, aliases in self.plan.names.items():
            if not wanted.isdisjoint(aliases):
                subset.add(name)
        part = replace(self.plan, subset=frozenset(subset))
        made = synthesize_into(part, outputs, self.device, self.workers, self.advance)
        with closing(made) as tiles:
            for _ in tiles:
                pass


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


def _arranged_like(plan: Plan, like: Like) -> tuple[Plan, Arrangement]:
    """Return a plan whose tensors have the dtypes of a checkpoint, and the layout of its copy."""
    averages = list[str]()
    for name, tensor in plan.tensors.items():
        if tensor.role == "average":
            averages.append(name)
    arrangement = like.arranged(plan.entries, plan.names, averages, operator.is_)
    dtypes = {name: entry.dtype for name, entry in arrangement.entries.items()}
    return replace(plan, dtypes=dtypes), arrangement
