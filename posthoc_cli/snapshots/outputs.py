"""Outputs, and models on disk: a safetensors file, shards with an index, or a folder of either; folders of several.

The metadata of an output is specified in `snapshots.format`. The index of a sharded model is a JSON file as the Hugging
Face libraries define it:

    {"metadata": {"total_size": bytes}, "weight_map": {tensor: name of a file beside the index}}

What is at a path, snapshots or models, is described from headers alone, as a dict for JSON that begins with its kind:
"directory", "snapshot", "output", "outputs", "state" or "safetensors".
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from posthoc_cli import files
from posthoc_cli.errors import DirectoryError, FileFormatError, MismatchError, shown
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.directory import inspect_directory, is_parts_folder, list_folder, read_snapshot
from posthoc_cli.snapshots.format import FileHeader, OutputInfo
from posthoc_cli.snapshots.headers import decode_snapshot, file_kind, parse_object
from posthoc_cli.snapshots.selection import statistics_notice
from posthoc_cli.snapshots.sources import FileSource, Snapshot
from posthoc_cli.snapshots.states import StoredState, decode_state
from posthoc_cli.snapshots.tensor_file import read_header, read_small_file

INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
SINGLE_NAME = "model.safetensors"
"""A model that fits one shard."""

_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


SAME_COEFFICIENT = 1e-6
"""Coefficients of one plan may differ by this fraction of the largest, since processors round differently. It is far
below the rounding of float16 snapshots."""


def output_difference(found: OutputInfo, wanted: OutputInfo) -> str | None:
    """How an output differs from the wanted one in run, target, time or method, in words; None if it does not."""
    for name, words in (("run_id", "run"), ("profile", "target"), ("t", "t"), ("method", "method")):
        values = getattr(found, name), getattr(wanted, name)
        if values[0] != values[1]:
            there, not_there = (f"{one:,.12g}" if isinstance(one, float) else str(one)[:60] for one in values)
            return f"its {words} is {there}, not {not_there}"
    return None


def same_coefficients(found: OutputInfo, wanted: OutputInfo) -> bool:
    """Whether two outputs have equally many snapshots and the same coefficients."""
    pairs = [[c for _, c in info.snapshots if c] for info in (found, wanted)]
    most = SAME_COEFFICIENT * max((abs(c) for c in pairs[1]), default=0.0)
    return len(pairs[0]) == len(pairs[1]) and all(abs(a - b) <= most for a, b in zip(*pairs, strict=True))


def decode_output(path: Path, header: fmt.FileHeader) -> OutputInfo:
    """The checked metadata of an output; a FileFormatError names the file and the key."""
    values = headers.decode_metadata(path, header, "output", _OUTPUT)
    values["snapshots"] = tuple((one.file, one.coefficient) for one in values["snapshots"])
    return OutputInfo(**values)


@dataclass(frozen=True)
class _Used:
    """A snapshot of an output."""

    file: str
    coefficient: Annotated[float, fmt.ANY_SIGN]


_OUTPUT = headers.kinds_of(OutputInfo) | {"snapshots": tuple[_Used, ...]}


_OF_TRAINING = ("ss_", "modelspec.")


def training_metadata(header: fmt.FileHeader, with_hashes: bool = False) -> dict[str, str]:
    """What kohya's scripts say in a file about its training, with the hashes of its tensors if these stay."""
    kept = (*_OF_TRAINING, "sshs_") if with_hashes else _OF_TRAINING
    found = {name: value for name, value in header.metadata.items() if name.startswith(kept)}
    return {name: value for name, value in found.items() if with_hashes or not name.startswith("modelspec.hash")}


@dataclass(frozen=True)
class ShardIndex:
    """The content of an index: the tensors in each file, by its name, growing; bytes of all tensors, if it has them."""

    shards: dict[str, list[str]]
    total_size: int | None


def decode_index(path: Path, endings: tuple[str, ...] = (fmt.SUFFIX,)) -> ShardIndex:
    """The checked index of a sharded model: names, with these endings, lead to files beside it and nowhere else."""
    found = parse_object(path, read_small_file(path, fmt.MAX_HEADER_BYTES), "index")
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict):
        raise FileFormatError(path, "is not an index of shards: it has no weight_map")
    shards: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not (isinstance(name, str) and is_plain_name(name, endings)):
            raise FileFormatError(path, f"tensor {shown(tensor)}: {shown(name)} is not the name of a file beside it")
        shards.setdefault(name, []).append(tensor)
    metadata = found.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return ShardIndex(dict(sorted(shards.items())), total if type(total) is int else None)


