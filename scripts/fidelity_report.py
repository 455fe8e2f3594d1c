"""What the fidelity benchmark prints: tables of ratios over groups of cells, and the worst cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Cell = TypeVar("Cell")
Groups = Mapping[str, Sequence[Any]]

PAPER, NEAREST, FLOOR, PREDICTED = "error/published", "error/nearest", "error/floor", "actual/predicted"
OVER = {PAPER: "paper", NEAREST: "nearest", FLOOR: "floor", PREDICTED: "predicted"}
"""What the error of a cell is divided by."""

LEAST = 6e-8
"""Errors of hard cases that are below the rounding of a result to float32 count as this much."""


def ratios(cells: Sequence[Any], over: str, of: str = "error", least: float = 0.0) -> FloatArray:
    """One error of each cell over another, where both are known."""
    pairs = np.array([(getattr(cell, of), getattr(cell, over)) for cell in cells]).reshape(-1, 2)
    first, second = np.maximum(pairs[~np.isnan(pairs).any(axis=1)], least).T
    return np.asarray(first / second)


def grouped(cells: Iterable[Cell], label: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    """The cells by their labels, in the order in which these first appear."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(label(cell), []).append(cell)
    return groups


# --- recorded runs ---------------------------------------------------------------------------------

RECORDED = (
    "", "cells", PAPER, "max", "min", ">1.05", FLOOR, "max",
    PREDICTED, "min", "max", "in [0.5, 2]", ">4", "oracle/published",
)  # fmt: skip
"""The first column of each ratio is its median."""

COMPACT = (0, 1, 2, 3, 6, 8, 10, 11, 13)
"""The columns that the guide has."""


def recorded_tables(cells: Sequence[Any], as_markdown: bool) -> str:
    """Every grouping, or in Markdown the compact table: overall, by storage and by number of snapshots."""
    held_out = [cell for cell in cells if cell.held_out]
    blocks = {
        "": {"all runs": cells} | ({"held-out runs": held_out} if held_out else {}),
        "stored as, tracked": grouped(cells, lambda cell: f"{cell.dtype}, {_listed(cell.tracked)}"),
        "snapshots": grouped(cells, lambda cell: f"{cell.snapshots} snapshots"),
        "target": grouped(cells, lambda cell: cell.target),
        "run (* held out)": grouped(cells, lambda cell: cell.run + " *" * cell.held_out),
    }
    tables = {title: [(title, *RECORDED[1:]), *_rows(groups, _recorded)] for title, groups in blocks.items()}
    if as_markdown:
        lines = [*tables[""], *tables["stored as, tracked"][1:], *tables["snapshots"][1:]]
        return markdown([[line[column] for column in COMPACT] for line in lines])
    return "\n\n".join(map(aligned, tables.values()))


def _recorded(cells: Sequence[Any]) -> list[str]:
    """For `RECORDED`."""
    paper, floor, predicted = (ratios(cells, OVER[title]) for title in (PAPER, FLOOR, PREDICTED))
    return [
        *(str(len(cells)), *summary(paper, "median", "max", "min"), str(np.sum(paper > 1.05))),
        *(*summary(floor, "median", "max"), *summary(predicted, "median", "min", "max")),
        *(share(within(predicted, 2)), str(np.sum(predicted > 4))),
        *summary(ratios(cells, "paper", of="oracle"), "median"),
    ]


def worst_recorded(cells: Sequence[Any]) -> str:
    """The cells that are worst in each respect, with all that is known of them."""

    def label(cell: Any) -> str:
        listed = f"{_listed(cell.tracked)} x {cell.snapshots}"
        return f"{cell.run}{' *' * cell.held_out}, {cell.dtype}, {listed}, {cell.target}"

    return _worst({"": cells}, (PAPER, PREDICTED), ("paper", "predicted", "floor", "oracle"), label, 15, 0.0)


# --- hard cases ------------------------------------------------------------------------------------

