"""Averages of a run as files, written by one process, or by the ranks of a torchrun job, each of which writes shards.

A plan is divided into shards of complete tensors by headers alone, so every rank knows the whole division. Ranks
exchange no tensors: they only report by torch.distributed whether they succeeded. A rank that has died is noticed by
the launcher, which ends the others, or by the ranks that wait for it: no output appears, and the job is run again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from posthoc_cli import files
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import InvalidValueError, PostHocError, RankError
from posthoc_cli.export.layouts import (
    ALONE,
    PICKLES,
    Alone,
    Output,
    OutputOptions,
    files_of,
    output_paths,
    write_outputs,
)
from posthoc_cli.resources import ProgressBar, no_bar, worker_count
from posthoc_cli.snapshots.sources import counted
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry
from posthoc_cli.synthesis.engine import check_device, synthesize_into
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Target

if TYPE_CHECKING:
    from posthoc_cli.export.model_folder import ModelFolder


@dataclass(frozen=True)
class SynthesisReport:
    """The plan of a synthesis, and its result."""

    plan: Plan
    outputs: tuple[Path, ...] = ()  # one per target; empty in a dry run
    taken: tuple[str, ...] = ()  # tensors that the run lacks and that were copied from the model folder
    device: str = "cpu"  # computed the sums
    seconds: float = 0.0

    def __repr__(self) -> str:
        return f"SynthesisReport({len(self.outputs)} outputs in {self.seconds:.1f} s: {self.plan!r})"

    def to_dict(self) -> dict[str, Any]:
        report = self.plan.to_dict()
        for index, target in enumerate(report["targets"]):
            target["output"] = str(self.outputs[index]) if self.outputs else None
            target["seconds"] = self.seconds
            target["bytes"] = self.plan.nbytes
        left_out = [name for name in self.plan.newest.left_out if not name.endswith("_extra_state")]
        later = f" (the newest is of {self.plan.last:,.12g})" if self.plan.last != self.plan.t else ""
        return report | {
            "device": self.device,
            "sources": counted(self.plan.sources) + later,
            "choice": self.plan.choice,
            "read_bytes": self.plan.read_bytes,
            "left_out": left_out,
            **({"from_model_folder": list(self.taken)} if self.taken else {}),
        }


class Outputs:
    """The outputs that a caller of `Run.write` requests by `asked`, checked before anything is read.

    There is one path per target; none in a dry run. `container` is a folder to create for them. `options` are those of
    the caller, with the device and the layout filled in. Raises InvalidValueError if one contradicts another.
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
        paths, self.container = ([], None) if out is None else output_paths(targets, str(out), layout)
        for path in paths:
            if like is None:
                self.options.layout_of(path)
            if not asked.dry_run:
                files.check_parent("out", self.container or path)
        self.paths = [] if asked.dry_run else paths

    def write(self, plan: Plan, progress: ProgressBar = no_bar, ranks: Alone = ALONE) -> SynthesisReport | None:
        """Make the targets of a plan, or this rank's share of them; return None in all ranks but the first."""
        taken: tuple[str, ...] = ()
        if self.paths:
            workers = self.options.workers
            if ranks.world > 1:  # ranks of one machine share its cores
                workers = max(1, worker_count() // _local_rank()[1])
            with (no_bar if ranks.rank else progress)("synthesizing", plan.read_bytes // ranks.world) as advance:
                options = replace(self.options, workers=workers, progress=advance)
                taken = write_synthesis(plan, self.paths, options, self.container, self._like, ranks)
        seconds = time.perf_counter() - self._started
        report = SynthesisReport(plan, tuple(self.paths), taken, str(self.options.device), seconds)
        return None if ranks.rank else report


def _check(out: str | Path | None, dtype: torch.dtype | str | None, asked: OutputOptions) -> None:
    """Raise an InvalidValueError for options that contradict each other."""
    asked.shard_bytes  # noqa: B018  raises an error if invalid, also in a dry run
    others = (asked.distributed, asked.overwrite, asked.layout, parse_dtype(dtype))
    is_file = Path(out or "").suffix in (SUFFIX, *PICKLES)
    name, reason, hint = "like", "", ""
    if out is None and not asked.dry_run:
        name, reason = "out", "is missing; only a dry run needs no output"
    elif asked.like is not None and any(others):
        reason = "determines the output: layout, dtype, overwrite and torchrun cannot be combined with it"
    elif asked.distributed and (is_file if asked.layout is None else asked.layout != "sharded"):
        name = "out" if asked.layout is None else "layout"
        reason = "a job of several processes makes a folder of shards; name a folder"
        hint = "an export makes one file of it"
    if reason:
        raise InvalidValueError(name, reason, hint, value={"out": out or "", "layout": asked.layout}.get(name, ""))


# --- the synthesis


def write_synthesis(
    plan: Plan,
    paths: Sequence[Path],
    options: OutputOptions = OutputOptions(),
    container: Path | None = None,
    like: ModelFolder | None = None,
    ranks: Alone = ALONE,
) -> tuple[str, ...]:
    """Synthesize every target of a plan into its path; see also `write_outputs`.

    Returns the names of tensors that the run lacks, and that were copied from the model folder that outputs are `like`.
    """
    if like is None:
        layout = options.layout_of(paths[0])
        most = min(options.shard_bytes, max(1, -(-plan.nbytes // ranks.world)))
        parts, others = files_of(layout, plan.entries, most)
    else:
        plan, parts = like.arranged(plan)
        layout, others = "like", like.others
    fill = partial(_fill, plan, options, like)
    headers = [plan.output_info(index).encoded() for index in range(len(plan.targets))]
    write_outputs(paths, layout, parts, headers, fill, others, options.overwrite, container, ranks)
    return tuple(name for entries in parts.values() for name in entries if name not in plan.entries)


def _fill(
    plan: Plan,
    options: OutputOptions,
    like: ModelFolder | None,
    outputs: Sequence[Output],
    entries: Mapping[str, Entry],
) -> None:
    """Synthesize the tensors of one file of each output, and copy those that the run lacks."""
    if like is not None:
        for name in entries.keys() - plan.entries.keys():
            tensor = like.stored[name].tensor(name)
            for output in outputs:
                output.write(name, tensor)
    subset = frozenset(name for name, aliases in plan.names.items() if not entries.keys().isdisjoint(aliases))
    with closing(synthesize_into(replace(plan, subset=subset), outputs, options)) as tiles:
        for _ in tiles:
            pass


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


class Ranks(Alone):
    """The process group of a torchrun job, until the end of the `with` block.

    Raises RankError if the ranks cannot connect or, in `together`, another one failed.
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

    def gather(self, value: object) -> list[Any]:
        """Return the values of all ranks, in their order."""
        values: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(values, value, self._group)
        except RuntimeError as error:
            raise RankError("another process of this job", "failed or died; nothing was finished") from error
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block, wait until all ranks have run theirs, and raise a RankError if that of another rank failed."""
        failure: PostHocError | None = None
        try:
            yield
        except PostHocError as error:
            failure = error
        try:
            messages = self.gather(failure and str(failure))
            others = [RankError(f"rank {rank}", f"failed: {text}") for rank, text in enumerate(messages) if text]
        except RankError as error:
            others = [error]
        if failure is not None or others:
            raise failure or others[0]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):
            dist.destroy_process_group(None if self._is_own else self._group)
