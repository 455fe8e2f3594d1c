"""Output layouts: one safetensors file, shards with an index, a .pt state dict.

Each layout is a sink (see `Sink`): it takes tensors one by one and appears whole, at the end, or not at
all. `export_file` turns any safetensors file into any layout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from posthoc_cli import files
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
)
from posthoc_cli.snapshots import decoding
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.reader import TensorFile
from posthoc_cli.snapshots.tensors import (
    parse_dtype,
    stored_name,
    tensor_bytes,
    tensor_from_bytes,
    torch_dtype,
)
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis import Plan, Progress, synthesize

LAYOUTS = ("safetensors", "sharded", "pt")
DEFAULT_SHARD_SIZE = "5GB"
SHARD_PATTERN = "model{suffix}.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Sink(Protocol):
    """Takes the tensors of one target. A context manager: what was not committed leaves nothing behind."""

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""
        ...

    def commit(self) -> None:
        """Make the output appear."""
        ...

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def layout_of(path: Path, layout: str | None) -> str:
    """The layout asked for, or the one that the output's name says: .pt, .safetensors, or a folder of shards."""
    if layout is not None:
        if layout not in LAYOUTS:
            raise InvalidValueError(f"format {layout!r}: must be one of {', '.join(LAYOUTS)}")
        return layout
    if path.suffix == fmt.SUFFIX:
        return "safetensors"
    if path.suffix in (".pt", ".pth", ".bin"):
        return "pt"
    if path.suffix == "" or path.is_dir():
        return "sharded"
    raise InvalidValueError(f"{path}: name a .safetensors or .pt file, or a folder for shards, or say --format")


def parse_size(size: str) -> int:
    """Bytes from "5GB", "300MB", "1.5TB" (powers of 1000) or a plain number.

    Raises:
        InvalidValueError: anything else, or nothing above 0.
    """
    text = size.strip().upper()
    unit = next((u for u in _SIZE_UNITS if text.endswith(u)), "")
    try:
        value = float(text.removesuffix(unit)) * _SIZE_UNITS.get(unit, 1)
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**63:
        raise InvalidValueError(f"size {size!r}: must be a number of bytes above 0, with or without KB, MB, GB or TB")
    return int(value)


def output_exists(path: Path, layout: str) -> bool:
    """Whether an output is there already."""
    if layout == "sharded":
        return any((path / name).exists() for name in (INDEX_NAME, SHARD_PATTERN.format(suffix="")))
    return os.path.lexists(path)


def make_sink(
    layout: str,
    path: Path,
    specs: Sequence[fmt.TensorSpec],
    metadata: Mapping[str, str],
    overwrite: bool = False,
    max_shard_size: int | None = None,
) -> Sink:
    """A sink that writes `specs` in a layout.

    Arguments:
        layout: "safetensors", "sharded" (`path` is a folder) or "pt".
        path: the output.
        specs: every tensor that will be written.
        metadata: strings for the header; a .pt file has no place for them.
        overwrite: replace what is there.
        max_shard_size: bytes a shard, for "sharded".

    Raises:
        OutputExistsError, WriteError.
    """
    if not path.parent.is_dir() and layout != "sharded":
        raise InvalidValueError(f"{path}: its folder does not exist")
    if layout == "pt":
        return _TorchSink(path, overwrite)
    if layout == "sharded":
        return _ShardedSink(path, specs, metadata, overwrite, max_shard_size or parse_size(DEFAULT_SHARD_SIZE))
    return _FileSink(TensorFileWriter(path, specs, metadata, overwrite))


def write_synthesis(
    plan: Plan,
    paths: Sequence[Path],
    layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
) -> None:
    """Synthesize every target of a plan into its path; none appears before all are complete.

    Arguments:
        plan: from `plan_synthesis`.
        paths: an output a target.
        layout, overwrite, max_shard_size: as in `export_file`.
        dtype, device, progress: as in `synthesis.synthesize`.
    """
    specs = plan.specs(dtype)
    limit = parse_size(max_shard_size)
    with ExitStack() as stack:
        sinks = [
            stack.enter_context(
                make_sink(
                    layout_of(path, layout),
                    path,
                    specs,
                    fmt.output_metadata(plan.output_info(i)),
                    overwrite,
                    limit,
                )
            )
            for i, path in enumerate(paths)
        ]
        for name, tensors in synthesize(plan, dtype, device, progress):
            for sink, tensor in zip(sinks, tensors, strict=True):
                sink.write(name, tensor)
        for sink in sinks:
            sink.commit()


# --- the layouts -----------------------------------------------------------------------------------


class _FileSink:
    """One safetensors file."""

    def __init__(self, writer: TensorFileWriter) -> None:
        self._writer = writer

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._writer.write(name, tensor_bytes(tensor))

    def commit(self) -> None:
        self._writer.commit()

    def __enter__(self) -> _FileSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.discard()


