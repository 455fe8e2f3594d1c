"""What a directory or a file holds, from headers alone: dictionaries that JSON can hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from posthoc_cli.errors import DirectoryError
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.directory import Inspection, inspect_directory
from posthoc_cli.snapshots.format import FileHeader, by_segment
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.models import check_alike, check_indexed, index_of, is_model_folder, model_files, models_at
from posthoc_cli.snapshots.outputs import OutputInfo, decode_output
from posthoc_cli.snapshots.reader import Snapshot, read_header
from posthoc_cli.snapshots.sharded import is_sharded, read_sharded
from posthoc_cli.snapshots.states import decode_state


def describe(path: Path) -> dict[str, Any]:
    """What a path holds: snapshots of a run, an output, a state, a model in one file or several, or such files.

    The keys "problems" and "notes" of a directory list what is wrong, and what is only unusual. Every other key is
    a property of the run, the snapshot, the output or the state; sizes are in bytes, errors relative.

    Raises:
        FileFormatError, MismatchError: a file is damaged, or shards do not belong together.
        DirectoryError: a directory holds nothing of the kind.
    """
    return describe_directory(path) if path.is_dir() else describe_model(path)


def describe_directory(path: Path) -> dict[str, Any]:
    """What a directory holds: snapshots, a model, or outputs."""
    sharded = read_sharded(path) if is_sharded(path) else None
    if sharded is not None:
        return _describe_snapshot(sharded)
    try:
        found = inspect_directory(path)
    except DirectoryError:  # no snapshots
        models = [describe_model(model) for model in models_at(path)]
        return models[0] if is_model_folder(path) else {"kind": "outputs", "path": str(path), "outputs": models}
    report: dict[str, Any] = {"kind": "directory", "path": str(path)}
    if found.snapshots:
        report |= _describe_run(found)
    report["superseded"] = found.superseded
    report["leftovers"] = [leftover.name for leftover in found.leftovers]
    report["notes"] = list(found.notes)
    report["problems"] = list(found.problems)
    return report


def _describe_run(found: Inspection) -> dict[str, Any]:

    newest = found.snapshots[-1]
    runs = sorted({snapshot.info.run_id for snapshot in found.snapshots})
    profiles: dict[float, list[Snapshot]] = {}
    for snapshot in found.snapshots:
        profiles.setdefault(snapshot.info.sigma_rel, []).append(snapshot)
    return {
        "run": runs[0] if len(runs) == 1 else runs,
        "t_unit": newest.info.t_unit,
        "t": newest.info.t,
        "step": newest.info.step,
        "schedule": dict(vars(newest.info.schedule)),
        **_describe_tensors(newest),
        "snapshots": len(found.snapshots),
        **({"segments": len(by_segment(found.snapshots))} if newest.info.segment else {}),
        "measured": sum(snapshot.info.measurements is not None for snapshot in found.snapshots),
        "bytes": sum(snapshot.header.file_bytes for snapshot in found.snapshots),
        "profiles": [_describe_profile(sigma_rel, group) for sigma_rel, group in sorted(profiles.items())],
    }


def _describe_profile(sigma_rel: float, group: list[Snapshot]) -> dict[str, Any]:
    return {
        "sigma_rel": sigma_rel,
        "gamma": group[0].info.gamma,
        "times": [snapshot.info.t for snapshot in group],
        "t_first": group[-1].info.t_first,
        "max_interval": group[-1].info.max_interval,
        "relative_rounding": _rounding_range(group),
        "bytes": sum(snapshot.header.file_bytes for snapshot in group),
    }


def _rounding_range(group: list[Snapshot]) -> list[float] | None:
    """The least and the largest rounding error of a stored copy, relative to its norm; None where none is known."""
    found = [_relative_rounding(snapshot.info.measurements) for snapshot in group]
    known = [error for error in found if error is not None]
    return [min(known), max(known)] if known else None


def _relative_rounding(measured: Measurements | None) -> float | None:
    if measured is None or not measured.norm > 0:
        return None
    return math.sqrt(measured.rounding / measured.norm)


def describe_model(path: Path) -> dict[str, Any]:
    """What a file holds, or the shards of an index."""
    index = index_of(path)
    if index is None:
        return describe_file(next(iter(model_files(path))))
    sharded = read_sharded(index.parent) if is_sharded(index.parent) else None
    if sharded is not None:
        return _describe_snapshot(sharded)
    headers = {}
    for file, names in model_files(path).items():
        headers[file] = read_header(file)
        check_indexed(file, headers[file], names)
    outputs = [decode_output(file, header) for file, header in headers.items() if file_kind(header) == "output"]
    if len(outputs) < len(headers):
        size = sum(header.file_bytes for header in headers.values())
        return {"kind": "safetensors", "path": str(path), **_counts(*headers.values()), "bytes": size}
    first = next(iter(headers))
    for file, found in zip(headers, outputs, strict=True):
        check_alike(first, outputs[0], file, found)
    return _describe_output(path, outputs[0], *headers.values())


def describe_file(path: Path) -> dict[str, Any]:
    """What a file holds."""
    header = read_header(path)
    kind = file_kind(header)
    if kind == "output":
        return _describe_output(path, decode_output(path, header), header)
    if kind == "snapshot":
        return _describe_snapshot(Snapshot(path, header, decode_snapshot(path, header)))
    if kind == "state":
        return _describe_state(path, header)
    return {"kind": "safetensors", "path": str(path), **_counts(header), "bytes": header.file_bytes}


def _describe_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    info = snapshot.info
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
        "measurements": _describe_measurements(info.measurements),
        **_describe_tensors(snapshot),
        "bytes": snapshot.header.file_bytes,
    }


def _describe_measurements(measured: Measurements | None) -> dict[str, Any] | None:
    """`norm` is the L2 norm of the average, `relative_rounding` that of the stored copy's error, relative to it."""
    if measured is None:
        return None
    return {
        "norm": math.sqrt(measured.norm),
        "relative_rounding": _relative_rounding(measured),
        "distances": len(measured.distances),
    }


def _describe_output(path: Path, info: OutputInfo, *headers: FileHeader) -> dict[str, Any]:
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
        "snapshots": [{"file": file, "coefficient": c} for file, c in info.snapshots],
        **_counts(*headers),
        "bytes": sum(header.file_bytes for header in headers),
    }


def _describe_state(path: Path, header: FileHeader) -> dict[str, Any]:
    """A tracker's state, which is no snapshot; `t` and `step` are those of the last call."""

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
        **_counts(header),
        "bytes": header.file_bytes,
    }


def _describe_tensors(snapshot: Snapshot) -> dict[str, Any]:
    tensors = snapshot.info.tensors
    own = sorted({tensor.dtype for tensor in tensors.values() if tensor.role == "average"})
    return {
        **_counts(snapshot.header),
        "averaged": sum(tensor.role == "average" for tensor in tensors.values()),
        "copied": sum(tensor.role == "copy" for tensor in tensors.values()),
        "aliases": len(snapshot.info.aliases),
        "left_out": list(snapshot.info.left_out),
        "model_dtypes": own,
    }


def _counts(*headers: FileHeader) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for entry in (entry for header in headers for entry in header.tensors.values()):
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + math.prod(entry.shape)
    return {
        **({"files": len(headers)} if len(headers) > 1 else {}),
        "tensors": sum(len(header.tensors) for header in headers),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(sorted(dtypes.items())),
    }
