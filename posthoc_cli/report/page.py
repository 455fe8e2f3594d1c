"""A page about runs and sweeps of their averages: one HTML file that loads nothing from
elsewhere."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import platform
import shlex
import urllib.parse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from posthoc_cli import plots
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    PostHocError,
    printable,
    shown,
)
from posthoc_cli.report.facts import facts, text
from posthoc_cli.resources import size_text
from posthoc_cli.run import Run
from posthoc_cli.snapshots.tensorfile import read_small_file
from posthoc_cli.sweep.search import RESULT, answer

_MOST_BYTES = 50_000_000


def render(
    runs: Run | Sequence[Run], sweeps: Sequence[Path] = (), out: Path = Path("report.html")
) -> str:
    """Return the page as HTML.

    Arguments:
        runs: runs of snapshots or checkpoints; several are compared.
        sweeps: folders of sweeps of these runs; several are compared.
        out: the path that the page will have, for links to logs.

    Raises:
        InvalidValueError: one of `sweeps` is not the folder of a sweep.
        FileFormatError, MismatchError: a sweep cannot be read, or is of another run.
        DirectoryError: a run has no snapshots.
    """
    parts = [_describe_run(run) for run in ([runs] if isinstance(runs, Run) else runs)]
    swept = [_describe_sweep(folder, parts, out) for folder in sweeps]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        autoescape=True, loader=loader, undefined=jinja2.StrictUndefined
    )
    environment.filters["size"] = size_text
    packages = ("posthoc-cli", "torch", "numpy", "safetensors")
    return environment.get_template("page.html").render(
        title=printable(" and ".join(str(part["run"].directory) for part in parts)),
        parts=parts,
        sweeps=swept,
        errors=_picture(partial(plots.error_figure, [part["curve"] for part in parts]))
        if len(parts) > 1
        else None,
        commands=[line for part in parts for line in part["commands"] or [_command(part["run"])]],
        versions=[
            ("Python", platform.python_version()),
            *((one, importlib.metadata.version(one)) for one in packages),
        ],
    )


def _describe_run(run: Run) -> dict[str, Any]:
    curve, info = run.error_curve(), run.info()
    return {
        "run": run,
        "info": info,
        "facts": facts(info),
        "curve": curve,
        "good": curve.ranges_text(plots.GOOD_ERROR),
        "error": _picture(partial(plots.error_figure, [curve])),
        "sweeps": [],
        "commands": [],
    }


def _describe_sweep(folder: Path, parts: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Return the texts and figures of a sweep, after adding them and its commands to the part of
    its run."""
    path = folder / RESULT
    if not path.is_file():
        raise InvalidValueError(
            "sweep", f"holds no {RESULT}", "name the folder of a sweep", value=folder
        )
    try:
        result = json.loads(read_small_file(path, _MOST_BYTES))
        json.dumps(result, ensure_ascii=False).encode()  # lone surrogates cannot be shown
        run_ids = [part["info"]["run"] for part in parts]
        if result["settings"]["run"] not in run_ids:
            names = (shown(str(run_id)[:8]) for run_id in (result["settings"]["run"], *run_ids))
            raise MismatchError(path, f"is of another run: {' and '.join(names)}")
        part = parts[run_ids.index(result["settings"]["run"])]
        swept = answer(result) | {
            "folder": folder,
            "axis": str(result["axis"]),
            "rows": _rows(result),
            "picture": _picture(partial(plots.sweep_figure, result)),
            "logs": urllib.parse.quote(os.path.relpath(folder.resolve(), out.resolve().parent)),
        }
        part["commands"] += [*filter(None, [result["again"]]), _command(part["run"], result)]
    except PostHocError:
        raise
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        ArithmeticError,
    ) as error:
        raise FileFormatError(path, "is no result of a sweep") from error
    part["sweeps"].append(swept)
    return swept


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the trials and the estimated best one of a sweep, by length, with their values as
    texts."""
    best = {
        "target": f"best: {result['best']['target']}",
        "x": float(result["best"][result["axis"]]),
        "best": True,
        "value": result["estimate"],
        "standard_error": result["standard_error"],
        "error": "estimate",
        "log": "",
    }
    keys = ("target", "seed", "value", "standard_error", "predicted_error", "seconds")
    rows = sorted([*result["trials"], best], key=lambda row: (row["x"], row["target"]))
    return [
        {
            "best": False,
            **row,
            "log": str(row["log"]),
            "error": row["error"] or "",
            "cells": ["" if row.get(key) is None else text(key, row[key]) for key in keys],
        }
        for row in rows
    ]


def _picture(draw: Callable[[], Figure]) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(plots.as_file(draw, '.svg')).decode()}"


def _command(run: Run, result: dict[str, Any] | None = None) -> str:
    """Return the command that makes the best average of a sweep; without a sweep an example."""
    kind, best, settings = "sigma_rel", "0.1", dict[str, Any]()
    if result is not None:
        kind, best, settings = (
            result["axis"],
            f"{result['best'][result['axis']]:.12g}",
            result["settings"],
        )
    like, t = settings.get("like"), settings.get("t", run.t)
    out = "model.safetensors"
    if like:
        out = f"model{Path(like).suffix}" if Path(like).is_file() else "model"
    options = {
        **({"--sigma-rel": best} if kind == "sigma_rel" else {"--target": f"{kind}:{best}"}),
        "--t": None if t == run.t else f"{t:.12g}",
        "--like": like,
        "--out": out,
    }
    given = (
        word for name, value in options.items() if value is not None for word in (name, str(value))
    )
    return shlex.join(["ema", "synthesize", str(run.directory), *given])
