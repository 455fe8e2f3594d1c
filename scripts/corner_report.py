"""What the hard cases print: ratios by case, the goals, and the worst cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from corner_runs import Cell
from fidelity_report import Goal, aligned, grouped, markdown, number
from fidelity_runs import FloatArray

MOST_OVER = 1.05
"""The largest error, relative to the published method's and to the nearest tracked average's."""

CALIBRATED = 3.0
CALIBRATED_SHARE = 0.98
MISJUDGED_SHARE = 0.02

HEADER = (
    "", "cells", "within 2", "within 3", ">3", "error/published", "max", ">1.05", "error/nearest", "max", ">1.05",
    "unknown", "kept/best", "max",
)  # fmt: skip
"""Shares of the cells whose error is within a factor of the predicted one, or more than three times above it; of each
ratio its median, its maximum, and how many cells are above a limit. Unknown are cells without a prediction."""

FLOOR = 6e-8
"""Errors below the rounding of a result to float32 count as this much."""


# --- ratios ----------------------------------------------------------------------------------------


def over_paper(cells: Sequence[Cell]) -> FloatArray:
    """Error, relative to the published method's: of the cells that have one, as all of these."""
    return _ratios([(cell.error, cell.paper) for cell in cells])


def over_nearest(cells: Sequence[Cell]) -> FloatArray:
    """Error, relative to the nearest tracked average's."""
    return _ratios([(cell.error, cell.nearest) for cell in cells])


def over_predicted(cells: Sequence[Cell]) -> FloatArray:
    """Error, relative to the predicted one."""
    return _ratios([(cell.error, cell.predicted) for cell in cells])


def over_best(cells: Sequence[Cell]) -> FloatArray:
    """Predicted error of what was kept, relative to that of the best choice."""
    return _ratios([(cell.predicted, cell.best) for cell in cells])


def _ratios(pairs: Sequence[tuple[float, float]]) -> FloatArray:
    """Where both are known."""
    known = np.array([pair for pair in pairs if not np.isnan(pair).any()]).reshape(-1, 2)
    first, second = np.maximum(known, FLOOR).T
    return np.asarray(first / second)


# --- tables ----------------------------------------------------------------------------------------


def text_tables(cells: Sequence[Cell]) -> str:
    """By case; of a single one by run and by setup, too."""
    groups = {"all": list(cells)}
    cases = grouped(cells, lambda cell: cell.case)
    if len(cases) > 1:
        groups |= cases
    else:
        groups |= grouped(cells, lambda cell: cell.run) | grouped(cells, lambda cell: cell.setup)
    return _text([HEADER, *((label, *_row(group)) for label, group in groups.items())])


def markdown_table(cells: Sequence[Cell]) -> str:
    """By case."""
    groups = {"all": list(cells), **grouped(cells, lambda cell: cell.case)}
    rows = [(label, *_row(group)) for label, group in groups.items()]
    return markdown([HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *rows])


def worst_cells(cells: Sequence[Cell], count: int = 5) -> str:
    """Of each case the cells that are worst in each respect, with all that is known of them."""
    lines: list[Sequence[str]] = [("", "error", "published", "nearest", "predicted", "best", "ratio")]
    for case, group in grouped(cells, lambda cell: cell.case).items():
        for title, ratio in _RATIOS.items():
            found = [(float(ratio([cell])[0]), cell) for cell in group if ratio([cell]).size]
            found.sort(key=lambda pair: -_badness(title, pair[0]))
            lines += [_cell_line(f"{case}, {title}: ", cell, value) for value, cell in found[:count]]
    return _text(lines)


_RATIOS: dict[str, Callable[[Sequence[Cell]], FloatArray]] = {
    "error/published": over_paper,
    "error/nearest": over_nearest,
    "actual/predicted": over_predicted,
    "kept/best": over_best,
}


def _badness(title: str, ratio: float) -> float:
    """A prediction can be off either way."""
    return max(ratio, 1 / ratio if ratio else math.inf) if title == "actual/predicted" else ratio


