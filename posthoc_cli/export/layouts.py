"""Outputs of a synthesis: their layouts and names, whether they already exist, and how they are written."""

from __future__ import annotations

import errno
import io
import re
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from posthoc_cli import files, resources
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    VanishedError,
    WriteError,
    check_word,
)
from posthoc_cli.snapshots.directory import PART_NAME
from posthoc_cli.snapshots.outputs import INDEX_NAME, SINGLE_NAME, check_indexed, encode_index, model_files
from posthoc_cli.snapshots.tensorfile import (
    SUFFIX,
    Entry,
    TensorFile,
    TensorFileWriter,
    read_file,
    tensor_bytes,
)
from posthoc_cli.synthesis.engine import Options, TensorOutput, Tile, Writer, holds
from posthoc_cli.targets import Target

LAYOUTS = {"safetensors": (SUFFIX,), "sharded": (), "pt": (".pt", ".pth", ".bin"), "dcp": ()}
"""The layouts of an output, each with the file name endings that it accepts; layouts without endings are folders."""

DEFAULT_SHARD_SIZE = "5GB"
PICKLES = LAYOUTS["pt"]
_SIGMA_REL, _TARGET = "{sigma_rel}", "{target}"


@dataclass(frozen=True)
class OutputOptions(Options):
    """Options for making averages and writing them to files.

    Attributes:
        device: device that computes the sums: "auto", "cpu", "cuda", ...
        layout: one of `LAYOUTS`; None to choose it by the output's name.
        max_shard_size: largest size of a shard in the sharded layout, such as "5GB", which is the default.
        overwrite: replace existing outputs.
        skip_existing: keep existing outputs of the same plan.
        dry_run: plan only.
        distributed: this is a process of a torchrun job, and all of its processes make the same call: each writes some
            of the shards in a folder. Existing shards of the same plan are kept.
        like: a model folder of transformers, diffusers or PEFT; outputs are new folders like it, with averaged weights:
            the same names, files and dtypes, and copies of all other files. Tensors that the run lacks come from it.
        component: the folder in a pipeline that holds the weights, such as "unet"; by default the only one that fits.
    """

    device: torch.device | str = "auto"
    layout: str | None = None
    max_shard_size: int | str | None = None
    overwrite: bool = False
    skip_existing: bool = False
    dry_run: bool = False
    distributed: bool = False
    like: str | Path | None = None
    component: str | None = None

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        size = DEFAULT_SHARD_SIZE if self.max_shard_size is None else self.max_shard_size
        return resources.parse_bytes(str(size), "max_shard_size")

    def check_layout(self, path: Path) -> None:
        """Raise an InvalidValueError for an unknown layout, or a shard size for an output without shards."""
        layout, _ = layout_of(path, self.layout), self.shard_bytes
        if self.max_shard_size is not None and layout != "sharded":
            reason = f"is for a sharded output, and this layout is {layout}"
            raise InvalidValueError("max_shard_size", reason, value=self.max_shard_size)


def check_space(outputs: Mapping[Path, int]) -> None:
    """Raise a WriteError if a disk has too little space for its outputs; replaced outputs do not count as free space.

    Outputs for an object store are first written to the folder for temporary files.
    """
    disks: dict[int, list[tuple[Path, Path]]] = defaultdict(list)
    for path in outputs:
        local = Path(tempfile.gettempdir()) if files.is_url(path) else path
        place = next(folder for folder in (local, *local.parents) if folder.is_dir())
        disks[place.stat().st_dev].append((path, place))
    for paths in disks.values():
        (first, place), needed = paths[0], sum(outputs[path] for path, _ in paths)
        free = shutil.disk_usage(place).free
        if needed > free:
            count = "the output takes" if len(paths) == 1 else f"the {len(paths)} outputs take"
            reason = f"{count} {needed:,} bytes, and {free:,} are free on this disk; nothing was written"
            hint = "set TMPDIR to a folder with room, or make smaller shards: max_shard_size"
            raise WriteError(place, reason, hint if files.is_url(first) else "", errno=errno.ENOSPC)


# --- layouts and names -------------------------------------------------------------------------------


