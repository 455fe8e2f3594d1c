"""Figures: arrays in, matplotlib figures out.

They are readable in print, with colour blindness (Okabe and Ito's colours, each with a different
line style) and on a dark page (the background is opaque white). pyplot is not used: a figure
belongs to its caller and needs no display.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from posthoc_cli.errors import printable
from posthoc_cli.planning import GOOD_ERROR, ErrorCurve

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
"""Distance of the raw weights' metric, or of the estimate's band, as a multiple of the averages'
spread, beyond which it is not drawn."""
_LONGEST_TEXT = 200
# inches of a figure without legend, and the height of a line of the legend
_WIDTH = 6.4
_HEIGHT = 4.0
_LINE = 0.16
# margin in inches, since the edges of the white background are visible on a dark page
_MARGIN = 0.1
# of samples: a fifth of the width for their titles
_SAMPLES_WIDTH = 8.0
_CLOSE = {
    "wspace": 0.05, "hspace": 0.05, "left": 0.19, "right": 0.99, "bottom": 0.01, "top": 0.99,
}  # fmt: skip


class _Figure(Figure):
    """A figure that a notebook can show without pyplot."""

    def _repr_html_(self) -> str:
        text = as_file(lambda: self, ".svg").decode()
        _, _, drawing = text.partition("?>")
        return drawing


def as_file(
    draw: Callable[[], Figure],
    suffix: str,
) -> bytes:
    """Return a figure as the content of a `.png`, `.svg` or `.pdf` file, reproducible byte for
    byte.

    Text in SVG is drawn as paths, so that it looks the same everywhere.

    matplotlibrc files are ignored: one in the working directory may be another user's and enable
    LaTeX, which runs programs.
    """
    stream = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "ema"
        matplotlib.rcParams["svg.fonttype"] = "path"
        figure = draw()
        kind = suffix.removeprefix(".")
        figure.savefig(stream, format=kind, metadata=_METADATA[suffix])
    return stream.getvalue()


def error_figure(curves: Sequence[ErrorCurve], profile_error: bool = False) -> Figure:
    """Draw the reconstruction error against sigma_rel; with `profile_error`, thin lines show that
    of the profiles."""
    figure, axes = _figure()
    least = _lowest_error(curves)
    for index, curve in enumerate(curves):
        _draw_curve(axes, curve, least, index, alone=len(curves) == 1)
        _draw_points(axes, curve, least, _colour(index))
    if profile_error:
        _draw_profile_errors(axes, curves)
    dots = (0, (1, 3))
    axes.axhline(GOOD_ERROR, color="0.35", linestyle=dots, linewidth=1.2)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("sigma_rel (width, as a fraction of training)")
    axes.margins(x=0.01)  # for marks at the ends
    axes.set_ylabel("expected relative L2 error of the weights")
    errors = [_all_errors(curve) for curve in curves]
    _scale_errors(axes, np.concatenate(errors), least)
    title = "Predicted error"
    if len(curves) == 1:
        title += f": {curves[0].good_range}"
    return _finish(figure, axes.xaxis, title)


def _lowest_error(curves: Sequence[ErrorCurve]) -> float:
    """Return the lower end of the error axis: the largest power of ten below nearly all errors."""
    lows = [np.quantile(_heights(curve), 0.1) for curve in curves]
    low = max(float(min(lows)), 1e-300)
    exponent = math.floor(math.log10(low))
    return float(np.clip(10**exponent, *_LEAST_ERRORS))


def _heights(curve: ErrorCurve) -> FloatArray:
    return np.minimum(curve.predicted_error, _MOST_ERROR)


def _all_errors(curve: ErrorCurve) -> FloatArray:
    points = [point.predicted_error for point in curve.others]
    return np.append(_heights(curve), points)


def _scale_errors(axes: Axes, errors: FloatArray, least: float) -> None:
    """Set the range of the error axis, and say at its lower end if errors below it are drawn
    there."""
    most = np.clip(2 * errors.max(), 2 * GOOD_ERROR, _MOST_ERROR)
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
        label = f"{point.label}: {100 * error:.2g} %"
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
        label += f"; {curve.good_range}"
    heights = np.maximum(_heights(curve), least)
    style = _line(index)
    axes.plot(curve.sigma_rels, heights, linewidth=1.8, label=_text(label), **style)
    low, *_, high = curve.sigma_rels
    marked = [width for width in curve.tracked if low <= width <= high]
    axes.plot(
        marked,
        np.interp(marked, curve.sigma_rels, heights),
        marker=MARKERS[0],
        color=_colour(index),
        linestyle="none",
        clip_on=False,
        zorder=5,
    )
    if alone:  # those of several curves would overlap
        for begin, end in curve.ranges_below(GOOD_ERROR):
            axes.axvspan(begin, end, color=_colour(index), alpha=0.10, linewidth=0)


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
            **_line(index),
        )


def sweep_figure(report: dict[str, Any]) -> Figure:
    """Draw a metric against the length of the average, on a logarithmic axis, from
    `SweepReport.to_dict`.

    Of a beta the time constant in steps is drawn, 1 / (1 - beta).
    """
    kind = report["axis"]
    length = partial(_drawn_length, kind)
    figure, axes = _figure()
    low, high = map(length, report["equal_within_noise"])
    label = f"equal within the noise: {low:g} to {high:g}"
    green = _colour(2)
    axes.axvspan(low, high, color=green, alpha=0.15, linewidth=0, label=label)
    band = _draw_estimate(axes, report["curve"], length)
    bars = _draw_trials(axes, report["trials"], report["noise"], length)
    best = length(report["best"][kind])
    label = f"best: {best:g}"
    axes.axvline(best, color=green, linewidth=1.6, label=label)
    raw = report["raw"]
    if raw is not None:
        _draw_reference(axes, raw, f"raw weights: {raw:.5g}")
        band.append(raw)
    low, high = _metric_range(bars, band)
    axes.set_ylim(low, high)
    title = "steps of the decay, 1 / (1 - beta)" if kind == "beta" else _text(kind)
    axes.set(xscale="log", xlabel=title)
    axes.set_ylabel(_text(report["metric"]))
    return _finish(figure, axes.xaxis)


def _drawn_length(kind: str, value: float) -> float:
    if kind == "beta":
        return 1 / (1 - value)
    return value


def _draw_estimate(
    axes: Axes,
    curve: Sequence[dict[str, Any]],
    length: Callable[[float], float],
) -> list[float]:
    """Draw the estimate of the metric, and return the ends of its band."""
    lengths = [length(point["x"]) for point in curve]
    means = np.array([point["estimate"] for point in curve])
    errors = np.array([point["standard_error"] for point in curve])
    low = means - 2 * errors
    high = means + 2 * errors
    blue = _colour(0)
    axes.fill_between(lengths, low, high, color=blue, alpha=0.2, linewidth=0)
    label = "estimate, band: two standard errors"
    axes.plot(lengths, means, color=blue, linewidth=1.6, label=label)
    return [*low, *high]


def _draw_trials(
    axes: Axes,
    trials: Sequence[dict[str, Any]],
    noise: float,
    length: Callable[[float], float],
) -> list[float]:
    """Draw the measured metrics of averages, and return the ends of their bars."""
    lengths = []
    metrics = []
    errors = []
    for trial in trials:
        if trial["value"] is None or trial["x"] is None:
            continue
        lengths.append(length(trial["x"]))
        metrics.append(trial["value"])
        errors.append(trial["standard_error"] or noise)
    values = np.array(metrics)
    noises = np.array(errors)
    axes.errorbar(
        lengths,
        values,
        noises,
        color=_colour(4),
        marker="o",
        markersize=4,
        linestyle="none",
        capsize=3,
        label="measured, bars: noise",
    )
    return [*(values - noises), *(values + noises)]


def _metric_range(
    bars: Sequence[float],
    others: Sequence[float],
) -> tuple[float, float]:
    """Return the ends of the metric's axis, with all bars, and with those of the others that are
    near them."""
    low = min(bars)
    high = max(bars)
    most = _FAR * (high - low)
    drawn = [*bars]
    for value in others:
        if low - most <= value <= high + most:
            drawn.append(value)
    low = min(drawn)
    high = max(drawn)
    margin = 0.1 * (high - low or 1)
    return low - margin, high + margin


def samples_figure(
    rows: Mapping[str, npt.NDArray[np.floating[Any]]],
    best: str | None = None,
) -> Figure:
    """Draw images of shape [columns, height, width] and values in -1 .. 1, a row for each title."""
    columns = max(map(len, rows.values()))
    height = 0.1 + len(rows) * 0.8 * _SAMPLES_WIDTH / columns
    figure = _Figure(figsize=(_SAMPLES_WIDTH, height), dpi=150, facecolor="white")
    layout = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=_CLOSE)
    for line, title in zip(layout, rows, strict=True):
        for axes, image in zip(line, rows[title], strict=False):
            axes.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(
            _text(title, 16),
            rotation=0,
            horizontalalignment="right",
            verticalalignment="center",
            fontweight="bold" if title == best else "normal",
        )
    return figure


def as_picture(
    image: npt.NDArray[np.floating[Any]],
    scale: int,
) -> bytes:
    """Return a grey image of values in -1 .. 1 as PNG, each value as so many pixels a side."""
    stream = io.BytesIO()
    high = image.repeat(scale, axis=0)
    large = high.repeat(scale, axis=1)
    imsave(stream, large, vmin=-1, vmax=1, cmap="gray", format="png")
    return stream.getvalue()


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
    unit = "time constant (steps)" if audit["what"] == "decay" else "sigma_rel"
    axes.set(xlabel="training time", ylabel=unit)
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


def _line(index: int) -> dict[str, Any]:
    style = STYLES[index % len(STYLES)]
    return {"color": _colour(index), "linestyle": style}


def _draw_reference(axes: Axes, height: float, label: str) -> None:
    """Draw what the averages are compared with."""
    axes.axhline(height, label=label, **_reference())


def _reference() -> dict[str, Any]:
    return _line(1) | {"linewidth": 1.6}


def _text(text: str, width: int = 48) -> str:
    """Escape control characters in a text, and `$`, which begins a formula; break it into lines.

    Lines of a legend fit into the figure even if they consist of W, the widest letter.
    """
    shown = printable(text[:_LONGEST_TEXT])
    kept_together = shown.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.fill(kept_together, width)
    spaced = lines.replace("\N{NO-BREAK SPACE}", " ")
    return spaced.replace("$", "\\$")


def _finish(
    figure: Figure,
    scaled: Axis,
    title: str = "",
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
    figure.set_size_inches(_WIDTH, _HEIGHT + _LINE * lines)
    return figure


def _tick(value: float, _: object) -> str:
    if value < 1000:
        return f"{value:,.5g}"
    return f"{value:,.0f}"
