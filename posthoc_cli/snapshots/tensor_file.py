"""One safetensors file with checksums: its header, its tensors, read and written, and the check of all its bytes.

Read: the header first, checked; then tensors, each block verified as it is read. Files are read, never mapped, so that
one that shrinks under a reader is no crash. A FileFormatError names the file that cannot be opened, is no regular file,
is damaged or too short, and the tensor.

Written: a file is absent or complete, see `files.PendingFile`: a write that was not committed leaves nothing. Every
byte of every tensor is written exactly once, in any order and from any number of threads, and has a checksum. The
header, which holds the checksums, is laid out first and filled in last. Memory: the header and what is being written.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import accumulate, chain, groupby, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli import files
from posthoc_cli.dtypes import DTYPES, torch_dtype
from posthoc_cli.errors import FileFormatError, InvalidValueError, VanishedError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.headers import DecodeCache

if TYPE_CHECKING:
    import torch

THREADS = 8
"""Blocks that are read at a time: some devices need several requests in flight."""

_NEAR = 4096
"""Bytes between two small tensors that are read rather than passed over by another request."""

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of pickles and of archives of torch.save."""

_File = TypeVar("_File", bound="OpenedFile")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


# --- opening files


@contextmanager
def named_on_error(path: Path, verb: str) -> Iterator[None]:
    """Turn the system's errors of the block into a FileFormatError: the file cannot be opened, or read."""
    try:
        yield
    except OSError as error:
        raise _cannot(path, verb, error) from error
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r}", f"cannot be {verb}: no file can have this name") from error


def _cannot(path: Path, verb: str, error: OSError) -> FileFormatError:
    # On a network file system an open file goes away, too, when another host removes it.
    kind = VanishedError if error.errno in (errno.ENOENT, errno.ESTALE) else FileFormatError
    hint = "raise the limit of open files, as by ulimit -n 4096" if error.errno == errno.EMFILE else ""
    return kind(path, f"cannot be {verb}: {(error.strerror or str(error)).lower()}", hint)


class OpenedFile:
    """A regular file, open for reading at any place; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with named_on_error(path, "opened"):
            self._descriptor = files.system.open(path)
        known = os.fstat(self._descriptor)
        self.size = known.st_size
        if not stat.S_ISREG(known.st_mode):
            self.close()
            raise FileFormatError(path, "is not a regular file")

    def read_at(self, count: int, offset: int) -> bytes:
        """The bytes at an offset; fewer at the end of the file."""
        with named_on_error(self.path, "read"):
            return files.read_at(self._descriptor, count, offset)

    def close(self) -> None:
        """Close the file."""
        files.system.close(self._descriptor)

    def __enter__(self: _File) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_small_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes."""
    with OpenedFile(path) as file:
        if file.size > most:
            raise FileFormatError(path, f"has {file.size:,} bytes; at most {most:,} are allowed")
        return file.read_at(file.size, 0)


def read_header(path: Path, cache: DecodeCache | None = None, check_size: bool = True) -> fmt.FileHeader:
    """The checked header of a safetensors file; without `check_size` also of a truncated file."""
    with OpenedFile(path) as file:
        return headers.decode_header(path, _read_start(file), file.size if check_size else None, cache)


def _read_start(file: OpenedFile) -> bytes:
    """The first 8 + N bytes."""
    prefix = file.read_at(8, 0)
    if len(prefix) < 8:
        raise FileFormatError(file.path, f"truncated: {file.size:,} bytes cannot hold a safetensors header")
    length = int.from_bytes(prefix, "little")
    if length > fmt.MAX_HEADER_BYTES or 8 + length > file.size:
        if prefix.startswith(_PICKLES):
            raise FileFormatError(file.path, "is a pickle (.pt, .bin), not safetensors", "give it its own ending")
        told = f"its header would take {length:,} bytes of a file of {file.size:,}"
        raise FileFormatError(file.path, f"damaged, truncated or not safetensors: {told}")
    text = file.read_at(length, 8)
    if len(text) < length:
        raise FileFormatError(file.path, "the file became shorter while it was read")
    return prefix + text