class _ShardedSink:
    """Shards and an index in a folder, as the Hugging Face libraries lay them out.

    The index comes last: without it no reader takes the folder for a model. A model that fits one shard is
    one file without an index, as there.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[fmt.TensorSpec],
        metadata: Mapping[str, str],
        overwrite: bool,
        limit: int,
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(f"{folder}: is a file; shards need a folder")
        if not overwrite and output_exists(folder, "sharded"):
            raise OutputExistsError(f"{folder}: holds a model already; choose another folder, or --force to replace it")
        self._folder = folder
        self._overwrite = overwrite
        by_name = {spec.name: spec for spec in specs}
        self._split = split_state_dict_into_shards_factory(
            by_name, get_storage_size=lambda s: s.nbytes, filename_pattern=SHARD_PATTERN, max_shard_size=limit
        )
        self._made_folder = not folder.exists()
        with files.reported_as_write_error(folder):
            files.make_directory(folder)
        self._stack = ExitStack()
        self._published: list[Path] = []
        try:
            self._writers = {
                file: self._stack.enter_context(
                    TensorFileWriter(folder / file, [by_name[name] for name in names], metadata, overwrite)
                )
                for file, names in self._split.filename_to_tensors.items()
            }
        except BaseException:
            self._clean_up()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._writers[self._split.tensor_to_filename[name]].write(name, tensor_bytes(tensor))

    def commit(self) -> None:
        for file, writer in self._writers.items():
            writer.commit()
            self._published.append(self._folder / file)
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            files.write_whole(self._folder / INDEX_NAME, text.encode(), self._overwrite)
        self._published.clear()
        self._made_folder = False

    def _clean_up(self) -> None:
        self._stack.close()
        for path in self._published:
            path.unlink(missing_ok=True)
        if self._made_folder:
            self._folder.rmdir()

    def __enter__(self) -> _ShardedSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()


class _TorchSink:
    """A .pt state dict. torch.save takes it whole, so that this one layout holds the model in memory."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._file = files.PendingFile(path, overwrite)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.cpu()

    def commit(self) -> None:
        with (
            files.reported_as_write_error(self._file.path),
            os.fdopen(os.dup(self._file.descriptor), "wb") as stream,
        ):
            try:
                torch.save(self._tensors, stream)
            except RuntimeError as error:
                # torch's archive writer reports a refused write as a RuntimeError without an errno.
                raise OSError(f"torch.save: {str(error).splitlines()[0]}") from error
        self._file.publish()

    def __enter__(self) -> _TorchSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.discard()


# --- one file into another layout ------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What an export made: tensors written, of which so many were taken from the base."""

    tensors: int
    from_base: int
    nbytes: int


