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
import json
import logging
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from posthoc_cli import files
from posthoc_cli.devices import count_devices
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    OutputExistsError,
    RankError,
    WriteError,
    argument,
)
from posthoc_cli.export.like import CopiedFile, Like, NamedChunk, Replacement
from posthoc_cli.group import THIS_PROCESS, Group
from posthoc_cli.request import LAYOUTS, FileRequest, OutputRequest
from posthoc_cli.resources import no_bar, worker_count
from posthoc_cli.snapshots.boxes import Box, boxes_of_range
from posthoc_cli.snapshots.directory import is_import, is_snapshot_name
from posthoc_cli.snapshots.entry import Entry, items
from posthoc_cli.snapshots.outputs import INDEX_NAME
from posthoc_cli.snapshots.selection import note_statistics
from posthoc_cli.snapshots.sources import count_sources
from posthoc_cli.snapshots.tensorfile import SUFFIX, read_file
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.engine import (
    InMemory,
    Output,
    Tile,
    check_device,
    compute_tiles,
    cut_tiles,
)
from posthoc_cli.synthesis.plan import Combination, Plan, nbytes
from posthoc_cli.targets import Target

# --- what a user wants of outputs: their layout and their names


def output_paths(request: OutputRequest) -> list[Path]:
    """Name each target's output, none in a dry run: `out`, or a file or folder in it for each.

    Raises InvalidValueError if `out` does not fit the request, or if two targets would have the
    same path.
    """
    targets = request.wished
    out = request.out
    if out is None:
        if not request.dry_run:
            raise InvalidValueError("out", f"is required (except with {argument('dry_run')})")
        return []
    path = files.local_path("out", out)
    is_file = path.suffix in (*LAYOUTS["safetensors"], *LAYOUTS["pt"])
    if request.distributed and is_file:
        reason = "is a file, and a job of several processes makes a folder of shards"
        raise InvalidValueError(
            "out", reason, "name a folder; `ema export` makes one file of it", value=out
        )
    if not request.dry_run:
        files.check_parent(path)
        check_not_in_run(path)
    is_folder = path.is_dir() or path.suffix == "" or str(out).endswith("/")
    if len(targets) == 1 and (request.makes_folders or not is_folder):
        request.find_layout(path)
        paths = [path]
    elif is_file and not is_folder:
        raise InvalidValueError(
            "out", f"is one file for {len(targets)} targets; name a folder", value=out
        )
    else:
        paths = _paths_in(path, targets, "" if request.makes_folders else request.ending)
    return [] if request.dry_run else paths


def check_not_in_run(out: Path) -> None:
    """Raise an InvalidValueError for an output in the folder of a run or of an import, or in its
    place."""
    for folder in (out, out.parent):
        if folder.is_dir() and (is_import(folder) or any(map(is_snapshot_name, folder.iterdir()))):
            reason = f"{folder} is the folder of a run, which holds nothing else"
            raise InvalidValueError("out", reason, "name another folder", value=out)


def _paths_in(
    folder: Path,
    targets: Sequence[Target],
    ending: str,
) -> list[Path]:
    """Name paths after the targets."""
    files.check_folder(folder)
    paths = []
    for target in targets:
        name = target.label if target.sigma_rel is None else f"sigma_rel-{target.sigma_rel!r}"
        path = folder / f"{name}{ending}"
        if path in paths:
            reason = f"two averages would both become {path}; a profile is named after its file"
            raise InvalidValueError("out", reason, "rename one", value=folder)
        paths.append(path)
    return paths


# --- processes


