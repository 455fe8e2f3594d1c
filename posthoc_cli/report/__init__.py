"""A page about runs and sweeps of their averages: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import urllib.parse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from posthoc_cli import plots
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, PostHocError, shown
from posthoc_cli.planning import error_curve
from posthoc_cli.planning.curves import ErrorCurve, finite, no_formula
from posthoc_cli.reconstruction import Motion
from posthoc_cli.run import Run, summary
from posthoc_cli.snapshots.sources import Snapshot
from posthoc_cli.snapshots.tensor_file import read_small_file
from posthoc_cli.sweep.results import RESULT, answer, draw, shown_at

_MOST_BYTES = 50_000_000
_THEME = {"#ffffff": "var(--page)", "#000000": "currentColor", "#e6e6e6": "var(--grid)", "#595959": "var(--muted)"}
"""Colours in the figures, and the page's colours that replace them, in light and dark mode."""


_Picture = dict[str, str]
"""A figure: `svg`, and `curve`, the values that a reader can point at, as JSON."""


def render(
    runs: Run | Sequence[Run], sweeps: Sequence[Path] = (), out: Path = Path("report.html"), reload: int | None = None
) -> str:
    """Return the page as HTML.

    Arguments:
        runs: runs of snapshots or checkpoints; several are compared.
        sweeps: folders of sweeps of these runs; several are compared.
        out: the path that the page will have, for links to logs.
        reload: seconds after which a browser reloads the page.

    Raises:
        InvalidValueError: one of `sweeps` is not the folder of a sweep.
        FileFormatError, MismatchError: a sweep cannot be read, or is of another run.
        DirectoryError: a run has no snapshots.
    """
    parts = [_describe_run(run, number) for number, run in enumerate([runs] if isinstance(runs, Run) else runs)]
    swept = [_describe_sweep(folder, number, parts, out) for number, folder in enumerate(sweeps)]
    script = _template("page.js").render()
    curves = [part["curve"] for part in parts]
    return _template("page.html").render(
        title=" and ".join(str(part["run"].directory) for part in parts),
        reload=reload,
        parts=parts,
        sweeps=swept,
        errors=_picture(_errors(curves), "errors", curves[0]) if len(parts) > 1 else None,
        commands=[line for part in parts for line in part["commands"] or _commands(part["run"])],
        versions=[
            ("Python", platform.python_version()),
            *((name, importlib.metadata.version(name)) for name in ("posthoc-cli", "torch", "numpy", "safetensors")),
        ],
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _describe_run(run: Run, number: int) -> dict[str, Any]:
    """Return the texts and figures of a run for the page; the names of its figures end in its number."""
    snapshots, info = [source for source in run.sources if isinstance(source, Snapshot)], run.info()
    candidate = run.candidate()
    curve = error_curve(candidate)
    return {
        "run": run,
        "info": info,
        "facts": summary(info),
        "curve": curve,
        "error": _picture(_errors([curve]), f"error-{number}", curve),
        "good": curve.ranges_text(plots.GOOD_ERROR),
        "motion": None
        if candidate.prior is None
        else _motion(candidate.prior.motion, info["t_unit"], f"motion-{number}"),
        "distance": _distance(snapshots, info["t_unit"], f"distance-{number}"),
        "sweeps": [],
        "commands": [],
    }


def _describe_sweep(folder: Path, number: int, parts: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Return the texts and figures of a sweep, after adding them and its commands to the part of its run."""
    path = folder / RESULT
    if not path.is_file():
        raise InvalidValueError("sweep", f"holds no {RESULT}", "name the folder of a sweep", value=folder)
    try:
        result = json.loads(read_small_file(path, _MOST_BYTES))
        run_ids = [part["info"]["run"] for part in parts]
        if result["settings"]["run"] not in run_ids:
            names = (shown(str(run_id)[:8]) for run_id in (result["settings"]["run"], *run_ids))
            raise MismatchError(path, f"is of another run: {' and '.join(names)}")
        part, trials = parts[run_ids.index(result["settings"]["run"])], _trials(result)
        swept = {
            "folder": folder,
            "axis": str(result["axis"]),
            **answer(result),
            "picture": _sweep_picture(result, f"sweep-{number}"),
            "rows": [_cells(trial) for trial in trials],
            "logs": urllib.parse.quote(os.path.relpath(folder.resolve(), out.resolve().parent)),
            "csv": _as_csv(trials),
        }
        part["commands"] += _commands(part["run"], result)
    except PostHocError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(path, "is no result of a sweep") from error
    part["sweeps"].append(swept)
    return swept


def _trials(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the trials and the estimated best one of a sweep, by length."""
    best = {
        "target": f"best: {result['best']['target']}", "x": float(result["best"][result["axis"]]), "seed": "",
        "value": result["estimate"], "standard_error": result["standard_error"], "predicted_error": None,
        "seconds": None, "error": "estimate", "log": "",
    }  # fmt: skip
    return sorted([*result["trials"], best], key=lambda trial: (trial["x"], trial["target"]))


def _cells(trial: dict[str, Any]) -> dict[str, Any]:
    exact, seconds = trial["predicted_error"], trial["seconds"]
    numbers = [_number(trial[key]) for key in ("value", "standard_error")]
    error = "–" if exact is None else f"{100 * exact:.2g} %"
    cells = [str(trial["target"]), trial["seed"], *numbers, error, "–" if seconds is None else f"{seconds:.1f}"]
    return {"cells": cells, "best": trial["seed"] == "", "error": trial["error"] or "", "log": str(trial["log"])}


def _as_csv(trials: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["target", *_NUMBERS])
    for trial in trials:
        numbers = ["" if trial[key] in (None, "") else repr(float(trial[key])) for key in _NUMBERS]
        writer.writerow([no_formula(trial["target"]), *numbers])
    return text.getvalue()


_NUMBERS = "seed", "value", "standard_error", "predicted_error", "seconds"


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=name.endswith(".html"), loader=loader, undefined=jinja2.StrictUndefined)
    return environment.get_template(name)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


# --- figures -----------------------------------------------------------------------------------------


def _picture(
    draw: Callable[[], Figure], name: str, curve: ErrorCurve | tuple[Sequence[float], Sequence[float | None]]
) -> list[_Picture]:
    """Return a figure for the page, and the same figure with a linear axis.

    The values of `curve` are those that a reader can point at.
    """
    if isinstance(curve, ErrorCurve):
        curve = curve.sigma_rels.tolist(), [finite(error) for error in curve.predicted_error.tolist()]
    return [_drawn(draw, name, *curve, linear) for linear in (False, True)]


def _drawn(
    draw: Callable[[], Figure], name: str, x: Sequence[float], y: Sequence[float | None], linear: bool
) -> _Picture:
    """Draw a figure as SVG whose text stays text and whose colours follow the page's."""
    name += "-linear" * linear
    frames: list[dict[str, object]] = []

    def drawn() -> Figure:
        figure = draw()
        plots.fit_page(figure, linear)
        frames.append(plots.frame(figure))
        return figure

    svg = plots.as_file(drawn, ".svg", text=True).decode()
    svg = svg[svg.index("<svg") :]
    for colour, of_page in _THEME.items():
        svg = svg.replace(colour, of_page)
    # The ids of all figures in the page must differ.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{name}">', svg, count=1)
    points = {"xs": list(x), "ys": list(y), **frames[0]}
    return {"svg": Markup(svg), "curve": json.dumps(points)}


def _errors(curves: Sequence[ErrorCurve]) -> Callable[[], Figure]:
    return partial(plots.error_figure, curves, width=plots.PAGE_WIDTH)


def _sweep_picture(result: dict[str, Any], name: str) -> list[_Picture]:
    xs = [shown_at(result, point["x"]) for point in result["curve"]]
    if not xs:
        raise ValueError("an empty curve")
    return _picture(partial(draw, result), name, (xs, [float(point["estimate"]) for point in result["curve"]]))


def _motion(motion: Motion, unit: str, name: str) -> tuple[list[_Picture], str] | None:
    """Draw how fast the network moved, and say it in words; None if it was not measured."""
    edges, known = motion.edges, motion.walk > 0
    if np.count_nonzero(known) < 2:
        return None
    lines = {"mean square of the random steps": (edges, np.where(known, motion.walk, np.nan))}
    drawn = partial(plots.times_figure, lines, (unit, "squared distance a step"))
    walk = motion.walk[known]
    picture = _picture(drawn, name, (((edges[1:] + edges[:-1]) / 2)[known].tolist(), walk.tolist()))
    ratio = walk[0] / walk[-1]
    if 0.5 < ratio < 2:
        return picture, "The network moved about as fast at the end as at the beginning."
    first, second = ("beginning", "end") if ratio > 1 else ("end", "beginning")
    times = f"{max(ratio, 1 / ratio) ** 0.5:,.2g} times"
    return picture, f"The network's random steps were {times} as long at the {first} of training as at the {second}."


def _distance(snapshots: Sequence[Snapshot], unit: str, name: str) -> tuple[list[_Picture], str] | None:
    """Draw the distance of the weights to each tracked average, relative to its norm; None if it was not measured.

    The second result is the name of the average whose values a reader can point at.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for snapshot in sorted(snapshots, key=lambda snapshot: snapshot.info.sigma_rel):
        measured = snapshot.info.measurements
        value = math.nan
        if measured is not None and measured.weights and measured.norm:
            value = math.sqrt(measured.weights / measured.norm)
        points.setdefault(f"sigma_rel {snapshot.info.sigma_rel:g}", []).append((snapshot.info.t, value))
    columns = ((title, np.array(pairs).T) for title, pairs in points.items())
    lines = {title: (times, values) for title, (times, values) in columns}
    if all(np.count_nonzero(np.isfinite(values)) < 2 for _, values in lines.values()):
        return None
    drawn = partial(plots.times_figure, lines, (unit, "distance / norm"))
    first, (times, values) = next(iter(lines.items()))
    return _picture(drawn, name, (times.tolist(), [finite(value) for value in values.tolist()])), first


# --- text --------------------------------------------------------------------------------------------


def _commands(run: Run, result: dict[str, Any] | None = None) -> list[str]:
    """Return the commands that repeat a sweep and make its best average; without a sweep an example."""
    synthesize = ["ema", "synthesize"]
    source = [str(run.directory), *([] if run.also is None else ["--checkpoints", str(run.also)])]
    if result is None:
        return [shlex.join([*synthesize, *source, "--sigma-rel", "0.1", "--out", "model.safetensors"])]
    kind, settings = result["axis"], result["settings"]
    value = f"{result['best'][kind]:.12g}"
    target = ["--sigma-rel", value] if kind == "sigma_rel" else ["--target", f"{kind}:{value}"]
    like = settings.get("like")
    given = {
        "--t": None if settings["t"] == run.t else f"{settings['t']:.12g}",
        "--like": like,
        "--component": settings.get("component"),
        "--out": "model" if like else "model.safetensors",
    }
    options = [word for option, text in given.items() if text is not None for word in (option, text)]
    again = [result["again"]] if result["again"] else []
    return [*again, shlex.join([*synthesize, *source, *target, *options])]
