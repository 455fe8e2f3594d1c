"""`ema audit`: find which decay an average really has."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from typer import Argument

from posthoc_cli.cli import options, output
from posthoc_cli.targets import SHORTEST_BETA, Beta, SigmaRel, name_equal_length

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.audit import Audit


def audit(
    directory: str = Argument(
        ..., metavar="DIR", help="Checkpoints with an average and the weights."
    ),
    claimed: float | None = options.RUN(
        None,
        metavar="DECAY",
        show_default="from the files or the import",
        help="The decay that it should have.",
    ),
    step_from: str | None = options.STEP_FROM,
    steps_per_epoch: str | None = options.STEPS_PER_EPOCH,
    first_epoch: str | None = options.FIRST_EPOCH,
    out: str | None = options.PICTURE,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
) -> int:
    """Find which decay an average really has.

    Compares averages with the weights in the same checkpoints, from one to the next, on a sample of
    100,000 elements. Shows the decay of each interval, and what is wrong: an average that is too
    long or too short, as if updated once a microbatch, does not move, began again at a resume, or
    is in the place of the weights in some files.

    Exit code 1 if an average is not what it claims to be.
    """
    picture = options.new_picture(out, overwrite)
    audits = options.open_path(directory).audit(
        claimed,
        step_from=step_from,
        steps_per_epoch=options.optional_count(steps_per_epoch, "--steps-per-epoch"),
        first_epoch=options.optional_count(first_epoch, "--first-epoch"),
    )
    report = {"audits": [audit.to_dict() | {"as": _other_name(audit)} for audit in audits]}
    if picture is not None and not audits[0].intervals:
        output.print_note(f"note: {picture} was not written: there are no intervals to draw")
        picture = None
    if picture is not None:
        from posthoc_cli import plots

        output.write_picture(lambda: plots.audit_figure(report["audits"][0]), picture, overwrite)
    output.show(report, as_json, _print_audits, picture)
    return int(any(audit.is_bad for audit in audits))


def _print_audits(report: dict[str, Any]) -> None:
    audits = report["audits"]
    for audit in audits:
        _print_answer(audit)
    for audit in audits:
        if audit["intervals"]:
            output.print_line()
            _print_intervals(audit)


def _print_answer(audit: dict[str, Any]) -> None:
    name = audit["name"]
    text = audit["text"]
    if not text.startswith(audit["verdict"]) and not text.endswith(audit["verdict"]):
        text = f"{audit['verdict']}: {text}"
    output.print_line(f"{name}: {text}" if name else text)
    if audit["as"] is not None:
        last = audit["intervals"][-1]["end"]
        output.print_line(f"as {audit['as']} after the last checkpoint, {last:,.12g}")


def _print_intervals(audit: dict[str, Any]) -> None:
    intervals = audit["intervals"]
    title = "sigma_rel"
    if audit["what"] == "decay":
        title = f"time constant in {audit['unit']}"
    if audit["name"]:
        title += f" of {audit['name']}"
    chosen = _choose_intervals(intervals)
    title += " by interval"
    if len(chosen) < len(intervals):
        title += f": the {len(chosen)} most unusual of {len(intervals):,}; all by --json"
    output.print_line(title)
    claim = [] if audit["claimed"] is None else ["claimed", "ratio"]
    output.print_rows(list(map(_audit_row, chosen)), ["from:begin", "to:end", "found", *claim])


_MOST_ROWS = 10


def _choose_intervals(intervals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose the intervals with the most unusual lengths, in their order."""
    lengths = [interval["found"] for interval in intervals if interval["found"]]
    usual = statistics.median(lengths) if lengths else 0.0

    def measure_oddity(interval: dict[str, Any]) -> float:
        expected = interval["claimed"] or usual
        found = interval["found"]
        return abs(math.log(found / expected)) if found and expected else 0.0

    chosen = sorted(intervals, key=measure_oddity, reverse=True)[:_MOST_ROWS]
    return sorted(chosen, key=lambda interval: float(interval["begin"]))


def _other_name(audit: Audit) -> str | None:
    """Name the sigma_rel that is as long as the decay that was found, after the last checkpoint, or
    the decay that is as long as a sigma_rel."""
    if audit.found is None or audit.length is None or not audit.intervals:
        return None
    last = audit.intervals[-1].end
    if audit.what == "sigma_rel":
        return name_equal_length(SigmaRel(audit.found), last)
    decay = 1 - 1 / audit.length
    return name_equal_length(Beta(decay), last) if decay >= SHORTEST_BETA else None


def _audit_row(interval: dict[str, Any]) -> dict[str, Any]:
    """Make the row of one interval, with rounded lengths and their ratio."""
    length = interval["found"]
    claimed = interval["claimed"]
    row = {key: "-" if value is None else value for key, value in interval.items()}
    row["found"] = "-" if length is None else f"{length:,.4g}"
    row["claimed"] = "" if claimed is None else f"{claimed:,.4g}"
    if length is not None and claimed is not None:
        row["ratio"] = f"{length / claimed:.3g}"
    return row
