"""What the fidelity benchmark prints: tables of ratios over groups of cells, and the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from fidelity_runs import Cell

FloatArray = npt.NDArray[np.float64]

MOST_OVER_PAPER = 1.05
MEDIAN_OVER_PAPER = 0.27
MOST_ERROR = 4e-4
CALIBRATED = (0.5, 2.0)
CALIBRATED_SHARE = 0.95
MOST_MISJUDGED = 4.0
MEDIAN_CALIBRATION = (0.9, 1.1)

HEADER = (
    "", "cells", "error/paper", "max", "min", ">1.05", "error/floor", "max",
    "actual/predicted", "min", "max", "in [0.5, 2]", ">4", "oracle/paper",
)  # fmt: skip
"""The first column of each ratio is its median."""

COMPACT = ("", "cells", "error/paper", "max", "error/floor", "actual/predicted", "max", "in [0.5, 2]", "oracle/paper")


@dataclass(frozen=True)
class Ratios:
    """Over a group of cells, each array [cells]."""

    over_paper: FloatArray
    over_floor: FloatArray
    calibration: FloatArray
    oracle: FloatArray

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> Ratios:
        """Of at least one cell."""
        error, paper, predicted, floor, oracle = np.array(
            [(cell.error, cell.paper, cell.predicted, cell.floor, cell.oracle) for cell in cells]
        ).T
        return cls(error / paper, error / floor, error / predicted, oracle / paper)

    @property
    def calibrated(self) -> float:
        """Share of the cells whose error is within a factor of 2 of the predicted one."""
        return float(np.mean((self.calibration >= CALIBRATED[0]) & (self.calibration <= CALIBRATED[1])))

    def row(self) -> list[str]:
        """For `HEADER`."""
        paper, floor, predicted = self.over_paper, self.over_floor, self.calibration
        return [
            str(paper.size),
            *map(number, (np.median(paper), paper.max(), paper.min())),
            str(int(np.sum(paper > MOST_OVER_PAPER))),
            *map(number, (np.median(floor), floor.max())),
            *map(number, (np.median(predicted), predicted.min(), predicted.max())),
            f"{100 * self.calibrated:.1f} %",
            str(int(np.sum(predicted > MOST_MISJUDGED))),
            number(np.median(self.oracle)),
        ]

    def compact_row(self) -> list[str]:
        """For `COMPACT`."""
        row = dict(zip(range(1, len(HEADER)), self.row(), strict=True))
        return [row[column] for column in (1, 2, 3, 6, 8, 10, 11, 13)]


# --- tables ----------------------------------------------------------------------------------------

GROUPINGS: dict[str, Callable[[Cell], str]] = {
    "stored as, tracked": lambda cell: f"{cell.dtype}, {_listed(cell.tracked)}",
    "snapshots": lambda cell: f"{cell.snapshots} snapshots",
    "target": lambda cell: cell.target,
    "run (* held out)": lambda cell: cell.run + " *" * cell.held_out,
}


def overall(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """All runs and those held out, where there are any."""
    groups = {"all runs": list(cells), "held-out runs": [cell for cell in cells if cell.held_out]}
    return {label: group for label, group in groups.items() if group}


def grouped(cells: Iterable[Cell], label: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    """The cells by their labels, in the order in which these first appear."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(label(cell), []).append(cell)
    return groups


def text_tables(cells: Sequence[Cell]) -> str:
    """Every grouping, aligned."""
    blocks = [("", overall(cells)), *((title, grouped(cells, label)) for title, label in GROUPINGS.items())]
    lines: list[Sequence[str]] = []
    for title, groups in blocks:
        lines += [(title, *HEADER[1:]), *((label, *Ratios.of(group).row()) for label, group in groups.items())]
    return "\n".join(("\n" if line[1] == HEADER[1] and place else "") + text for place, (line, text) in aligned(lines))


def markdown_table(cells: Sequence[Cell]) -> str:
    """The compact table for a README: overall, by storage and by number of snapshots."""
    groups = overall(cells)
    for title in ("stored as, tracked", "snapshots"):
        groups |= grouped(cells, GROUPINGS[title])
    rows = [(label, *Ratios.of(group).compact_row()) for label, group in groups.items()]
    return markdown([COMPACT, ("---", *["---:"] * (len(COMPACT) - 1)), *rows])


def worst_cells(cells: Sequence[Cell], count: int = 15) -> str:
    """The cells that are worst in each respect, with all that is known of them."""
    ratios = Ratios.of(cells)
    exact = np.array([cell.error if _must_be_exact(cell) else -1.0 for cell in cells])
    blocks = []
    for title, badness in (
        ("largest error/paper", ratios.over_paper),
        ("actual/predicted furthest from 1", np.abs(np.log(ratios.calibration))),
        ("largest errors of 64 float16 snapshots of (0.05, 0.28), sigma_rel 0.05 to 0.28", exact),
    ):
        chosen = [index for index in np.argsort(-badness, kind="stable")[:count].tolist() if badness[index] >= 0]
        lines: list[Sequence[str]] = [(title, *_CELL_COLUMNS), *(_cell_line(cells[index]) for index in chosen)]
        blocks.append("\n".join(text for _, (_, text) in aligned(lines)))
    return "\n\n".join(blocks)


