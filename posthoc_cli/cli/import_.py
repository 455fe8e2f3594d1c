"""`ema import`: a run of other programs' checkpoints and averages, with settings that their files do not contain."""

from __future__ import annotations

from pathlib import Path

from typer import Argument

from posthoc_cli.checkpoints import KINDS
from posthoc_cli.cli import options, output
from posthoc_cli.targets import parse_numbers

EPILOG = "Example:  ema import old --sigma-rels 0.05,0.28 --update-every 10 --out run"


def import_(
    directory: str = Argument(..., metavar="DIR", help="The checkpoints or averages: a folder, a file or a glob."),
    out: Path | None = options.OUTPUT(None, "--out", "-o", metavar="RUN", help="The folder or URL of the new run."),
    kind: str | None = options.RUN(
        None,
        "--from",
        metavar="KIND",
        autocompletion=options.one_of(*KINDS),
        show_default="found by names and contents",
        help=f"What DIR contains: {', '.join(KINDS)}.",
    ),
    step_from: str | None = options.RUN(
        None, metavar="PATTERN", show_default="content or name", help=r"A pattern of the steps in names: 'step(\d+)'."
    ),
    prefix: str = options.RUN(
        "", help="Take only tensors whose names begin with this prefix, such as model., and remove it from the names."
    ),
    include: list[str] = options.RUN([], metavar="GLOB", help="Take only tensors with these names."),
    exclude: list[str] = options.RUN([], metavar="GLOB", help="Leave out tensors with these names."),
    sigma_rels: str | None = options.RUN(None, help="Widths of the averages, by their numbers: 0.05,0.28."),
    update_every: int | None = options.RUN(None, help="Steps between two updates of the averages."),
    update_after_step: int | None = options.RUN(
        None, show_default="the library's", help="Steps before the first update of the averages."
    ),
    ema_decay: str | None = options.RUN(
        None,
        metavar="DECAY",
        show_default="from the files, else by comparison",
        help="The decay of ordinary EMAs: 0.9999, half-life:500000, or half-life:5% of the training so far.",
    ),
    ema_warmup: str | None = options.RUN(
        None,
        metavar="RULE",
        autocompletion=options.one_of("none", "ratio", "power", "ramp-up"),
        show_default="from the files, else by comparison",
        help="How the decay rises: ratio, (1 + n) / (10 + n); power, 1 - (1 + n)^-2/3 (power:0.75: ^-0.75); EDM's "
        "ramp-up; or none.",
    ),
    ema_restarts: list[int] = options.RUN(
        [],
        metavar="STEP",
        show_default="by comparison",
        help="A step at which the EMAs were restarted from the weights. Repeatable.",
    ),
    steps_per_epoch: int | None = options.RUN(None, help="Steps per epoch, for files that contain only their epoch."),
    average: str | None = options.RUN(
        None, metavar="KEY", show_default="by its name", help="The key or prefix of the average's tensors in the files."
    ),
    weights: str | None = options.RUN(
        None, metavar="KEY", show_default="by its names", help="The key or prefix of the weights' tensors in the files."
    ),
    overwrite: bool = options.OUTPUT(
        False, "--overwrite", "--force", "-f", help="Replace an import of other files, or with other settings."
    ),
    dry_run: bool = options.OUTPUT(False, "--dry-run", help="Show what was found; write nothing."),
    as_json: bool = options.JSON,
) -> None:
    """Make a run of other programs' checkpoints.

    Needed if the files lack a setting, such as update_every: give it here once, and every command takes RUN, except
    prune and export.

    RUN is a manifest of a few kB that refers to the files by path: move both together. Repeat the call to take in
    what has changed in DIR.
    """
    from posthoc_cli.checkpoints.import_run import import_checkpoints

    done = import_checkpoints(
        options.open_run(directory, directory=False).directory, out, overwrite=overwrite, dry_run=dry_run,
        kind=kind, step_from=step_from, prefix=prefix, include=include,
        exclude=exclude, sigma_rels=options.optional(parse_numbers, sigma_rels, "--sigma-rels") or (),
        update_every=update_every, update_after_step=update_after_step,
        ema_decay=options.optional(_decay, ema_decay), ema_warmup=ema_warmup, ema_restarts=ema_restarts,
        steps_per_epoch=steps_per_epoch, average=average, weights=weights,
    )  # fmt: skip
    if as_json:
        output.print_json(done.to_dict())
        return
    for what, count in done.counts.items():
        output.print_line(f"{count:,} x {what}")
    for check in done.checks:
        output.print_line(check)
    if done.written:
        output.print_line(f"wrote a run that refers to these files: {done.out}")
    else:
        output.print_line("nothing was written" + ("" if done.dry_run else f": {done.out} is this import already"))


def _decay(text: str) -> float | str:
    """Return a number, or the text for the library to interpret."""
    try:
        return float(text)
    except ValueError:
        return text
