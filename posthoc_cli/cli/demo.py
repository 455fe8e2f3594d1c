"""`ema demo`: from training to the exported average, on a small model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from posthoc_cli import files
from posthoc_cli.cli import output, values
from posthoc_cli.cli.output import print_line

if TYPE_CHECKING:
    from posthoc_cli.demo import Result

EPILOG = "Example:  ema demo --out ema-demo"


def demo(
    out: Path = values.OUTPUT("ema-demo", "--out", "-o", help="The folder for all files of the demo; new, or empty."),
    overwrite: bool = values.flag(
        values.OUTPUT,
        "--overwrite",
        "--force",
        "-f",
        help="Replace an earlier demo in that folder; other files are kept.",
    ),
    as_json: bool = values.JSON,
    steps: str = values.HOW("8000", metavar="COUNT", help="Steps of training: a multiple of 100."),
) -> None:
    """Train a small diffusion model and choose its average.

    Takes less than a minute. Trains with the hook on generated images, synthesizes averages of many lengths, measures
    the validation loss of each, draws pictures, and compares the averages with directly tracked ones. Prints every
    ema command that it runs; downloads nothing.
    """
    from posthoc_cli.demo import run

    count = values.parse_count(steps, "--steps", "8000, 8e3 or 8K")
    say = output.print_note if as_json else print_line
    out = files.expanded(files.local_path("--out", out))
    result = run(out, count, overwrite, say, output.progress_bar(unit="steps"))
    output.print_report(result, as_json, _print)


def _print(result: Result) -> None:
    found, raw = result.sweep, result.sweep.raw or 0.0
    print_line()
    print_line("Which length is best? The loss on images that the training has not seen:")
    rows = [["raw weights", f"{raw:.5f}", "", ""]]
    for trial in found.trials:
        if trial.x and trial.value is not None:
            mark = "<- best" if trial.x == result.best else ""
            rows.append([f"{trial.x:g}", f"{trial.value:.5f}", f"{100 * (trial.value / raw - 1):+.2f} %", mark])
    output.print_table(["sigma_rel", "validation loss", "vs raw", ""], rows, left=[""])
    low, high = found.found.low, found.found.high
    print_line(f"sigma_rel {low:g} to {high:g} are equal within the noise; ema sweep searches with a command of yours")
    print_line()
    print_line("Is it the true average? Distance to averages tracked during training, in float64:")
    rows = [[f"{c.sigma_rel:g}", f"{c.relative_error:.1e}", f"{c.raw_distance:.1e}"] for c in result.checks]
    output.print_table(["sigma_rel", "synthesized", "raw weights"], rows)
    print_line("relative L2 distance over all parameters; storing snapshots in float16 alone accounts for about 2e-4")
    folder = result.folder
    mine, plan = folder.root / "mine.safetensors", folder.root / "plan.png"
    print_line()
    print_line(f"done in {result.seconds:.0f} s; in {folder.root}:")
    print_line(f"  {', '.join(path.name + '/' * path.is_dir() for path in sorted(folder.root.iterdir()))}")
    print_line("open report.html, look at the pictures, and try:")
    for command in (
        ["synthesize", folder.snapshots, "--sigma-rel", "0.13", "--out", mine],
        ["info", folder.average(result.best)],
        ["plan", "--steps", "100000", "--params", "100K", "--disk", "10MB", "--out", plan],
    ):
        print_line(f"  {shlex.join(['ema', *map(str, command)])}")
