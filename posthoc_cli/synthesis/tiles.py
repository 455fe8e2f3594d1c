"""Tiles: what a thread reads, sums and writes at a time.

Tiles do not overlap, and consist of the blocks that have checksums, for every dtype of the
snapshots and the output; so each byte is read once, and verified as it is read. An exception is the
chunks in the parts of a snapshot, which end anywhere: their blocks at the edges of a tile are read
twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch

from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.entry import BLOCK, tensor_bytes
from posthoc_cli.snapshots.selection import running_statistics
from posthoc_cli.synthesis.plan import Combination

# Elements of a tile for one target; for several, whose sums need memory for a row each, a tile is
# one block. Smaller tiles make short calls, for which threads wait for each other (measured on two
# cores: 65,536 elements 5.6 GB/s, 262,144 11.3, 524,288 12.6).
ONE_TARGET = 4 * BLOCK
# of a tensor whose rows are spread over chunks, which each tile reads some blocks of twice
MOST_PARTED = 16 * BLOCK
# small tensors in one tile, so that it takes milliseconds even if tensors have one element
MAX_BATCH = 1024


class TileKind(NamedTuple):
    """What the tensors of a tile have in common: they are made alike."""

    # "average"; "variance", an average that is kept positive; "stored", an average that is taken
    # as it is; or "copy"
    role: str
    dtype: str  # safetensors name of the output's dtype
    wide: str  # of the dtype of the sums; without sums of the stored dtype
    stored: tuple[str, ...]  # the dtype in each source


@dataclass(frozen=True)
class Tile:
    """The elements from `begin` on of a large tensor, or several complete small tensors, end to
    end."""

    plan: Combination  # with the coefficients of its tensors
    kind: TileKind
    names: tuple[str, ...]  # the stored names of the tensors
    # the offset of each tensor in the tile, in elements, and the number of elements
    bounds: tuple[int, ...]
    begin: int = 0
    last: bool = True  # whether this tile and the tiles before it complete its tensors

    @property
    def size(self) -> int:
        return self.bounds[-1]

    @cached_property
    def box(self) -> Box:
        """The box of a large tensor."""
        return self.plan.box(self.names[0])

    @cached_property
    def spans(self) -> list[tuple[str, int, int]]:
        """The name of each tensor, with its beginning and its end in the tile."""
        begins = self.bounds[:-1]
        ends = self.bounds[1:]
        return list(zip(self.names, begins, ends, strict=True))

    def pieces(
        self,
        values: torch.Tensor,
    ) -> Iterator[tuple[str, memoryview, int]]:
        """Yield under all names the bytes of each tensor, and where in the tensor they begin."""
        view = tensor_bytes(values)
        item = ITEM_BYTES[self.kind.dtype]
        for name, begin, end in self.spans:
            data = view[begin * item : end * item]
            for alias in self.plan.names[name]:
                yield alias, data, self.begin * item

    @property
    def stored_bytes(self) -> int:
        """The bytes to read for the tile, over all sources."""
        item_bytes = [ITEM_BYTES[dtype] for dtype in self.kind.stored]
        return self.size * sum(item_bytes)


def tile_size(targets: int) -> int:
    """Choose the number of elements in a tile of one large tensor."""
    return ONE_TARGET if targets == 1 else BLOCK


def cut_tiles(
    plan: Combination,
    targets: int,
    device: torch.device,
) -> list[Tile]:
    """Cut all tensors into tiles; the tiles of one tensor are consecutive."""
    tiles = list[Tile]()
    statistics = running_statistics(plan.newest.tensors)
    batches = defaultdict[TileKind, list[str]](list)
    sizes = Counter[TileKind]()
    for name in plan.tensors:
        kind = _tile_kind(plan, name, statistics, device)
        size = plan.box(name).size
        if size > BLOCK or name in plan.boxes:
            tiles += _cut_tensor(plan, kind, name, tile_size(targets))
            continue
        is_full = len(batches[kind]) == MAX_BATCH
        if is_full or sizes[kind] + size > BLOCK:
            names = batches.pop(kind)
            tiles.append(_join_tensors(plan, kind, names))
            sizes[kind] = 0
        batches[kind].append(name)
        sizes[kind] += size
    for kind, names in batches.items():
        tiles.append(_join_tensors(plan, kind, names))
    return tiles


def _tile_kind(
    plan: Combination,
    name: str,
    statistics: Collection[str],
    device: torch.device,
) -> TileKind:
    tensor = plan.tensors[name]
    stored = tuple(source.entries[name].dtype for source in plan.summed(name))
    dtype = plan.output_dtype(name)
    if tensor.role == "copy" or plan.coefficients is None:
        role = "copy" if tensor.role == "copy" else "stored"
        newest = plan.newest.entries[name].dtype
        return TileKind(role, dtype, newest, stored)
    role = "average"
    is_statistic = tensor.role == "statistic" or name in statistics
    if is_statistic and name.endswith("running_var"):
        role = "variance"
    # Else large coefficients of both signs would cost a sum too many digits.
    is_coarse = any(ITEM_BYTES[each] < 4 for each in stored)
    wide = "F64"
    if device.type == "mps" or (is_coarse and tensor.dtype != "F64"):
        wide = "F32"
    return TileKind(role, dtype, wide, stored)


def _cut_tensor(
    plan: Combination,
    kind: TileKind,
    name: str,
    size: int,
) -> Iterator[Tile]:
    """Yield the tiles of a tensor, of at most `size` elements unless chunks make them longer."""
    count = plan.box(name).size
    cells = max(source.cells(name) for source in plan.summed(name))
    step = min(size * max(1, cells), max(size, MOST_PARTED))
    for begin in range(0, max(count, 1), step):
        end = min(begin + step, count)
        bounds = (0, end - begin)
        yield Tile(plan, kind, (name,), bounds, begin, last=end == count)


def _join_tensors(
    plan: Combination,
    kind: TileKind,
    names: Sequence[str],
) -> Tile:
    sizes = [plan.box(name).size for name in names]
    bounds = accumulate(sizes, initial=0)
    return Tile(plan, kind, tuple(names), tuple(bounds))


class Output(Protocol):
    """What takes the tiles of one target."""

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        """Take the values of a tile, once, in any thread; the caller reuses their memory."""
