"""A synthesis made in parts, by processes that share only the folder: a shard each, and an index at the end.

A plan is divided from headers alone into parts of complete tensors. Dividing the same plan into the same number of
parts gives the same parts on any machine, so processes that each make some of them never communicate.

What holds if processes fail at any moment and run in any order:

1. A part is absent or complete, and its metadata (see `snapshots.format`) names the part and the plan it belongs to, so
   that parts of different runs, targets, snapshots, releases or divisions never mix.
2. Making a part that is there, complete and of the same plan, leaves it as it is: a job can be repeated.
3. Without its index a folder is no model to any reader; the index is written last, in one step, once every part is
   there and all belong together.
4. An index never leads to parts of two plans: before a part is replaced, an index that names it is removed.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import xxhash

import posthoc_cli
from posthoc_cli import files
from posthoc_cli.checkpoints.checkpoint import Checkpoint
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, NotReadyError, OutputExistsError
from posthoc_cli.export.layouts import (
    MODEL_FILE,
    OTHER_FOLDER,
    OutputOptions,
    check_free_folder,
    check_no_snapshot,
    check_space,
    fill_sinks,
)
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import outputs
from posthoc_cli.snapshots.outputs import INDEX_NAME, encode_index, read_index
from posthoc_cli.snapshots.sources import Snapshot
from posthoc_cli.snapshots.tensor_file import read_header, read_small_file, verify_payload
from posthoc_cli.synthesis.engine import Progress
from posthoc_cli.synthesis.plan import Plan

log = logging.getLogger(__name__)

MAX_PARTS = 99_999
"""The five digits in the names of shards allow no more."""

_UNITS_A_PART = 64
"""Neighbours below this fraction of a part stay together, so that small tensors are read in runs."""


@dataclass(frozen=True)
class Part:
    """One of the parts of a job: the `number`-th of `of`, counted from 1; an InvalidValueError if there is none."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.of <= MAX_PARTS:
            raise InvalidValueError("shard", f"the number of parts must be from 1 to {MAX_PARTS:,}", value=self)
        if not 1 <= self.number <= self.of:
            raise InvalidValueError("shard", f"there are only the parts 1/{self.of} to {self.of}/{self.of}", value=self)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def path(self, folder: Path) -> Path:
        """Its file: the name that it has in the finished, sharded model."""
        return folder / f"model-{self.number:05d}-of-{self.of:05d}.safetensors"

    @staticmethod
    def parse(text: str) -> Part:
        """From "3/8"."""
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", text)
        if match is None:
            example = "must be K/N, part K of N, such as 3/8 for the third of eight"
            raise InvalidValueError("shard", example, value=text or "(empty)")
        return Part(int(match[1]), int(match[2]))

    @staticmethod
    def all(of: int) -> list[Part]:
        """Every part of a job."""
        return [Part(number, of) for number in range(1, of + 1)]


@dataclass(frozen=True)
class MadePart:
    """One part after it was made, or as it would be."""

    part: Part
    paths: tuple[Path, ...]  # its file for each target
    there: frozenset[int]  # the targets, by index, whose file was there already, complete and of the same plan
    tensors: int
    read_bytes: int  # of snapshots
    nbytes: int  # for all targets


