"""`ema export`: synthesized weights in another layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument

from posthoc_cli import files, resources
from posthoc_cli.cli import output, values
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.run import Run
from posthoc_cli.targets import Target

if TYPE_CHECKING:
    from posthoc_cli.export.convert import ExportReport

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
    as_json: bool = values.JSON,
    base: Path | None = values.HOW(
        None, help="A full model (a file, or a folder with an index): tensors that FILE lacks come from it."
    ),
    merge: Path | None = values.HOW(
        None,
        metavar="BASE",
        help="Add the average of a LoRA adapter's products to this full model; FILE is then a run: the adapter's "
        "snapshots, or a folder or a glob of its checkpoints.",
    ),
    sigma_rel: str | None = values.TARGETS(None, help="With --merge: the length of the average."),
    target: list[str] = values.TARGETS([], metavar="KIND:VALUE", help="With --merge: an average of another kind."),
    prefix: str = values.HOW("", help="Put this in front of every name in FILE."),
    strip_prefix: str = values.HOW("", help="Remove this from the front of the names in FILE."),
) -> None:
    """Write averaged weights in another layout or dtype.

    Names can be changed, and a full model can supply the tensors that were not tracked.

    Layouts: one safetensors file; shards with an index, named as the Hugging Face libraries look for them (one
    file when it fits); a .pt state dict for torch.load(weights_only=True).
    """
    from posthoc_cli.export.convert import export_file

    out = files.expanded(out)
    wanted = values.parse_targets(sigma_rel, target)
    if merge is not None:
        _check_merge(wanted, base is not None or bool(prefix or strip_prefix))
        report = Run(file).merge(
            wanted[0], values.existing(merge), out, dtype=dtype, layout=layout, max_shard_size=max_shard_size,
            overwrite=overwrite, progress=output.progress_bar(),
        )  # fmt: skip
    elif wanted:
        raise InvalidValueError("--sigma-rel and --target", "are for --merge; ema synthesize makes other averages")
    else:
        base = None if base is None else values.existing(base)
        report = export_file(
            values.existing(file), out, layout, dtype, base, prefix, strip_prefix, overwrite,
            max_shard_size, output.progress_bar(),
        )  # fmt: skip
    output.print_report(report, as_json, _print, merge or base, out)


def _check_merge(wanted: Sequence[Target], renames: bool) -> None:
    if len(wanted) != 1:
        raise InvalidValueError("--merge", f"needs one average, not {len(wanted)}: --sigma-rel 0.15, or one --target")
    if renames:
        raise InvalidValueError("--merge", "finds the names of the base itself: no --base, --prefix or --strip-prefix")


def _print(report: ExportReport, base: Path | None, out: Path) -> None:
    made = report.made.values()
    count = f"{len(made)} models, " * report.several + f"{sum(one.tensors for one in made)} tensors"
    added = f", {sum(one.from_base for one in made)} of them from {base}" if base is not None else ""
    size = resources.size_text(sum(one.nbytes for one in made))
    output.print_line(f"wrote {count}{added}, {size}, in {report.seconds:.1f} s: {out}")
