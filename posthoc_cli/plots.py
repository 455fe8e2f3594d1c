"""Figures: arrays in, matplotlib figures out.

They are readable in print, with colour blindness (Okabe and Ito's colours, each with a different
line style) and on a dark page (the background is opaque white unless asked otherwise). pyplot is
not used: a figure belongs to its caller and needs no display.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from posthoc_cli.errors import (
    at_most,
    escape_text,
    percent,
)
from posthoc_cli.planning import SMALL_LOSS, ErrorCurve

FloatArray = npt.NDArray[np.float64]

PICTURES = (".png", ".svg", ".pdf")  # the endings of pictures
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Creator": None, "Date": None, "Format": None, "Type": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
"""Metadata of a file by its ending, without the time and the version of matplotlib."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_LEAST_ERRORS = (1e-8, 1e-4)
_MOST_ERROR = 2.0
"""Bounds of the lower end of the error axis, and of the upper one; errors beyond the ends are drawn
there."""
_LEAST_WIDTH = 1e-4  # the sigma_rel at which narrower targets are drawn
_FAR = 3.0
"""Distance of a metric from that of the best average, as a multiple of the median distance of the
averages, beyond which it is only named at the edge: so that one bad length, or the last weights,
leave the height to the lengths among which one chooses."""
_LONGEST_TEXT = 200
# inches of a figure without legend, and the height of a line of the legend
_WIDTH = 6.4
_HEIGHT = 4.0
_LINE = 0.16
_CHARACTERS = 48  # of a line of the legend
# inches of a panel and of a line of its title, and the space around what it shows
_PANEL = 2.0
_LINE_OF_TITLE = 0.2
_ROOM = 0.2
# margin in inches, since the edges of the white background are visible on a dark page
_MARGIN = 0.1


class _Figure(Figure):
    """A figure that a notebook can show without pyplot."""

    def _repr_html_(self) -> str:
        return as_html(lambda: self)


def as_file(
    draw: Callable[[], Figure],
    suffix: str,
    transparent: bool = False,
) -> bytes:
    """Draw a figure as the content of a `.png`, `.svg` or `.pdf` file, reproducible byte for byte;
    `transparent` leaves out the white background.

    Text in SVG is drawn as paths, so that it looks the same everywhere. matplotlibrc files are
    ignored: one in the working directory may be another user's and enable LaTeX, which runs
    programs.
    """
    stream = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "ema"
        matplotlib.rcParams["svg.fonttype"] = "path"
        figure = draw()
        kind = suffix.removeprefix(".")
        figure.savefig(stream, format=kind, metadata=_METADATA[suffix], transparent=transparent)
    return stream.getvalue()


def as_html(draw: Callable[[], Figure]) -> str:
    """Draw a figure as the SVG of an HTML page."""
    text = as_file(draw, ".svg").decode()
    _, _, drawing = text.partition("?>")
    return drawing


def error_figure(curves: Sequence[ErrorCurve], profile_error: bool = False) -> Figure:
    """Draw the reconstruction error, and dashed the gain that it loses, against sigma_rel; with
    `profile_error`, thin lines show the error of the profiles."""
    figure, axes = _figure()
    least = _lowest_error(curves)
    for index, curve in enumerate(curves):
        _draw_curve(axes, curve, least, index, alone=len(curves) == 1)
        _draw_lost_gain(axes, curve, least, index)
        _draw_points(axes, curve, least, _colour(index))
    if profile_error:
        _draw_profile_errors(axes, curves)
    dots = (0, (1, 3))
    axes.axhline(SMALL_LOSS, color="0.35", linestyle=dots, linewidth=1.2)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("sigma_rel (width, as a fraction of training)")
    axes.margins(x=0.01)  # for marks at the ends
    axes.set_ylabel("error of the weights, share of gain lost")
    errors = [_all_errors(curve) for curve in curves]
    _scale_errors(axes, np.concatenate(errors), least)
    title = "Predicted error and lost gain"
    if len(curves) == 1:
        title = f"Lost gain: {curves[0].good_range}"
    return _finish(figure, axes.xaxis, title)


def _lowest_error(curves: Sequence[ErrorCurve]) -> float:
    """Find the lower end of the error axis: the largest power of ten below nearly all errors."""
    lows = [np.quantile(_heights(curve), 0.1) for curve in curves]
    low = max(float(min(lows)), 1e-300)
    exponent = math.floor(math.log10(low))
    return float(np.clip(10**exponent, *_LEAST_ERRORS))


