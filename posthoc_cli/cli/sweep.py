"""`ema sweep`: find the best length by your own metric, or by eye."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli import files
from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError, check_alone
from posthoc_cli.targets import RANGES

if TYPE_CHECKING:
    from posthoc_cli.sweep.search import Trial


def sweep(
    directory: str = options.DIRECTORY_OR_CHECKPOINTS,
    sigma_rel: str | None = options.TARGETS(
        None,
        show_default="all exact within 1 %",
        help="A range to search, 0.02:0.28, or a list to measure.",
    ),
    target: str | None = options.TARGETS(
        None,
        metavar="KIND:VALUE",
        help=f"Or of another kind: {RANGES}",
    ),
    command: str = options.HOW(
        ...,
        "--run",
        metavar="COMMAND",
        help=(
            "The evaluation, without a shell. {weights} becomes an average's file; also "
            "{sigma_rel}, {seed}, {dir}."
        ),
    ),
    metric: str | None = options.HOW(
        None,
        metavar="KEY",
        show_default="the last line that is a number",
        help=(
            "The word before it, as loss in loss: 2.67, or its key in a JSON object; or "
            "r.json:acc: acc of the newest r.json in {dir}."
        ),
    ),
    minimize: bool = options.HOW(False, "--minimize", help="Lower is better."),
    maximize: bool = options.HOW(False, "--maximize", help="Higher is better."),
    look: bool = options.HOW(
        False, "--look", help="No metric: only show the images of some lengths, side by side."
    ),
    repeats: int = options.HOW(
        1, metavar="COUNT", help="Trials of each length, with the seeds 0, 1, ..."
    ),
    budget: int = options.HOW(20, metavar="COUNT", help="The most lengths to measure."),
    out: str = options.OUTPUT(
        "sweep",
        "--out",
        "-o",
        help="Folder for trials, logs and the best average: new, or of an earlier sweep.",
    ),
    like: str | None = options.LIKE_MODEL,
    as_json: bool = options.JSON,
    images: str | None = options.OUTPUT(
        None,
        metavar="GLOB",
        show_default="png, jpg, webp, gif",
        help="The images in {dir} to keep, the newest 16 of each trial; or none.",
    ),
    t: float | None = options.TIME,
    raw: str | None = options.RUN(
        None, metavar="CHECKPOINT", help="The raw weights, to measure them too: last.pt."
    ),
) -> None:
    """Find the best length by your own metric, or by eye.

    Runs the command for averages of several lengths, one after another, and measures more lengths
    where the best may be, until it is known within the noise of the metric. It also prints the
    range that is equal within the noise.

    Images that the command writes to {dir} are kept, and a page shows them with a slider over the
    length. --look makes this page without a metric.

    A standard error next to the metric (acc_stderr) is used as its noise. A failed trial does not
    count; two in a row that fail alike end the sweep. The same call continues an earlier one. OUT
    receives trials.jsonl, sweep.json, logs, images, their page and the best average.
    """
    from posthoc_cli.report.page import render
    from posthoc_cli.sweep import Axis, Sweep
    from posthoc_cli.sweep.trials import Metric

    check_alone(minimize=minimize, maximize=maximize, look=look)
    if not (minimize or maximize or look):
        reason = "say whether lower or higher is better"
        hint = "add --minimize or --maximize; or --look, to compare images without a metric"
        raise InvalidValueError("--minimize", reason, hint)
    check_alone(look=look, metric=metric)
    check_alone(sigma_rel=sigma_rel, target=target)
    widths = options.optional(Axis.parse, sigma_rel, "--sigma-rel", "sigma_rel")
    axis = options.optional(Axis.parse, target, "--target") or widths
    folder = files.local_path("--out", out)
    run = options.open_run(directory)
    show = output.print_note if as_json else output.print_line

    def say(trial: Trial, number: int, expected: int) -> None:
        if trial.error is not None:
            _warn_of_failure(trial, folder)
        left = _time_left(trial.seconds * (expected - number))
        show(f"trial {number} of about {expected}: {_result(trial)}{left}")

    report = Sweep(
        run,
        command,
        Metric() if metric is None else Metric.parse(metric),
        folder,
        axis=axis,
        minimize=None if look else minimize,
        repeats=repeats,
        budget=budget,
        t=t,
        like=options.optional(options.existing, like),
        raw=options.optional(options.existing, raw),
        images=images,
        again=shlex.join(["ema", *sys.argv[1:]]),
        say=say,
        progress=output.progress_bar("trials"),
    ).run_all()
    if (folder / "images").is_dir():
        page = folder / "report.html"
        content = render(run, [folder], page)
        files.write_atomically(page, content.encode(), overwrite=True)
        report = replace(report, outputs=(*report.outputs, page))
    output.show(report.to_dict(), as_json, _print_sweep)


def _warn_of_failure(trial: Trial, out: Path) -> None:
    log = out / "logs" / f"{trial.name}.*"
    reason = f"{trial.target}, seed {trial.seed}: {trial.error}"
    output.print_note(f"ema: warning: {reason}; see {log}")


def _result(trial: Trial) -> str:
    title = f"{trial.target}, seed {trial.seed}"
    if trial.error is not None:
        return f"{title} failed"
    if trial.value is not None:
        title += f": {trial.value:.6g}"
    if trial.standard_error is not None:
        title += f" ± {trial.standard_error:.2g}"
    return f"{title} ({trial.seconds:.1f} s)"


def _time_left(seconds: float) -> str:
    if seconds < 1:
        return ""
    if seconds >= 120:
        return f", about {seconds / 60:.0f} min left"
    return f", about {seconds:.0f} s left"


def _print_sweep(report: dict[str, Any]) -> None:
    from posthoc_cli.sweep.search import answer

    texts = answer(report)
    pairs = [
        ("measured", texts["measured"]),
        ("wrote", ", ".join(report["outputs"])),
    ]
    if "best" in texts:
        if texts["raw"] == "not measured":
            texts["raw"] += ": the run lacks them; name their file by --raw"
        pairs = [
            ("best", texts["best"]),
            (texts["metric"], texts["value"]),
            ("raw weights", texts["raw"]),
            ("gain", texts["gain"]),
            ("estimate", texts["estimate"]),
            ("equal within the noise", texts["equal"]),
            *pairs,
        ]
    output.print_line()
    output.print_pairs([(name, text) for name, text in pairs if text])
