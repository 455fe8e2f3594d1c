"""`ema demo`: from training to the exported average, on a small model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.cli import options, output
from posthoc_cli.cli.output import print_line

EPILOG = "Example:  ema demo --out ema-demo"


def demo(
    out: Path = options.OUTPUT("ema-demo", "--out", "-o", help="The folder for all files of the demo; new, or empty."),
    overwrite: bool = options.OUTPUT(
        False,
        "--overwrite",
        "--force",
        "-f",
        help="Replace an earlier demo in that folder; other files are kept.",
    ),
    as_json: bool = options.JSON,
    steps: str = options.HOW("8000", metavar="COUNT", help="Steps of training: a multiple of 100."),
) -> None:
    """Train a small diffusion model and choose its average.

    Takes less than a minute and downloads nothing. Trains with the hook on generated images, measures the validation
    loss of averages of many lengths, makes the best one, and draws pictures and a page. Prints every command that it
    runs.
    """
    from posthoc_cli.demo import run

    count = options.parse_count(steps, "--steps", "8000, 8e3 or 8K")
    say = output.print_note if as_json else print_line
    out = files.expanded(files.local_path("--out", out))
    output.show(run(out, count, overwrite, say, output.progress_bar(unit="steps")).to_dict(), as_json, _print)


def _print(found: dict[str, Any]) -> None:
    print_line()
    print_line("Which length is best? The loss on images that the training has not seen:")
    rows = [{"what": "raw weights", "loss": f"{found['raw']:.5f}", "versus": "", "mark": ""}]
    for one in found["averages"]:
        mark = "<- best" if one["sigma_rel"] == found["best"] else ""
        versus = f"{100 * (one['loss'] / found['raw'] - 1):+.2f} %"
        rows.append({"what": f"{one['sigma_rel']:g}", "loss": f"{one['loss']:.5f}", "versus": versus, "mark": mark})
    output.print_rows(rows, ["sigma_rel:what", "validation loss:loss", "vs raw:versus", ":mark"])
    low, high = found["equal_within_noise"]
    print_line(f"sigma_rel {low:g} to {high:g} are equal within the noise; ema sweep searches with a command of yours")
    out = Path(found["out"])
    print_line()
    print_line(f"done in {found['seconds']:.0f} s. Open {out / 'report.html'}, look at the pictures, and try:")
    for words in (
        ["synthesize", out / "snapshots", "--sigma-rel", "0.13", "--out", out / "mine.safetensors"],
        ["info", out / "best.safetensors"],
        ["plan", "--steps", "100000", "--params", "100K", "--disk", "10MB", "--out", out / "plan.png"],
    ):
        print_line(f"  {shlex.join(['ema', *map(str, words)])}")
