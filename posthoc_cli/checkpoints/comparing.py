"""Compare two models tensor by tensor: checkpoints, snapshots, outputs, folders of shards, in any mixture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from posthoc_cli import files
from posthoc_cli.checkpoints.checkpoint import Checkpoint, make_checkpoint
from posthoc_cli.checkpoints.contents import read_contents
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import MismatchError
from posthoc_cli.profiles import Point
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots.measurements import read_values
from posthoc_cli.snapshots.tensor_file import in_order, worker_threads

_TILE = 2**16
"""Elements that a thread compares at a time."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor, or a group of tensors, of B is from that of A: sums of squares over its elements."""

    name: str
    elements: int
    squared: float
    norm: float
    largest: float

    @property
    def relative(self) -> float | None:
        """||B - A|| / ||A||; None where that is no number: of nan, infinity, or of what is 0 in A alone."""
        value = math.sqrt(self.squared / self.norm) if self.norm > 0 else math.inf if self.squared else 0.0
        return value if math.isfinite(value) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        largest = self.largest if math.isfinite(self.largest) else None
        return {"name": self.name, "elements": self.elements, "relative": self.relative, "largest": largest}


@dataclass(frozen=True)
class Comparison:
    """Two models, tensor by tensor.

    Attributes:
        a, b: their paths.
        tensors: those of both, by name.
        only_a, only_b: names that one of them lacks.
        shapes: names of tensors with other shapes, with both.
    """

    a: Path
    b: Path
    tensors: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def total(self) -> Difference:
        """Over all tensors of both."""
        return _sum("all", self.tensors)

    @property
    def groups(self) -> list[Difference]:
        """Tensors together by the first parts of their names in which they differ, with a number behind that."""
        split = [one.name.split(".") for one in self.tensors]
        common = len(
            [*takewhile(lambda parts: len(set(parts)) == 1, zip(*(parts[:-1] for parts in split), strict=False))]
        )
        found: dict[str, list[Difference]] = {}
        for one, parts in zip(self.tensors, split, strict=True):
            depth = common + 1 + any(part.isdigit() for part in parts[common + 1 : common + 2])
            found.setdefault(".".join(parts[: max(1, min(depth, len(parts) - 1))]), []).append(one)
        return [_sum(name, listed) for name, listed in found.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "a": str(self.a),
            "b": str(self.b),
            **{key: value for key, value in self.total.to_dict().items() if key != "name"},
            "groups": [one.to_dict() for one in self.groups],
            "tensors": [one.to_dict() for one in self.tensors],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "shapes": {name: [list(shape) for shape in both] for name, both in self.shapes.items()},
        }


def _sum(name: str, listed: tuple[Difference, ...] | list[Difference]) -> Difference:
    elements, largest = sum(one.elements for one in listed), max((one.largest for one in listed), default=0.0)
    return Difference(name, elements, sum(one.squared for one in listed), sum(one.norm for one in listed), largest)


def compare(a: str | Path, b: str | Path, prefix: str = "", progress: ProgressBar = no_bar) -> Comparison:
    """Compare two models in float64, in constant memory. What one of them lacks is no error.

    Arguments:
        a, b: each a file or folder of one model: a checkpoint of any kind, a snapshot, an output, an index of shards.
        prefix: of the names in pickles and folders of torch.distributed.checkpoint, left out; see `Origin`.
        progress: opens a progress bar.

    Raises:
        FileFormatError: one cannot be read.
        MismatchError: they have no tensor in common.
    """
    paths = files.expanded(a), files.expanded(b)
    models = [_model(path, prefix) for path in paths]
    names = [{**{name: name for name in model.stored}, **model.info.aliases} for model in models]
    both = sorted(names[0].keys() & names[1].keys())
    if not both:
        raise MismatchError(f"{paths[0]} and {paths[1]}", "have no tensor in common", "choose tensors by prefix")
    shapes = {name: (models[0].stored[names[0][name]].shape, models[1].stored[names[1][name]].shape) for name in both}
    alike = [name for name in both if shapes[name][0] == shapes[name][1]]
    return Comparison(
        *paths,
        tuple(_differences(models, names, alike, progress)),
        tuple(sorted(names[0].keys() - names[1].keys())),
        tuple(sorted(names[1].keys() - names[0].keys())),
        {name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
    )


def _model(path: Path, prefix: str) -> Checkpoint:
    contents = read_contents(path, any_kind=True)
    return make_checkpoint(path, contents.model_tensors(prefix), Point(1.0), 1)


class _Piece(NamedTuple):
    """Elements of one tensor, by its place in the list."""

    number: int
    begin: int
    end: int


def _differences(
    models: list[Checkpoint], names: list[dict[str, str]], wanted: list[str], progress: ProgressBar
) -> Iterator[Difference]:
    sizes = [math.prod(models[0].stored[names[0][name]].shape) for name in wanted]
    sums, largest = np.zeros((len(wanted), 2)), np.zeros(len(wanted))
    item_bytes = [
        sum(ITEM_BYTES[m.stored[own[name]].dtype] for m, own in zip(models, names, strict=True)) for name in wanted
    ]
    with (
        ExitStack() as stack,
        worker_threads() as pool,
        progress("comparing", sum(size * item for size, item in zip(sizes, item_bytes, strict=True))) as advance,
    ):
        opened = [model.open() for model in models]
        for file in opened:
            stack.enter_context(file)

        def measure(piece: _Piece) -> tuple[_Piece, npt.NDArray[np.float64], float]:
            one, other = (
                read_values(file, own[wanted[piece.number]], piece.begin, piece.end)
                for file, own in zip(opened, names, strict=True)
            )
            with np.errstate(over="ignore", invalid="ignore"):
                apart = other - one
                return piece, np.array([apart @ apart, one @ one]), float(np.abs(apart).max(initial=0.0))

        pieces = (
            _Piece(index, begin, min(begin + _TILE, size))
            for index, size in enumerate(sizes)
            for begin in range(0, size, _TILE)
        )
        for piece, found, most in in_order(pool, measure, pieces):
            sums[piece.number] += found
            largest[piece.number] = np.maximum(largest[piece.number], most)  # nan stays nan
            advance(item_bytes[piece.number] * (piece.end - piece.begin))
    for name, size, (squared, norm), most in zip(wanted, sizes, sums.tolist(), largest.tolist(), strict=True):
        yield Difference(name, size, squared, norm, most)
