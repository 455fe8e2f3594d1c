"""Averages of a run as files: in one process, or by the processes of a torchrun job."""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.export.layouts import OutputOptions, existing_outputs, layout_of, output_paths, write_synthesis
from posthoc_cli.export.model_folder import ModelFolder
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.synthesis.engine import AUTO_REASON, parse_device, worker_count
from posthoc_cli.synthesis.plan import Plan, with_consistent_plan
from posthoc_cli.targets import Target


def is_rank() -> bool:
    """Whether this process is one of several of a torchrun job."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(map(os.environ.get, wanted)) and os.environ["WORLD_SIZE"] != "1"


def local_rank() -> tuple[int, int]:
    """The number of this process among those on this machine, and how many they are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class SynthesisReport:
    """The plan of a synthesis, and what became of it.

    Attributes:
        plan: of all targets.
        outputs: one a target; empty in a dry run.
        existing: the targets, by index, whose output was there already.
        taken: tensors of the model folder that the run does not have.
        device: where the sums were made.
        reason: why there.
        seconds: how long it took.
    """

    plan: Plan
    outputs: tuple[Path, ...] = ()
    existing: frozenset[int] = frozenset()
    taken: tuple[str, ...] = ()
    device: str = "cpu"
    reason: str = ""
    seconds: float = 0.0

    def __repr__(self) -> str:
        return f"SynthesisReport({len(self.outputs)} outputs in {self.seconds:.1f} s: {self.plan!r})"

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
        return report


@dataclass(frozen=True)
class Synthesis:
    """A request for averages as files.

    Attributes:
        planned: plans the targets in a dtype, with the snapshots that are there now.
        names: gives the names of the run's tensors.
        targets, out, dtype, progress: as in `Run.write`.
        asked: how, as the caller says it.
    """

    planned: Callable[[torch.dtype | str | None], Plan]
    names: Callable[[], Iterable[str]]
    targets: tuple[Target, ...]
    out: str | None
    dtype: torch.dtype | str | None
    asked: OutputOptions
    progress: ProgressBar

    def run(self) -> SynthesisReport | None:
        """Do it; None in every process of a torchrun job but the first."""
        started, asked = time.perf_counter(), self.asked
        self._check()
        for path in self._outputs[0] if self._outputs[1] is None else [self._outputs[1]]:
            if not asked.dry_run and not path.parent.is_dir():
                raise InvalidValueError("out", "its folder does not exist", value=path)
        for path in self._outputs[0] if asked.like is None else ():
            asked.check_layout(layout_of(path, self._options.layout))
        device = str(self._options.device)  # options are checked before anything is read
        report = self._share() if asked.distributed else self._make()
        reason, seconds = AUTO_REASON if asked.device == "auto" else "asked for", time.perf_counter() - started
        return None if report is None else replace(report, device=device, reason=reason, seconds=seconds)

    def _check(self) -> None:
        """Check options that contradict each other."""
        asked = self.asked
        if asked.overwrite and asked.skip_existing:
            raise InvalidValueError("overwrite and skip_existing", "give one of them")
        if self.out is None and not asked.dry_run:
            raise InvalidValueError("out", "is missing; only a dry run needs no output")
        if asked.like is None and asked.component is not None:
            raise InvalidValueError("like", "is missing; component is about a model folder")
        others = (asked.distributed, asked.overwrite, asked.skip_existing, asked.layout, parse_dtype(self.dtype))
        if asked.like is not None and any(others):
            reason = "says all about the output: no layout, dtype, overwrite, skip_existing or torchrun beside it"
            raise InvalidValueError("like", reason)
        is_file = self.out is not None and re.search(r"\.(safetensors|pt|pth|bin)$", self.out) is not None
        if asked.distributed and (is_file if asked.layout is None else asked.layout != "sharded"):
            name, value = ("out", self.out) if asked.layout is None else ("layout", asked.layout)
            reason = "a job of several processes makes a folder of shards; name a folder"
            raise InvalidValueError(name, reason, "an export makes one file of it", value=value)

    @cached_property
    def _options(self) -> OutputOptions:
        """What was asked for, with the device and the layout that follow from it."""
        asked, device = self.asked, str(self.asked.device)
        if asked.distributed and device == "cuda":  # each rank of a machine takes one of its own
            device = f"cuda:{local_rank()[0] % max(1, torch.cuda.device_count())}"
        device = "cpu" if asked.dry_run and device == "auto" else parse_device(device)
        in_folder = asked.distributed or asked.like is not None
        layout = "sharded" if in_folder else asked.layout
        return replace(asked, device=device, layout=layout, max_shard_size=asked.shard_bytes)

    @cached_property
    def _outputs(self) -> tuple[list[Path], Path | None]:
        """One a target, and their folder if it is to be made; none without a name."""
        return ([], None) if self.out is None else output_paths(self.targets, self.out, self._options.layout)

    def _plan(self) -> Plan:
        """The plan of the snapshots that are there now."""
        return self.planned(self.dtype if self._model_folder is None else self._model_folder.dtype)

    @cached_property
    def _model_folder(self) -> ModelFolder | None:
        """The folder that outputs are to be like."""
        like = self.asked.like
        return None if like is None else ModelFolder.find(files.expanded(like), self.asked.component, self.names())

    def _make(self) -> SynthesisReport:
        asked, folder = self.asked, self._model_folder
        paths, container = ([], None) if asked.dry_run else self._outputs
        existing: set[int] = set()
        taken: tuple[str, ...] = ()

        def write(plan: Plan) -> Plan:
            nonlocal taken
            existing.update(existing_outputs(plan, paths, self._options.layout) if asked.skip_existing else ())
            wanted = [index for index in range(len(paths)) if index not in existing]
            if not wanted:
                return plan
            with self.progress("synthesizing", plan.read_bytes) as advance, ExitStack() as stack:
                options = replace(self._options, progress=advance)
                if folder is None:
                    write_synthesis(plan.only(wanted), [paths[index] for index in wanted], options, container)
                else:
                    if container is not None:
                        stack.enter_context(files.new_directory(container))
                    taken = folder.write(plan, paths, options)
            return plan

        plan = with_consistent_plan(self._plan, write)
        return SynthesisReport(plan, tuple(paths), frozenset(existing), taken)

    def _share(self) -> SynthesisReport | None:
        """The shards of this process in a torchrun job; None in all but the first."""
        from posthoc_cli.export.torchrun import Ranks, Shards  # torch.distributed takes time to import

        options, (paths, container) = self._options, self._outputs
        with Ranks() as ranks:
            if ranks.rank:  # the first one logs for all
                logging.getLogger("posthoc_cli").setLevel(logging.ERROR)
            plan = ranks.together(self._plan)
            if self.asked.dry_run:
                return None if ranks.rank else SynthesisReport(plan)
            wanted = ranks.world * max(1, -(-plan.nbytes // (options.shard_bytes * ranks.world)))
            workers = max(1, worker_count() // local_rank()[1])
            shards = Shards(plan, paths, wanted, replace(options, workers=workers), container)
            ranks.together(lambda: None if ranks.rank else shards.begin())
            own = [first + ranks.rank for first in range(0, len(shards.parts), ranks.world)]
            bar = no_bar if ranks.rank else self.progress
            with bar("synthesizing", sum(shards.read_bytes(part) for part in own)) as advance:
                for part in own:
                    ranks.together(functools.partial(shards.make, part, advance))
            ranks.together(lambda: None if ranks.rank else shards.finish())
        return None if ranks.rank else SynthesisReport(plan, tuple(paths))
