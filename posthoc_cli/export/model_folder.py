"""A copy of a model folder with averaged weights in place of the folder's own.

The folder determines how weights are laid out: names, files, dtypes, and the name under which a tied tensor is stored.
All other files are copied, except through links that lead out of the folder: an output may be uploaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.dtypes import DTYPES, EPS, WORDS
from posthoc_cli.errors import InvalidValueError, MismatchError
from posthoc_cli.export.layouts import Parts, check_shape
from posthoc_cli.snapshots.outputs import INDEX_SUFFIX, model_files
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry, TensorFile, read_file
from posthoc_cli.synthesis.plan import Plan

_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")  # of transformers, diffusers and PEFT
_ANOTHER = "take a folder that the trained model itself was saved to"
_RENAMED = (
    f"{_ANOTHER}; if transformers renames them on disk, as the experts of a mixture, load the averages into the model "
    "(load_into) and save that by save_pretrained"
)
_WEIGHTS = (SUFFIX, ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt")
"""The file name endings of weights, which are not copied: next to the averaged weights they would be out of date."""


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, or a pipeline's with the component whose weights are averaged ("" for the folder itself)."""

    path: Path
    component: str = ""

    @classmethod
    def find(cls, like: Path | str, tensors: Iterable[str]) -> ModelFolder:
        """Return a model folder; for a pipeline with the only component that has some of these tensors.

        Raises InvalidValueError for a path without weights in safetensors files, if no component, or several, fit the
        tensors, or for something in the folder that is neither a file nor a link to a file in the folder.
        """
        path, known, component = files.expanded(like), set(tensors), ""
        entries = sorted(path.iterdir()) if path.is_dir() else []
        parts = [entry.name for entry in entries if entry.is_dir() and _weights_at(entry) is not None]
        if _weights_at(path) is None and parts:
            fitting = [part for part in parts if known & cls(path, part).stored.keys()]
            if len(fitting) != 1:
                reason = f"has weights in: {', '.join(parts)}; with names of the run's in {len(fitting)}"
                hint = f"name the folder of one component, such as {path / parts[0]}"
                raise InvalidValueError("like", reason, hint, value=path)
            component = fitting[0]
        folder = cls(path, component)
        if _weights_at(folder.place) is None:
            names = " or ".join(f"{stem}{SUFFIX}" for stem in _STEMS)
            reason = f"has no weights: {names}, or their index" if path.is_dir() else "is not a folder"
            raise InvalidValueError("like", reason, value=folder.place)
        for file in (*folder.others.values(), *{stored.path for stored in folder.stored.values()}):
            if reason := _foreign(file, path):
                reason = f"{file.relative_to(path)} {reason}; only its own files are copied"
                raise InvalidValueError("like", reason, "remove it, or put a copy of the file in its place", value=path)
        return folder

    @property
    def place(self) -> Path:
        """The folder that holds the weights."""
        return self.path / self.component

    @cached_property
    def stored(self) -> dict[str, TensorFile]:
        """The file of each tensor in the folder."""
        weights = _weights_at(self.place)
        assert weights is not None, "find has checked it"
        return {name: file for file in map(read_file, model_files(weights)) for name in file.entries}

    @cached_property
    def others(self) -> dict[str, Path]:
        """The files to copy, by their path in the folder: all but the weights that are replaced, and hidden folders."""
        others = []
        for base, folders, names in os.walk(self.path):
            links = [name for name in folders if (Path(base) / name).is_symlink()]
            folders[:] = [name for name in folders if not name.startswith(".") and name not in links]
            is_replaced = Path(base) == self.place
            others += [Path(base, name) for name in (*links, *names) if not (is_replaced and _is_weights(Path(name)))]
        return {str(path.relative_to(self.path)): path for path in others}

    @property
    def dtype(self) -> str | None:
        """The torch name of the dtype of all floating-point tensors; None if they have several dtypes."""
        dtypes = {file.entries[name].dtype for name, file in self.stored.items()} & EPS.keys()
        word = DTYPES[dtypes.pop()].torch_name if len(dtypes) == 1 else ""
        return word if word in WORDS else None

    def arranged(self, plan: Plan) -> tuple[Plan, Parts]:
        """Return a plan whose tensors have the dtypes of this folder, and the tensors of each of its weight files.

        Raises MismatchError for a tensor that has another shape in the folder or is not in it, or quantized weights.
        """
        owners = {alias: name for name, aliases in plan.names.items() for alias in aliases}
        dtypes = {owners[name]: file.entries[name].dtype for name, file in self.stored.items() if name in owners}
        averaged = [name for name, tensor in plan.tensors.items() if tensor.role == "average"]
        reason, hint = "", _ANOTHER
        if self._is_quantized() or any(dtypes.get(name, "F32") not in EPS for name in averaged):
            reason = "its weights are quantized, as its quantization_config or their dtype says"
        elif absent := [name for name in averaged if name not in dtypes]:
            reason = f"{len(absent)} tensors of the run are not in it, such as {min(absent)!r}"
            reason, hint = f"{reason}; it has tensors such as {min(self.stored)!r}", _RENAMED
        if reason:
            raise MismatchError(self.place, reason, hint)
        plan = replace(plan, dtypes=dtypes)
        parts: dict[str, dict[str, Entry]] = {}
        for name, file in self.stored.items():
            entry = plan.entries.get(name, file.entries[name])
            check_shape(file.path, name, file.entries[name].shape, entry.shape)
            parts.setdefault(str(file.path.relative_to(self.path)), {})[name] = entry
        return plan, parts

    def _is_quantized(self) -> bool:
        try:
            return "quantization_config" in json.loads((self.place / "config.json").read_text())
        except (OSError, ValueError, TypeError):
            return False


def _weights_at(place: Path) -> Path | None:
    """Return the index or the file of the weights in a folder; None if there is none."""
    names = [f"{stem}{ending}" for stem in _STEMS for ending in (INDEX_SUFFIX, SUFFIX)]
    return next((place / name for name in names if (place / name).is_file()), None)


def _foreign(path: Path, folder: Path) -> str:
    """Return why a path in a folder is not a file of the folder; empty if it is.

    In the cache of the Hugging Face Hub, files are links to the blobs of their repository: snapshots/<revision>/<name>
    -> ../../blobs/<hash>.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    cache = next((parent.parent for parent in root.parents if parent.name == "snapshots"), None)
    if not (real.is_relative_to(root) or (cache is not None and real.parent == cache / "blobs")):
        return f"is a link to {real}, outside of it"
    if real.is_file():
        return ""
    if path.is_symlink():
        return f"is a link to {real}, which is {'a folder' if real.is_dir() else 'no file'}"
    return "is no regular file"


def _is_weights(path: Path) -> bool:
    """Return whether a file holds weights, or is an index of weights in another format than safetensors."""
    return path.suffix in _WEIGHTS or (path.name.endswith(".index.json") and not path.name.endswith(INDEX_SUFFIX))
