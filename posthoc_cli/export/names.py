"""The names of outputs: a file or folder for each target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import (
    InvalidValueError,
    argument,
)
from posthoc_cli.request import LAYOUTS, OutputRequest
from posthoc_cli.snapshots.directory import is_import, is_snapshot_name
from posthoc_cli.targets import Target


def output_paths(request: OutputRequest) -> list[Path]:
    """Name each target's output, none in a dry run: `out`, or a file or folder in it for each.

    Raises InvalidValueError if `out` does not fit the request, or if two targets would have the
    same path.
    """
    targets = request.wished
    out = request.out
    if out is None:
        if not request.dry_run:
            raise InvalidValueError("out", f"is required (except with {argument('dry_run')})")
        return []
    path = files.local_path("out", out)
    is_file = path.suffix in (*LAYOUTS["safetensors"], *LAYOUTS["pt"])
    if request.distributed and is_file:
        reason = "is a file, and a job of several processes makes a folder of shards"
        raise InvalidValueError(
            "out", reason, "name a folder; `ema export` makes one file of it", value=out
        )
    if not request.dry_run:
        files.check_parent(path)
        check_not_in_run(path)
    is_folder = path.is_dir() or path.suffix == "" or str(out).endswith("/")
    if len(targets) == 1 and (request.makes_folders or not is_folder):
        request.find_layout(path)
        paths = [path]
    elif is_file and not is_folder:
        raise InvalidValueError(
            "out", f"is one file for {len(targets)} targets; name a folder", value=out
        )
    else:
        paths = _paths_in(path, targets, "" if request.makes_folders else request.ending)
    return [] if request.dry_run else paths


def check_not_in_run(out: Path) -> None:
    """Raise an InvalidValueError for an output in the folder of a run or of an import, or in its
    place."""
    for folder in (out, out.parent):
        if folder.is_dir() and (is_import(folder) or any(map(is_snapshot_name, folder.iterdir()))):
            reason = f"{folder} is the folder of a run, which holds nothing else"
            raise InvalidValueError("out", reason, "name another folder", value=out)


def _paths_in(
    folder: Path,
    targets: Sequence[Target],
    ending: str,
) -> list[Path]:
    """Name paths after the targets."""
    files.check_folder(folder)
    paths = []
    for target in targets:
        name = target.label if target.sigma_rel is None else f"sigma_rel-{target.sigma_rel!r}"
        path = folder / f"{name}{ending}"
        if path in paths:
            reason = f"two averages would both become {path}; a profile is named after its file"
            raise InvalidValueError("out", reason, "rename one", value=folder)
        paths.append(path)
    return paths