HARD = (
    "", "cells", "within 2", "within 3", ">3", PAPER, "max", ">1.05", NEAREST, "max", ">1.05", "unknown",
)  # fmt: skip
"""Shares of the cells whose error is within a factor of the predicted one, or more than three times above it; of each
ratio its median, its maximum, and how many cells are above a limit. Unknown are cells without a prediction."""


def hard_tables(cells: Sequence[Any], as_markdown: bool) -> str:
    """By case; of a single one in text by run and by setup, too."""
    groups = grouped(cells, lambda cell: cell.case)
    if len(groups) == 1 and not as_markdown:
        groups = grouped(cells, lambda cell: cell.run) | grouped(cells, lambda cell: cell.setup)
    return (markdown if as_markdown else aligned)([HARD, *_rows({"all": cells} | groups, _hard)])


def _hard(cells: Sequence[Any]) -> list[str]:
    """For `HARD`."""
    paper, nearest, predicted = (ratios(cells, OVER[title], least=LEAST) for title in (PAPER, NEAREST, PREDICTED))
    return [
        *(str(len(cells)), share(within(predicted, 2)), share(within(predicted, 3)), share(predicted > 3)),
        *(*summary(paper, "median", "max"), str(np.sum(paper > 1.05))),
        *(*summary(nearest, "median", "max"), str(np.sum(nearest > 1.05)), str(len(cells) - predicted.size)),
    ]


def worst_hard(cells: Sequence[Any]) -> str:
    """Of each case the cells that are worst in each respect, with all that is known of them."""
    groups = {f"{case}, ": group for case, group in grouped(cells, lambda cell: cell.case).items()}
    known = ("paper", "nearest", "predicted")
    return _worst(
        groups, (PAPER, NEAREST, PREDICTED), known, lambda cell: f"{cell.run}; {cell.setup}; {cell.target}", 5, LEAST
    )


# --- text ------------------------------------------------------------------------------------------


def _rows(groups: Groups, row: Callable[[Sequence[Any]], list[str]]) -> list[tuple[str, ...]]:
    return [(label, *row(group)) for label, group in groups.items()]


def _worst(
    groups: Groups, titles: Sequence[str], known: Sequence[str], label: Callable[[Any], str], count: int, least: float
) -> str:
    """The worst cells of each group by each ratio; a prediction can be off either way."""
    lines: list[Sequence[str]] = [("", "error", *known, "ratio")]
    for group, cells in groups.items():
        for title in titles:
            found = [(ratio, cell) for cell in cells for ratio in ratios([cell], OVER[title], least=least)]
            found.sort(key=lambda pair: -abs(np.log(pair[0])) if title == PREDICTED else -pair[0])
            for ratio, cell in found[:count]:
                errors = (f"{getattr(cell, name):.1e}" for name in ("error", *known))
                lines.append((f"{group}{title}: {label(cell)}", *errors, number(ratio)))
    return aligned(lines)


def summary(values: FloatArray, *names: str) -> list[str]:
    """NumPy's functions of these names; nothing where there are no values."""
    return [number(getattr(np, name)(values)) if values.size else "" for name in names]


def within(values: FloatArray, factor: float) -> npt.NDArray[np.bool_]:
    """Which of the ratios are within a factor of 1."""
    return (values >= 1 / factor) & (values <= factor)


def share(holds: npt.NDArray[np.bool_]) -> str:
    """Of all."""
    return f"{100 * np.mean(holds):.1f} %" if holds.size else ""


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table in text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = (
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )  # fmt: skip
    return "\n".join(texts)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The same in Markdown."""
    header, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---", *["---:"] * (len(header) - 1)), *rows))


def _listed(tracked: Sequence[float]) -> str:
    return f"({', '.join(f'{sigma_rel:.2f}' for sigma_rel in tracked)}{',' * (len(tracked) == 1)})"


def number(value: float | np.floating[npt.NBitBase]) -> str:
    """Three digits, never an exponent where a reader expects a ratio."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
