"""Describe a path from headers alone: a snapshot directory, a snapshot, an output, a state, or another model.

Each description is a dict for JSON that begins with its kind: "directory", "snapshot", "output", "outputs", "state"
or "safetensors".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.directory import Inspection, inspect_directory
from posthoc_cli.snapshots.format import FileHeader, by_segment
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.outputs import (
    OutputInfo,
    check_alike,
    check_indexed,
    decode_output,
    index_of,
    is_model_folder,
    model_files,
    models_at,
)
from posthoc_cli.snapshots.reader import Snapshot, read_header
from posthoc_cli.snapshots.states import decode_state

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
    found = inspect_directory(path)
    if found.snapshots or found.problems:
        return _describe_directory(found)
    models = [describe_model(model) for model in models_at(path)]
    return models[0] if is_model_folder(path) else {"kind": "outputs", "path": str(path), "outputs": models}


def describe_model(path: Path) -> Description:
    """Describe a file, or a model in shards. Errors as in `describe`."""
    headers: dict[Path, FileHeader] = {}
    for file, names in model_files(path).items():
        headers[file] = read_header(file)
        check_indexed(file, headers[file], names)
    if index_of(path) is None:
        ((path, header),) = headers.items()
        if file_kind(header) == "snapshot":
            return _describe_snapshot(Snapshot(path, header, decode_snapshot(path, header)))
        if file_kind(header) == "state":
            return _describe_state(path, header)
    outputs = [decode_output(file, header) for file, header in headers.items() if file_kind(header) == "output"]
    if not outputs or len(outputs) < len(headers):
        return {"kind": "safetensors", "path": str(path), **_sizes(headers.values())}
    first = next(iter(headers))
    for file, output in zip(headers, outputs, strict=True):
        check_alike(first, outputs[0], file, output)
    return _describe_output(path, outputs[0], [*headers.values()])


def _describe_directory(found: Inspection) -> Description:
    return {
        "kind": "directory",
        "path": str(found.listing.path),
        **(_describe_run(found.snapshots) if found.snapshots else {}),
        "superseded": found.superseded,
        "leftovers": [leftover.name for leftover in found.listing.leftovers],
        "notes": list(found.notes),
        "problems": [str(problem) for problem in found.problems],
    }


def _describe_run(snapshots: Sequence[Snapshot]) -> Description:
    newest = snapshots[-1]
    runs = sorted({snapshot.info.run_id for snapshot in snapshots})
    profiles: dict[float, list[Snapshot]] = {}
    for snapshot in snapshots:
        profiles.setdefault(snapshot.info.sigma_rel, []).append(snapshot)
    return {
        "run": runs[0] if len(runs) == 1 else runs,
        "t_unit": newest.info.t_unit,
        "t": newest.info.t,
        "step": newest.info.step,
        "schedule": dict(vars(newest.info.schedule)),
        **_describe_tensors(newest),
        "snapshots": len(snapshots),
        **({"segments": len(by_segment(snapshots))} if newest.info.segment else {}),
        "measured": sum(snapshot.info.measurements is not None for snapshot in snapshots),
        "bytes": sum(snapshot.header.file_bytes for snapshot in snapshots),
        "profiles": [_describe_profile(sigma_rel, group) for sigma_rel, group in sorted(profiles.items())],
    }


def _describe_profile(sigma_rel: float, group: Sequence[Snapshot]) -> Description:
    roundings = [_relative_rounding(snapshot.info.measurements) for snapshot in group]
    known = [error for error in roundings if error is not None]
    return {
        "sigma_rel": sigma_rel,
        "gamma": group[0].info.gamma,
        "times": [snapshot.info.t for snapshot in group],
        "t_first": group[-1].info.t_first,
        "max_interval": group[-1].info.max_interval,
        "relative_rounding": [min(known), max(known)] if known else None,
        "bytes": sum(snapshot.header.file_bytes for snapshot in group),
    }


def _relative_rounding(measured: Measurements | None) -> float | None:
    """The rounding error of a stored copy relative to its norm; None if unknown."""
    if measured is None or not measured.norm > 0:
        return None
    return math.sqrt(measured.rounding / measured.norm)


def _describe_snapshot(snapshot: Snapshot) -> Description:
    info, measured = snapshot.info, snapshot.info.measurements
    return {
        "kind": "snapshot",
        "path": str(snapshot.path),
        "run": info.run_id,
        "sigma_rel": info.sigma_rel,
        "gamma": info.gamma,
        "t": info.t,
        "t_unit": info.t_unit,
        "step": info.step,
        "off_schedule": info.off_schedule,
        "t_first": info.t_first,
        "max_interval": info.max_interval,
        "schedule": dict(vars(info.schedule)),
        "measurements": None
        if measured is None
        else {
            "norm": math.sqrt(measured.norm),
            "relative_rounding": _relative_rounding(measured),
            "distances": len(measured.distances),
        },
        **_describe_tensors(snapshot),
        "bytes": snapshot.header.file_bytes,
    }


def _describe_output(path: Path, info: OutputInfo, headers: Sequence[FileHeader]) -> Description:
    return {
        "kind": "output",
        "path": str(path),
        "run": info.run_id,
        "profile": info.profile,
        "sigma_rel": info.sigma_rel,
        "gamma": info.gamma,
        "t": info.t,
        "t_unit": info.t_unit,
        "method": info.method,
        "profile_error": info.profile_error,
        "predicted_error": info.predicted_error,
        "snapshots": [{"file": file, "coefficient": coefficient} for file, coefficient in info.snapshots],
        **_sizes(headers),
    }


def _describe_state(path: Path, header: FileHeader) -> Description:
    """`t` and `step` are those of the last call."""
    info = decode_state(path, header)
    return {
        "kind": "state",
        "path": str(path),
        "run": info.run_id,
        "t": info.t,
        "t_unit": info.t_unit,
        "step": info.step,
        "sigma_rels": list(info.sigma_rels),
        "averages_t": info.averages_t,
        "t_first": info.t_first,
        "max_interval": info.max_interval,
        "schedule": dict(vars(info.schedule)),
        "known_snapshots": len(info.snapshots),
        **_sizes([header]),
    }


def _describe_tensors(snapshot: Snapshot) -> Description:
    roles = [tensor.role for tensor in snapshot.info.tensors.values()]
    return {
        **_counts([snapshot.header]),
        "averaged": roles.count("average"),
        "copied": roles.count("copy"),
        "aliases": len(snapshot.info.aliases),
        "left_out": list(snapshot.info.left_out),
        "model_dtypes": sorted({t.dtype for t in snapshot.info.tensors.values() if t.role == "average"}),
    }


def _sizes(headers: Iterable[FileHeader]) -> Description:
    listed = [*headers]
    return _counts(listed) | {"bytes": sum(header.file_bytes for header in listed)}


def _counts(headers: Sequence[FileHeader]) -> Description:
    dtypes: dict[str, int] = {}
    for entry in (entry for header in headers for entry in header.tensors.values()):
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + math.prod(entry.shape)
    return {
        **({"files": len(headers)} if len(headers) > 1 else {}),
        "tensors": sum(len(header.tensors) for header in headers),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(sorted(dtypes.items())),
    }
