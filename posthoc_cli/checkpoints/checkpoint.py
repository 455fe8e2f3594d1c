"""A checkpoint as a source of a synthesis, and the checks that several belong together."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from posthoc_cli.checkpoints.archives import FoundTensor
from posthoc_cli.checkpoints.contents import Piece, tensor_shape
from posthoc_cli.checkpoints.tensor_files import make_part, names_in
from posthoc_cli.dtypes import DTYPES, EPS
from posthoc_cli.errors import FileFormatError, MismatchError, shown
from posthoc_cli.profiles import Point, PowerFunction, StoredProfile
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.description import describe_tensors
from posthoc_cli.snapshots.sources import FileSource, Snapshot, run_clock

_NO_WEIGHTS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of the names of BatchNorm's statistics, which are copied: a variance must not be extrapolated."""

UNKNOWN_RUN = "0" * 32
"""The run of a checkpoint that was not yet compared with others."""


@dataclass(frozen=True)
class Checkpoint(FileSource):
    """The tensors of a checkpoint, or of an average that another library stored, and what is known about them.

    Its `info` is what the header of a snapshot would say, its `header` that of all its tensors as if in one file.

    Attributes:
        of: what its tensors are of: the weights at `info.t` (`Point`), or an average.
        library: "ema-pytorch" or "posthoc-ema", if its profile rests on what the user says of these.
        label: its name, where that of its file or folder is not enough.
    """

    of: StoredProfile = field(kw_only=True)
    library: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        """The name of the file or folder; of several of one name with folders above it; of two in one with a word."""
        return self.label or self.path.name

    @property
    def profile(self) -> StoredProfile:
        """What its tensors are of."""
        return self.of

    @property
    def holds(self) -> str:
        """What its tensors are of, for people."""
        if isinstance(self.profile, Point):
            return "weights"
        if isinstance(self.profile, PowerFunction):
            return f"average of sigma_rel {self.info.sigma_rel:g}"
        return f"average tracked as sigma_rel {self.info.sigma_rel:g}, of its own profile"


def make_checkpoint(
    path: Path,
    found: Mapping[str, Callable[[], list[Piece]]],
    profile: StoredProfile,
    step: int,
    t_unit: str = "steps",
    sigma_rel: float | None = None,
) -> Checkpoint:
    """A checkpoint of these tensors; of an average `sigma_rel` is the width that it was meant to have.

    Raises:
        FileFormatError: a tensor has no name that a model's could have, or a dtype that is not read.
    """
    entries: dict[str, fmt.TensorEntry] = {}
    aliases: dict[str, str] = {}
    layers: dict[tuple[Path, int], dict[str, Piece]] = {}
    identities: dict[Path, str] = {}
    known: dict[tuple[Path, FoundTensor], str] = {}
    for name, find in found.items():
        if name in ("", "__metadata__") or "\0" in name or name.encode("utf-8", "replace").decode() != name:
            raise FileFormatError(path, f"tensor {shown(name)}: a model's tensor cannot have this name")
        pieces = find()
        path_of, _, tensor, _ = pieces[0]
        if len(pieces) == 1 and tensor.nbytes and (other := known.setdefault((path_of, tensor), name)) != name:
            aliases[name] = other  # tied: both are the same bytes
            continue
        dtypes = {piece.tensor.dtype for piece in pieces}
        if len(dtypes) > 1:
            raise FileFormatError(path, f"tensor {shown(name)}: its chunks are of several dtypes")
        spec = fmt.TensorSpec(name, dtypes.pop(), tensor_shape(pieces))
        entries[name] = fmt.TensorEntry(spec.dtype, spec.shape, 0, spec.nbytes)
        counts: dict[Path, int] = {}
        for piece in pieces:
            layer = counts[piece.path] = counts.get(piece.path, -1) + 1
            layers.setdefault((piece.path, layer), {})[name] = piece
            identities[piece.path] = piece.identity
    parts = tuple(
        make_part(
            file,
            identities[file],
            {name: piece.tensor for name, piece in held.items()},
            {name: piece.box for name, piece in held.items()},
        )
        for (file, _), held in layers.items()
    )
    sums = xxhash.xxh3_64_hexdigest("".join(identities[file] for file in sorted(identities)).encode())
    stored = parts[0].header.tensors if len(parts) == 1 and len(parts[0].header.tensors) == len(entries) else entries
    header = fmt.FileHeader({"ema.checksum": sums}, dict(stored), 0)
    power = profile if isinstance(profile, PowerFunction) else None
    if sigma_rel is not None:
        power = PowerFunction.from_sigma_rel(sigma_rel, profile.t)
    info = foreign_info(
        profile,
        run_id=UNKNOWN_RUN,
        sigma_rel=0.0 if power is None else sigma_rel or power.sigma_rel,
        gamma=0.0 if power is None else power.gamma,
        t=profile.t,
        t_unit=t_unit,
        step=step,
        tensors={name: _tracked(name, entry.dtype) for name, entry in entries.items()},
        aliases=aliases,
    )
    return Checkpoint(path, header, info, parts, of=profile)


