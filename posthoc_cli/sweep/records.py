"""What a sweep has measured: a line a trial in `trials.jsonl`, on the disk before the next one counts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError

NAME = "trials.jsonl"


@dataclass(frozen=True)
class Record:
    """One trial.

    Attributes:
        target: its title, such as `sigma_rel 0.15`; `raw` for weights that are no average.
        x: the searched parameter; 0 for raw weights.
        seed: given to the command.
        value: the metric; None for a failed trial.
        standard_error: of the value, where the evaluation states one.
        predicted_error: of the weights, None where it is not known.
        seconds: how long the evaluation took.
        error: why it failed.
        log: path of its log without the endings .out and .err, relative to the folder of the sweep.
    """

    target: str
    x: float
    seed: int
    value: float | None
    standard_error: float | None
    predicted_error: float | None
    seconds: float
    error: str | None
    log: str


class Records:
    """The trials of one question, in the file that may hold those of others.

    Arguments:
        folder: of the sweep.
        question: what makes trials comparable: the run, its time, the command, the metric, ...; plain values.
    """

    def __init__(self, folder: Path, question: Mapping[str, Any]) -> None:
        self._path, self._question = folder / NAME, json.loads(json.dumps(question))

    def read(self) -> list[Record]:
        """The trials of this question; a line that a crash has cut off is none.

        Raises:
            FileFormatError: the file cannot be read.
        """
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileFormatError(self._path, (error.strerror or str(error)).lower()) from error
        found = []
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["question"] == self._question:
                    found.append(Record(**entry["trial"]))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return found

    def append(self, record: Record) -> None:
        """Write a trial down; a WriteError."""
        line = json.dumps({"question": self._question, "trial": asdict(record)}, allow_nan=False)
        with files.reported_as_write_error(self._path):
            descriptor = files.system.open_append(self._path)
            try:
                # What a crash has cut off must not take this line with it.
                size = os.fstat(descriptor).st_size
                torn = size > 0 and files.read_at(descriptor, 1, size - 1) != b"\n"
                files.write_at(descriptor, f"{chr(10) * torn}{line}\n".encode(), size)
                files.system.fsync(descriptor)
            finally:
                files.system.close(descriptor)
