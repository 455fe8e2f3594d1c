"""The folder of a sweep: a record of its trials, with which the same sweep continues, and the lock
of the one that runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, OutputExistsError, quote
from posthoc_cli.snapshots.decoding import convert
from posthoc_cli.snapshots.directory import LOCK_NAME, DirectoryLock
from posthoc_cli.snapshots.opened_file import read_small_file
from posthoc_cli.sweep import images
from posthoc_cli.sweep.trial import LARGEST, Trial

TRIALS = "trials.jsonl"  # the settings of the sweep, then a trial a line
LOGS = "logs"
SCRATCH = ".scratch"  # a folder for each job, with the weights and files of its trial
_MOST_BYTES = 100_000_000  # of a record


@contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Make and lock the folder of a sweep; remove averages that a killed sweep has left, and at the
    end ours.

    Raises:
        OutputExistsError: the folder holds something else.
        LockedError: another sweep is running in it.
    """
    files.check_parent(out)
    files.check_folder(out)
    names = set[str]()
    if out.is_dir():
        names = {path.name for path in files.system.list(out)}
    if names - {LOCK_NAME, LOGS, SCRATCH} and TRIALS not in names:
        # A sweep might replace or remove files of other programs that have the same names as its
        # own.
        reason = "is not empty, and not the folder of a sweep"
        raise OutputExistsError(out, reason, "name another folder")
    files.make_directory(out / LOGS)
    with DirectoryLock(out):
        try:
            images.remove(out / SCRATCH)
            yield
        finally:
            images.remove(out / SCRATCH)


def read_trials(out: Path, settings: dict[str, Any], is_look: bool) -> list[Trial]:
    """Read the recorded trials that succeeded, the last of repeated ones; begin a record with the
    settings if there are none.

    Raises:
        FileFormatError: the file is no record of a sweep.
        OutputExistsError: the trials belong to a sweep with other settings.
    """
    path = out / TRIALS
    if not path.exists():
        _write_lines(out, [json.dumps(settings)])
        return []
    recorded = {}
    try:
        first, *entries = map(json.loads, _read_lines(path))
        known = {**first}
        for entry in entries:
            trial = _decode(entry)
            is_measured = trial.value is not None or is_look
            if is_measured and trial.error is None:
                recorded[trial.target, trial.seed] = trial
    except (ValueError, TypeError, RecursionError) as error:
        reason = "is not the record of a sweep"
        raise FileFormatError(path, reason, "name another folder") from error
    if not recorded:  # nothing to lose: the call may have been wrong
        _write_lines(out, [json.dumps(settings)])
        return []
    for name, value in settings.items():
        earlier = known.get(name, value)
        if earlier != value:
            reason = f"holds a sweep of another {name}, {quote(earlier)}"
            raise OutputExistsError(out, reason, "name another folder")
    return [*recorded.values()]


def record(out: Path, trial: Trial) -> None:
    """Add a trial durably to the record; raise a WriteError if that fails."""
    lines = _read_lines(out / TRIALS)
    line = json.dumps(asdict(trial), allow_nan=False)
    _write_lines(out, [*lines, line])


def _read_lines(path: Path) -> list[str]:
    return read_small_file(path, _MOST_BYTES).decode().splitlines()


def _write_lines(out: Path, lines: Sequence[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    files.write_atomically(out / TRIALS, text.encode(), overwrite=True)


def _decode(entry: Any) -> Trial:
    """Decode a recorded trial; raise a ValueError if a value is of another kind."""
    trial: Trial = convert(entry, Trial)
    if max(abs(trial.value or 0.0), trial.standard_error or 0.0) > LARGEST:
        raise ValueError("a metric that is too large")
    if trial.spot is not None:
        return replace(trial, target=trial.spot.title)
    return trial
