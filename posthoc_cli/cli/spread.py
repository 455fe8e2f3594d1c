"""`ema synthesize` in parts: --shard, --finish, and the processes of a torchrun job. Parses, calls and prints."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli.cli import output
from posthoc_cli.errors import InvalidValueError

if TYPE_CHECKING:
    from posthoc_cli.export.parts import Finished, MadePart, PartedSynthesis
    from posthoc_cli.synthesis.parts import Part
    from posthoc_cli.synthesis.plan import Plan
    from posthoc_cli.synthesis.ranks import Ranks
    from posthoc_cli.targets import Target


@dataclass(frozen=True)
class Mode:
    """How much of a synthesis this process makes: "whole", "shard" (the `part`), "finish", or "rank"."""

    kind: str
    part: Part | None = None

    def device(self, device: str) -> str:
        """The device that was asked for; each rank of a machine takes one of its own."""
        if self.kind != "rank" or device != "cuda":
            return device
        import torch

        from posthoc_cli.synthesis.ranks import local_rank

        return f"cuda:{local_rank()[0] % max(1, torch.cuda.device_count())}"


@dataclass(frozen=True)
class Options:
    """What the command line said; see `cli.synthesize`."""

    directory: Path
    targets: list[Target]
    t: float | None
    step: int | None
    method: str | None
    max_error: float | None
    out: str | None
    dtype: str
    device: str
    accumulate: str | None
    force: bool
    max_shard_size: str
    dry_run: bool

    def plan(self) -> Plan:
        """What is to be made of what."""
        from posthoc_cli.synthesis.plan import plan_synthesis
        from posthoc_cli.synthesis.sources import disk_sources

        sources = disk_sources(self.directory)
        return plan_synthesis(sources, self.targets, self.t, self.step, self.method, self.max_error, self.dtype)

    def folders(self) -> tuple[list[Path], Path | None]:
        """The folder of each target's model, and that of all of them."""
        from posthoc_cli.export.outputs import output_paths

        return output_paths(self.targets, self.out or "(no output)", "sharded")

    def parted(self, plan: Plan, parts: int) -> PartedSynthesis:
        """The same, divided."""
        from posthoc_cli.export.parts import PartedSynthesis

        folders, container = self.folders()
        return PartedSynthesis(plan, folders, parts, self.dtype, self.accumulate, self.force, container)


# --- what was asked for ----------------------------------------------------------------------------


def parse_mode(shard: str | None, finish: bool, skip_existing: bool) -> Mode:
    """How much of the synthesis this process is to make.

    Raises:
        InvalidValueError: naming the option.
    """
    from posthoc_cli.synthesis.ranks import is_rank

    if shard is not None and finish:
        raise InvalidValueError("--shard and --finish", "give one of them; --finish comes when all parts are made")
    if shard is None and not finish:
        mode = Mode("rank" if is_rank() else "whole")
        if mode.kind == "rank":  # else torch shows a C++ trace when the process with the store has gone
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    else:
        mode = Mode("finish") if shard is None else Mode("shard", parse_part(shard))
    if skip_existing and mode.kind != "whole":
        raise InvalidValueError("--skip-existing", "parts that are there are left as they are anyway", "leave it out")
    return mode


def parse_part(text: str) -> Part:
    """A part from "3/8".

    Raises:
        InvalidValueError: naming the option and the accepted form.
    """
    from posthoc_cli.synthesis.parts import Part

    match = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", text)
    if match is None:
        raise InvalidValueError(
            "--shard", "must be K/N, part K of N, such as 3/8 for the third of eight", value=text or "(empty)"
        )
    return Part(int(match[1]), int(match[2]))


def layout_of(mode: Mode, out: str | None, layout: str | None) -> str | None:
    """The layout: parts are shards in a folder.

    Raises:
        InvalidValueError: the output is a file.
    """
    if mode.kind == "whole":
        return layout
    is_file = out is not None and re.search(r"\.(safetensors|pt|pth|bin)$", out) is not None
    if layout not in (None, "sharded") or (layout is None and is_file):
        who = "several processes make" if mode.kind == "rank" else f"--{mode.kind} makes"
        what = f"--format {layout}" if layout is not None else f"--out {out}"
        raise InvalidValueError(what, f"{who} a folder of shards; name a folder", "ema export makes one file of it")
    return "sharded"


