"""`ema verify`: a check that files are as they were written."""

from __future__ import annotations

from typing import Any

import typer
from typer import Argument

from posthoc_cli import resources
from posthoc_cli.cli import options, output

EPILOG = "Example:  ema verify run/ema   or   ema verify out/ m.safetensors --json"


def verify(
    paths: list[str] = Argument(
        ..., metavar="DIR|FILE", help="Directories or files: snapshots, outputs, states, parts or shards."
    ),
    as_json: bool = options.JSON,
) -> None:
    """Check every byte of snapshots, outputs and states.

    Reads all files and checks checksums, headers against contents, nan and infinity, and that all files belong to one
    run. Exit code 1 if anything is wrong. Files of other programs have no checksums: only their structure is checked.

    Move a broken snapshot out of its directory: the others work without it.
    """
    from posthoc_cli.run import Run

    reports: list[dict[str, Any]] = []
    fine = True
    # All paths are checked first, since reading takes long.
    for path in [options.existing(path, name="DIR|FILE") for path in paths]:
        check = Run(path).check(output.progress_bar())
        report = check.to_dict()
        if not as_json:
            if len(paths) > 1:  # files are named relative to their path
                if reports:
                    output.print_line()
                output.print_line(f"{check.path}:")
            _print(report)
        reports.append(report)
        fine = fine and check.is_fine
    if as_json:
        output.print_json(reports[0] if len(reports) == 1 else {"kind": "several", "paths": reports})
    if not fine:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    fine = [file for file in found["files"] if file["state"] in ("intact", "unchecked")]
    wrong = [file for file in found["files"] if file not in fine]
    if len(fine) > output.MOST_ROWS:
        output.print_line(f"{output.counted(len(fine), 'file')} with nothing wrong; --json lists them")
    elif fine:
        output.print_rows(fine, ["file:path", "what", "state"])
    for file in wrong:
        state = f"{file['state']}: " * (not file["detail"].startswith(file["state"])) + file["detail"]
        output.print_line(f"{file['path']}: {file['what']}: {state.removesuffix(': ')}")
    for name in found["leftovers"]:
        output.print_line(f"{name}: left by an interrupted write, or by one in progress")
    if found["files"] or found["leftovers"]:
        output.print_line()
    for kind in ("note", "problem"):
        for text in found[f"{kind}s"]:
            output.print_line(f"{kind}: {text}")
    output.print_line(_verdict(found, wrong))


def _verdict(found: dict[str, Any], wrong: list[dict[str, Any]]) -> str:
    """Return the last line: how many files are intact, or which are not."""
    total = output.counted(len(found["files"]), "file")
    if not wrong:
        unchecked = sum(file["state"] == "unchecked" for file in found["files"])
        intact = f"{len(found['files']) - unchecked:,} intact, {unchecked:,} without checksums"
        size = resources.size_text(found["bytes"])
        return f"{total}, {size} verified in {found['seconds']:.1f} s: {intact if unchecked else 'all intact'}"
    names = ", ".join(file["path"] for file in wrong[:3])
    more = f" and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
    states = {file["state"] for file in wrong}
    verdict = states.pop() if len(states) == 1 else "not in order"
    return f"{len(wrong):,} of {total} {'is' if len(wrong) == 1 else 'are'} {verdict}: {names}{more}"