def is_rank() -> bool:
    """Return whether this process is one of several ranks of a torchrun job."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(map(os.environ.get, names)) and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def all_ranks() -> Iterator[Group]:
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
        yield Group(dist.get_rank(), tuple(range(dist.get_world_size())), processes=group)
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
            target["bytes"] = nbytes(self.plan.entries)
        newest = self.plan.sources[-1]
        left_out = [name for name in newest.left_out if not name.endswith("_extra_state")]
        sources = count_sources(self.plan.sources)
        if self.plan.run_end != self.plan.t:
            sources += f" (the newest is of {self.plan.run_end:,.12g})"
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
    request: OutputRequest,
    like: Like | None = None,
    group: Group = THIS_PROCESS,
) -> SynthesisReport | None:
    """Synthesize every target of a plan into its path, if there are any. Returns None in all ranks
    but one.

    In a job this rank's share of the files is made. `like` is what outputs are copies of.
    """
    started = time.perf_counter()
    device, workers = _resources(request, group)
    if group.leads:
        note_statistics(plan.newest.copies)
    copied = None
    if like is not None:
        plan, copied = like.fit(plan)
    if paths:
        infos = [plan.output_info(index) for index in range(len(plan.targets))]
        encoded = [info.encode() for info in infos]
        headers = dict(zip(paths, encoded, strict=True))
        bar = request.progress if group.leads else no_bar
        with bar("synthesizing", plan.read_bytes // len(group.ranks)) as advance:
            job = OutputJob(plan, headers, request, copied, group)
            job.write(advance, device, workers)
    if not group.leads:
        return None
    seconds = time.perf_counter() - started
    return SynthesisReport(plan, tuple(paths), copied, str(device), seconds)


def _resources(
    request: OutputRequest,
    group: Group,
) -> tuple[torch.device, int | None]:
    """Choose the device and the number of threads of this process. The processes of one machine
    share its cores, and each uses another device."""
    if group.is_alone:
        return check_device(request.device), request.workers
    device = request.device
    if devices := count_devices(str(device)):
        rank = int(os.environ.get("LOCAL_RANK", 0))
        device = f"{device}:{rank % devices}"
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return check_device(device), max(1, worker_count() // count)


# --- all outputs together

CPU = torch.device("cpu")


@dataclass(frozen=True)
class OutputJob:
    """Outputs to write: all hold the same tensors."""

    plan: Combination
    headers: Mapping[Path, Mapping[str, Any]]  # of each output
    request: FileRequest
    copied: Replacement | None = None  # what they are copies of
    group: Group = THIS_PROCESS

    @cached_property
    def layout(self) -> str:
        return self.request.find_layout(next(iter(self.headers)))

    @cached_property
    def shards(self) -> tuple[dict[str, list[str]], bytes]:
        return cut_shards(self.plan.entries, self.request.shard_bytes, len(self.group.ranks))

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
        with ExitStack() as stack:
            folders = dict[Path, files.PendingFolder]()  # of the first process

            def begin() -> list[Path]:
                self._check_disk(stack)
                folders.update(self._create_folders(stack))
                return [folder.temporary for folder in folders.values()]

            places = self.group.from_first(begin) or self.headers

            def open_files() -> list[FileOutput]:
                outputs = []
                for path, destination in zip(self.headers, places, strict=True):
                    outputs.append(self._open(stack, path, destination, folders.get(path)))
                return outputs

            outputs = self.group.together(open_files)
            self.group.together(lambda: self._fill(outputs, advance, device, workers))

            def publish() -> None:
                if self.group.leads:
                    for output in outputs:
                        output.publish()

            self.group.together(publish)

    def _fill(
        self,
        outputs: Sequence[FileOutput],
        advance: Callable[[int], object],
        device: torch.device,
        workers: int | None,
    ) -> None:
        """Write all tensors into the outputs; in a job, this rank's share."""
        plan = self._rank_share()
        tiles = cut_tiles(plan, len(outputs), device)
        with closing(compute_tiles(plan, tiles, outputs, device, workers)) as computed:
            for tile in computed:
                advance(tile.stored_bytes)
        for output in outputs:
            output.complete()

    def _check_disk(self, stack: ExitStack) -> None:
        """Check that the outputs fit on the disk, and create their folder."""
        parent = next(iter(self.headers)).parent
        stack.enter_context(files.new_directory(parent))
        each = nbytes(self.plan.entries) if self.copied is None else self.copied.nbytes
        needed = len(self.headers) * each
        free = shutil.disk_usage(parent).free
        if needed > free:
            reason = f"the output takes {needed:,} bytes, and only {free:,} are free on this disk"
            raise WriteError(parent, reason, errno=errno.ENOSPC)
        files.remove_leftovers(parent)

    def _create_folders(self, stack: ExitStack) -> dict[Path, files.PendingFolder]:
        """Begin the outputs that are folders."""
        folders = {}
        for path in self.headers:
            if self.request.overwrite:
                _check_no_snapshot(path)
            copies_folder = self.copied is not None and self.copied.like.is_folder
            if copies_folder or self.layout == "sharded":
                replaces = SHARD_NAMES if self.request.overwrite else None
                folders[path] = stack.enter_context(files.PendingFolder(path, replaces))
        return folders

    def _open(
        self,
        stack: ExitStack,
        path: Path,
        destination: Path,
        folder: files.PendingFolder | None,
    ) -> FileOutput:
        """Begin the files of an output, at a `destination` until they are complete."""
        overwrite = self.request.overwrite
        if self.copied is not None:
            return Copy(stack, self.copied, path, overwrite, folder)
        if self.layout == "pt":
            return PickledFile(self.plan, stack.enter_context(files.PendingFile(path, overwrite)))
        header = self.headers[path]
        entries = self.plan.entries
        if self.layout == "safetensors":
            writer = TensorFileWriter(path, entries, header, {}, overwrite)
            return TensorFiles([stack.enter_context(writer)], writer)
        shards, index = self.shards
        if folder is not None and index:
            files.write_atomically(destination / INDEX_NAME, index)
        writers = []
        for name in [*shards][self._of_rank]:
            shard = {tensor: entries[tensor] for tensor in shards[name]}
            writer = TensorFileWriter(destination / name, shard, header, {})
            writers.append(stack.enter_context(writer))
        return TensorFiles(writers, folder, writers)

    @property
    def _of_rank(self) -> slice:
        """The shards that this rank makes, of all."""
        return slice(self.group.rank, None, len(self.group.ranks))

    def _rank_share(self) -> Combination:
        """Find what this rank makes."""
        plan = self.plan
        if self.group.is_alone:
            return plan
        shards, _ = self.shards
        mine = [*shards.values()][self._of_rank]
        names = set(chain(*mine))
        subset = [name for name, aliases in plan.names.items() if not names.isdisjoint(aliases)]
        return replace(plan, subset=frozenset(subset))


