"""What the file of one part of a synthesis must be, and whether the one that is there is it.

A part is a shard in the sharded layout that also says in its metadata (see `snapshots.format`) which part it is and
which plan it belongs to, so that parts of different runs, targets, snapshots, releases or divisions never mix.

A synthesis that is made in parts, by processes that share nothing but the folder: a shard each, an index at last.

What holds, whatever happens in between, to any of the processes and in any order:

1. A part is absent or whole, and says which plan it belongs to.
2. Making a part that is there, whole and of the same plan, leaves it as it is: a job can be repeated.
3. Without its index a folder is no model to any reader; the index is written last, in one step, once every part
   was found to be there and to belong together.
4. An index never leads to parts of two plans: one that would goes before the part that it leads to is replaced.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import xxhash

import posthoc_cli
from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, NotReadyError, OutputExistsError
from posthoc_cli.export.outputs import Sink, check_space, fill_sinks, make_sink
from posthoc_cli.export.sharded import MODEL_FILE, holds_model, holds_snapshot
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.format import FileHeader
from posthoc_cli.snapshots.models import INDEX_NAME, encode_index, read_index
from posthoc_cli.snapshots.outputs import (
    OutputInfo,
    decode_output,
    output_difference,
    output_metadata,
    same_coefficients,
)
from posthoc_cli.snapshots.reader import read_header, read_small_file, verify_payload
from posthoc_cli.synthesis.engine import Progress, parse_accumulate
from posthoc_cli.synthesis.parts import Part, divide, plan_of_part
from posthoc_cli.synthesis.plan import Plan, names_by_tensor
from posthoc_cli.synthesis.sources import DiskSource, Source

PART_PATTERN = "model-{number:05d}-of-{of:05d}.safetensors"


def part_path(folder: Path, part: Part) -> Path:
    """Where a part goes: the name that it has in the finished, sharded model."""
    return folder / PART_PATTERN.format(number=part.number, of=part.of)


@dataclass(frozen=True)
class PartFile:
    """A part of one target, as it must be on disk.

    Attributes:
        path: its file.
        part: which one it is.
        info: what it says about itself as an output.
        specs: its tensors.
        plan_id: digest of the plan, see `plan_digest`.
    """

    path: Path
    part: Part
    info: OutputInfo
    specs: tuple[fmt.TensorSpec, ...]
    plan_id: str

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.specs)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Strings for its header."""
        return output_metadata(self.info) | {
            "ema.part": str(self.part),
            "ema.plan": self.plan_id,
            "ema.release": posthoc_cli.__version__,
        }

    def read_header(self) -> fmt.FileHeader:
        """The header of the file that is there, if that is this part: whole in size, and of the same plan.

        Raises:
            FileFormatError: it is damaged, or no part.
            MismatchError: it is of another plan; says what differs.
        """
        header = read_header(self.path)
        found = decode_output(self.path, header)
        if "ema.part" not in header.metadata:
            raise FileFormatError(self.path, "is no part made by --shard")
        difference = self._difference(header.metadata, found)
        if difference is not None:
            raise MismatchError(self.path, f"is a part of another plan: {difference}")
        tensors = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
        if tensors != {spec.name: (spec.dtype, spec.shape) for spec in self.specs}:
            raise FileFormatError(self.path, f"does not hold the tensors of part {self.part}")
        return header

    def _difference(self, metadata: Mapping[str, str], found: OutputInfo) -> str | None:
        """What tells the file from this part, in words; None for nothing."""
        for key, words in (("ema.part", "it is part"), ("ema.release", "it was made by release")):
            if metadata.get(key) != self.metadata[key]:
                return f"{words} {str(metadata.get(key))[:60]}, not {self.metadata[key]}"
        difference = output_difference(found, self.info)
        if difference is not None:
            return difference
        if metadata.get("ema.plan") != self.plan_id:
            return "its snapshots, dtype or tensors are others, or the targets that it was made together with"
        if not same_coefficients(found, self.info):
            return "its coefficients are others; snapshots were added or removed since"
        return None


def plan_digest(
    plan: Plan, target: int, specs: Sequence[fmt.TensorSpec], wide: str | None, division: Sequence[Sequence[str]]
) -> str:
    """32 hexadecimal digits that two parts share when they belong together.

    Over the release, the run, the target, its time, the method, the header checksums of the snapshots in use, the
    dtypes, names and shapes of the output, and the division. Not over coefficients, which another processor
    computes with other roundings: those are compared, see `outputs.SAME_COEFFICIENT`.

    Arguments:
        plan: the whole plan.
        target: which of its targets.
        specs: the output's tensors.
        wide: dtype of the sums, None for the default.
        division: the stored tensors of each part.
    """
    column = plan.reconstruction.coefficients[:, target]
    info = plan.output_info(target)
    facts = [
        fmt.VERSION, posthoc_cli.__version__, info.run_id, info.profile, info.t, info.t_unit, info.method, wide,
        [source_checksum(source) for source, c in zip(plan.sources, column, strict=True) if c],
        [(spec.name, spec.dtype, spec.shape) for spec in specs],
        division,
    ]  # fmt: skip
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, separators=(",", ":")).encode())


def source_checksum(source: Source) -> str:
    """The checksum in a snapshot's header, which tells apart what two snapshots hold.

    Raises:
        InvalidValueError: the source is not on disk.
    """
    if not isinstance(source, DiskSource):
        raise InvalidValueError("shard", f"{source.name} is in memory; parts are made from snapshots on disk")
    return source.snapshot.header.metadata["ema.checksum"]


# --- A synthesis that is made in parts, by processes that share nothing but the folder: a shard each, an  ---


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


