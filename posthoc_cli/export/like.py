"""The checkpoint, or model folder, that an output is a copy of: which of its tensors are replaced,
under which names, and which files beside them are copied.

Links that lead out of a folder are not followed: an output may be uploaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from posthoc_cli import files
from posthoc_cli.checkpoints.layouts import Stored
from posthoc_cli.dtypes import DTYPES, EPS, WORDS
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, shown
from posthoc_cli.export.copies import Chunk, Replaced, Replacement, chunks_of
from posthoc_cli.export.options import INDEX_ENDING
from posthoc_cli.snapshots.outputs import model_files, weights_at
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry, read_file
from posthoc_cli.synthesis.plan import Combination

P = TypeVar("P", bound=Combination)

_MODEL = re.compile(
    r"(?:(?:pytorch|tf|flax|diffusion|adapter|rust)_)*(?:model|consolidated)(?:[-.][-.\w]*)?"
    r"\.(?:safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ckpt|index\.json)"
)
"""The names of weights in a model folder. Next to the averaged ones those in other formats are out
of date."""

_OTHER_FOLDERS = re.compile(
    r"(?:checkpoint|ckpt|epoch|step)[-_]?\d+|runs|logs|wandb", re.IGNORECASE
)
"""The names of folders in the output of a training that are no part of its model: other
checkpoints, of which a Trainer keeps many, and logs."""


@dataclass(frozen=True)
class Like:
    """A checkpoint, and the set of its tensors that an output replaces."""

    path: Path  # the file, or the folder
    place: Path  # of the model: the path itself, or the component of a pipeline
    source: Source  # the set
    chunks: Mapping[str, list[Chunk]]  # of the set, by stored name
    word: str  # what it is: "average" or "weights"

    @classmethod
    def find(
        cls,
        like: Path | str,
        tensors: Iterable[str],
        weights: bool,
        average: str | None,
    ) -> Like:
        """Return the average of a checkpoint, or if it has none its weights; of a pipeline, that of
        the only component that has some of these tensors.

        Raises InvalidValueError if nothing is there, for something in a folder that is neither a
        file nor a link to a file in it, or for a file of this package; and FileFormatError.
        """
        path = files.local_path("like", files.expanded(like))
        if path.name.endswith(INDEX_ENDING):
            path = path.parent
        if not path.exists():
            raise InvalidValueError("like", "no such file or folder", value=path)
        place = _component(path, set(tensors))
        stored = Stored(place, average)
        source = None if weights else stored.average
        own = {} if source is None else _own_chunks(source, stored)
        if source is not None and own:
            found = cls(path, place, source, own, "average")
        else:
            source = source or stored.weights
            found = cls(path, place, source, chunks_of(source), "weights")
        found._check_files()
        return found

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def dtype(self) -> str | None:
        """The torch name of the dtype of all floating-point tensors; None if they have several
        dtypes."""
        dtypes = {self.source.entries[name].dtype for name in self.chunks}
        dtypes &= EPS.keys()
        if len(dtypes) != 1:
            return None
        word = DTYPES[dtypes.pop()].torch_name
        return word if word in WORDS else None

    # --- files

    @cached_property
    def files(self) -> dict[Path, str]:
        """The files of the model, with their paths in the folder."""
        if not self.is_folder:
            return {self.path: ""}
        names = dict[Path, str]()
        for file in self.source.files:
            names[file.path] = str(file.path.relative_to(self.path))
        return names

    @cached_property
    def beside(self) -> tuple[dict[str, Path], list[str]]:
        """The other files of a folder to copy, by their paths in it, and what is left out."""
        copied = dict[str, Path]()
        left_out = list[str]()
        folders = [self.path] if self.is_folder else []
        while folders:
            for entry in sorted(folders.pop().iterdir()):
                name = str(entry.relative_to(self.path))
                if self._is_left_out(entry):
                    left_out.append(name)
                elif _is_folder(entry):
                    if not entry.name.startswith("."):
                        folders.append(entry)
                elif entry not in self.files:
                    copied[name] = entry
        return copied, left_out

    def _is_left_out(self, entry: Path) -> bool:
        if _is_folder(entry):
            if entry == self.place or entry in self.place.parents:
                return False
            return _OTHER_FOLDERS.fullmatch(entry.name) is not None
        if entry.parent != self.place or entry in self.files:
            return False
        return self._is_stale(entry.name)

    def _is_stale(self, name: str) -> bool:
        """Return whether a file holds the model's weights, too, in another format."""
        names = [path.name for path in self.files]
        names = list(filter(_MODEL.fullmatch, names))
        if not names or not _MODEL.fullmatch(name):
            return False
        indices = [Path(each).suffix + INDEX_ENDING for each in names]
        return not name.endswith(tuple(indices))

    def _check_files(self) -> None:
        for path in {file.path for file in self.source.files}:
            if not path.is_relative_to(self.path):
                reason = f"the tensors to replace are in {path}: name that file"
                raise InvalidValueError("like", reason, value=self.path)
            if path.suffix == SUFFIX and read_file(path).kind is not None:
                reason = f"{path.name} was written by this package, with checksums"
                hint = "name a file that the training or its library wrote"
                raise InvalidValueError("like", reason, hint, value=self.path)
        for path in (*self.beside[0].values(), *self.files):
            if self.is_folder and not _is_own(path, self.path):
                name = path.relative_to(self.path)
                reason = f"{name} is not a file of this folder, or leads out of it"
                hint = "remove it, or put a copy of the file in its place"
                raise InvalidValueError("like", reason, hint, value=self.path)

    # --- tensors

    def fitted(self, plan: P) -> tuple[P, Replacement]:
        """Return what an output of these tensors has in place of the checkpoint's, and the plan of
        it.

        Raises MismatchError for a tensor that has another shape in the checkpoint or is not in it,
        two tensors that are one in it, or quantized weights.
        """
        # a model of another program does not say which tensors are averages
        averages = plan.newest.averages or [
            name for name, tensor in plan.tensors.items() if tensor.dtype in EPS
        ]
        stored = self._stored_names(plan.names, averages)
        self._check_quantized([stored[name] for name in averages])
        replaced = self._replaced(plan, stored)
        written = set[str]()
        for tensor in replaced.values():
            written.update(chunk.name for chunk in tensor.chunks)
        beside, left_out = self.beside
        replacement = Replacement(
            path=self.path,
            word=self.word,
            tensors={plan.names[name][0]: tensor for name, tensor in replaced.items()},
            kept=[name for name in self.chunks if name not in written],
            shared=[name for name in averages if self.chunks.keys().isdisjoint(stored[name])],
            files=self.files,
            beside=beside,
            left_out=left_out,
        )
        dtypes = {name: tensor.entry.dtype for name, tensor in replaced.items()}
        return replace(plan, dtypes=dtypes, subset=frozenset(replaced)), replacement

    def _stored_names(
        self,
        names: Mapping[str, Sequence[str]],
        averages: Collection[str],
    ) -> dict[str, set[str]]:
        """Return the names under which the checkpoint stores tensors; it may have no such names."""
        rename = self._renaming([names[name] for name in averages])
        stored = dict[str, set[str]]()
        for name, aliases in names.items():
            renamed = map(rename, aliases)
            stored[name] = {self.source.aliases.get(alias, alias) for alias in renamed}
        return stored

    def _check_quantized(self, averages: Iterable[set[str]]) -> None:
        config = self.place / "config.json"
        is_quantized = config.is_file() and b'"quantization_config"' in config.read_bytes()
        for names in averages:
            for name in names & self.source.entries.keys():
                is_quantized |= self.source.entries[name].dtype not in EPS
        if is_quantized:
            reason = "its weights are quantized, as its quantization_config or their dtype says"
            hint = "take a folder that the trained model itself was saved to"
            raise MismatchError(self.place, reason, hint)

    def _replaced(self, plan: Combination, stored: Mapping[str, set[str]]) -> dict[str, Replaced]:
        """Return the places of tensors, given their names in the checkpoint."""
        replaced = dict[str, Replaced]()
        owners = dict[str, str]()
        for name, names in stored.items():
            dtype = plan.output_dtype(name)
            for one in sorted(names & self.chunks.keys()):
                owner = owners.setdefault(one, name)
                if owner != name:
                    self._check_equal(plan, owner, name)
                    continue
                entry = self.source.entries[one]
                check_shape(self.chunks[one][0].path, one, entry.shape, plan.box(name).shape)
                are_numbers = entry.dtype in EPS and dtype in EPS
                if not are_numbers and entry.dtype != dtype:
                    continue
                place = replaced.setdefault(name, Replaced(entry, []))
                if place.entry != entry:
                    reason = f"tensor {shown(name)} is {place.entry.dtype} and {entry.dtype} in it"
                    raise MismatchError(self.place, reason)
                place.chunks.extend(self.chunks[one])
        return replaced

    def _check_equal(self, plan: Combination, one: str, other: str) -> None:
        """Raise a MismatchError unless two tensors have the same values; they may then be tied."""
        for source in plan.sources:
            if not torch.equal(source.tensor(one), source.tensor(other)):
                reason = f"tensors {shown(one)} and {shown(other)} are one in it"
                raise MismatchError(self.place, reason, "they would get different values")

    def _renaming(self, averages: Sequence[Sequence[str]]) -> _Renaming:
        """Return what turns names of the run into those of the set, which may begin otherwise."""
        known = self.source.entries.keys() | self.source.aliases.keys()
        absent = sorted(names[0] for names in averages if known.isdisjoint(names))
        if not absent:
            return _Renaming("", "")
        first = min(averages, key=len)[0]
        ends = [first]
        while "." in ends[-1]:
            _, _, rest = ends[-1].partition(".")
            ends.append(rest)
        for end in ends:
            old = first.removesuffix(end)
            beginnings = [name.removesuffix(end) for name in known if _ends_with(name, end)]
            renamings = [_Renaming(old, new) for new in sorted(beginnings)]
            fitting = [renaming for renaming in renamings if renaming.fits(averages, known)]
            if len(fitting) > 1:
                reason = f"the names of the run fit under {fitting[0].new} and {fitting[1].new}"
                raise MismatchError(self.place, reason, "name one of them by `average`")
            if fitting:
                return fitting[0]
        reason = f"{len(absent)} tensors of the run are not in it, such as {absent[0]!r}"
        hint = (
            "take a file or folder that the trained model itself was saved to; if transformers "
            "renames them on disk, as the experts of a mixture, load the averages into the model "
            "(load_into) and save that by save_pretrained"
        )
        raise MismatchError(self.place, f"{reason}; it has tensors such as {min(known)!r}", hint)