def layout_of(path: Path, layout: str | None) -> str:
    """Return the given layout, or choose it by the output's name: .pt, .safetensors, or a folder of shards.

    Raises:
        InvalidValueError: the name has the ending of another layout, or of none.
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


def suffix_of(layout: str | None) -> str:
    """Return the ending of output names in a layout, by default that of one safetensors file; empty for folders."""
    return "".join(LAYOUTS["safetensors" if layout is None else layout_of(Path(), layout)][:1])


def output_paths(targets: Sequence[Target], out: str, layout: str | None) -> tuple[list[Path], Path | None]:
    """Return the path of each target's output, and the folder to create for them if `out` names one.

    `out` is a pattern with `{sigma_rel}` or `{target}` to fill in, a file (for one target), or a folder with a file per
    target. A folder of shards holds one model, so several targets get a folder each within it.

    Raises:
        InvalidValueError: two targets would have the same path, or a target cannot fill in the pattern.
    """
    unknown = [name for name in re.findall(r"\{\w*\}", out) if name not in (_SIGMA_REL, _TARGET)]
    if unknown:
        raise InvalidValueError("out", f"{unknown[0]} is not known; must be {_SIGMA_REL} or {_TARGET}", value=out)
    path, pattern, folder = files.expanded(files.given_path("out", out)), out, None
    if _SIGMA_REL not in out and _TARGET not in out:
        is_folder = path.is_dir() or path.suffix == "" or out.endswith("/")
        if len(targets) == 1 and (layout in ("sharded", "dcp") or not is_folder):
            return [path], None
        if not is_folder and path.suffix in (SUFFIX, *PICKLES):
            place = _TARGET if any(target.sigma_rel is None for target in targets) else _SIGMA_REL
            example = f"a name with {place} in it, such as {path.stem}-{place}{path.suffix}"
            raise InvalidValueError("out", f"{len(targets)} targets need a folder, or {example}", value=out)
        if path.exists() and not path.is_dir():
            raise InvalidValueError("out", "is no folder", "name a file with its ending, or a folder", value=out)
        pattern, folder = str(path / f"{_TARGET}{suffix_of(layout)}"), path
    taken: dict[Path, Target] = {}
    for target in targets:
        if _SIGMA_REL in pattern and target.sigma_rel is None:
            raise InvalidValueError("out", f"{target.title} has no sigma_rel", f"write {_TARGET} for it", value=out)
        name = target.label if target.sigma_rel is None else f"sigma_rel-{target.sigma_rel!r}"
        made = files.expanded(pattern.replace(_SIGMA_REL, repr(target.sigma_rel)).replace(_TARGET, name))
        if made in taken:
            both = f"{taken[made].title} and {target.title} would both become {made}"
            raise InvalidValueError("out", f"{both}; a profile is named after its file", "rename one", value=out)
        taken[made] = target
    return [*taken], folder


def output_exists(path: Path, layout: str) -> bool:
    """Return whether an output already exists."""
    return holds_model(path) if layout == "sharded" else not files.is_absent(path)


# --- tensors that go into outputs --------------------------------------------------------------------


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in a dtype for which torch has all functions: 8-bit dtypes become float32."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def converted(where: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on the CPU in a dtype, or raise a NonFiniteError if the dtype cannot hold a finite value."""
    tensor = tensor.cpu()
    if tensor.dtype != dtype and tensor.numel():
        bounds = torch.aminmax(plain(tensor).nan_to_num(0.0, 0.0, 0.0))
        if not holds(dtype, torch.stack(bounds)):
            raise NonFiniteError(where, f"{dtype} cannot hold its largest value")
    return tensor.to(dtype)


def open_model(stack: ExitStack, path: Path) -> list[TensorFile]:
    """Open the files of a model until the stack ends, and check that each holds the tensors that the index says."""
    opened = []
    try:
        for file_path, names in model_files(path).items():
            opened.append(stack.enter_context(read_file(file_path)))
            check_indexed(opened[-1], names)
    except VanishedError as error:  # which callers would take for a snapshot that was thinned away meanwhile
        raise FileFormatError(error.subject, error.reason) from error
    return opened


def check_shape(path: Path, name: str, found: Sequence[int], average: Sequence[int]) -> None:
    """Raise a MismatchError that names the file if a tensor does not have the shape of its average."""
    if tuple(found) != tuple(average):
        reason = f"tensor {name!r} has the shape {list(found)}, the average {list(average)}"
        raise MismatchError(path, reason)


