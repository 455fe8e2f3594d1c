"""One large model by the processes of a torchrun job: each writes shards of its own, the first one an index at the end.

Headers alone divide a plan into shards of complete tensors, so that every process knows all of them. A shard appears
complete or not at all, and its metadata holds the plan's fingerprint: a job that was killed is run again, and keeps
what is there. Without its index a folder is no model to any reader; no index stays beside shards of another plan.

No tensor is exchanged: after each shard the processes tell each other by torch.distributed whether they go on. One that
has died is noticed by the launcher, which ends the others, or by those that wait for it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist
import xxhash

import posthoc_cli
from posthoc_cli import files
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    MismatchError,
    OutputExistsError,
    PostHocError,
    RankError,
)
from posthoc_cli.export.layouts import (
    OTHER_FOLDER,
    OutputOptions,
    check_free_folder,
    check_no_snapshot,
    check_space,
    model_files_in,
    write_synthesis,
)
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.directory import ON_ONE_FILE_SYSTEM
from posthoc_cli.snapshots.outputs import (
    INDEX_NAME,
    decode_output,
    encode_index,
    output_difference,
    same_coefficients,
)
from posthoc_cli.snapshots.reading import verify_payload
from posthoc_cli.snapshots.sources import FileSource
from posthoc_cli.snapshots.tensor_file import read_header, read_small_file
from posthoc_cli.synthesis.engine import Progress
from posthoc_cli.synthesis.plan import Plan

WAIT = timedelta(minutes=30)
"""How long a process waits for the others to begin, or to write the shards that they are at."""

_T = TypeVar("_T")


# --- shards


@dataclass(frozen=True)
class Shard:
    """A file of the model of one target: its path, the plan of its tensors for that target, strings for its header."""

    path: Path
    plan: Plan
    marks: dict[str, str]

    def is_there(self) -> bool:
        """Whether the file is there, by its header; a FileFormatError or MismatchError if it is another one."""
        if not os.path.lexists(self.path):
            return False
        header, wanted = read_header(self.path), self.plan.output_info(0)
        found = decode_output(self.path, header)
        difference = output_difference(found, wanted)
        is_marked = self.marks.items() <= header.metadata.items()
        if difference is None and not (is_marked and same_coefficients(found, wanted)):
            difference = "its release, snapshots, coefficients, dtype, tensors or number of shards are others"
        if difference is not None:
            raise MismatchError(self.path, f"is a shard of another plan: {difference}")
        return True


class Shards:
    """The shards of the models of a plan's targets, a folder each; `container` is a folder to make for these.

    Arguments:
        wanted: how many; fewer if there are fewer tensors.
    """

    def __init__(
        self, plan: Plan, folders: Sequence[Path], wanted: int, options: OutputOptions, container: Path | None = None
    ) -> None:
        self._plan, self._options = plan, replace(options, layout="safetensors")
        self._folders = folders if container is None else (container, *folders)
        division = divide(plan, wanted)
        marks = [{"ema.plan": fingerprint(plan, target, division)} for target in range(len(folders))]
        self.parts: list[list[Shard]] = []  # the shards of all targets with the same tensors
        for number, names in enumerate(division, 1):
            own, part = replace(plan, subset=frozenset(names)), f"{number}/{len(division)}"
            name = f"model-{number:05d}-of-{len(division):05d}.safetensors"
            self.parts.append(
                [
                    Shard(folder / name, own.only([target]), {**marks[target], "ema.part": part})
                    for target, folder in enumerate(folders)
                ]
            )

    def begin(self) -> None:
        """Check that all shards may be written and fit on the disk; remove the index of a model to be replaced."""
        missing: dict[Path, int] = {}
        for shards in zip(*self.parts, strict=True):
            folder, index = shards[0].path.parent, shards[0].path.parent / INDEX_NAME
            check_free_folder(folder, overwrite=True)
            check_no_snapshot(folder)
            new = {shard.path: shard.plan.nbytes for shard in shards if not self._is_kept(shard)}
            is_same = _holds(index, _index_of(shards))
            others = [*_others(shards), *([index] if os.path.lexists(index) and not is_same else ())]
            if others and not self._options.overwrite:
                raise OutputExistsError(others[0], "is of another model", OTHER_FOLDER)
            if os.path.lexists(index) and (new or not is_same):
                _remove(index)
            missing |= new
        check_space(missing)

    def read_bytes(self, part: int) -> int:
        """Bytes that making a part reads; 0 where there are fewer parts."""
        return sum(shards[0].plan.read_bytes for shards in self.parts[part : part + 1])

    def make(self, part: int, progress: Progress) -> None:
        """Make the shards of one part, if there is one, that are not there yet. Errors as `write_synthesis`."""
        own = self.parts[part] if part < len(self.parts) else []
        missing = [target for target, shard in enumerate(own) if not self._is_kept(shard, verify=True)]
        if not missing:
            return
        plan = replace(self._plan, subset=own[0].plan.subset).only(missing)
        paths, marks = ([getattr(own[target], what) for target in missing] for what in ("path", "marks"))
        write_synthesis(plan, paths, replace(self._options, progress=progress), self._folders, marks)

    def finish(self) -> None:
        """Check that all shards are there, remove what is left of replaced models, and write the indexes."""
        for shard in (shard for shards in self.parts for shard in shards):
            if not shard.is_there():
                raise DirectoryError(shard.path, "is missing", ON_ONE_FILE_SYSTEM)
        for shards in zip(*self.parts, strict=True):
            for path in _others(shards):
                _remove(path)
            files.write_whole(shards[0].path.parent / INDEX_NAME, _index_of(shards), overwrite=True)

    def _is_kept(self, shard: Shard, verify: bool = False) -> bool:
        """Whether a shard is there; an OutputExistsError if another file has its name and may not be replaced."""
        try:
            there = shard.is_there()
            if there and verify:
                verify_payload(shard.path, read_header(shard.path))
        except (FileFormatError, MismatchError) as error:
            if not self._options.overwrite:
                raise OutputExistsError(error.subject, error.reason, OTHER_FOLDER) from error
            return False
        return there


def divide(plan: Plan, parts: int) -> list[list[str]]:
    """The stored tensors of each part, neighbours together; parts have nearly equal bytes to read and write."""
    costs = {}
    for name, aliases in plan.names.items():
        written = fmt.TensorSpec(name, plan.output_dtype(name), plan.newest.stored[name].shape).nbytes
        costs[name] = len(plan.targets) * len(aliases) * written + sum(s.stored[name].nbytes for s in plan.sources)
    division: dict[int, list[str]] = {}
    total, done = sum(costs.values()) or 1, 0
    for name, cost in costs.items():
        division.setdefault(min(parts - 1, parts * (2 * done + cost) // (2 * total)), []).append(name)
        done += cost
    return list(division.values())


def fingerprint(plan: Plan, target: int, division: Sequence[Sequence[str]]) -> str:
    """32 hexadecimal digits that two shards share when they belong together.

    Not over coefficients, which another processor computes with other roundings: see `outputs.SAME_COEFFICIENT`.
    """
    columns = plan.reconstruction.coefficients[:, list(plan.columns[target].values())]
    used = [source for source, row in zip(plan.sources, columns, strict=True) if row.any()]
    info, checksums = plan.output_info(target), [one.identity for one in used if isinstance(one, FileSource)]
    facts = [
        fmt.VERSION, posthoc_cli.__version__, info.run_id, info.profile, info.t, info.t_unit, info.method,
        checksums, [(spec.name, spec.dtype, spec.shape) for spec in plan.specs()], division,
    ]  # fmt: skip
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, separators=(",", ":")).encode())


def _index_of(shards: Sequence[Shard]) -> bytes:
    names = {spec.name: shard.path.name for shard in shards for spec in shard.plan.specs()}
    return encode_index(names, sum(shard.plan.nbytes for shard in shards))


def _holds(path: Path, content: bytes) -> bool:
    with suppress(FileFormatError):
        return read_small_file(path, len(content)) == content
    return False


def _others(shards: Sequence[Shard]) -> list[Path]:
    """Files of other models in the folder of these: readers may take them for this one."""
    own = {shard.path.name for shard in shards} | {INDEX_NAME}
    return [path for path in model_files_in(shards[0].path.parent) if path.name not in own]


def _remove(path: Path) -> None:
    with files.reported_as_write_error(path, "removed"):
        files.unlink_if_there(path)
        files.system.fsync_directory(path.parent)


# --- processes


class Ranks:
    """The processes of a job, from their meeting to the end of the `with` block: they end together.

    Raises:
        RankError: they did not meet, or the launcher has ended this one; from `together`: another one failed or died.
    """

    def __init__(self) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch prints a trace of a process that has died
        self._is_own = not dist.is_initialized()
        try:
            if self._is_own:
                dist.init_process_group("gloo", timeout=WAIT)
            self._group = dist.new_group(backend="gloo", timeout=WAIT)
        except (RuntimeError, ValueError) as error:
            reason = f"did not meet by torch.distributed: {str(error).strip().partition(chr(10))[0][:200]}"
            raise RankError("the processes of this job", reason) from error
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.rank:  # the first one logs for all
            logging.getLogger("posthoc_cli").setLevel(logging.ERROR)

    def together(self, work: Callable[[], _T]) -> _T:
        """The result of the work of this process, when all have done theirs; a RankError if one could not."""
        done = failure = None
        try:
            done = work()
        except PostHocError as error:
            failure = error
        told: list[str | None] = [None] * self.world
        try:
            dist.all_gather_object(told, failure and str(failure), self._group)
        except RuntimeError as error:
            raise failure or RankError("another process of this job", "failed or died; nothing was finished") from error
        if failure is not None:
            raise failure
        for rank, said in enumerate(told):
            if said is not None:
                raise RankError(f"rank {rank}", f"failed: {said}")
        return cast(_T, done)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(RuntimeError):
            dist.destroy_process_group(None if self._is_own else self._group)
        if isinstance(error, SystemExit):
            reason = "was ended by a signal, as a launcher does when another process fails or dies"
            raise RankError("this process of the job", reason) from None