def _heights(curve: ErrorCurve) -> FloatArray:
    return np.minimum(curve.predicted_error, _MOST_ERROR)


def _all_errors(curve: ErrorCurve) -> FloatArray:
    points = [point.predicted_error for point in curve.others]
    return np.concatenate([_heights(curve), curve.lost_gain, points])


def _scale_errors(axes: Axes, errors: FloatArray, least: float) -> None:
    """Set the range of the error axis, and say at its lower end if errors below it are drawn
    there."""
    most = np.clip(2 * errors.max(), 2 * SMALL_LOSS, _MOST_ERROR)
    axes.set_ylim(least, most)
    is_cut = errors.min() < least

    def as_percent(error: float, _: object) -> str:
        text = f"{100 * error:g} %"
        if is_cut and error < 1.01 * least:
            return f"≤ {text}"
        return text

    axes.yaxis.set_major_formatter(as_percent)


def _draw_points(
    axes: Axes,
    curve: ErrorCurve,
    least: float,
    colour: str,
) -> None:
    """Draw the averages of a curve that are not power functions."""
    for number, point in enumerate(curve.others, start=1):
        error = point.predicted_error
        label = f"{point.label}: {percent(error)}, lost gain {at_most(point.lost_gain)}"
        axes.plot(
            max(point.sigma_rel, _LEAST_WIDTH),
            np.clip(error, least, _MOST_ERROR),
            marker=MARKERS[number % len(MARKERS)],
            color=colour,
            linestyle="none",
            clip_on=False,
            zorder=6,
            label=_text(label),
        )


