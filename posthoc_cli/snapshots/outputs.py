"""Outputs and models on disk: a safetensors file, shards with an index, a folder of either, or a
folder of several.

The index of a
sharded model is a JSON file as the Hugging Face libraries define it:

    {"metadata": {"total_size": bytes}, "weight_map": {tensor: name of a file next to the index}}
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.dtypes import DTYPES
from posthoc_cli.errors import DirectoryError, FileFormatError, MismatchError, quote
from posthoc_cli.snapshots.decoding import decode
from posthoc_cli.snapshots.directory import (
    inspect_directory,
    is_parts_folder,
    is_snapshot_name,
    read_snapshot,
)
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.opened_file import read_small_file
from posthoc_cli.snapshots.output_info import OutputInfo
from posthoc_cli.snapshots.output_mark import MARK, decode_mark
from posthoc_cli.snapshots.selection import statistics_notice
from posthoc_cli.snapshots.snapshot import Snapshot, decode_snapshot, file_bytes
from posthoc_cli.snapshots.source import Source
from posthoc_cli.snapshots.sources import Sources
from posthoc_cli.snapshots.strict_json import parse_object
from posthoc_cli.snapshots.tensorfile import MAX_HEADER_BYTES, SUFFIX, TensorFile, read_file
from posthoc_cli.targets import SigmaRel, name_equal_length

INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
# of transformers, diffusers and PEFT
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")

# a name of a visible file in the same folder on every operating system
_NAME = re.compile(r"[^./\\:][^/\\:]{0,254}")


def read_index(path: Path) -> dict[str, Any]:
    """Read the index of a sharded model."""
    return parse_object(path, read_small_file(path, MAX_HEADER_BYTES), "index")


def decode_index(
    path: Path,
    endings: tuple[str, ...] = (SUFFIX,),
) -> dict[str, list[str]]:
    """List the tensors of each shard that an index names, by file name; shards have these endings.

    Raises FileFormatError, also if a name does not refer to a visible file in the index's folder on
    every system.
    """
    weight_map = read_index(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(
            path,
            "is not an index of shards: it has no weight_map, or an empty one",
        )
    shards: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not (
            isinstance(name, str)
            and _NAME.fullmatch(name)
            and name.isprintable()
            and name.endswith(endings)
        ):
            reason = (
                f"tensor {quote(tensor)}: {quote(name)} is not the name of a file in its folder"
            )
            raise FileFormatError(path, reason)
        shards.setdefault(name, []).append(tensor)
    return dict(sorted(shards.items()))


def weights_at(path: Path) -> Path | None:
    """Find the index or the only file of a model: the path itself, or in a folder; None for a
    folder without."""
    if not path.is_dir():
        return path
    names = sorted(entry.name for entry in files.system.list(path))
    known = [f"{stem}{ending}" for stem in _STEMS for ending in (INDEX_SUFFIX, SUFFIX)]
    known += [name for name in names if name.endswith(INDEX_SUFFIX)]
    return next((path / name for name in known if name in names), None)


def model_files(weights: Path) -> dict[Path, list[str]]:
    """List the files of a model, from its index or only file, each with the tensors that an index
    names."""
    if not weights.name.endswith(INDEX_SUFFIX):
        return {weights: []}
    index = decode_index(weights)
    return {weights.parent / name: names for name, names in index.items()}


def models_at(path: Path) -> list[Path]:
    """List the models at a path: the path itself, or the models in a folder, by name.

    Raises DirectoryError for a folder without models, or with the snapshots of a run.
    """
    if is_parts_folder(path) or weights_at(path) is not None:
        return [path]
    models = []
    for entry in sorted(files.system.list(path)):
        if entry.name.startswith("."):
            continue
        is_folder = entry.is_dir() and (is_parts_folder(entry) or weights_at(entry))
        if entry.suffix == SUFFIX or is_folder:
            models.append(entry)
    if any(map(is_snapshot_name, models)):
        raise DirectoryError(
            path,
            "holds the snapshots of a run",
            "name one of them, or make an average of them",
        )
    if not models:
        hint = "name a checkpoint, a .safetensors file, an index of shards, or a folder of these"
        raise DirectoryError(path, "holds no snapshots, outputs or models", hint)
    return models


def read_model(path: Path) -> tuple[list[TensorFile], OutputInfo | None]:
    """Read a model's files and their header as an output; raise an error if a file is damaged,
    missing or of another model."""
    read = list[TensorFile]()
    infos = list[OutputInfo | None]()
    for file_path, names in model_files(weights_at(path) or path).items():
        file = read_file(file_path)
        if missing := set(names) - file.entries.keys():
            raise FileFormatError(
                file_path,
                f"tensor {quote(min(missing))} is not in it, as the index says",
            )
        read.append(file)
        infos.append(decode(file, "output", OutputInfo) if file.kind == "output" else None)
        if _record(infos[0]) != _record(infos[-1]):
            reason = "their headers say that they were not written by one synthesis"
            raise MismatchError(f"{read[0].path} and {file_path} are not of one model", reason)
    return read, infos[0]


def _record(info: OutputInfo | None) -> object:
    """Reduce a header to what is the same in all files of an output: processes may compute other
    last digits of coefficients."""
    return info and (
        info.run_id,
        info.profile,
        info.t,
        info.method,
        info.base_hash,
        info.base_share,
        [used.file for used in info.snapshots],
    )


# --- descriptions


def describe(path: Path) -> dict[str, Any]:
    """Describe a directory, a file, or a model in shards by its headers, as a dict for JSON.

    It begins with the kind: "directory", "snapshot", "output", "outputs" or "safetensors". What is
    wrong with snapshots is among the "problems". Raises DirectoryError without snapshots, outputs
    or models, and the errors of `read_model`.
    """
    if path.is_dir() and not is_parts_folder(path):
        content = inspect_directory(path)
        if content.snapshots or content.problems or content.incomplete:
            run = _describe_run(content.snapshots) if content.snapshots else {}
            return {
                "kind": "directory",
                "path": str(path),
                **run,
                "superseded": content.superseded,
                "leftovers": [
                    leftover.name for leftover in (*content.leftovers, *content.incomplete)
                ],
                "notes": [*content.notes, *run.get("notes", ())],
                "problems": [str(problem) for problem in content.problems],
            }
        if (models := models_at(path)) != [path]:
            return {
                "kind": "outputs",
                "path": str(path),
                "outputs": [_describe_model(model) for model in models],
            }
    return _describe_model(path)


def _describe_model(path: Path) -> dict[str, Any]:
    if is_parts_folder(path):
        return _describe_snapshot(read_snapshot(path))
    shards, output = read_model(path)
    if len(shards) == 1 and shards[0].kind == "snapshot":
        return _describe_snapshot(decode_snapshot(shards[0]))
    sizes = _counts([shard.entries for shard in shards]) | {
        "bytes": sum(shard.nbytes for shard in shards)
    }
    if output is None:
        described = {"kind": "safetensors", "path": str(path), **sizes}
        mark = decode_mark(shards[0].metadata.get(MARK), path)
        return described if mark is None else described | {"holds": str(mark)}
    return {
        "kind": "output",
        "path": str(path),
        "run": output.run_id,
        **_fields(output, "profile sigma_rel gamma"),
        "as": _other_name(output.sigma_rel, output.t if output.t_unit == "steps" else None),
        **_fields(output, "t t_unit base base_hash base_share"),
        **_fields(output, "method profile_error predicted_error"),
        "snapshots": [vars(used) for used in output.snapshots],
        **sizes,
        "notes": _notes(output.copies),
    }


def _describe_run(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    newest = snapshots[-1]
    runs = sorted({snapshot.run_id for snapshot in snapshots})
    steps = _even_steps(snapshots)
    profiles = []
    for width in sorted({snapshot.sigma_rel for snapshot in snapshots}):
        tracked = [snapshot for snapshot in snapshots if snapshot.sigma_rel == width]
        known = [
            error for snapshot in tracked if (error := _relative_rounding(snapshot)) is not None
        ]
        profiles.append(
            {
                **_fields(tracked[0], "sigma_rel gamma"),
                "as": _other_name(width, steps),
                "times": [snapshot.t for snapshot in tracked],
                **_fields(tracked[-1], "t_first max_interval"),
                "relative_rounding_range": [min(known), max(known)] if known else None,
                "bytes": file_bytes(tracked),
            }
        )
    return {
        "run": runs[0] if len(runs) == 1 else runs,
        "t_unit": newest.t_unit,
        **vars(newest.moment),
        **_describe_settings(newest),
        **describe_tensors(newest),
        "snapshots": [
            {"file": snapshot.path.name, **_fields(snapshot, "t step sigma_rel")}
            for snapshot in snapshots
        ],
        "measured": sum(snapshot.measurements is not None for snapshot in snapshots),
        "bytes": file_bytes(snapshots),
        "profiles": profiles,
    }


def _other_name(sigma_rel: float | None, steps: float | None) -> str | None:
    """Name the decay of the ordinary EMA that is as long as a power function."""
    return None if sigma_rel is None else name_equal_length(SigmaRel(sigma_rel), steps)


def _even_steps(snapshots: Sequence[Snapshot]) -> float | None:
    """Find the steps up to the newest snapshot; None if steps are not equally long."""
    with suppress(MismatchError):
        if Sources.of(snapshots).clock.is_even:
            return snapshots[-1].step
    return None


def _describe_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    measured = snapshot.measurements
    measurements = measured and {
        "norm": math.sqrt(measured.norm),
        "relative_rounding": _relative_rounding(snapshot),
    }
    return {
        "kind": "snapshot",
        "path": str(snapshot.path),
        "run": snapshot.run_id,
        **_fields(snapshot, "sigma_rel gamma"),
        "as": _other_name(snapshot.sigma_rel, snapshot.step),
        **vars(snapshot.moment),
        **_fields(snapshot, "t_unit t_first max_interval"),
        **_describe_settings(snapshot),
        "measurements": measurements,
        **describe_tensors(snapshot),
        "bytes": snapshot.nbytes,
    }


def _describe_settings(snapshot: Snapshot) -> dict[str, Any]:
    """Describe the settings of `PostHocEMA.from_model`; for parts which one it is, or how many, and
    the mesh."""
    dtype = snapshot.schedule.checkpoint_dtype
    schedule = vars(snapshot.schedule) | {"checkpoint_dtype": dtype and DTYPES[dtype].torch_name}
    del schedule["sigma_range"]  # which follows from the widths
    settings = dict[str, Any](schedule=schedule)
    if snapshot.part:
        settings["part"] = "{}/{}".format(*snapshot.part)
    elif snapshot.path.suffix != SUFFIX:
        settings["parts"] = len(snapshot.files)
    if snapshot.mesh:
        settings["mesh"] = snapshot.mesh
    return settings


def describe_tensors(source: Source) -> dict[str, Any]:
    """Describe the tensors of a snapshot or checkpoint: numbers, roles and dtypes."""
    copied = len(source.copies)
    return {
        **_counts([source.entries]),
        "averaged": len(source.tensors) - copied,
        "copied": copied,
        "aliases": len(source.aliases),
        "left_out": list(source.left_out),
        "model_dtypes": sorted({source.tensors[name].dtype for name in source.averaged}),
        "notes": _notes(source.copies),
    }


def _notes(copies: Sequence[str]) -> list[str]:
    return [*filter(None, [statistics_notice(copies)])]


def _fields(info: object, names: str) -> dict[str, Any]:
    return {name: getattr(info, name) for name in names.split()}


def _relative_rounding(snapshot: Snapshot) -> float | None:
    """Compute the rounding error of a stored average relative to its norm; None if unknown."""
    measured = snapshot.measurements
    return (
        math.sqrt(measured.rounding / measured.norm)
        if measured is not None and measured.norm > 0
        else None
    )


def _counts(files: Collection[Mapping[str, Entry]]) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for tensors in files:
        for entry in tensors.values():
            dtypes[entry.dtype] += entry.size
    return {
        **({"shards": len(files)} if len(files) > 1 else {}),
        "tensors": sum(map(len, files)),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(sorted(dtypes.items())),
    }
