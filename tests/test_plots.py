"""Figures: lines that differ, a legend of what is drawn, text that stays within the figure."""

import io
from collections.abc import Sequence
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
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
        label, 1000.0, widths, 0.05 + 0 * widths, 1e-4 / widths, (0.05, 0.28), tuple(others)
    )


@pytest.mark.parametrize(
    ("ends", "inside"), [((0.01, 0.2886), "0.05, 0.28"), ((0.04, 0.2), "0.05"), ((0.1, 0.2), "")]
)
def test_tracked_profiles_in_the_range_are_dots_and_all_are_named(
    ends: tuple[float, float],
    inside: str,
) -> None:
    axes = plots.error_figure([curve(*ends)]).axes[0]
    dots = [x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert ", ".join(f"{dot:g}" for dot in dots) == inside
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "run; tracked: 0.05, 0.28"
    ]


@pytest.mark.parametrize(("least", "most"), [(0.0, 50.0), (1e-12, 0.3), (1e-3, 1e-3)])
def test_curves_stay_within_the_axes_and_the_lowest_tick_says_if_errors_are_smaller(
    least: float,
    most: float,
) -> None:
    errors = np.geomspace(1e-3, most, 50)
    errors[25] = least
    figure = plots.error_figure([replace(curve(), predicted_error=errors)])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    for line in axes.lines[:2]:
        assert low <= line.get_ydata().min() <= line.get_ydata().max() <= high
        # with room for marks
        assert left < line.get_xdata().min() <= line.get_xdata().max() < right
    (lowest,) = (
        text.get_text()
        for text in axes.get_yticklabels()
        if text.get_position()[1] == pytest.approx(low)
    )
    assert lowest == f"{'≤ ' * bool(least < low)}{100 * low:g} %"


def swept(kind: str = "sigma_rel") -> Figure:
    """The figure of a metric between 3.2 and 3.4 over a range of lengths."""
    xs = np.geomspace(0.025, 0.275, 101)
    means = 3.2 + 0.2 * np.linspace(-1, 1, 101) ** 2
    points = [*zip(xs.tolist(), means.tolist(), strict=True)]
    return plots.sweep_figure(
        {
            "axis": kind,
            "metric": "loss",
            "best": {kind: 0.08},
            "raw": 3.9,
            "noise": 0.01,
            "equal_within_noise": [0.07, 0.09],
            "trials": [{"x": x, "value": y, "standard_error": None} for x, y in points[::25]],
            "curve": [{"x": x, "estimate": y, "standard_error": 0.0} for x, y in points],
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


def test_a_beta_is_drawn_as_its_time_constant() -> None:
    assert swept("beta").axes[0].lines[0].get_xdata()[0] == pytest.approx(1 / (1 - 0.025))


@pytest.mark.parametrize("label", [LONG, "W" * 120])
def test_texts_stay_within_the_figure(label: str) -> None:
    figure = plots.error_figure(
        [curve(label=label, others=[ErrorPoint("profile " + "w" * 110, 0.1, 0.1, 0.01)])]
    )
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    (axes,) = figure.axes
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts()):
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