# --- sinks: each output appears complete or not at all -----------------------------------------------

MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""The names of the weight files of a model folder."""

Header = tuple[Mapping[str, Any], Mapping[str, str]]
"""The content of an output's header, see `TensorFileWriter`, and further strings."""

OTHER_FOLDER = "choose another folder, or `overwrite` to replace it"


@contextmanager
def open_outputs(
    paths: Sequence[Path],
    entries: Mapping[str, Entry],
    headers: Sequence[Header],
    options: OutputOptions,
    folders: Sequence[Path] = (),
) -> Iterator[tuple[list[Sink], Iterator[list[str]]]]:
    """Open outputs of the same tensors, each with its header, and create the folders if missing.

    The block gets a sink per output, and lists of names: it writes the tensors of one list into all sinks before it
    takes the next list. No output appears before the block ends, except for shards in an object store.

    Raises:
        WriteError: the system refused, or the outputs do not fit on the disk; the latter before anything is written.
        OutputExistsError: an output already exists, and `options.overwrite` is False.
    """
    sizes, needed = [entry.nbytes for entry in entries.values()], {}
    for path in paths:
        in_turn = layout_of(path, options.layout) == "sharded" and files.is_url(path)  # one shard is on disk at a time
        needed[path] = min(sum(sizes), max([options.shard_bytes, *sizes])) if in_turn else sum(sizes)
    check_space(needed)
    sinks: list[Sink] = []
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(files.new_directory(folder))
        for path, header in zip(paths, headers, strict=True):
            sinks.append(_sink(path, entries, header, options))
            stack.callback(sinks[-1].discard)
        yield sinks, _names_in_turn(sinks, entries)
        for sink in sinks:
            sink.commit()


def _names_in_turn(sinks: Sequence[Sink], entries: Mapping[str, Entry]) -> Iterator[list[str]]:
    """Yield the names of all tensors; for an object store those of each shard, which is uploaded once they exist."""
    remote = [sink for sink in sinks if isinstance(sink, _ShardedSink) and files.is_url(sink.folder)]
    for names in remote[0].files if remote else [[*entries]]:
        yield names
        for shards in remote:
            shards.publish_next()


def _sink(path: Path, entries: Mapping[str, Entry], header: Header, options: OutputOptions) -> Sink:
    layout = layout_of(path, options.layout)
    files.check_parent("out", path)
    if options.overwrite:
        check_no_snapshot(path)
    for folder in (path.parent, path):
        if not files.is_url(folder) and folder.is_dir():
            files.remove_leftovers(folder)
    if layout == "pt":
        return _TorchSink(path, entries, options.overwrite)
    if layout == "dcp":
        return _DcpSink(path, entries, options.overwrite)
    if layout == "sharded":
        return _ShardedSink(path, entries, header, options)
    writer = TensorFileWriter(path, entries, *header, options.overwrite)
    return FileSink({writer: [*entries]})


