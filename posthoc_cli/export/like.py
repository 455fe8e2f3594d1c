"""The checkpoint, or model folder, that an output is a copy of: which of its tensors are replaced,
under which names, and which files beside them are copied.

Links that lead out of a folder are not followed: an output may be uploaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.checkpoints.layouts import stored_in
from posthoc_cli.dtypes import DTYPES, EPS, WORDS
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, shown
from posthoc_cli.export.copying import Chunk, Placed, check_apart, chunks_of
from posthoc_cli.export.layouts import INDEX_ENDING, Arrangement, Copied, check_shape
from posthoc_cli.snapshots.outputs import model_files, weights_at
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry, read_file

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
    word: str  # what it is: "average" or "weights"
    chunks: Mapping[str, list[Chunk]]  # of the set, by stored name

    @classmethod
    def find(
        cls,
        like: Path | str,
        tensors: Iterable[str],
        weights: bool = False,
        average: str | None = None,
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
        word = "weights"
        if weights or average is not None:
            source: Source = stored_in(place, weights, average)
        else:
            source, weights = _default_set(place)
        found = chunks_of(source)
        if not weights:
            word = "average"
            found = _own_chunks(found, place)
        made = cls(path, place, source, word, found)
        made._check_files()
        return made

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def dtype(self) -> str | None:
        """The torch name of the dtype of all floating-point tensors; None if they have several
        dtypes."""
        dtypes = {self.source.entries[name].dtype for name in self.chunks} & EPS.keys()
        words = [DTYPES[dtype].torch_name for dtype in dtypes]
        return words[0] if len(words) == 1 and words[0] in WORDS else None

    @property
    def _files(self) -> dict[Path, str]:
        """The files of the model, with their paths in the folder."""
        if not self.is_folder:
            return {self.path: ""}
        paths = sorted({file.path for file in self.source.files})
        return {path: str(path.relative_to(self.path)) for path in paths}

    @cached_property
    def _beside(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        """The other files of a folder to copy, by their paths in it, and what is left out."""
        copied = dict[str, Path]()
        left_out = list[str]()
        for base, folders, names in os.walk(self.path):
            entries = sorted(Path(base, name) for name in (*folders, *names))
            folders.clear()
            for entry in entries:
                name = str(entry.relative_to(self.path))
                is_folder = entry.is_dir() and not entry.is_symlink()
                if self._is_left_out(entry, is_folder):
                    left_out.append(name)
                elif not is_folder:
                    copied[name] = entry
                elif not entry.name.startswith("."):
                    folders.append(entry.name)
        for name in self._files.values():
            copied.pop(name, None)
        return copied, tuple(left_out)

    def _is_left_out(self, entry: Path, is_folder: bool) -> bool:
        if is_folder:
            is_other = _OTHER_FOLDERS.fullmatch(entry.name) is not None
            return is_other and entry not in (self.place, *self.place.parents)
        if entry.parent != self.place or entry in self._files or not _MODEL.fullmatch(entry.name):
            return False
        names = [path.name for path in self._files if _MODEL.fullmatch(path.name)]
        indices = {f"{Path(name).suffix}{INDEX_ENDING}" for name in names}
        return bool(names) and not entry.name.endswith(tuple(indices))

    def _check_files(self) -> None:
        for path in {chunk.path for chunks in self.chunks.values() for chunk in chunks}:
            if not self.is_folder and path != self.path:
                reason = f"the tensors to replace are in {path}: name that file"
                raise InvalidValueError("like", reason, value=self.path)
            if path.suffix == SUFFIX and read_file(path).kind is not None:
                reason = f"{path.name} was written by this package, with checksums"
                hint = "name a file that the training or its library wrote"
                raise InvalidValueError("like", reason, hint, value=self.path)
        if not self.is_folder:
            return
        for path in (*self._beside[0].values(), *self._files):
            if not _is_own(path, self.path):
                name = path.relative_to(self.path)
                reason = f"{name} is not a file of this folder, or leads out of it"
                hint = "remove it, or put a copy of the file in its place"
                raise InvalidValueError("like", reason, hint, value=self.path)

    def arranged(
        self,
        entries: Mapping[str, Entry],
        names: Mapping[str, Sequence[str]],
        averages: Collection[str],
        are_equal: Callable[[str, str], bool],
    ) -> Arrangement:
        """Return how an output with these tensors is laid out.

        Arguments:
            entries: the shapes of the tensors.
            names: all names of each tensor.
            averages: the tensors that must be there, as floating-point numbers.
            are_equal: returns whether two tensors have the same values; they may then be tied.

        Raises MismatchError for a tensor that has another shape in the checkpoint or is not in it,
        two tensors that have bytes in common, or quantized weights.
        """
        rename = self._renaming([names[name] for name in averages])
        owners = dict[str, str]()
        places = dict[str, Placed]()
        for name, aliases in names.items():
            stored = {self._stored(rename(alias)) for alias in aliases} & self.chunks.keys()
            for one in sorted(stored):
                owner = owners.setdefault(one, name)
                if owner == name:
                    self._place(places, name, one, entries[name], name in averages)
                elif not are_equal(owner, name):
                    reason = f"tensors {shown(owner)} and {shown(name)} are one in it"
                    raise MismatchError(self.place, reason, "and would get different values")
        check_apart(places)
        others, left_out = self._beside if self.is_folder else ({}, ())
        kept = tuple(name for name in self.chunks if name not in owners)
        parts = {"": {name: placed.entry for name, placed in places.items()}}
        copied = Copied(self.path, self.word, kept, left_out, places, self._files)
        return Arrangement("like" if self.is_folder else "copy", parts, others, copied)

    def _stored(self, name: str) -> str:
        return self.source.aliases.get(name, name)

    def _place(
        self, places: dict[str, Placed], name: str, stored: str, entry: Entry, is_average: bool
    ) -> None:
        found = self.source.entries[stored]
        path = self.chunks[stored][0].path
        check_shape(path, stored, found.shape, entry.shape)
        if is_average and found.dtype not in EPS:
            self._refuse_quantized()
        if (
            not is_average
            and found.dtype != entry.dtype
            and not {found.dtype, entry.dtype} <= {*EPS}
        ):
            reason = f"tensor {shown(stored)} is {found.dtype}, and {entry.dtype} in the run"
            raise MismatchError(path, reason)
        placed = places.setdefault(name, Placed(found, []))
        if placed.entry != found:
            reason = f"tensor {shown(name)} is in it as {placed.entry.dtype} and {found.dtype}"
            raise MismatchError(path, reason)
        placed.chunks.extend(self.chunks[stored])

    def _refuse_quantized(self) -> None:
        reason = "its weights are quantized, as its quantization_config or their dtype says"
        hint = "take a folder that the trained model itself was saved to"
        raise MismatchError(self.place, reason, hint)

    def _renaming(self, averages: Sequence[Sequence[str]]) -> Callable[[str], str]:
        """Return what turns names of the run into those of the set, which may begin otherwise."""
        config = self.place / "config.json"
        if config.is_file() and b'"quantization_config"' in config.read_bytes():
            self._refuse_quantized()
        known = {*self.chunks} | {
            alias for alias, name in self.source.aliases.items() if name in self.chunks
        }
        absent = sorted(names[0] for names in averages if known.isdisjoint(names))
        if not absent:
            return _Renaming("", "")
        first = averages[0][0]
        parts = first.split(".")
        for count in range(len(parts)):
            end = ".".join(parts[count:])
            beginnings = {
                name.removesuffix(end) for name in known if f".{name}".endswith(f".{end}")
            }
            fitting = [
                renaming
                for beginning in sorted(beginnings)
                if (renaming := _Renaming(first.removesuffix(end), beginning)).fits(averages, known)
            ]
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
    """Names with another beginning."""

    old: str
    new: str

    def __call__(self, name: str) -> str:
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name

    def fits(self, tensors: Iterable[Sequence[str]], known: Collection[str]) -> bool:
        """Return whether one of the names of each tensor becomes a known one."""
        return all(any(self(name) in known for name in names) for names in tensors)


def _component(path: Path, tensors: set[str]) -> Path:
    """Return the component of a pipeline that has some of these tensors, if it is the only one;
    else the path itself."""
    if not path.is_dir() or weights_at(path) is not None:
        return path
    components = []
    for entry in sorted(path.iterdir()):
        weights = weights_at(entry) if entry.is_dir() else None
        if weights is not None:
            names = [name for file in model_files(weights) for name in read_file(file).entries]
            if tensors.intersection(names):
                components.append(entry)
    return components[0] if len(components) == 1 else path


def _default_set(place: Path) -> tuple[Source, bool]:
    """Return the average of a checkpoint, or its weights if it has no average, and which it is."""
    try:
        return stored_in(place), False
    except FileFormatError as error:
        if not error.reason.startswith("holds no average"):
            raise
    return stored_in(place, weights=True), True


def _own_chunks(found: dict[str, list[Chunk]], place: Path) -> dict[str, list[Chunk]]:
    """Return the chunks of an average without those that are the weights', which complete it."""
    try:
        weights = chunks_of(stored_in(place, weights=True))
    except FileFormatError:  # which of its tensors are the weights is unclear
        return found
    shared = set(map(tuple, weights.values()))
    own = {name: chunks for name, chunks in found.items() if tuple(chunks) not in shared}
    return own or found


def _is_own(path: Path, folder: Path) -> bool:
    """Return whether a path in a folder is a file of the folder, or a link to one.

    In the cache of the Hugging Face Hub, files are links to the blobs of their repository:
    snapshots/<revision>/<name> -> ../../blobs/<hash>.
    """
    real = Path(os.path.realpath(path))
    root = Path(os.path.realpath(folder))
    if not real.is_file():
        return False
    caches = [parent.parent for parent in root.parents if parent.name == "snapshots"]
    is_blob = bool(caches) and real.parent == caches[0] / "blobs"
    return is_blob or real.is_relative_to(root)
