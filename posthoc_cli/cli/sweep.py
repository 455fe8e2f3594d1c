"""`ema sweep`: find the best length by your own metric, or by eye."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli import files
from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError, Log, at_most_one
from posthoc_cli.request import SweepRequest
from posthoc_cli.targets import Beta, parse_values

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.ask import QuestionError
    from posthoc_cli.run import Run
    from posthoc_cli.sweep import SweepReport
    from posthoc_cli.sweep.trial import Trial

log = Log(__name__)


def _refuse_run(value: str | None) -> None:
    if value is not None:
        raise InvalidValueError("--run", "is called --eval")


@options.with_request(SweepRequest)
def sweep(
    directory: str = options.DIRECTORY_OR_CHECKPOINTS,
    sigma_rel: str | None = options.TARGETS(
        None,
        metavar="LENGTHS",
        show_default="all whose error costs below 5 % of averaging's benefit",
        help="A range to search, 0.02:0.28, or a list to measure.",
    ),
    decay: str | None = options.TARGETS(
        None,
        metavar="DECAYS",
        help="The same range or list by the decays of EMAs: 0.99:0.9999.",
    ),
    old_name: str | None = options.HOW(  # noqa: ARG001
        None,
        "--run",
        hidden=True,
        is_eager=True,
        callback=_refuse_run,
        expose_value=False,
        help="The former name of --eval.",
    ),
    *,
    request: dict[str, Any],
    out: str = options.OUTPUT(
        "sweep",
        "--out",
        "-o",
        metavar="FOLDER",
        help="Folder for trials, logs and the best average: new, or of an earlier sweep.",
    ),
    as_json: bool = options.JSON,
) -> None:
    """Find the best length by your own metric, or by eye.

    First measures your own EMA and the last weights, if they are there. Then runs the command for
    averages of six lengths, of twelve where the metric is noisy, and where the best may lie between
    them. If the best length is 0.1 or longer, the training may have gone on for too long: averages
    that end at a half, a quarter, ... of it are measured, too. --base names the weights that a
    fine-tuning started from: shares of them are mixed in. Where the metric is noisy, the best
    averages are measured afresh, and the gain is of these measurements alone.

    Images that the command writes to {dir} are kept, and the page shows them side by side. --look
    makes this page without a metric.

    Print the standard error next to the metric (acc_stderr) if you know it: it bounds the noise of
    the metric and of the gain. A failed trial does not count; two in a row that fail alike end the
    sweep. The same command continues an earlier one. OUT receives trials.jsonl, sweep.json, logs,
    images, report.html and the best average.
    """
    from posthoc_cli.checkpoints.ask import QuestionError
    from posthoc_cli.report.page import write_page
    from posthoc_cli.sweep import Lengths, Sweep

    at_most_one(sigma_rel=sigma_rel, decay=decay)
    folder = files.local_path("--out", out)
    asked = SweepRequest(**request, out=folder)
    lengths = options.optional(Lengths.parse, sigma_rel, "--sigma-rel")
    run = options.open_run(directory)
    if decay is not None:
        steps = _count_steps(run, decay, asked.t, asked.step)
        lengths = Lengths.parse(decay, "--decay", steps)
    if lengths is not None:
        ends = None if lengths.listed else (lengths.low, lengths.high)
        asked = replace(asked, sigma_rels=lengths.listed or None, sigma_range=ends)
    listing = _Listing(folder, output.print_note if as_json else output.print_line)
    search = Sweep(
        run.sources,
        asked,
        rerun_command=shlex.join(["ema", *sys.argv[1:]]),
        on_trial=listing.add,
        progress=output.progress_bar("trials"),
    )
    try:
        report = search.run()
    except KeyboardInterrupt:
        output.print_note("the same command continues")
        raise
    except QuestionError as question:  # about --like or --raw, which name a file alone
        hint = f"make a file of one set, and name it; paste: {_export_line(question)}"
        raise InvalidValueError(question.subject, question.reason, hint) from None
    report = write_page(report, folder)
    if as_json:
        output.print_json(report.to_dict() | {"warnings": output.warnings})
    else:
        _print_sweep(report)


def _export_line(question: QuestionError) -> str:
    """Write the export of the likeliest set of a file."""
    words = ["ema", "export", question.subject]
    for name, value in question.answers[0].items():
        words.append(f"--{name}")
        if value is not True:
            words.append(value)
    return shlex.join([*words, "--out", "one-set.pt"])


def _count_steps(run: Run, decays: str, t: float | None, step: int | None) -> float:
    """Count the steps up to a time; raise an InvalidValueError about decays if steps and times are
    not in one ratio."""
    first = re.split("[,:]", decays)[0]
    plan = run.plan(parse_values(first, "--decay", Beta), t=t, step=step)
    assert plan.steps is not None  # else it is refused
    return plan.steps


class _Listing:
    """The lines of trials, with the time that is left."""

    def __init__(self, folder: Path, show: Callable[[str], None]) -> None:
        self._folder = folder
        self._show = show
        self._began = time.monotonic()
        self._measured = 0

    def add(self, trial: Trial, title: str, number: int, expected: int) -> None:
        """Print a trial that has ended, the `number`-th of about `expected`."""
        self._measured += 1
        if trial.error is not None and not trial.is_random:
            logs = self._folder / "logs" / f"{trial.name}.*"
            log.warning("%s, seed %d: %s; see %s", trial.target, trial.seed, trial.error, logs)
        # a trial takes longer than its evaluation: its average is made first
        each = (time.monotonic() - self._began) / self._measured
        left = _time_left(each * (expected - number))
        self._show(f"trial {number} of about {expected}: {_result(trial, title)}{left}")


def _result(trial: Trial, title: str) -> str:
    if trial.seed:
        title += f", seed {trial.seed}"
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


def _print_sweep(report: SweepReport) -> None:
    from posthoc_cli.sweep.report import summarize

    pairs = summarize(report)
    if report.minimize is not None and not report.compared:
        pairs.insert(
            0, ("last weights", "not measured: name a checkpoint that holds them with --raw")
        )
    pairs.append(("wrote", ", ".join(map(str, report.outputs))))
    output.print_line()
    output.print_pairs(pairs)
