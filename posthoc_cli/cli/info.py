"""`ema info`: what a directory or a file holds, and what is wrong with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import output
from posthoc_cli.cli.values import existing
from posthoc_cli.errors import DirectoryError

if TYPE_CHECKING:
    from posthoc_cli.reconstruction import Measurements
    from posthoc_cli.snapshots.directory import Inspection
    from posthoc_cli.snapshots.format import FileHeader
    from posthoc_cli.snapshots.outputs import OutputInfo
    from posthoc_cli.snapshots.reader import Snapshot

_LONGEST_TEXT = 200

EPILOG = "Example:  ema info run/ema   or   ema info model.safetensors --json"


def info(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE", help="Snapshots, outputs, a model in shards or its index, or a single file."
        ),
    ],
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="All coefficients of an output, and its profile error.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a directory or a file holds.

    Reads headers only. Exit code 1 when something is wrong with a directory: mixed runs, damaged headers. Every byte
    is checked by ema verify.
    """
    path = existing(path)
    report = describe_directory(path) if path.is_dir() else describe_model(path)
    if as_json:
        output.print_json(report)
    else:
        _print(report, verbose)
    if report.get("problems"):
        raise typer.Exit(1)


# --- as data ---------------------------------------------------------------------------------------


def describe_directory(path: Path) -> dict[str, Any]:
    """What a directory holds: snapshots, one in several files, a model, or outputs. The object that --json prints."""
    from posthoc_cli.snapshots.directory import inspect_directory
    from posthoc_cli.snapshots.models import is_model_folder, models_at
    from posthoc_cli.snapshots.sharded import is_sharded, read_sharded

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
    from posthoc_cli.snapshots.format import by_segment

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
    """What a file holds, or the shards of an index: the object that --json prints."""
    from posthoc_cli.snapshots.headers import file_kind
    from posthoc_cli.snapshots.models import check_alike, check_indexed, index_of, model_files
    from posthoc_cli.snapshots.outputs import decode_output
    from posthoc_cli.snapshots.reader import read_header
    from posthoc_cli.snapshots.sharded import is_sharded, read_sharded

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
    """What a file holds: the object that --json prints."""
    from posthoc_cli.snapshots.decoding import decode_snapshot
    from posthoc_cli.snapshots.headers import file_kind
    from posthoc_cli.snapshots.outputs import decode_output
    from posthoc_cli.snapshots.reader import Snapshot, read_header

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
    from posthoc_cli.snapshots.states import decode_state

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


# --- as text ---------------------------------------------------------------------------------------


def _print(report: dict[str, Any], verbose: bool) -> None:
    hidden = {"notes", "problems", "profiles", "outputs"}
    hidden |= set() if verbose or report.get("method") == "paper" else {"profile_error"}
    pairs = [(key.replace("_", " "), _text(key, value)) for key, value in report.items() if key not in hidden]
    output.print_pairs([(name, text) for name, text in pairs if text])
    if "profiles" in report:
        output.print_line("")
        _print_profiles(report["profiles"])
    if "outputs" in report:
        output.print_line("")
        _print_outputs(report["outputs"], verbose)
    if report["kind"] == "output":
        output.print_line("")
        _print_coefficients(report["snapshots"], verbose)
    for note in report.get("notes", ()):
        output.print_line(f"note: {note}")
    for problem in report.get("problems", ()):
        output.print_line(f"problem: {problem}")


def _print_profiles(profiles: list[dict[str, Any]]) -> None:
    columns = ["sigma_rel", "gamma", "snapshots", "first t", "last t", "rounding", "size"]
    rows = [
        [
            f"{p['sigma_rel']:g}",
            f"{p['gamma']:.4g}",
            str(len(p["times"])),
            f"{p['times'][0]:,.12g}",
            f"{p['times'][-1]:,.12g}",
            _range_text(p["relative_rounding"]),
            output.size_text(p["bytes"]),
        ]
        for p in profiles
    ]
    output.print_table(columns, rows)


def _print_outputs(outputs: list[dict[str, Any]], verbose: bool) -> None:
    shown = outputs if verbose else outputs[: output.MOST_ROWS]
    rows = [
        [
            Path(report["path"]).name,
            _cut(report.get("profile", report["kind"])),
            f"{report['t']:,.12g}" if "t" in report else "",
            output.percent(report["predicted_error"]) if "predicted_error" in report else "",
            output.size_text(report["bytes"]),
        ]
        for report in shown
    ]
    output.print_table(["output", "profile", "t", "predicted error", "size"], rows, left=["output", "profile"])
    _print_rest(len(outputs) - len(shown))


def _print_coefficients(snapshots: list[dict[str, Any]], verbose: bool) -> None:
    """Those of the largest size, as they lie in the output."""
    order = sorted(range(len(snapshots)), key=lambda index: -abs(snapshots[index]["coefficient"]))
    shown = sorted(order[: len(order) if verbose else output.MOST_ROWS])
    rows = [[_cut(snapshots[index]["file"]), _coefficient(snapshots[index]["coefficient"])] for index in shown]
    output.print_table(["snapshot", "coefficient"], rows, left=["snapshot"])
    _print_rest(len(order) - len(shown), " with smaller coefficients")


def _print_rest(count: int, what: str = "") -> None:
    if count:
        output.print_line(f"and {count:,} more{what}; --verbose lists them")


def _range_text(ends: list[float] | None) -> str:
    if ends is None:
        return "unknown"
    low, high = map(output.percent, ends)
    return low if low == high else f"{low} to {high}"


def _text(key: str, value: Any) -> str:
    if key == "bytes":
        return output.size_text(value)
    if key == "measured":
        return f"{value:,} of them" if value else "none of them: errors are predicted from a sample"
    if key == "snapshots" and isinstance(value, list):
        return f"{len(value):,}"
    if key in ("profile_error", "predicted_error", "relative_rounding"):
        return output.percent(value)
    if key == "norm":
        return f"{value:.4g}"
    if key in ("sigma_rel", "gamma") and value is None:
        return ""  # of a profile that is no power function
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    if isinstance(value, float):
        return f"{value:,.12g}"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if key == "path" else _cut(str(value))


def _coefficient(value: float) -> str:
    return f"{value:+.6f}" if abs(value) < 1e6 else f"{value:+.6g}"


def _cut(text: str) -> str:
    """A text from a file, of a length that fits a few lines."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 3]}..."


COMMAND = info
