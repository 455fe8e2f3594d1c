"""The own states of this package's trackers in other programs' checkpoints, and the runs that these
trackers wrote.

A state is known by its content, wherever it lies: a number that is its version, and beside it the
JSON text of `tracker.state.StateInfo`, with the run id. Its tensors are none of the model's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, PostHocError
from posthoc_cli.snapshots.decoding import RunId, convert
from posthoc_cli.snapshots.directory import is_snapshot_name, list_directory, read_snapshot
from posthoc_cli.snapshots.strict_json import parse_object

VALUES = ("version", "info")
TENSORS = ("mean", "high", "copies")
_LEVELS = 4  # of folders around checkpoints that are searched for a run: a moved project keeps its
_PARTS = 3  # last parts of the path of a run, which begin in one of these folders


@dataclass(frozen=True)
class TrackerState:
    """The state of a tracker in a checkpoint, as far as it names the tracker's run and averages."""

    run_id: RunId
    directory: str = ""  # of the snapshots, when it was saved; empty in states of earlier releases
    # lengths of the averages that a callback saved beside it, by key; the empty key is for what
    # the state itself lies in
    averages: dict[str, str] = field(default_factory=dict)
    path: str = ""  # the keys that lead to it, joined by dots

    def below(self, key: str) -> TrackerState:
        """Return the state in a checkpoint that has this key for what it was found in."""
        return replace(self, path=f"{key}.{self.path}".rstrip("."))

    @property
    def average_paths(self) -> dict[str, str]:
        """The lengths of the averages beside it, by the keys that lead to each, joined by dots."""
        outer, _, _ = self.path.rpartition(".")
        return {f"{outer}.{key}".strip("."): length for key, length in self.averages.items()}


def find_trackers(values: Mapping[str, Any]) -> list[TrackerState]:
    """Find the states of trackers among the values of a checkpoint."""
    found = []
    for name, text in values.items():
        path, _, last = name.rpartition(".")
        version = values.get(f"{path}.version".lstrip("."))
        if last != "info" or not isinstance(text, str) or type(version) is not int:
            continue
        with suppress(FileFormatError, ValueError):
            info = parse_object(Path(name), text, "state") | {"path": path}
            found.append(convert(info, TrackerState))
    return found


def note_trackers(
    place: str | Path,
    states: Iterable[TrackerState],
    runs: Collection[Path] = (),
) -> list[str]:
    """Name the run of each state at a place, in a line, and each further one of the `runs`, folders
    of snapshots that were found there."""
    by_run = {state.run_id: state for state in states}
    others = [*dict.fromkeys(runs)]
    lines = []
    for state in by_run.values():
        text = "holds the state of a tracker, whose snapshots make more exact averages: "
        run = _find_run(state, [*others, *_list_places(place, state)])
        if run is not None:
            text += f"name {run}"
        elif state.directory:
            text += f"they are not in {state.directory} any more"
        else:
            text += f"their run is {state.run_id}"
        lines.append(text)
        others = [other for other in others if other != run]
    for run in others:
        lines.append(f"holds the snapshots of a tracker, too: name {run} for averages of these")
    return lines


def _find_run(state: TrackerState, folders: Iterable[Path]) -> Path | None:
    """Find the folder with the snapshots of a tracker."""
    for folder in folders:
        with suppress(PostHocError):
            for entry in list_directory(folder):
                if is_snapshot_name(entry):
                    if read_snapshot(entry).run_id == state.run_id:
                        return folder
                    break
    return None


def _list_places(place: str | Path, state: TrackerState) -> Iterator[Path]:
    """List where the folder of a run may be: as a project may have been moved, in the folders
    around the checkpoints first, and then where it was."""
    if not state.directory:
        return
    path = files.expand_user(place)
    parts = Path(state.directory).parts[1:]
    if not files.is_url(path):
        for folder in [path, *path.parents][:_LEVELS]:
            for count in range(1, min(_PARTS, len(parts)) + 1):
                yield folder.joinpath(*parts[-count:])
    yield Path(state.directory)
