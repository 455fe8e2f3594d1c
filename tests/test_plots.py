"""Figures: lines that differ, a legend of what is drawn, text that stays within the figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from posthoc_cli import plots
from posthoc_cli.planning import ErrorCurve, ErrorPoint, ProfileFit

LONG = "/home/somebody/projects/diffusion/runs/2024-05-17-large-batch/ema: 40 snapshots up to 400,000 steps"


def curve(low: float = 0.01, high: float = 0.2886, label: str = "run", others: Sequence[ErrorPoint] = ()) -> ErrorCurve:
    widths = np.geomspace(low, high, 50)
    return ErrorCurve(label, 1000.0, widths, 0.05 + 0 * widths, 1e-4 / widths, (0.05, 0.28), tuple(others))


def fit(label: str = "run", times: int = 40) -> ProfileFit:
    t, at = np.linspace(1, 1000, 100), np.linspace(25, 1000, times)
    return ProfileFit(
        f"sigma_rel 0.15 from {label}", "steps", t, 1e-6 * t, 1.1e-6 * t,
        {"sigma_rel 0.05": at, "sigma_rel 0.28": at}, {"sigma_rel 0.05": 0.1 * at, "sigma_rel 0.28": -0.1 * at},
    )  # fmt: skip


def entries(axes: Axes) -> dict[str, Line2D]:
    legend = axes.get_legend()
    assert legend is not None
    return {
        " ".join(text.get_text().split()): handle
        for text, handle in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }


def laid_out(figure: Figure) -> list[Text]:
    """The texts of titles, axes and legends of a figure, after its layout."""
    figure.draw_without_rendering()
    texts = [text for axes in figure.findobj(Axes) for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    texts += [text for legend in figure.findobj(Legend) for text in legend.get_texts()]
    texts += [text for part in figure.subfigs for text in part.texts]
    return [text for text in texts if text.get_text()]


def test_the_legends_thin_line_is_the_thin_curve_and_not_the_line_at_1_percent() -> None:
    axes = plots.error_figure([curve(), curve(label="other")], profile_error=True).subfigs[0].axes[0]
    (entry,) = (line for name, line in entries(axes).items() if "thin" in name)
    thin, *_ = (line for line in axes.lines if np.allclose(line.get_ydata(), 0.05))
    (bound,) = (line for line in axes.lines if np.allclose(line.get_ydata(), 0.01))
    for get in (Line2D.get_color, Line2D.get_linestyle, Line2D.get_linewidth, Line2D.get_alpha):
        assert get(entry) == get(thin)
    assert bound.get_linestyle() != thin.get_linestyle()
    assert bound.get_color() != thin.get_color()
    assert axes.child_axes == []  # both errors have the same axis


@pytest.mark.parametrize(
    ("ends", "inside", "outside"),
    [((0.01, 0.2886), "0.05, 0.28", ""), ((0.04, 0.2), "0.05", "0.28"), ((0.1, 0.2), "", "0.05, 0.28")],
)
def test_tracked_profiles_in_the_range_are_dots_and_the_others_are_named(
    ends: tuple[float, float], inside: str, outside: str
) -> None:
    axes = plots.error_figure([curve(*ends)]).subfigs[0].axes[0]
    dots = [x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert ", ".join(f"{dot:g}" for dot in dots) == inside
    beyond = f"{outside} outside this range" if outside else ""
    tracked = "; ".join(filter(None, [inside, beyond]))
    assert [name for name in entries(axes) if "tracked" in name] == [f"tracked: {tracked}"]
    two = plots.error_figure([curve(*ends), curve(*ends, label="other")]).subfigs[0].axes[0]
    good = f"below 1 % for sigma_rel {curve(*ends).ranges_text(0.01)}"
    named = "; ".join(filter(None, [good, beyond]))
    assert [*entries(two)] == [f"run: {named}", f"other: {named}"]  # one line per run


@pytest.mark.parametrize("least", [0.0, 1e-12, 1e-3])
@pytest.mark.parametrize("most", [1e-3, 0.3, 50.0])
def test_curves_stay_within_the_axes_and_the_lowest_tick_says_if_errors_are_smaller(least: float, most: float) -> None:
    errors = np.geomspace(1e-3, most, 50)
    errors[25] = least
    figure = plots.error_figure([replace(curve(), predicted_error=errors)])
    figure.draw_without_rendering()
    axes = figure.subfigs[0].axes[0]
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    for line in axes.lines[:2]:
        assert low <= line.get_ydata().min() <= line.get_ydata().max() <= high
        assert left < line.get_xdata().min() <= line.get_xdata().max() < right  # with room for marks
    (lowest,) = (text.get_text() for text in axes.get_yticklabels() if text.get_position()[1] == pytest.approx(low))
    assert lowest == f"{'≤ ' * bool(least < low)}{100 * low:g} %"


def swept(widths: tuple[float, float], raw: float | None) -> Figure:
    """The figure of a metric between 3.2 and 3.4 over a range of lengths."""
    xs = np.geomspace(*widths, 101)
    means = 3.2 + 0.2 * np.linspace(-1, 1, 101) ** 2
    points = [(float(x), float(y), 0.01) for x, y in zip(xs[::25], means[::25], strict=True)]
    best = float(np.sqrt(widths[0] * widths[1]))
    words = "sigma_rel", "loss"
    return plots.sweep_figure(xs, means, 0 * xs, points, best, (0.9 * best, 1.1 * best), raw, words)


@pytest.mark.parametrize("widths", [(0.025, 0.275), (0.1, 0.11), (700, 61_000), (1e-4, 0.28)])
def test_ticks_of_a_sweep_are_round(widths: tuple[float, float]) -> None:
    figure = swept(widths, None)
    figure.draw_without_rendering()
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert 3 <= len(ticks) <= 8
    for tick in ticks:
        digits = f"{float(tick.replace(',', '')):e}".partition("e")[0].rstrip("0.")
        assert len(digits) <= 4 if widths[1] < 1.2 * widths[0] else digits in ("1", "1.5", "2", "3", "5", "7"), ticks


@pytest.mark.parametrize(("raw", "inside"), [(3.9, True), (3.3, True), (2.7, True), (9.0, False)])
def test_the_metric_of_raw_weights_is_within_the_axes_unless_far_away(raw: float, inside: bool) -> None:
    axes = swept((0.025, 0.275), raw).axes[0]
    low, high = axes.get_ylim()
    assert (low < raw < high) == inside
    assert f"raw weights: {raw:g}" in {text.get_text() for text in axes.get_legend().get_texts()}


@pytest.mark.parametrize("count", [2, 5, 20])
def test_many_fits_are_drawn_in_two_columns(count: int) -> None:
    width, height = plots.error_figure([curve()], [fit(times=2)] * count).get_size_inches()
    assert height <= (1.3 if count <= 5 else 3.1) * width


@pytest.mark.parametrize(("label", "count"), [("run", 0), (LONG, 1), ("W" * 120, 3)])
def test_texts_stay_within_the_figure_and_titles_do_not_overlap(label: str, count: int) -> None:
    others = [ErrorPoint("profile " + "w" * 110, 0.1, 0.1, 0.01)] if count == 1 else []
    figure = plots.error_figure([curve(label=label, others=others)], [fit(label, times=3)] * count)
    texts = laid_out(figure)
    width, height = figure.get_size_inches() * figure.dpi
    for text in texts:
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    titles = [text.get_window_extent() for text in texts if " from " in text.get_text()]
    assert len(titles) == count
    assert not any(a.overlaps(b) for a in titles for b in titles if a is not b)


@pytest.mark.parametrize("label", ["$" * 110, "i$" * 55, "W$" * 55])
def test_a_dollar_sign_keeps_its_escape_wherever_a_word_is_broken(label: str) -> None:
    texts = laid_out(plots.error_figure([curve(label=label)]))
    lines = [line for text in texts for line in text.get_text().split("\n")]
    assert sum("$" in line for line in lines) > 1
    assert not any(line.endswith("\\") or is_math_text(line) for line in lines)


def test_only_wide_bars_have_a_pattern() -> None:
    """Bars stay visible if two snapshots are close to each other."""

    def bars(drawn: ProfileFit) -> list[list[Rectangle]]:
        return [c.patches for c in plots.error_figure([curve()], [drawn]).subfigs[1].axes[1].containers]

    hatches = {times: [bar[0].get_hatch() for bar in bars(fit(times=times))] for times in (10, 40)}
    assert hatches == {10: ["", "////"], 40: ["", ""]}
    drawn = fit(times=7)
    close = {label: np.append(at, at[3] + 1) for label, at in drawn.snapshot_times.items()}
    values = {label: np.append(values, 1.0) for label, values in drawn.coefficients.items()}
    both = bars(replace(drawn, snapshot_times=close, coefficients=values))
    assert min(abs(bar.get_width()) for patches in both for bar in patches) > 1000 / 100


def test_the_background_is_opaque_and_the_margins_are_empty() -> None:
    """On a dark page a figure without background would show black text on black."""
    for draw in (lambda: plots.error_figure([curve(label=LONG)]), lambda: swept((0.025, 0.275), 3.9)):
        pixels = matplotlib.image.imread(io.BytesIO(plots.as_file(draw, ".png")))
        assert (pixels[..., 3] == 1).all()
        edge = np.ones(pixels.shape[:2], dtype=bool)
        edge[10:-10, 10:-10] = False
        assert (pixels[edge] == 1).all()
        assert b'style="fill: #ffffff"' in plots.as_file(draw, ".svg")[:1500]


def test_a_profile_has_the_same_colour_in_the_bars_of_every_fit() -> None:
    one = fit()
    turned = replace(one, snapshot_times=dict(reversed(one.snapshot_times.items())))
    figure = plots.error_figure([curve()], [one, turned])
    colours = [
        {bars.get_label(): bars.patches[0].get_facecolor() for bars in part.axes[1].containers}
        for part in figure.subfigs[1:]
    ]
    assert colours[0] == colours[1]
