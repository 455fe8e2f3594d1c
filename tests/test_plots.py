"""Figures: lines that differ, a legend of what is drawn, text that stays within the figure."""

import io
import itertools
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest

from posthoc_cli import plots
from posthoc_cli.planning import ErrorCurve, ErrorPoint

LONG = (
    "/home/somebody/projects/diffusion/runs/2024-05-17-large-batch/ema: 40 snapshots up to "
    "400,000 steps"
)


def curve(low=0.01, high=0.2886, label="run", others=()):
    widths = np.geomspace(low, high, 50)
    return ErrorCurve(
        label=label,
        t=1000.0,
        sigma_rels=widths,
        profile_error=np.full(50, 0.05),
        predicted_error=1e-4 / widths,
        lost_gain=1e-3 / widths,
        tracked=(0.05, 0.28),
        others=others,
    )


@pytest.mark.parametrize(
    ("ends", "inside"),
    [
        ((0.01, 0.2886), "0.05, 0.28"),
        ((0.04, 0.2), "0.05"),
    ],
)
def test_tracked_profiles_in_the_range_are_dots_and_all_are_named(ends, inside):
    (axes,) = plots.error_figure([curve(*ends)]).axes
    (marked,) = [line for line in axes.lines if line.get_marker() == "o"]
    dots = [f"{dot:g}" for dot in marked.get_xdata()]
    assert ", ".join(dots) == inside
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[0] == "run; tracked: 0.05, 0.28"


@pytest.mark.parametrize(
    ("least", "lowest"),
    [
        (0.0, "≤ 0.01 %"),
        (1e-3, "0.01 %"),
    ],
)
def test_curves_stay_within_the_axes_and_the_lowest_tick_says_if_errors_are_smaller(least, lowest):
    errors = np.geomspace(1e-3, 50.0, 50)
    errors[25] = least
    figure = plots.error_figure([replace(curve(), predicted_error=errors)])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    line, *_ = axes.lines
    heights = line.get_ydata()
    assert low <= heights.min()
    assert heights.max() <= high
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    assert lowest in ticks


def swept(**changed):
    """A report of a sweep with two trials."""
    trials = []
    for sigma_rel, value in ((0.05, 2.0), (0.1, 1.0)):
        trials.append(
            {
                "sigma_rel": sigma_rel,
                "t": None,
                "base_share": 0.0,
                "value": value,
                "standard_error": None,
            }
        )
    compared = [
        {"title": "your EMA (0.99)", "value": 1.5, "gain": 1 / 3},
        {"title": "last weights", "value": 40.0, "gain": 0.975},
    ]
    report = {
        "metric": "loss",
        "minimize": True,
        "best": {"sigma_rel": 0.1},
        "compared": compared,
        "noise": None,
        "tied": None,
        "trials": trials,
        "curve": [{"sigma_rel": 0.05, "estimate": 2.0}, {"sigma_rel": 0.1, "estimate": 1.0}],
    }
    return report | changed


def test_what_averages_are_compared_with_is_a_line_and_named_if_it_is_far_away():
    (axes,) = plots.sweep_figure(swept()).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "your EMA (0.99): 1.5" in labels
    assert not any("last weights" in label for label in labels)
    assert axes.get_title(loc="left") == "\u2191 last weights: 40"
    low, high = axes.get_ylim()
    assert low < 1.0 < 2.0 < high < 40
    heights = [line.get_ydata()[0] for line in axes.lines if line.get_label().startswith("your")]
    assert heights == [1.5]


@pytest.mark.parametrize("minimize", [True, False])
def test_a_bad_length_leaves_the_height_to_the_lengths_among_which_one_chooses(minimize):
    """With the loss, or the same numbers negated as a metric to maximise."""
    sign = 1 if minimize else -1
    losses = {0.02: 1.3, 0.05: 1.1, 0.1: 1.0, 0.2: 1.2, 0.28: 90.0}
    trials = []
    for width, loss in losses.items():
        length = {"sigma_rel": width, "t": None, "base_share": 0.0}
        trials.append(length | {"value": sign * loss, "standard_error": None})
    last = {"title": "last weights", "value": sign * 40.0, "gain": 0.975}
    report = swept(minimize=minimize, trials=trials, compared=[last])
    (axes,) = plots.sweep_figure(report).axes
    ends = sorted(sign * end for end in axes.get_ylim())
    # all but the bad one are drawn, from 1.0 to 1.3, with a tenth of this as the margin
    assert ends == pytest.approx([0.97, 1.33])
    (marked,) = [text for text in axes.texts if text.get_text() == f"{sign * 90:.3g}"]
    place, height = marked.xy
    assert place == 0.28
    assert sign * height == pytest.approx(1.33)
    arrow = "\u2191" if minimize else "\u2193"
    assert axes.get_title(loc="left") == f"{arrow} last weights: {sign * 40}"