# --- what is done ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What there is to report.

    Attributes:
        plan: of all targets.
        paths: the outputs, none of which was made in a dry run.
        there: those, by index, that were there already.
        report: what --json says besides.
        text: the same in a line.
    """

    plan: Plan
    paths: list[Path]
    there: set[int]
    report: dict[str, Any]
    text: str


def run(mode: Mode, options: Options, quiet: bool, verbose: bool) -> Done | None:
    """Do what the mode says; None where another process reports it."""
    if mode.kind == "rank":
        return _run_rank(options, quiet, verbose)
    plan = options.plan()
    return (
        _finish(plan, options, quiet, verbose)
        if mode.part is None
        else _shard(plan, mode.part, options, quiet, verbose)
    )


def _shard(plan: Plan, part: Part, options: Options, quiet: bool, verbose: bool) -> Done:
    parted = options.parted(plan, part.of)
    made = parted.describe(part)
    if not options.dry_run:
        with output.progress_bar("synthesizing", made.read_bytes, quiet, verbose) as progress:
            made = parted.make(part, options.device, progress)
    report = {
        "part": part.number,
        "of": part.of,
        "bytes": made.nbytes,
        "read_bytes": made.read_bytes,
        "tensors": made.tensors,
    }
    paths = [] if options.dry_run else list(made.paths)
    return Done(plan, paths, set(made.there), {"shard": report}, _shard_text(plan, made, options.dry_run))


def _finish(plan: Plan, options: Options, quiet: bool, verbose: bool) -> Done:
    from posthoc_cli.export.parts import finish, parts_to_finish

    folders, _ = options.folders()
    count = parts_to_finish(folders, lambda count: options.parted(plan, count).plan_ids)
    total = len(plan.targets) * sum(spec.nbytes for spec in plan.specs(options.dtype))
    with output.progress_bar("verifying", total, quiet, verbose) as progress:
        finished = finish(options.parted(plan, count), True, progress, write=not options.dry_run)
    return _finished(plan, finished, options.dry_run)


def _run_rank(options: Options, quiet: bool, verbose: bool) -> Done | None:
    from posthoc_cli.export.outputs import parse_size
    from posthoc_cli.export.parts import finish, parts_for
    from posthoc_cli.synthesis.engine import worker_count
    from posthoc_cli.synthesis.parts import Part
    from posthoc_cli.synthesis.ranks import join_ranks, local_rank

    limit = parse_size(options.max_shard_size)
    finished: list[Finished] = []
    with join_ranks() as ranks:
        if ranks.rank:  # the first one speaks for all
            logging.getLogger().setLevel(logging.ERROR)
        plan = options.plan()
        count = parts_for(sum(spec.nbytes for spec in plan.specs(options.dtype)), limit, ranks.world)
        parted = options.parted(plan, count)
        own = [Part(number, count) for number in range(ranks.rank + 1, count + 1, ranks.world)]
        if options.dry_run:
            return None if ranks.rank else _shard_of_rank(plan, parted, own, ranks.world)
        ranks.begin(parted.check_space)  # of all parts, while none is there
        read = sum(parted.describe(part).read_bytes for part in own)
        with output.progress_bar("synthesizing", read, quiet or ranks.rank > 0, verbose) as advance:
            for part in own:
                parted.make(part, options.device, _checked(ranks, advance), max(1, worker_count() // local_rank()[1]))
        ranks.finish(lambda: finished.append(finish(parted, verify=False)))
    return _finished(plan, finished[0], False) if finished else None


def _checked(ranks: Ranks, advance: Callable[[int], None]) -> Callable[[int], None]:
    """Progress that also stops this process when another one has failed."""

    def progress(nbytes: int) -> None:
        ranks.check()
        advance(nbytes)

    return progress


# --- what is said ----------------------------------------------------------------------------------


def _finished(plan: Plan, finished: Finished, dry_run: bool) -> Done:
    report = {"parts": finished.parts, "bytes": finished.nbytes}
    size, where = output.size_text(finished.nbytes), finished.indexes[0]
    text = (
        f"{_targets_text(plan)}: {finished.parts} part{'s' * (finished.parts > 1)}, {size}, all there and of one plan"
    )
    if dry_run:
        return Done(plan, [], set(), {"finished": report}, f"{text}; nothing was written")
    was_there = len(finished.there) == len(finished.indexes)
    text += f"; the index is there already: {where}" if was_there else f"; wrote the index: {where}"
    return Done(plan, [path.parent for path in finished.indexes], set(finished.there), {"finished": report}, text)


def _shard_text(plan: Plan, made: MadePart, dry_run: bool) -> str:
    count = f"{made.tensors:,} tensor{'s' * (made.tensors != 1)}"
    read, size = output.size_text(made.read_bytes), output.size_text(made.nbytes)
    what = f"part {made.part} of {_targets_text(plan)}"
    if dry_run:
        return f"would make {what}: {count}, {read} to read, {size} to write; nothing was written"
    if len(made.there) == len(made.paths):
        return f"{what} is there already, whole and of this plan: {made.paths[0]}"
    return f"made {what}: {count}, {read} read, {size}: {made.paths[0]}"


def _shard_of_rank(plan: Plan, parted: PartedSynthesis, own: Sequence[Part], world: int) -> Done:
    made = [parted.describe(part) for part in own]
    read, size = sum(part.read_bytes for part in made), sum(part.nbytes for part in made)
    text = (
        f"would make {_targets_text(plan)} in {parted.parts} parts, {len(own)} in each of {world} processes; the first "
        f"would read {output.size_text(read)} and write {output.size_text(size)}; nothing was written"
    )
    return Done(plan, [], set(), {"parts": parted.parts}, text)


def _targets_text(plan: Plan) -> str:
    which = plan.targets[0].title if len(plan.targets) == 1 else f"{len(plan.targets)} averages"
    return f"{which} at t = {plan.t:,.12g} from {len(plan.sources)} snapshot{'s' * (len(plan.sources) != 1)}"
