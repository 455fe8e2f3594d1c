"""`ema sweep`: the best length of an average by the user's own metric."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli import files
from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError, check_alone

if TYPE_CHECKING:
    from posthoc_cli.sweep.search import Trial

EPILOG = "Example:  ema sweep run/ema --run 'python eval.py {weights}' --metric loss --minimize --out sweep"


def sweep(
    directory: str | None = options.DIRECTORY_OR_CHECKPOINTS,
    sigma_rel: str | None = options.TARGETS(
        None,
        show_default="all that are exact within 1 %",
        help="A range to search, 0.02:0.28, or a list to measure.",
    ),
    target: str | None = options.TARGETS(
        None,
        metavar="KIND:VALUE",
        help="A range of another kind of average: beta:0.99:0.9999, half-life:500:9000, window:1000:50000, last:2:20, "
        "decay:linear:5%:50% or a list.",
    ),
    command: str = options.HOW(
        ...,
        "--run",
        metavar="COMMAND",
        help="The evaluation, run without a shell. {weights} becomes the file of an average; also {sigma_rel}, {seed}, "
        "{dir} (a folder that is removed afterwards).",
    ),
    metric: str | None = options.HOW(
        None,
        metavar="KEY",
        show_default="the last line that is a number",
        help="Where the metric is: loss means this key of the last JSON object on standard output, r.json:acc the key "
        "acc of the newest r.json in {dir}.",
    ),
    minimize: bool | None = options.HOW(None, "--minimize/--maximize", help="Whether lower or higher is better."),
    repeats: int = options.HOW(1, metavar="COUNT", help="Trials of each length, with the seeds 0, 1, ..."),
    budget: int = options.HOW(20, metavar="COUNT", help="The most lengths to measure."),
    out: Path = options.OUTPUT(
        "sweep", "--out", "-o", help="Folder for trials, logs and the best average: new, or of an earlier sweep."
    ),
    like: Path | None = options.LIKE_MODEL,
    component: str | None = options.COMPONENT,
    as_json: bool = options.JSON,
    checkpoints: str | None = options.CHECKPOINTS,
    t: float | None = options.TIME,
) -> None:
    """Find the best length by your own metric.

    Runs the command for averages of several lengths, one after another, and measures more lengths where the best may
    be, until it is known within the noise of the metric. It also prints the range that is equal within the noise.

    A standard error next to the metric (acc_stderr) is used as its noise. A failed trial is reported and does not
    count. The same call continues an earlier one. OUT receives trials.jsonl, sweep.json, logs and the best average.
    """
    from posthoc_cli.sweep import Axis, Sweep
    from posthoc_cli.sweep.trials import Metric

    if minimize is None:
        raise InvalidValueError("--minimize", "say whether lower or higher is better", "add --minimize or --maximize")
    check_alone(sigma_rel=sigma_rel, target=target)
    widths = options.optional(Axis.parse, sigma_rel, "--sigma-rel", "sigma_rel")
    axis = options.optional(Axis.parse, target, "--target") or widths
    out = files.expanded(files.local_path("--out", out))
    run = options.open_run(directory, checkpoints)
    output.warn_of_statistics(run.sources[-1].info.copies)
    say = functools.partial(_print_trial, out, output.print_note if as_json else output.print_line)
    report = Sweep(
        run, command, Metric() if metric is None else Metric.parse(metric), out,
        axis=axis, minimize=minimize, repeats=repeats, budget=budget, t=t,
        like=None if like is None else files.expanded(like), component=component,
        again=shlex.join(["ema", *sys.argv[1:]]), say=say, progress=output.progress_bar("trials"),
    ).run_all()  # fmt: skip
    output.show(report.to_dict(), as_json, _print)


def _print_trial(out: Path, print_line: Callable[[str], None], trial: Trial) -> None:
    """Print the metric of a trial, or on stderr why it failed."""
    title = f"{trial.target}, seed {trial.seed}"
    if trial.value is None:
        output.print_note(f"ema: warning: {title}: {trial.error}; see {out / trial.log}.err")
    else:
        error = "" if trial.standard_error is None else f" ± {trial.standard_error:.2g}"
        print_line(f"{title}: {trial.value:.6g}{error} ({trial.seconds:.1f} s)")


def _print(found: dict[str, Any]) -> None:
    from posthoc_cli.sweep.results import answer

    texts = answer(found)
    output.print_line()
    output.print_pairs([
        ("best", texts["best"]),
        (f"estimate of {texts['metric']}", texts["estimate"]),
        ("equal within the noise", texts["equal"]),
        ("raw weights", texts["raw"] + ": the run lacks them" * (found["raw"] is None)),
        ("measured", texts["measured"]),
        ("wrote", ", ".join(found["outputs"])),
    ])  # fmt: skip
