"""`ema synthesize` in parts: --shard, --finish, and the processes of a torchrun job. Parses and prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posthoc_cli.cli import output
from posthoc_cli.errors import InvalidValueError

if TYPE_CHECKING:
    from posthoc_cli.export.job import Shares, SynthesisReport
    from posthoc_cli.export.parts import Finished, MadePart, Part
    from posthoc_cli.synthesis.plan import Plan


@dataclass(frozen=True)
class Mode:
    """How much of a synthesis this process makes: "whole", "shard" (the `part`), "finish", or "rank"."""

    kind: str
    part: Part | None = None


# --- what was asked for ----------------------------------------------------------------------------


def parse_mode(shard: str | None, finish: bool, skip_existing: bool) -> Mode:
    """How much of the synthesis this process is to make.

    Raises:
        InvalidValueError: naming the option.
    """
    from posthoc_cli.export.ranks import is_rank

    if shard is not None and finish:
        raise InvalidValueError("--shard and --finish", "give one of them; --finish comes when all parts are made")
    if shard is None and not finish:
        mode = Mode("rank" if is_rank() else "whole")
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
    from posthoc_cli.export.parts import Part

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


# --- what is said ----------------------------------------------------------------------------------


def text(report: SynthesisReport, dry_run: bool) -> str:
    """The report of a synthesis in parts, in a line."""
    from posthoc_cli.export.parts import Finished, MadePart

    made = report.parts
    if isinstance(made, MadePart):
        return _shard_text(report.plan, made, dry_run)
    if isinstance(made, Finished):
        return _finished_text(report.plan, made, dry_run)
    assert made is not None
    return _shares_text(report.plan, made)


def _finished_text(plan: Plan, finished: Finished, dry_run: bool) -> str:
    size, where = output.size_text(finished.nbytes), finished.indexes[0]
    text = (
        f"{_targets_text(plan)}: {finished.parts} part{'s' * (finished.parts > 1)}, {size}, all there and of one plan"
    )
    if dry_run:
        return f"{text}; nothing was written"
    was_there = len(finished.there) == len(finished.indexes)
    return text + (f"; the index is there already: {where}" if was_there else f"; wrote the index: {where}")


def _shard_text(plan: Plan, made: MadePart, dry_run: bool) -> str:
    count = f"{made.tensors:,} tensor{'s' * (made.tensors != 1)}"
    read, size = output.size_text(made.read_bytes), output.size_text(made.nbytes)
    what = f"part {made.part} of {_targets_text(plan)}"
    if dry_run:
        return f"would make {what}: {count}, {read} to read, {size} to write; nothing was written"
    if len(made.there) == len(made.paths):
        return f"{what} is there already, whole and of this plan: {made.paths[0]}"
    return f"made {what}: {count}, {read} read, {size}: {made.paths[0]}"


def _shares_text(plan: Plan, shares: Shares) -> str:
    read, size = sum(part.read_bytes for part in shares.own), sum(part.nbytes for part in shares.own)
    return (
        f"would make {_targets_text(plan)} in {shares.parts} parts, {len(shares.own)} in each of {shares.processes} "
        f"processes; the first would read {output.size_text(read)} and write {output.size_text(size)}; "
        "nothing was written"
    )


def _targets_text(plan: Plan) -> str:
    which = plan.targets[0].title if len(plan.targets) == 1 else f"{len(plan.targets)} averages"
    return f"{which} at t = {plan.t:,.12g} from {len(plan.sources)} snapshot{'s' * (len(plan.sources) != 1)}"
