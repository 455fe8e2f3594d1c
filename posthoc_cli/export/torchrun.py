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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

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
    check_free_folder,
    check_info,
    check_no_snapshot,
    check_space,
    model_files_in,
    write_synthesis,
)
from posthoc_cli.export.writing import Outputs, SynthesisReport, local_rank
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.resources import worker_count
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.directory import ON_ONE_FILE_SYSTEM
from posthoc_cli.snapshots.outputs import INDEX_NAME, encode_index
from posthoc_cli.snapshots.reading import verify_payload
from posthoc_cli.snapshots.sources import FileSource
from posthoc_cli.snapshots.tensor_file import read_small_file
from posthoc_cli.synthesis.engine import Progress
from posthoc_cli.synthesis.plan import Plan

WAIT = timedelta(minutes=30)
"""How long a process waits for the others to begin, or to write the shards that they are at."""

# --- shards


def write_shards(ranks: Ranks, plan: Plan, outputs: Outputs, progress: ProgressBar) -> SynthesisReport | None:
    """Make the shards of this process, whose others do the same; None in all but the first."""
    if outputs.paths:
        wanted = ranks.world * max(1, -(-plan.nbytes // (outputs.options.shard_bytes * ranks.world)))
        shards = Shards(plan, outputs, wanted)
        with ranks.together():
            if not ranks.rank:
                shards.begin()
        own = range(ranks.rank, len(shards.parts), ranks.world)
        bar = no_bar if ranks.rank else progress
        with bar("synthesizing", sum(shards.parts[part].read_bytes for part in own)) as advance:
            for first in range(0, len(shards.parts), ranks.world):
                with ranks.together():
                    shards.make(first + ranks.rank, advance)
        with ranks.together():
            if not ranks.rank:
                shards.finish()
    return None if ranks.rank else outputs.report(plan)


class Shards:
    """The shards of the models of a plan's targets, a folder each.

    Arguments:
        wanted: how many; fewer if there are fewer tensors.
    """

    def __init__(self, plan: Plan, outputs: Outputs, wanted: int) -> None:
        workers = max(1, worker_count() // local_rank()[1])
        self._options = replace(outputs.options, layout="safetensors", workers=workers)
        self._folders = outputs.paths
        self._made = [*filter(None, [outputs.container]), *outputs.paths]
        division = divide(plan, wanted)
        self.parts = [replace(plan, subset=frozenset(names)) for names in division]
        self._marks = [{"ema.plan": fingerprint(plan, target, division)} for target in range(len(self._folders))]

    def begin(self) -> None:
        """Check that all shards may be written and fit on the disk; remove the index of a model to be replaced."""
        missing: dict[Path, int] = {}
        for target, folder in enumerate(self._folders):
            check_free_folder(folder, overwrite=True)
            check_no_snapshot(folder)
            parts = [part for part in range(len(self.parts)) if not self._is_there(part, target)]
            index, is_there = folder / INDEX_NAME, os.path.lexists(folder / INDEX_NAME)
            is_same = is_there and _holds(index, self._index(folder))
            others = [*self._others(folder), *([index] if is_there and not is_same else ())]
            if others and not self._options.overwrite:
                raise OutputExistsError(others[0], "is of another model", OTHER_FOLDER)
            if is_there and (parts or not is_same):
                _remove(index)
            missing |= {self._path(part, folder): self.parts[part].nbytes for part in parts}
        check_space(missing)

    def make(self, part: int, progress: Progress) -> None:
        """Make the shards of one part, if there is one, that are not there yet. Errors as `write_synthesis`."""
        targets = range(len(self._folders)) if part < len(self.parts) else ()
        missing = [target for target in targets if not self._is_there(part, target, verify=True)]
        if missing:
            paths = [self._path(part, self._folders[target]) for target in missing]
            marks = [self._marks_of(part, target) for target in missing]
            options = replace(self._options, progress=progress)
            write_synthesis(self.parts[part].only(missing), paths, options, self._made, marks)

    def finish(self) -> None:
        """Check that all shards are there, remove what is left of replaced models, and write the indexes."""
        for target, folder in enumerate(self._folders):
            for part in range(len(self.parts)):
                if not self._is_there(part, target):
                    raise DirectoryError(self._path(part, folder), "is missing", ON_ONE_FILE_SYSTEM)
        for folder in self._folders:
            for path in self._others(folder):
                _remove(path)
            files.write_whole(folder / INDEX_NAME, self._index(folder), overwrite=True)

    def _path(self, part: int, folder: Path) -> Path:
        return folder / f"model-{part + 1:05d}-of-{len(self.parts):05d}.safetensors"

    def _marks_of(self, part: int, target: int) -> dict[str, str]:
        return self._marks[target] | {"ema.part": f"{part + 1}/{len(self.parts)}"}

    def _is_there(self, part: int, target: int, verify: bool = False) -> bool:
        """Whether a shard is there; an OutputExistsError if another file has its name and may not be replaced."""
        path = self._path(part, self._folders[target])
        if not os.path.lexists(path):
            return False
        try:
            header = check_info(path, self.parts[part].output_info(target), self._marks_of(part, target))
            if verify:
                verify_payload(path, header)
        except (FileFormatError, MismatchError) as error:
            if not self._options.overwrite:
                raise OutputExistsError(error.subject, error.reason, OTHER_FOLDER) from error
            return False
        return True

    def _index(self, folder: Path) -> bytes:
        paths = [self._path(part, folder) for part in range(len(self.parts))]
        places = {spec.name: path.name for path, plan in zip(paths, self.parts, strict=True) for spec in plan.specs()}
        return encode_index(places, sum(plan.nbytes for plan in self.parts))

    def _others(self, folder: Path) -> list[Path]:
        """Files of other models in a folder: readers may take them for this one."""
        own = {INDEX_NAME, *(self._path(part, folder).name for part in range(len(self.parts)))}
        return [path for path in model_files_in(folder) if path.name not in own]


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


def _holds(path: Path, content: bytes) -> bool:
    with suppress(FileFormatError):
        return read_small_file(path, len(content)) == content
    return False


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

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends when all processes have done theirs; a RankError if another one could not."""
        failure = None
        try:
            yield
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

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(RuntimeError):
            dist.destroy_process_group(None if self._is_own else self._group)
        if isinstance(error, SystemExit):
            reason = "was ended by a signal, as a launcher does when another process fails or dies"
            raise RankError("this process of the job", reason) from None
