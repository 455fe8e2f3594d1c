"""All outputs of one call together, written by one process or by the ranks of a torchrun job.

In a job the first rank makes the folder, and each rank writes some of the shards into it. Tensors
are divided into shards by headers alone, so every rank knows the whole division. Ranks exchange no
tensors: they only report by torch.distributed whether they succeeded. A rank that has died is
noticed by the launcher, which ends the others, or by the ranks that wait for it: no output appears,
and the job is run again.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.errors import (
    FileFormatError,
    OutputExistsError,
    WriteError,
)
from posthoc_cli.export.like import Replacement
from posthoc_cli.export.output import (
    CPU,
    SHARD_NAMES,
    Copy,
    FileOutput,
    PickledFile,
    TensorFiles,
    cut_shards,
)
from posthoc_cli.group import THIS_PROCESS, Group
from posthoc_cli.request import FileRequest
from posthoc_cli.snapshots.output_mark import encode_mark
from posthoc_cli.snapshots.outputs import INDEX_NAME
from posthoc_cli.snapshots.tensorfile import SUFFIX, read_file
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.engine import compute_tiles
from posthoc_cli.synthesis.plan import Combination, nbytes
from posthoc_cli.synthesis.tiles import cut_tiles


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
        header = self.headers[path]
        if self.copied is not None:
            return Copy(stack, self.copied, header, path, overwrite, folder)
        if self.layout == "pt":
            file = stack.enter_context(files.PendingFile(path, overwrite))
            return PickledFile(self.plan, encode_mark(header), file)
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
