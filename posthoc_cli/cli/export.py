"""`ema export`: write averaged weights in another layout or dtype."""

from __future__ import annotations

from typing import Any

from typer import Argument

from posthoc_cli import resources
from posthoc_cli.cli import options, output
from posthoc_cli.errors import count_noun


def export(
    file: str = Argument(
        ...,
        metavar="FILE|DIR",
        help="An output of ema synthesize, a snapshot, or any safetensors file; a training's "
        "checkpoint, such as "
        "last.pt or a DCP folder; or a folder of shards or its index.",
    ),
    out: str = options.OUTPUT(
        ...,
        "--out",
        "-o",
        metavar="PATH",
        help="A .safetensors or .pt file, or a folder, for shards.",
    ),
    dtype: options.Dtype | None = options.DTYPE,
    layout: options.Layout | None = options.LAYOUT,
    max_shard_size: str | None = options.MAX_SHARD_SIZE,
    like: str | None = options.LIKE_MODEL,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
    raw: bool = options.HOW(
        False,
        "--raw",
        help="Take, or with --like replace, a checkpoint's raw weights, found by names.",
    ),
    average: str | None = options.HOW(
        None,
        metavar="KEY",
        show_default="by its name",
        help="Take the average of this key, prefix or glob in a checkpoint, or replace it in "
        "--like.",
    ),
    weights: str | None = options.HOW(
        None,
        metavar="KEY",
        help="Take the weights of this key, prefix or glob in a checkpoint, or replace them in "
        "--like; --raw finds them by names.",
    ),
) -> None:
    """Write averaged weights in another layout or dtype.

    From a training's checkpoint it writes the average that this contains. --like writes the tensors
    into a copy of a checkpoint or model, which also holds what was not tracked.

    Layouts: one safetensors file; shards with an index, under the names that Hugging Face libraries
    expect (one file if all tensors fit into it); a .pt state dict for
    torch.load(weights_only=True).
    """
    from posthoc_cli.export.convert import export_file

    source = options.check_exists(file, name="FILE")
    report = export_file(
        source,
        out,
        layout,
        dtype,
        overwrite,
        max_shard_size,
        raw,
        average,
        weights,
        options.optional(options.check_exists, like),
        output.progress_bar(),
    )
    output.show(report.to_dict(), as_json, _print_export)


def _print_export(report: dict[str, Any]) -> None:
    if copied := report.get("like"):
        output.note_copied(copied)
    size = resources.format_bytes(report["bytes"])
    output.print_line(
        f"wrote {count_noun(report['tensors'], 'tensor')}, {size}, in {report['seconds']:.1f} s: "
        f"{report['output']}"
    )
