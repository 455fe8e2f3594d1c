"""`ema import`: make a run of other programs' checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typer import Argument

from posthoc_cli.checkpoints import KINDS
from posthoc_cli.cli import options, output
from posthoc_cli.targets import parse_numbers

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.import_run import ImportReport


def import_(
    directory: str = Argument(
        ..., metavar="DIR", help="The checkpoints or averages: a folder, a file or a glob."
    ),
    out: str | None = options.OUTPUT(
        None, "--out", "-o", metavar="RUN", help="The folder of the new run."
    ),
    kind: str | None = options.RUN(
        None,
        "--from",
        metavar="KIND",
        show_default="found by names and contents",
        help=f"What DIR contains: {', '.join(KINDS)}.",
    ),
    step_from: str | None = options.STEP_FROM,
    include: list[str] = options.RARE(
        [], metavar="GLOB", help="Take only tensors with these names."
    ),
    exclude: list[str] = options.RARE(
        [], metavar="GLOB", help="Leave out tensors with these names."
    ),
    sigma_rels: str | None = options.RARE(
        None,
        metavar="LENGTHS",
        help="Widths of numbered averages, in the order of their numbers: 0.05,0.28.",
    ),
    update_every: str | None = options.RARE(
        None, metavar="COUNT", help="Steps between two updates of the averages."
    ),
    update_after_step: str | None = options.RARE(
        None,
        metavar="COUNT",
        show_default="the library's",
        help="Steps before the first update of the averages.",
    ),
    ema_decay: str | None = options.RUN(
        None,
        metavar="DECAY",
        show_default="from the files, else by comparison",
        help=(
            "The decay of the EMA: 0.9999, a half-life such as half-life:500000, or found for what "
            "the weights beside it show."
        ),
    ),
    ema_warmup: str | None = options.RARE(
        None,
        metavar="RULE",
        show_default="from the files, else by comparison",
        help=(
            "How the decay rises: ratio, power[:0.75], ramp-up, exp[:2000] (YOLO), unbiased, "
            "cosine[:0.996] or linear[:0.996] to 1 (DINO, I-JEPA); none."
        ),
    ),
    steps: str | None = options.RARE(
        None,
        metavar="COUNT",
        show_default="the last checkpoint's",
        help="Steps of the whole training, after which cosine and linear are at 1.",
    ),
    steps_per_epoch: str | None = options.STEPS_PER_EPOCH,
    first_epoch: str | None = options.FIRST_EPOCH,
    average: str | None = options.RUN(
        None,
        metavar="KEY",
        show_default="by its name",
        help="The key or prefix of the average's tensors in the files.",
    ),
    weights: str | None = options.RUN(
        None,
        metavar="KEY",
        show_default="by its names",
        help="The key or prefix of the weights' tensors in the files.",
    ),
    exchanged: str | None = options.RARE(
        None,
        metavar="STEPS",
        help="Steps of files that hold the average and the weights in exchanged places: 900,1000.",
    ),
    overwrite: bool = options.OUTPUT(
        False,
        "--overwrite",
        "-f",
        help="Replace an import of other files, or with other settings.",
    ),
    dry_run: bool = options.OUTPUT(False, "--dry-run", help="Show what was found; write nothing."),
    as_json: bool = options.JSON,
) -> None:
    """Make a run of other programs' checkpoints.

    Needed if the files lack a setting, such as update_every: give it here once, and every command
    takes RUN, except prune and export.

    RUN is a small index of your checkpoints; nothing is copied. It refers to them by path: move
    both together. Repeat the call to take in what has changed in DIR.
    """
    from posthoc_cli.checkpoints.import_run import import_checkpoints

    report = import_checkpoints(
        options.open_path(directory).directory,
        out,
        overwrite=overwrite,
        dry_run=dry_run,
        kind=kind,
        step_from=step_from,
        include=include,
        exclude=exclude,
        sigma_rels=options.optional(parse_numbers, sigma_rels, "--sigma-rels") or (),
        update_every=options.optional_count(update_every, "--update-every"),
        update_after_step=options.optional_count(update_after_step, "--update-after-step"),
        ema_decay=options.optional(_parse_decay, ema_decay),
        ema_warmup=ema_warmup,
        steps=options.optional_count(steps, "--steps"),
        steps_per_epoch=options.optional_count(steps_per_epoch, "--steps-per-epoch"),
        first_epoch=options.optional_count(first_epoch, "--first-epoch"),
        average=average,
        weights=weights,
        exchanged=options.optional(_parse_steps, exchanged) or (),
    )
    if as_json:
        output.print_json(report.to_dict())
    else:
        _print_import(report, dry_run)


def _print_import(report: ImportReport, dry_run: bool) -> None:
    output.print_line(f"numbers are {report.numbers}")
    for what, count in report.counts.items():
        output.print_line(f"{count:,} x {what}")
    for check in report.checks:
        output.print_line(check)
    if report.written:
        output.print_line(f"wrote an index of these files; nothing is copied: {report.out}")
    elif dry_run:
        output.print_line("nothing was written")
    else:
        output.print_line(f"nothing was written: {report.out} is this import already")


def _parse_steps(text: str) -> list[float]:
    numbers = parse_numbers(text, "--exchanged", "a list of steps such as 900,1000")
    return [int(number) if number.is_integer() else number for number in numbers]


def _parse_decay(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