def encode_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The content of an index."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def is_plain_name(name: str, endings: tuple[str, ...] = (fmt.SUFFIX,)) -> bool:
    """Whether a name leads to a visible file in the same folder, on every system."""
    return (
        name.endswith(endings)
        and not name.startswith(".")
        and len(name.encode(errors="replace")) <= 255
        and all(c.isprintable() and c not in "/\\:" for c in name)
    )


def model_files(path: Path) -> dict[Path, list[str] | None]:
    """The files of the model or snapshot at a path, each with the tensors that an index names; None without one."""
    index = index_of(path)
    if index is not None:
        return {index.parent / name: names for name, names in decode_index(index).shards.items()}
    if is_parts_folder(path):
        return dict.fromkeys(list_folder(path).files)
    return {path / SINGLE_NAME if path.is_dir() else path: None}


def index_of(path: Path) -> Path | None:
    """The index of a sharded model: the path itself, or a file in that folder; None for other models."""
    if not path.is_dir():
        return path if path.name.endswith(INDEX_SUFFIX) else None
    own = path / INDEX_NAME
    return own if own.exists() else min(path.glob(f"*{INDEX_SUFFIX}"), default=None)


def is_model_folder(path: Path) -> bool:
    """Whether a path is a folder of one model: shards with an index, or `model.safetensors`."""
    return path.is_dir() and (index_of(path) is not None or (path / SINGLE_NAME).exists())


def models_at(path: Path) -> list[Path]:
    """The models at a path: itself, or those in a folder of several, by name.

    A DirectoryError for a folder without models, with shards but no index, or with the snapshots of a run.
    """
    if not path.is_dir() or is_model_folder(path) or is_parts_folder(path):
        return [path]
    entries = sorted(entry for entry in files.system.list(path) if not entry.name.startswith("."))
    shards = [match for entry in entries if (match := _SHARD.fullmatch(entry.name))]
    if shards:
        count = int(shards[0][1])
        what = f"{len(shards)} of {count} shards of a model are there, and no index"
        raise DirectoryError(path, what, "run again the job that makes them")
    found = [
        entry for entry in entries if entry.suffix == fmt.SUFFIX or is_model_folder(entry) or is_parts_folder(entry)
    ]
    if not found:
        hint = "name a .safetensors file, an index of shards, or a folder of these"
        raise DirectoryError(path, "holds no snapshots, outputs or models", hint)
    if any(file_kind(read_header(file)) == "snapshot" for entry in found for file in model_files(entry)):
        raise DirectoryError(path, "holds the snapshots of a run", "name one of them, or make an average of them")
    return found


def check_indexed(path: Path, header: fmt.FileHeader, names: list[str] | None) -> None:
    """Raise a FileFormatError, naming the shard and the tensor, if it lacks one that its index names."""
    missing = set(names or ()) - header.tensors.keys()
    if missing:
        raise FileFormatError(path, f"tensor {shown(min(missing))} is not in it, as the index says")


def check_alike(first: Path, info: OutputInfo | None, other: Path, found: OutputInfo | None) -> None:
    """Raise a MismatchError unless two shards are of one model, by their outputs; None for other files."""
    if info is None or found is None:
        difference = "only one of them is of a synthesis" if info is not found else None
    else:
        difference = output_difference(found, info)
        if difference is None and not same_coefficients(found, info):
            difference = "its coefficients differ"
    if difference is not None:
        raise MismatchError(f"{first} and {other} are not of one model", difference)


# --- descriptions

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
    described = [describe_model(model) for model in models_at(path)]
    if is_model_folder(path):
        return described[0]
    return {"kind": "outputs", "path": str(path), "outputs": described}


def describe_model(path: Path) -> Description:
    """Describe a file, or a model in shards. Errors as in `describe`."""
    headers: dict[Path, FileHeader] = {}
    for file, names in model_files(path).items():
        headers[file] = read_header(file)
        check_indexed(file, headers[file], names)
    if not headers:
        raise FileFormatError(path, "is an index that names no file")
    first, header = next(iter(headers.items()))
    is_sharded, kinds = index_of(path) is not None, {file_kind(one) for one in headers.values()}
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
