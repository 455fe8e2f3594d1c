"""`ema export`: synthesized weights in another layout."""

from __future__ import annotations

from pathlib import Path

from typer import Argument

from posthoc_cli import files
from posthoc_cli.cli import output, values

EPILOG = (
    "Example:  ema export model.safetensors --out model.pt   or   "
    "ema export avg.safetensors --base full.safetensors --out folder/"
)


def export(
    file: Path = Argument(
        ...,
        metavar="FILE|DIR",
        help="An output of ema synthesize, a snapshot, or any safetensors file; shards, by their folder or their "
        "index; or a folder of several outputs.",
    ),
    out: Path = values.OUTPUT(
        ..., "--out", "-o", help="A .safetensors or .pt file, or a folder, for shards or for several outputs."
    ),
    dtype: str = values.DTYPE,
    layout: str | None = values.LAYOUT,
    max_shard_size: str | None = values.MAX_SHARD_SIZE,
    overwrite: bool = values.OVERWRITE,
    quiet: bool = values.QUIET,
    as_json: bool = values.JSON,
    base: Path | None = values.HOW(
        None, help="A full model (a file, or a folder with an index): tensors that FILE lacks come from it."
    ),
    prefix: str = values.HOW("", help="Put this in front of every name in FILE."),
    strip_prefix: str = values.HOW("", help="Remove this from the front of the names in FILE."),
) -> None:
    """Write averaged weights in another layout or dtype.

    Names can be changed, and a full model can supply the tensors that were not tracked.

    Layouts: one safetensors file; shards with an index, named as the Hugging Face libraries look for them (one
    file when it fits); a .pt state dict for torch.load(weights_only=True).
    """
    from posthoc_cli.export.convert import export_file

    base = None if base is None else values.existing(base)
    report = export_file(
        values.existing(file), files.expanded(out), layout, dtype, base, prefix, strip_prefix, overwrite,
        max_shard_size, output.progress_bar(quiet),
    )  # fmt: skip
    if as_json:
        output.print_json(report.to_dict())
    elif not quiet:
        made = report.made.values()
        count = f"{len(made)} models, " * report.several + f"{sum(one.tensors for one in made)} tensors"
        added = f", {sum(one.from_base for one in made)} of them from {base}" if base is not None else ""
        size = output.size_text(sum(one.nbytes for one in made))
        output.print_line(f"wrote {count}{added}, {size}, in {report.seconds:.1f} s: {out}")
