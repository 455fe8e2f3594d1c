"""A page about runs and sweeps of their averages: one HTML file that loads nothing from
elsewhere."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.resources
import json
import math
import os
import platform
import re
import shlex
import time
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
)
from posthoc_cli.report.facts import facts, text, title_of
from posthoc_cli.resources import size_text
from posthoc_cli.run import Run
from posthoc_cli.snapshots.tensorfile import read_small_file
from posthoc_cli.sweep import images
from posthoc_cli.sweep.search import RESULT, Trial, answer
from posthoc_cli.sweep.sweeps import LOGS

_MOST_BYTES = 50_000_000  # of the result of a sweep
_PACKAGES = ("posthoc-cli", "torch", "numpy", "safetensors")  # those whose versions are shown
_COMPARED = [
    ("sweep", "folder"),
    ("best", "best"),
    ("metric", "metric"),
    ("value", "value"),
    ("equal within the noise", "equal"),
    ("raw weights", "raw"),
]
"""The columns of the table of several sweeps, with their keys."""
_UNITS = re.compile(r"(?<=\d) (?=(?:%|±|x|s|[kMGTPE]?B)(?!\w))|(?<=[±<>]) (?=\d)")
"""The spaces between numbers and units, and those in "0.29 ± 0.01" and "< 0.1 %"."""
_MOST_IMAGES = 50_000_000  # bytes of a sweep's images, which a browser still opens at once


def render(
    runs: Run | Sequence[Run],
    sweeps: Sequence[Path] = (),
    out: Path = Path("report.html"),
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
    if isinstance(runs, Run):
        runs = [runs]
    parts = [_describe_run(run) for run in runs]
    swept = [_describe_sweep(folder, parts, out) for folder in sweeps]
    errors = None
    if len(parts) > 1:
        curves = [part["curve"] for part in parts]
        errors = _picture(partial(plots.error_figure, curves))
    commands: list[str] = []
    for part in parts:
        commands += part["commands"] or [_command(part["run"])]
    script = (importlib.resources.files("posthoc_cli.report") / "page.js").read_text("utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    names = [str(part["run"].directory) for part in parts]
    return _template().render(
        title=printable(" and ".join(names)),
        parts=parts,
        sweeps=swept,
        columns=_COMPARED,
        compared=[sweep for sweep in swept if "best" in sweep],
        errors=errors,
        script=script,
        digest=base64.b64encode(digest).decode(),
        date=time.strftime("%d %B %Y"),
        commands=commands,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("posthoc_cli.report", "")
    environment = jinja2.Environment(
        autoescape=True, loader=loader, undefined=jinja2.StrictUndefined
    )
    environment.filters["size"] = size_text
    environment.filters["unbroken"] = _unbroken
    return environment.get_template("page.html")


def _unbroken(text: str) -> str:
    """Return a text in which no line ends between a number and its unit."""
    return _UNITS.sub("\u00a0", text)


def _describe_run(run: Run) -> dict[str, Any]:
    curve = run.error_curve()
    info = run.info()
    return {
        "run": run,
        "info": info,
        "facts": facts(info),
        "curve": curve,
        "good": curve.good_range,
        "error": _picture(partial(plots.error_figure, [curve])),
        "sweeps": [],
        "commands": [],
    }


def _describe_sweep(
    folder: Path,
    parts: Sequence[dict[str, Any]],
    out: Path,
) -> dict[str, Any]:
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
        part = _part_of(result, parts, path)
        swept = _texts_of(result, folder)
        logs = os.path.relpath(folder.resolve(), out.resolve().parent)
        swept["logs"] = urllib.parse.quote(logs)
        if result["again"]:
            part["commands"].append(result["again"])
        if "best" in result:
            swept["picture"] = _picture(partial(plots.sweep_figure, result))
            part["commands"].append(_command(part["run"], result))
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
        raise FileFormatError(path, "is not the result of a sweep") from error
    part["sweeps"].append(swept)
    return swept


def _part_of(
    result: dict[str, Any],
    parts: Sequence[dict[str, Any]],
    path: Path,
) -> dict[str, Any]:
    """Return the part of the run of a sweep; raise a MismatchError without one."""
    run_id = result["settings"]["run"]
    for part in parts:
        if part["info"]["run"] == run_id:
            return part
    paths = [part["info"]["path"] for part in parts]
    raise MismatchError(path, f"is of another run than {' or '.join(paths)}")


def _texts_of(
    result: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Return the answer of a sweep, its trials and its images."""
    rows = _rows(result, folder)
    stops = _stops(result, folder)
    best = [index for index, stop in enumerate(stops) if stop["best"]]
    return answer(result) | {
        "folder": folder,
        "axis": str(result["axis"]),
        "rows": rows,
        "has_logs": any(row["log"] or row["error"] for row in rows),
        "stops": stops,
        "start": best[0] if best else 0,  # the stop that is shown first
    }


