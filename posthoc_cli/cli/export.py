"""`ema export`: weights in another layout, or the average that a training's checkpoint holds."""

from __future__ import annotations

from pathlib import Path

from typer import Argument

from posthoc_cli import files, resources
from posthoc_cli.cli import options, output

EPILOG = (
    "Example:  ema export model.safetensors --out model.pt   or   ema export last.pt --out average.safetensors   or   "
    "ema export avg.safetensors --base full.safetensors --out folder/"
)


def export(
    file: str = Argument(
        ...,
        metavar="FILE|DIR",
        help="An output of ema synthesize, a snapshot, or any safetensors file; a training's checkpoint, such as "
        "last.pt or a DCP folder; a folder of shards or its index; or a folder of several outputs.",
    ),
    out: str = options.OUTPUT(
        ..., "--out", "-o", help="A .safetensors or .pt file, or a folder, for shards or for several outputs."
    ),
    dtype: options.Dtype = options.DTYPE,
    layout: options.Layout | None = options.LAYOUT,
    max_shard_size: str | None = options.MAX_SHARD_SIZE,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
    base: str | None = options.HOW(
        None, help="A full model (a file, or a folder with an index), from which tensors that FILE lacks are taken."
    ),
    weights: bool = options.HOW(
        False, "--weights", help="Take the raw weights of a training's checkpoint, not its average."
    ),
    average: str | None = options.HOW(
        None,
        metavar="KEY",
        show_default="by its name",
        help="Take the average with this key or prefix, or a glob of it, of a training's checkpoint: model_ema2, "
        "net_ema.",
    ),
    prefix: str = options.HOW("", help="Put this in front of every name in FILE."),
    strip_prefix: str = options.HOW("", help="Remove this from the front of the names in FILE."),
) -> None:
    """Write averaged weights in another layout or dtype.

    Of a training's checkpoint, the average that it contains is written. Tensors can be renamed, and a full model can
    supply the tensors that were not tracked.

    Layouts: one safetensors file; shards with an index, under the names that Hugging Face libraries expect (one
    file if all tensors fit into it); a .pt state dict for torch.load(weights_only=True).
    """
    from posthoc_cli.export.convert import export_file

    source = options.existing(file, name="FILE")
    report = export_file(
        source, files.expanded(files.given_path("--out", out)), layout, dtype,
        options.optional(options.existing, base), prefix, strip_prefix, overwrite,
        max_shard_size, weights, average, output.progress_bar(),
    )  # fmt: skip
    if as_json:
        output.print_json(report.to_dict())
        return
    made = report.made.values()
    count = f"{len(made)} models, " * report.several + f"{sum(model.tensors for model in made)} tensors"
    added = f", {sum(model.from_base for model in made)} of them from {base}" if base is not None else ""
    size = resources.size_text(sum(model.nbytes for model in made))
    output.print_line(f"wrote {count}{added}, {size}, in {report.seconds:.1f} s: {Path(out)}")