# --- reading tensors


class TensorFile(OpenedFile):
    """A safetensors file opened for its tensors; any number of threads may read at once.

    The header is read again and must be `expected`: the file that was planned with is the file that is read.
    """

    def __init__(self, path: Path, expected: fmt.FileHeader | None = None) -> None:
        super().__init__(path)
        try:
            self.header = self._checked_header(expected)
            self._checksums = headers.decode_checksums(path, self.header)
        except BaseException:
            self.close()
            raise

    def _checked_header(self, expected: fmt.FileHeader | None) -> fmt.FileHeader:
        """The header; `expected` itself if the file still has it, which saves decoding it again."""
        start = _read_start(self)
        if expected is not None and (len(start), self.size) == (expected.payload_start, expected.file_bytes):
            checksum = expected.metadata.get("ema.checksum")
            if checksum is not None and headers.has_header_checksum(start, checksum):
                return expected
        header = headers.decode_header(self.path, start, self.size)
        if expected not in (None, header):
            raise FileFormatError(self.path, "was replaced while it was being used", "run again")
        return header

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, verified where the file has checksums: shape [nbytes]."""
        data = np.empty(self.header.tensors[name].nbytes, dtype=np.uint8)
        reader = self.read_range(name, 0, data.size)
        for begin in range(0, data.size, fmt.BLOCK_BYTES):  # checksums find a block in the cache
            reader.read_into(data[begin : begin + fmt.BLOCK_BYTES].data)
        return data

    def read_range(self, name: str, begin: int, end: int) -> RangeReader:
        """The bytes `begin` to `end` of a tensor, at ends of its blocks, read in order and verified."""
        return RangeReader(self, name, begin, end)

    def read_small(self, names: Sequence[str], parts: Sequence[memoryview], view: memoryview | None = None) -> None:
        """Fill `parts` with tensors of at most one block each, verified; of `view` they are consecutive parts."""
        places = [self.header.tensors[name] for name in names]
        if view is not None and all(other.begin == _end(one) for one, other in pairwise(places)):
            self.fill(names[0], view, 0)
        else:
            self._gather(names, places, parts)
        self.verify(names, parts)

    def _gather(self, names: Sequence[str], places: Sequence[fmt.TensorEntry], parts: Sequence[memoryview]) -> None:
        """The same, unverified, of tensors anywhere in the file: those that are near each other are read together."""
        order = sorted(range(len(names)), key=lambda index: places[index].begin)
        far = [i for i, (a, b) in enumerate(pairwise(order), 1) if places[b].begin - _end(places[a]) > _NEAR]
        for first, last in pairwise([0, *far, len(order)]):
            begin, end = places[order[first]].begin, _end(places[order[last - 1]])
            room = np.empty(end - begin, np.uint8).data
            self.fill(names[order[first]], room, 0)
            for index in order[first:last]:
                at = places[index].begin - begin
                parts[index][:] = room[at : at + places[index].nbytes]

    def fill(self, name: str, view: memoryview, begin: int) -> None:
        """Fill `view`, unverified, from byte `begin` of a tensor on, across the tensors that follow."""
        self._fill_from(name, view, self.header.payload_start + self.header.tensors[name].begin + begin)

    def _fill_from(self, name: str, view: memoryview, offset: int) -> None:
        while view:
            try:
                count = files.system.read(self._descriptor, view, offset)
            except OSError as error:
                raise _cannot(self.path, "read", error) from error
            if count == 0:
                raise FileFormatError(self.path, f"tensor {shown(name)}: the file became shorter while it was read")
            view, offset = view[count:], offset + count

    def verify(self, names: Sequence[str], parts: Sequence[memoryview]) -> None:
        """Check all bytes of tensors of at most one block each, which the caller has read by `fill`."""
        if not self._checksums:
            return
        found = [xxhash.xxh3_64_hexdigest(part) if part else "" for part in parts]
        expected = [*map(self._checksums.__getitem__, names)]
        if found != expected:
            raise self.damaged(next(n for n, a, b in zip(names, found, expected, strict=True) if a != b))

    def checksum(self, name: str, block: int = 0) -> str | None:
        """The checksum that the header has for a block, 16 hexadecimal digits; None in a file without checksums."""
        digits = self._checksums.get(name)
        return None if digits is None else digits[16 * block : 16 * block + 16]

    def damaged(self, name: str) -> FileFormatError:
        """The error for a block that does not match its checksum."""
        return FileFormatError(self.path, f"tensor {shown(name)} is damaged: its checksum does not match")

    def read_unverified(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """The bytes `begin` to `end` of a tensor, without checksums, for estimates only: shape [end - begin]."""
        data = np.empty(end - begin, dtype=np.uint8)
        self.fill(name, data.data, begin)
        return data


class RangeReader:
    """Some blocks of one tensor, read in order, in parts of any size; each block is verified at its end."""

    def __init__(self, file: TensorFile, name: str, begin: int, end: int) -> None:
        self._file, self._name, self._position, self._end = file, name, begin, end
        self._hash = xxhash.xxh3_64()

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next."""
        self._file.fill(self._name, view, self._position)
        if self._file.checksum(self._name) is None:
            self._position += len(view)
            return
        while view:
            left = fmt.BLOCK_BYTES - self._position % fmt.BLOCK_BYTES
            part, view = view[:left], view[left:]
            self._hash.update(part)
            self._position += len(part)
            if self._position % fmt.BLOCK_BYTES == 0 or self._position == self._end:
                expected = self._file.checksum(self._name, (self._position - 1) // fmt.BLOCK_BYTES)
                if self._hash.hexdigest() != expected:
                    raise self._file.damaged(self._name)
                self._hash.reset()


def _end(entry: fmt.TensorEntry) -> int:
    return entry.begin + entry.nbytes


# --- writing


class TensorFileWriter:
    """Writes one safetensors file. Use it as a context manager and end with `commit`.

    `specs` are all tensors that will be written; checksums are added to `metadata`.
    """

    def __init__(
        self, path: Path, specs: Sequence[fmt.TensorSpec], metadata: Mapping[str, str], overwrite: bool = False
    ) -> None:
        self.path, self._metadata = path, metadata
        self._entries = fmt.lay_out(specs)
        self._blocks: dict[str, list[str | None]] = {
            name: [None] * -(-entry.nbytes // fmt.BLOCK_BYTES) for name, entry in self._entries.items()
        }
        blank = {name: fmt.blank_checksums(entry.nbytes) for name, entry in self._entries.items()}
        self._payload_start = len(fmt.encode_header(self._entries, metadata, blank))
        self._file = files.PendingFile(path, overwrite)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write the bytes of one tensor to its place, once."""
        self.write_many([name], memoryview(data))

    def write_many(self, names: Sequence[str], data: memoryview) -> None:
        """Write the bytes of several tensors, which follow each other in `data`; neighbours go in one write."""
        view = data.cast("B")
        ends = list(accumulate(self._entries[name].nbytes for name in names))
        if len(view) != ends[-1]:
            raise InvalidValueError(self.path, f"tensor {names[-1]!r}: {len(view):,} bytes where {ends[-1]:,} were due")
        begin = run = 0
        for name, end, following in zip(names, ends, [*names[1:], None], strict=True):
            for index, checksum in enumerate(fmt.block_checksums(view[begin:end])):
                self._blocks[name][index] = checksum
            stop = self._position(name) + end - begin
            if following is None or self._position(following) != stop:
                self._file.write_at(view[run:end], stop - (end - run))
                run = end
            begin = end

    def write_range(self, name: str, begin: int) -> RangeWriter:
        """Write the bytes of a tensor from `begin` on, the start of a block, in order and in parts."""
        return RangeWriter(self._file, self._blocks[name], begin, self._position(name))

    def commit(self) -> str:
        """Fill in the header, make everything durable, and give the file its name; returns the header's checksum."""
        checksums = {name: "".join(block or "" for block in blocks) for name, blocks in self._blocks.items()}
        for name, entry in self._entries.items():
            if len(checksums[name]) != len(fmt.blank_checksums(entry.nbytes)):
                raise InvalidValueError(self.path, f"tensor {name!r} was never written")
        header = fmt.encode_header(self._entries, self._metadata, checksums)
        self._file.write_at(header, 0)
        self._file.publish()
        return fmt.header_checksum(header)

    def _position(self, name: str) -> int:
        return self._payload_start + self._entries[name].begin

    def discard(self) -> None:
        """Remove what was written; does nothing after `commit`."""
        self._file.discard()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class RangeWriter:
    """Some blocks of one tensor, written in order, in parts of any size; checksums run along."""

    def __init__(self, file: files.PendingFile, blocks: list[str | None], begin: int, start: int) -> None:
        self._file, self._blocks, self._position, self._start = file, blocks, begin, start
        self._hash = xxhash.xxh3_64()

    def write(self, data: memoryview) -> None:
        """Write the bytes that come next."""
        view = data.cast("B")
        self._file.write_at(view, self._start + self._position)
        while view:
            index = self._position // fmt.BLOCK_BYTES
            left = fmt.BLOCK_BYTES - self._position % fmt.BLOCK_BYTES
            part, view = view[:left], view[left:]
            self._hash.update(part)
            self._position += len(part)
            if len(part) == left:
                self._finish_block(index)

    def close(self) -> None:
        """Finish the last block, which may be shorter than the others."""
        if self._position % fmt.BLOCK_BYTES:
            self._finish_block(self._position // fmt.BLOCK_BYTES)

    def _finish_block(self, index: int) -> None:
        self._blocks[index] = self._hash.hexdigest()
        self._hash.reset()


# --- bytes and values


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major; a view where it is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_from_bytes(data: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of these bytes; it shares their memory."""
    import torch

    if data.size == 0:
        # torch gives an empty array the stride 0, which it then refuses to view as another dtype.
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.from_numpy(data).view(torch_dtype(dtype)).reshape(shape)


def _e4m3_values() -> npt.NDArray[np.float64]:
    """The value of each byte: a sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, one nan a sign."""
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, (codes & 7) / 8
    values = np.where(exponents > 0, 1 + mantissas, 2 * mantissas) * 2.0 ** (exponents - 7)
    values[127] = np.nan
    return np.concatenate([values, -values])


_E4M3 = _e4m3_values()


def decode_values(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64]:
    """Little-endian bytes as float64; a complex number is its two parts."""
    if dtype == "F8_E4M3":
        return _E4M3[data]
    if dtype == "BF16":  # the upper half of a float32
        values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F8_E5M2":  # the upper half of a float16
        values = (data.astype(np.uint16) << 8).view(np.float16)
    else:
        values = data.view("float32" if dtype == "C64" else DTYPES[dtype].torch_name)
    with np.errstate(invalid="ignore"):  # some kinds of nan raise a flag of the processor
        return values.astype(np.float64)


# --- verifying a payload: on all cores, in constant memory


class Checked(NamedTuple):
    """A part of a payload: tensors that do not match their checksums, why the first does not, those with nan or inf."""

    nbytes: int
    damaged: Sequence[str] = ()
    error: FileFormatError | None = None
    nonfinite: Sequence[str] = ()


def verify_payload(path: Path, header: fmt.FileHeader, progress: Callable[[int], object] | None = None) -> None:
    """Read a file, whose header must still be this, and check each block of each tensor. Memory: a block a thread."""
    with TensorFile(path, header) as file, closing(check_payload(file)) as found:
        for checked in found:
            if checked.error is not None:
                raise checked.error
            if progress is not None:
                progress(checked.nbytes)


def check_payload(file: TensorFile) -> Generator[Checked, None, None]:
    """Check a payload from its first byte to its last; continue after damage."""
    buffers = threading.local()  # each thread keeps one

    def check(spans: Sequence[_Span]) -> Checked:
        if not hasattr(buffers, "own"):
            buffers.own = memoryview(bytearray(fmt.BLOCK_BYTES))
        view = buffers.own[: sum(span.end - span.begin for span in spans)]
        try:
            file.fill(spans[0].name, view, spans[0].begin)
        except FileFormatError as error:
            return Checked(len(view), [span.name for span in spans], error)
        damaged, nonfinite, at = [], [], 0
        for dtype, group in groupby(spans, lambda span: file.header.tensors[span.name].dtype):
            parts, start = [], at
            for name, begin, end in group:
                parts.append((name, view[at : at + end - begin]))
                at += end - begin
                expected = file.checksum(name, begin // fmt.BLOCK_BYTES)
                if expected is not None and xxhash.xxh3_64_hexdigest(parts[-1][1]) != expected:
                    damaged.append(name)
            if holds_nonfinite(view[start:at], dtype):  # neighbours together, and one by one only if that finds some
                nonfinite += [name for name, part in parts if holds_nonfinite(part, dtype)]
        return Checked(len(view), damaged, file.damaged(damaged[0]) if damaged else None, nonfinite)

    blocks = _blocks(file.header)
    first = list(islice(blocks, 2))
    if len(first) < 2:  # threads take longer to start than to read a small file
        yield from map(check, first)
        return
    with worker_threads() as pool:
        yield from in_order(pool, check, chain(first, blocks))


class _Span(NamedTuple):
    """The bytes `begin` to `end` of a tensor, within one of its blocks."""

    name: str
    begin: int
    end: int


def _blocks(header: fmt.FileHeader) -> Iterator[list[_Span]]:
    """The payload from its first byte to its last, in consecutive spans of at most a block together."""
    batch: list[_Span] = []
    size = 0
    for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].begin):
        for begin in range(0, entry.nbytes, fmt.BLOCK_BYTES):
            end = min(begin + fmt.BLOCK_BYTES, entry.nbytes)
            if size + end - begin > fmt.BLOCK_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(_Span(name, begin, end))
            size += end - begin
    if batch:
        yield batch


def holds_nonfinite(data: memoryview, dtype: str) -> bool:
    """Whether little-endian numbers of a dtype (a safetensors name) include nan or infinity.

    Without their signs, the bits of floating-point numbers are in the order of the numbers, and those that are not
    finite come last. As signed integers the positive ones are in this order, above all others; as unsigned ones the
    negative ones are, above all others. So the two largest integers decide, without a copy.
    """
    item, least = DTYPES[dtype].nbytes, DTYPES[dtype].first_nonfinite
    if not least or not len(data):
        return False
    sign = 1 << (8 * item - 1)
    signed = np.frombuffer(data, f"<i{item}")
    return int(signed.max()) >= least or int(signed.view(f"<u{item}").max()) >= sign | least


@contextmanager
def worker_threads(count: int = THREADS) -> Iterator[Executor]:
    """Threads for the block; at its end, also on error, they finish what they have begun and nothing else."""
    pool = ThreadPoolExecutor(count, "ema-verify")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(pool: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """The function's result for each item, in their order; a limited number are in work at a time."""
    in_work: deque[Future[_Result]] = deque()
    for item in items:
        in_work.append(pool.submit(function, item))
        if len(in_work) > 4 * THREADS:
            yield in_work.popleft().result()
    while in_work:
        yield in_work.popleft().result()
