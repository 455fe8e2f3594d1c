"""`ema import`: checkpoints and averages of other programs, written in the format of this one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument, Option

from posthoc_cli import files
from posthoc_cli.cli import output, values
from posthoc_cli.errors import DirectoryError, InvalidValueError

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.opening import Origin

EPILOG = "Example:  ema import old --from ema-pytorch --sigma-rels 0.05,0.28 --update-every 10 --out new"


@values.with_origin
def import_(
    directory: Path = Argument(..., metavar="DIR", help="The checkpoints or averages: a folder, or a glob."),
    out: Path | None = Option(None, "--out", "-o", metavar="NEW", help="The folder to make."),
    dry_run: bool = Option(False, "--dry-run", help="Show what was found; write nothing."),
    quiet: bool = values.QUIET,
    as_json: bool = values.JSON,
    *,
    origin: Origin,
) -> None:
    """Write other programs' checkpoints with checksums.

    Needed for nothing: every command reads them where they are. NEW can be verified, and says by itself what each
    file is. All files are written, or none.
    """
    from posthoc_cli.checkpoints.checkpoint import Checkpoint
    from posthoc_cli.checkpoints.imported import Import, import_checkpoints
    from posthoc_cli.checkpoints.opening import check_claims, disk_sources

    if out is None and not dry_run:
        raise InvalidValueError("--out", "is missing; only a dry run needs no output")
    sources = disk_sources(values.existing_run(directory), origin)
    found = [one for one in sources if isinstance(one, Checkpoint)]
    if not found:
        raise DirectoryError(directory, "holds snapshots of a tracker, which need no import")
    fits = check_claims(found, origin)
    if out is None or dry_run:
        done = Import(tuple(found), tuple(one.path for one in found))
    else:
        done = import_checkpoints(found, files.expanded(out), output.progress_bar(quiet))
    if as_json:
        output.print_json(done.to_dict())
    elif not quiet:
        for what, count in done.counts.items():
            output.print_line(f"{count:,} x {what}")
        if fits:
            others = ", ".join(f"{value}: {fit:.2g}" for value, fit in list(fits.items())[:3])
            output.print_line(f"update_every {origin.update_every} fits the distances between them (misfits: {others})")
        elif origin.update_every is not None:
            output.print_line("update_every is as given: averages of one profile, or at one time, cannot tell it")
        output.print_line(
            "nothing was written" if out is None or dry_run else f"wrote {len(done.paths):,} files: {out}"
        )