# --- From the parts of a synthesis to a model: everything is checked, then the index is written ----


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A model that is complete.

    Attributes:
        parts: how many it has.
        indexes: the index of each target.
        there: the targets, by index, whose index was there already, and the same.
        nbytes: bytes of all tensors.
    """

    parts: int
    indexes: tuple[Path, ...]
    there: frozenset[int]
    nbytes: int


def finish(
    parted: PartedSynthesis, verify: bool = True, progress: Progress | None = None, write: bool = True
) -> Finished:
    """Check that every part of every target is there and belongs together, then write the indexes.

    Parts are of this plan, and hold exactly the tensors that the plan gives them; so they are disjoint and complete.

    Arguments:
        parted: the plan that the parts must be of.
        verify: read all parts and check every block; else headers and sizes only.
        progress: told the bytes of parts that were verified.
        write: False to check only.

    Raises:
        NotReadyError: a part is missing; nothing was written.
        FileFormatError, MismatchError: a part is damaged, or of another plan; nothing was written.
        OutputExistsError: the folder holds another model, or parts of one, which may not be replaced.
    """
    contents = [_checked_index(parted, target, verify, progress) for target in range(len(parted.folders))]
    indexes = [folder / INDEX_NAME for folder in parted.folders]
    there = frozenset(i for i, index in enumerate(indexes) if _holds(index, contents[i][0]))
    for target, folder in enumerate(parted.folders):
        _check_alone(folder, parted, target in there)
    for target, (index, (text, _)) in enumerate(zip(indexes, contents, strict=True)):
        if write and target not in there:
            files.write_whole(index, text, parted.overwrite)
        if write:
            _remove(_strangers(index.parent, parted.parts))
            _warn_of_leftovers(index.parent)
    return Finished(parted.parts, tuple(indexes), there, sum(total for _, total in contents))


def parts_to_finish(folders: Sequence[Path], plan_ids: Callable[[int], Collection[str]]) -> int:
    """Into how many parts the model is divided whose parts are in the folders.

    Arguments:
        folders: one a target.
        plan_ids: digests of the plan that is to be finished, for a number of parts. Only asked where there are parts
            of several models.

    Raises:
        NotReadyError: there is no part, or it cannot be told which ones are meant.
    """
    counts = sorted({count for folder in folders for count in part_counts(folder)})
    if not counts:
        raise NotReadyError(folders[0], "no part is here", "make them with --shard 1/N to --shard N/N")
    if len(counts) > 1:
        found = {count: _found_plans(folders, count) for count in counts}
        matching = [count for count in counts if found[count] & set(plan_ids(count))]
        if len(matching) != 1:
            raise NotReadyError(
                folders[0],
                f"holds parts of models in {' and in '.join(map(str, counts))} parts",
                "remove those that are not wanted",
            )
        counts = matching
    return counts[0]


def _found_plans(folders: Sequence[Path], count: int) -> set[str]:
    """What the parts in folders that are of so many say of their plans."""
    found = set()
    for path in (part_path(folder, Part(number, count)) for folder in folders for number in range(1, count + 1)):
        if path.is_file():
            with suppress(FileFormatError):
                found.add(read_header(path).metadata.get("ema.plan", ""))
    return found


def _checked_index(parted: PartedSynthesis, target: int, verify: bool, progress: Progress | None) -> tuple[bytes, int]:
    """The content of a target's index, and the bytes of its tensors."""
    folder = parted.folders[target]
    wanted = [parted.file(target, Part(number, parted.parts)) for number in range(1, parted.parts + 1)]
    headers = [_header(file) for file in wanted]
    if verify:
        for file, header in zip(wanted, headers, strict=True):
            verify_payload(file.path, header, progress)
    weight_map = {name: part_path(folder, file.part).name for file in wanted for name in (s.name for s in file.specs)}
    total = sum(file.nbytes for file in wanted)
    return encode_index(weight_map, total), total


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file is there, and is that."""
    try:
        return read_small_file(path, len(content)) == content
    except FileFormatError:
        return False


def _header(file: PartFile) -> FileHeader:
    if not os.path.lexists(file.path):
        raise NotReadyError(file.path, "is missing", f"make it with --shard {file.part}")
    return file.read_header()


def _strangers(folder: Path, parts: int) -> list[Path]:
    """Files of other models in a folder: readers may take them for this one."""
    own = {part_path(folder, Part(number, parts)).name for number in range(1, parts + 1)}
    return sorted(
        path for path in files.system.list(folder) if MODEL_FILE.fullmatch(path.name) and path.name not in own
    )


def _check_alone(folder: Path, parted: PartedSynthesis, has_index: bool) -> None:
    if holds_snapshot(folder):
        raise OutputExistsError(folder, "is a snapshot of a run and is not replaced", "choose another name")
    if parted.overwrite:
        return
    index, others = folder / INDEX_NAME, _strangers(folder, parted.parts)
    if os.path.lexists(index) and not has_index:
        raise OutputExistsError(index, "is there already, and is of another model; overwrite=True to replace it")
    if others:
        raise OutputExistsError(others[0], "is of another model", "remove it, or overwrite=True to replace that model")


def _warn_of_leftovers(folder: Path) -> None:
    """Name what a process that was killed has left: nobody else would find it, and it may be large."""
    found = files.leftovers(folder)
    if not found:
        return
    nbytes = 0
    for path in found:
        with suppress(OSError):
            nbytes += path.stat().st_size
    which = str(found[0]) + f" and {len(found) - 1} more" * (len(found) > 1)
    log.warning(
        "%s: left by interrupted processes, %s bytes; remove unless one still writes here", which, f"{nbytes:,}"
    )


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with files.reported_as_write_error(path, "removed"):
            files.unlink_if_there(path)
            files.system.fsync_directory(path.parent)
