"""How the pictures of README and guides are drawn: without a background, in colours for white and
for dark pages. As a program, two of a folder of `ema demo`: its samples, which README shows, and
the errors of its averages, which the guide `synthesis` shows:

    python scripts/pictures.py ema-demo
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from posthoc_cli import Run, demo, plots

ASSETS = Path(__file__).parent.parent / ".assets"
GREY = "#7a8088"
"""Of texts and axes: a contrast of 4 to white, and of 4.7 to #0d1117, a usual dark page."""
BLUE = "#2b8cd0"
"""In place of our first colour, which is too dark there: 3.6 and 5.3."""


def write(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a picture into an SVG or PNG file; one of 32 colours is a third as large."""
    with mock.patch.object(plots, "COLOURS", (BLUE, *plots.COLOURS[1:])):
        content = plots.as_file(partial(_draw_on_any_page, draw), path.suffix)
    if path.suffix == ".png":
        picture = Image.open(io.BytesIO(content))
        picture.quantize(32, Image.Quantize.FASTOCTREE).save(path, optimize=True)
    else:
        path.write_bytes(content)


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


def main() -> None:
    """Draw both pictures of a folder of the demo."""
    folder = Path(sys.argv[1])
    run = Run(folder / "snapshots")
    write(lambda: plots.error_figure([run.error_curve()]), ASSETS / "error.svg")
    losses = {}
    for trial in json.loads((folder / "sweep" / "sweep.json").read_text())["trials"]:
        losses[trial["sigma_rel"]] = trial["value"]
    best = min(demo.SIGMA_RELS, key=losses.__getitem__)
    samples = {None: demo.sample_letters(load_file(folder / demo.LAST))}
    for width in (best, *demo.DRAWN):
        samples[width] = demo.sample_letters(run.average(width))
    write(lambda: demo.comparison_figure(losses, samples, best), ASSETS / "demo.png")


if __name__ == "__main__":
    main()
