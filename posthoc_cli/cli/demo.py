"""`ema demo`: the whole job on a small real training."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli import files
from posthoc_cli.cli import output
from posthoc_cli.cli.values import parse_count

if TYPE_CHECKING:
    from posthoc_cli.demo import Result
    from posthoc_cli.demo.job import Measured

EPILOG = "Example:  ema demo --out ema-demo"


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for everything that the demo makes; new, or empty.")
    ] = Path("ema-demo"),
    steps: Annotated[str, typer.Option(metavar="COUNT", help="Steps of training: a multiple of 100.")] = "10000",
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier demo in that folder; other files stay.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a small diffusion model and choose its average.

    Takes about a minute on two cores. Trains with the hook, synthesizes averages of many lengths, measures the
    validation loss of each, draws pictures, and compares with averages that were tracked directly. Prints every
    ema command that it runs. Needs scikit-learn (pip install 'posthoc-cli[demo]'); downloads nothing.
    """
    from posthoc_cli.demo import run

    output.log_to_stderr(False)
    count = parse_count(steps, "--steps", "10000, 1e4 or 10K")
    result = run(files.expanded(out), count, force, output.print_note if as_json else _print_now, _steps_bar)
    if as_json:
        output.print_json(_report(result))
    else:
        _print_losses(result)
        _print_checks(result)
        _print_closing(result)


def _print_now(text: str) -> None:
    """One line on stdout, at once, also into a pipe: the next one may take half a minute."""
    output.print_line(text)
    sys.stdout.flush()


@contextmanager
def _steps_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of steps on stderr when it is a terminal; yields a function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


# --- what is printed -------------------------------------------------------------------------------


def _report(result: Result) -> dict[str, Any]:
    return {
        "out": str(result.folder.root),
        "steps": result.settings.steps,
        "checkpoint_every": result.settings.checkpoint_every,
        "parameters": result.parameters,
        "raw": vars(result.raw),
        "averages": [vars(measured) for measured in result.averages],
        "best": result.best.sigma_rel,
        "tracked": [vars(check) for check in result.checks],
        "commands": result.commands,
        "files": [str(path) for path in sorted(result.folder.root.iterdir())],
        "seconds": result.seconds,
    }


def _print_losses(result: Result) -> None:
    output.print_line("")
    output.print_line("Which length is best? The loss on images that training never saw:")
    columns = ["sigma_rel", "validation loss", "vs raw", "above the best", "standard error", ""]
    rows = [_loss_row(measured, result) for measured in (result.raw, *result.averages)]
    output.print_table(columns, rows, left=[""])


def _loss_row(measured: Measured, result: Result) -> list[str]:
    raw, best = measured == result.raw, measured == result.best
    return [
        "raw weights" if raw else f"{measured.sigma_rel:g}",
        f"{measured.loss:.5f}",
        "" if raw else f"{100 * (measured.loss / result.raw.loss - 1):+.2f} %",
        "" if best else f"{measured.above_best:.5f}",
        "" if best else f"{measured.standard_error:.5f}",
        "<- best" if best else "",
    ]


def _print_checks(result: Result) -> None:
    output.print_line("")
    output.print_line("Is it the true average? Distance to averages tracked during training, in float64:")
    rows = [
        [f"{check.sigma_rel:g}", f"{check.relative_error:.1e}", f"{check.raw_distance:.1e}"] for check in result.checks
    ]
    output.print_table(["sigma_rel", "synthesized", "raw weights"], rows)
    output.print_line(
        "relative L2 distance over all parameters; storing snapshots in float16 alone makes about 2e-4 of it"
    )


def _print_closing(result: Result) -> None:
    folder = result.folder
    mine, plan = folder.root / "mine.safetensors", folder.root / "plan.png"
    output.print_line("")
    output.print_line(f"done in {result.seconds:.0f} s; in {folder.root}:")
    output.print_line(f"  {', '.join(path.name + '/' * path.is_dir() for path in sorted(folder.root.iterdir()))}")
    output.print_line("look at the pictures, and try:")
    for command in (
        ["synthesize", folder.snapshots, "--sigma-rel", "0.13", "--out", mine],
        ["info", folder.average(result.best.sigma_rel)],
        ["error-plot", "--sigma-rels", "0.05,0.28", "--steps", "100000", "--checkpoint-every", "1000", "--out", plan],
    ):
        output.print_line(f"  {shlex.join(['ema', *map(str, command)])}")


COMMAND = demo
