"""Averages of a run as files, written by one process, or by the ranks of a torchrun job, each of which writes shards.

A plan is divided into shards of complete tensors by headers alone, so every rank knows the whole division. A shard
appears complete or not at all, and its metadata holds the plan's fingerprint: a job that was killed is run again, and
keeps the existing shards. The first rank writes the index last. Without an index no reader takes a folder for a model;
an index never stays next to shards of another plan.

Ranks exchange no tensors: after each shard they only report by torch.distributed whether they succeeded. A rank that
has died is noticed by the launcher, which ends the others, or by the ranks that wait for it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

import posthoc_cli
from posthoc_cli import files
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    OutputExistsError,
    PostHocError,
    RankError,
    check_alone,
    shown,
)
from posthoc_cli.export.layouts import (
    OTHER_FOLDER,
    PICKLES,
    OutputOptions,
    check_free_folder,
    check_no_snapshot,
    check_space,
    layout_of,
    model_files_in,
    open_outputs,
    output_exists,
    output_paths,
)
from posthoc_cli.export.model_folder import ModelFolder
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.resources import worker_count
from posthoc_cli.snapshots.directory import ON_ONE_FILE_SYSTEM
from posthoc_cli.snapshots.outputs import (
    INDEX_NAME,
    OutputInfo,
    decode_output,
    encode_index,
    model_files,
    output_difference,
    same_coefficients,
    training_metadata,
)
from posthoc_cli.snapshots.sources import FileSource
from posthoc_cli.snapshots.tensorfile import FORMAT, SUFFIX, Entry, TensorFile, read_file, read_small_file
from posthoc_cli.synthesis.engine import Progress, check_device, synthesize_into
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Target


@dataclass(frozen=True)
class SynthesisReport:
    """The plan of a synthesis, and its result.

    Attributes:
        plan: the plan of all targets.
        outputs: one path per target; empty in a dry run.
        existing: the indices of the targets whose output already existed.
        taken: tensors that the run lacks and that were copied from the model folder.
        device: device that computed the sums.
        seconds: duration of the synthesis.
    """

    plan: Plan
    outputs: tuple[Path, ...] = ()
    existing: frozenset[int] = frozenset()
    taken: tuple[str, ...] = ()
    device: str = "cpu"
    seconds: float = 0.0

    def __repr__(self) -> str:
        return f"SynthesisReport({len(self.outputs)} outputs in {self.seconds:.1f} s: {self.plan!r})"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        report = self.plan.to_dict()
        for index, target in enumerate(report["targets"]):
            target["output"] = str(self.outputs[index]) if self.outputs else None
            target["skipped"] = index in self.existing
            target["seconds"] = self.seconds
        report["device"] = self.device
        if self.taken:
            report["from_model_folder"] = list(self.taken)
        return report


class Outputs:
    """The outputs that a caller of `Run.write` requests, checked before anything is read.

    Arguments:
        asked: the options of the caller.
        like: the model folder that the outputs are modelled on.

    Attributes:
        paths: one path per target; none in a dry run.
        container: a folder to create for the outputs.
        dtype: dtype of the averages.
        options: the caller's options, with the device and the layout filled in.

    Raises:
        InvalidValueError: an option is invalid, or contradicts another.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        out: str | Path | None,
        dtype: torch.dtype | str | None,
        asked: OutputOptions,
        like: ModelFolder | None,
    ) -> None:
        _check(out, dtype, asked)
        self._like, self._started = like, time.perf_counter()
        self.dtype = dtype if like is None else like.dtype
        device = str(asked.device)
        if asked.distributed and device == "cuda":  # each rank of a machine uses a different device
            device = f"cuda:{_local_rank()[0] % max(1, torch.cuda.device_count())}"
        layout = "sharded" if asked.distributed or like is not None else asked.layout
        self.options = replace(asked, device=check_device(device), layout=layout)
        self.paths, self.container = ([], None) if out is None else output_paths(targets, str(out), layout)
        for path in self.paths:
            if not asked.dry_run:
                files.check_parent("out", self.container or path)
            if like is None:
                self.options.check_layout(path)
        if asked.dry_run:
            self.paths, self.container = [], None

    def write(self, plan: Plan, progress: ProgressBar = no_bar) -> SynthesisReport:
        """Make the targets of a plan, except for existing outputs if `skip_existing` is set."""
        existing = existing_outputs(plan, self.paths, self.options.layout) if self.options.skip_existing else set()
        wanted = [index for index in range(len(self.paths)) if index not in existing]
        taken: tuple[str, ...] = ()
        if wanted:
            with progress("synthesizing", plan.read_bytes) as advance:
                options = replace(self.options, progress=advance)
                if self._like is None:
                    paths = [self.paths[index] for index in wanted]
                    write_synthesis(plan.only(wanted), paths, options, [*filter(None, [self.container])])
                else:
                    taken = self._like.write(plan, self.paths, options, self.container)
        return self.report(plan, frozenset(existing), taken)

    def report(
        self, plan: Plan, existing: frozenset[int] = frozenset(), taken: tuple[str, ...] = ()
    ) -> SynthesisReport:
        """Return the report of a plan that is finished now."""
        seconds = time.perf_counter() - self._started
        return SynthesisReport(plan, tuple(self.paths), existing, taken, str(self.options.device), seconds)


