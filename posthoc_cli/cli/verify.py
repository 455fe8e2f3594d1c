"""`ema verify`: check every byte of snapshots and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument

from posthoc_cli import resources
from posthoc_cli.cli import options, output
from posthoc_cli.cli.quotes import refuse_spaces
from posthoc_cli.errors import DirectoryError, PostHocError, count_noun

_FINE = "intact", "unchanged", "unchecked"  # states of files, see `snapshots.verify`

if TYPE_CHECKING:
    from posthoc_cli.snapshots.verify import Verification


def verify(
    paths: list[str] = Argument(
        ..., metavar="DIR|FILE", help="Directories or files: snapshots, outputs, parts or shards."
    ),
    as_json: bool = options.JSON,
) -> int:
    """Check every byte of snapshots and outputs.

    Reads all files and checks checksums, headers against contents, and that all files belong to one
    run. Exit code 1 if anything is wrong. Files of other programs have no checksums: only their
    structure is checked.

    Move a broken snapshot out of its directory: the others work without it.
    """
    refuse_spaces(paths)
    reports: list[dict[str, Any]] = []
    code = 0
    for path in paths:
        try:
            check = _check(options.check_exists(path, name="DIR|FILE"))
        except PostHocError as error:
            if len(paths) == 1:
                raise
            output.print_note(f"ema: error: {error}")
            code = max(code, error.exit_code)
            continue
        reports.append(check.to_dict())
        if not check.is_fine:
            code = max(code, 1)
        if not as_json:
            if len(paths) > 1:  # files are named relative to their path
                if len(reports) > 1:
                    output.print_line()
                output.print_line(f"{check.path}:")
            _print_verify(reports[-1])
    if as_json:
        output.print_json(
            reports[0] if len(reports) == 1 else {"kind": "several", "paths": reports}
        )
    return code


def _check(path: Path) -> Verification:
    from posthoc_cli.run import Run

    try:
        return Run(path).check(output.progress_bar())
    except DirectoryError:
        options.check_not_above_run(path)
        raise


def _print_verify(report: dict[str, Any]) -> None:
    fine = [file for file in report["files"] if file["state"] in _FINE]
    wrong = [file for file in report["files"] if file not in fine]
    if len(fine) > output.MOST_ROWS:
        output.print_line(f"{count_noun(len(fine), 'file')} with nothing wrong; --json lists them")
    elif fine:
        output.print_rows(fine, ["file:path", "what", "state"])
    for file in wrong:
        detail = file["detail"]
        if not detail.startswith(file["state"]):
            detail = f"{file['state']}: {detail}".removesuffix(": ")
        output.print_line(f"{file['path']}: {file['what']}: {detail}")
    for name in report["leftovers"]:
        output.print_line(f"{name}: left by an interrupted write, or by one in progress")
    if report["files"] or report["leftovers"]:
        output.print_line()
    for kind in ("note", "problem"):
        for text in report[f"{kind}s"]:
            output.print_line(f"{kind}: {text}")
    output.print_line(_verdict(report, wrong))


def _verdict(
    report: dict[str, Any],
    wrong: list[dict[str, Any]],
) -> str:
    """Write the last line: how many files are intact, or which are not."""
    files = report["files"]
    total = count_noun(len(files), "file")
    if wrong:
        states = {file["state"] for file in wrong}
        verdict = states.pop() if len(states) == 1 else "not in order"
        verb = "is" if len(wrong) == 1 else "are"
        return f"{len(wrong):,} of {total} {verb} {verdict}"
    intact = sum(file["state"] == "intact" for file in files)
    if report["bytes"]:
        size = resources.format_bytes(report["bytes"])
        verb = "verified" if intact == len(files) else "read"
        total += f", {size} {verb} in {report['seconds']:.1f} s"
    if intact == len(files):
        return f"{total}: all intact"
    if all(file["state"] == "unchanged" for file in files):
        return f"{total}: all as they were at the import, by size and a sample of the content"
    if not intact:
        return f"{total}: none found damaged, all without checksums"
    return f"{total}: {intact:,} intact, {len(files) - intact:,} without checksums"
