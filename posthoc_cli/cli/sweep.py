"""`ema sweep`: the best length by the user's own metric."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typer import Option

from posthoc_cli import files
from posthoc_cli.cli import output, values
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import SHAPES

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.opening import Origin
    from posthoc_cli.sweep import Axis, SweepReport
    from posthoc_cli.sweep.records import Record

EPILOG = "Example:  ema sweep run/ema --run 'python eval.py {weights}' --metric loss --minimize --out sweep"


@values.with_origin
def sweep(
    directory: Path | None = values.DIRECTORY_OR_CHECKPOINTS,
    checkpoints: str | None = values.CHECKPOINTS,
    run: str = Option(
        ...,
        "--run",
        metavar="COMMAND",
        help="The evaluation, run without a shell. {weights} becomes the file of an average; {sigma_rel}, {seed}, and "
        "{dir}, a folder that is removed afterwards, are filled in too.",
    ),
    metric: str | None = Option(
        None,
        metavar="NAME",
        help="Of the metric in a JSON line of standard output; a line that is a number needs none.",
    ),
    json_path: str | None = Option(
        None, "--json", metavar="PATH", help="Path of the metric in the newest JSON file in {dir}: results.acc."
    ),
    csv_column: str | None = Option(
        None,
        "--csv",
        metavar="COLUMN",
        help="Column of the metric in the newest CSV file in {dir}; its last row counts.",
    ),
    minimize: bool | None = Option(None, "--minimize/--maximize", help="Whether lower or higher is better."),
    sigma_rel: str | None = Option(
        None, help="A range to search, 0.02:0.28, or a list to measure. [default: what is exact within 1 %]"
    ),
    beta: str | None = Option(None, help="Search classical averages instead: 0.99:0.9999, or a list."),
    window: str | None = Option(None, help="Search means of the last steps instead: 1000:50000, or a list."),
    decay: str | None = Option(
        None,
        metavar="1-sqrt|linear|cosine",
        autocompletion=values.one_of(*SHAPES),
        help="Search decays of the learning rate that were not run instead, by their part of training (--over).",
    ),
    over: str = Option("5%:50%", help="For --decay: the parts of training, a range or a list."),
    out: Path = Option("sweep", "--out", "-o", help="Folder for trials, logs and the best average."),
    repeats: int = Option(1, metavar="COUNT", help="Trials of each length, with the seeds 0, 1, ..."),
    budget: int = Option(20, metavar="COUNT", help="Lengths to measure at most."),
    jobs: int | None = Option(None, metavar="COUNT", help="Trials at a time. [default: one a device]"),
    devices: str | None = Option(None, help="CUDA_VISIBLE_DEVICES of the trials, in turn: 0,1."),
    timeout: float | None = Option(None, metavar="SECONDS", help="A trial that takes longer is ended, and has failed."),
    disk: str | None = Option(None, metavar="SIZE", help="Bound of the averages on the disk: 50GB. [default: a round]"),
    raw: Path | None = Option(None, metavar="FILE", help="Raw weights, measured for comparison."),
    groups: str | None = Option(
        None,
        metavar="GLOBS",
        help="Then search the lengths of groups of tensors, one after another: 'encoder.*,decoder.*'.",
    ),
    t: float | None = Option(None, help="The averages as they stood at this training time. [default: the last]"),
    step: str | None = Option(None, metavar="COUNT", help="The same in steps."),
    dtype: str = values.DTYPE,
    layout: str | None = values.LAYOUT,
    method: str | None = values.METHOD,
    quiet: bool = values.QUIET,
    *,
    origin: Origin,
) -> None:
    """Find the best length by your own metric.

    Makes averages of several lengths in one pass, runs the command for each, and goes on where the best may be, until
    it is known within the noise of the metric. The lengths in the range that it states are equal within the noise.

    A standard error beside the metric (acc_stderr) counts as its noise. A failed trial is reported and does not count.
    The same call goes on where an earlier one has stopped. All is in OUT: trials.jsonl, sweep.json, logs, best.
    """
    from posthoc_cli.sweep import Sweep
    from posthoc_cli.sweep.metrics import Metric

    output.log_to_stderr(False)
    if minimize is None:
        raise InvalidValueError("--minimize", "say whether lower or higher is better", "add --minimize or --maximize")
    if json_path is not None and csv_column is not None:
        raise InvalidValueError("--json and --csv", "give one of them")
    names = tuple(name.strip() for name in (devices or "").split(",") if name.strip())
    report = Sweep(
        values.open_run(directory, checkpoints, origin), run, Metric(metric, json_path, csv_column),
        files.expanded(out), _axis(sigma_rel, beta, window, decay, over), minimize, repeats, budget,
        (len(names) or 1) if jobs is None else jobs, names, timeout,
        values.optional(files.parse_bytes, disk, "--disk"), None if raw is None else files.expanded(raw),
        tuple(glob.strip() for glob in (groups or "").split(",") if glob.strip()), t,
        values.optional(values.parse_count, step, "--step"), method, dtype, layout, output.progress_bar(quiet),
        (lambda _: None) if quiet else _print_trial,
    ).run_all()  # fmt: skip
    if not quiet:
        _print(report)


def _axis(sigma_rel: str | None, beta: str | None, window: str | None, decay: str | None, over: str) -> Axis | None:
    from posthoc_cli.sweep import Axis

    if decay is not None and decay not in SHAPES:
        raise values.bad("--decay", decay, f"must be one of {', '.join(SHAPES)}")
    kinds = {
        "--sigma-rel": ("sigma_rel", sigma_rel), "--beta": ("beta", beta), "--window": ("window", window),
        "--decay": (f"decay {decay} over", None if decay is None else over),
    }  # fmt: skip
    given = [(option, kind, text) for option, (kind, text) in kinds.items() if text]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidValueError(f"{given[0][0]} and {given[1][0]}", "give one of them")
    option, kind, text = given[0]
    option = "--over" if option == "--decay" else option
    parts = text.replace("%", "e-2")
    ends = parts.split(":")
    if len(ends) != 2:
        return Axis.of_values(kind, values.parse_numbers(parts, option))
    try:
        low, high = map(float, ends)
    except ValueError:
        raise values.bad(option, text, "a range is LOW:HIGH, such as 0.02:0.28") from None
    return Axis(kind, low, high)


def _print_trial(trial: Record) -> None:
    what = f"{trial.target}, seed {trial.seed}"
    if trial.value is None:
        output.print_note(f"ema: warning: {what}: {trial.error}; see {trial.log}.err")
    else:
        error = "" if trial.standard_error is None else f" ± {trial.standard_error:.2g}"
        output.print_line(f"{what}: {trial.value:.6g}{error} ({trial.seconds:.1f} s)")


def _print(report: SweepReport) -> None:
    found = report.found
    low, best, high = (f"{report.value_of(x):g}" for x in (found.low, found.best, found.high))
    measured = len({trial.x for trial in report.trials if trial.value is not None})
    output.print_line()
    rows = [
        ("best", f"{report.axis.kind} {best}: {report.metric} {found.mean:.6g} ± {found.standard_error:.2g}"),
        ("equal within the noise", f"{low} to {high}"),
    ]
    for group in report.groups:
        known = f"{group.low:g} to {group.high:g} are equal within the noise"
        gain = "" if group.gains else ", no gain beyond the noise"
        rows.append((f"group {group.glob}", f"sigma_rel {group.sigma_rel:g}{gain}; {known}"))
    if report.raw is not None:
        rows.append(("raw weights", f"{report.raw:.6g}"))
    trials = output.counted(len(report.trials), "trial")
    failed = f", {len(report.failed)} of which failed" if report.failed else ""
    rows.append(("measured", f"{output.counted(measured, 'length')} in {trials}{failed}; {report.stopped}"))
    rows.append(("wrote", ", ".join(map(str, report.outputs))))
    output.print_pairs(rows)