def export_file(
    source: Path,
    out: Path,
    layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    base: Path | None = None,
    prefix: str = "",
    strip_prefix: str = "",
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
) -> Exported:
    """Write a safetensors file in another layout. One tensor at a time, except for .pt.

    Arguments:
        source: an output of a synthesis, a snapshot (exported in the model's own dtypes) or any safetensors file.
        out: the output; its name decides the layout unless `layout` says it.
        dtype: of all floating-point tensors but copies; None keeps each one's own.
        base: a safetensors file, or a folder with an index, whose further tensors complete the output.
        prefix, strip_prefix: put in front of, or taken from, the names in `source`, before they are compared
            with those in `base`.
        overwrite: replace what is there.
        max_shard_size: such as "5GB".
        progress: told the bytes written so far.

    Raises:
        FileFormatError, MismatchError, InvalidValueError, OutputExistsError, WriteError, NonFiniteError.
    """
    layout = layout_of(out, layout)
    wanted = parse_dtype(dtype)
    limit = parse_size(max_shard_size)
    with ExitStack() as stack:
        own, info = _read_source(stack, source, wanted)
        renamed = _rename(own, prefix, strip_prefix)
        if info is not None:
            info = _with_copies(info, renamed)
        added = {} if base is None else _read_base(stack, base, wanted, renamed)
        tensors = renamed | added
        metadata = {"format": "pt"} if info is None else fmt.output_metadata(info)
        specs = [fmt.TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        with make_sink(layout, out, specs, metadata, overwrite, limit) as sink:
            for name, tensor in tensors.items():
                sink.write(name, tensor.load())
                if progress is not None:
                    progress(tensor.nbytes)
            sink.commit()
    return Exported(len(tensors), len(added), sum(tensor.nbytes for tensor in tensors.values()))


@dataclass(frozen=True)
class _PlannedTensor:
    """A tensor of an input, with the dtype that it will have."""

    file: TensorFile
    name: str
    dtype: str
    copy: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.header.tensors[self.name].shape

    @property
    def nbytes(self) -> int:
        return fmt.TensorSpec(self.name, self.dtype, self.shape).nbytes

    def load(self) -> torch.Tensor:
        stored = tensor_from_bytes(self.file.read(self.name), self.file.header.tensors[self.name].dtype, self.shape)
        result = stored.to(torch_dtype(self.dtype))
        if result.dtype != stored.dtype and bool((stored.isfinite() & ~result.isfinite()).any()):
            raise NonFiniteError(f"{self.file.path}: tensor {self.name!r}: {self.dtype} cannot hold its largest value")
        return result


def _read_source(
    stack: ExitStack, source: Path, dtype: torch.dtype | None
) -> tuple[dict[str, _PlannedTensor], fmt.OutputInfo | None]:
    """The tensors of the file to export, under all their names, and what it says about itself."""
    file = stack.enter_context(TensorFile(source))
    kind = decoding.file_kind(file.header)
    if kind == "snapshot":
        return _read_snapshot(file, dtype)
    info = decoding.decode_output(source, file.header) if kind == "output" else None
    copies = set() if info is None else set(info.copies)
    return {name: _plan(file, name, name in copies, dtype) for name in file.header.tensors}, info


def _read_snapshot(file: TensorFile, dtype: torch.dtype | None) -> tuple[dict[str, _PlannedTensor], fmt.OutputInfo]:
    snapshot = decoding.decode_snapshot(file.path, file.header)
    names = {name: name for name in snapshot.tensors} | snapshot.aliases
    tensors = {}
    for alias, name in names.items():
        tracked = snapshot.tensors[name]
        stored = tracked.dtype if tracked.role == "copy" or dtype is None else stored_name(dtype)
        tensors[alias] = _PlannedTensor(file, name, stored, tracked.role == "copy")
    info = fmt.OutputInfo(
        run_id=snapshot.run_id,
        sigma_rel=snapshot.sigma_rel,
        gamma=snapshot.gamma,
        t=snapshot.t,
        t_unit=snapshot.t_unit,
        method="tracked",
        profile_error=0.0,
        predicted_error=None,
        snapshots=((file.path.name, 1.0),),
    )
    return tensors, info


def _plan(file: TensorFile, name: str, copy: bool, dtype: torch.dtype | None) -> _PlannedTensor:
    own = file.header.tensors[name].dtype
    keeps = copy or dtype is None or not torch_dtype(own).is_floating_point
    return _PlannedTensor(file, name, own if keeps or dtype is None else stored_name(dtype), copy)


def _with_copies(info: fmt.OutputInfo, tensors: Mapping[str, _PlannedTensor]) -> fmt.OutputInfo:
    copies = tuple(name for name, tensor in tensors.items() if tensor.copy)
    return fmt.OutputInfo(**{**vars(info), "copies": copies})


def _rename(tensors: Mapping[str, _PlannedTensor], prefix: str, strip: str) -> dict[str, _PlannedTensor]:
    if strip and not any(name.startswith(strip) for name in tensors):
        raise InvalidValueError(
            f"strip-prefix {strip!r}: no tensor's name begins so; the first is {min(tensors, default='')!r}"
        )
    renamed: dict[str, _PlannedTensor] = {}
    for name, tensor in tensors.items():
        new = prefix + name.removeprefix(strip)
        if new in renamed:
            raise InvalidValueError(f"strip-prefix {strip!r}: gives two tensors the name {new!r}")
        renamed[new] = tensor
    return renamed


def _read_base(
    stack: ExitStack, base: Path, dtype: torch.dtype | None, own: Mapping[str, _PlannedTensor]
) -> dict[str, _PlannedTensor]:
    """The tensors that only the base has; those in both must have the same shape."""
    tensors = {}
    seen = set()
    for file in _base_files(stack, base):
        for name, entry in file.header.tensors.items():
            seen.add(name)
            if name not in own:
                tensors[name] = _plan(file, name, False, dtype)
            elif own[name].shape != entry.shape:
                raise MismatchError(
                    f"{file.path}: tensor {name!r} has the shape {list(entry.shape)}, "
                    f"the average {list(own[name].shape)}"
                )
    if not seen & own.keys():
        raise MismatchError(
            f"{base}: none of the averaged tensors is in it: its names look like {min(seen, default='')!r}, "
            f"theirs like {min(own, default='')!r}; --prefix and --strip-prefix rename"
        )
    return tensors


def _base_files(stack: ExitStack, base: Path) -> Iterator[TensorFile]:
    if not base.is_dir():
        yield stack.enter_context(TensorFile(base))
        return
    indexes = sorted(base.glob("*.safetensors.index.json"))
    if not indexes:
        yield stack.enter_context(TensorFile(base / SHARD_PATTERN.format(suffix="")))
        return
    try:
        shards = sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{indexes[0]}: is not an index of shards") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise FileFormatError(f"{indexes[0]}: {shard!r} is not the name of a file beside it")
        yield stack.enter_context(TensorFile(base / shard))