def _check(out: str | Path | None, dtype: torch.dtype | str | None, asked: OutputOptions) -> None:
    """Raise an InvalidValueError for options that contradict each other."""
    asked.shard_bytes  # noqa: B018  raises an error if invalid, also in a dry run
    check_alone(overwrite=asked.overwrite, skip_existing=asked.skip_existing)
    if out is None and not asked.dry_run:
        raise InvalidValueError("out", "is missing; only a dry run needs no output")
    if asked.like is None and asked.component is not None:
        raise InvalidValueError("like", "is missing; component is about a model folder")
    others = (asked.distributed, asked.overwrite, asked.skip_existing, asked.layout, parse_dtype(dtype))
    if asked.like is not None and any(others):
        reason = (
            "determines the output: layout, dtype, overwrite, skip_existing and torchrun cannot be combined with it"
        )
        raise InvalidValueError("like", reason)
    is_file = Path(out or "").suffix in (SUFFIX, *PICKLES)
    if asked.distributed and (is_file if asked.layout is None else asked.layout != "sharded"):
        name, value = ("out", out) if asked.layout is None else ("layout", asked.layout)
        reason = "a job of several processes makes a folder of shards; name a folder"
        raise InvalidValueError(name, reason, "an export makes one file of it", value=value)


# --- the synthesis


def write_synthesis(
    plan: Plan,
    paths: Sequence[Path],
    options: OutputOptions = OutputOptions(),
    folders: Sequence[Path] = (),
    marks: Sequence[Mapping[str, str]] = (),
) -> None:
    """Synthesize every target of a plan into its path; `marks` are additional metadata. See also `open_outputs`."""
    newest, left, kept = plan.newest, dict(plan.names), dict[str, str]()
    if isinstance(newest, FileSource) and newest.path.suffix == SUFFIX and newest.path.is_file():
        kept = training_metadata(read_file(newest.path))
    headers = [
        (replace(plan.output_info(index), marks=dict(marks[index]) if marks else {}).encoded(), kept)
        for index in range(len(paths))
    ]
    with open_outputs(paths, plan.entries, headers, options, folders) as (sinks, lists):
        for names in map(set, lists):
            subset = frozenset(name for name, aliases in left.items() if not names.isdisjoint(aliases))
            for name in subset:  # the engine writes a tensor under all of its names
                del left[name]
            with closing(synthesize_into(replace(plan, subset=subset), sinks, options)) as tiles:
                for _ in tiles:
                    pass


# --- outputs that already exist


def existing_outputs(plan: Plan, paths: Sequence[Path], layout: str | None) -> set[int]:
    """Return the indices of the targets whose output already exists, after verifying every byte of it.

    Raises an OutputExistsError if one is damaged, of another run, target, time, method, dtype or snapshots, or if its
    layout does not record these.
    """
    hint, existing = "choose another name, or `overwrite` to replace it", set()
    expected = {name: f"{entry.dtype} of shape {list(entry.shape)}" for name, entry in plan.entries.items()}
    for index, path in enumerate(paths):
        kind = layout_of(path, layout)
        if not output_exists(path, kind):
            continue
        if kind in ("pt", "dcp"):
            reason = f"already exists, and this layout, {kind}, does not say which average it holds"
            raise OutputExistsError(path, reason, hint)
        stored: dict[str, str] = {}
        try:
            for shard in model_files(path):
                file = _checked_header(shard, plan.output_info(index), {})
                file.verify()
                stored |= {name: f"{item.dtype} of shape {list(item.shape)}" for name, item in file.entries.items()}
            for name in sorted(stored.keys() | expected.keys()):
                actual, wanted = stored.get(name, "absent"), expected.get(name, "absent")
                if actual != wanted:
                    raise MismatchError(path, f"is another output: its tensor {shown(name)} is {actual}, not {wanted}")
        except (FileFormatError, MismatchError) as error:
            raise OutputExistsError(error.subject, error.reason, hint) from error
        existing.add(index)
    return existing


