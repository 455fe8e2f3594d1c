"""A page about a run, and about a sweep of its averages: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import urllib.parse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from posthoc_cli import plots
from posthoc_cli.dtypes import DTYPES
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, PostHocError, shown
from posthoc_cli.planning import error_curve
from posthoc_cli.planning.curves import finite
from posthoc_cli.reconstruction import Motion
from posthoc_cli.run import Run
from posthoc_cli.snapshots.sources import Snapshot
from posthoc_cli.snapshots.tensor_file import read_small_file
from posthoc_cli.sweep.results import RESULT, draw, shown_at

_MOST_BYTES = 50_000_000
_THEME = {"#ffffff": "var(--page)", "#000000": "currentColor", "#e6e6e6": "var(--grid)", "#595959": "var(--muted)"}
"""Colours of the figures that follow the page's."""


@dataclass(frozen=True)
class _Picture:
    """A figure as SVG, and the curve whose values a reader can point at, as JSON."""

    svg: Markup
    curve: str


def render(run: Run, sweep: Path | None = None, out: Path = Path("report.html"), reload: int | None = None) -> str:
    """The page, as HTML.

    Arguments:
        run: snapshots or checkpoints.
        sweep: the folder of a sweep of it.
        out: where the page will be, for links to logs.
        reload: seconds after which a browser shows it anew.

    Raises:
        InvalidValueError: `sweep` is not the folder of a sweep.
        FileFormatError, MismatchError: the sweep cannot be read, or is of another run.
        DirectoryError: there are no snapshots.
    """
    if sweep is None:
        return _page(run, None, None, out, reload)
    path = sweep / RESULT
    if not path.is_file():
        raise InvalidValueError("sweep", f"holds no {RESULT}", "name the folder of a sweep", value=sweep)
    try:
        return _page(run, json.loads(read_small_file(path, _MOST_BYTES)), sweep, out, reload)
    except PostHocError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, jinja2.UndefinedError) as error:
        raise FileFormatError(path, "is no result of a sweep") from error


def _page(run: Run, found: dict[str, Any] | None, sweep: Path | None, out: Path, reload: int | None) -> str:
    snapshots, info = [one for one in run.sources if isinstance(one, Snapshot)], run.info()
    if found is not None and found["settings"]["run"] != info["run"]:
        runs = (shown(str(one)[:8]) for one in (found["settings"]["run"], info["run"]))
        raise MismatchError((sweep or run.directory) / RESULT, f"is of another run: {' and '.join(runs)}")
    candidate = run.candidate()
    curve = error_curve(candidate)
    known = [finite(error) for error in curve.predicted_error.tolist()]
    script = _template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template("page.html").render(
        run=run.directory,
        reload=reload,
        info=info,
        facts=_facts(info),
        sweep=found,
        swept=None if found is None else _sweep_picture(found),
        logs=None if sweep is None else urllib.parse.quote(os.path.relpath(sweep.resolve(), out.resolve().parent)),
        error=_picture(partial(plots.error_figure, [curve]), "error", curve.sigma_rels.tolist(), known),
        good=curve.ranges_text(plots.GOOD_ERROR),
        motion=None if candidate.prior is None else _motion(candidate.prior.motion, info["t_unit"]),
        distance=_distance(snapshots, info["t_unit"]),
        commands=_commands(run, found),
        versions=[
            ("Python", platform.python_version()),
            *((name, importlib.metadata.version(name)) for name in ("posthoc-cli", "torch", "numpy", "safetensors")),
        ],
        script=Markup(script),
        digest=digest,
    )


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=name.endswith(".html"), loader=loader, undefined=jinja2.StrictUndefined)
    environment.filters["size"] = _size
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.6g}"
    return environment.get_template(name)


def _facts(info: dict[str, Any]) -> list[tuple[str, str]]:
    steps = "" if info["t_unit"] == "steps" else f" in {info['step']:,} steps"
    facts = [
        ("run", str(info["run"])),
        ("training time", f"{info['t']:,.12g} {info['t_unit']}{steps}"),
    ]
    if schedule := info.get("schedule"):
        every = f"an update every {schedule['update_every']:,} steps, snapshots every {schedule['checkpoint_every']:,}"
        most = schedule["max_checkpoints"]
        facts += [
            ("averages", ", ".join(f"sigma_rel {profile['sigma_rel']:g}" for profile in info["profiles"])),
            ("schedule", every + ("" if most is None else f", at most {most:,} of each average")),
            ("snapshots", f"{len(info['snapshots']):,}, {_size(info['bytes'])}"),
        ]
    if checkpoints := info.get("checkpoints"):
        held = Counter(one["holds"] for one in checkpoints)
        listed = ", ".join(f"{count:,} x {what}" for what, count in held.items())
        facts.append(("checkpoints", f"{listed}, {_size(sum(one['bytes'] for one in checkpoints))}"))
    return [
        *facts,
        ("model", f"{info['parameters']:,} parameters in {info['tensors']:,} tensors"),
        ("stored as", ", ".join(f"{dtype} ({count:,})" for dtype, count in info["dtypes"].items())),
        ("not tracked", ", ".join(info["left_out"][:20]) or "nothing"),
    ]


# --- figures -----------------------------------------------------------------------------------------


