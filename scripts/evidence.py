"""What averaging gains in three trainings that people know, against what they do today.

    python scripts/evidence.py [--out evidence] [--processes 2] [--quick] [--record] [--tables]

- A language model on the source text of Python's standard library: a decoder of 3.4 M parameters, AdamW in bfloat16,
  with a constant learning rate, with one that falls over the last fifth (it leaves the constant run there), and cosine.
- A diffusion model on scikit-learn's digits: the denoiser of `ema demo`, larger and longer.
- A classifier of digits with BatchNorm, SGD with momentum, constant rate and cosine.

Each is trained with three seeds. What is compared averages the same training, so that differences are taken seed by
seed; the length of ours is searched by the loss on validation data, and all are measured on test data.

Trainings and measurements are kept in the folder `--out`, some 7 GB; a call that was stopped goes on with what is not
there. About 40 minutes on two cores. `--record` keeps the result for the guide, `--tables` prints the kept one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_runs import LENGTHS, MEANS, MEASURED, TRACKED, Training, measure, train
from evidence_tasks import TASKS, Language, sources
from matplotlib.figure import Figure

from posthoc_cli import plots

SEEDS = 3
RECORD = Path(__file__).with_name("evidence.json")
PICTURES = Path(__file__).parent.parent / ".assets"

ROWS = {
    "last": "last weights",
    **{f"mean-{count}": f"mean of the last {count} checkpoints" for count in MEANS},
    "ema-pytorch": "`ema-pytorch`, its defaults",
    "0.999": "EMA of decay 0.999",
    "0.9999": "EMA of decay 0.9999",
    "0.05": "ours, `sigma_rel` 0.05",
    "0.1": "ours, `sigma_rel` 0.10",
    "0.15": "ours, `sigma_rel` 0.15",
    "0.25": "ours, `sigma_rel` 0.25",
    "best": "ours, best length by a sweep",
    "best-copied": "the same with copied statistics",
    "1-sqrt": 'ours, `Decay("1-sqrt", 0.2)`',
    "linear": 'ours, `Decay("linear", 0.2)`',
}

Measured = dict[str, Any]
"""The measurements of one training."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description="What averaging gains in three trainings that people know.")
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder for all records (evidence)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, a thread each (2)")
    parser.add_argument("--quick", action="store_true", help="tiny trainings of one seed: does everything run?")
    parser.add_argument("--record", action="store_true", help="keep the result and its pictures in the repository")
    parser.add_argument("--tables", action="store_true", help="print the kept result, and train nothing")
    options = parser.parse_args(arguments)
    if options.tables:
        print("\n\n".join(tables(json.loads(RECORD.read_text()))))
        return
    folder = options.out / "quick" if options.quick else options.out
    found = run(folder, options.processes, options.quick)
    content = json.dumps(_rounded(found))
    (folder / RECORD.name).write_text(content)
    draw(found, folder)
    if options.record:
        RECORD.write_text(content)
        draw(found, PICTURES)
    print("\n\n".join(tables(found)))