class PartedSynthesis:
    """A plan of snapshots on disk, divided into parts of the models in `folders`, one a target.

    `options.overwrite` replaces parts, and models, of other plans. `container` is the folder of the folders, created if
    it is missing.
    """

    def __init__(
        self,
        plan: Plan,
        folders: Sequence[Path],
        parts: int,
        options: OutputOptions = OutputOptions(),
        container: Path | None = None,
    ) -> None:
        self.plan, self.folders, self.parts = plan, list(folders), Part.all(Part(1, parts).of)
        self.options, self._container = replace(options, layout="safetensors"), container

    @cached_property
    def division(self) -> list[list[str]]:
        """The stored tensors of each part."""
        return divide(self.plan, len(self.parts))

    @cached_property
    def plan_ids(self) -> list[str]:
        """Digest of the plan for each target."""
        return [plan_digest(self.plan, target, self.division) for target in range(len(self.plan.targets))]

    def plan_of(self, part: Part) -> Plan:
        """The plan of one part, for all targets."""
        return replace(self.plan, subset=frozenset(self.division[part.number - 1]))

    def files_of(self, part: Part) -> list[PartFile]:
        """The file of one part for each target, as it must be."""
        plan = self.plan_of(part)
        return [
            PartFile(part.path(folder), part, plan.output_info(target), tuple(plan.specs()), self.plan_ids[target])
            for target, folder in enumerate(self.folders)
        ]

    def describe(self, part: Part) -> MadePart:
        """What making a part would read and write; looks at no file."""
        plan, paths = self.plan_of(part), tuple(part.path(folder) for folder in self.folders)
        return MadePart(part, paths, frozenset(), len(plan.tensors), plan.read_bytes, len(paths) * plan.nbytes)

    def check_space(self) -> None:
        """Check that the disk has room for all parts that are not there yet; raises a WriteError."""
        each = {part: self.plan_of(part).nbytes for part in self.parts}
        paths = {part.path(folder): nbytes for folder in self.folders for part, nbytes in each.items()}
        check_space({path: nbytes for path, nbytes in paths.items() if not path.exists()})

    def make(self, part: Part, progress: Progress | None = None) -> MadePart:
        """Make one part of every target; a file that is there, complete and of this plan, stays as it is.

        Raises:
            OutputExistsError: another file has a part's name, or another model is in its folder, and
                `options.overwrite` is False.
            InvalidValueError, WriteError, FileFormatError, NonFiniteError: as `write_synthesis`.
        """
        wanted = self.files_of(part)
        there = frozenset(target for target, file in enumerate(wanted) if self._is_there(file))
        missing = [target for target in range(len(wanted)) if target not in there]
        if missing:
            plan = self.plan_of(part).only(missing)
            self._write(plan, [wanted[target] for target in missing], replace(self.options, progress=progress))
        return replace(self.describe(part), there=there)

    def _write(self, plan: Plan, wanted: Sequence[PartFile], options: OutputOptions) -> None:
        outermost = self._container or wanted[0].path.parent
        if not outermost.parent.is_dir():
            raise InvalidValueError("out", "its folder does not exist", value=outermost)
        check_space(dict.fromkeys([file.path for file in wanted], plan.nbytes))
        with ExitStack() as stack:
            for file in wanted:
                stack.enter_context(files.new_directory(file.path.parent))
            sinks = fill_sinks(stack, plan, {file.path: file.metadata for file in wanted}, options)
            for sink, file in zip(sinks, wanted, strict=True):
                if options.overwrite:
                    _remove_index_of(file.path)
                try:
                    sink.commit()
                except OutputExistsError:
                    # Another process may have made the same part meanwhile.
                    if not self._is_there(file):
                        raise

    def _is_there(self, file: PartFile) -> bool:
        """Whether a part is there, every byte verified; an OutputExistsError if something else may not be replaced."""
        folder, overwrite = file.path.parent, self.options.overwrite
        there = os.path.lexists(file.path)
        check_free_folder(folder, overwrite or there)
        if overwrite:
            check_no_snapshot(folder)
        else:
            self._check_neighbour(file)
        if not there:
            return False
        try:
            verify_payload(file.path, file.read_header())
        except (FileFormatError, MismatchError) as error:
            if not overwrite:
                raise OutputExistsError(error.subject, error.reason, OTHER_FOLDER) from error
            return False
        return True

    def _check_neighbour(self, file: PartFile) -> None:
        """Check that another part that is there, if there is one, is of this plan; else an OutputExistsError."""
        folder = file.path.parent
        for other in self.parts:
            if other == file.part or not os.path.lexists(other.path(folder)):
                continue
            try:
                self.files_of(other)[self.folders.index(folder)].read_header()
            except MismatchError as error:
                raise OutputExistsError(error.subject, error.reason, OTHER_FOLDER) from error
            except FileFormatError:  # which its own process says, and the end of the job
                continue
            return


