"""`ema demo`: train a small diffusion model and choose its average."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.cli import options, output


def demo(
    out: str | None = options.OUTPUT(
        None,
        "--out",
        "-o",
        metavar="FOLDER",
        show_default="ema-demo, ema-demo-2, ...",
        help="The folder for all files of the demo; new, or empty.",
    ),
    as_json: bool = options.JSON,
    steps: str = options.HOW("6000", metavar="COUNT", help="Steps of training: a multiple of 100."),
) -> None:
    """Train a small diffusion model and choose its average.

    Takes less than a minute and downloads nothing. Trains with the hook on points in the plane,
    measures the validation loss of averages of many lengths, writes the best one, and a picture and
    a page with samples. Prints commands to try next.
    """
    from posthoc_cli.demo import free_folder, run

    count = options.parse_count(steps, "--steps")
    say = output.print_note if as_json else output.print_line
    folder = free_folder() if out is None else files.local_path("--out", out)
    progress = output.progress_bar(unit="steps")
    output.show(run(folder, count, say, progress), as_json, _print_demo)


def _print_demo(results: dict[str, Any]) -> None:
    output.print_line()
    output.print_line("Which length is best? The loss on points that the training has not seen:")
    rows = [{"what": "last weights", "loss": f"{results['raw']:.5f}", "versus": "", "mark": ""}]
    best = results["best"]
    losses = {}
    for average in results["averages"]:
        width = average["sigma_rel"]
        losses[width] = f"{average['loss']:.5f}"
        versus = f"{100 * (average['loss'] / results['raw'] - 1):+.2f} %"
        mark = "<- best" if width == best else ""
        rows.append({"what": f"{width:g}", "loss": losses[width], "versus": versus, "mark": mark})
    output.print_rows(rows, ["sigma_rel:what", "validation loss:loss", "vs last:versus", ":mark"])
    tracked = " or ".join(f"{width:g}" for width in results["tracked"])
    plain = " or ".join(losses[width] for width in results["tracked"])
    output.print_line(f"a plain EMA of {tracked}: {plain}; yours, of {best:g}: {losses[best]}")
    _print_next_commands(Path(results["out"]), results["seconds"])


def _print_next_commands(out: Path, seconds: float) -> None:
    output.print_line()
    output.print_line(f"done in {seconds:.0f} s. Look at {out / 'samples.png'}, open")
    output.print_line(f"{out / 'report.html'}, and try:")
    mine = ["--sigma-rel", "0.13", "--out", out / "mine.safetensors"]
    for words in (
        ["synthesize", out / "snapshots", *mine],
        ["info", out / "best.safetensors"],
        ["error-plot", "--steps", "100000", "--out", out / "schedule.png"],
    ):
        line = shlex.join(["ema", *map(str, words)])
        output.print_line(f"  {line}")
