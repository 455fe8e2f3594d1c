"""A synthesis whose averages are written to files, and its report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.devices import count_devices
from posthoc_cli.errors import VanishedError
from posthoc_cli.export.job import OutputJob
from posthoc_cli.export.like import Like, Replacement
from posthoc_cli.export.names import output_paths
from posthoc_cli.export.torchrun import all_ranks
from posthoc_cli.group import THIS_PROCESS, Group
from posthoc_cli.request import OutputRequest, Request
from posthoc_cli.resources import no_bar, worker_count
from posthoc_cli.snapshots.selection import note_statistics
from posthoc_cli.snapshots.sources import ATTEMPTS, Sources, announce, use
from posthoc_cli.synthesis.engine import check_device
from posthoc_cli.synthesis.plan import Plan, announce_plan, nbytes, plan_synthesis

log = logging.getLogger(__name__)


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
            "findings": list(self.plan.chosen.sources.findings),
        }
        if self.copied is not None:
            report["like"] = self.copied.to_dict()
        return report


def write_averages(
    read: Callable[[], Sources],
    request: OutputRequest,
    *,
    is_quiet: bool = False,
    renew: Callable[[Sources], object] = lambda _: None,
) -> SynthesisReport | None:
    """Write averages of the run that `read` finds to files, see `Run.write`.

    Unless `is_quiet`, log what is to be known of the run and of the averages. `renew` is called
    with the sources if they were read again.
    """
    paths = output_paths(request)
    if request.distributed:
        with all_ranks() as ranks:
            sources = _read_together(read, ranks)
            announce(sources)

            def write_shards(sources: Sources) -> SynthesisReport | None:
                plan = ranks.together(lambda: plan_synthesis(sources, request))
                announce_plan(plan)
                return write_synthesis(plan, paths, request, group=ranks)

            return use(sources, write_shards)
    sources = read()
    if not is_quiet:
        announce(sources)
    copied = None
    planned: Request = request
    if request.like is not None:
        like = request.like
        copied = Like.find(like, sources.tensors, request.raw, request.average, request.weights)
        planned = replace(
            request, like=None, raw=False, average=None, weights=None, dtype=copied.dtype
        )

    def write(sources: Sources) -> SynthesisReport | None:
        plan = plan_synthesis(sources, planned)
        if not is_quiet:
            announce_plan(plan)
        return write_synthesis(plan, paths, request, copied)

    return use(sources, write, renew)


def _read_together(read: Callable[[], Sources], ranks: Group) -> Sources:
    """Read sources in all ranks of a job until all have read the same."""
    for _ in range(ATTEMPTS):
        sources = ranks.together(read)
        read = sources.again
        if not ranks.differ(sources.identity):
            return replace(sources, read=partial(_read_together, read, ranks))
        log.warning("%s: changed while the ranks of this job read it; reading again", sources.place)
    raise VanishedError(sources.place, "changes whenever the ranks of this job read it")


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
