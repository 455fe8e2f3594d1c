"""`ema diff`: how far two models are from each other, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument, Option

from posthoc_cli import files
from posthoc_cli.cli import output, values

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.comparing import Comparison, Difference

EPILOG = "Example:  ema diff model.safetensors checkpoint-1000/   or   ema diff a.pt b.pt --out distances.png"


def diff(
    a: Path = Argument(..., metavar="A", help="A model: a checkpoint, a snapshot, an output; a file or a folder."),
    b: Path = Argument(..., metavar="B", help="Another one of any kind."),
    prefix: str = Option("", help="Of checkpoints: take tensors whose names begin so, such as model., without it."),
    out: Path | None = values.PICTURE,
    overwrite: bool = values.FORCE,
    verbose: bool = Option(False, "--verbose", "-v", help="Every tensor, not only groups of them."),
    as_json: bool = values.JSON,
) -> None:
    """Show how far two models are from each other.

    The distance is ||B - A|| / ||A||, of each group of names, of each tensor with --verbose, and of all together.
    Tensors that only one of them has, or that differ in shape, are named.
    """
    from posthoc_cli.checkpoints.comparing import compare

    out = values.new_file(out, "--out", values.PICTURES, overwrite)
    found = compare(values.existing(a, pickles=True), values.existing(b, pickles=True), prefix, output.progress_bar())
    if out is not None:
        from posthoc_cli import plots

        shown = found.tensors if verbose else found.groups
        names, distances = [one.name for one in shown], [one.relative for one in shown]
        title = f"{found.b} from {found.a}"
        files.write_whole(
            out, plots.as_file(lambda: plots.difference_figure(names, distances, title), out.suffix), overwrite
        )
    output.print_json(found.to_dict()) if as_json else _print(found, verbose)


def _print(found: Comparison, verbose: bool) -> None:
    rows = [_row(one) for one in (found.tensors if verbose else found.groups)]
    output.print_table(["tensors", "elements", "distance", "largest"], [*rows, _row(found.total)], left=["tensors"])
    for name, (first, second) in found.shapes.items():
        output.print_line(f"{name}: shape {list(first)} in A, {list(second)} in B")
    for where, names in (("A", found.only_a), ("B", found.only_b)):
        for name in names if verbose else names[: output.MOST_ROWS]:
            output.print_line(f"{name}: only in {where}")
        output.print_rest(0 if verbose else len(names) - output.MOST_ROWS)


def _row(one: Difference) -> list[str]:
    return [one.name, f"{one.elements:,}", output.percent(one.relative), f"{one.largest:.3g}"]
