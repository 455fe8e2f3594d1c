"""Outputs of a synthesis: their layouts and names, and how they are written: each appears complete or not at all."""

from __future__ import annotations

import errno
import io
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from posthoc_cli import files, resources
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    OutputExistsError,
    WriteError,
    check_word,
)
from posthoc_cli.snapshots.directory import ON_ONE_FILE_SYSTEM
from posthoc_cli.snapshots.outputs import INDEX_NAME, encode_index
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry, TensorFileWriter, read_file, tensor_bytes
from posthoc_cli.synthesis.engine import Options, TensorOutput, Tile, Writer
from posthoc_cli.targets import Target

LAYOUTS = {"safetensors": (SUFFIX,), "sharded": (), "pt": (".pt", ".pth", ".bin"), "dcp": ()}
"""The layouts of an output, each with the file name endings that it accepts; layouts without endings are folders."""

PICKLES = LAYOUTS["pt"]


@dataclass(frozen=True)
class OutputOptions(Options):
    """Options for making averages and writing them to files.

    Attributes:
        device: device that computes the sums: "auto", "cpu", "cuda", ...
        layout: one of `LAYOUTS`; None to choose it by the output's name.
        max_shard_size: largest size of a shard in the sharded layout, such as "5GB", which is the default.
        overwrite: replace existing outputs.
        dry_run: plan only.
        distributed: all processes of a torchrun job make this call, and each writes some of the shards in a folder.
        like: a model folder of transformers, diffusers or PEFT; outputs are new folders like it, with averaged weights:
            the same names, files and dtypes, and copies of all other files. Tensors that the run lacks come from it.
    """

    device: torch.device | str = "auto"
    layout: str | None = None
    max_shard_size: int | str | None = None
    overwrite: bool = False
    dry_run: bool = False
    distributed: bool = False
    like: str | Path | None = None

    @property
    def shard_bytes(self) -> int:
        size = "5GB" if self.max_shard_size is None else str(self.max_shard_size)
        return resources.parse_bytes(size, "max_shard_size")

    def layout_of(self, path: Path) -> str:
        """Return the layout of an output, see `layout_of`, after checking that shards have a size only in shards."""
        layout = layout_of(path, self.layout)
        if self.max_shard_size is not None and layout != "sharded":
            reason = f"is for a sharded output, and this layout is {layout}"
            raise InvalidValueError("max_shard_size", reason, value=self.max_shard_size)
        return layout