def check_no_snapshot(path: Path) -> None:
    """Raise an OutputExistsError if an output at a path, a file or a folder, would replace a snapshot."""
    for file in files.system.list(path) if path.is_dir() else [path]:
        is_replaced = file == path or MODEL_FILE.fullmatch(file.name) or PART_NAME.fullmatch(file.name)
        with suppress(FileFormatError):
            if is_replaced and file.is_file() and read_file(file).kind == "snapshot":
                raise OutputExistsError(path, "is a snapshot of a run and is not replaced", "choose another name")


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model, in shards or in one file."""
    return any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME))


def check_free_folder(folder: Path, overwrite: bool) -> None:
    """Raise an OutputExistsError if a folder is a file, or holds a model that may not be replaced."""
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(folder, "is a file; shards need a folder")
    if not overwrite and holds_model(folder):
        hint = "choose another folder" if files.is_url(folder) else OTHER_FOLDER
        raise OutputExistsError(folder, "holds a model already", hint)


# --- safetensors -------------------------------------------------------------------------------------


class FileSink:
    """A sink that writes the tensors of one target into files, which get their names by `commit`.

    Arguments:
        writers: the files, each with the names of its tensors.
    """

    def __init__(self, writers: Mapping[TensorFileWriter, list[str]]) -> None:
        self._writers = writers
        self._places = {name: writer for writer, names in writers.items() for name in names}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a complete tensor."""
        self._places[name].write(name, tensor_bytes(tensor))

    def open_tile(self, tile: Tile) -> Writer:
        """Return the function that writes a tile, under all names of its tensors; see `synthesis.engine.Output`."""
        return partial(self._write_tile, tile)

    def _write_tile(self, tile: Tile, values: torch.Tensor) -> None:
        view, size = tensor_bytes(values), ITEM_BYTES[tile.dtype]
        if len(tile.names) == 1:
            for alias in tile.aliases[tile.names[0]]:
                self._places[alias].write(alias, view, tile.begin * size)
            return
        begin = 0  # neighbours in one file are written together, then each under its other names
        for writer, run in groupby(tile.names, self._places.__getitem__):
            names = list(run)
            end = begin + len(names)
            writer.write_many(names, view[tile.bounds[begin] * size : tile.bounds[end] * size])
            begin = end
        for name, (start, stop) in zip(tile.names, pairwise(tile.bounds), strict=True):
            for alias in tile.aliases[name][1:]:
                self._places[alias].write(alias, view[start * size : stop * size])

    def commit(self) -> None:
        """Give the complete files their names."""
        for writer in self._writers:
            writer.commit()

    def discard(self) -> None:
        """Remove the files that were not committed."""
        for writer in self._writers:
            writer.discard()


class _ShardedSink(FileSink):
    """A folder of shards and an index, laid out as by the Hugging Face libraries.

    The index is written last: without it no reader takes the folder for a model. A model that fits one shard is one
    file without an index. Replacing a model leaves no file of the old model, since those libraries load the layout that
    they look for first; if replacing fails, the old model stays complete.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry], header: Header, options: OutputOptions) -> None:
        # The objects of a model in a store would be replaced one after the other.
        overwrite = options.overwrite and not files.is_url(folder)
        check_free_folder(folder, overwrite)
        for path in model_files_in(folder):
            if path.is_dir() and not path.is_symlink():
                raise OutputExistsError(path, "is a directory, which no model replaces", "choose another folder")
        self.folder, self._overwrite = folder, overwrite
        self._old: dict[Path, Path] = {}  # temporary names of the files of the replaced model
        self._published: list[Path] = []
        self._committed = False
        self._split = split_state_dict_into_shards_factory(
            dict(entries),
            get_storage_size=lambda entry: entry.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=options.shard_bytes,
        )
        with files.reported_as_write_error(folder):
            self._made = files.make_directory(folder)
        writers: dict[TensorFileWriter, list[str]] = {}
        self._writers = writers
        try:
            for file, names in self._split.filename_to_tensors.items():
                shard = {name: entries[name] for name in names}
                writers[TensorFileWriter(folder / file, shard, *header, overwrite)] = names
        except BaseException:
            self.discard()
            raise
        super().__init__(writers)

    def commit(self) -> None:
        with files.reported_as_write_error(self.folder):
            for path in model_files_in(self.folder) if self._overwrite else ():
                self._keep(path)
        while len(self._published) < len(self._writers):
            self.publish_next()
        if self._split.is_sharded:
            text = encode_index(self._split.tensor_to_filename, self._split.metadata["total_size"])
            files.write_atomically(self.folder / INDEX_NAME, text, self._overwrite)
            self._published.append(self.folder / INDEX_NAME)
        with files.reported_as_write_error(self.folder):
            for path in self._old.keys() - set(self._published):
                files.unlink_if_exists(path)
            if not files.is_url(self.folder):
                files.system.fsync_directory(self.folder)
        self._committed = True
        files.discard(self._old.values())

    @property
    def files(self) -> list[list[str]]:
        """The names of the tensors of each file."""
        return [*self._writers.values()]

    def publish_next(self) -> None:
        """Give the next file its name; its tensors are complete."""
        writer = [*self._writers][len(self._published)]
        writer.commit()
        self._published.append(writer.path)

    def discard(self) -> None:
        super().discard()
        if self._committed:
            return
        for path in self._published:
            files.unlink_if_exists(path)
        for path, temporary in self._old.items():
            if temporary.exists():
                files.system.rename(temporary, path)
                files.unlink_if_exists(temporary)  # a rename keeps both names if they are links to one file
        files.remove_directories(self._made)

    def _keep(self, path: Path) -> None:
        """Link a file of the old model to a temporary name; rename the index, so that it never lists two models."""
        self._old[path] = files.temporary_path(self.folder)
        if path.name != INDEX_NAME:
            try:
                return files.system.link(path, self._old[path])
            except OSError as error:
                if error.errno not in files.NO_HARD_LINKS:
                    raise
        return files.system.rename(path, self._old[path])


def model_files_in(folder: Path) -> list[Path]:
    """Return the weight files and the index of the models in a folder, by name."""
    paths = files.system.list(folder) if folder.is_dir() else []
    return sorted(path for path in paths if path.name == INDEX_NAME or MODEL_FILE.fullmatch(path.name))


# --- layouts that take all tensors at once -------------------------------------------------------------


class _MemorySink(TensorOutput):
    """A sink that collects the tensors in memory, for a library that writes a model in one call."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        super().__init__({name: entry.shape for name, entry in entries.items()}, torch.device("cpu"))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor.cpu()

    def open_tile(self, tile: Tile) -> Writer:
        writer = super().open_tile(tile)
        for name in tile.names:
            self.tensors |= dict.fromkeys(tile.aliases[name], self.tensors[name])
        return writer