def test_values_of_neighbours_at_the_edge_do_not_overlap():
    """Of a demo, where four of eleven lengths are far from the best one."""
    widths = [0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.28]
    values = [0.342, 0.34, 0.339, 0.338, 0.339, 0.342, 0.348, 0.361, 0.382, 0.419, 0.498]
    trials = []
    for width, value in zip(widths, values, strict=True):
        length = {"sigma_rel": width, "t": None, "base_share": 0.0}
        trials.append(length | {"value": value, "standard_error": None})
    figure = plots.sweep_figure(swept(trials=[*reversed(trials)], compared=[]))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_metric_without_noise_has_no_bars_and_no_band():
    (axes,) = plots.sweep_figure(swept(noise=0.0)).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "measured" in labels
    assert "estimate" in labels
    (axes,) = plots.sweep_figure(swept(noise=0.2, tied=[0.05, 0.1])).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "measured, bars: noise" in labels
    assert "statistically tied: 0.05 to 0.1" in labels


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    """matplotlib leaves such texts out."""
    (axes,) = plots.error_figure([curve(label="_run")]).axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[0] == "\N{ZERO WIDTH SPACE}_run; tracked: 0.05, 0.28"


@pytest.mark.parametrize("label", [LONG, "W" * 120])
def test_texts_stay_within_the_figure(label):
    other = ErrorPoint("profile " + "w" * 110, 0.1, 0.1, 0.01, 0.1)
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


def test_the_background_is_opaque_and_the_margins_are_empty():
    """On a dark page a figure without background would show black text on black."""

    def draw():
        return plots.error_figure([curve(label=LONG)])

    pixels = matplotlib.image.imread(io.BytesIO(plots.as_file(draw, ".png")))
    assert (pixels[..., 3] == 1).all()
    edge = np.ones(pixels.shape[:2], dtype=bool)
    edge[10:-10, 10:-10] = False
    assert (pixels[edge] == 1).all()
    assert b'style="fill: #ffffff"' in plots.as_file(draw, ".svg")[:1500]


def interval(begin, end, claimed):
    return {"begin": begin, "end": end, "found": 80.0, "claimed": claimed}


def test_the_claimed_length_of_an_audit_is_drawn_for_each_interval_and_the_verdict_named():
    audit = {
        "name": "",
        "verdict": "too short",
        "what": "decay",
        "unit": "images",
        "found": None,
        "warm_up": "ratio",
        "intervals": [interval(0, 100, 50.0), interval(100, 200, 90.0)],
    }
    (axes,) = plots.audit_figure(audit).axes
    assert axes.get_title() == "Length of the average: too short"
    assert axes.get_ylabel() == "time constant (images)"
    (line,) = axes.lines
    assert line.get_label() == "claimed: 50 to 90"
    claimed = np.interp([50, 150], line.get_xdata(), line.get_ydata())
    assert claimed.tolist() == [50, 90]


def test_panels_show_the_points_over_the_strokes_and_all_in_one_frame():
    strokes = np.array([[[0.0, 0.0], [4.0, 0.0]], [[4.0, 0.0], [4.0, 1.0]]])
    points = np.array([[1.0, 0.1], [3.0, 0.2], [9.0, 9.0]])
    figure = plots.points_figure({"few\nloss 1": points, "none": points[:0]}, strokes)
    few, none = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["few\nloss 1", "none"]
    for axes, drawn in ((few, points), (none, points[:0])):
        *lines, dots = axes.lines
        assert np.array_equal([line.get_xydata() for line in lines], strokes)
        assert np.array_equal(dots.get_xydata(), drawn)
        assert axes.get_xlim() == (-0.2, 4.2)
        assert axes.get_ylim() == (-0.2, 1.2)