def check_space(out: Path, needed: int) -> None:
    """Raise a WriteError if so many bytes do not fit on the disk of an output; replaced outputs are not free space.

    Outputs for an object store are first written to the folder for temporary files.
    """
    is_remote = files.is_url(out)
    local = Path(tempfile.gettempdir()) if is_remote else out
    place = next(folder for folder in (local, *local.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        reason = f"the output takes {needed:,} bytes, and {free:,} are free on this disk; nothing was written"
        hint = "set TMPDIR to a folder with room, or make smaller shards: max_shard_size"
        raise WriteError(place, reason, hint if is_remote else "", errno=errno.ENOSPC)


# --- layouts and names


def layout_of(path: Path, layout: str | None) -> str:
    """Return the given layout, or choose it by the output's name: .pt, .safetensors, or a folder of shards.

    Raises InvalidValueError if the name has the ending of another layout, or of none.
    """
    named = next((name for name, endings in LAYOUTS.items() if path.suffix in endings), None)
    if layout is None:
        if named is None and path.suffix and not path.is_dir():
            hint = "name a .safetensors or .pt file, or a folder for shards; or give `layout`"
            raise InvalidValueError(path, "its ending names no layout", hint)
        return named or "sharded"
    check_word("layout", layout, LAYOUTS)
    if named not in (None, layout) and not path.is_dir():
        accepted = LAYOUTS[layout]
        wanted = f"must end in {', '.join(accepted)}" if accepted else "must be that of a folder"
        raise InvalidValueError("layout", f"the output's name, {path.name}, {wanted}", value=f"{layout!r}")
    return layout


def output_paths(targets: Sequence[Target], out: str, layout: str | None) -> tuple[list[Path], Path | None]:
    """Return the path of each target's output, and the folder to create for them if `out` names one.

    `out` is a file (for one target), or a folder with a file per target. A folder of shards holds one model, so several
    targets get a folder each within it. Raises InvalidValueError if two targets would have the same path.
    """
    path = files.expanded(files.given_path("out", out))
    files.check_writable("out", path)
    is_folder = path.is_dir() or path.suffix == "" or out.endswith("/")
    if len(targets) == 1 and (layout in ("sharded", "dcp") or not is_folder):
        return [path], None
    if not is_folder and path.suffix in (SUFFIX, *PICKLES):
        raise InvalidValueError("out", f"{len(targets)} targets need a folder", value=out)
    suffix = "".join(LAYOUTS[layout_of(Path(), layout or "safetensors")][:1])
    taken: dict[Path, Target] = {}
    for target in targets:
        name = target.label if target.sigma_rel is None else f"sigma_rel-{target.sigma_rel!r}"
        made = path / f"{name}{suffix}"
        if made in taken:
            both = f"{taken[made].title} and {target.title} would both become {made}"
            raise InvalidValueError("out", f"{both}; a profile is named after its file", "rename one", value=out)
        taken[made] = target
    return [*taken], path


def check_shape(path: Path, name: str, found: Sequence[int], average: Sequence[int]) -> None:
    """Raise a MismatchError that names the file if a tensor does not have the shape of its average."""
    if tuple(found) != tuple(average):
        reason = f"tensor {name!r} has the shape {list(found)}, the average {list(average)}"
        raise MismatchError(path, reason)


# --- outputs

MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""The names of the weight files of a model folder."""

_FOLDERS = {
    "sharded": re.compile(f"{MODEL_FILE.pattern}|{re.escape(INDEX_NAME)}"),
    "dcp": re.compile(r"\.metadata|.*\.distcp"),
    "like": re.compile("(?!)"),
}
"""The layouts that are folders, each with a pattern of the files of an old model that `overwrite` replaces."""

Parts = Mapping[str, Mapping[str, Entry]]
"""The tensors of each file of an output: its path within the folder, or "" for an output that is one file."""

Header = Mapping[str, Any]
"""The content of an output's header, see `TensorFileWriter`."""

Others = Mapping[str, Path | bytes]
"""The other files of a folder: their content, or the file to copy."""


def nbytes(entries: Mapping[str, Entry]) -> int:
    """Return the bytes of all tensors."""
    return sum(entry.nbytes for entry in entries.values())


def files_of(layout: str, entries: Mapping[str, Entry], shard_bytes: int) -> tuple[Parts, Others]:
    """Return the files of an output with these tensors; shards are cut as the Hugging Face libraries do.

    Several shards have an index; one has the name of a model in one file.
    """
    if layout != "sharded":
        return {"": entries}, {}
    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    parts = {file: {name: entries[name] for name in names} for file, names in split.filename_to_tensors.items()}
    index = {INDEX_NAME: encode_index(split.tensor_to_filename, nbytes(entries))}
    return parts, index if split.is_sharded else {}


class Alone:
    """The one process that writes outputs; `writing.Ranks` are several, each of which writes some of the files."""

    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order."""
        return [value]

    def together(self) -> AbstractContextManager[None]:
        """Return a block for all processes, in which an error in one of them is an error in all."""
        return nullcontext()


ALONE = Alone()


def write_outputs(
    paths: Sequence[Path],
    layout: str,
    parts: Parts,
    headers: Sequence[Header],
    fill: Callable[[Sequence[Output], Mapping[str, Entry]], None],
    others: Others = MappingProxyType({}),
    overwrite: bool = False,
    container: Path | None = None,
    ranks: Alone = ALONE,
) -> None:
    """Write outputs of the same tensors, each with its header, and create the folder that contains them.

    `fill` writes the tensors of a file into each output. No output appears before all are complete, except for shards
    in an object store. Of several processes each writes to temporary folders of its own; the first moves the files of
    all into its own folders, and gives these their names; to a store each sends its files, and the first the index.

    Raises WriteError, before anything is written if the outputs do not fit on the disk, and OutputExistsError.
    """
    rank, world, is_remote = ranks.rank, ranks.world, files.is_url(paths[0])
    own = {name: parts[name] for name in [*parts][rank::world]}
    with ExitStack() as stack:
        with ranks.together():
            sizes = [0, *map(nbytes, parts.values())]
            copied = sum(other.stat().st_size for other in others.values() if isinstance(other, Path))
            if is_remote or not rank:
                check_space(paths[0], len(paths) * ((max if is_remote else sum)(sizes) + copied))
            if container is not None:
                stack.enter_context(files.new_directory(container))
            outputs = [
                stack.enter_context(Output(path, layout, own, header, {} if rank else others, overwrite))
                for path, header in zip(paths, headers, strict=True)
            ]
        with ranks.together():
            for name, entries in own.items():
                for output in outputs:
                    output.begin(name)
                fill(outputs, entries)
                for output in outputs:
                    output.finish()
        places = ranks.gather([output.place for output in outputs])
        with ranks.together():
            for target, output in enumerate(outputs if not rank else ()):
                for number, name in enumerate(() if is_remote else parts):
                    if owner := number % world:
                        output.take(places[owner][target] / name)
                output.publish()
        for output in outputs if rank and is_remote else ():
            output.publish()  # nothing is left to send


class Output:
    """One output, written file by file in a temporary file or folder that gets its name by `publish`.

    Tensors are written complete (`write`) or in tiles (`open_tile`, see `synthesis.engine.Output`). The end of the
    `with` block removes what was not published.

    Arguments:
        layout: one of `LAYOUTS`, or "like" for a copy of a model folder.
        parts: the tensors of each file that this process writes.
        header: that of each safetensors file.
        others: the other files of a folder.
    """

    def __init__(
        self, path: Path, layout: str, parts: Parts, header: Header, others: Others = MappingProxyType({}),
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        self._path, self._parts, self._header, self._others = path, parts, header, others
        files.check_parent("out", path)
        if not files.is_url(path.parent):
            files.remove_leftovers(path.parent)
        if overwrite:
            check_no_snapshot(path)
        self._memory: TensorOutput | None = None  # of a layout that a library writes in one call
        if layout in ("pt", "dcp"):
            shapes = {name: entry.shape for name, entry in parts[""].items()}
            self._memory = TensorOutput(shapes, torch.device("cpu"))
        self._names: Collection[str] = parts.get("", {}).keys()
        self._file: TensorFileWriter | files.PendingFile | None = None
        self._folder: files.PendingFolder | None = None
        if layout in _FOLDERS:
            self._folder = files.PendingFolder(path, _FOLDERS[layout] if overwrite else None)
        elif layout == "pt":
            self._file = files.PendingFile(path, overwrite)
        else:
            self._file = TensorFileWriter(path, parts[""], header, {}, overwrite)

    def begin(self, name: str) -> None:
        """Begin a file, into which the tensors go from now on."""
        if self._folder is not None and self._memory is None:
            place, self._names = self.place / name, self._parts[name].keys()
            files.make_directory(place.parent)
            self._file = TensorFileWriter(place, self._parts[name], self._header, {})

    def write(self, name: str, tensor: torch.Tensor) -> None:
        if self._memory is not None:
            self._memory.tensors[name] = tensor.cpu()
        else:
            self._writer.write(name, tensor_bytes(tensor))

    def open_tile(self, tile: Tile) -> Writer:
        """Return the function that writes a tile under all names that its tensors have in the file."""
        if self._memory is not None:
            copy = self._memory.open_tile(tile)
            for name in tile.names:
                self._memory.tensors |= dict.fromkeys(tile.plan.names[name], self._memory.tensors[name])
            return copy
        file, size = self._writer, ITEM_BYTES[tile.dtype]
        aliases = [[alias for alias in tile.plan.names[name] if alias in self._names] for name in tile.names]

        def write(values: torch.Tensor) -> None:
            view = tensor_bytes(values)
            if len(aliases) == 1:
                for name in aliases[0]:
                    file.write(name, view, tile.begin * size)
                return
            file.write_many([names[0] for names in aliases], view)
            for names, (start, stop) in zip(aliases, pairwise(tile.bounds), strict=True):
                for alias in names[1:]:
                    file.write(alias, view[start * size : stop * size])

        return write

    def finish(self) -> None:
        """Finish the file; in an object store it appears now."""
        if self._folder is not None and self._memory is None:
            self._writer.commit()
            if files.is_url(self._folder.path):
                self._folder.send()

    def take(self, file: Path) -> None:
        """Move a file that another process has made to the temporary folder."""
        if files.is_absent(file):
            raise DirectoryError(file, "is missing", ON_ONE_FILE_SYSTEM)
        with files.reported_as_write_error(self.place):
            files.system.rename(file, self.place / file.name)

    def publish(self) -> None:
        """Give the output its name."""
        if self._folder is not None:
            if self._memory is not None:
                _save_distributed(self._memory.tensors, self._folder)
            for name, other in self._others.items():
                place = self.place / name
                files.make_directory(place.parent)
                if isinstance(other, bytes):
                    files.write_atomically(place, other)
                    continue
                with files.reported_as_write_error(other, "copied"):
                    shutil.copyfile(other, place)
            self._folder.publish()
        elif isinstance(self._file, TensorFileWriter):
            self._file.commit()
        elif self._file is not None and self._memory is not None:
            _save(self._memory.tensors, self._file)
            self._file.publish()

    @property
    def place(self) -> Path:
        """The temporary folder, or of a file its path."""
        return self._path if self._folder is None else self._folder.temporary

    @property
    def _writer(self) -> TensorFileWriter:
        assert isinstance(self._file, TensorFileWriter), "the caller has begun a file"
        return self._file

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: Any) -> None:
        for pending in (self._file, self._folder):
            if pending is not None:
                pending.__exit__(*error)


def check_no_snapshot(path: Path) -> None:
    """Raise an OutputExistsError if an output at a path, a file or a folder, would replace a snapshot."""
    for file in files.system.list(path) if path.is_dir() else [path]:
        with suppress(FileFormatError):
            if file.suffix == SUFFIX and file.is_file() and read_file(file).kind == "snapshot":
                raise OutputExistsError(path, "is a snapshot of a run and is not replaced", "choose another name")


class _Stream(io.RawIOBase):
    """A stream for torch.save that writes to a pending file."""

    def __init__(self, file: files.PendingFile) -> None:
        self._file, self._offset = file, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write_at(view, self._offset)
        self._offset += len(view)
        return len(view)


def _save(tensors: Mapping[str, torch.Tensor], file: files.PendingFile) -> None:
    try:
        torch.save(dict(tensors), _Stream(file))  # type: ignore[arg-type]  # any object with `write`
    except RuntimeError as error:
        # torch's archive writer replaces errors of the stream, and a KeyboardInterrupt, by its own error.
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):
            cause = cause.__context__
        raise cause or error from None


def _save_distributed(tensors: dict[str, Any], folder: files.PendingFolder) -> None:
    from torch.distributed.checkpoint.api import CheckpointException  # slow to import
    from torch.distributed.checkpoint.state_dict_saver import save

    with files.reported_as_write_error(folder.path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is only one process
        try:
            save(tensors, checkpoint_id=str(folder.temporary), no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise cause if isinstance(cause, OSError) else error from error
