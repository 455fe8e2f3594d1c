"""`ema synthesize`: the average of any length, from the snapshots of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posthoc_cli.cli import output
from posthoc_cli.cli.values import parse_sigma_rels
from posthoc_cli.errors import InvalidValueError

if TYPE_CHECKING:
    from posthoc_cli.synthesis import Plan

EPILOG = (
    "Example:  ema synthesize run/ema --sigma-rel 0.15 --out model.safetensors   or   "
    "ema synthesize run/ema --sigma-rel 0.05,0.06,...,0.25 --out averages/"
)


def synthesize(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory that the tracker wrote.")],
    sigma_rel: Annotated[
        str,
        typer.Option(
            help="Length of the average: a number, a list 0.05,0.10, a range 0.05:0.25:0.05 or 0.05,0.06,...,0.25."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="The output: a file; a folder for a file a target; or a name with {sigma_rel} in it."),
    ] = None,
    t: Annotated[
        float | None, typer.Option(help="The average as it stood at this training time. [default: the last]")
    ] = None,
    step: Annotated[int | None, typer.Option(help="The same in steps (calls of update_).")] = None,
    dtype: Annotated[
        str,
        typer.Option(help="float32, float16, bfloat16, float64 (or fp32, ...), or keep: each parameter's own."),
    ] = "keep",
    layout: Annotated[
        str | None,
        typer.Option("--format", help="safetensors, sharded (a folder) or pt. [default: what the output's name says]"),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="With --format sharded.")] = "5GB",
    device: Annotated[str, typer.Option(help="Where to make the sums: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    method: Annotated[str | None, typer.Option(help="The solver: paper. [default: paper]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that are there.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave outputs that are there as they are.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Coefficients, errors and sizes; read only headers, write nothing."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and warnings.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the coefficients too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the average of any length from snapshots.

    The snapshots are read once for all targets, each block is verified, and an output appears whole or not
    at all.
    """
    from posthoc_cli.snapshots.format import parse_dtype_word
    from posthoc_cli.synthesis import disk_sources, parse_device, plan_synthesis

    output.log_to_stderr(verbose)
    started = time.perf_counter()
    widths = parse_sigma_rels(sigma_rel)
    parse_dtype_word(dtype)
    if force and skip_existing:
        raise InvalidValueError("--force and --skip-existing: give one of them")
    if out is None and not dry_run:
        raise InvalidValueError("--out: where to write is missing; --dry-run needs no output")
    paths, folder = ([], None) if out is None or dry_run else output_paths(widths, out, layout)
    device = "cpu" if dry_run and device == "auto" else parse_device(device)
    plan = plan_synthesis(disk_sources(directory.expanduser()), widths, t, step, method)
    skipped = _existing(paths, layout) if skip_existing else set()
    wanted = [index for index in range(len(paths)) if index not in skipped]
    if wanted:
        from posthoc_cli.export import write_synthesis

        with output.progress_bar("synthesizing", plan.read_bytes, quiet) as progress:
            write_synthesis(
                plan.only(wanted),
                [paths[i] for i in wanted],
                layout,
                dtype,
                device,
                force,
                max_shard_size,
                progress,
                folder,
            )
    seconds = time.perf_counter() - started
    if as_json:
        output.print_json(_report(plan, paths, skipped, seconds))
    elif not quiet:
        _print_coefficients(plan) if verbose or (dry_run and len(widths) == 1) else None
        _print_targets(plan, paths, skipped, dtype, seconds)


