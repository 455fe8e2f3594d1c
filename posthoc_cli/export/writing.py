"""A synthesis whose averages are written to files, and its report."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.devices import count_devices
from posthoc_cli.export.job import OutputJob
from posthoc_cli.export.like import Like, Replacement
from posthoc_cli.group import THIS_PROCESS, Group
from posthoc_cli.request import OutputRequest
from posthoc_cli.resources import no_bar, worker_count
from posthoc_cli.snapshots.selection import note_statistics
from posthoc_cli.synthesis.engine import check_device
from posthoc_cli.synthesis.plan import Plan, nbytes


@dataclass(frozen=True)
class SynthesisReport:
    """The plan of a synthesis, and its result."""

    plan: Plan  # of what is written: fitted to the checkpoint that it is a copy of
    outputs: tuple[Path, ...] = ()  # one per target; empty in a dry run
    copied: Replacement | None = None  # the checkpoint that they are copies of
    device: str = "cpu"  # computed the sums
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        report = self.plan.to_dict()
        for index, target in enumerate(report["targets"]):
            target["output"] = str(self.outputs[index]) if self.outputs else None
            target["seconds"] = self.seconds
            target["bytes"] = nbytes(self.plan.entries)
        newest = self.plan.sources[-1]
        left_out = [name for name in newest.left_out if not name.endswith("_extra_state")]
        sources = self.plan.counts
        if self.plan.run_end != self.plan.t:
            sources += f" (the newest is of {self.plan.run_end:,.12g})"
        report |= {
            "device": self.device,
            "sources": sources,
            "choice": self.plan.choice,
            "read_bytes": self.plan.read_bytes,
            "left_out": left_out,
        }
        if self.copied is not None:
            report["like"] = self.copied.to_dict()
        return report


def write_synthesis(
    plan: Plan,
    paths: Sequence[Path],
    request: OutputRequest,
    like: Like | None = None,
    group: Group = THIS_PROCESS,
) -> SynthesisReport | None:
    """Synthesize every target of a plan into its path, if there are any. Returns None in all ranks
    but one.

    In a job this rank's share of the files is made. `like` is what outputs are copies of.
    """
    started = time.perf_counter()
    device, workers = _resources(request, group)
    if group.leads:
        note_statistics(plan.newest.copies)
    copied = None
    if like is not None:
        plan, copied = like.fit(plan)
    if paths:
        infos = [plan.output_info(index) for index in range(len(plan.targets))]
        encoded = [info.encode() for info in infos]
        headers = dict(zip(paths, encoded, strict=True))
        bar = request.progress if group.leads else no_bar
        with bar("synthesizing", plan.read_bytes // len(group.ranks)) as advance:
            job = OutputJob(plan, headers, request, copied, group)
            job.write(advance, device, workers)
    if not group.leads:
        return None
    seconds = time.perf_counter() - started
    return SynthesisReport(plan, tuple(paths), copied, str(device), seconds)


def _resources(
    request: OutputRequest,
    group: Group,
) -> tuple[torch.device, int | None]:
    """Choose the device and the number of threads of this process. The processes of one machine
    share its cores, and each uses another device."""
    if group.is_alone:
        return check_device(request.device), request.workers
    device = request.device
    if devices := count_devices(str(device)):
        rank = int(os.environ.get("LOCAL_RANK", 0))
        device = f"{device}:{rank % devices}"
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return check_device(device), max(1, worker_count() // count)
