"""`ema synthesize`: the average of any length, from the snapshots of a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posthoc_cli.cli import output, spread
from posthoc_cli.cli.values import (
    DTYPE_WORDS,
    LAYOUT_WORDS,
    BetaOption,
    BetweenOption,
    MethodOption,
    ProfileOption,
    WindowOption,
    check_folder,
    existing_directory,
    parse_count,
    parse_max_error,
    parse_targets,
)
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import InvalidValueError

if TYPE_CHECKING:
    from posthoc_cli.export.job import SynthesisReport
    from posthoc_cli.synthesis.plan import Plan

EPILOG = (
    "Example:  ema synthesize run/ema --sigma-rel 0.15 --out model.safetensors   or   "
    "ema synthesize run/ema --sigma-rel 0.05,0.06,...,0.25 --beta 0.9999 --out averages/"
)


def synthesize(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory that the tracker wrote.")],
    sigma_rel: Annotated[
        str | None,
        typer.Option(
            help="Length of the average: a number, a list 0.05,0.10, a range 0.05:0.25:0.05 or 0.05,0.06,...,0.25."
        ),
    ] = None,
    beta: BetaOption = None,
    window: WindowOption = None,
    between: BetweenOption = None,
    profile: ProfileOption = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="The output: a file; a folder for a file a target; or a name with {sigma_rel} in it, or {target}, "
            "which any target fills in (sigma_rel-0.15, beta-0.9999, ...).",
        ),
    ] = None,
    t: Annotated[
        float | None, typer.Option(help="The average as it stood at this training time. [default: the last]")
    ] = None,
    step: Annotated[
        str | None, typer.Option(metavar="COUNT", help="The same in steps (calls of update_): 50000, 5e4, 50K.")
    ] = None,
    max_error: Annotated[
        str | None,
        typer.Option(
            metavar="ERROR", help="Make nothing if a predicted error is above this: 0.01, or 1%. [default: warn at 1%]"
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            autocompletion=DTYPE_WORDS,
            help="float32, float16, bfloat16, float64 (or fp32, ...), or keep: each parameter's own.",
        ),
    ] = "keep",
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            autocompletion=LAYOUT_WORDS,
            help="safetensors, sharded (a folder) or pt. [default: what the output's name says]",
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="With --format sharded.")] = "5GB",
    device: Annotated[str, typer.Option(help="Where to make the sums: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    accumulate: Annotated[
        str | None,
        typer.Option(
            help="dtype of the sums: float32 or float64. [default: float64 for averages in float32 or float64]"
        ),
    ] = None,
    method: MethodOption = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Make part K of N only, a shard in the folder --out; other processes make the others, in any order. "
            "A part that is there, whole and of the same plan, is left as it is.",
        ),
    ] = None,
    finish: Annotated[
        bool,
        typer.Option("--finish", help="Verify the parts that --shard has made, and write the index: a whole model."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that are there.")] = False,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Leave outputs that are there, whole and of the same plan, as they are."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Coefficients, errors and sizes; read headers, and a sample where they hold no measurements; write "
            "nothing.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and warnings.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print coefficients and profile errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the average of any length from snapshots.

    Name one target or several, of any kind: --sigma-rel, --beta, --window, --between, --profile. The snapshots are
    read once for all targets, each block is verified, and an output appears whole or not at all.

    The predicted error is the expected relative L2 distance of the weights from the true average. The profile error,
    shown with --verbose or --method paper, is that of the profile.

    One large model on many machines: --shard 1/8 to --shard 8/8 in any processes, then --finish. Under torchrun
    the processes do both by themselves. The output is then a folder of shards.
    """
    output.log_to_stderr(verbose)
    targets = parse_targets(sigma_rel, beta, window, between, profile)
    if not targets:
        raise InvalidValueError(
            "no target",
            "name one or several by --sigma-rel 0.15, --beta 0.9999, --window 1000, --between "
            "50000:80000 or --profile FILE",
        )
    at_step = None if step is None else parse_count(step, "--step")
    accepted = None if max_error is None else parse_max_error(max_error)
    parse_dtype(dtype)
    if force and skip_existing:
        raise InvalidValueError("--force and --skip-existing", "give one of them")
    if out is None and (finish or not dry_run):
        missing = "where the parts are is missing" if finish else "where to write is missing; --dry-run needs no output"
        raise InvalidValueError("--out", missing)
    mode = spread.parse_mode(shard, finish, skip_existing)
    layout = spread.layout_of(mode, out, layout)
    # These load torch: not before wrong options are refused.
    from posthoc_cli.export.job import Synthesis
    from posthoc_cli.export.outputs import output_paths

    paths, folder = ([], None) if out is None or dry_run else output_paths(targets, out, layout)
    for path in paths if folder is None else [folder]:
        check_folder(path, "--out")
    report = Synthesis(
        existing_directory(directory), tuple(targets), out, t, at_step, method, accepted, dtype, layout,
        max_shard_size, device, accumulate, force, skip_existing, dry_run, shard, finish, mode.kind == "rank",
        lambda what, total: output.progress_bar(what, total, quiet, verbose),
    ).run()  # fmt: skip
    if report is None:
        return
    if as_json:
        output.print_json(report.to_dict())
    elif not quiet and report.parts is not None:
        _print_coefficients(report.plan, verbose) if verbose else None
        output.print_line(spread.text(report, dry_run))
    elif not quiet:
        _print_report(report, dry_run, verbose)


