"""How the pictures of README and guides are drawn: without a background, in colours for white and
for dark pages. As a program, the errors of a run, which the guide `synthesis` shows:

    python scripts/pictures.py ema-demo/snapshots
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from posthoc_cli import Run, plots

ERRORS = Path(__file__).parent.parent / ".assets" / "error.svg"
GREY = "#7a8088"
"""Of texts and axes: a contrast of 4 to white, and of 4.7 to #0d1117, a usual dark page."""
BLUE = "#2b8cd0"
"""In place of our first colour, which is too dark there: 3.6 and 5.3."""


def write(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a picture into an SVG file."""
    picture = plots.as_file(partial(_draw_on_any_page, draw), ".svg").decode()
    path.write_text(picture.replace(plots.COLOURS[0].lower(), BLUE))


def _draw_on_any_page(draw: Callable[[], Figure]) -> Figure:
    figure = draw()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        _recolour(axes)
    return figure


def _recolour(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(which="both", colors=GREY)
    for spine in axes.spines.values():
        spine.set_edgecolor(GREY)
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
    if legend := axes.get_legend():
        legend.get_frame().set_alpha(0)
        texts += legend.get_texts()
    for text in texts:
        text.set_color(GREY)
    for line in (*axes.get_xgridlines(), *axes.get_ygridlines()):
        line.set(color=GREY, alpha=0.25)
    for line in axes.lines:
        if len({*to_rgb(line.get_color())}) == 1:  # black, or a grey
            line.set_color(GREY)


if __name__ == "__main__":
    write(lambda: plots.error_figure([Run(sys.argv[1]).error_curve()]), ERRORS)
