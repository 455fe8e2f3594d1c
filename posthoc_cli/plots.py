"""Figures: arrays in, matplotlib figures out.

They are readable in print, with colour blindness (Okabe and Ito's colours, each with a different line style) and on a
dark page (the background is opaque white). pyplot is not used: a figure belongs to its caller and needs no display.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from posthoc_cli.errors import printable

if TYPE_CHECKING:
    from posthoc_cli.planning import ErrorCurve

PICTURES = (".png", ".svg", ".pdf")
"""The endings of pictures."""


class _Figure(Figure):
    """A figure that a notebook can show without pyplot."""

    def _repr_html_(self) -> str:
        file = io.StringIO()
        self.savefig(file, format="svg", metadata=_METADATA[".svg"])
        return file.getvalue().partition("?>")[2]


_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Creator": None, "Date": None, "Format": None, "Type": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
"""Metadata of a file by its ending, without the time and the version of matplotlib."""

_LONGEST_TEXT = 120

FloatArray = npt.NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GOOD_ERROR = 0.01
"""The error below which ranges of sigma_rel are shaded and named in the title."""

_LEAST_ERRORS = (1e-8, 1e-4)
"""Bounds of the lower end of the error axis, at which tracked profiles with smaller errors are drawn."""

_MOST_ERROR = 2.0

_WIDTH = 8.0
"""Width of a figure in inches."""

_MARGIN = 0.1
"""Margin in inches, since the edges of the white background are visible on a dark page."""

_LEAST_WIDTH = 0.0001
"""The sigma_rel at which narrower targets are drawn."""

_ROUND = (1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 3), (1,)
"""Ticks in a decade of a logarithmic axis, from dense to sparse."""

_MOST_TICKS = 8

_IN_TITLE, _BELOW, _INSIDE = 75, 62, 45
"""Characters in a line of the title and of a legend below or inside the axes: even of W, the widest, all fit there."""

_FAR = 3.0
"""Distance of the raw weights' metric, as a multiple of the averages' spread, beyond which it is only in the legend."""


def error_figure(curves: Sequence[ErrorCurve], profile_error: bool = False) -> Figure:
    """Draw the reconstruction error against sigma_rel; with `profile_error`, thin lines show that of the profiles."""
    # A legend of several entries would cover the curves, so it is drawn below them, in a taller figure.
    entries = sum(1 + len(curve.others) for curve in curves)
    legend_rows = entries + 2 if entries > 1 else 0
    figure = _figure(_WIDTH, 4.6 + 0.2 * legend_rows)
    _draw_errors(figure.add_subplot(), curves, legend_rows > 0, profile_error)
    return figure


def as_file(draw: Callable[[], Figure], suffix: str) -> bytes:
    """Return a figure as the content of a `.png`, `.svg` or `.pdf` file, reproducible byte for byte.

    Text in SVG is drawn as paths, so that it looks the same everywhere.

    matplotlibrc files are ignored: one in the working directory may be another user's and enable LaTeX, which runs
    programs.
    """
    stream = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "ema"
        matplotlib.rcParams["svg.fonttype"] = "path"
        draw().savefig(stream, format=suffix.removeprefix("."), metadata=_METADATA[suffix])
    return stream.getvalue()


def sweep_figure(found: dict[str, Any]) -> Figure:
    """Draw a metric against the length of the average, on a logarithmic axis, from `SweepReport.to_dict`.

    Of a beta the time constant in steps is drawn, 1 / (1 - beta).
    """

    def place(value: Any) -> float:
        return 1 / (1 - float(value)) if found["axis"] == "beta" else float(value)

    curve = [(place(point["x"]), point["estimate"], point["standard_error"]) for point in found["curve"]]
    widths, means, errors = np.array(curve, float).T
    measured = [trial for trial in found["trials"] if trial["value"] is not None and trial["x"]]
    lengths, values, noise = np.array(
        [(place(trial["x"]), trial["value"], trial["standard_error"] or found["noise"]) for trial in measured], float
    ).reshape(-1, 3).T  # fmt: skip
    flat, best = [*map(place, found["equal_within_noise"])], place(found["best"][found["axis"]])
    raw = found["raw"]
    figure = _figure(_WIDTH, 4.2)
    axes = figure.add_subplot()
    axes.axvspan(
        *flat, color=COLOURS[2], alpha=0.15, linewidth=0, label=f"equal within the noise: {flat[0]:g} to {flat[1]:g}"
    )
    axes.fill_between(widths, means - 2 * errors, means + 2 * errors, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(widths, means, color=COLOURS[0], linewidth=1.6, label="estimate, band: two standard errors")
    axes.errorbar(
        lengths, values, noise, color=COLOURS[4], marker="o", markersize=4, linestyle="none", capsize=3,
        label="measured, bars: noise",
    )  # fmt: skip
    axes.axvline(best, color=COLOURS[2], linewidth=1.6, label=f"best: {best:g}")
    if raw is not None:
        axes.axhline(raw, color=COLOURS[1], linestyle="--", linewidth=1.6, label=f"raw weights: {raw:.5g}")
    axes.set_xscale("log")
    _round_ticks(axes.xaxis)
    low, high = float(np.min(values)), float(np.max(values))
    if raw is not None and max(low - raw, raw - high) <= _FAR * (high - low):
        low, high = min(low, raw), max(high, raw)
    axes.set_ylim(low - 0.15 * (high - low or 1), high + 0.15 * (high - low or 1))
    axes.set_xlabel("steps of the decay, 1 / (1 - beta)" if found["axis"] == "beta" else _plain(found["axis"]))
    axes.set_ylabel(_plain(found["metric"]))
    _finish(axes)
    return figure


def audit_figure(audit: dict[str, Any]) -> Figure:
    """Draw the length of an average in each interval of the training, and the claimed length as a line.

    A band shows the length of all intervals together. `audit` is the `to_dict` of an audit.
    """
    intervals = audit["intervals"]
    claimed, length, sigma = intervals[0]["claimed"], audit["length"] or 0.0, audit["uncertainty"] or 0.0
    lengths = [abs(each["found"]) for each in intervals]
    figure = _figure(_WIDTH, 4.2)
    axes = figure.add_subplot()
    if audit["found"] is not None and 0 < length < math.inf and sigma <= 1:
        label = f"found in all together: {length:,.4g}"
        band = length / math.exp(sigma), length * math.exp(sigma)
        axes.axhspan(*band, color=COLOURS[0], alpha=0.2, linewidth=0, label=label)
    begins, ends = [each["begin"] for each in intervals], [each["end"] for each in intervals]
    axes.hlines(lengths, begins, ends, color=COLOURS[0], linewidth=2.5, label="found in each interval")
    if claimed is not None:
        axes.axhline(claimed, color=COLOURS[1], linestyle="--", linewidth=1.6, label=f"claimed: {claimed:,.4g}")
    axes.set_yscale("log")
    shown = [value for value in (*lengths, claimed) if value is not None and 0 < value < math.inf]
    if shown:
        axes.set_ylim(min(shown) / 1.5, max(shown) * 2.5)  # room for the legend
    _round_ticks(axes.yaxis)
    of_decay = audit["what"] == "decay"
    axes.set_ylabel("time constant (steps)" if of_decay else "sigma_rel")
    axes.set_xlabel("training time")
    title = f"{'Time constant' if of_decay else 'sigma_rel'} of the average {audit['name']}".rstrip()
    axes.set_title(_plain(title + f": {audit['verdict']}" * (audit["verdict"] != "found")), fontsize=12)
    _finish(axes)
    return figure


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure; sizes are in inches."""
    left, bottom = _MARGIN / width, _MARGIN / height
    layout = ConstrainedLayoutEngine(rect=(left, bottom, 1 - 2 * left, 1 - 2 * bottom))
    return _Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")


