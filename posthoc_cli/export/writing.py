"""Averages of a run as files: in one process, or by the processes of a torchrun job."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.export.layouts import PICKLES, OutputOptions, existing_outputs, output_paths, write_synthesis
from posthoc_cli.export.model_folder import ModelFolder
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots.format import SUFFIX
from posthoc_cli.synthesis.engine import check_device
from posthoc_cli.synthesis.plan import Plan
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
        seconds: how long it took.
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
        """The report as plain values for JSON."""
        report = self.plan.to_dict()
        for index, target in enumerate(report["targets"]):
            target["output"] = str(self.outputs[index]) if self.outputs else None
            target["skipped"] = index in self.existing
            target["seconds"] = self.seconds
        report["device"] = self.device
        if self.taken:
            report["from_model_folder"] = list(self.taken)
        return report


@dataclass(frozen=True)
class Outputs:
    """Where averages go as files, and how: checked before anything is read.

    Attributes:
        paths: one a target; none in a dry run.
        container: a folder to make for them.
        dtype: of the averages.
        options: with the device and the layout that follow from what was asked for.
        like: the model folder that they are to be like.
        started: when they were asked for.
    """

    paths: tuple[Path, ...]
    container: Path | None
    dtype: torch.dtype | str | None
    options: OutputOptions
    like: ModelFolder | None
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def asked(
        cls,
        targets: tuple[Target, ...],
        out: str | Path | None,
        dtype: torch.dtype | str | None,
        asked: OutputOptions,
        like: ModelFolder | None,
    ) -> Outputs:
        """The outputs that a caller of `Run.write` asks for; an InvalidValueError says what cannot be."""
        _check(out, dtype, asked)
        device = str(asked.device)
        if asked.distributed and device == "cuda":  # each rank of a machine takes one of its own
            device = f"cuda:{local_rank()[0] % max(1, torch.cuda.device_count())}"
        layout = "sharded" if asked.distributed or like is not None else asked.layout
        options = replace(asked, device=check_device(device), layout=layout)
        paths, container = ([], None) if out is None else output_paths(targets, str(out), layout)
        for path in paths:
            if not asked.dry_run and not files.is_folder((container or path).parent):
                raise InvalidValueError("out", "its folder does not exist", value=container or path)
            if like is None:
                options.check_layout(path)
        if asked.dry_run:
            paths, container = [], None
        return cls(tuple(paths), container, dtype if like is None else like.dtype, options, like)

    def write(self, plan: Plan, progress: ProgressBar = no_bar) -> SynthesisReport:
        """Make the targets of a plan, but those that are there and may be skipped.

        Errors as `write_synthesis` and `ModelFolder.write`.
        """
        existing = existing_outputs(plan, self.paths, self.options.layout) if self.options.skip_existing else set()
        wanted = [index for index in range(len(self.paths)) if index not in existing]
        taken: tuple[str, ...] = ()
        if wanted:
            with progress("synthesizing", plan.read_bytes) as advance:
                options = replace(self.options, progress=advance)
                if self.like is None:
                    paths = [self.paths[index] for index in wanted]
                    write_synthesis(plan.only(wanted), paths, options, [*filter(None, [self.container])])
                else:
                    taken = self.like.write(plan, self.paths, options, self.container)
        return self.report(plan, frozenset(existing), taken)

    def report(
        self, plan: Plan, existing: frozenset[int] = frozenset(), taken: tuple[str, ...] = ()
    ) -> SynthesisReport:
        """What became of a plan, now."""
        seconds = time.perf_counter() - self.started
        return SynthesisReport(plan, self.paths, existing, taken, str(self.options.device), seconds)


def _check(out: str | Path | None, dtype: torch.dtype | str | None, asked: OutputOptions) -> None:
    """Check options that contradict each other."""
    asked.shard_bytes  # noqa: B018  checks it, also where nothing is written
    if asked.overwrite and asked.skip_existing:
        raise InvalidValueError("overwrite and skip_existing", "give one of them")
    if out is None and not asked.dry_run:
        raise InvalidValueError("out", "is missing; only a dry run needs no output")
    if asked.like is None and asked.component is not None:
        raise InvalidValueError("like", "is missing; component is about a model folder")
    others = (asked.distributed, asked.overwrite, asked.skip_existing, asked.layout, parse_dtype(dtype))
    if asked.like is not None and any(others):
        reason = "says all about the output: no layout, dtype, overwrite, skip_existing or torchrun beside it"
        raise InvalidValueError("like", reason)
    is_file = Path(out or "").suffix in (SUFFIX, *PICKLES)
    if asked.distributed and (is_file if asked.layout is None else asked.layout != "sharded"):
        name, value = ("out", out) if asked.layout is None else ("layout", asked.layout)
        reason = "a job of several processes makes a folder of shards; name a folder"
        raise InvalidValueError(name, reason, "an export makes one file of it", value=value)
