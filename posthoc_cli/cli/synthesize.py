"""`ema synthesize`: make the average of any length from snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posthoc_cli import resources
from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError, at_most, count_noun, percent
from posthoc_cli.report.facts import make_title
from posthoc_cli.request import OutputRequest


@options.with_request(OutputRequest)
def synthesize(
    directory: str = options.DIRECTORY_OR_CHECKPOINTS,
    sigma_rel: list[str] = options.SIGMA_REL,
    decay: list[str] = options.DECAY,
    target: list[str] = options.TARGET,
    out: str | None = options.OUTPUT(
        None, "--out", "-o", metavar="PATH", help="A file; or a folder, for a file per target."
    ),
    as_json: bool = options.JSON,
    *,
    request: dict[str, Any],
) -> None:
    """Make the average of any length from snapshots.

    Name one or more targets by --sigma-rel, --decay and --target. The snapshots are read once for
    all targets, each block is verified, and an output appears complete or not at all.

    The predicted error is the expected relative L2 distance of the weights from the true average.
    The lost gain is an upper estimate of how much of averaging's benefit this error costs: 5 %
    keeps at least 95 % of it.
    --method paper also shows the profile error: the distance between the target profile and the
    reconstructed one; --json shows it for both methods.

    DIR may also contain checkpoints, or averages of other libraries: see ema guide checkpoints.

    For one large model on many machines: torchrun -m posthoc_cli synthesize ... makes a folder of
    shards; each process writes some of them. If a job was killed, run it again.
    """
    from posthoc_cli.export.torchrun import is_rank

    targets = options.parse_targets(sigma_rel, decay, target)
    run = options.open_run(directory)
    if not targets:
        raise InvalidValueError("no target", _NO_TARGET)
    report = run.write(
        targets, out, distributed=is_rank(), progress=output.progress_bar(), **request
    )
    if report is not None:
        output.show(report.to_dict(), as_json, _print_synthesize)


_NO_TARGET = (
    "name at least one with --sigma-rel 0.15, --decay 0.9999 or --target window:1000 (`ema guide "
    "synthesis` lists the kinds)"
)


def _print_synthesize(report: dict[str, Any]) -> None:
    targets = report["targets"]
    first = targets[0]
    errors = ["predicted_error", "lost_gain"]
    if first["method"] == "paper":
        errors.append("profile_error")
    _print_origin(report)
    if len(targets) > 1:
        rows = []
        for target in targets:
            path = Path(target["output"] or "-")  # all in one folder
            rows.append(target | {"file": path.name})
        titles = ["predicted_error", "lost gain at most:lost_gain", *errors[2:]]
        output.print_rows(rows, ["target", *titles, "output:file"])
        output.print_line()
    elif not first["output"]:
        output.print_coefficients(first["snapshots"])
        output.print_line()
    text = _summary(report, errors)
    if first["output"] is None:
        read = resources.format_bytes(report["read_bytes"])
        output.print_line(f"would make {text}; would read {read}; nothing was written")
    else:
        path = Path(first["output"])
        written = path if len(targets) == 1 else path.parent
        where = "in this folder" if written == Path() else str(written)
        output.print_line(f"made {text}, in {first['seconds']:.1f} s: {where}")


def _print_origin(report: dict[str, Any]) -> None:
    """Print which snapshots were chosen, and what an output lacks or has from elsewhere."""
    path = report["targets"][0]["output"]
    if report["choice"] is not None:
        output.print_line(f"from {report['choice']}")
    if copied := report.get("like"):
        output.note_copied(copied)
    elif report["left_out"] and path:
        lacks = output.list_tensors(report["left_out"])
        output.print_note(
            f"the output lacks {lacks} of the model, which the run does not track; for a complete "
            "model add --like MODEL, which makes a copy of it with the average in it"
        )


def _summary(
    report: dict[str, Any],
    errors: list[str],
) -> str:
    """Say what was made of what, with the largest of each kind of error."""
    targets = report["targets"]
    first = targets[0]
    what = first["target"]
    if first["as"] is not None:
        what += f" (as {first['as']})"
    size = resources.format_bytes(first["bytes"])
    if len(targets) > 1:
        what = count_noun(len(targets), "average")
        size += " each"
    parts = [f"{what} at t = {first['t']:,.12g} from {report['sources']}"]
    for key in errors:
        values = [target[key] for target in targets]
        parts.append(f"{make_title(key)} {_largest(values, key)}")
    return ", ".join([*parts, size])


def _largest(errors: list[float | None], key: str) -> str:
    if None in errors:
        return percent(None)
    largest = max(filter(None, errors), default=0.0)
    if key == "lost_gain":
        return at_most(largest)
    return f"up to {percent(largest)}" if len(errors) > 1 else percent(largest)