# --- error curves


def _draw_errors(axes: Axes, curves: Sequence[ErrorCurve], legend_below: bool, profile_error: bool) -> None:
    known = [curve.predicted_error[np.isfinite(curve.predicted_error)] for curve in curves]
    lowest = min((float(np.quantile(errors, 0.1)) for errors in known if errors.size), default=1.0)
    # The largest power of ten below nearly all of the curves.
    least = float(10 ** np.clip(np.floor(np.log10(max(lowest, 1e-300))), *np.log10(_LEAST_ERRORS)))
    for index, curve in enumerate(curves):
        _draw_curve(axes, curve, index, least, alone=len(curves) == 1)
        _draw_points(axes, curve, index, least)
    axes.axhline(GOOD_ERROR, color="0.35", linestyle=(0, (1, 3)), linewidth=1.2)
    highest = max((float(errors.max()) for errors in known if errors.size), default=_MOST_ERROR)
    axes.set_yscale("log")
    axes.set_ylim(least, np.clip(2 * highest, 2 * GOOD_ERROR, _MOST_ERROR))
    # Smaller errors are drawn at the lower end, whose label says so.
    smaller = any(errors.size and float(errors.min()) < least for errors in known)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda error, _: "≤ " * bool(smaller and error < 1.01 * least) + f"{100 * error:g} %")
    )
    axes.set_ylabel("expected relative L2 error of the weights")
    for index, curve in enumerate(curves if profile_error else ()):
        label = None if index else "thin: relative L2 error of the profile"
        axes.plot(
            curve.sigma_rels, curve.profile_error, alpha=0.55, linewidth=0.9, zorder=1.9, label=label, **_line(index)
        )
    title = "Predicted error of the weights" + (f": {_good_range(curves[0])}" if len(curves) == 1 else "")
    axes.set_title(_wrapped(title, _IN_TITLE), fontsize=12)
    _sigma_axis(axes, curves)
    legend = _finish(axes)
    if legend_below:
        legend = axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    for text in legend.get_texts():
        text.set_text(_wrapped(text.get_text(), _BELOW if legend_below else _INSIDE))


