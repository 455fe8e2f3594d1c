"""What the fidelity benchmark prints: tables of ratios over groups of cells, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Cell = TypeVar("Cell")

LEAST = 6e-8
"""The least error of hard cases: about the rounding of a result to float32."""


def ratios(cells: Sequence[Any], over: str, of: str = "error", least: float = 0.0) -> FloatArray:
    """Return one error of each cell divided by another, for cells that have both."""
    pairs = np.array([(getattr(cell, of), getattr(cell, over)) for cell in cells]).reshape(-1, 2)
    first, second = np.maximum(pairs[~np.isnan(pairs).any(axis=1)], least).T
    return np.asarray(first / second)


def grouped(cells: Iterable[Cell], label: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    """Return the cells by label, in order of first appearance."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(label(cell), []).append(cell)
    return groups


def recorded_table(cells: Sequence[Any]) -> str:
    """Return the table of recorded runs: all, held-out ones, then by storage, number of snapshots, target and run.

    The first column of each ratio is its median.
    """
    titles = "", "cells", "error/published", "max", "error/floor", "actual/predicted", "max", "in [0.5, 2]"
    rows = [(*titles, "oracle/published")]
    held_out = [cell for cell in cells if cell.held_out]
    groups = {"all runs": cells} | ({"held-out runs": held_out} if held_out else {})
    for label in (
        lambda cell: f"{cell.dtype}, ({', '.join(f'{sigma_rel:.2f}' for sigma_rel in cell.tracked)})",
        lambda cell: f"{cell.snapshots} snapshots",
        lambda cell: cell.target,
        lambda cell: cell.run + " (held out)" * cell.held_out,
    ):
        groups |= grouped(cells, label)
    for label, group in groups.items():
        predicted = ratios(group, "predicted")
        published, floor = (summary(ratios(group, over), "median", "max") for over in ("paper", "floor"))
        held = (*summary(predicted, "median", "max"), share(within(predicted, 2)))
        oracle = summary(ratios(group, "paper", of="oracle"), "median")
        rows.append((label, str(len(group)), *published, floor[0], *held, *oracle))
    return markdown(rows)


def hard_table(cells: Sequence[Any]) -> str:
    """Return the table by case; for a single case by run.

    Shares of the cells whose error is within a factor of the predicted one, or more than three times above it; of each
    ratio its median, its maximum, and how many cells are above 1.05. Unknown are cells without a prediction.
    """
    titles = "", "cells", "within 2", "within 3", ">3", "error/published", "max", ">1.05"
    rows = [(*titles, "error/nearest", "max", ">1.05", "unknown")]
    groups = grouped(cells, lambda cell: cell.case)
    if len(groups) == 1:
        groups = grouped(cells, lambda cell: cell.run)
    for label, group in ({"all": cells} | groups).items():
        paper, nearest, predicted = (ratios(group, over, least=LEAST) for over in ("paper", "nearest", "predicted"))
        shares = share(within(predicted, 2)), share(within(predicted, 3)), share(predicted > 3)
        bounds = ((*summary(one, "median", "max"), str(np.sum(one > 1.05))) for one in (paper, nearest))
        rows.append((label, str(len(group)), *shares, *next(bounds), *next(bounds), str(len(group) - predicted.size)))
    return markdown(rows)


def summary(values: FloatArray, *names: str) -> list[str]:
    """Return the results of these NumPy functions, in three digits; empty texts without values."""
    found = [float(getattr(np, name)(values)) if values.size else np.nan for name in names]
    return ["" if np.isnan(one) else f"{one:.3f}" if one < 10 else f"{one:.1f}" for one in found]


def within(values: FloatArray, factor: float) -> npt.NDArray[np.bool_]:
    """Return which of the ratios are within a factor of 1."""
    return (values >= 1 / factor) & (values <= factor)


def share(holds: npt.NDArray[np.bool_]) -> str:
    """Return the share of true values, in percent."""
    return f"{100 * np.mean(holds):.1f} %" if holds.size else ""


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column aligned left, the others right."""
    header, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---", *["---:"] * (len(header) - 1)), *rows))
