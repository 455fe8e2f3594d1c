"""A copy of a model folder with averaged weights in place of the folder's own.

The folder determines how weights are laid out: names, files, dtypes, and the name under which a tied tensor is stored.
All other files are copied, except through links that lead out of the folder: an output may be uploaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.dtypes import DTYPES, EPS, WORDS, torch_dtype
from posthoc_cli.errors import InvalidValueError, MismatchError
from posthoc_cli.export.layouts import check_shape, converted, in_turn, open_outputs
from posthoc_cli.snapshots.outputs import INDEX_SUFFIX, model_files
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry, read_file
from posthoc_cli.synthesis.engine import Options, synthesize
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
    def find(cls, like: Path | str, component: str | None, tensors: Iterable[str]) -> ModelFolder:
        """Return a model folder; for a pipeline with the named component, or the only one with some of these tensors.

        Raises:
            InvalidValueError: the path is no folder with weights in safetensors files; or no component, or several, fit
                the tensors; or something in the folder is neither a file nor a link to a file in the folder.
        """
        path = files.expanded(like)
        if not path.is_dir():
            raise InvalidValueError("like", "is not a folder", value=path)
        if component and (component == ".." or Path(component).name != component):
            raise InvalidValueError("component", "must be the name of a folder in the model folder", value=component)
        parts = [entry.name for entry in sorted(path.iterdir()) if entry.is_dir() and _weights_at(entry) is not None]
        if component is not None or _weights_at(path) is not None or not parts:
            folder = cls(path, component or "")
            if _weights_at(folder.place) is None:
                names = " or ".join(f"{stem}{SUFFIX}" for stem in _STEMS)
                raise InvalidValueError("like", f"has no weights: {names}, or their index", value=folder.place)
        else:
            known = set(tensors)
            fitting = [name for name in parts if known & cls(path, name).entries.keys()]
            if len(fitting) != 1:
                reason = f"has weights in: {', '.join(parts)}; with names of the run's in {len(fitting)}"
                raise InvalidValueError("like", reason, "name the part: component", value=path)
            folder = cls(path, fitting[0])
        folder._check_files()
        return folder

    @property
    def place(self) -> Path:
        """The folder that holds the weights."""
        return self.path / self.component

    @cached_property
    def entries(self) -> dict[str, tuple[Path, Entry]]:
        """The file and the header entry of each tensor in the folder."""
        weights = _weights_at(self.place)
        assert weights is not None, "find has checked it"
        return {name: (path, entry) for path in model_files(weights) for name, entry in read_file(path).entries.items()}

    @cached_property
    def others(self) -> list[Path]:
        """The files to copy, relative to the folder: all but the weights that are replaced, and hidden folders."""
        others = []
        for base, folders, names in os.walk(self.path):
            within = Path(base).relative_to(self.path)
            links = [name for name in folders if (Path(base) / name).is_symlink()]
            folders[:] = [name for name in folders if not name.startswith(".") and name not in links]
            replaced = within == Path(self.component)
            others += [within / name for name in (*links, *names) if not (replaced and _is_weights(Path(name)))]
        return others

    def _check_files(self) -> None:
        """Raise an InvalidValueError if something in the folder is not a file of this folder."""
        for name in (*self.others, *{file.relative_to(self.path) for file, _ in self.entries.values()}):
            if reason := _foreign(self.path / name, self.path):
                hint = "remove it, or put a copy of the file in its place"
                reason = f"{name} {reason}; only its own files are copied"
                raise InvalidValueError("like", reason, hint, value=self.path)

    @property
    def dtype(self) -> str | None:
        """The torch name of the dtype of all floating-point tensors; None if they have several dtypes."""
        dtypes = {DTYPES[entry.dtype].torch_name for _, entry in self.entries.values() if entry.dtype in EPS}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= WORDS.keys() else None

    @property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`; empty if there is no valid one."""
        try:
            config = json.loads((self.place / "config.json").read_text())
        except (OSError, ValueError):
            return {}
        return config if isinstance(config, dict) else {}

    def write(
        self, plan: Plan, outs: Sequence[Path], options: Options, container: Path | None = None
    ) -> tuple[str, ...]:
        """Write a folder for each target of a plan, with the same tensors in each file as in this folder.

        Returns the names of the tensors that the run lacks, which are copied from this folder. Raises a MismatchError
        if a tensor of the run has another shape in the folder, or is not in it; or if the folder's weights are
        quantized.
        """
        known = {alias: name for name, aliases in plan.names.items() for alias in aliases}
        self._check(plan, known)
        parts: dict[str, dict[str, Entry]] = {}
        for name, (file, entry) in self.entries.items():
            parts.setdefault(str(file.relative_to(self.path)), {})[name] = entry
        others = {str(name): self.path / name for name in self.others}
        headers = [(plan.output_info(index).encoded(), dict[str, str]()) for index in range(len(outs))]
        with open_outputs(outs, "like", parts, headers, others, container=container) as outputs:
            for entries in in_turn(outputs, parts):
                dtypes = {name: torch_dtype(entry.dtype) for name, entry in entries.items()}
                with read_file(self.entries[min(entries)][0]) as source:
                    for name in dtypes.keys() - known.keys():
                        for output in outputs:
                            output.write(name, source.tensor(name))
                subset = frozenset(known[name] for name in dtypes.keys() & known.keys())
                for name, values in synthesize(replace(plan, subset=subset), options):
                    for output, value in zip(outputs, values, strict=True) if name in dtypes else ():
                        output.write(name, converted(f"tensor {name!r}", value, dtypes[name]))
        return tuple(name for name in self.entries if name not in known)

    def _check(self, plan: Plan, known: Mapping[str, str]) -> None:
        averaged = [name for name, tensor in plan.tensors.items() if tensor.role == "average"]
        replaced = [self.entries[alias][1] for name in averaged for alias in plan.names[name] if alias in self.entries]
        if "quantization_config" in self.config or any(entry.dtype not in EPS for entry in replaced):
            reason = "its weights are quantized, as its quantization_config or their dtype says"
            raise MismatchError(self.place, reason, _ANOTHER)
        absent = [name for name in averaged if not any(alias in self.entries for alias in plan.names[name])]
        if absent:
            missing = f"{len(absent)} tensors of the run are not in it, such as {min(absent)!r}"
            raise MismatchError(self.place, f"{missing}; it has tensors such as {min(self.entries)!r}", _RENAMED)
        for name, (file, entry) in self.entries.items():
            if name in known:
                check_shape(file, name, entry.shape, plan.newest.entries[known[name]].shape)


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
