"""Averages of a run as files: all at once, a part at a time, or by the processes of a torchrun job."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.export.outputs import (
    DEFAULT_SHARD_SIZE,
    existing_outputs,
    output_paths,
    write_synthesis,
)
from posthoc_cli.export.parts import Finished, MadePart, Part, PartedSynthesis, finish, parts_for, parts_to_finish
from posthoc_cli.export.ranks import join_ranks, local_rank
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.synthesis.engine import AUTO_REASON, Options, parse_device, worker_count
from posthoc_cli.synthesis.plan import Plan, parse_accumulate, plan_synthesis, with_consistent_plan
from posthoc_cli.synthesis.sources import disk_sources
from posthoc_cli.targets import Target


@dataclass(frozen=True)
class Shares:
    """How the processes of a job would share a synthesis.

    Attributes:
        parts: how many there are.
        own: those of this process.
        processes: how many there are.
    """

    parts: int
    own: tuple[MadePart, ...]
    processes: int


@dataclass(frozen=True)
class SynthesisReport:
    """The plan of a synthesis, and what became of it.

    Attributes:
        plan: of all targets.
        outputs: one a target; empty in a dry run.
        existing: the targets, by index, whose output was there already.
        device: where the sums were made.
        reason: why there.
        seconds: how long it took.
        parts: of a synthesis in parts: the part that was made, what was finished, or the shares of a dry run.
    """

    plan: Plan
    outputs: tuple[Path, ...]
    existing: frozenset[int]
    device: str
    reason: str
    seconds: float
    parts: MadePart | Finished | Shares | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        report = self.plan.to_dict()
        for index, target in enumerate(report["targets"]):
            target["output"] = str(self.outputs[index]) if self.outputs else None
            target["skipped"] = index in self.existing
            target["seconds"] = self.seconds
        return report | {"device": self.device, "reason": self.reason} | self._parts()

    def _parts(self) -> dict[str, Any]:
        made = self.parts
        if isinstance(made, MadePart):
            counts = {"bytes": made.nbytes, "read_bytes": made.read_bytes, "tensors": made.tensors}
            return {"shard": {"part": made.part.number, "of": made.part.of, **counts}}
        if isinstance(made, Finished):
            return {"finished": {"parts": made.parts, "bytes": made.nbytes}}
        return {} if made is None else {"parts": made.parts}


@dataclass(frozen=True)
class Synthesis:
    """A request for averages as files.

    Attributes:
        directory: the run.
        targets: at least one.
        out: a file, a folder, or a name with `{sigma_rel}` or `{target}` in it; None for a dry run without.
        t, step, method, max_error, dtype, accumulate: as in `plan_synthesis`.
        layout: "safetensors", "sharded" or "pt"; by default from the output's name.
        max_shard_size: of the sharded layout, such as "5GB".
        device: "auto", "cpu", "cuda", ...
        overwrite: replace outputs that are there.
        skip_existing: leave outputs of the same plan as they are.
        dry_run: plan only.
        shard: "K/N": make part K of N, a shard in the folder `out`.
        finish: verify the parts that are there, and write the index.
        distributed: this is one of the processes of a torchrun job, all of which make this call.
        progress: opens a progress bar.
    """

    directory: Path
    targets: tuple[Target, ...]
    out: str | None
    t: float | None = None
    step: int | None = None
    method: str | None = None
    max_error: float | None = None
    dtype: torch.dtype | str | None = None
    layout: str | None = None
    max_shard_size: str = DEFAULT_SHARD_SIZE
    device: str = "auto"
    accumulate: torch.dtype | str | None = None
    overwrite: bool = False
    skip_existing: bool = False
    dry_run: bool = False
    shard: str | None = None
    finish: bool = False
    distributed: bool = False
    progress: ProgressBar = no_bar

    def run(self) -> SynthesisReport | None:
        """Do it; None in every process of a job but the first.

        Raises:
            InvalidValueError, InexactError, OutputExistsError, WriteError, FileFormatError, MismatchError,
            NonFiniteError, NotReadyError, RankError: see `plan_synthesis`, `write_synthesis`, `parts` and `ranks`.
        """
        started = time.perf_counter()
        part = self._checked_part()
        in_parts = self.finish or self.distributed or part is not None
        if in_parts:
            self._check_folder_of_shards()
        layout = "sharded" if in_parts else self.layout
        paths, folder = ([], None) if self.out is None else output_paths(self.targets, self.out, layout)
        for path in paths if folder is None else [folder]:
            if not self.dry_run and not path.parent.is_dir():
                raise InvalidValueError("out", "its folder does not exist", value=path)
        parse_accumulate(self.accumulate)
        device = "cpu" if self.dry_run and self.device == "auto" else parse_device(self._device())
        limit = files.parse_bytes(self.max_shard_size, "max_shard_size")
        job = _Job(self, started, paths, folder, Options(device, None, None, layout, self.overwrite, limit))
        if part is not None:
            return job.make_part(part)
        if self.finish:
            return job.finish()
        return job.share() if self.distributed else job.make()

    def plan(self) -> Plan:
        """The plan of the snapshots that are there now."""
        sources = disk_sources(self.directory)
        options = (self.t, self.step, self.method, self.max_error, self.dtype, self.accumulate)
        return plan_synthesis(sources, self.targets, *options)

    def _checked_part(self) -> Part | None:
        if self.overwrite and self.skip_existing:
            raise InvalidValueError("overwrite and skip_existing", "give one of them")
        if self.shard is not None and self.finish:
            raise InvalidValueError("shard and finish", "give one of them; finish when all parts are made")
        if self.out is None and (self.finish or not self.dry_run):
            raise InvalidValueError(
                "out", "is missing" if self.finish else "is missing; only a dry run needs no output"
            )
        if self.skip_existing and (self.shard or self.finish or self.distributed):
            raise InvalidValueError("skip_existing", "parts that are there stay as they are anyway", "leave it out")
        if self.shard is None:
            return None
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", self.shard)
        if match is None:
            example = "must be K/N, part K of N, such as 3/8 for the third of eight"
            raise InvalidValueError("shard", example, value=self.shard or "(empty)")
        return Part(int(match[1]), int(match[2]))

    def _check_folder_of_shards(self) -> None:
        is_file = self.out is not None and re.search(r"\.(safetensors|pt|pth|bin)$", self.out) is not None
        name, value = ("out", self.out) if self.layout is None else ("layout", self.layout)
        if self.layout not in (None, "sharded") or (self.layout is None and is_file):
            reason = "a synthesis in parts makes a folder of shards; name a folder"
            raise InvalidValueError(name, reason, "an export makes one file of it", value=value)

    def _device(self) -> str:
        """The device that was asked for; each rank of a machine takes one of its own."""
        if not self.distributed or self.device != "cuda":
            return self.device
        return f"cuda:{local_rank()[0] % max(1, torch.cuda.device_count())}"


@dataclass(frozen=True)
class _Job:
    """A request whose options are checked, and the four ways to do it."""

    request: Synthesis
    started: float
    paths: list[Path]
    folder: Path | None
    options: Options

    def make(self) -> SynthesisReport:
        """All targets in this process."""
        paths = [] if self.request.dry_run else self.paths
        existing: set[int] = set()

        def write(plan: Plan) -> Plan:
            existing.update(existing_outputs(plan, paths, self.options.layout) if self.request.skip_existing else ())
            wanted = [index for index in range(len(paths)) if index not in existing]
            if wanted:
                with self.request.progress("synthesizing", plan.read_bytes) as advance:
                    options = replace(self.options, progress=advance)
                    write_synthesis(plan.only(wanted), [paths[index] for index in wanted], options, self.folder)
            return plan

        return self._report(with_consistent_plan(self.request.plan, write), paths, existing)

    def make_part(self, part: Part) -> SynthesisReport:
        """One part of every target."""
        plan = self.request.plan()
        parted = self._parted(plan, part.of)
        made = parted.describe(part)
        if not self.request.dry_run:
            with self.request.progress("synthesizing", made.read_bytes) as advance:
                made = parted.make(part, advance)
        return self._report(plan, made.paths, made.there, made)

    def finish(self) -> SynthesisReport:
        """Verify all parts, and write the indexes."""
        plan = self.request.plan()
        count = parts_to_finish(self.paths, lambda count: self._parted(plan, count).plan_ids)
        total = len(plan.targets) * sum(spec.nbytes for spec in plan.specs())
        with self.request.progress("verifying", total) as advance:
            done = finish(self._parted(plan, count), True, advance, write=not self.request.dry_run)
        return self._report(plan, self.paths, done.there, done)

    def share(self) -> SynthesisReport | None:
        """The parts of this process, beside the others of a torchrun job; None in all but the first."""
        done: list[Finished] = []
        with join_ranks() as ranks:
            if ranks.rank:  # the first one logs for all
                logging.getLogger("posthoc_cli").setLevel(logging.ERROR)
            plan = self.request.plan()
            nbytes = sum(spec.nbytes for spec in plan.specs())
            count = parts_for(nbytes, self.options.max_shard_size, ranks.world)
            parted = self._parted(plan, count, max(1, worker_count() // local_rank()[1]))
            own = Part.all(count)[ranks.rank :: ranks.world]
            described = tuple(map(parted.describe, own))
            if self.request.dry_run:
                shares = Shares(count, described, ranks.world)
                return None if ranks.rank else self._report(plan, (), (), shares)
            ranks.begin(parted.check_space)  # for all parts, before any is made
            bar = no_bar if ranks.rank else self.request.progress
            with bar("synthesizing", sum(part.read_bytes for part in described)) as advance:

                def progress(nbytes: int) -> None:
                    ranks.check()
                    advance(nbytes)

                for part in own:
                    parted.make(part, progress)
            ranks.finish(lambda: done.append(finish(parted, verify=False)))
        return self._report(plan, self.paths, done[0].there, done[0]) if done else None

    def _parted(self, plan: Plan, parts: int, workers: int | None = None) -> PartedSynthesis:
        folders = self.paths or [Path("(no output)")] * len(plan.targets)
        return PartedSynthesis(plan, folders, parts, replace(self.options, workers=workers), self.folder)

    def _report(
        self,
        plan: Plan,
        outputs: Iterable[Path],
        existing: Iterable[int],
        parts: MadePart | Finished | Shares | None = None,
    ) -> SynthesisReport:
        if self.request.dry_run:
            outputs = existing = ()
        reason = AUTO_REASON if self.request.device == "auto" else "asked for"
        seconds = time.perf_counter() - self.started
        return SynthesisReport(
            plan, tuple(outputs), frozenset(existing), str(self.options.device), reason, seconds, parts
        )