def parts_for(nbytes: int, limit: int, processes: int) -> int:
    """Number of parts, about `limit` bytes each at most, the same number for each process."""
    return processes * max(1, -(-nbytes // (limit * processes)))


def _remove_index_of(path: Path) -> None:
    index = path.parent / INDEX_NAME
    with suppress(FileFormatError):  # an index that cannot be read leads nowhere
        if os.path.lexists(index) and path.name in read_index(index):
            _remove(index)


def _remove(path: Path) -> None:
    with files.reported_as_write_error(path, "removed"):
        files.unlink_if_there(path)
        files.system.fsync_directory(path.parent)


# --- dividing a plan ---------------------------------------------------------------------------------


def divide(plan: Plan, parts: int) -> list[list[str]]:
    """The stored tensors of each part, in the order of the newest snapshot's; a part may have none.

    Parts have nearly equal numbers of bytes to read and write: the largest tensors first, each to the part that has
    the least so far. A tensor is never cut, and goes to one part under all its names.
    """
    costs = {}
    for name, aliases in plan.names.items():
        written = fmt.TensorSpec(name, plan.output_dtype(name), plan.newest.stored[name].shape).nbytes
        costs[name] = len(plan.targets) * len(aliases) * written
        costs[name] += sum(source.stored[name].nbytes for source in plan.sources)
    loads = [(0, 0, part) for part in range(parts)]
    part_of: dict[str, int] = {}
    for cost, names in sorted(_units(costs, parts), key=lambda unit: -unit[0]):
        load, count, part = heapq.heappop(loads)
        part_of |= dict.fromkeys(names, part)
        heapq.heappush(loads, (load + cost, count + len(names), part))
    result: list[list[str]] = [[] for _ in range(parts)]
    for name in costs:
        result[part_of[name]].append(name)
    return result


def _units(costs: Mapping[str, int], parts: int) -> Iterator[tuple[int, list[str]]]:
    """Tensors that stay together, with their cost: neighbours, as long as they are small together."""
    most = sum(costs.values()) / (_UNITS_A_PART * parts)
    total, names = 0, list[str]()
    for name, cost in costs.items():
        if names and total + cost > most:
            yield total, names
            total, names = 0, []
        total += cost
        names.append(name)
    if names:
        yield total, names


def plan_digest(plan: Plan, target: int, division: Sequence[Sequence[str]]) -> str:
    """32 hexadecimal digits that two parts share when they belong together.

    Over the release, the run, the target, its time, the method, the header checksums of the snapshots in use, the
    dtypes, names and shapes of the output, and the division. Not over coefficients, which another processor
    computes with other roundings: those are compared, see `outputs.SAME_COEFFICIENT`.
    """
    columns = plan.reconstruction.coefficients[:, list(plan.columns[target].values())]
    info, checksums = plan.output_info(target), []
    for source in (source for source, row in zip(plan.sources, columns, strict=True) if row.any()):
        if not isinstance(source, Snapshot | Checkpoint):
            raise InvalidValueError("shard", f"{source.name} is in memory; parts are made from snapshots on disk")
        checksums.append(source.header.metadata["ema.checksum"])
    facts = [
        fmt.VERSION, posthoc_cli.__version__, info.run_id, info.profile, info.t, info.t_unit, info.method,
        checksums, [(spec.name, spec.dtype, spec.shape) for spec in plan.specs()], division,
    ]  # fmt: skip
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, separators=(",", ":")).encode())


# --- the file of a part ------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartFile:
    """A part of one target, as it must be on disk; `plan_id` is from `plan_digest`."""

    path: Path
    part: Part
    info: fmt.OutputInfo
    specs: tuple[fmt.TensorSpec, ...]
    plan_id: str

    @property
    def metadata(self) -> dict[str, str]:
        """Strings for its header."""
        own = {"ema.part": str(self.part), "ema.plan": self.plan_id, "ema.release": posthoc_cli.__version__}
        return fmt.output_metadata(self.info) | own

    def read_header(self) -> fmt.FileHeader:
        """The header of the file that is there, which is this part; else a FileFormatError or MismatchError."""
        header = read_header(self.path)
        found = outputs.decode_output(self.path, header)
        if "ema.part" not in header.metadata:
            raise FileFormatError(self.path, "is not a part of a synthesis")
        difference = self._difference(header.metadata, found)
        if difference is not None:
            raise MismatchError(self.path, f"is a part of another plan: {difference}")
        tensors = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
        if tensors != {spec.name: (spec.dtype, spec.shape) for spec in self.specs}:
            raise FileFormatError(self.path, f"does not hold the tensors of part {self.part}")
        return header

    def _difference(self, metadata: Mapping[str, str], found: fmt.OutputInfo) -> str | None:
        """How the file differs from this part, in words; None if it does not."""
        for key, words in (("ema.part", "it is part"), ("ema.release", "it was made by release")):
            if metadata.get(key) != self.metadata[key]:
                return f"{words} {str(metadata.get(key))[:60]}, not {self.metadata[key]}"
        difference = outputs.output_difference(found, self.info)
        if difference is not None:
            return difference
        if metadata.get("ema.plan") != self.plan_id:
            return "its snapshots, dtype or tensors are others, or the targets that it was made together with"
        if not outputs.same_coefficients(found, self.info):
            return "its coefficients are others; snapshots were added or removed since"
        return None


# --- finishing: all parts are checked, then the index is written -------------------------------------


@dataclass(frozen=True)
class Finished:
    """Models that are complete: the number of their parts, and the index and the bytes of all targets."""

    parts: int
    indexes: tuple[Path, ...]
    there: frozenset[int]  # the targets, by index, whose index was there already, with the same content
    nbytes: int