def _check_no_snapshot(path: Path) -> None:
    if path.suffix == SUFFIX and path.is_file():
        with suppress(FileFormatError):
            if read_file(path).kind == "snapshot":
                reason = "is a snapshot of a run and is not replaced"
                raise OutputExistsError(path, reason, "choose another name")


# --- one output, a class for each layout
#
# Each has a temporary name until it is published. `write` takes the tiles of one target, in any
# order and thread. After the last one `complete` does what may fail, and `publish` gives the output
# its name.

SHARD_NAMES = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(INDEX_NAME)}")
"""The names of files in a folder of shards: `overwrite` replaces a folder that holds no others."""


class Pending(Protocol):
    """A file or folder that has a temporary name until it is published."""

    def publish(self) -> object: ...


class FileOutput(Output):
    """An output on disk: a file, or a folder with files in it, which are complete before the folder
    is."""

    def __init__(
        self,
        published: Pending | None,
        inside: Iterable[Pending] = (),
    ) -> None:
        self._published = published  # None of a folder that another process publishes
        self._inside = inside

    def complete(self) -> None:
        for file in self._inside:
            file.publish()

    def publish(self) -> None:
        if self._published is not None:
            self._published.publish()


class TensorFiles(FileOutput):
    """Safetensors files with checksums: one file, or the files of a folder; in a job, this rank's
    share."""

    def __init__(
        self,
        writers: Sequence[TensorFileWriter],
        published: Pending | None,
        inside: Iterable[Pending] = (),
    ) -> None:
        super().__init__(published, inside)
        self._writers = dict[str, TensorFileWriter]()
        for writer in writers:
            self._writers |= dict.fromkeys(writer.entries, writer)

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        for name, data, begin in tile.pieces(values):
            if name in self._writers:
                self._writers[name].write(name, [data], begin)


