"""Whether snapshots belong together: one run, one clock, the same tensors in every segment.

A snapshot directory: what is in it, whether it belongs together, and adding to it.

Names are for people (`<t, zero-padded>-<sigma_rel>.safetensors`); only headers are believed. Any snapshot can be
copied, moved or deleted on its own and the rest still works.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import takewhile
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import DirectoryError, FileFormatError, MismatchError, shown
from posthoc_cli.planning import USEFUL_RANGE, snapshots_to_drop
from posthoc_cli.reconstruction import measured_prior
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.format import by_segment
from posthoc_cli.snapshots.headers import Sharing, file_kind
from posthoc_cli.snapshots.measurements import stored_average
from posthoc_cli.snapshots.models import INDEX_NAME
from posthoc_cli.snapshots.reader import Snapshot, read_header
from posthoc_cli.snapshots.sharded import is_sharded, read_sharded, remove_snapshot


def time_order(snapshot: Snapshot) -> tuple[float, float, str]:
    """The key that sorts snapshots by time, then sigma_rel."""
    return snapshot.info.t, snapshot.info.sigma_rel, snapshot.path.name


def pairs_to_compare(snapshots: Sequence[Snapshot]) -> Iterator[tuple[Snapshot, Snapshot]]:
    """Of snapshots in order: each but the first beside the first of its segment, the first of each segment beside the
    first of all, and neighbours of different segments beside each other.
    """
    firsts: dict[int, Snapshot] = {}
    for index, snapshot in enumerate(snapshots):
        first = firsts.setdefault(snapshot.info.segment, snapshot)
        if first is not snapshot:
            yield first, snapshot
        elif index > 0:
            yield snapshots[0], snapshot
        if index > 1 and snapshots[index - 1].info.segment != snapshot.info.segment:
            yield snapshots[index - 1], snapshot


def difference(first: Snapshot, other: Snapshot) -> str | None:
    """Why a snapshot and a later one cannot be of one directory, as words that follow their names; None if they can."""
    a, b = first.info, other.info
    if a.run_id != b.run_id:
        return f"are of different runs ({a.run_id[:8]} and {b.run_id[:8]}); keep one run a directory"
    if a.t_unit != b.t_unit:
        return f"count time in {shown(a.t_unit)} and {shown(b.t_unit)}"
    # A run whose last snapshot of a profile was deleted may have gone on without that profile.
    if not (set(a.sigma_rels) <= set(b.sigma_rels) or set(b.sigma_rels) <= set(a.sigma_rels)):
        return (
            "do not match: their runs track the profiles "
            f"{', '.join(f'{s:g}' for s in a.sigma_rels)} and {', '.join(f'{s:g}' for s in b.sigma_rels)}"
        )
    if a.segment != b.segment:
        if a.t < b.t and a.segment < b.segment:
            return None
        return f"do not match: the segments {a.segment} and {b.segment} do not follow each other in time"
    return _tensor_difference(first, other)


def _tensor_difference(first: Snapshot, other: Snapshot) -> str | None:
    a, b = first.info, other.info
    tables = [(s.header.tensors, s.info.tensors) for s in (first, other)]
    same = tables[0] == tables[1]  # mostly the same objects
    for name in () if same else sorted(a.tensors.keys() | b.tensors.keys()):
        if name not in a.tensors or name not in b.tensors:
            missing = other if name in a.tensors else first
            return f"do not match: tensor {shown(name)} is missing in {missing.path.name}"
        shapes = [list(s.header.tensors[name].shape) for s in (first, other)]
        if shapes[0] != shapes[1]:
            return f"do not match: tensor {shown(name)} has the shapes {shapes[0]} and {shapes[1]}"
        if a.tensors[name] != b.tensors[name]:
            return (
                f"do not match: tensor {shown(name)} is {a.tensors[name].role} of {a.tensors[name].dtype} "
                f"and {b.tensors[name].role} of {b.tensors[name].dtype}"
            )
    return None if a.aliases == b.aliases else "do not match: they tie different names together"


def missing_at_newest(snapshots: Sequence[Snapshot]) -> list[str]:
    """Profiles that are missing at the newest time, where thinning never removes one.

    Not those that the run no longer tracks: it went on without them.
    """
    own = [s.info for s in snapshots if s.info.run_id == snapshots[0].info.run_id]
    newest = max((info.t for info in own), default=0.0)
    there = [info for info in own if info.t == newest]
    tracked = {sigma_rel for info in there for sigma_rel in info.sigma_rels}
    missing = ({info.sigma_rel for info in own} & tracked) - {info.sigma_rel for info in there}
    if not missing:
        return []
    return [f"t = {newest:,.12g}, the newest: no snapshot of sigma_rel {', '.join(f'{s:g}' for s in sorted(missing))}"]


# --- A snapshot directory: what is in it, whether it belongs together, and adding to it ------------


log = logging.getLogger(__name__)

SUPERSEDED = "superseded"
"""The folder of a snapshot directory for snapshots later than the time that training went back to."""

QUARANTINE = "quarantine"
"""The folder of a snapshot directory for files that are damaged, or that do not belong there."""


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot that is on disk: all that its header says, apart from where its bytes are.

    `checksum` is its header's: two trainings that went on from one state differ in it at equal times.
    """

    path: Path
    info: fmt.SnapshotInfo
    checksum: str

    @property
    def t(self) -> float:
        """Training time at which the average stood."""
        return self.info.t

    @property
    def sigma_rel(self) -> float:
        """Width of its profile."""
        return self.info.sigma_rel

    @classmethod
    def of(cls, snapshot: Snapshot) -> StoredSnapshot:
        """What is known of a snapshot that was read."""
        return cls(snapshot.path, snapshot.info, snapshot.header.metadata["ema.checksum"])