@dataclass(frozen=True)
class _Renaming:
    """Another beginning of names."""

    old: str
    new: str

    def __call__(self, name: str) -> str:
        if not name.startswith(self.old):
            return name
        return self.new + name.removeprefix(self.old)

    def fits(self, tensors: Iterable[Sequence[str]], known: AbstractSet[str]) -> bool:
        """Return whether one of the names of each tensor becomes a known one."""
        return not [names for names in tensors if known.isdisjoint(map(self, names))]


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _component(path: Path, tensors: set[str]) -> Path:
    """Return the component of a pipeline that has some of these tensors, if it is the only one;
    else the path itself."""
    if not path.is_dir() or weights_at(path) is not None:
        return path
    components = list[Path]()
    for entry in sorted(path.iterdir()):
        weights = weights_at(entry) if entry.is_dir() else None
        if weights is not None:
            found = [read_file(file) for file in model_files(weights)]
            if any(not tensors.isdisjoint(file.entries) for file in found):
                components.append(entry)
    return components[0] if len(components) == 1 else path


def check_shape(path: Path, name: str, found: Sequence[int], average: Sequence[int]) -> None:
    """Raise a MismatchError that names the file if a tensor does not have the shape of its
    average."""
    if tuple(found) != tuple(average):
        reason = f"tensor {name!r} has the shape {list(found)}, the average {list(average)}"
        raise MismatchError(path, reason)


def _own_chunks(average: Source, stored: Stored) -> dict[str, list[Chunk]]:
    """Return the chunks of an average that are not also the weights', which complete it."""
    places = set[tuple[Path, Entry]]()
    with suppress(FileFormatError):  # which of its tensors are the weights is unclear
        for chunks in chunks_of(stored.weights).values():
            places.add((chunks[0].path, chunks[0].entry))
    own = dict[str, list[Chunk]]()
    for name, chunks in chunks_of(average).items():
        if (chunks[0].path, chunks[0].entry) not in places:
            own[name] = chunks
    return own


def _is_own(path: Path, folder: Path) -> bool:
    """Return whether a path in a folder is a file of the folder, or a link to one.

    In the cache of the Hugging Face Hub, files are links to the blobs of their repository:
    snapshots/<revision>/<name> -> ../../blobs/<hash>.
    """
    real = Path(os.path.realpath(path))
    root = Path(os.path.realpath(folder))
    if not real.is_file():
        return False
    if real.is_relative_to(root):
        return True
    for parent in root.parents:
        if parent.name == "snapshots":
            return real.parent == parent.parent / "blobs"
    return False
