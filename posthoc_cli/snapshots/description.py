"""Describe a path from headers alone, as a dict for JSON that begins with its kind.

Kinds are "directory", "snapshot", "output", "outputs", "state" and "safetensors".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from posthoc_cli.errors import FileFormatError
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots import outputs as models
from posthoc_cli.snapshots.directory import inspect_directory, is_parts_folder, read_snapshot
from posthoc_cli.snapshots.format import FileHeader
from posthoc_cli.snapshots.headers import decode_snapshot, file_kind
from posthoc_cli.snapshots.outputs import check_alike, check_indexed, decode_output
from posthoc_cli.snapshots.selection import statistics_notice
from posthoc_cli.snapshots.sources import FileSource, Snapshot
from posthoc_cli.snapshots.states import StoredState, decode_state
from posthoc_cli.snapshots.tensor_file import read_header

Description = dict[str, Any]


def describe(path: Path) -> Description:
    """Describe a directory or a file.

    Raises:
        DirectoryError: a directory without snapshots, outputs or models.
        FileFormatError: a file is damaged; in a snapshot directory it is one of the "problems" instead.
        MismatchError: shards are of different models.
    """
    if not path.is_dir():
        return describe_model(path)
    if is_parts_folder(path):
        return _describe_snapshot(read_snapshot(path))
    found = inspect_directory(path)
    if found.snapshots or found.problems or found.incomplete:
        return {
            "kind": "directory",
            "path": str(path),
            **(_describe_run(found.snapshots) if found.snapshots else {}),
            "superseded": found.superseded,
            "leftovers": [leftover.name for leftover in (*found.listing.leftovers, *found.incomplete)],
            "notes": [*found.notes, *_notes(found.snapshots[-1].info.copies if found.snapshots else ())],
            "problems": [str(problem) for problem in found.problems],
        }
    described = [describe_model(model) for model in models.models_at(path)]
    if models.is_model_folder(path):
        return described[0]
    return {"kind": "outputs", "path": str(path), "outputs": described}


def describe_model(path: Path) -> Description:
    """Describe a file, or a model in shards. Errors as in `describe`."""
    headers: dict[Path, FileHeader] = {}
    for file, names in models.model_files(path).items():
        headers[file] = read_header(file)
        check_indexed(file, headers[file], names)
    if not headers:
        raise FileFormatError(path, "is an index that names no file")
    first, header = next(iter(headers.items()))
    is_sharded, kinds = models.index_of(path) is not None, {file_kind(one) for one in headers.values()}
    path = path if is_sharded else first
    if kinds == {"snapshot"} and not is_sharded:
        return _describe_snapshot(Snapshot(first, header, decode_snapshot(first, header)))
    if kinds == {"state"} and not is_sharded:
        return _describe_state(StoredState(first, header, decode_state(first, header)))
    if kinds != {"output"}:
        return {"kind": "safetensors", "path": str(path), **_sizes(headers.values())}
    outputs = {file: decode_output(file, one) for file, one in headers.items()}
    for file, output in outputs.items():
        check_alike(first, outputs[first], file, output)
    fields = "profile sigma_rel gamma t t_unit method profile_error predicted_error"
    return {
        **_values("output", path, outputs[first], fields),
        "snapshots": [{"file": file, "coefficient": coefficient} for file, coefficient in outputs[first].snapshots],
        **_sizes(headers.values()),
        "notes": _notes(name for one in outputs.values() for name in one.copies),
    }


def _describe_state(state: StoredState) -> Description:
    fields = "t t_unit step sigma_rels averages_t t_first max_interval"
    return {
        **_values("state", state.path, state.info, fields),
        "sigma_rels": list(state.info.sigma_rels),
        "schedule": vars(state.info.schedule),
        "known_snapshots": len(state.info.snapshots),
        **_sizes([state.header]),
    }


def _describe_run(snapshots: Sequence[Snapshot]) -> Description:
    newest = snapshots[-1].info
    runs = sorted({snapshot.info.run_id for snapshot in snapshots})
    widths = sorted({snapshot.info.sigma_rel for snapshot in snapshots})
    return {
        "run": runs[0] if len(runs) == 1 else runs,
        "t_unit": newest.t_unit,
        "t": newest.t,
        "step": newest.step,
        "schedule": vars(newest.schedule),
        **describe_tensors(snapshots[-1]),
        "snapshots": [
            {"file": one.path.name, "t": one.info.t, "step": one.info.step, "sigma_rel": one.info.sigma_rel}
            for one in snapshots
        ],
        **_describe_parts(snapshots[-1]),
        "measured": sum(snapshot.info.measurements is not None for snapshot in snapshots),
        "bytes": sum(snapshot.header.file_bytes for snapshot in snapshots),
        "profiles": [_describe_profile([s for s in snapshots if s.info.sigma_rel == width]) for width in widths],
    }


def _describe_profile(own: Sequence[Snapshot]) -> Description:
    roundings = [_relative_rounding(snapshot.info.measurements) for snapshot in own]
    known = [error for error in roundings if error is not None]
    return {
        "sigma_rel": own[0].info.sigma_rel,
        "gamma": own[0].info.gamma,
        "times": [snapshot.info.t for snapshot in own],
        "t_first": own[-1].info.t_first,
        "max_interval": own[-1].info.max_interval,
        "relative_rounding_range": [min(known), max(known)] if known else None,
        "bytes": sum(snapshot.header.file_bytes for snapshot in own),
    }


def _relative_rounding(measured: Measurements | None) -> float | None:
    """The rounding error of a stored copy relative to its norm; None if unknown."""
    return math.sqrt(measured.rounding / measured.norm) if measured is not None and measured.norm > 0 else None


def _describe_snapshot(snapshot: Snapshot) -> Description:
    info, measured = snapshot.info, snapshot.info.measurements
    measurements = measured and {
        "norm": math.sqrt(measured.norm),
        "relative_rounding": _relative_rounding(measured),
        "distances": len(measured.distances),
    }
    fields = "sigma_rel gamma t t_unit step off_schedule t_first max_interval"
    return {
        **_values("snapshot", snapshot.path, info, fields),
        "schedule": vars(info.schedule),
        "measurements": measurements,
        **_describe_parts(snapshot),
        **describe_tensors(snapshot),
        "bytes": snapshot.header.file_bytes,
    }


def _describe_parts(snapshot: Snapshot) -> Description:
    info = snapshot.info
    count = {"part": "{}/{}".format(*info.part)} if info.part else {"parts": len(snapshot.parts)}
    return {**count, **({"mesh": info.mesh} if info.mesh else {})} if info.part or snapshot.parts else {}


def _values(kind: str, path: Path, info: Any, fields: str) -> Description:
    own = {name: getattr(info, name) for name in fields.split()}
    return {"kind": kind, "path": str(path), "run": info.run_id, **own}


def describe_tensors(snapshot: FileSource) -> Description:
    """What tensors there are, of which role and dtypes."""
    info = snapshot.info
    copied = len(info.copies)
    return {
        **_counts([snapshot.header]),
        "averaged": len(info.tensors) - copied,
        "copied": copied,
        "aliases": len(info.aliases),
        "left_out": list(info.left_out),
        "model_dtypes": sorted({info.tensors[name].dtype for name in info.averages}),
        "notes": _notes(info.copies),
    }


def _notes(copies: Iterable[str]) -> list[str]:
    notice = statistics_notice(copies)
    return [] if notice is None else [notice]


def _sizes(headers: Collection[FileHeader]) -> Description:
    return {**_counts(headers), "bytes": sum(header.file_bytes for header in headers)}


def _counts(headers: Collection[FileHeader]) -> Description:
    dtypes: Counter[str] = Counter()
    for entry in (entry for header in headers for entry in header.tensors.values()):
        dtypes[entry.dtype] += math.prod(entry.shape)
    return {
        **({"shards": len(headers)} if len(headers) > 1 else {}),
        "tensors": sum(len(header.tensors) for header in headers),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(sorted(dtypes.items())),
    }
