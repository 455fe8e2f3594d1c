"""What `ema info` says about checkpoints of other programs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from posthoc_cli.checkpoints.content import Content, Values
from posthoc_cli.checkpoints.layouts import recognise
from posthoc_cli.checkpoints.manifest import read_manifest
from posthoc_cli.checkpoints.open_run import find
from posthoc_cli.checkpoints.places import Place
from posthoc_cli.checkpoints.sets import TensorSets
from posthoc_cli.checkpoints.settings import UNSPECIFIED
from posthoc_cli.checkpoints.source import Checkpoint, make_checkpoint
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    PostHocError,
    count_noun,
    list_first,
)
from posthoc_cli.snapshots.directory import is_import
from posthoc_cli.snapshots.outputs import describe, describe_tensors
from posthoc_cli.snapshots.sources import Sources, count_files
from posthoc_cli.targets import SHORTEST_BETA, Beta, SigmaRel, name_equal_length


def describe_checkpoints(place: Path) -> Values:
    """Describe the checkpoints of other programs at a place, or an import, as a dict for JSON;
    values are read only to find a decay."""
    try:
        return _describe_run(place, _find(place))
    except PostHocError as error:
        if is_import(place):
            raise
        with suppress(PostHocError):
            # outputs, or a model of another program that is not a checkpoint
            described = describe(place)
            kinds = {item["kind"] for item in described.get("outputs", ())}
            if kinds <= {"output"}:
                return described
        return _describe_files(place, error)


def _find(place: Path) -> Sources:
    """Find the run at a place, with the decay that its files show; if they leave the decay open,
    with a note about it. Raise the error that an import raises."""
    try:
        return find(place)
    except InvalidValueError as error:
        try:
            sources = find(place, settle=False)
        except PostHocError:
            raise error from None
        note = f"cannot be used as it is: {error}"
        return replace(sources, notes=(*sources.notes, note))


def _describe_run(place: Path, sources: Sources) -> Values:
    checkpoints = [source for source in sources if isinstance(source, Checkpoint)]
    rows = list[Values]()
    for checkpoint in checkpoints:
        row = {
            "file": checkpoint.name,
            "t": checkpoint.t,
            "holds": checkpoint.holds,
            "as": _other_name(checkpoint),
            "bytes": checkpoint.file_bytes,
            "identity": checkpoint.identity,
        }
        rows.append(row)
    described = {
        "kind": "checkpoints",
        "path": str(place),
        "run": sources.run_id,
        "t_unit": sources.t_unit,
        "t": sources.t,
        "step": sources.step,
        "numbers": sources.numbers,
        "number_of_checkpoints": count_files(checkpoints),
        **describe_tensors(sources.newest),
        "bytes": sum(row["bytes"] for row in rows),
        "checkpoints": rows,
        "notes": [*sources.notes, *sources.notices],
    }
    if is_import(place):
        manifest = read_manifest(place)
        described["refers_to"] = str(manifest.origin)
        described["files"] = len(manifest.files)
        described["settings"] = sources.settings
    return described


def _other_name(checkpoint: Checkpoint) -> str | None:
    """Return the sigma_rel that is as long as an EMA, or the EMA that is as long as a sigma_rel."""
    steps = checkpoint.step if checkpoint.has_step_unit else None
    if checkpoint.decay >= SHORTEST_BETA:
        return name_equal_length(Beta(checkpoint.decay), steps)
    if checkpoint.sigma_rel:
        return name_equal_length(SigmaRel(checkpoint.sigma_rel), steps)
    return None


def _describe_files(place: Path, error: PostHocError) -> Values:
    """Describe what files hold that need an import, for JSON, and what the import would have to be
    told; raise the error that says so if none can be opened."""
    opener = Place(place)
    rows: list[Values] = []
    opened = []
    for path in opener.candidates:
        try:
            content = opener.open(path)
        except FileFormatError as wrong:
            rows.append({"file": path.name, "holds": wrong.reason})
            continue
        opened.append(content)
        holds = _describe_content(content)
        rows.append({"file": path.name, "holds": holds, "bytes": content.nbytes})
    own = [content for content in opened if _is_own(content)]
    is_lone = len(rows) == 1 and place.is_file()
    if not opened or (is_lone and not own and not opened[0].tensors):
        raise error
    described: Values = {"kind": "checkpoints", "path": str(place), "checkpoints": rows}
    if len(rows) == 1:
        described["kind"] = "checkpoint"
        with suppress(FileFormatError, InvalidValueError):
            tensors = recognise(opened[0], UNSPECIFIED).tensors
            checkpoint = make_checkpoint(opened[0], tensors)
            described |= {**describe_tensors(checkpoint), "bytes": checkpoint.file_bytes}
    described["notes"] = opener.tracker_notes
    if isinstance(error, InvalidValueError):
        described["notes"].append(f"cannot be used as it is: {error}")
    elif len(own) < len(rows):
        described["problems"] = [str(error)]
    return described


def _is_own(content: Content) -> bool:
    """Return whether this package wrote all of a file: an output, or the state of a tracker."""
    return content.mark is not None or (bool(content.trackers) and not content.tensors)


def _describe_content(content: Content) -> str:
    if content.mark is not None:
        return str(content.mark)
    return "the state of a tracker" if _is_own(content) else _sets_in(content)


def _sets_in(content: Content) -> str:
    """List the keys of the sets of tensors in a checkpoint, with their numbers of tensors."""
    sets = TensorSets(content)
    named = []
    for key in sets.keys:
        count = sets.counts[key]
        if count > 1:
            named.append(f"{key} ({count})")
    return list_first(named, 4) or count_noun(len(content.tensors), "tensor")
