"""Write checkpoints as files of this package, with checksums, and read these; `snapshots.format` specifies them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.checkpoints.checkpoint import Checkpoint, foreign_info
from posthoc_cli.errors import FileFormatError, InvalidValueError, NonFiniteError, OutputExistsError
from posthoc_cli.profiles import Discrete, Point, PowerFunction, StoredProfile
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.chunks import Box
from posthoc_cli.snapshots.directory import snapshot_path
from posthoc_cli.snapshots.reading import Part
from posthoc_cli.snapshots.tensor_file import TensorFileWriter, holds_nonfinite, read_header

KIND = "checkpoint"


@dataclass(frozen=True)
class Import:
    """What was imported: the checkpoints as they were, and the files that they are now."""

    checkpoints: tuple[Checkpoint, ...]
    paths: tuple[Path, ...]

    @property
    def counts(self) -> Counter[str]:
        """How many checkpoints hold what."""
        return Counter(one.holds for one in self.checkpoints)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "run": self.checkpoints[0].info.run_id,
            "checkpoints": [
                {"from": str(one.path), "to": str(path), "t": one.info.t, "holds": one.holds}
                for one, path in zip(self.checkpoints, self.paths, strict=True)
            ],
        }


def import_checkpoints(checkpoints: Sequence[Checkpoint], out: Path, progress: ProgressBar = no_bar) -> Import:
    """Write each checkpoint as a file of this package into a new folder, or none.

    Raises:
        OutputExistsError: the folder is there, and not empty.
        NonFiniteError: a tensor to be averaged holds nan or infinity.
        FileFormatError, WriteError: a file cannot be read, or written.
    """
    if not out.parent.is_dir():
        raise InvalidValueError("out", "its folder does not exist", value=out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(out, "is there already", "choose another name")
    named = [snapshot_path(out, one.info.t, one.info.sigma_rel) for one in checkpoints]
    paths = [path.with_name(path.name.replace("-0.0.safe", "-weights.safe")) for path in named]
    total = sum(entry.nbytes for one in checkpoints for entry in one.stored.values())
    files.remove_leftovers(out.parent)
    made = files.temporary_path(out.parent)
    with files.reported_as_write_error(out), progress("importing", total) as advance:
        files.make_directory(made)
        try:
            for one, path in zip(checkpoints, paths, strict=True):
                _write(one, made / path.name, advance)
            files.system.rename(made, out)
            files.system.fsync_directory(out.parent)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return Import(tuple(checkpoints), tuple(paths))


def _write(checkpoint: Checkpoint, path: Path, advance: Any) -> None:
    info, profile = checkpoint.info, checkpoint.profile
    keys = "run_id t t_unit step sigma_rel gamma tensors aliases"
    values: dict[str, object] = {key: getattr(info, key) for key in keys.split()}
    if isinstance(profile, Discrete):
        values["masses"] = {"times": profile.times, "masses": profile.masses}
    specs = [fmt.TensorSpec(name, entry.dtype, entry.shape) for name, entry in checkpoint.stored.items()]
    room = memoryview(bytearray(fmt.BLOCK_BYTES))
    with TensorFileWriter(path, specs, fmt.encode_metadata(KIND, values)) as writer, checkpoint.open() as file:
        for spec in specs:
            reader = file.read_range(spec.name, 0, spec.nbytes)
            with closing(writer.write_range(spec.name, 0)) as output:
                for begin in range(0, spec.nbytes, fmt.BLOCK_BYTES):
                    view = room[: min(fmt.BLOCK_BYTES, spec.nbytes - begin)]
                    reader.read_into(view)
                    if info.tensors[spec.name].role == "average" and holds_nonfinite(view, spec.dtype):
                        raise NonFiniteError(checkpoint.path, f"tensor {spec.name!r}: holds nan or infinity")
                    output.write(view)
                    advance(len(view))
        writer.commit()


def read_imported(path: Path) -> Checkpoint:
    """A file that `import_checkpoints` wrote; a FileFormatError says what is wrong with it."""
    header = read_header(path)
    values = headers.decode_metadata(path, header, KIND, _ENTRIES)
    masses = values.pop("masses", None)
    t, profile = values["t"], None
    try:
        tensors = headers.decode_tensors(values.pop("tensors"), header.tensors)
        headers.check_aliases(values["aliases"], tensors)
        if masses is not None:
            profile = Discrete(masses.get("times", ()), masses.get("masses", ()), t)
    except (ValueError, TypeError) as error:
        raise FileFormatError(path, f"ema.masses, ema.tensors or ema.aliases: {error}") from error
    made: StoredProfile = profile or (PowerFunction(values["gamma"], t) if values["sigma_rel"] else Point(t))
    boxes = {name: Box.whole(entry.shape) for name, entry in header.tensors.items()}
    return Checkpoint(
        path, header, foreign_info(made, **values, tensors=tensors), (Part(path, header, boxes),), of=made
    )


_ENTRIES = {
    "run_id": headers.RUN_ID,
    "t": headers.TIME,
    "t_unit": headers.UNIT,
    "step": headers.WHOLE,
    "sigma_rel": headers.AMOUNT,
    "gamma": headers.AMOUNT,
    "tensors": headers.OBJECT,
    "aliases": headers.OBJECT,
    "masses": replace(headers.OBJECT, optional=True),
}
"""What the metadata of such a file must be."""
