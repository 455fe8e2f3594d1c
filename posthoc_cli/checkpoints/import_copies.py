"""The copies with checksums that `ema import --copy` leaves: files of this package, see `snapshots.format`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.checkpoints.source import Checkpoint, CheckpointInfo, first_time
from posthoc_cli.errors import FileFormatError, NonFiniteError, OutputExistsError
from posthoc_cli.profiles import Discrete, Point, PowerFunction, StoredProfile
from posthoc_cli.profiles.other_libraries import OrdinaryEMA
from posthoc_cli.progress import ProgressBar
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.chunks import Box
from posthoc_cli.snapshots.directory import snapshot_path
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.reading import BackingFile
from posthoc_cli.snapshots.tensor_file import (
    TensorFileWriter,
    holds_nonfinite,
    read_header,
)

KIND = "checkpoint"
"""In ema.format."""


def copy_path(folder: Path, info: CheckpointInfo) -> Path:
    """The file of a copy."""
    path = snapshot_path(folder, info.t, info.sigma_rel)
    what = "weights" if isinstance(info.profile, Point) else "average"
    return path if info.sigma_rel else path.with_name(path.name.replace("-0.0.safe", f"-{what}.safe"))


def are_copied(checkpoints: Sequence[Checkpoint], out: Path) -> bool:
    """Whether a folder holds copies of these checkpoints, and nothing else."""
    wanted = {copy_path(out, one.info): _metadata(one) for one in checkpoints}
    with suppress(FileFormatError):
        return (
            out.is_dir()
            and wanted.keys() == set(out.iterdir())
            and all(metadata.items() <= read_header(path).metadata.items() for path, metadata in wanted.items())
        )
    return False


def write_copies(checkpoints: Sequence[Checkpoint], out: Path, overwrite: bool, progress: ProgressBar) -> None:
    """Write each checkpoint as a file of this package into a new folder, or none.

    Raises:
        OutputExistsError: the folder is there and not empty; with `overwrite` if it holds anything but copies.
        NonFiniteError: a tensor to be averaged holds nan or infinity.
        FileFormatError, WriteError: a file cannot be read, or written.
    """
    _check_free(out, overwrite)
    total = sum(entry.nbytes for one in checkpoints for entry in one.stored.values())
    files.remove_leftovers(out.parent)
    made, replaced = files.temporary_path(out.parent), files.temporary_path(out.parent)
    with files.reported_as_write_error(out), progress("importing", total) as advance:
        files.make_directory(made)
        try:
            for one in checkpoints:
                _write(one, copy_path(made, one.info), advance)
            if overwrite and out.exists():
                files.system.rename(out, replaced)
            files.system.rename(made, out)
            files.system.fsync_directory(out.parent)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            if replaced.exists() and not out.exists():
                files.system.rename(replaced, out)
            raise
    shutil.rmtree(replaced, ignore_errors=True)


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputExistsError(out, "is there already", "choose another name, or overwrite=True to replace it")
    for path in [out] if not out.is_dir() else sorted(out.iterdir()):
        with suppress(FileFormatError):
            if file_kind(read_header(path)) == KIND:
                continue
        raise OutputExistsError(out, f"holds something else: {path.name}", "choose another name")


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    info = checkpoint.info
    keys = ("run_id", "t", "t_unit", "step", "sigma_rel", "gamma", "decay", "tensors", "aliases")
    values: dict[str, object] = {key: getattr(info, key) for key in keys} | {"source": checkpoint.identity}
    if isinstance(info.profile, OrdinaryEMA):
        values["ordinary"] = info.profile.settings
    elif isinstance(info.profile, Discrete):
        values["masses"] = {"times": info.profile.times, "masses": info.profile.masses}
    return fmt.encode_metadata(KIND, values)


def _write(checkpoint: Checkpoint, path: Path, advance: Any) -> None:
    tensors = checkpoint.info.tensors
    specs = [fmt.TensorSpec(name, entry.dtype, entry.shape) for name, entry in checkpoint.stored.items()]
    room = memoryview(bytearray(fmt.BLOCK_BYTES))
    with TensorFileWriter(path, specs, _metadata(checkpoint)) as writer, checkpoint.open() as file:
        for spec in specs:
            reader = file.read_range(spec.name, 0, spec.nbytes)
            output = writer.write_range(spec.name, 0)
            for begin in range(0, spec.nbytes, fmt.BLOCK_BYTES):
                view = room[: min(fmt.BLOCK_BYTES, spec.nbytes - begin)]
                reader.read_into(view)
                if tensors[spec.name].role == "average" and holds_nonfinite(view, spec.dtype):
                    raise NonFiniteError(checkpoint.path, f"tensor {spec.name!r}: holds nan or infinity")
                output.write(view)
                advance(len(view))
        writer.commit()


def is_copy(values: Mapping[str, Any]) -> bool:
    """Whether a file is a copy, by its metadata."""
    return values.get("ema.format") == KIND


def read_copy(path: Path) -> Checkpoint:
    """A file that `write_copies` wrote; a FileFormatError says what is wrong with it."""
    header = read_header(path)
    values = headers.decode_metadata(path, header, KIND, _KINDS, _OPTIONAL)
    masses, t, _ = values.pop("masses", None), values.pop("t"), values.pop("source", None)
    ordinary = values.pop("ordinary", None)
    try:
        profile: StoredProfile = PowerFunction(values["gamma"], t) if values["sigma_rel"] else Point(t)
        headers.check_tensors(values["tensors"], values["aliases"], header.tensors)
        if ordinary is not None:
            profile = OrdinaryEMA.of(values["step"], **ordinary)
        elif masses is not None:
            profile = Discrete(masses.get("times", ()), masses.get("masses", ()), t)
    except (ValueError, TypeError) as error:
        raise FileFormatError(path, f"ema.masses, ema.tensors or ema.aliases: {error}") from error
    boxes = {name: Box.whole(entry.shape) for name, entry in header.tensors.items()}
    info = CheckpointInfo(profile, t_first=first_time(profile), **values)
    return Checkpoint(path, header, info, (BackingFile(path, header, boxes),))


_KINDS = {
    "run_id": fmt.RunId, "t": fmt.Time, "t_unit": fmt.Unit, "step": fmt.Count, "sigma_rel": float, "gamma": float,
    "decay": float, "tensors": dict[str, fmt.TrackedTensor], "aliases": dict[str, str], "masses": dict[str, Any],
    "ordinary": dict[str, Any], "source": str,
}  # fmt: skip
"""What the metadata of such a file must be."""

_OPTIONAL = ("decay", "masses", "ordinary", "source")
