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

    Takes less than a minute. Trains with the hook on generated images, synthesizes averages of many lengths, measures
    the validation loss of each, draws pictures, and compares the averages with directly tracked ones. Prints every
    ema command that it runs; downloads nothing.
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
    print_line()
    print_line("Is it the true average? Distance to averages tracked during training, in float64:")
    rows = [
        {"sigma_rel": f"{one['sigma_rel']:g}"} | {key: f"{one[key]:.1e}" for key in ("relative_error", "raw_distance")}
        for one in found["tracked"]
    ]
    output.print_rows(rows, ["sigma_rel", "synthesized:relative_error", "raw weights:raw_distance"])
    print_line("relative L2 distance over all parameters; storing snapshots in float16 alone accounts for about 2e-4")
    out = Path(found["out"])
    print_line()
    print_line(f"done in {found['seconds']:.0f} s. Open {out / 'report.html'}, look at the pictures, and try:")
    best = out / "averages" / f"sigma_rel-{found['best']!r}.safetensors"
    for words in (
        ["synthesize", out / "snapshots", "--sigma-rel", "0.13", "--out", out / "mine.safetensors"],
        ["info", best],
        ["plan", "--steps", "100000", "--params", "100K", "--disk", "10MB", "--out", out / "plan.png"],
    ):
        print_line(f"  {shlex.join(['ema', *map(str, words)])}")