def _draw_curve(axes: Axes, curve: ErrorCurve, index: int, least: float, alone: bool) -> None:
    """Draw a curve, with marks at its tracked profiles; if it is `alone`, also the ranges with small errors."""
    colour, name = COLOURS[index % len(COLOURS)], _plain(curve.label)
    heights = np.clip(curve.predicted_error, least, _MOST_ERROR)
    marked = [s for s in curve.tracked if curve.sigma_rels[0] <= s <= curve.sigma_rels[-1]]
    outside = ", ".join(f"{s:g}" for s in curve.tracked if s not in marked)
    named = [", ".join(f"{s:g}" for s in marked)] * bool(marked) + [f"{outside} outside this range"] * bool(outside)
    label = name if alone else "; ".join([f"{name}: {_good_range(curve)}", *named[len(marked) > 0 :]])
    axes.plot(curve.sigma_rels, heights, linewidth=1.8, label=label, **_line(index))
    if named:
        axes.plot(
            marked, np.interp(marked, curve.sigma_rels, heights), color=colour, marker=MARKERS[index % len(MARKERS)],
            linestyle="none", clip_on=False, zorder=5,
            label=f"tracked: {'; '.join(named)}" if alone else None,
        )  # fmt: skip
    if alone:  # ranges of several curves would overlap; the legend names them
        for low, high in curve.ranges_below(GOOD_ERROR):
            axes.axvspan(low, high, color=colour, alpha=0.10, linewidth=0)


def _draw_points(axes: Axes, curve: ErrorCurve, index: int, least: float) -> None:
    """Draw the further targets, each as a letter that the legend explains."""
    for number, point in enumerate(curve.others):
        height = float(np.clip(point.predicted_error, least, _MOST_ERROR))
        axes.plot(
            max(point.sigma_rel, _LEAST_WIDTH), height, linestyle="none",
            marker=f"$\\mathrm{{{chr(ord('A') + number % 26)}}}$", markersize=8, color=COLOURS[index % len(COLOURS)],
            markeredgewidth=0.6, path_effects=[withStroke(linewidth=3.5, foreground="white")],
            clip_on=False, zorder=6, label=f"{_plain(point.label)}: {100 * point.predicted_error:.2g} %",
        )  # fmt: skip


def _sigma_axis(axes: Axes, curves: Sequence[ErrorCurve]) -> None:
    """Set up the horizontal axis so that it includes every curve and point."""
    points = [max(point.sigma_rel, _LEAST_WIDTH) for curve in curves for point in curve.others]
    low = min([float(c.sigma_rels[0]) for c in curves] + [0.9 * point for point in points])
    high = max([float(c.sigma_rels[-1]) for c in curves] + [min(1.1 * point, 0.6) for point in points])
    axes.set_xscale("log")
    margin = (high / low) ** 0.01  # for marks at the ends
    axes.set_xlim(low / margin, high * margin)
    _round_ticks(axes.xaxis)
    axes.set_xlabel("sigma_rel (width, as a fraction of training)")


def _good_range(curve: ErrorCurve) -> str:
    ranges = curve.ranges_text(GOOD_ERROR)
    return f"below 1 % for sigma_rel {ranges}" if ranges else "nowhere below 1 %"


# --- text and axes


def _line(index: int) -> dict[str, Any]:
    """Return the colour and the style of a line by its index."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index % len(STYLES)]}


def _round_ticks(axis: Axis) -> None:
    """Set the ticks of a logarithmic axis to round numbers, written without exponents."""
    low, high = axis.get_view_interval()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for digits in _ROUND:
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= _MOST_TICKS:
            break
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axis.set_ticks(ticks[:: -(-len(ticks) // _MOST_TICKS)])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"))
    axis.set_minor_locator(NullLocator())


def _plain(text: str) -> str:
    """Make a text safe for a figure: escape control characters and `$`, which begins a formula; limit the length."""
    text = printable(text)
    return (text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}...").replace("$", "\\$")


def _wrapped(text: str, width: int) -> str:
    """Break a text into lines of at most so many characters, without separating a `$` from its escape."""
    return textwrap.fill(text.replace("\\$", "$"), width).replace("$", "\\$")


def _finish(axes: Axes) -> Legend:
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes.legend(fontsize=8, framealpha=0.9)