def _rounded(value: Any) -> Any:
    """The same with six digits of each number."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- all trainings -----------------------------------------------------------------------------------


def run(root: Path, processes: int, quick: bool) -> dict[str, Any]:
    """Make what is missing in the folder `root`, and give all measurements."""
    root.mkdir(parents=True, exist_ok=True)
    text = Language(root, quick).tokens  # once, before the processes want it
    jobs = [
        (root, quick, name, schedules, seed)
        for seed in range(1 if quick else SEEDS)
        for name, chains in CHAINS.items()
        for schedules in chains
    ]
    if processes == 1:
        for job in jobs:
            _work(*job)
    else:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            for future in [pool.submit(_work, *job) for job in jobs]:
                future.result()
    names = [Training(name, schedule, seed) for _, _, name, schedules, seed in jobs for schedule in schedules]
    return {
        "python": platform.python_version(),
        "text": {
            part: {"bytes": sum(path.stat().st_size for path in paths), "tokens": len(text[part])}
            for part, paths in sources().items()
        },
        "trainings": [json.loads((training.folder(root) / MEASURED).read_text()) for training in names],
    }


CHAINS = {
    "language": (("constant", "decayed"), ("cosine",)),
    "diffusion": (("inverse-sqrt",),),
    "classifier": (("constant",), ("cosine",)),
}
"""Trainings by task; those of a chain go on from the one before."""


def _work(root: Path, quick: bool, name: str, schedules: Sequence[str], seed: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task = TASKS[name](root, quick)
    for work in (train, measure):
        for schedule in schedules:
            work(task, Training(name, schedule, seed), root)
    torch.set_num_threads(threads)


# --- tables ------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[str]:
    """Markdown: of each task a table of its averages, of the language model one more of differences."""

    def of(task: str, schedule: str) -> list[Measured]:
        return [one for one in found["trainings"] if (one["task"], one["schedule"]) == (task, schedule)]

    language = {
        "constant rate": of("language", "constant"),
        "warm-up, stable, decay": of("language", "decayed"),
        "cosine": of("language", "cosine"),
    }
    diffusion, constant, cosine = (
        of("diffusion", "inverse-sqrt"),
        of("classifier", "constant"),
        of("classifier", "cosine"),
    )
    return [
        _table("test loss, nats a token", {title: (runs, "loss", 1, 3) for title, runs in language.items()}),
        _differences(language),
        _table(
            "denoiser",
            {"test loss, 1e-3": (diffusion, "loss", 1e3, 1), "Frechet distance": (diffusion, "frechet", 1, 3)},
        ),
        _table(
            "classifier",
            {
                "error %, constant": (constant, "error", 100, 2),
                "calibration error %, constant": (constant, "ece", 100, 2),
                "error %, cosine": (cosine, "error", 100, 2),
                "calibration error %, cosine": (cosine, "ece", 100, 2),
            },
        ),
        _over_time(diffusion),
        _tracked(language["constant rate"]),
    ]


Column = tuple[list[Measured], str, float, int]
"""Trainings, one a seed; a measure, the factor that it is shown with, and decimals."""


def _table(corner: str, columns: dict[str, Column]) -> str:
    """Means with standard errors over seeds, and in parentheses the difference to the last weights, seed by seed."""

    def cell(row: str, runs: list[Measured], metric: str, scale: float, digits: int) -> str:
        if row not in runs[0]["rows"]:
            return ""
        values = [scale * one["rows"][row][metric] for one in runs]
        difference = "" if row == "last" else f" ({_paired(runs, row, runs, 'last', metric, scale, digits)})"
        return _mean(values, digits) + difference

    lines = [(corner, *columns), ["---"] * (1 + len(columns))]
    for row, title in ROWS.items():
        cells = [cell(row, *column) for column in columns.values()]
        lines += [(title, *cells)] if any(cells) else []
    lengths = [" ".join(f"{one['best']:.3g}" for one in runs) for runs, *_ in columns.values()]
    return _markdown([*lines, ("best length, by seed", *lengths)])


def _differences(language: dict[str, list[Measured]]) -> str:
    """What one loses or gains by choosing another average of the language model."""

    def best_of(runs: list[Measured], rows: Iterable[str]) -> str:
        return min(rows, key=lambda row: sum(one["rows"][row]["loss"] for one in runs))

    def against(row: str, other: Callable[[list[Measured]], str]) -> list[str]:
        return [f"{_paired(runs, row, runs, other(runs), 'loss', 1, 4)}" for runs in language.values()]

    means, fixed = [f"mean-{count}" for count in MEANS], [f"{length:g}" for length in LENGTHS]
    constant, decayed, _ = language.values()
    lines = [
        ("difference of test losses", *language),
        ["---"] * 4,
        ("best length less the best of the three means", *against("best", lambda runs: best_of(runs, means))),
        ("best length less `ema-pytorch`", *against("best", lambda _: "ema-pytorch")),
        ("best length less `sigma_rel` 0.05", *against("best", lambda _: "0.05")),
        ("best length less `sigma_rel` 0.10", *against("best", lambda _: "0.1")),
        ("best length less the best of seven fixed ones", *against("best", lambda runs: best_of(runs, fixed))),
    ]
    for row in ("best", "1-sqrt", "linear", "mean-10"):
        title = f"constant rate, {ROWS[row]}, less the decayed run"
        lines.append((title, _paired(constant, row, decayed, "last", "loss", 1, 4), "", ""))
    return _markdown(lines)


def _over_time(runs: list[Measured]) -> str:
    """The best of LENGTHS by loss and by Frechet distance, seed by seed, at some times of training."""

    def best(one: Measured, step: str, metric: str) -> str:
        return min(one["over_time"][step], key=lambda length: one["over_time"][step][length][metric])

    steps = list(runs[0]["over_time"])
    rows = [
        (f"best length by {title}", *(" ".join(best(one, step, metric) for one in runs) for step in steps))
        for title, metric in (("test loss", "loss"), ("Frechet distance", "frechet"))
    ]
    return _markdown([("steps trained", *steps), ["---"] * (1 + len(steps)), *rows])


def _tracked(runs: list[Measured]) -> str:
    """The predicted errors of LENGTHS, and the test loss at the best length, for each pair of tracked ones."""
    lengths = [f"{length:g}" for length in LENGTHS]
    losses = {"ema": [one["rows"]["best"]["loss"] for one in runs], "ema-short": [one["short"]["loss"] for one in runs]}
    rows = [
        (
            str(pair),
            *(f"{np.mean([one['predicted_errors'][name][length] for one in runs]):.1e}" for length in lengths),
            f"{np.mean(losses[name]):.4f}",
        )
        for name, pair in TRACKED.items()
    ]
    return _markdown([("tracked", *lengths, "test loss, best length"), ["---"] * (2 + len(lengths)), *rows])


def _paired(
    runs: list[Measured], row: str, others: list[Measured], other: str, metric: str, scale: float, digits: int
) -> str:
    pairs = zip(runs, others, strict=True)
    return _mean([scale * (a["rows"][row][metric] - b["rows"][other][metric]) for a, b in pairs], digits, sign="+")


def _mean(values: Sequence[float], digits: int, sign: str = "") -> str:
    """With the standard error of the mean."""
    error = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{error}"


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- pictures ----------------------------------------------------------------------------------------


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write the pictures."""
    for name, figure in (("gain-language.svg", _language), ("gain-time.svg", _time)):
        (folder / name).write_bytes(plots.as_file(partial(figure, found["trainings"]), ".svg"))