def _cell_line(title: str, cell: Cell, ratio: float) -> tuple[str, ...]:
    errors = (cell.error, cell.paper, cell.nearest, cell.predicted, cell.best)
    shown = ("" if math.isnan(error) else f"{error:.1e}" for error in errors)
    return (f"{title}{cell.run}; {cell.setup}; {cell.target}", *shown, _shown(ratio))


def _row(cells: Sequence[Cell]) -> list[str]:
    """For `HEADER`."""
    paper, nearest, predicted, best = (ratio(cells) for ratio in _RATIOS.values())
    measured = [cell for cell in cells if not math.isnan(cell.error)]
    shares = _within(predicted, 2.0), _within(predicted, CALIBRATED), predicted > CALIBRATED
    return [
        str(len(cells)),
        *map(_share, shares),
        *_middle_and_most(paper),
        str(int(np.sum(paper > MOST_OVER))),
        *_middle_and_most(nearest),
        str(int(np.sum(nearest > MOST_OVER))),
        str(len(measured) - predicted.size),
        *_middle_and_most(best),
    ]


def _middle_and_most(ratios: FloatArray) -> tuple[str, str]:
    return _of(np.median, ratios), _of(np.max, ratios)


def _of(what: Callable[[FloatArray], np.floating], ratios: FloatArray) -> str:  # type: ignore[type-arg]
    return _shown(float(what(ratios))) if ratios.size else ""


def _shown(ratio: float) -> str:
    return "inf" if math.isinf(ratio) else number(ratio)


def _share(holds: np.ndarray) -> str:  # type: ignore[type-arg]
    return f"{100 * np.mean(holds):.1f} %" if holds.size else ""


def _within(ratios: FloatArray, factor: float) -> np.ndarray:  # type: ignore[type-arg]
    return (ratios >= 1 / factor) & (ratios <= factor)


def _text(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(text for _, (_, text) in aligned(lines))


# --- goals -----------------------------------------------------------------------------------------


def goals(cells: Sequence[Cell]) -> list[Goal]:
    """The demands on all cells; one that none of them bears on is left out."""
    found = []
    for title, ratio in (("published", over_paper), ("nearest", over_nearest)):
        ratios = ratio(cells)
        if ratios.size:
            above = int(np.sum(ratios > MOST_OVER))
            measured = f"{_shown(float(ratios.max()))}; {above} of {ratios.size} cells above"
            found.append(Goal(f"error/{title} at most {MOST_OVER} in every cell", measured, above == 0))
    ratios = over_predicted(cells)
    if ratios.size:
        calibrated, above_share = float(np.mean(_within(ratios, CALIBRATED))), float(np.mean(ratios > CALIBRATED))
        within = f"actual/predicted in [1/3, 3] in {100 * CALIBRATED_SHARE:.0f} % of the cells"
        found.append(Goal(within, f"{100 * calibrated:.1f} %", calibrated >= CALIBRATED_SHARE))
        above_three = f"actual/predicted above 3 in at most {100 * MISJUDGED_SHARE:.0f} % of the cells"
        found.append(Goal(above_three, f"{100 * above_share:.1f} %", above_share <= MISJUDGED_SHARE))
    return found


def goals_text(cells: Sequence[Cell]) -> str:
    """Each goal over all cases, and by case where it is missed."""
    lines = []
    for label, group in {"all cases": list(cells), **grouped(cells, lambda cell: cell.case)}.items():
        lines.append(f"goals, {label}:")
        lines += [f"  {'met   ' if g.met else 'MISSED'}  {g.demand}: {g.measured}" for g in goals(group)]
    return "\n".join(lines)


def goals_markdown(cells: Sequence[Cell]) -> str:
    """Those over all cases as a table."""
    rows = [(goal.demand, f"{goal.measured}{', missed' * (not goal.met)}") for goal in goals(cells)]
    return markdown([("goal", "all cases"), ("---", "---:"), *rows])