class _TorchSink(_MemorySink):
    """A sink for a .pt file with a state dict."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], overwrite: bool) -> None:
        super().__init__(entries)
        self._file = files.PendingFile(path, overwrite)

    def commit(self) -> None:
        try:
            torch.save(self.tensors, _Stream(self._file))  # type: ignore[arg-type]  # any object with `write`
        except RuntimeError as error:
            # torch's archive writer replaces errors of the stream, and a KeyboardInterrupt, by its own error.
            cause: BaseException | None = error
            while isinstance(cause, RuntimeError):
                cause = cause.__context__
            raise cause or error from None
        self._file.publish()

    def discard(self) -> None:
        self._file.discard()


_DCP_METADATA = ".metadata"


class _DcpSink(_MemorySink):
    """A sink for a folder of torch.distributed.checkpoint, which appears complete or not at all."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry], overwrite: bool) -> None:
        self._folder, self._made = folder, files.temporary_path_for(folder)
        is_folder, is_url = folder.is_dir() and not folder.is_symlink(), files.is_url(folder)
        present = list(folder.iterdir()) if is_folder else []
        is_free = not present or (overwrite and _is_dcp_folder(present) and not is_url)
        if (folder.is_symlink() or folder.exists()) and not (is_folder and is_free):
            what = "holds a model already" if _is_dcp_folder(present) else "is or holds something else"
            hint = "choose another folder" + ", or `overwrite` to replace a model" * (not is_url)
            raise OutputExistsError(folder, what, hint)
        super().__init__(entries)

    def commit(self) -> None:
        from torch.distributed.checkpoint.api import CheckpointException  # slow to import
        from torch.distributed.checkpoint.state_dict_saver import save

        with files.reported_as_write_error(self._folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is only one process
            try:
                save(self.tensors, checkpoint_id=str(self._made), no_dist=True)
            except CheckpointException as error:
                cause = next(iter(error.failures.values()))[0]
                raise cause if isinstance(cause, OSError) else error from error
            old = files.temporary_path_for(self._folder)
            if not files.is_url(self._folder) and self._folder.exists():
                files.system.rename(self._folder, old)
            files.publish_folder(self._made, self._folder)
            shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        shutil.rmtree(self._made, ignore_errors=True)


def _is_dcp_folder(entries: Sequence[Path]) -> bool:
    names = {entry.name for entry in entries}
    return _DCP_METADATA in names and all(name == _DCP_METADATA or name.endswith(".distcp") for name in names)


class _Stream(io.RawIOBase):
    """A stream for torch.save that writes to a pending file."""

    def __init__(self, file: files.PendingFile) -> None:
        self._file, self._offset = file, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write_at(view, self._offset)
        self._offset += len(view)
        return len(view)


Sink = FileSink | _TorchSink | _DcpSink
"""A writer of the tensors of one target, complete (`write`) or in tiles (as an `Output`). `commit` publishes the files;
`discard` removes them if they were not committed."""