def _panels(count: int, same: bool) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
    panels = list(figure.subplots(1, count, sharey=same))
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks(LENGTHS, [f"{length:g}" for length in LENGTHS], fontsize=6)
        axes.minorticks_off()
        axes.set_xlabel("sigma_rel")
        axes.grid(True, color="0.9", linewidth=0.6)
    return figure, panels


def _language(trainings: list[Measured]) -> Figure:
    """The loss against the length, with lines for what others do."""
    figure, panels = _panels(3, same=True)
    titles = {"constant": "constant rate", "decayed": "warm-up, stable, decay", "cosine": "cosine"}
    for axes, (schedule, title) in zip(panels, titles.items(), strict=True):
        runs = [one["rows"] for one in trainings if (one["task"], one["schedule"]) == ("language", schedule)]

        def loss(row: str, runs: list[Any] = runs) -> float:
            return float(np.mean([rows[row]["loss"] for rows in runs]))

        curve = [loss(f"{length:g}") for length in LENGTHS]
        axes.plot(LENGTHS, curve, color=plots.COLOURS[0], marker="o", markersize=3.5, label="ours")
        for index, row in enumerate(("last", "mean-5", "ema-pytorch"), 1):
            label = ROWS[row].replace("`", "")
            axes.axhline(loss(row), color=plots.COLOURS[index], linestyle=plots.STYLES[index], label=label)
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("test loss, nats a token")
    panels[1].legend(fontsize=7)
    return figure


def _time(trainings: list[Measured]) -> Figure:
    """How much more than at the best length, against the length, for each time."""
    figure, panels = _panels(2, same=False)
    runs = [one["over_time"] for one in trainings if one["task"] == "diffusion"]
    for axes, (metric, title) in zip(panels, {"loss": "test loss", "frechet": "Frechet distance"}.items(), strict=True):
        for index, step in enumerate(runs[0]):
            values = np.array([[run[step][f"{length:g}"][metric] for length in LENGTHS] for run in runs]).mean(axis=0)
            style = plots.STYLES[index % len(plots.STYLES)]
            axes.plot(
                LENGTHS, 100 * (values / values.min() - 1), color=plots.COLOURS[index], linestyle=style,
                marker=plots.MARKERS[index], markersize=3.5, label=f"{int(step):,} steps",
            )  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("above the best, %")
    panels[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main()