def foreign_info(profile: StoredProfile, **known: Any) -> fmt.SnapshotInfo:
    """What the header of a snapshot would say of a checkpoint, of which this is known."""
    schedule = fmt.TrackingSchedule(update_every=1, max_checkpoints=None, checkpoint_dtype=None)
    first = getattr(profile, "t_first", min(1.0, profile.t))
    return fmt.SnapshotInfo(**known, sigma_rels=(), t_first=first, max_interval=1.0, schedule=schedule)


def _tracked(name: str, dtype: str) -> fmt.TrackedTensor:
    """How a synthesis treats a tensor: floating-point numbers are averaged, others copied."""
    is_weight = dtype in EPS and name.rpartition(".")[2] not in _NO_WEIGHTS
    return fmt.TrackedTensor("average" if is_weight else "copy", dtype)


def checked_run(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The same checkpoints by time, as one run: with a common run id, and aliases that all have.

    Raises:
        MismatchError: two of them are of different models, or of one time; both are named.
    """
    ordered = sorted(checkpoints, key=lambda one: (one.info.t, one.info.sigma_rel))
    seen: dict[tuple[float, float], Checkpoint] = {}
    for one in ordered:
        other = seen.setdefault((one.info.t, one.info.sigma_rel), one)
        if other is not one:
            reason = f"are both of step {one.info.t:,.12g}"
            raise MismatchError(f"{other.path} and {one.path}", reason, "name those of one run, by a glob")
    ordered = _named(ordered)
    first = ordered[0]
    for one in ordered[1:]:
        _check_alike(first, one)
    ids = {one.info.run_id for one in ordered}
    if len(ids) > 1:
        other = next(one for one in ordered if one.info.run_id != first.info.run_id)
        raise MismatchError(f"{first.path} and {other.path}", "are of different runs", "name those of one, by a glob")
    if ids != {UNKNOWN_RUN}:
        return ordered
    names = [(name, entry.shape) for name, entry in sorted(first.stored.items())]
    run_id = xxhash.xxh3_128_hexdigest(repr((names, first.header.metadata)).encode())
    return [replace(one, info=replace(one.info, run_id=run_id)) for one in ordered]


def _named(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The same, each with a name of its own: coefficients and reports refer to it."""
    paths = {one.path for one in checkpoints}
    above = Path(os.path.commonpath([path.parent for path in paths]))
    is_short = len({path.name for path in paths}) == len(paths)
    counts = Counter(one.path for one in checkpoints)
    made = []
    for one in checkpoints:
        name = one.path.name if is_short else one.path.relative_to(above).as_posix()
        of_two = counts[one.path] > 1 and not isinstance(one.profile, Point)
        made.append(replace(one, label=f"{name} (average)" if of_two else name))
    return made


def beside_snapshots(snapshots: Sequence[Snapshot], checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints of the training that wrote these snapshots, to be combined with them.

    Their steps become times of the run, and of their tensors those remain that the newest snapshot has.

    Raises:
        MismatchError: a tensor is missing, has another shape, or cannot be averaged; or two have one time.
    """
    newest = max(snapshots, key=lambda snapshot: snapshot.info.t)
    clock = run_clock([snapshot.info for snapshot in snapshots])
    made = []
    for one in checkpoints:
        pair = f"{newest.path} and {one.path}"
        if not isinstance(one.profile, Point):
            raise MismatchError(pair, "are averages of two libraries", "open one of them")
        for name, tensor in newest.info.tensors.items():
            found = one.stored.get(name)
            if found is None:
                raise MismatchError(
                    pair,
                    f"are of different models: {one.name} has no {shown(name)}",
                    "choose tensors by include, exclude or prefix",
                )
            if found.shape != newest.stored[name].shape:
                reason = f"have shapes {list(newest.stored[name].shape)} and {list(found.shape)}"
                raise MismatchError(f"tensor {shown(name)} of {pair}", reason)
            if tensor.role == "average" and found.dtype not in EPS:
                raise MismatchError(f"tensor {shown(name)} of {pair}", "is no floating-point number in the latter")
        t = float(clock.time_at(one.info.step))
        like = newest.info
        info = replace(
            one.info, run_id=like.run_id, t=t, t_unit=like.t_unit, t_first=t,
            tensors=like.tensors, aliases=like.aliases, left_out=like.left_out,
        )  # fmt: skip
        made.append(replace(one, info=info, of=Point(t)))
    return made


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    pair = f"{first.path} and {other.path}"
    names = [{*one.stored, *one.info.aliases} for one in (first, other)]
    if names[0] != names[1]:
        differing = sorted(names[0] ^ names[1])
        only = first if differing[0] in names[0] else other
        reason = f"are of different models: only {only.name} has {names_in(differing[:1])}"
        reason += f", and {len(differing) - 1} more differ" * (len(differing) > 1)
        raise MismatchError(pair, reason, "choose tensors by include, exclude or prefix")
    if first.info.aliases != other.info.aliases:
        tied = sorted(first.info.aliases.keys() ^ other.info.aliases.keys()) or sorted(first.info.aliases)
        raise MismatchError(pair, f"differ in what {shown(tied[0])} is tied to")
    for name, entry in first.stored.items():
        found = other.stored[name]
        if entry.shape != found.shape:
            reason = f"have shapes {list(entry.shape)} and {list(found.shape)}"
            raise MismatchError(f"tensor {shown(name)} of {pair}", reason)
        roles = {one.info.tensors[name].role for one in (first, other)}
        if len(roles) > 1:
            words = [DTYPES[one.stored[name].dtype].torch_name for one in (first, other)]
            raise MismatchError(f"tensor {shown(name)} of {pair}", f"is of {words[0]} and of {words[1]}")


def describe_checkpoints(place: Path, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Times, tensors and sizes from the indexes of files alone, for JSON; its kind is "checkpoints"."""
    newest = checkpoints[-1]
    return {
        "kind": "checkpoints",
        "path": str(place),
        "run": newest.info.run_id,
        "t_unit": newest.info.t_unit,
        "t": newest.info.t,
        "step": newest.info.step,
        **describe_tensors(newest),
        "bytes": sum(one.header.file_bytes for one in checkpoints),
        "checkpoints": list_checkpoints(checkpoints),
    }


def list_checkpoints(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """The file, time, content and identity of each, for JSON."""
    return [
        {
            "file": one.name,
            "t": one.info.t,
            "holds": one.holds,
            "bytes": one.header.file_bytes,
            "identity": one.header.metadata["ema.checksum"],
        }
        for one in checkpoints
    ]
