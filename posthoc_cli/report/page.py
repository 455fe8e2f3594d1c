"""The page of a sweep: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.metadata
import importlib.resources
import math
import platform
import re
import shlex
import string
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from posthoc_cli import files, plots
from posthoc_cli.errors import FileFormatError, escape_text, percent
from posthoc_cli.snapshots.opened_file import read_small_file
from posthoc_cli.sweep import SweepReport, images
from posthoc_cli.sweep.folder import LOGS
from posthoc_cli.sweep.report import describe_gain, summarize
from posthoc_cli.sweep.trial import Trial

PAGE = "report.html"  # in the folder of a sweep
_PACKAGES = ("posthoc-cli", "torch", "numpy", "safetensors")  # packages whose versions are shown
_UNITS = re.compile(r"(?<=\d) (?=(?:%|±|x|s|[kMGTPE]?B)(?!\w))|(?<=[±<>]) (?=\d)")
"""The spaces between numbers and units, and those in "0.29 ± 0.01" and "< 0.1 %"."""
_MOST_IMAGES = 50_000_000  # bytes of a sweep's images, which a browser still opens at once


def write_page(report: SweepReport, folder: Path) -> SweepReport:
    """Write the page of a sweep to its folder; return the report with this file among its
    outputs."""
    page = folder / PAGE
    content = render(report, folder).encode(errors="backslashreplace")
    files.write_atomically(page, content, overwrite=True)
    return replace(report, outputs=(*report.outputs, page))


def render(report: SweepReport, folder: Path) -> str:
    """Render the page of the sweep in a folder as HTML; its links to logs are relative to the
    folder."""
    room = importlib.resources.files("posthoc_cli.report")
    page = string.Template((room / "page.html").read_text("utf-8"))
    script = (room / "page.js").read_text("utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    gallery = _Gallery(report, folder)
    chart = _render_charts(report)
    samples = gallery.render()
    return page.substitute(
        digest=base64.b64encode(digest).decode(),
        script=script,
        title=escape(_title(report)),
        date=time.strftime("%d %B %Y"),
        answer=_render_answer(report),
        pictures=f"{chart}\n{samples}",
        column=gallery.column,
        images_a_row=str(gallery.images_a_row),
        take=_render_take(report),
        summary=_definition_list(summarize(report)),
        trials=_render_trials(report, folder),
        again=_render_again(report),
        versions=escape(_list_versions()),
    )


def _title(report: SweepReport) -> str:
    """Say what was searched, and by which metric."""
    if report.minimize is None:
        return f"Averages of {report.directory}, by eye"
    direction = "lower" if report.minimize else "higher"
    return f"Averages of {report.directory}, by {report.metric} ({direction} is better)"


def _render_answer(report: SweepReport) -> str:
    """Say how much better the best average is, and which it is."""
    if report.minimize is None:
        return ""
    gain = describe_gain(report)
    best = f"Best: {report.best_title}, {report.metric} {report.value:.6g}."
    sentence = f"<strong>{escape(gain[0].upper() + gain[1:])}.</strong> " if gain else ""
    return f'<p class="answer">{sentence}{escape(best)}</p>'


def escape(text: str) -> str:
    """Escape a text for HTML, with control characters, and without a line end between a number and
    its unit."""
    lines = map(escape_text, text.split("\n"))
    return html.escape(_UNITS.sub("\u00a0", "\n".join(lines)))


def _definition_list(pairs: Sequence[tuple[str, str]]) -> str:
    rows = []
    for name, value in pairs:
        emphasis = ' class="best"' if name in ("best", "gain") else ""
        rows.append(f"<dt>{escape(name)}</dt><dd{emphasis}>{escape(value)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _render_again(report: SweepReport) -> str:
    """Show the command that repeats the search; a search in Python has none."""
    if not report.rerun_command:
        return ""
    command = escape(report.rerun_command)
    return f"<section><h2>Repeat or continue the search</h2>\n<pre>{command}</pre>\n</section>"


_WIDE = 8.5
_NARROW = 4.4
"""Widths of a chart in inches, for a screen and for a telephone, where letters of the same size are
readable."""


def _render_charts(report: SweepReport) -> str:
    """Draw the metric against the length and, if it was measured, against the end."""
    if report.minimize is None:
        return ""
    values = report.to_dict()
    charts = [_render_chart(plots.sweep_figure, values, f"{report.metric} against sigma_rel")]
    if report.end_curve():
        charts.append(_render_chart(plots.end_figure, values, f"{report.metric} against the end"))
    if report.share_curve():
        title = f"{report.metric} against the share of the base"
        charts.append(_render_chart(plots.share_figure, values, title))
    return "\n".join(charts)


def _render_chart(
    draw: Callable[[dict[str, Any], float], Figure], values: dict[str, Any], title: str
) -> str:
    sources = []
    for width in (_WIDE, _NARROW):
        # without a background, so that it has the one of the page, whether light or dark
        picture = plots.as_file(partial(draw, values, width), ".svg", transparent=True)
        sources.append(_data_url("image/svg+xml", picture))
    wide, narrow = sources
    return (
        f'<picture><source media="(max-width: 40rem)" srcset="{narrow}">'
        f'<img class="chart" src="{wide}" alt="{escape(title)}"></picture>'
    )


def _render_take(report: SweepReport) -> str:
    """Name the file of the best average, and the command that makes it, if it is one of ours."""
    if report.minimize is None:
        return ""
    place = ""
    if report.outputs:
        place = f"<p>The best average is in <code>{escape(str(report.outputs[0]))}</code>.</p>"
    command = ""
    if report.best is not None:
        command = f"<pre>{escape(_make_command(report, report.best_trial))}</pre>"
    heading = '<section class="take"><h2>Take it</h2>'
    return f"{heading}\n{place}\n{command}\n</section>"


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- samples


class _Gallery:
    """The images of each trial: first what averages are compared with, then the averages by length.
    Of many large images the first of each trial are shown."""

    def __init__(self, report: SweepReport, folder: Path) -> None:
        self._report = report
        self._paths: dict[Trial, list[Path]] = {}
        for trial in _sort_trials(report):
            paths = images.list_images(folder / images.FOLDER / trial.name)
            if paths and trial.seed == 0:
                self._paths[trial] = paths
        self._folder = folder
        total = sum(path.stat().st_size for paths in self._paths.values() for path in paths)
        self._share = min(1, _MOST_IMAGES / max(total, 1))
        most = max(map(len, self._paths.values()), default=1)
        # three trials side by side also on a telephone, if each has a single image
        self.column = "6.5rem" if most == 1 else "17rem"
        self.images_a_row = _images_a_row(most)

    def render(self) -> str:
        if not self._paths:
            return ""
        report = self._report
        lengths = [trial for trial in self._paths if trial.sigma_rel is not None]
        first = len(lengths) // 2
        for index, trial in enumerate(lengths):
            if report.minimize is not None and report.is_best(trial):
                first = index
        slider = f'type="range" min="0" max="{len(lengths) - 1}" step="1" value="{first}"'
        figures = "\n".join(map(self._render_trial, self._paths))
        return (
            f'<p class="controls" hidden><label><span>length</span> <input {slider}>'
            "<output></output></label>"
            '<label><input type="checkbox"> all lengths</label></p>\n'
            f'<div class="samples">{figures}</div>'
        )

    def _render_trial(self, trial: Trial) -> str:
        report = self._report
        title = report.title(trial)
        caption = f"<b>{escape(title)}</b>"
        if trial.value is not None:
            caption += escape(f", {report.metric} {trial.value:.6g}")
        if report.minimize is not None and report.is_best(trial):
            caption += " <strong>(best)</strong>"
        paths = self._paths[trial]
        count = math.ceil(len(paths) * self._share)
        if count < len(paths):
            caption += f"; {len(paths) - count} more are in {escape(str(self._folder))}"
        pictures = []
        for path in paths[:count]:
            name = escape(path.name)
            pictures.append(f'<img src="{_read_image(path)}" alt="{name}" title="{name}">')
        kind = ""
        command = ""
        if trial.sigma_rel is not None:
            kind = f' class="length" data-name="{escape(title)}"'
            command = f"<pre>{escape(_make_command(report, trial))}</pre>"
        return (
            f"<figure{kind}><figcaption>{caption}</figcaption>"
            f'<div class="images">{"".join(pictures)}</div>{command}</figure>'
        )


def _images_a_row(count: int) -> int:
    """Choose how many images of a trial fill rows of a square best."""
    side = math.ceil(math.sqrt(count))
    for columns in range(side, 2 * side):
        if count % columns == 0:
            return columns
    return side


def _read_image(path: Path) -> str:
    content = read_small_file(path, images.MOST_BYTES)
    kind = images.image_type(content)
    if kind is None:
        raise FileFormatError(path, "is not a PNG, JPEG, WebP or GIF image")
    return _data_url(kind, content)


def _sort_trials(report: SweepReport) -> list[Trial]:
    """Sort trials: first what averages are compared with, the last weights before all; then the
    others by length, and those that end earlier after the others, by their end."""
    return sorted(
        report.trials,
        key=lambda trial: (
            trial.sigma_rel or 0.0,
            -(trial.t or math.inf),
            trial.base_share,
            trial.target,
            trial.seed,
        ),
    )


# --- the table, and the end of the page


def _render_trials(report: SweepReport, folder: Path) -> str:
    """Render the table of all trials, without columns that have no value."""
    trials = _sort_trials(report)
    is_repeated = any(trial.seed for trial in trials)
    columns = [
        ("target", [report.title(trial) for trial in trials]),
        ("seed", [str(trial.seed) if is_repeated else "" for trial in trials]),
        (report.metric, [_number(trial.value) for trial in trials]),
        ("standard error", [_number(trial.standard_error) for trial in trials]),
        ("predicted error", [_as_percent(trial.predicted_error) for trial in trials]),
        ("lost gain, at most", [_as_percent(trial.lost_gain) for trial in trials]),
        ("seconds", [f"{trial.seconds:.1f}" for trial in trials]),
    ]
    filled = [(escape(name), cells) for name, cells in columns if any(cells)]
    heads = "".join(f"<th>{name}</th>" for name, _ in filled)
    logs = [_render_log(trial, folder) for trial in trials]
    if any(logs):
        heads += '<th class="text">log</th>'
    rows = []
    for index, trial in enumerate(trials):
        cells = [f'<td data-name="{name}">{escape(texts[index])}</td>' for name, texts in filled]
        if any(logs):
            cells.append(f'<td class="text" data-name="log">{logs[index]}</td>')
        is_best = report.minimize is not None and report.is_best(trial)
        kind = ' class="best"' if is_best else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    lines = "\n".join(rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>\n{lines}\n</tbody></table>"


def _render_log(trial: Trial, folder: Path) -> str:
    """Say why a trial has failed, with links to its logs, if there are any."""
    text = escape(trial.error or "")
    if (folder / LOGS / f"{trial.name}.out").exists():
        path = urllib.parse.quote(f"{LOGS}/{trial.name}")
        text += f' <a href="{path}.out">output</a> <a href="{path}.err">errors</a>'
    return text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _as_percent(error: float | None) -> str:
    return "" if error is None else percent(error)


def _make_command(report: SweepReport, trial: Trial) -> str:
    """Write the command that makes the average of a trial."""
    name = f"sigma_rel-{trial.sigma_rel:.12g}"
    words = ["ema", "synthesize", str(report.directory), "--sigma-rel", f"{trial.sigma_rel:.12g}"]
    t = report.t if trial.t is None else trial.t
    if t != report.newest_t:
        words += ["--t", f"{t:.12g}"]
    if trial.t is not None:
        name += f"-t-{t:.12g}"
    if trial.base_share:
        name += f"-base-{trial.base_share:g}"
        words += ["--base", report.settings["base"], "--base-share", f"{trial.base_share:g}"]
    ending = ".safetensors"
    if like := report.settings["like"]:
        words += ["--like", like]
        ending = Path(like).suffix if Path(like).is_file() else ""
    return shlex.join([*words, "--out", f"{name}{ending}"])


def _list_versions() -> str:
    versions = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        versions.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(versions)
