"""A checkpoint as a source of averages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from posthoc_cli.checkpoints.index import FoundChunk, Tensors, tensor_shape
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.profiles import (
    POWER_FUNCTION,
    UNLIMITED,
    Clock,
    Point,
    PowerFunction,
    StoredProfile,
    sigma_rel_from_gamma,
)
from posthoc_cli.reconstruction import Steps, StoredAverage
from posthoc_cli.snapshots.sources import Source, TrackedTensor
from posthoc_cli.snapshots.tensorfile import Box, Entry, TensorFile

# of BatchNorm: a variance is not extrapolated
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, repr=False)
class Checkpoint(Source):
    """A checkpoint, or an average that another program stored; see `Source` for what is not said
    here."""

    word, sketch, sample, measurements, left_out = "checkpoint", "", "", None, ()
    path: Path
    files: tuple[TensorFile, ...] = field(compare=False)
    entries: Mapping[str, Entry]
    profile: StoredProfile  # `Point` for weights, or that of an average; `t` is its time
    step: int
    tensors: dict[str, TrackedTensor]
    aliases: dict[str, str]
    t_unit: str = "steps"
    # the width that the user of another library asked for; 0 for weights and other averages
    sigma_rel: float = 0.0
    # of an ordinary EMA after its warm-up; 0 if it is unknown, and for other tensors
    decay: float = 0.0
    # hash of names, shapes and content; empty until checkpoints were compared with each other
    run_id: str = ""
    kind: str = "checkpoints"  # one of `layouts.TABLE`
    name: str = ""  # that of the file or folder, or more of its path if that is not distinct
    updates: Updates | None = None  # of an ordinary EMA; None for other tensors
    # Whether `step` is known to count updates of the weights: its file or the user says so. A lone
    # number in a name may count epochs.
    has_step_unit: bool = False

    @property
    def t(self) -> float:  # type: ignore[override]  # in a frozen class no field can be assigned either
        return self.profile.t

    @property
    def t_first(self) -> float:  # type: ignore[override]
        """The earliest time that has mass in averages of a run with this profile, on a clock of
        steps or images."""
        return float(getattr(self.profile, "t_first", min(1.0, self.t)))

    @property
    def clock_pairs(self) -> tuple[tuple[int, float], ...]:
        return ((self.step, self.t),)

    def average(self, profile: StoredProfile | None = None) -> StoredAverage:
        """Return the input of a reconstruction, with its own or another profile.

        Where steps are known, the weights change at every step and between none; the decay of an
        average is one of steps. Otherwise motion is continuous: files whose numbers follow each
        other may be an epoch apart.
        """
        used: Any = profile or self.profile
        dtypes = {self.tensors[name].dtype for name in self.averages}
        eps = EPS["F64" if dtypes == {"F64"} else "F32"]
        steps = None
        if self.has_step_unit or not isinstance(used, Point):
            steps = Steps(Clock([self.step], [self.t]), 1)
        return StoredAverage(used, self.step, eps, None, steps, t_first=self.t_first)

    @property
    def holds(self) -> str:
        """A phrase that says what its tensors are."""
        if isinstance(self.profile, Point):
            return "weights"
        if self.decay:
            return f"EMA of decay {self.decay:.12g}"
        known = "of" if isinstance(self.profile, PowerFunction) else "tracked as"
        return f"average {known} sigma_rel {self.sigma_rel:g}"

    @property
    def is_known(self) -> bool:
        """Whether its profile is known, and no placeholder for that of an ordinary EMA."""
        return self.updates is None or bool(self.decay or self.sigma_rel)

    @property
    def file_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.entries.values())

    def with_settings(self, settings: ImportSettings) -> Checkpoint:
        """Return the checkpoint, an ordinary EMA with the profile that its file and the settings
        determine, if any."""
        if self.updates is None:
            return self
        profile = self.updates.profile(self.path, self.step, settings)
        rule, decay, sigma_rel = profile.settings, 0.0, 0.0
        if settings.ema_decay is not None or settings.sigma_rels or "decay" in self.updates.rule:
            power = (
                rule["power"] if rule["warm_up"] == POWER_FUNCTION else math.log(2) / rule["power"]
            )
            if rule["decay"] == UNLIMITED and power > 1:
                sigma_rel = sigma_rel_from_gamma(power - 1)
            else:
                decay = rule["decay"]
        return replace(self, profile=profile, decay=decay, sigma_rel=sigma_rel)

    @property
    def identity(self) -> str:
        identities = {file.path: file.checksum for file in self.files}
        return xxhash.xxh3_64_hexdigest(
            "".join(identities[file] for file in sorted(identities)).encode()
        )


def make_checkpoint(
    path: Path, tensors: Tensors, profile: StoredProfile, step: int, **fields: Any
) -> Checkpoint:
    """Return a checkpoint of these tensors, with further fields of `Checkpoint`."""
    specs, aliases, known = dict[str, Entry](), dict[str, str](), dict[tuple[Path, Entry], str]()
    # of a file that has several chunks of a tensor
    layers: dict[tuple[Path, int], dict[str, FoundChunk]] = {}
    for name, find in tensors.items():
        chunks, problem = find(), ""
        first = chunks[0]
        if (
            name in ("", "__metadata__")
            or "\0" in name
            or name.encode("utf-8", "replace").decode() != name
        ):
            problem = "a model's tensor cannot have this name"
        elif any(chunk.tensor.dtype != first.tensor.dtype for chunk in chunks):
            problem = "its chunks are of several dtypes"
        if problem:
            raise FileFormatError(path, f"tensor {shown(name)}: {problem}")
        if (
            len(chunks) == 1
            and first.tensor.nbytes
            and known.setdefault((first.path, first.tensor), name) != name
        ):
            # tied weights: both names have the same bytes
            aliases[name] = known[first.path, first.tensor]
            continue
        specs[name] = Entry(first.tensor.dtype, tensor_shape(chunks))
        counts = Counter[Path]()
        for chunk in chunks:
            layers.setdefault((chunk.path, counts[chunk.path]), {})[name] = chunk
            counts[chunk.path] += 1
    held = []
    for (file, _), of_file in layers.items():
        identity, stamp = next(iter(of_file.values())).identity
        entries = {name: chunk.tensor for name, chunk in of_file.items()}
        boxes = {name: chunk.box for name, chunk in of_file.items()}
        if len(layers) == 1 and all(
            box == Box.full(specs[name].shape) for name, box in boxes.items()
        ):
            boxes = {}
        held.append(TensorFile(file, entries, stamp, boxes=boxes, checksum=identity))
    roles = {
        name: TrackedTensor(
            "copy" if spec.dtype not in EPS or _is_statistic(name, specs) else "average", spec.dtype
        )
        for name, spec in specs.items()
    }
    return Checkpoint(
        path, tuple(held), specs, profile, step, roles, aliases, name=path.name, **fields
    )


def _is_statistic(name: str, names: Collection[str]) -> bool:
    """Return whether a tensor is of BatchNorm, or one of spectral norm's two vectors; weight norm's
    is a weight."""
    stem = name[:-1]
    is_vector = name.endswith(("_u", "_v")) and f"{stem}u" in names and f"{stem}v" in names
    is_of_norm = f"{stem}orig" in names or ("parametrizations." in name and stem.endswith("._"))
    return name.rpartition(".")[2] in _STATISTICS or (is_vector and is_of_norm)
