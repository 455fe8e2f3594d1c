"""What the file of one part of a synthesis must be, and whether the one that is there is it.

A part is a shard in the sharded layout that also says in its metadata (see `snapshots.format`) which part it is and
which plan it belongs to, so that parts of different runs, targets, snapshots, releases or divisions never mix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

import posthoc_cli
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.outputs import (
    OutputInfo,
    decode_output,
    output_difference,
    output_metadata,
    same_coefficients,
)
from posthoc_cli.snapshots.reader import read_header
from posthoc_cli.synthesis import DiskSource, Plan, Source
from posthoc_cli.synthesis.division import Part

PART_PATTERN = "model-{number:05d}-of-{of:05d}.safetensors"


def part_path(folder: Path, part: Part) -> Path:
    """Where a part goes: the name that it has in the finished, sharded model."""
    return folder / PART_PATTERN.format(number=part.number, of=part.of)


@dataclass(frozen=True)
class PartFile:
    """A part of one target, as it must be on disk.

    Attributes:
        path: its file.
        part: which one it is.
        info: what it says about itself as an output.
        specs: its tensors.
        plan_id: digest of the plan, see `plan_digest`.
    """

    path: Path
    part: Part
    info: OutputInfo
    specs: tuple[fmt.TensorSpec, ...]
    plan_id: str

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.specs)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Strings for its header."""
        return output_metadata(self.info) | {
            "ema.part": str(self.part),
            "ema.plan": self.plan_id,
            "ema.release": posthoc_cli.__version__,
        }

    def read_header(self) -> fmt.FileHeader:
        """The header of the file that is there, if that is this part: whole in size, and of the same plan.

        Raises:
            FileFormatError: it is damaged, or no part.
            MismatchError: it is of another plan; says what differs.
        """
        header = read_header(self.path)
        found = decode_output(self.path, header)
        if "ema.part" not in header.metadata:
            raise FileFormatError(self.path, "is no part made by --shard")
        difference = self._difference(header.metadata, found)
        if difference is not None:
            raise MismatchError(self.path, f"is a part of another plan: {difference}")
        tensors = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
        if tensors != {spec.name: (spec.dtype, spec.shape) for spec in self.specs}:
            raise FileFormatError(self.path, f"does not hold the tensors of part {self.part}")
        return header

    def _difference(self, metadata: Mapping[str, str], found: OutputInfo) -> str | None:
        """What tells the file from this part, in words; None for nothing."""
        for key, words in (("ema.part", "it is part"), ("ema.release", "it was made by release")):
            if metadata.get(key) != self.metadata[key]:
                return f"{words} {str(metadata.get(key))[:60]}, not {self.metadata[key]}"
        difference = output_difference(found, self.info)
        if difference is not None:
            return difference
        if metadata.get("ema.plan") != self.plan_id:
            return "its snapshots, dtype or tensors are others, or the targets that it was made together with"
        if not same_coefficients(found, self.info):
            return "its coefficients are others; snapshots were added or removed since"
        return None


def plan_digest(
    plan: Plan, target: int, specs: Sequence[fmt.TensorSpec], wide: str | None, division: Sequence[Sequence[str]]
) -> str:
    """32 hexadecimal digits that two parts share when they belong together.

    Over the release, the run, the target, its time, the method, the header checksums of the snapshots in use, the
    dtypes, names and shapes of the output, and the division. Not over coefficients, which another processor
    computes with other roundings: those are compared, see `outputs.SAME_COEFFICIENT`.

    Arguments:
        plan: the whole plan.
        target: which of its targets.
        specs: the output's tensors.
        wide: dtype of the sums, None for the default.
        division: the stored tensors of each part.
    """
    column = plan.reconstruction.coefficients[:, target]
    info = plan.output_info(target)
    facts = [
        fmt.VERSION, posthoc_cli.__version__, info.run_id, info.profile, info.t, info.t_unit, info.method, wide,
        [source_checksum(source) for source, c in zip(plan.sources, column, strict=True) if c],
        [(spec.name, spec.dtype, spec.shape) for spec in specs],
        division,
    ]  # fmt: skip
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, separators=(",", ":")).encode())


def source_checksum(source: Source) -> str:
    """The checksum in a snapshot's header, which tells apart what two snapshots hold.

    Raises:
        InvalidValueError: the source is not on disk.
    """
    if not isinstance(source, DiskSource):
        raise InvalidValueError("shard", f"{source.name} is in memory; parts are made from snapshots on disk")
    return source.snapshot.header.metadata["ema.checksum"]
