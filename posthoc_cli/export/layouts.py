"""The layouts of outputs: their options and names, and which tensors each of their files holds.

A copy of a model folder (`ModelFolder`) has averaged weights in place of the folder's own. The
folder determines their names, files, dtypes, and the name under which a tied tensor is stored. All
other files are copied, except through links that lead out of the folder: an output may be uploaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from posthoc_cli import files, resources
from posthoc_cli.dtypes import DTYPES, EPS, WORDS, parse_dtype
from posthoc_cli.errors import InvalidValueError, MismatchError, check_word
from posthoc_cli.snapshots.outputs import INDEX_NAME, model_files, weights_at
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry, TensorFile, read_file
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Target

LAYOUTS = {"safetensors": (SUFFIX,), "sharded": (), "pt": (".pt", ".pth", ".bin"), "dcp": ()}
"""The layouts of an output, each with the file name endings that it accepts; layouts without
endings are folders."""

FOLDERS = {
    "sharded": re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(INDEX_NAME)}"),
    "dcp": re.compile(r"\.metadata|.*\.distcp"),
    "like": re.compile("(?!)"),
}
"""The layouts that are folders ("like" is the copy of a model folder), each with a pattern of the
names of its files: `overwrite` replaces a folder that holds no others."""

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ckpt)$|(?<!\.safetensors)\.index\.json$"
)
"""The names of weights in a model folder, which are not copied next to the averaged weights: they
are out of date."""

Parts = Mapping[str, Mapping[str, Entry]]
"""The tensors of each file of an output: its path within the folder, or "" for an output that is
one file."""

# the other files of a folder: their content, or the file to copy
Others = Mapping[str, Path | bytes]


@dataclass(frozen=True)
class OutputOptions:
    """Options for making averages and writing them to files."""

    device: torch.device | str = "auto"  # computes the sums
    workers: int | None = None  # number of threads; None for one per core
    layout: str | None = None  # one of `LAYOUTS`; None to choose it by the output's name
    # of a sharded output, such as "5GB", which is the default
    max_shard_size: int | str | None = None
    overwrite: bool = False
    dry_run: bool = False  # plan only
    # all processes of a torchrun job make this call, and each writes some of the shards
    distributed: bool = False
    # A model folder of transformers, diffusers or PEFT; outputs are new folders like it, with
    # averaged weights: the same names, files and dtypes, and copies of all other files. Tensors
    # that the run lacks come from it.
    like: str | Path | None = None

    def __post_init__(self) -> None:
        if self.layout is not None:
            check_word("layout", self.layout, LAYOUTS)
        self.shard_bytes  # noqa: B018  raises an error if invalid

    @property
    def shard_bytes(self) -> int:
        size = "5GB" if self.max_shard_size is None else str(self.max_shard_size)
        return resources.parse_bytes(size, "max_shard_size")


def layout_of(path: Path, layout: str | None) -> str:
    """Return the given layout, or choose it by the output's name: .pt, .safetensors, or a folder of
    shards.

    Raises InvalidValueError if the name has the ending of another layout, or of none. A folder may
    have any name.
    """
    named = next((name for name, endings in LAYOUTS.items() if path.suffix in endings), None)
    wanted = layout or named or "sharded"
    fits = named == wanted or (named is None and (layout is not None or not path.suffix))
    if not (fits or path.is_dir()):
        hint = "name a .safetensors or .pt file, or a folder for shards; or give `layout`"
        raise InvalidValueError(path, f"its ending does not fit the layout {wanted}", hint)
    return wanted


def output_paths(
    targets: Sequence[Target],
    out: str | Path | None,
    dtype: torch.dtype | str | None,
    options: OutputOptions,
) -> list[Path]:
    """Return the path of each target's output, none in a dry run: `out`, or a file or folder in it
    for each.

    A folder of shards holds one model. Raises InvalidValueError if options contradict each other,
    or if two targets would have the same path.
    """
    layout = "sharded" if options.distributed or options.like is not None else options.layout
    if options.like is not None and any(
        (options.distributed, options.overwrite, options.layout, parse_dtype(dtype))
    ):
        reason = (
            "determines the output: layout, dtype, overwrite and torchrun cannot be "
            "combined with it"
        )
        raise InvalidValueError("like", reason)
    if out is None:
        if not options.dry_run:
            raise InvalidValueError("out", "is missing; only a dry run needs no output")
        return []
    path = files.expanded(files.given_path("out", out))
    is_file = path.suffix in (*LAYOUTS["safetensors"], *LAYOUTS["pt"])
    if options.distributed and (is_file or options.layout not in (None, "sharded")):
        reason = "a job of several processes makes a folder of shards; name a folder"
        raise InvalidValueError("out", reason, "an export makes one file of it", value=out)
    files.check_writable("out", path)
    if not options.dry_run:
        files.check_parent("out", path)
    is_folder = path.is_dir() or path.suffix == "" or str(out).endswith("/")
    if len(targets) == 1 and (layout in FOLDERS or not is_folder):
        if options.like is None:
            layout_of(path, layout)
        return [] if options.dry_run else [path]
    if is_file and not is_folder:
        raise InvalidValueError("out", f"{len(targets)} targets need a folder", value=out)
    suffix = "".join(LAYOUTS[layout or "safetensors"][:1])
    names = [
        one.label if one.sigma_rel is None else f"sigma_rel-{one.sigma_rel!r}" for one in targets
    ]
    paths = [path / f"{name}{suffix}" for name in names]
    if twice := next((one for one in paths if paths.count(one) > 1), None):
        reason = f"two averages would both become {twice}; a profile is named after its file"
        raise InvalidValueError("out", reason, "rename one", value=out)
    return [] if options.dry_run else paths


def files_of(
    layout: str, entries: Mapping[str, Entry], options: OutputOptions, ranks: int = 1
) -> tuple[Parts, Others]:
    """Return the files of an output with these tensors: shards, at least one for each rank, or one
    file.

    Shards are cut as the Hugging Face libraries do. Several shards have an index; one has the name
    of a model in one file.
    """
    if layout != "sharded":
        if options.max_shard_size is not None:
            reason = f"is for a sharded output, and this layout is {layout}"
            raise InvalidValueError("max_shard_size", reason, value=options.max_shard_size)
        return {"": entries}, {}
    total = nbytes(entries)
    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=min(options.shard_bytes, max(1, -(-total // ranks))),
    )
    parts = {
        file: {name: entries[name] for name in names}
        for file, names in split.filename_to_tensors.items()
    }
    index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return parts, {INDEX_NAME: text.encode()} if split.is_sharded else {}


def nbytes(entries: Mapping[str, Entry]) -> int:
    """Return the bytes of all tensors."""
    return sum(entry.nbytes for entry in entries.values())


def check_shape(path: Path, name: str, found: Sequence[int], average: Sequence[int]) -> None:
    """Raise a MismatchError that names the file if a tensor does not have the shape of its
    average."""
    if tuple(found) != tuple(average):
        reason = f"tensor {name!r} has the shape {list(found)}, the average {list(average)}"
        raise MismatchError(path, reason)


# --- model folders


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, or a pipeline's with the component whose weights are averaged."""

    path: Path
    place: Path  # of the weights: the folder itself, or that of the component

    @classmethod
    def find(cls, like: Path | str, tensors: Iterable[str]) -> ModelFolder:
        """Return a model folder; for a pipeline with the only component that has some of these
        tensors.

        Raises InvalidValueError for a path without weights in safetensors files, if no component,
        or several, fit the tensors, or for something in the folder that is neither a file nor a
        link to a file in the folder.
        """
        path, known = files.expanded(like), set(tensors)
        found = [cls(path, path)]
        if path.is_dir() and weights_at(path) is None:
            parts = [
                cls(path, entry)
                for entry in sorted(path.iterdir())
                if entry.is_dir() and weights_at(entry)
            ]
            found = [part for part in parts if known & part.stored.keys()]
        if len(found) != 1 or not path.is_dir():
            names = "model, diffusion_pytorch_model or adapter_model.safetensors, or their index"
            reason = (
                f"must be a folder with weights ({names}), or with one component that has "
                f"tensors of the run"
            )
            raise InvalidValueError("like", reason, "name the folder of a component", value=path)
        for file in (
            *found[0].others.values(),
            *{stored.path for stored in found[0].stored.values()},
        ):
            if not _is_own(file, path):
                reason = (
                    f"{file.relative_to(path)} is not a file of this folder, or leads out of it"
                )
                raise InvalidValueError(
                    "like", reason, "remove it, or put a copy of the file in its place", value=path
                )
        return found[0]

    @cached_property
    def stored(self) -> dict[str, TensorFile]:
        """The file of each tensor in the folder."""
        weights = model_files(weights_at(self.place) or self.place)
        return {name: file for file in map(read_file, weights) for name in file.entries}

    @cached_property
    def others(self) -> dict[str, Path]:
        """The files to copy, by their path in the folder: all but the weights that are replaced,
        and hidden folders."""
        others = []
        for base, folders, names in os.walk(self.path):
            links = [name for name in folders if Path(base, name).is_symlink()]
            folders[:] = [
                name for name in folders if not name.startswith(".") and name not in links
            ]
            paths = [Path(base, name) for name in (*links, *names)]
            others += [
                path
                for path in paths
                if not (path.parent == self.place and _WEIGHTS.search(path.name))
            ]
        return {str(path.relative_to(self.path)): path for path in others}

    @property
    def dtype(self) -> str | None:
        """The torch name of the dtype of all floating-point tensors; None if they have several
        dtypes."""
        dtypes = {file.entries[name].dtype for name, file in self.stored.items()} & EPS.keys()
        words = [DTYPES[dtype].torch_name for dtype in dtypes]
        return words[0] if len(words) == 1 and words[0] in WORDS else None

    def arranged(self, plan: Plan) -> tuple[Plan, Parts, Others]:
        """Return a plan whose tensors have the dtypes of this folder, the tensors of its files, and
        the others.

        Raises MismatchError for a tensor that has another shape in the folder or is not in it, or
        quantized weights.
        """
        owners = {alias: name for name, aliases in plan.names.items() for alias in aliases}
        dtypes = {
            owners[name]: file.entries[name].dtype
            for name, file in self.stored.items()
            if name in owners
        }
        averaged = [name for name, tensor in plan.tensors.items() if tensor.role == "average"]
        reason, hint = "", "take a folder that the trained model itself was saved to"
        config = self.place / "config.json"
        is_quantized = config.is_file() and b'"quantization_config"' in config.read_bytes()
        if is_quantized or any(dtypes.get(name, "F32") not in EPS for name in averaged):
            reason = "its weights are quantized, as its quantization_config or their dtype says"
        elif absent := [name for name in averaged if name not in dtypes]:
            reason = f"{len(absent)} tensors of the run are not in it, such as {min(absent)!r}"
            reason = f"{reason}; it has tensors such as {min(self.stored)!r}"
            hint += (
                "; if transformers renames them on disk, as the experts of a mixture, load the "
                "averages into the model "
                "(load_into) and save that by save_pretrained"
            )
        if reason:
            raise MismatchError(self.place, reason, hint)
        plan = replace(plan, dtypes=dtypes)
        parts: dict[str, dict[str, Entry]] = {}
        for name, file in self.stored.items():
            entry = plan.entries.get(name, file.entries[name])
            check_shape(file.path, name, file.entries[name].shape, entry.shape)
            parts.setdefault(str(file.path.relative_to(self.path)), {})[name] = entry
        return plan, parts, self.others


def _is_own(path: Path, folder: Path) -> bool:
    """Return whether a path in a folder is a file of the folder, or a link to one.

    In the cache of the Hugging Face Hub, files are links to the blobs of their repository:
    snapshots/<revision>/<name> -> ../../blobs/<hash>.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    cache = next((parent.parent for parent in root.parents if parent.name == "snapshots"), None)
    return real.is_file() and (
        real.is_relative_to(root) or (cache is not None and real.parent == cache / "blobs")
    )