def output_paths(widths: list[float], out: str, layout: str | None) -> tuple[list[Path], Path | None]:
    """Where each target goes, and the folder to be made for them, if one was named.

    The output may be a pattern to fill in, a file (for one target), or a folder that takes a file a target. With
    --format sharded a folder holds one model, so that several targets get a folder each within it.

    Raises:
        InvalidValueError: several targets, but the output is one file.
    """
    from posthoc_cli.export import layout_of

    if not out:
        raise InvalidValueError("--out: is empty; name a file, a folder, or a pattern with {sigma_rel}")
    if "{sigma_rel}" in out:
        return [Path(out.replace("{sigma_rel}", repr(width))).expanduser() for width in widths], None
    path = Path(out).expanduser()
    is_folder = path.is_dir() or path.suffix == "" or out.endswith("/")
    if len(widths) == 1 and (layout == "sharded" or not is_folder):
        return [path], None
    if not is_folder and path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        raise InvalidValueError(
            f"--out {out}: {len(widths)} targets need a folder, or a name with {{sigma_rel}} in it, such as "
            f"{path.stem}-{{sigma_rel}}{path.suffix}"
        )
    suffix = {"safetensors": ".safetensors", "pt": ".pt", "sharded": ""}[layout_of(Path("x.safetensors"), layout)]
    return [path / f"sigma_rel-{width!r}{suffix}" for width in widths], path


def _existing(paths: list[Path], layout: str | None) -> set[int]:
    from posthoc_cli.export import layout_of, output_exists

    return {i for i, path in enumerate(paths) if output_exists(path, layout_of(path, layout))}


# --- what is printed -------------------------------------------------------------------------------


def _report(plan: Plan, paths: list[Path], skipped: set[int], seconds: float) -> dict[str, Any]:
    targets = []
    for index in range(len(plan.sigma_rels)):
        info = plan.output_info(index)
        targets.append(
            {
                "sigma_rel": info.sigma_rel,
                "t": info.t,
                "method": info.method,
                "profile_error": info.profile_error,
                "predicted_error": info.predicted_error,
                "snapshots": [{"file": file, "coefficient": c} for file, c in info.snapshots],
                "output": str(paths[index]) if paths else None,
                "skipped": index in skipped,
                "seconds": seconds,
            }
        )
    return {"run": plan.newest.info.run_id, "targets": targets}


def _print_coefficients(plan: Plan) -> None:
    columns = ["snapshot", "t", "tracked", *(f"c({width:g})" for width in plan.sigma_rels)]
    rows = [
        [source.name, f"{source.info.t:,.12g}", f"{source.info.sigma_rel:g}", *(f"{c:+.6f}" for c in row)]
        for source, row in zip(plan.sources, plan.reconstruction.coefficients, strict=True)
    ]
    output.print_table(columns, rows, left=["snapshot"])
    output.print_line("")


def _print_targets(plan: Plan, paths: list[Path], skipped: set[int], dtype: str, seconds: float) -> None:
    size = sum(spec.nbytes for spec in plan.specs(dtype))
    if len(plan.sigma_rels) > 1:
        rows = [
            [
                f"{width:g}",
                output.percent(error),
                f"{paths[i]}{' (was there)' * (i in skipped)}" if paths else "-",
            ]
            for i, (width, error) in enumerate(zip(plan.sigma_rels, plan.reconstruction.profile_error, strict=True))
        ]
        output.print_table(["sigma_rel", "profile error", "output"], rows, left=["output"])
        output.print_line("")
    made = len(plan.sigma_rels) - len(skipped)
    single = len(plan.sigma_rels) == 1
    which = f"sigma_rel {plan.sigma_rels[0]:g}" if single else f"{made} average{'s' * (made != 1)}"
    worst = output.percent(float(plan.reconstruction.profile_error.max()))
    up_to, each = ("", "") if single else ("up to ", " each")
    what = f"{which} at t = {plan.t:,.12g} from {len(plan.sources)} snapshots, profile error {up_to}{worst}"
    if not paths:
        read = output.size_text(plan.read_bytes)
        output.print_line(f"would make {what}, {output.size_text(size)}{each}; would read {read}; nothing was written")
        return
    if len(skipped) == len(paths):
        output.print_line("every output is there already; nothing was written")
        return
    left_out = plan.newest.info.left_out
    if left_out:
        output.print_line(
            f"not tracked, and not in the output: {len(left_out)} of the model's tensors ({left_out[0]}, ...); "
            "ema export --base FULL.safetensors completes them"
        )
    target = paths[0] if single else paths[0].parent
    output.print_line(f"made {what}, {output.size_text(size)}{each}, in {seconds:.1f} s: {target}")


COMMAND = synthesize
