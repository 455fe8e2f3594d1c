"""A synthesis that is made in parts, by processes that share nothing but the folder: a shard each, an index at last.

What holds, whatever happens in between, to any of the processes and in any order:

1. A part is absent or whole, and says which plan it belongs to.
2. Making a part that is there, whole and of the same plan, leaves it as it is: a job can be repeated.
3. Without its index a folder is no model to any reader; the index is written last, in one step, once every part
   was found to be there and to belong together.
4. An index never leads to parts of two plans: one that would goes before the part that it leads to is replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, OutputExistsError
from posthoc_cli.export.layouts import Sink, make_sink
from posthoc_cli.export.part_file import PartFile, part_path, plan_digest
from posthoc_cli.export.sharded import holds_model, holds_snapshot
from posthoc_cli.export.space import check_space
from posthoc_cli.export.synthesized import fill_sinks
from posthoc_cli.snapshots.index import INDEX_NAME, read_index
from posthoc_cli.snapshots.verifying import verify_payload
from posthoc_cli.synthesis import Plan, Progress, parse_accumulate
from posthoc_cli.synthesis.division import Part, divide, plan_of_part
from posthoc_cli.synthesis.plan import names_by_tensor

_PART_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class MadePart:
    """What became of one part.

    Attributes:
        part: which one.
        paths: its file for each target.
        there: the targets, by index, whose file was there already, whole and of the same plan.
        tensors: stored tensors in it.
        read_bytes: bytes of snapshots that making it takes.
        nbytes: bytes of its tensors, for all targets.
    """

    part: Part
    paths: tuple[Path, ...]
    there: frozenset[int]
    tensors: int
    read_bytes: int
    nbytes: int


class PartedSynthesis:
    """A plan divided into parts.

    Arguments:
        plan: from `plan_synthesis`, of snapshots on disk.
        folders: where the model of each target goes.
        parts: how many.
        dtype, accumulate: as in `synthesis.synthesize`.
        overwrite: replace parts, and models, that are others.
        container: the folder of the folders, to be made when it is missing.
    """

    def __init__(
        self,
        plan: Plan,
        folders: Sequence[Path],
        parts: int,
        dtype: torch.dtype | str | None = None,
        accumulate: torch.dtype | str | None = None,
        overwrite: bool = False,
        container: Path | None = None,
    ) -> None:
        self.plan, self.folders, self.parts, self.overwrite = plan, list(folders), Part(1, parts).of, overwrite
        self._dtype, self._accumulate, self._container = dtype, accumulate, container
        self._specs = {spec.name: spec for spec in plan.specs(dtype)}
        self._names = names_by_tensor(plan.newest.info)

    @cached_property
    def division(self) -> list[list[str]]:
        """The stored tensors of each part."""
        targets = len(self.plan.targets)
        written = {name: targets * sum(self._specs[n].nbytes for n in names) for name, names in self._names.items()}
        return divide(self.plan, self.parts, written)

    def plan_of(self, part: Part) -> Plan:
        """The plan of one part, for all targets."""
        return plan_of_part(self.plan, self.division[part.number - 1])

    def file(self, target: int, part: Part) -> PartFile:
        """What the file of one part of a target must be."""
        plan = self.plan_of(part)
        specs = tuple(plan.specs(self._dtype))
        return PartFile(
            part_path(self.folders[target], part), part, plan.output_info(target), specs, self.plan_ids[target]
        )

    @cached_property
    def plan_ids(self) -> list[str]:
        """Digest of the plan for each target."""
        wide, specs = parse_accumulate(self._accumulate), list(self._specs.values())
        return [plan_digest(self.plan, k, specs, wide, self.division) for k in range(len(self.plan.targets))]

    def describe(self, part: Part) -> MadePart:
        """What making a part would read and write, which is not looked for."""
        plan = self.plan_of(part)
        paths = tuple(part_path(folder, part) for folder in self.folders)
        nbytes = len(self.plan.targets) * sum(spec.nbytes for spec in plan.specs(self._dtype))
        tensors = len(self.division[part.number - 1])
        return MadePart(part, paths, frozenset(), tensors, plan.read_bytes, nbytes)

    def check_space(self) -> None:
        """Check that the disk has room for all parts that are not there yet.

        Raises:
            WriteError: it has not; nothing was written.
        """
        parts = [Part(number, self.parts) for number in range(1, self.parts + 1)]
        each = {part: sum(spec.nbytes for spec in self.plan_of(part).specs(self._dtype)) for part in parts}
        missing = [(part_path(folder, part), each[part]) for folder in self.folders for part in parts]
        check_space({path: nbytes for path, nbytes in missing if not path.exists()})

    def make(
        self, part: Part, device: str = "cpu", progress: Progress | None = None, workers: int | None = None
    ) -> MadePart:
        """Make one part of every target; what is there, whole and of this plan, stays as it is.

        Arguments:
            device, progress, workers: as in `synthesis.synthesize`.

        Raises:
            OutputExistsError: another file has a part's name, or another model is in its folder, and `overwrite` is
                False.
            WriteError, FileFormatError, NonFiniteError: as in `write_synthesis`.
        """
        wanted = [self.file(target, part) for target in range(len(self.plan.targets))]
        there = frozenset(target for target, file in enumerate(wanted) if self._is_there(file))
        missing = [target for target in range(len(wanted)) if target not in there]
        if missing:
            plan = plan_of_part(self.plan.only(missing), self.division[part.number - 1])
            self._write(plan, [wanted[target] for target in missing], device, progress, workers)
        made = self.describe(part)
        return MadePart(part, made.paths, there, made.tensors, made.read_bytes, made.nbytes)

    def _write(
        self, plan: Plan, wanted: Sequence[PartFile], device: str, progress: Progress | None, workers: int | None
    ) -> None:
        outermost = self._container or wanted[0].path.parent
        if not outermost.parent.is_dir():
            raise InvalidValueError(outermost, "its folder does not exist")
        check_space({file.path: file.nbytes for file in wanted})
        with ExitStack() as stack:
            sinks: list[Sink] = []
            for file in wanted:
                stack.enter_context(files.new_directory(file.path.parent))
                sink = make_sink("safetensors", file.path, file.specs, file.metadata, self.overwrite)
                sinks.append(stack.enter_context(sink))
            fill_sinks(plan, sinks, self._dtype, device, progress, self._accumulate, workers)
            for sink, file in zip(sinks, wanted, strict=True):
                self._publish(sink, file)

    def _publish(self, sink: Sink, file: PartFile) -> None:
        if self.overwrite:
            _remove_index_of(file.path)
        try:
            sink.commit()
        except OutputExistsError:
            # Another process has made the same part meanwhile.
            if not self._is_there(file):
                raise

    def _is_there(self, file: PartFile) -> bool:
        """Whether a part is there, whole and of this plan; every byte of it is verified.

        Raises:
            OutputExistsError: something else is, and may not be replaced.
        """
        folder = file.path.parent
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(folder, "is a file; shards need a folder")
        if self.overwrite and holds_snapshot(folder):
            raise OutputExistsError(folder, "is a snapshot of a run and is not replaced", "choose another name")
        if not os.path.lexists(file.path):
            if not self.overwrite and holds_model(folder):
                raise OutputExistsError(
                    folder, "holds a model already", "choose another folder, or overwrite=True to replace it"
                )
            return False
        try:
            verify_payload(file.path, file.read_header())
        except (FileFormatError, MismatchError) as error:
            if not self.overwrite:
                raise OutputExistsError(
                    error.subject, error.reason, "choose another folder, or overwrite=True to replace it"
                ) from error
            return False
        return True


def part_counts(folder: Path) -> set[int]:
    """Into how many parts the models are divided of which parts are in a folder."""
    try:
        names = [path.name for path in files.system.list(folder)]
    except OSError:
        return set()
    return {int(match[2]) for name in names if (match := _PART_NAME.fullmatch(name))}


def parts_for(nbytes: int, limit: int, ranks: int) -> int:
    """Parts of about `limit` bytes at most, as many for each of `ranks` processes."""
    return ranks * max(1, -(-nbytes // (limit * ranks)))


def _remove_index_of(path: Path) -> None:
    """Remove the index that leads to a part, before that is replaced by one of another plan."""
    index = path.parent / INDEX_NAME
    try:
        if not os.path.lexists(index) or path.name not in read_index(index):
            return
    except FileFormatError:
        pass  # it leads nowhere
    with files.reported_as_write_error(index, "removed"):
        files.unlink_if_there(index)
        files.system.fsync_directory(index.parent)