def finish(
    parted: PartedSynthesis, verify: bool = True, progress: Progress | None = None, write: bool = True
) -> Finished:
    """Check that every part of every target is there and belongs together, then write the indexes.

    Parts are of this plan, and hold exactly the tensors that the plan gives them; so they are disjoint and complete.
    With `verify` all parts are read and every block is checked, else headers and sizes only; without `write` nothing
    is done beyond that.

    Raises:
        NotReadyError: a part is missing; nothing was written.
        FileFormatError, MismatchError: a part is damaged, or of another plan; nothing was written.
        OutputExistsError: the folder holds another model, or parts of one, which may not be replaced.
    """
    by_target = zip(*map(parted.files_of, parted.parts), strict=True)
    contents = {own[0].path.parent / INDEX_NAME: _checked_index(own, verify, progress) for own in by_target}
    there = frozenset(i for i, (index, content) in enumerate(contents.items()) if _holds(index, content))
    for target, index in enumerate(contents):
        _check_alone(index, parted, target in there)
    for target, (index, content) in enumerate(contents.items() if write else ()):
        if target not in there:
            files.write_whole(index, content, parted.options.overwrite)
        for path in _other_models(index.parent, parted):
            _remove(path)
        _warn_of_leftovers(index.parent)
    return Finished(len(parted.parts), tuple(contents), there, len(contents) * parted.plan.nbytes)


def parts_to_finish(folders: Sequence[Path], plan_ids: Callable[[int], Collection[str]]) -> int:
    """Number of parts of the model whose parts are in the folders; a NotReadyError if none or several could be meant.

    `plan_ids` gives the digests of the plan to finish for a number of parts, if there are parts of several models.
    """
    found: dict[int, list[Path]] = {}
    for path in (path for folder in folders if folder.is_dir() for path in files.system.list(folder)):
        match = re.fullmatch(r"model-\d{5}-of-(\d{5})\.safetensors", path.name)
        if match is not None and path.is_file():
            found.setdefault(int(match[1]), []).append(path)
    if not found:
        raise NotReadyError(folders[0], "no part is here", "make all parts first")
    if len(found) == 1:
        return next(iter(found))
    matching = [count for count in found if set(map(_plan_id, found[count])) & set(plan_ids(count))]
    if len(matching) != 1:
        reason = f"holds parts of models in {' and in '.join(map(str, sorted(found)))} parts"
        raise NotReadyError(folders[0], reason, "remove those that are not wanted")
    return matching[0]


def _plan_id(path: Path) -> str | None:
    try:
        return read_header(path).metadata.get("ema.plan")
    except FileFormatError:
        return None


def _checked_index(wanted: Sequence[PartFile], verify: bool, progress: Progress | None) -> bytes:
    """The content of the index of one target, whose parts are checked."""
    headers = []
    for file in wanted:
        if not os.path.lexists(file.path):
            raise NotReadyError(file.path, "is missing", f"make part {file.part}")
        headers.append(file.read_header())
    for file, header in zip(wanted, headers, strict=True) if verify else ():
        verify_payload(file.path, header, progress)
    total = sum(spec.nbytes for file in wanted for spec in file.specs)
    return encode_index({spec.name: file.path.name for file in wanted for spec in file.specs}, total)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_small_file(path, len(content)) == content
    except FileFormatError:
        return False


def _other_models(folder: Path, parted: PartedSynthesis) -> list[Path]:
    """Files of other models in a folder: readers may take them for this one."""
    own = {part.path(folder) for part in parted.parts}
    return sorted(path for path in files.system.list(folder) if MODEL_FILE.fullmatch(path.name) and path not in own)


def _check_alone(index: Path, parted: PartedSynthesis, has_index: bool) -> None:
    check_no_snapshot(index.parent)
    if parted.options.overwrite:
        return
    if os.path.lexists(index) and not has_index:
        raise OutputExistsError(index, "is there already, and is of another model", "overwrite=True to replace it")
    for other in _other_models(index.parent, parted):
        raise OutputExistsError(other, "is of another model", "remove it, or overwrite=True to replace that model")


def _warn_of_leftovers(folder: Path) -> None:
    """Name the temporary files that a killed process left; they may be large."""
    found = files.leftovers(folder)
    nbytes = 0
    for path in found:
        with suppress(OSError):
            nbytes += path.stat().st_size
    if found:
        which = str(found[0]) + f" and {len(found) - 1} more" * (len(found) > 1)
        text = "%s: left by interrupted processes, %s bytes; remove unless one still writes here"
        log.warning(text, which, f"{nbytes:,}")