def _picture(draw: Callable[[], Figure], name: str, x: Sequence[float], y: Sequence[float | None]) -> list[_Picture]:
    """A figure whose text is text, and whose colours follow the page's; and the same with a linear axis."""
    return [_drawn(draw, name, x, y, linear) for linear in (False, True)]


def _drawn(
    draw: Callable[[], Figure], name: str, x: Sequence[float], y: Sequence[float | None], linear: bool
) -> _Picture:
    name += "-linear" * linear
    frames: list[dict[str, object]] = []

    def drawn() -> Figure:
        figure = draw()
        if linear:
            plots.make_linear(figure)
        frames.append(plots.frame(figure))
        return figure

    svg = plots.as_file(drawn, ".svg", text=True).decode()
    svg = svg[svg.index("<svg") :]
    for colour, own in _THEME.items():
        svg = svg.replace(colour, own)
    # Several figures are in one page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{name}">', svg, count=1)
    points = {"xs": list(x), "ys": list(y), **frames[0]}
    return _Picture(Markup(svg), json.dumps(points))


def _sweep_picture(found: dict[str, Any]) -> list[_Picture]:
    xs = [shown_at(found, point["x"]) for point in found["curve"]]
    return _picture(partial(draw, found), "sweep", xs, [float(point["estimate"]) for point in found["curve"]])


def _motion(motion: Motion, unit: str) -> tuple[list[_Picture], str] | None:
    """How fast the network moved, and that in words; None where it was not measured."""
    edges, known = motion.edges, motion.walk > 0
    if np.count_nonzero(known) < 2:
        return None
    lines = {"mean square of the random steps": (edges, np.where(known, motion.walk, np.nan))}
    drawn = partial(plots.times_figure, lines, (unit, "squared distance a step"))
    walk = motion.walk[known]
    picture = _picture(drawn, "motion", ((edges[1:] + edges[:-1]) / 2)[known].tolist(), walk.tolist())
    ratio = walk[0] / walk[-1]
    if 0.5 < ratio < 2:
        return picture, "The network moved about as fast at the end as at the beginning."
    first, second = ("beginning", "end") if ratio > 1 else ("end", "beginning")
    times = f"{max(ratio, 1 / ratio) ** 0.5:,.2g} times"
    return picture, f"The network's random steps were {times} as long at the {first} of training as at the {second}."


def _distance(snapshots: Sequence[Snapshot], unit: str) -> tuple[list[_Picture], str] | None:
    """The distance of the network's weights to each tracked average, relative to its norm; nan where not measured.

    And the average whose values a reader can point at.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for snapshot in sorted(snapshots, key=lambda one: one.info.sigma_rel):
        measured = snapshot.info.measurements
        value = math.nan
        if measured is not None and measured.weights and measured.norm:
            value = math.sqrt(measured.weights / measured.norm)
        points.setdefault(f"sigma_rel {snapshot.info.sigma_rel:g}", []).append((snapshot.info.t, value))
    columns = {name: np.array(one).T for name, one in points.items()}
    lines = {name: (times, values) for name, (times, values) in columns.items()}
    if all(np.count_nonzero(np.isfinite(values)) < 2 for _, values in lines.values()):
        return None
    drawn = partial(plots.times_figure, lines, (unit, "distance / norm"))
    name, (times, values) = next(iter(lines.items()))
    return _picture(drawn, "distance", times.tolist(), [finite(value) for value in values.tolist()]), name


# --- text --------------------------------------------------------------------------------------------


def _commands(run: Run, found: dict[str, Any] | None) -> list[str]:
    source = [str(run.directory), *([] if run.also is None else ["--checkpoints", str(run.also)])]
    if found is None:
        return [shlex.join(["ema", "synthesize", *source, "--sigma-rel", "0.1", *_OUT])]
    best, kind = found["best"], found["length"]
    value = f"{best[kind]:.12g}"
    target = ("--sigma-rel", value) if kind == "sigma_rel" else ("--target", f"{kind}:{value}")
    settings = found["settings"]
    how = _how(settings, None if settings["t"] == run.t else settings["t"], "model")
    commands = [["ema", "synthesize", *source, *target, *how]]
    if found["guide"] is not None:
        width, other = f"{best['guide']:.12g}", settings["guide"]
        how = _how(other, other["t"], "guide")
        commands.append(["ema", "synthesize", found["guide"], "--sigma-rel", width, *how])
    return [*([found["again"]] if found["again"] else ()), *map(shlex.join, commands)]


_OUT = ("--out", "model.safetensors")


def _how(settings: dict[str, Any], t: float | None, name: str) -> list[str]:
    """The options of a synthesis as in a sweep, beside the run and the lengths."""
    like, layout, dtype = (settings.get(key) for key in ("like", "layout", "dtype"))
    given = {
        "--t": None if t is None else f"{t:.12g}",
        "--method": None if settings.get("method") == "minvar" else settings.get("method"),
        "--dtype": None if like or dtype is None else DTYPES[dtype].torch_name,
        "--layout": layout,
        "--like": like,
        "--component": settings.get("component"),
        "--out": name if like or layout in ("sharded", "dcp") else f"{name}.{layout or 'safetensors'}",
    }
    return [word for option, value in given.items() if value is not None for word in (option, value)]


def _size(nbytes: float) -> str:
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.3g} {unit}"
