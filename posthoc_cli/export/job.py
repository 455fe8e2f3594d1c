"""Averages of a run as files: in one process, in parts, or by the processes of a torchrun job."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.export.model_folder import ModelFolder
from posthoc_cli.export.outputs import DEFAULT_SHARD_SIZE, existing_outputs, output_paths, write_synthesis
from posthoc_cli.export.parts import Finished, MadePart, Part, PartedSynthesis, finish, parts_for, parts_to_finish
from posthoc_cli.export.ranks import join_ranks, local_rank
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.synthesis.engine import AUTO_REASON, Options, parse_device, worker_count
from posthoc_cli.synthesis.plan import Plan, Source, parse_accumulate, plan_synthesis, with_consistent_plan
from posthoc_cli.targets import Target


def is_rank() -> bool:
    """Whether this process is one of several of a torchrun job."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(map(os.environ.get, wanted)) and os.environ["WORLD_SIZE"] != "1"


@dataclass(frozen=True)
class Shares:
    """How the processes of a job would share a synthesis: the number of parts, those of this process, the processes."""

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
        parts: of a synthesis in parts: the part that was made, what was finished, or the shares of a dry run.
        taken: tensors of the model folder that the run does not have.
        device: where the sums were made.
        reason: why there.
        seconds: how long it took.
    """

    plan: Plan
    outputs: tuple[Path, ...]
    existing: frozenset[int]
    parts: MadePart | Finished | Shares | None
    taken: tuple[str, ...] = ()
    device: str = "cpu"
    reason: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        report = self.plan.to_dict()
        for index, target in enumerate(report["targets"]):
            target["output"] = str(self.outputs[index]) if self.outputs else None
            target["skipped"] = index in self.existing
            target["seconds"] = self.seconds
        report |= {"device": self.device, "reason": self.reason}
        if self.taken:
            report["from_model_folder"] = list(self.taken)
        made = self.parts
        if isinstance(made, MadePart):
            counts = {"bytes": made.nbytes, "read_bytes": made.read_bytes, "tensors": made.tensors}
            report["shard"] = {"part": made.part.number, "of": made.part.of, **counts}
        elif isinstance(made, Finished):
            report["finished"] = {"parts": made.parts, "bytes": made.nbytes}
        elif made is not None:
            report["parts"] = made.parts
        return report


@dataclass(frozen=True)
class Synthesis:
    """A request for averages as files; `Run.write` says what its fields are."""

    sources: Callable[[], Sequence[Source]]
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
    like: Path | None = None
    component: str | None = None
    through_library: bool = False
    progress: ProgressBar = no_bar

    def run(self) -> SynthesisReport | None:
        """Do it; None in every process of a torchrun job but the first."""
        started = time.perf_counter()
        part = self._checked_part()
        for path in self._outputs[0] if self._outputs[1] is None else [self._outputs[1]]:
            if not self.dry_run and not path.parent.is_dir():
                raise InvalidValueError("out", "its folder does not exist", value=path)
        parse_accumulate(self.accumulate)
        device = str(self._options.device)  # options are checked before anything is read
        if part is not None:
            report: SynthesisReport | None = self._make_part(part)
        elif self.finish:
            report = self._finish()
        else:
            report = self._share() if self.distributed else self._make()
        reason, seconds = AUTO_REASON if self.device == "auto" else "asked for", time.perf_counter() - started
        return None if report is None else replace(report, device=device, reason=reason, seconds=seconds)

    def _checked_part(self) -> Part | None:
        """The part to make, of a synthesis in parts, after a check of the options that say so."""
        if self.overwrite and self.skip_existing:
            raise InvalidValueError("overwrite and skip_existing", "give one of them")
        if self.shard is not None and self.finish:
            raise InvalidValueError("shard and finish", "give one of them; finish when all parts are made")
        if self.out is None and (self.finish or not self.dry_run):
            reason = "is missing" if self.finish else "is missing; only a dry run needs no output"
            raise InvalidValueError("out", reason)
        in_parts = self.finish or self.distributed or self.shard is not None
        if self.like is None and (self.component is not None or self.through_library):
            raise InvalidValueError("like", "is missing; component and through_library are about a model folder")
        others = (in_parts, self.overwrite, self.skip_existing, self.layout, parse_dtype(self.dtype))
        if self.like is not None and any(others):
            reason = "says all about the output: no layout, dtype, overwrite, skip_existing or parts beside it"
            raise InvalidValueError("like", reason)
        if self.skip_existing and in_parts:
            raise InvalidValueError(
                "skip_existing", "existing parts of the same plan are kept in any case", "leave it out"
            )
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", self.shard or "")
        if match is None and self.shard is not None:
            example = "must be K/N, part K of N, such as 3/8 for the third of eight"
            raise InvalidValueError("shard", example, value=self.shard or "(empty)")
        part = None if match is None else Part(int(match[1]), int(match[2]))
        is_file = self.out is not None and re.search(r"\.(safetensors|pt|pth|bin)$", self.out) is not None
        if in_parts and (is_file if self.layout is None else self.layout != "sharded"):
            name, value = ("out", self.out) if self.layout is None else ("layout", self.layout)
            reason = "a synthesis in parts makes a folder of shards; name a folder"
            raise InvalidValueError(name, reason, "an export makes one file of it", value=value)
        return part

    @cached_property
    def _outputs(self) -> tuple[list[Path], Path | None]:
        """One a target, and their folder if it is to be made; none without a name."""
        return ([], None) if self.out is None else output_paths(self.targets, self.out, self._layout)

    @property
    def _layout(self) -> str | None:
        in_folder = self.finish or self.distributed or self.shard is not None or self.like is not None
        return "sharded" if in_folder else self.layout

    @cached_property
    def _options(self) -> Options:
        device = self.device
        if self.distributed and device == "cuda":  # each rank of a machine takes one of its own
            device = f"cuda:{local_rank()[0] % max(1, torch.cuda.device_count())}"
        device = "cpu" if self.dry_run and device == "auto" else parse_device(device)
        limit = files.parse_bytes(self.max_shard_size, "max_shard_size")
        return Options(device, None, None, self._layout, self.overwrite, limit)

    def _plan(self) -> Plan:
        """The plan of the snapshots that are there now."""
        dtype = self.dtype if self._model_folder is None else self._model_folder.dtype
        options = (self.t, self.step, self.method, self.max_error, dtype, self.accumulate)
        return plan_synthesis(self.sources(), self.targets, *options)

    @cached_property
    def _model_folder(self) -> ModelFolder | None:
        """The folder that outputs are to be like."""
        if self.like is None:
            return None
        newest = self.sources()[-1].info
        return ModelFolder.find(self.like, self.component, newest.tensors.keys() | newest.aliases.keys())

    def _make(self) -> SynthesisReport:
        (paths, folder), options = ([], None) if self.dry_run else self._outputs, self._options
        existing: set[int] = set()
        taken: tuple[str, ...] = ()

        def write(plan: Plan) -> Plan:
            nonlocal taken
            if self._model_folder is not None and paths:
                with self.progress("synthesizing", plan.read_bytes) as advance, ExitStack() as stack:
                    if folder is not None:
                        stack.enter_context(files.new_directory(folder))
                    filled = replace(options, progress=advance)
                    taken = self._model_folder.write(plan, paths, filled, self.through_library)
                return plan
            existing.update(existing_outputs(plan, paths, options.layout) if self.skip_existing else ())
            wanted = [index for index in range(len(paths)) if index not in existing]
            if wanted:
                with self.progress("synthesizing", plan.read_bytes) as advance:
                    chosen = [paths[index] for index in wanted]
                    write_synthesis(plan.only(wanted), chosen, replace(options, progress=advance), folder)
            return plan

        plan = with_consistent_plan(self._plan, write)
        return replace(self._report(plan, paths, existing), taken=taken)

    def _make_part(self, part: Part) -> SynthesisReport:
        parted = self._parted(self._plan(), part.of)
        made = parted.describe(part)
        if not self.dry_run:
            with self.progress("synthesizing", made.read_bytes) as advance:
                made = parted.make(part, advance)
        return self._report(parted.plan, made.paths, made.there, made)

    def _finish(self) -> SynthesisReport:
        plan, (paths, _) = self._plan(), self._outputs
        parted = self._parted(plan, parts_to_finish(paths, lambda count: self._parted(plan, count).plan_ids))
        with self.progress("verifying", len(plan.targets) * plan.nbytes) as advance:
            done = finish(parted, True, advance, write=not self.dry_run)
        return self._report(plan, paths, done.there, done)

    def _share(self) -> SynthesisReport | None:
        """The parts of this process in a torchrun job; None in all but the first."""
        done: list[Finished] = []
        with join_ranks() as ranks:
            if ranks.rank:  # the first one logs for all
                logging.getLogger("posthoc_cli").setLevel(logging.ERROR)
            plan = self._plan()
            count = parts_for(plan.nbytes, self._options.max_shard_size, ranks.world)
            parted = self._parted(plan, count, max(1, worker_count() // local_rank()[1]))
            own = parted.parts[ranks.rank :: ranks.world]
            described = tuple(map(parted.describe, own))
            if self.dry_run:
                return None if ranks.rank else self._report(plan, parts=Shares(count, described, ranks.world))
            ranks.begin(parted.check_space)  # for all parts, before any is made
            bar = no_bar if ranks.rank else self.progress
            with bar("synthesizing", sum(part.read_bytes for part in described)) as advance:

                def progress(nbytes: int) -> None:
                    ranks.check()
                    advance(nbytes)

                for part in own:
                    parted.make(part, progress)
            ranks.finish(lambda: done.append(finish(parted, verify=False)))
        return self._report(plan, self._outputs[0], done[0].there, done[0]) if done else None

    def _parted(self, plan: Plan, parts: int, workers: int | None = None) -> PartedSynthesis:
        paths, folder = self._outputs
        folders = paths or [Path("(no output)")] * len(plan.targets)
        return PartedSynthesis(plan, folders, parts, replace(self._options, workers=workers), folder)

    def _report(
        self,
        plan: Plan,
        outputs: Iterable[Path] = (),
        existing: Iterable[int] = (),
        parts: MadePart | Finished | Shares | None = None,
    ) -> SynthesisReport:
        if self.dry_run:
            outputs = existing = ()
        return SynthesisReport(plan, tuple(outputs), frozenset(existing), parts)
