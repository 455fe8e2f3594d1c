"""Figures: lines that differ, a legend of what is drawn, text that stays within the figure."""

import io
from collections.abc import Sequence
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from posthoc_cli import plots
from posthoc_cli.planning import ErrorCurve, ErrorPoint

LONG = (
    "/home/somebody/projects/diffusion/runs/2024-05-17-large-batch/ema: 40 snapshots up to "
    "400,000 steps"
)


def curve(
    low: float = 0.01,
    high: float = 0.2886,
    label: str = "run",
    others: Sequence[ErrorPoint] = (),
) -> ErrorCurve:
    widths = np.geomspace(low, high, 50)
    return ErrorCurve(
        label=label,
        t=1000.0,
        sigma_rels=widths,
        profile_error=np.full(50, 0.05),
        predicted_error=1e-4 / widths,
        tracked=(0.05, 0.28),
        others=tuple(others),
    )


@pytest.mark.parametrize(
    ("ends", "inside"),
    [
        ((0.01, 0.2886), "0.05, 0.28"),
        ((0.04, 0.2), "0.05"),
        ((0.1, 0.2), ""),
    ],
)
def test_tracked_profiles_in_the_range_are_dots_and_all_are_named(
    ends: tuple[float, float],
    inside: str,
) -> None:
    (axes,) = plots.error_figure([curve(*ends)]).axes
    (marked,) = [line for line in axes.lines if line.get_marker() == "o"]
    dots = [f"{dot:g}" for dot in marked.get_xdata()]
    assert ", ".join(dots) == inside
    (text,) = axes.get_legend().get_texts()
    assert text.get_text() == "run; tracked: 0.05, 0.28"


@pytest.mark.parametrize(
    ("least", "most"),
    [
        (0.0, 50.0),
        (1e-12, 0.3),
        (1e-3, 1e-3),
    ],
)
def test_curves_stay_within_the_axes_and_the_lowest_tick_says_if_errors_are_smaller(
    least: float,
    most: float,
) -> None:
    errors = np.geomspace(1e-3, most, 50)
    errors[25] = least
    figure = plots.error_figure([replace(curve(), predicted_error=errors)])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    for line in axes.lines[:2]:
        heights = line.get_ydata()
        assert low <= heights.min()
        assert heights.max() <= high
        # with room for marks
        widths = line.get_xdata()
        assert left < widths.min()
        assert widths.max() < right
    ticks = {}
    for text in axes.get_yticklabels():
        _, height = text.get_position()
        ticks[round(height / low, 9)] = text.get_text()
    lowest = f"{100 * low:g} %"
    assert ticks[1] == (f"≤ {lowest}" if least < low else lowest)


def swept(kind: str = "sigma_rel") -> Figure:
    """The figure of a metric between 3.2 and 3.4 over a range of lengths."""
    xs = np.geomspace(0.025, 0.275, 101)
    means = 3.2 + 0.2 * np.linspace(-1, 1, 101) ** 2
    estimates = []
    for x, mean in zip(xs.tolist(), means.tolist(), strict=True):
        estimates.append({"x": x, "estimate": mean, "standard_error": 0.06})
    trials = []
    for point in estimates[::25]:
        trials.append({"x": point["x"], "value": point["estimate"], "standard_error": None})
    return plots.sweep_figure(
        {
            "axis": kind,
            "metric": "loss",
            "best": {kind: 0.08},
            "raw": 3.9,
            "noise": 0.01,
            "equal_within_noise": [0.07, 0.09],
            "trials": trials,
            "curve": estimates,
        }
    )


def test_all_bars_are_within_the_axes() -> None:
    axes = swept().axes[0]
    (container,) = axes.containers
    (bars,) = container.lines[2]
    ends = np.concatenate(bars.get_segments())[:, 1]
    low, high = axes.get_ylim()
    height = np.ptp(ends)
    assert height == pytest.approx(0.22)
    assert low < ends.min()
    assert ends.max() < high


def test_the_band_of_the_estimate_is_within_the_axes() -> None:
    axes = swept().axes[0]
    (band,) = axes.findobj(PolyCollection)
    heights = band.get_paths()[0].vertices[:, 1]
    low, high = axes.get_ylim()
    assert np.ptp(heights) == pytest.approx(0.2 + 4 * 0.06)
    assert low < heights.min()
    assert heights.max() < high


def test_a_beta_is_drawn_as_its_time_constant() -> None:
    (axes,) = swept("beta").axes
    line, *_ = axes.lines
    assert line.get_xdata()[0] == pytest.approx(1 / (1 - 0.025))


@pytest.mark.parametrize("label", [LONG, "W" * 120])
def test_texts_stay_within_the_figure(label: str) -> None:
    other = ErrorPoint("profile " + "w" * 110, 0.1, 0.1, 0.01)
    figure = plots.error_figure([curve(label=label, others=[other])])
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    (axes,) = figure.axes
    legend = axes.get_legend().get_texts()
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *legend):
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text


def test_the_background_is_opaque_and_the_margins_are_empty() -> None:
    """On a dark page a figure without background would show black text on black."""
    for draw in (lambda: plots.error_figure([curve(label=LONG)]), swept):
        pixels = matplotlib.image.imread(io.BytesIO(plots.as_file(draw, ".png")))
        assert (pixels[..., 3] == 1).all()
        edge = np.ones(pixels.shape[:2], dtype=bool)
        edge[10:-10, 10:-10] = False
        assert (pixels[edge] == 1).all()
        assert b'style="fill: #ffffff"' in plots.as_file(draw, ".svg")[:1500]


def test_the_claimed_length_of_an_audit_is_drawn_for_each_interval() -> None:
    first = {
        "begin": 0.0,
        "end": 100.0,
        "found": 80.0,
        "claimed": 50.0,
    }
    second = first | {
        "begin": 100.0,
        "end": 200.0,
        "claimed": 90.0,
    }
    audit = {
        "name": "",
        "verdict": "as claimed",
        "what": "decay",
        "found": None,
        "warm_up": "ratio",
        "intervals": [first, second],
    }
    (axes,) = plots.audit_figure(audit).axes
    (line,) = axes.lines
    assert line.get_label() == "claimed: 50 to 90"
    times = line.get_xdata()
    lengths = line.get_ydata()
    assert np.interp(50, times, lengths) == 50
    assert np.interp(150, times, lengths) == 90