_CELL_COLUMNS = ("error", "paper", "predicted", "floor", "oracle", "error/paper", "actual/predicted")


def _cell_line(cell: Cell) -> tuple[str, ...]:
    label = f"{cell.run}{' *' * cell.held_out}, {cell.dtype}, {_listed(cell.tracked)} x {cell.snapshots}, {cell.target}"
    errors = (cell.error, cell.paper, cell.predicted, cell.floor, cell.oracle)
    ratios = (cell.error / cell.paper, cell.error / cell.predicted)
    return (label, *(f"{error:.1e}" for error in errors), *map(number, ratios))


# --- goals -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """One demand, what was measured, whether it is met."""

    demand: str
    measured: str
    met: bool


def goals(cells: Sequence[Cell]) -> list[Goal]:
    """The issue's goals on a group of cells; one that none of them bears on is left out."""
    ratios = Ratios.of(cells)
    above = int(np.sum(ratios.over_paper > MOST_OVER_PAPER))
    most, median = float(ratios.over_paper.max()), float(np.median(ratios.over_paper))
    misjudged, middle = float(ratios.calibration.max()), float(np.median(ratios.calibration))
    return [
        Goal(
            f"error/paper at most {MOST_OVER_PAPER} in every cell",
            f"{number(most)}; {above} of {len(cells)} cells above",
            most <= MOST_OVER_PAPER,
        ),
        Goal(
            f"error/paper at most {MEDIAN_OVER_PAPER} in the median",
            f"{median:.3f}; oracle/paper {number(np.median(ratios.oracle))}{_prototype_median(cells)}",
            median <= MEDIAN_OVER_PAPER,
        ),
        *_exactness(cells),
        Goal(
            f"actual/predicted in [0.5, 2] in {100 * CALIBRATED_SHARE:.0f} % of the cells",
            f"{100 * ratios.calibrated:.1f} %",
            ratios.calibrated >= CALIBRATED_SHARE,
        ),
        Goal("actual/predicted never above 4", number(misjudged), misjudged <= MOST_MISJUDGED),
        Goal(
            "actual/predicted within 10 % of 1 in the median",
            f"{middle:.3f}",
            MEDIAN_CALIBRATION[0] <= middle <= MEDIAN_CALIBRATION[1],
        ),
    ]


def _exactness(cells: Sequence[Cell]) -> list[Goal]:
    chosen = [cell for cell in cells if _must_be_exact(cell)]
    if not chosen:
        return []
    most = max(cell.error for cell in chosen)
    limits = f"floor {max(cell.floor for cell in chosen):.1e}, oracle {max(cell.oracle for cell in chosen):.1e}"
    demand = f"64 float16 snapshots of (0.05, 0.28), sigma_rel 0.05 to 0.28: error at most {MOST_ERROR:g}"
    return [Goal(demand, f"{most:.2e}; {limits}", most <= MOST_ERROR)]


def _must_be_exact(cell: Cell) -> bool:
    of_setup = (cell.dtype, cell.tracked, cell.snapshots) == ("float16", (0.05, 0.28), 64)
    return of_setup and cell.sigma_rel is not None and 0.05 <= cell.sigma_rel <= 0.28


def _prototype_median(cells: Sequence[Cell]) -> str:
    """The median over the kinds of cells that the demand was first measured on."""
    chosen = [
        cell
        for cell in cells
        if cell.dtype != "float32" and cell.snapshots != 8 and len(cell.tracked) == 2 and cell.sigma_rel is not None
    ]
    if not chosen:
        return ""
    ratios = Ratios.of(chosen)
    return (
        f"; {np.median(ratios.over_paper):.3f} (oracle {number(np.median(ratios.oracle))}) over the {len(chosen)} "
        "cells of 16 bits, 20 or 64 snapshots, two profiles, a sigma_rel"
    )


def goals_text(cells: Sequence[Cell]) -> str:
    """The goals over all runs and over the held-out ones."""
    lines = []
    for label, group in overall(cells).items():
        lines.append(f"goals, {label}:")
        lines += [f"  {'met   ' if g.met else 'MISSED'}  {g.demand}: {g.measured}" for g in goals(group)]
    return "\n".join(lines)


def goals_markdown(cells: Sequence[Cell]) -> str:
    """The same as a table."""
    groups = {label: goals(group) for label, group in overall(cells).items()}
    header = ("goal", *groups)
    rows = [
        (demands[0].demand, *(f"{goal.measured.split(';')[0]}{', missed' * (not goal.met)}" for goal in demands))
        for demands in zip(*groups.values(), strict=True)
    ]
    return markdown([header, ("---", *["---:"] * len(groups)), *rows])


# --- text ------------------------------------------------------------------------------------------


def aligned(lines: Sequence[Sequence[str]]) -> Iterable[tuple[int, tuple[Sequence[str], str]]]:
    """Each line with its place and its text: the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for place, line in enumerate(lines):
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        yield place, (line, "  ".join(cells).rstrip())


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the second line is that of the alignments."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(tracked: Sequence[float]) -> str:
    return f"({', '.join(f'{sigma_rel:.2f}' for sigma_rel in tracked)}{',' * (len(tracked) == 1)})"


def number(value: float | np.floating[npt.NBitBase]) -> str:
    """Three digits, never an exponent where a reader expects a ratio."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