def _rows(
    result: dict[str, Any],
    folder: Path,
) -> list[dict[str, Any]]:
    """Return the trials of a sweep, by length, with their values as texts."""
    trials = _sorted(result)
    names = {}
    for key in ("target", "seed", "value", "standard_error", "predicted_error", "seconds"):
        if any(trial[key] is not None for trial in trials):
            names[key] = result["metric"] if key == "value" else title_of(key)
    best = _best_target(result)
    rows = []
    for trial in trials:
        log = f"{LOGS}/{Trial(**trial).name}"
        row = {
            "best": trial["target"] == best,
            "error": trial["error"] or "",
            "log": log if (folder / f"{log}.out").exists() else "",
            "cells": [],
        }
        for key, name in names.items():
            cell = "" if trial[key] is None else text(key, trial[key])
            row["cells"].append((name, cell))
        rows.append(row)
    return rows


def _sorted(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the trials of a sweep: those of raw weights, then the others by length."""
    trials: list[dict[str, Any]] = result["trials"]

    def place(trial: dict[str, Any]) -> tuple[bool, float, int]:
        return trial["x"] is not None, trial["x"] or 0.0, trial["seed"]

    return sorted(trials, key=place)


def _stops(
    result: dict[str, Any],
    folder: Path,
) -> list[dict[str, Any]]:
    """Return the images of each length, raw weights first, with a title that names its metric.

    Of many large images the first of each length are shown, by their names.
    """
    stops = dict[str, dict[str, Any]]()
    size = 0
    best = _best_target(result)
    for trial in _sorted(result):
        target = trial["target"]
        kept = folder / images.FOLDER / Trial(**trial).name
        paths = sorted(kept.iterdir()) if kept.is_dir() else []
        if not paths:
            continue
        if target not in stops:
            title = target
            if trial["value"] is not None:
                title += f", {result['metric']} {trial['value']:.6g}"
            stops[target] = {"title": title, "best": target == best, "paths": []}
        size += sum(path.stat().st_size for path in paths)
        stops[target]["paths"] += paths
    share = min(1, _MOST_IMAGES / max(size, 1))
    for stop in stops.values():
        _read_images(stop, share)
    return [*stops.values()]


def _read_images(stop: dict[str, Any], share: float) -> None:
    """Add the first images of a length, and the number of those that are left out."""
    paths = stop.pop("paths")
    count = math.ceil(len(paths) * share)
    stop["left"] = len(paths) - count
    stop["images"] = [(path.name, _image(path)) for path in paths[:count]]


def _best_target(result: dict[str, Any]) -> str | None:
    best: str | None = result.get("best", {}).get("target")
    return best


def _image(path: Path) -> str:
    content = read_small_file(path, images.MOST_BYTES)
    kind = images.image_type(content)
    if kind is None:
        raise FileFormatError(path, "is not a PNG, JPEG, WebP or GIF image")
    return _as_url(kind, content)


def _as_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _picture(draw: Callable[[], Figure]) -> str:
    return _as_url("image/svg+xml", plots.as_file(draw, ".svg"))


def _command(
    run: Run,
    result: dict[str, Any] | None = None,
) -> str:
    """Return the command that makes the best average of a sweep; without a sweep an example."""
    words = ["ema", "synthesize", str(run.directory)]
    if result is None:
        return shlex.join([*words, "--sigma-rel", "0.1", "--out", "model.safetensors"])
    kind = result["axis"]
    best = f"{result['best'][kind]:.12g}"
    if kind == "sigma_rel":
        words += ["--sigma-rel", best]
    else:
        words += ["--target", f"{kind}:{best}"]
    t = result["settings"]["t"]
    if t != run.t:
        words += ["--t", f"{t:.12g}"]
    ending = ".safetensors"
    if like := result["settings"].get("like"):
        words += ["--like", str(like)]
        ending = Path(like).suffix if Path(like).is_file() else ""
    name = f"{kind}-{best}".replace(":", "-")  # apart from those of other sweeps
    return shlex.join([*words, "--out", f"{name}{ending}"])
