"""A tracker's state as a file, for those who have no checkpoint of their own. Tensors pass one at a time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.errors import FileFormatError, InvalidValueError, ModelMismatchError, NonFiniteError, OutputExistsError
from posthoc_cli.snapshots.format import TensorSpec
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.reader import TensorFile, read_header
from posthoc_cli.snapshots.states import (
    COPY,
    decode_state,
    recent_prefix,
    state_metadata,
    tensor_name,
    tensors_with,
    total_prefix,
)
from posthoc_cli.snapshots.tensors import stored_name, tensor_bytes, tensor_from_bytes
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.state import TrackerState, as_dict, state_info


class Savable(ABC):
    """A tracker that keeps its state in files; see `PostHocEMA`."""

    settings: Settings

    @property
    @abstractmethod
    def _follows(self) -> bool:
        """Whether another process of the group keeps the averages."""

    @abstractmethod
    def _state(self) -> TrackerState:
        """What a tracker would continue from; its tensors are copies."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""

    def save_state(self, path: str | Path) -> None:
        """Write the tracker's own state to a safetensors file: whole or not at all, durable, checksummed.

        The averages are copied first, so that training may go on, and go to the file one after the other. A state that
        is there already is replaced when the new one is durable. The file may lie in the snapshot directory. In the
        processes of a group that keep no averages nothing is written: all may make the call, with the same path.

        Raises:
            OutputExistsError: something else is there under that name.
            WriteError: the system refused; nothing partial is left, and an older state is as it was.
        """
        path = _checked_path(path)
        if not self._follows:
            write_state(path, self._state(), self.settings)

    def load_state(self, path: str | Path) -> None:
        """Continue exactly from a file of `save_state`, as `load_state_dict` does. Tensors are read one by one.

        A process that keeps no averages takes the counters, or nothing where the file is on another machine's disk.

        Raises:
            FileFormatError: no such file, not a state, or damaged.
            others: as `load_state_dict`.
        """
        path = _checked_path(path)
        if self._follows and not path.exists():
            return
        with open_state(path) as state:
            self.load_state_dict(state)


def write_state(path: Path, state: TrackerState, settings: Settings) -> None:
    """Write a state. See `PostHocEMA.save_state`."""
    _check_replaceable(path)
    tensors = dict(_named_tensors(state))
    specs = [TensorSpec(name, stored_name(one.dtype, name), tuple(one.shape)) for name, one in tensors.items()]
    with TensorFileWriter(path, specs, state_metadata(state_info(state, settings)), overwrite=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor_bytes(tensor))
        writer.commit()


@contextmanager
def open_state(path: Path) -> Iterator[dict[str, Any]]:
    """A state as `pack_state` gives it, except that its tensors are read when they are asked for.

    Raises:
        FileFormatError: the file cannot be opened, is no state, or is damaged; of a tensor also when it is read.
    """
    with TensorFile(path) as file:
        info = decode_state(path, file.header)
        totals = {repr(sigma_rel): _StoredTensors(file, total_prefix(sigma_rel)) for sigma_rel in info.sigma_rels}
        recent = {repr(sigma_rel): _StoredTensors(file, recent_prefix(sigma_rel)) for sigma_rel in info.sigma_rels}
        try:
            yield as_dict(info) | {"totals": totals, "recent": recent, "copies": _StoredTensors(file, COPY)}
        except (InvalidValueError, ModelMismatchError, NonFiniteError) as error:
            raise type(error)(path, str(error)) from error


class _StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of one kind in a file, by the model's names; each is read, and verified, when it is asked for."""

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self._file = file
        self._names = tensors_with(prefix, file.header)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._file.header.tensors[self._names[name]]
        return tensor_from_bytes(self._file.read(self._names[name]), entry.dtype, entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _named_tensors(state: TrackerState) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with the names that they have in the file; none before the first update."""
    kept = state.averages.accumulators
    if kept is None:
        return
    for sigma_rel, total, recent in zip(state.averages.sigma_rels, kept.totals, kept.recent, strict=True):
        for prefix, tensors in ((total_prefix(sigma_rel), total), (recent_prefix(sigma_rel), recent)):
            for name, value in tensors.views.items():
                yield tensor_name(prefix, name), value
    for name, value in state.averages.copies.items():
        yield tensor_name(COPY, name), value


def _checked_path(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InvalidValueError("path", "must be the path of a file", value=f"{path!r}")
    return Path(path)


def _check_replaceable(path: Path) -> None:
    """Only a state may be replaced: not a snapshot, nor anything else that somebody keeps under that name."""
    if not os.path.lexists(path) or path.is_dir():
        return  # the writer says what is wrong with a directory
    try:
        kind = file_kind(read_header(path))
    except FileFormatError as error:
        raise OutputExistsError(
            path, "is there already, and cannot be read as a state", "choose another name"
        ) from error
    if kind != "state":
        raise OutputExistsError(path, "is there already, and is no tracker's state", "choose another name")
