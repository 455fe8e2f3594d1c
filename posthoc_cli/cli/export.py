"""`ema export`: synthesized weights in the layout that a consumer wants."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from posthoc_cli import files
from posthoc_cli.cli import output
from posthoc_cli.cli.values import DTYPE_WORDS, LAYOUT_WORDS, existing
from posthoc_cli.errors import OutputExistsError

EPILOG = (
    "Example:  ema export model.safetensors --out model.pt   or   "
    "ema export avg.safetensors --base full.safetensors --out folder/"
)


def export(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR",
            help="An output of ema synthesize, a snapshot, or any safetensors file; shards, by their folder or their "
            "index; or a folder of several outputs.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The output: .safetensors, .pt, or a folder, for shards or for several outputs."
        ),
    ],
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            autocompletion=LAYOUT_WORDS,
            help="safetensors, sharded (a folder) or pt. [default: what the output's name says]",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            autocompletion=DTYPE_WORDS,
            help="float32, float16, bfloat16, float64 (or fp32, ...), or keep: each tensor's own.",
        ),
    ] = "keep",
    base: Annotated[
        Path | None,
        typer.Option(help="A full model (a file, or a folder with an index): tensors that FILE lacks come from it."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Put this in front of every name in FILE.")] = "",
    strip_prefix: Annotated[str, typer.Option(help="Take this from the front of the names in FILE.")] = "",
    max_shard_size: Annotated[str, typer.Option(help="Of a sharded output.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and warnings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write averaged weights in another layout or dtype.

    Names can be changed, and a full model can fill in what was not tracked.

    Layouts: one safetensors file; shards with an index, named as the Hugging Face libraries look for them (one
    file when it fits); a .pt state dict for torch.load(weights_only=True).
    """
    from posthoc_cli.export.convert import export_file
    from posthoc_cli.export.outputs import export_paths, layout_of, output_exists
    from posthoc_cli.snapshots.models import model_files, models_at
    from posthoc_cli.snapshots.reader import read_header

    output.log_to_stderr(False)
    file, out, base = existing(file), files.expanded(out), None if base is None else existing(base)
    started = time.perf_counter()
    sources = models_at(file)
    outs = [out] if len(sources) == 1 else export_paths(sources, out, layout)
    if len(outs) > 1:
        for path in outs if not force else ():
            if output_exists(path, layout_of(path, layout)):
                raise OutputExistsError(path, "is there already", "choose another folder, or --force to replace it")
        if out.parent.is_dir():
            files.make_directory(out)
    total = sum(read_header(path).file_bytes for source in sources for path in model_files(source))
    made = []
    with output.progress_bar("exporting", total, quiet) as progress:
        for source, path in zip(sources, outs, strict=True):
            made.append(
                export_file(source, path, layout, dtype, base, prefix, strip_prefix, force, max_shard_size, progress)
            )
    seconds = time.perf_counter() - started
    reports = [{"output": str(path), **vars(one)} for path, one in zip(outs, made, strict=True)]
    if as_json:
        output.print_json({**(reports[0] if len(outs) == 1 else {"outputs": reports}), "seconds": seconds})
    elif not quiet:
        count = f"{len(made)} models, " * (len(made) > 1) + f"{sum(one.tensors for one in made)} tensors"
        added = f", {sum(one.from_base for one in made)} of them from {base}" if base is not None else ""
        size = output.size_text(sum(one.nbytes for one in made))
        output.print_line(f"wrote {count}{added}, {size}, in {seconds:.1f} s: {out}")


COMMAND = export
