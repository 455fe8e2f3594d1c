"""Shards and their index: each shard as a file, and all of them against the index and each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots.index import INDEX_NAME, decode_index
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.sharded import read_sharded
from posthoc_cli.snapshots.verification.contents import Unit
from posthoc_cli.snapshots.verification.reading import Content, Progress, ReadFile, read_file, report_of, shortened
from posthoc_cli.snapshots.verification.reports import (
    DAMAGED,
    MISMATCHED,
    MISSING,
    UNCHECKED,
    Examined,
    FileReport,
    Problem,
    problem_of,
)

_OF_ONE_OUTPUT = ("ema.run_id", "ema.profile", "ema.t", "ema.t_unit", "ema.method", "ema.plan")
"""What the shards of one output agree about. Not coefficients, which other processors round otherwise."""


def read_shards(unit: Unit, index: Path, progress: Progress) -> Examined:
    """Read all shards of an index; nothing is said where all have gone since they were listed.

    Arguments:
        unit: the shards.
        index: theirs.
        progress: told the bytes that were read.
    """
    found = {path: read_file(path, unit.path, progress) for path in unit.files}
    if files.is_gone(index):
        return Examined(())
    there = [file for file in found.values() if file is not None]
    kinds = {file.content.kind for file in there if file.header is not None}
    what = next((file.content.model for file in there if file.content.model), "")
    of = f" of {what}" if what else ""
    reports = [_report_of_shard(path, file, unit, index, f"shard{of}") for path, file in found.items()]
    snapshot, problem = _together(unit, index, there)
    if problem is not None and problem.state == MISMATCHED and not all(report.is_fine for report in reports):
        problem = None  # the cause has a line of its own
    if problem is None and kinds <= {None}:
        problem = Problem(UNCHECKED, "")
    first = there[0].content if there else Content("", None)
    content = Content(f"index{of}", first.kind, run_id=first.run_id)
    return Examined((report_of(index, unit.path, content, problem), *reports), snapshot)


def _report_of_shard(path: Path, file: ReadFile | None, unit: Unit, index: Path, what: str) -> FileReport:
    if file is None:
        return FileReport(path, unit.path, what, None, MISSING, f"{index.name} names it")
    report = file.report if file.content.kind is None else replace(file.report, what=what)
    named = set((unit.tensors or {})[path.name])
    if file.header is None or not report.is_fine or named == file.header.tensors.keys():
        return report
    missing = named - file.header.tensors.keys()
    detail = (
        f"tensor {shown(min(missing))} is not in it, as {index.name} says"
        if missing
        else f"tensor {shown(min(file.header.tensors.keys() - named))} is in it, and not in {index.name}"
    )
    return replace(report, state=MISMATCHED, detail=detail)


def _together(unit: Unit, index: Path, there: Sequence[ReadFile]) -> tuple[Snapshot | None, Problem | None]:
    """The snapshot that the shards are, where they are one, and what is wrong with all of them together."""
    if unit.problem is not None:
        return None, problem_of(unit.problem, index)
    if not unit.tensors:
        return None, Problem(DAMAGED, "names no shard")
    kinds = {file.content.kind for file in there if file.header is not None}
    if len(there) < len(unit.files) or any(file.header is None for file in there):
        return None, None
    problem = _difference(there) or _wrong_size(index, there)
    snapshot = None
    if problem is None and kinds == {"snapshot"} and index.name == INDEX_NAME:
        try:
            snapshot = read_sharded(unit.path)
        except FileFormatError as error:
            problem = Problem(MISMATCHED, str(error).replace(f"{unit.path}{os.sep}", ""))
    return snapshot, problem


def _difference(there: Sequence[ReadFile]) -> Problem | None:
    """What tells two shards apart that should be of one model."""
    first = there[0]
    for other in there[1:]:
        names = f"{first.report.path.name} and {other.report.path.name}"
        if first.content.kind != other.content.kind:
            return Problem(MISMATCHED, f"{names} are not of one model: {first.content.what}, and {other.content.what}")
        if first.content.kind != "output" or first.header is None or other.header is None:
            continue
        for key in _OF_ONE_OUTPUT:
            values = [shortened(str(file.header.metadata.get(key))) for file in (first, other) if file.header]
            if values[0] != values[1]:
                return Problem(
                    MISMATCHED, f"{names} are not of one output: their {key} are {values[0]} and {values[1]}"
                )
    return None


def _wrong_size(index: Path, there: Sequence[ReadFile]) -> Problem | None:
    """An index has no checksum: what nothing else tells is compared with the shards. Other libraries' may be off."""
    held = sum(entry.nbytes for file in there if file.header for entry in file.header.tensors.values())
    try:
        said = decode_index(index).total_size
    except FileFormatError as error:
        return problem_of(error, index)
    if said == held or all(file.content.kind is None for file in there):
        return None
    told = "missing" if said is None else f"{said:,}" if abs(said) < 2**63 else shown(said)
    return Problem(DAMAGED, f"its total_size is {told}; the shards hold {held:,} bytes")