def _print_report(report: SynthesisReport, dry_run: bool, verbose: bool) -> None:
    plan, paths, skipped = report.plan, list(report.outputs), set(report.existing)
    if plan.aside:
        output.print_note(
            f"{plan.aside} snapshots are not used: they are of the time when the model had other tensors than at "
            f"t = {plan.t:,.12g}"
        )
    if plan.choice is not None:
        output.print_line(f"from {plan.choice}")
    made = [path for index, path in enumerate(paths) if index not in skipped]
    if made:
        _note_left_out(plan, made[0])
    _print_coefficients(plan, verbose) if verbose or (dry_run and len(plan.targets) == 1) else None
    _print_targets(plan, paths, skipped, report.seconds, verbose or plan.method == "paper")


# --- what is printed -------------------------------------------------------------------------------


def _print_coefficients(plan: Plan, verbose: bool) -> None:
    """Each target's snapshots by time: all, or those with the largest coefficients."""
    for target, column in zip(plan.targets, plan.reconstruction.coefficients.T, strict=True):
        chosen = _largest(column.tolist(), len(column) if verbose else output.MOST_ROWS)
        rows = [
            [source.name, f"{source.info.t:,.12g}", f"{source.info.sigma_rel:g}", f"{column[index]:+.6f}"]
            for index, source in ((index, plan.sources[index]) for index in chosen)
        ]
        output.print_table(["snapshot", "t", "tracked", f"c({target.label})"], rows, left=["snapshot"])
        if len(chosen) < len(column):
            output.print_line(f"and {len(column) - len(chosen):,} with smaller coefficients; --verbose lists them")
        output.print_line("")


def _largest(values: Sequence[float], count: int) -> list[int]:
    """Where the values of the largest size are: indices, growing."""
    return sorted(sorted(range(len(values)), key=lambda index: -abs(values[index]))[:count])


def _print_targets(plan: Plan, paths: list[Path], skipped: set[int], seconds: float, profile_error: bool) -> None:
    single = len(plan.targets) == 1
    if not single:
        _print_table(plan, paths, skipped, profile_error)
    if paths and len(skipped) == len(paths):
        output.print_line("every output is there already; nothing was written")
        return
    made = [index for index in range(len(plan.targets)) if index not in skipped]
    which = plan.targets[0].title if single else f"{len(made)} average{'s' * (len(made) != 1)}"
    size = output.size_text(sum(spec.nbytes for spec in plan.specs())) + " each" * (not single)
    count = f"{len(plan.sources)} snapshot{'s' * (len(plan.sources) != 1)}"
    newest = f"training time of the newest snapshot: {plan.last:,.12g}"
    errors = _errors_text(plan, made, profile_error)
    what = f"{which} at t = {plan.t:,.12g} from {count}, {newest}, {errors}, {size}"
    if not paths:
        read = output.size_text(plan.read_bytes)
        output.print_line(f"would make {what}; would read {read}; nothing was written")
        return
    where = str(paths[0] if single else paths[0].parent)
    output.print_line(f"made {what}, in {seconds:.1f} s: {'in this folder' if where == '.' else where}")


def _note_left_out(plan: Plan, path: Path) -> None:
    """Say what an output lacks, and the command that completes it."""
    left_out = [name for name in plan.newest.info.left_out if not name.endswith("_extra_state")]
    if not left_out:
        return
    shown = ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3)
    file = path.with_suffix(".safetensors") if path.suffix in (".pt", ".pth", ".bin") else path
    how = "" if file == path else f"make {file.name} and not {path.name}, then: "
    command = f"{how}ema export {shlex.quote(str(file))} --base FULL.safetensors --out NEW.safetensors"
    output.print_note(
        f"{len(left_out)} of the model's tensors are not in the output, since the run does not track them ({shown}); "
        f"to add them from a full model: {command}"
    )


def _print_table(plan: Plan, paths: list[Path], skipped: set[int], profile_error: bool) -> None:
    beside = len({path.parent for path in paths}) == 1  # the last line names their folder
    rows = []
    for index, target in enumerate(plan.targets):
        errors = [plan.predicted_error(index)]
        errors += [float(plan.reconstruction.profile_error[index])] if profile_error else []
        path = "-" if not paths else paths[index].name if beside else str(paths[index])
        rows.append([target.title, *map(output.percent, errors), path + " (was there)" * (index in skipped)])
    names = ["predicted error", *(["profile error"] if profile_error else [])]
    output.print_table(["target", *names, "output"], rows, left=["target", "output"])
    output.print_line("")


def _errors_text(plan: Plan, made: list[int], profile_error: bool) -> str:
    """The error of what is made, the largest where it is several, and that of the profile."""
    up_to = "up to " if len(made) > 1 else ""
    predicted = [plan.predicted_error(index) for index in made]
    known = [error for error in predicted if error is not None]
    text = f"predicted error {up_to if len(known) == len(made) else ''}"
    text += output.percent(max(known) if len(known) == len(made) else None)
    if not profile_error:
        return text
    return f"{text}, profile error {up_to}{output.percent(float(plan.reconstruction.profile_error[made].max()))}"


COMMAND = synthesize