def _checked_header(path: Path, wanted: OutputInfo, marks: Mapping[str, str]) -> TensorFile:
    """Return the header of an existing output; raise a FileFormatError or MismatchError unless it is as `wanted`."""
    file = read_file(path)
    info = decode_output(file)
    difference = output_difference(info, wanted)
    stored, planned = ([used.file for used in each.snapshots if used.coefficient] for each in (info, wanted))
    if difference is None and (stored != planned or not same_coefficients(info, wanted)):
        difference = "its snapshots or their coefficients are others"
    elif difference is None and not marks.items() <= info.marks.items():
        difference = "its release, snapshots, dtype, tensors or number of shards are others"
    if difference is not None:
        raise MismatchError(path, f"is another output: {difference}")
    return file


# --- shards of several processes


def write_shards(ranks: Ranks, plan: Plan, outputs: Outputs, progress: ProgressBar) -> SynthesisReport | None:
    """Make the shards of this rank, while the other ranks make theirs; return None in all ranks but the first."""
    if outputs.paths:
        wanted = ranks.world * max(1, -(-plan.nbytes // (outputs.options.shard_bytes * ranks.world)))
        shards = Shards(plan, outputs, wanted)
        with ranks.together():
            if not ranks.rank:
                shards.begin()
        own = shards.plans[ranks.rank :: ranks.world]
        bar = no_bar if ranks.rank else progress
        with bar("synthesizing", sum(shard.read_bytes for shard in own)) as advance:
            for first in range(0, len(shards.plans), ranks.world):
                with ranks.together():
                    shards.make(first + ranks.rank, advance)
        with ranks.together():
            if not ranks.rank:
                shards.finish()
    return None if ranks.rank else outputs.report(plan)


class Shards:
    """The shards of the models of a plan's targets, one folder per target; `plans` has the plan of each shard.

    Arguments:
        wanted: number of shards of each model; fewer if there are fewer tensors.
    """

    def __init__(self, plan: Plan, outputs: Outputs, wanted: int) -> None:
        workers = max(1, worker_count() // _local_rank()[1])
        self._options = replace(outputs.options, layout="safetensors", workers=workers)
        self._folders = outputs.paths
        self._made = [*filter(None, [outputs.container]), *outputs.paths]
        division = divide(plan, wanted)
        self.plans = [replace(plan, subset=frozenset(names)) for names in division]
        self._marks = [{"plan": fingerprint(plan, target, division)} for target in range(len(self._folders))]

    def begin(self) -> None:
        """Check that all shards may be written and fit on the disk, and remove the index of a model to replace."""
        missing: dict[Path, int] = {}
        for target, folder in enumerate(self._folders):
            check_free_folder(folder, overwrite=True)
            check_no_snapshot(folder)
            absent = [shard for shard in range(len(self.plans)) if not self._is_there(shard, target)]
            index, others = folder / INDEX_NAME, self._others(folder)
            if index in others or (absent and not files.is_absent(index)):
                _remove(index)
            if not files.is_url(folder):  # to a store each process sends one shard after the other
                missing |= {self._path(shard, folder): self.plans[shard].nbytes for shard in absent}
        check_space(missing)

    def make(self, shard: int, progress: Progress) -> None:
        """Make a shard for the targets that lack it; do nothing if `shard` is beyond the last one."""
        targets = range(len(self._folders)) if shard < len(self.plans) else ()
        missing = [target for target in targets if not self._is_there(shard, target, verify=True)]
        if missing:
            paths = [self._path(shard, self._folders[target]) for target in missing]
            marks = [self._marks_of(shard, target) for target in missing]
            options = replace(self._options, progress=progress)
            write_synthesis(self.plans[shard].only(missing), paths, options, self._made, marks)

    def finish(self) -> None:
        """Check that all shards exist, remove the files of replaced models, and write the indexes."""
        for target, folder in enumerate(self._folders):
            for shard in range(len(self.plans)):
                if not self._is_there(shard, target):
                    raise DirectoryError(self._path(shard, folder), "is missing", ON_ONE_FILE_SYSTEM)
        for folder in self._folders:
            for path in self._others(folder):
                _remove(path)
            if files.is_absent(folder / INDEX_NAME):
                files.write_atomically(folder / INDEX_NAME, self._index(folder))

    def _path(self, shard: int, folder: Path) -> Path:
        return folder / f"model-{shard + 1:05d}-of-{len(self.plans):05d}.safetensors"

    def _marks_of(self, shard: int, target: int) -> dict[str, str]:
        return self._marks[target] | {"part": f"{shard + 1}/{len(self.plans)}"}

    def _is_there(self, shard: int, target: int, verify: bool = False) -> bool:
        """Return whether a shard exists, or raise an OutputExistsError if another file with its name must be kept."""
        path = self._path(shard, self._folders[target])
        if files.is_absent(path):
            return False
        try:
            file = _checked_header(path, self.plans[shard].output_info(target), self._marks_of(shard, target))
            if verify:
                file.verify()
        except (FileFormatError, MismatchError) as error:
            if not self._options.overwrite:
                raise OutputExistsError(error.subject, error.reason, OTHER_FOLDER) from error
            return False
        return True

    def _index(self, folder: Path) -> bytes:
        paths = [self._path(shard, folder) for shard in range(len(self.plans))]
        places = {name: path.name for path, plan in zip(paths, self.plans, strict=True) for name in plan.entries}
        return encode_index(places, sum(plan.nbytes for plan in self.plans))

    def _others(self, folder: Path) -> list[Path]:
        """Return the files of other models, which must not stay with this one; an OutputExistsError without overwrite.

        Another job may have written them since this one began.
        """
        expected = {self._path(shard, folder).name for shard in range(len(self.plans))}
        if _holds(folder / INDEX_NAME, self._index(folder)):
            expected.add(INDEX_NAME)
        others = [path for path in model_files_in(folder) if path.name not in expected]
        if others and not self._options.overwrite:
            raise OutputExistsError(others[0], "is of another model", OTHER_FOLDER)
        return others


def divide(plan: Plan, shards: int) -> list[list[str]]:
    """Divide the stored tensors into shards of neighbours with nearly equal numbers of bytes to read and write."""
    costs = {}
    for name, aliases in plan.names.items():
        written = Entry(plan.output_dtype(name), plan.newest.entries[name].shape).nbytes
        costs[name] = len(plan.targets) * len(aliases) * written + sum(s.entries[name].nbytes for s in plan.sources)
    division: dict[int, list[str]] = {}
    total, done = sum(costs.values()) or 1, 0
    for name, cost in costs.items():
        division.setdefault(min(shards - 1, shards * (2 * done + cost) // (2 * total)), []).append(name)
        done += cost
    return list(division.values())


def fingerprint(plan: Plan, target: int, division: Sequence[Sequence[str]]) -> str:
    """Return a hash, 32 hexadecimal digits, that is the same for all shards of a target of a plan.

    Coefficients are not hashed, since another processor rounds them differently: see `outputs.SAME_COEFFICIENT`.
    """
    columns = plan.reconstruction.coefficients[:, list(plan.columns[target].values())]
    used = [source for source, row in zip(plan.sources, columns, strict=True) if row.any()]
    info, checksums = plan.output_info(target), [source.identity for source in used if isinstance(source, FileSource)]
    facts = [
        FORMAT, posthoc_cli.__version__, info.run_id, info.profile, info.t, info.t_unit, info.method,
        checksums, [(name, entry.dtype, entry.shape) for name, entry in plan.entries.items()], division,
    ]  # fmt: skip
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, separators=(",", ":")).encode())


def _holds(path: Path, content: bytes) -> bool:
    with suppress(FileFormatError):
        return read_small_file(path, len(content)) == content
    return False


def _remove(path: Path) -> None:
    with files.reported_as_write_error(path, "removed"):
        files.unlink_if_exists(path)
        files.system.fsync_directory(path.parent)


# --- processes


def is_rank() -> bool:
    """Return whether this process is one of several ranks of a torchrun job."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(map(os.environ.get, wanted)) and os.environ["WORLD_SIZE"] != "1"


def _local_rank() -> tuple[int, int]:
    """Return the index of this process among the ranks on this machine, and their number."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


WAIT = timedelta(minutes=30)
"""The timeout for other ranks to begin, or to finish their current shards."""


class Ranks:
    """The process group of a torchrun job, until the end of the `with` block.

    Raises:
        RankError: the ranks could not connect, or the launcher ended this rank; in `together`, another one failed.
    """

    def __init__(self) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or torch prints a stack trace when a rank has died
        self._is_own = not dist.is_initialized()
        try:
            if self._is_own:
                dist.init_process_group("gloo", timeout=WAIT)
            self._group = dist.new_group(backend="gloo", timeout=WAIT)
        except (RuntimeError, ValueError) as error:
            reason = f"did not meet by torch.distributed: {str(error).strip().partition(chr(10))[0][:200]}"
            raise RankError("the processes of this job", reason) from error
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.rank:  # the first rank logs for all
            logging.getLogger("posthoc_cli").setLevel(logging.ERROR)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block, wait until all ranks have run theirs, and raise a RankError if that of another rank failed."""
        failure = None
        try:
            yield
        except PostHocError as error:
            failure = error
        messages: list[str | None] = [None] * self.world
        try:
            dist.all_gather_object(messages, failure and str(failure), self._group)
        except RuntimeError as error:
            raise failure or RankError("another process of this job", "failed or died; nothing was finished") from error
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise RankError(f"rank {rank}", f"failed: {message}")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(RuntimeError):
            dist.destroy_process_group(None if self._is_own else self._group)
        if isinstance(error, SystemExit):
            reason = "was ended by a signal, as a launcher does when another process fails or dies"
            raise RankError("this process of the job", reason) from None