def _draw_curve(
    axes: Axes,
    curve: ErrorCurve,
    least: float,
    index: int,
    alone: bool,
) -> None:
    """Draw a curve, with marks at its tracked profiles; if it is `alone`, also the ranges with
    small errors."""
    label = curve.label[: _LONGEST_TEXT // 2]
    if curve.tracked:
        tracked = [f"{width:g}" for width in curve.tracked]
        label += f"; tracked: {', '.join(tracked)}"
    if not alone:
        label += f"; lost gain {curve.good_range}"
    heights = np.maximum(_heights(curve), least)
    colour = _colour(index)
    axes.plot(curve.sigma_rels, heights, color=colour, linewidth=1.8, label=_text(label))
    low, *_, high = curve.sigma_rels
    marked = [width for width in curve.tracked if low <= width <= high]
    axes.plot(
        marked,
        np.interp(marked, curve.sigma_rels, heights),
        marker=MARKERS[0],
        color=colour,
        linestyle="none",
        clip_on=False,
        zorder=5,
    )
    if alone:  # the ranges of several curves would overlap
        for begin, end in curve.ranges_below(SMALL_LOSS):
            axes.axvspan(begin, end, color=_colour(index), alpha=0.10, linewidth=0)


def _draw_lost_gain(axes: Axes, curve: ErrorCurve, least: float, index: int) -> None:
    label = (
        None
        if index
        else "dashed: the error costs at most about this share of what averaging gains"
    )
    heights = np.clip(curve.lost_gain, least, None)
    dashes = (0, (4, 2))
    colour = _colour(index)
    axes.plot(curve.sigma_rels, heights, color=colour, linestyle=dashes, linewidth=1.2, label=label)


def _draw_profile_errors(axes: Axes, curves: Sequence[ErrorCurve]) -> None:
    for index, curve in enumerate(curves):
        label = None if index else "thin: relative L2 error of the profile"
        axes.plot(
            curve.sigma_rels,
            curve.profile_error,
            alpha=0.55,
            linewidth=0.9,
            zorder=1.9,
            label=label,
            color=_colour(index),
        )


def sweep_figure(report: dict[str, Any], width: float = _WIDTH) -> Figure:
    """Draw a metric against sigma_rel, on a logarithmic axis, from `SweepReport.to_dict`; `width`
    is in inches.

    What the averages are compared with is drawn as lines; metrics far from the best average are
    only named, at the edge.
    """
    trials = []
    for trial in report["trials"]:
        is_length = trial["sigma_rel"] is not None and trial["t"] is None
        if is_length and not trial["base_share"]:
            trials.append(trial)
    best = report["best"]
    figure = _metric_figure(report, "sigma_rel", report["curve"], trials, width)
    axes = figure.axes[0]
    low, high = report["tied"] or (0, 0)
    if low < high:
        tied = f"statistically tied: {low:g} to {high:g}"
        axes.axvspan(low, high, color=_colour(2), alpha=0.15, linewidth=0, label=tied)
    if best["sigma_rel"] is not None:
        label = f"best: {best['sigma_rel']:g}"
        if best.get("as"):
            label += f" (as {best['as']})"
        axes.axvline(best["sigma_rel"], color=_colour(2), linewidth=1.6, label=label)
    axes.set_xlabel("sigma_rel (width, as a fraction of training)")
    return _finish(figure, axes.xaxis, width=width)


def end_figure(report: dict[str, Any], width: float = _WIDTH) -> Figure:
    """Draw a metric against the end of the average of the best length, as `sweep_figure` does
    against its length."""
    last = report["settings"]["t"]
    best = report["best"]["t"]
    length = report["best_length"]
    trials = []
    for trial in report["trials"]:
        if trial["sigma_rel"] == length and not trial["base_share"]:
            trials.append(trial | {"t": last if trial["t"] is None else trial["t"]})
    figure = _metric_figure(report, "t", report["end_curve"], trials, width)
    axes = figure.axes[0]
    if best is not None:
        label = f"best: t = {best:,.12g}"
        axes.axvline(best, color=_colour(2), linewidth=1.6, label=label)
    axes.set_xlabel(f"end of the average of sigma_rel {length:g} ({report['t_unit']})")
    return _finish(figure, axes.xaxis, width=width)


def share_figure(report: dict[str, Any], width: float = _WIDTH) -> Figure:
    """Draw a metric against the share of the base in the average of the best length and end; 0 is
    the average itself."""
    best = report["best"]["base_share"]
    trials = []
    for trial in report["trials"]:
        if (trial["sigma_rel"], trial["t"]) == (report["best_length"], report["best_end"]):
            trials.append(trial)
    figure = _metric_figure(report, "base_share", report["share_curve"], trials, width)
    axes = figure.axes[0]
    axes.set_xscale("linear")
    if best is not None:
        axes.axvline(best, color=_colour(2), linewidth=1.6, label=f"best: {best:g}")
    axes.set_xlabel("share of the base (0: the average alone)")
    return _finish(figure, axes.xaxis, width=width)


def _metric_figure(
    report: dict[str, Any],
    name: str,
    curve: Sequence[dict[str, Any]],
    trials: Sequence[dict[str, Any]],
    width: float,
) -> Figure:
    """Draw the metric of trials against their value of this name, with the curve of the estimate,
    and what averages are compared with."""
    figure, axes = _figure()
    _draw_estimate(axes, name, curve)
    measured = [trial for trial in trials if trial["value"] is not None]
    noise = report["noise"] or 0.0
    _draw_trials(axes, name, measured, noise)
    compared = [each for each in report["compared"] if each["value"] is not None]
    references = [each["value"] for each in compared]
    low, high = _metric_range(measured, noise, references, report["minimize"])
    characters = _characters(width)
    beyond = []
    for index, each in enumerate(compared):
        label = f"{each['title']}: {each['value']:.5g}"
        if not low <= each["value"] <= high:
            arrow = "\N{UPWARDS ARROW}" if each["value"] > high else "\N{DOWNWARDS ARROW}"
            beyond.append(_text(f"{arrow} {label}", characters))
            continue
        axes.axhline(
            each["value"],
            label=_text(label, characters),
            linewidth=1.6,
            color=_colour((1, 3, 5, 6)[index]),
            linestyle=STYLES[1 + index % 3],
        )
    # outside the axes, where no curve or mark is
    axes.set_title("\n".join(beyond), loc="left", fontsize=8)
    axes.set_ylim(low, high)
    axes.set_xscale("log")
    _mark_beyond(axes, name, measured)
    axes.set_ylabel(_text(report["metric"], characters))
    return figure


def _mark_beyond(axes: Axes, name: str, trials: Sequence[dict[str, Any]]) -> None:
    """Mark trials whose metrics lie beyond the range, by an arrow at the edge and their value.
    Neighbours have their values in three rows, which leaves them room."""
    low, high = axes.get_ylim()
    beyond = [trial for trial in trials if not low <= trial["value"] <= high]
    for number, trial in enumerate(sorted(beyond, key=itemgetter(name))):
        value = trial["value"]
        is_above = value > high
        offset = 7 + 10 * (number % 3)
        axes.plot(
            trial[name],
            high if is_above else low,
            marker="^" if is_above else "v",
            color=_colour(4),
            linestyle="none",
            clip_on=False,
        )
        axes.annotate(
            f"{value:.3g}",
            (trial[name], high if is_above else low),
            xytext=(0, -offset if is_above else offset),
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="top" if is_above else "bottom",
            fontsize=8,
        )


def _draw_estimate(axes: Axes, name: str, curve: Sequence[dict[str, Any]]) -> None:
    """Draw the estimate of the metric."""
    places = [point[name] for point in curve]
    means = np.array([point["estimate"] for point in curve])
    errors = np.array([point.get("standard_error", 0.0) for point in curve])
    blue = _colour(0)
    label = "estimate"
    if errors.any():
        label += ", band: two standard errors"
        low = means - 2 * errors
        high = means + 2 * errors
        axes.fill_between(places, low, high, color=blue, alpha=0.2, linewidth=0)
    axes.plot(places, means, color=blue, linewidth=1.6, label=label)


def _draw_trials(
    axes: Axes,
    name: str,
    trials: Sequence[dict[str, Any]],
    noise: float,
) -> None:
    """Draw the metrics of trials."""
    noises = _noises(trials, noise)
    has_bars = bool(noises.any())
    axes.errorbar(
        [trial[name] for trial in trials],
        [trial["value"] for trial in trials],
        noises if has_bars else None,
        color=_colour(4),
        marker="o",
        markersize=4,
        linestyle="none",
        capsize=3,
        label="measured, bars: noise" if has_bars else "measured",
    )


def _noises(trials: Sequence[dict[str, Any]], noise: float) -> FloatArray:
    """Return the standard error that each trial states, or else the noise of all."""
    return np.array([trial["standard_error"] or noise for trial in trials])


def _metric_range(
    trials: Sequence[dict[str, Any]],
    noise: float,
    references: Sequence[float],
    minimize: bool,
) -> tuple[float, float]:
    """Find the ends of the metric's axis: those of the bars of trials, and of the references, that
    are not far from the best trial."""
    values = np.array([trial["value"] for trial in trials])
    noises = _noises(trials, noise)
    best = values.min() if minimize else values.max()
    distances = np.abs(values - best)
    others = distances[distances > 0]
    most = _FAR * float(np.median(others)) if others.size else 0.0
    is_near = distances <= most
    drawn = [*(values - noises)[is_near], *(values + noises)[is_near]]
    drawn += [value for value in references if abs(value - best) <= most]
    low = min(drawn)
    high = max(drawn)
    margin = 0.1 * (high - low or 1)
    return low - margin, high + margin


def points_figure(panels: Mapping[str, FloatArray], strokes: npt.ArrayLike) -> Figure:
    """Draw a row of panels, each with points in the plane, shape [points, 2], over thin lines, the
    strokes, shape [strokes, 2, 2]; `panels` are the points by the title of their panel."""
    ends = np.asarray(strokes)
    low = ends.min(axis=(0, 1)) - _ROOM
    high = ends.max(axis=(0, 1)) + _ROOM
    across, up = high - low
    lines = max(len(title.splitlines()) for title in panels)
    height = _PANEL * up / across
    size = (_PANEL * len(panels), height + _LINE_OF_TITLE * lines)
    figure = _Figure(figsize=size, dpi=200, facecolor="white")
    for index, (title, points) in enumerate(panels.items()):
        place = (index / len(panels), 0, 1 / len(panels), height / size[1])
        axes = figure.add_axes(place, xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        axes.axis("off")
        for stroke in ends:
            axes.plot(*stroke.T, color="0.6", alpha=0.6, linewidth=0.6)
        axes.plot(*points.T, ".", color=_colour(0), markersize=2, markeredgewidth=0)
        axes.set_title(title, fontsize=11, pad=2)
    return figure


def audit_figure(audit: dict[str, Any]) -> Figure:
    """Draw the length of an average in each interval of the training, and the claimed one.

    A band shows the length of all intervals together, if it is the same in all. `audit` is the
    `to_dict` of an audit.
    """
    intervals = [interval for interval in audit["intervals"] if interval["found"]]
    claims = [interval for interval in audit["intervals"] if interval["claimed"]]
    figure, axes = _figure()
    _draw_intervals(axes, intervals)
    if audit["found"] is not None and not audit["warm_up"]:
        length = audit["length"] or 0.0
        _draw_common_length(axes, length, audit["uncertainty"] or 0.0)
    _draw_claims(axes, claims)
    quantity = "sigma_rel"
    if audit["what"] == "decay":
        quantity = f"time constant ({audit['unit']})"
    axes.set(xlabel="training time", ylabel=quantity)
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    if intervals or claims:
        axes.set_yscale("log")
    title = f"Length of the average {audit['name']}".rstrip()
    if audit["verdict"] != "found":
        title += f": {audit['verdict']}"
    return _finish(figure, axes.yaxis, title)


def _draw_intervals(
    axes: Axes,
    intervals: Sequence[dict[str, Any]],
) -> None:
    lengths = [interval["found"] for interval in intervals]
    begins = [interval["begin"] for interval in intervals]
    ends = [interval["end"] for interval in intervals]
    label = "found in each interval"
    blue = _colour(0)
    axes.hlines(lengths, begins, ends, color=blue, linewidth=2.5, label=label)


def _draw_claims(
    axes: Axes,
    intervals: Sequence[dict[str, Any]],
) -> None:
    """Draw the claimed length, which rises with a warm-up, as steps."""
    if not intervals:
        return
    times = []
    lengths = []
    for interval in intervals:
        times += [interval["begin"], interval["end"]]
        lengths += 2 * [interval["claimed"]]
    first, last = (f"{length:,.4g}" for length in (lengths[0], lengths[-1]))
    label = f"claimed: {first}" if first == last else f"claimed: {first} to {last}"
    axes.plot(times, lengths, label=label, **_reference())


def _draw_common_length(axes: Axes, length: float, uncertainty: float) -> None:
    if 0 < length < math.inf and uncertainty <= 1:
        factor = math.exp(uncertainty)
        low = length / factor
        high = length * factor
        label = f"found in all together: {length:,.4g}"
        blue = _colour(0)
        axes.axhspan(low, high, color=blue, alpha=0.2, linewidth=0, label=label)


# --- parts of all figures


def _figure() -> tuple[Figure, Axes]:
    layout = ConstrainedLayoutEngine(w_pad=_MARGIN, h_pad=_MARGIN)
    size = (_WIDTH, _HEIGHT)
    figure = _Figure(figsize=size, dpi=200, layout=layout, facecolor="white")
    return figure, figure.add_subplot()


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _reference() -> dict[str, Any]:
    return {"color": _colour(1), "linestyle": STYLES[1], "linewidth": 1.6}


def _characters(width: float) -> int:
    """Count the characters of a line of the legend of a figure, of so many inches."""
    return int(_CHARACTERS * width / _WIDTH)


def _text(text: str, width: int = _CHARACTERS) -> str:
    """Escape control characters in a text, and `$`, which begins a formula; break it into lines.

    Lines of a legend fit into the figure even if they consist of W, the widest letter.
    """
    shown = escape_text(text[:_LONGEST_TEXT])
    kept_together = shown.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.fill(kept_together, width)
    spaced = lines.replace("\N{NO-BREAK SPACE}", " ")
    if spaced.startswith("_"):  # which matplotlib leaves out of legends
        spaced = f"\N{ZERO WIDTH SPACE}{spaced}"
    return spaced.replace("$", "\\$")


def _finish(
    figure: Figure,
    scaled: Axis,
    title: str = "",
    width: float = _WIDTH,
) -> Figure:
    """Set round ticks on the logarithmic axis `scaled`, the title, and a legend below, where it
    covers no curve."""
    axes = scaled.axes
    low, high = scaled.get_view_interval()
    if high > 10 * low > 0:
        scaled.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        scaled.set_major_locator(MaxNLocator(5))
    scaled.set_major_formatter(FuncFormatter(_tick))
    scaled.set_minor_locator(NullLocator())
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(_text(title, 58), fontsize=12)
    below = (0.5, -0.14)
    legend = axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=below, frameon=False)
    lines = 0
    for text in legend.get_texts():
        lines += 1 + text.get_text().count("\n")
    figure.set_size_inches(width, _HEIGHT + _LINE * lines)
    return figure


def _tick(value: float, _: object) -> str:
    if value < 1000:
        return f"{value:,.5g}"
    return f"{value:,.0f}"