def cut_shards(
    entries: Mapping[str, Entry],
    size: int,
    ranks: int,
) -> tuple[dict[str, list[str]], bytes]:
    """Divide tensors into shards; return the tensors of each by its file name, and the index of
    several, empty for one.

    Shards are filled in the order of the tensors, up to `size` or an equal share of the ranks; a
    larger tensor has a shard of its own. The names are as Hugging Face libraries expect them.
    """
    total = nbytes(entries)
    limit = min(size, max(1, -(-total // ranks)))
    groups: list[list[str]] = [[]]
    room = limit
    for name, entry in entries.items():
        if entry.nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= entry.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}, b""
    shards = {}
    file_names: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards[file_name] = names
        file_names |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": file_names}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return shards, text.encode()


class PickledFile(FileOutput):
    """A .pt file, which torch.load(weights_only=True) takes. Its tensors are collected in memory,
    since torch writes them in one call."""

    def __init__(self, plan: Combination, file: files.PendingFile) -> None:
        super().__init__(file)
        self._plan = plan
        self._file = file
        self._end = 0
        self._collected = InMemory(plan, CPU)
        self._collected.allocate(plan.tensors)

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        self._collected.write(tile, values)

    def complete(self) -> None:
        state = dict[str, torch.Tensor]()
        for name, aliases in self._plan.names.items():
            state |= dict.fromkeys(aliases, self._collected.tensors[name])
        stream = SimpleNamespace(write=self._append, flush=lambda: None)
        try:
            torch.save(state, stream)
        # torch's own error, which replaces the error of `write`, and a KeyboardInterrupt
        except RuntimeError as error:
            raise error.__context__ or error from None

    def _append(self, data: Any) -> int:
        self._file.write_at(data, self._end)
        self._end += len(data)
        return len(data)


class Copy(FileOutput):
    """A copy of a file, or of a folder."""

    def __init__(
        self,
        stack: ExitStack,
        replacement: Replacement,
        path: Path,
        overwrite: bool,
        folder: files.PendingFolder | None,
    ) -> None:
        self._tensors = replacement.tensors
        self._files = dict[Path, CopiedFile]()
        chunks = defaultdict[Path, list[NamedChunk]](list)
        for replaced in replacement.tensors.values():
            for chunk in replaced.chunks:
                chunks[chunk.path].append(chunk)
        like = replacement.like

        def place(copied: Path) -> Path:
            if folder is None:
                return path
            inside = folder.temporary / copied.relative_to(like.path)
            files.make_directory(inside.parent)
            return inside

        for copied, file in like.files.items():
            pending = stack.enter_context(files.PendingFile(place(copied), overwrite))
            self._files[copied] = CopiedFile(file, chunks[copied], pending)
        others, _ = like.other_files
        for other in others:
            with files.raise_write_errors(other, "copied"):
                shutil.copyfile(other, place(other))
        copies = [*self._files.values()]
        super().__init__(folder or copies[0], copies if folder else ())

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        for name, data, begin in tile.pieces(values):
            if name in self._tensors:
                self._put(*self._tensors[name], data, begin)

    def _put(
        self,
        entry: Entry,
        chunks: Iterable[NamedChunk],
        data: memoryview,
        begin: int,
    ) -> None:
        """Write bytes of a tensor, from byte `begin` on, to its chunks."""
        full = Box.full(entry.shape)
        item = ITEM_BYTES[entry.dtype]
        first = begin // item
        values = np.frombuffer(data, items(entry.dtype))
        for chunk in chunks:
            file = self._files[chunk.path]
            if chunk.box == full:
                file.write(chunk, data, begin)
                continue
            for piece in boxes_of_range(full, first, first + values.size):
                part = chunk.box.intersection(piece)
                if part.size:
                    content = full.view(values, part, first).tobytes()
                    at, _ = chunk.box.span(part)  # in a row: `piece` has all of its last axes
                    file.write(chunk, memoryview(content), at * item)

    def complete(self) -> None:
        for file in self._files.values():
            file.complete()
        super().complete()