@dataclass(frozen=True)
class Inspection:
    """What is in a directory, good or bad.

    Attributes:
        snapshots: those that can be read, by time, then sigma_rel.
        problems: one line for each thing that is wrong.
        notes: one line for each that is strange and not wrong.
        leftovers: temporaries of interrupted writes.
        superseded: number of snapshots set aside.
    """

    snapshots: tuple[Snapshot, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    leftovers: tuple[Path, ...]
    superseded: int


# --- reading a directory ---------------------------------------------------------------------------


def read_directory(directory: Path) -> list[Snapshot]:
    """The snapshots of one run, by time, then sigma_rel. Reads headers only.

    Raises:
        DirectoryError: the directory is absent, cannot be read, or holds no snapshot.
        FileFormatError: a file in it is damaged.
        MismatchError: two files do not belong together; both are named.
    """
    snapshots = find_snapshots(directory)
    if not snapshots:
        raise _without_snapshots(directory)
    return snapshots


def find_snapshots(directory: Path) -> list[Snapshot]:
    """As `read_directory`, where it is no mistake that there is no directory or no snapshot yet."""
    try:
        entries = _entries(directory)
    except FileNotFoundError:
        return []
    for folder in closed_folders(entries):
        log.warning("%s: %s", directory, closed_text(folder))
    sharing = Sharing()
    found = (_open_candidate(path, sharing) for path in _snapshot_paths(entries))
    snapshots = sorted((snapshot for snapshot in found if snapshot is not None), key=time_order)
    for first, other in pairs_to_compare(snapshots):
        _check_pair(first, other)
    doubles = _doubles(snapshots)
    if doubles:
        raise doubles[0]
    return snapshots


def inspect_directory(directory: Path) -> Inspection:
    """Everything about a directory, without stopping at what is wrong.

    Raises:
        DirectoryError: the directory is absent, cannot be read, or holds nothing of this package.
    """
    try:
        paths = candidates(directory)
    except FileNotFoundError:
        raise _without_snapshots(directory) from None
    snapshots, problems, sharing = [], [], Sharing()
    for path in paths:
        try:
            snapshot = _open_candidate(path, sharing)
            if snapshot is not None:
                snapshots.append(snapshot)
        except FileFormatError as error:
            problems.append(str(error))
    if not snapshots and not problems:
        raise _without_snapshots(directory)
    snapshots.sort(key=time_order)
    for first, other in pairs_to_compare(snapshots):
        try:
            _check_pair(first, other)
        except MismatchError as error:
            problems.append(str(error))
    problems += map(str, _doubles(snapshots))
    aside = directory / SUPERSEDED
    return Inspection(
        snapshots=tuple(snapshots),
        problems=tuple(problems),
        notes=tuple(missing_at_newest(snapshots)),
        leftovers=tuple(files.leftovers(directory)),
        superseded=_count(aside),
    )


def _count(aside: Path) -> int:
    """How many snapshots were set aside; 0 where that folder is not there, or cannot be read."""
    try:
        return len(candidates(aside))
    except (FileNotFoundError, DirectoryError):
        return 0


def candidates(directory: Path) -> list[Path]:
    """Files, and directories with an index, that may be snapshots by their names.

    Raises:
        FileNotFoundError: there is no such directory.
        DirectoryError: it is no directory, or cannot be read.
    """
    return _snapshot_paths(_entries(directory))


def _entries(directory: Path) -> list[Path]:
    try:
        return files.system.list(directory)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise DirectoryError(
            directory, "is not a directory", "name the directory that a tracker writes its snapshots to"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise DirectoryError(f"{str(directory)!r}", f"cannot be read: {reason.lower()}") from error


def closed_folders(entries: Iterable[Path]) -> list[Path]:
    """Folders that may be snapshots, in shards, and cannot be entered."""
    found = []
    for path in entries:
        if path.suffix != fmt.SUFFIX and path.name not in (SUPERSEDED, QUARANTINE):
            try:
                (path / INDEX_NAME).lstat()
            except PermissionError:
                found.append(path)
            except OSError:
                pass
    return found


def closed_text(folder: Path) -> str:
    """What to say of one of `closed_folders`."""
    return f"{folder.name}/ cannot be entered; whether it is a snapshot is not known"


def _snapshot_paths(entries: Iterable[Path]) -> list[Path]:
    """Those that may be snapshots by their names: files, and directories with an index."""
    aside = (SUPERSEDED, QUARANTINE)
    visible = (path for path in entries if not path.name.startswith(".") and path.name not in aside)
    return sorted(path for path in visible if path.suffix == fmt.SUFFIX or is_sharded(path))


def _open_candidate(path: Path, sharing: Sharing) -> Snapshot | None:
    """The snapshot at a path; None for a synthesis, a tracker's state or a foreign file kept beside the snapshots."""
    try:
        if is_sharded(path):
            return read_sharded(path)
        header = read_header(path, sharing)
    except FileFormatError:
        if files.is_gone(path):
            return None  # a writer has thinned it away since the directory was listed
        raise
    if file_kind(header) in (None, "output", "state"):
        return None
    return Snapshot(path, header, decode_snapshot(path, header, sharing))


def _without_snapshots(directory: Path) -> DirectoryError:
    wanted = "name the directory that a tracker writes its snapshots to"
    if not directory.exists():
        return DirectoryError(directory, f"no such directory; {wanted}")
    strangers = sorted(p.name for p in files.system.list(directory) if p.suffix in (fmt.SUFFIX, ".pt", ".pkl"))
    hint = f" ({strangers[0]} is not a snapshot of this package)" if strangers else ""
    return DirectoryError(directory, f"no snapshots here; {wanted}{hint}")


def _check_pair(first: Snapshot, other: Snapshot) -> None:
    found = difference(first, other)
    if found is not None:
        raise MismatchError(f"{first.path} and {other.path}", found)


def _doubles(snapshots: Sequence[Snapshot]) -> list[MismatchError]:
    seen: dict[tuple[float, float], Snapshot] = {}
    problems = []
    for snapshot in snapshots:
        key = (snapshot.info.t, snapshot.info.sigma_rel)
        if key in seen:
            problems.append(
                MismatchError(
                    f"{seen[key].path} and {snapshot.path}",
                    f"both hold sigma_rel {key[1]:g} at t = {key[0]:,.12g}",
                    "remove one",
                )
            )
        seen.setdefault(key, snapshot)
    return problems


# --- adding to a directory -------------------------------------------------------------------------


def snapshot_path(directory: Path, t: float, sigma_rel: float) -> Path:
    """Where a snapshot goes: names sort by time, up to the largest whole number that a float holds exactly."""
    whole, _, fraction = f"{Decimal(repr(t)):f}".partition(".")
    clock = f"{int(whole):016d}" + (f".{fraction}" if fraction.strip("0") else "")
    return directory / f"{clock}-{sigma_rel!r}{fmt.SUFFIX}"


def newest_before(info: fmt.SnapshotInfo, stored: Sequence[StoredSnapshot]) -> list[StoredSnapshot]:
    """The two newest earlier snapshots of each profile that say how they were rounded; `stored` is in order of time.

    Two, since distances over one interval and over two tell a walk from noise.
    """
    newest: dict[float, list[StoredSnapshot]] = {sigma_rel: [] for sigma_rel in info.sigma_rels}
    for snapshot in takewhile(lambda s: s.info.segment == info.segment, reversed(stored)):
        own = newest.get(snapshot.sigma_rel, [])
        if snapshot.t < info.t and snapshot.info.measurements and len(own) < 2:
            own.insert(0, snapshot)
        if all(len(found) == 2 for found in newest.values()):
            break
    return [snapshot for found in newest.values() for snapshot in found]


def thin(
    stored: Sequence[StoredSnapshot], max_checkpoints: int | None, sigma_range: tuple[float, float] = USEFUL_RANGE
) -> list[StoredSnapshot]:
    """Leave `max_checkpoints` snapshots a profile and segment, those that reconstruction needs most.

    Those on the schedule are chosen as if there were no others, so that a training which was stopped in between keeps
    the same ones. Of those off the schedule the latest stay where room is left, and the newest of all snapshots always.
    Reads no tensor: what headers measured is at hand. See `planning.keeping`. Returns what is left, in order of time.
    """
    if max_checkpoints is None:
        return list(stored)
    return [left for segment in by_segment(stored) for left in _thin_segment(segment, max_checkpoints, sigma_range)]


def _thin_segment(
    stored: Sequence[StoredSnapshot], max_checkpoints: int, sigma_range: tuple[float, float]
) -> list[StoredSnapshot]:
    counts = Counter(snapshot.sigma_rel for snapshot in stored)
    if max(counts.values()) <= max_checkpoints:
        return list(stored)
    scheduled = on_schedule(stored)
    gone = _beyond(scheduled, max_checkpoints, sigma_range) + _off_schedule_beyond(stored, max_checkpoints)
    for snapshot in gone:
        log.debug("thinning: %s goes", snapshot.path)
        remove_snapshot(snapshot.path)
    return [snapshot for snapshot in stored if snapshot not in gone]


def _beyond(
    scheduled: Sequence[StoredSnapshot], max_checkpoints: int, sigma_range: tuple[float, float]
) -> list[StoredSnapshot]:
    """Those on the schedule that go, in the order to delete."""
    counts = Counter(snapshot.sigma_rel for snapshot in scheduled)
    if max(counts.values(), default=0) <= max_checkpoints:
        return []
    averages = [stored_average(snapshot.info) for snapshot in scheduled]
    profiles = [average.profile.pure for average in averages]
    prior = measured_prior(averages)
    return [scheduled[index] for index in snapshots_to_drop(profiles, prior, max_checkpoints, sigma_range)]


def _off_schedule_beyond(stored: Sequence[StoredSnapshot], max_checkpoints: int) -> list[StoredSnapshot]:
    """Those off the schedule that go, the earliest first."""
    newest = max(snapshot.t for snapshot in stored)
    others: dict[float, list[StoredSnapshot]] = defaultdict(list)
    for snapshot in stored:
        if snapshot.info.off_schedule:
            others[snapshot.sigma_rel].append(snapshot)
    scheduled = Counter(snapshot.sigma_rel for snapshot in on_schedule(stored))
    gone = []
    for sigma_rel, own in others.items():
        room = max(max_checkpoints - scheduled[sigma_rel], 0)
        gone += [snapshot for snapshot in own[: max(len(own) - room, 0)] if snapshot.t < newest]
    return gone


def on_schedule(stored: Sequence[StoredSnapshot]) -> list[StoredSnapshot]:
    """Those that every run of this schedule has, wherever it was stopped in between."""
    return [snapshot for snapshot in stored if not snapshot.info.off_schedule]


def set_aside(stored: Sequence[StoredSnapshot]) -> list[Path]:
    """Move snapshots to the folder `superseded` beside them, never replacing one; returns where they went."""
    if not stored:
        return []
    return move_aside([snapshot.path for snapshot in stored], stored[0].path.parent / SUPERSEDED)


def move_aside(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Move files and directories, durably, into a folder of their file system; returns where they went.

    Nothing there is replaced. What is gone from its place (moved by another hand, or an earlier try) is passed over.

    Raises:
        DirectoryError: the folder is a symbolic link, or no folder.
        WriteError: the system refused.
    """
    if folder.is_symlink():
        raise DirectoryError(folder, "is a symbolic link; snapshots would leave the directory", "remove it")
    if folder.exists() and not folder.is_dir():
        raise DirectoryError(folder, "is not a directory; snapshots are set aside in one of that name", "move it away")
    with files.reported_as_write_error(folder):
        files.make_directory(folder)
        moved = []
        for path in paths:
            if os.path.lexists(path):
                target = _free_name(folder / path.name)
                files.system.rename(path, target)
                moved.append(target)
        # First where they are now: a crash in between may leave both names, and never none.
        for directory in (folder, *sorted({path.parent for path in paths})):
            files.system.fsync_directory(directory)
    return moved


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while os.path.lexists(candidate):
        candidate = path.with_name(f"{path.stem}.{number}{path.suffix}")
        number += 1
    return candidate
