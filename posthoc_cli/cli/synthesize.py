"""`ema synthesize`: the average of any length, from the snapshots of a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from posthoc_cli import resources
from posthoc_cli.cli import output, values
from posthoc_cli.errors import InvalidValueError, percent
from posthoc_cli.targets import Groups, separate

if TYPE_CHECKING:
    from posthoc_cli.export.writing import SynthesisReport
    from posthoc_cli.synthesis.plan import Plan

EPILOG = (
    "Example:  ema synthesize run/ema --sigma-rel 0.15 --out model.safetensors   or   "
    "ema synthesize run/ema --sigma-rel 0.05,0.06,...,0.25 --target beta:0.9999 --out averages/"
)


def synthesize(
    directory: Path | None = values.DIRECTORY_OR_CHECKPOINTS,
    sigma_rel: str | None = values.SIGMA_REL,
    target: list[str] = values.TARGET,
    group: list[str] = values.TARGETS(
        [],
        metavar="GLOB=SIGMA_REL",
        help="The length for tensors whose names match a glob: 'unet.up.*=0.12'. Repeat for others, such as '*=0.08'; "
        "the first match counts.",
    ),
    out: str | None = values.OUTPUT(
        None,
        "--out",
        "-o",
        help="A file; a folder, for one file per target; or a name with {sigma_rel}, which becomes 0.15, or with "
        "{target}, which becomes sigma_rel-0.15, beta-0.9999, ...",
    ),
    dtype: values.Dtype = values.DTYPE,
    layout: values.Layout | None = values.LAYOUT,
    max_shard_size: str | None = values.MAX_SHARD_SIZE,
    like: Path | None = values.LIKE_MODEL,
    component: str | None = values.COMPONENT,
    overwrite: bool = values.OVERWRITE,
    skip_existing: bool = values.flag(
        values.OUTPUT, "--skip-existing", help="Keep existing outputs of the same plan, verified."
    ),
    as_json: bool = values.JSON,
    checkpoints: str | None = values.CHECKPOINTS,
    t: float | None = values.TIME,
    step: str | None = values.STEP,
    dry_run: bool = values.flag(
        values.HOW,
        "--dry-run",
        help="Show coefficients, errors and sizes; write nothing. Reads only headers, and a sample of tensors "
        "if headers lack measurements.",
    ),
    max_error: str | None = values.HOW(
        None, metavar="ERROR", show_default="warn at 1%", help="Fail if a predicted error exceeds this: 0.01, or 1%."
    ),
    method: values.Method | None = values.METHOD,
    device: str = values.HOW("auto", help="Where to compute the sums: auto, cpu, cuda, cuda:1, mps."),
) -> None:
    """Make the average of any length from snapshots.

    Name one or more targets by --sigma-rel and --target. The snapshots are read once for all targets, each block is
    verified, and an output appears complete or not at all.

    The predicted error is the expected relative L2 distance of the weights from the true average. --method paper also
    shows the profile error: the distance between the target profile and the reconstructed one; --json shows both.

    DIR may also contain checkpoints, or averages of other libraries: see ema guide checkpoints.

    For one large model on many machines: torchrun -m posthoc_cli synthesize ... makes a folder of shards, of which each
    process writes some. If a job was killed, run it again.
    """
    from posthoc_cli.export.writing import is_rank

    targets = values.parse_targets(sigma_rel, target)
    targets += [Groups(values.parse_groups(group))] if group else []
    run = values.open_run(directory, checkpoints)
    if not targets:
        kinds = "--sigma-rel 0.15, --target beta:0.9999 (`ema guide synthesis` lists the kinds) or --group '*=0.1'"
        raise InvalidValueError("no target", f"name at least one by {kinds}")
    report = run.write(
        targets, out, t=t, step=values.optional(values.parse_count, step, "--step"), method=method,
        max_error=values.optional(values.parse_max_error, max_error), dtype=dtype, layout=layout,
        max_shard_size=max_shard_size, device=device, overwrite=overwrite,
        skip_existing=skip_existing, dry_run=dry_run, distributed=is_rank(), like=like, component=component,
        progress=output.progress_bar(),
    )  # fmt: skip
    if report is not None:
        output.warn_of_statistics(report.plan.newest.info.copies)
        output.print_report(report, as_json, _print)


def _print(report: SynthesisReport) -> None:
    plan = report.plan
    if plan.choice is not None:
        output.print_line(f"from {plan.choice}")
    made = [index for index in range(len(plan.targets)) if index not in report.existing]
    if report.taken:
        names = ", ".join(report.taken[:3]) + ", ..." * (len(report.taken) > 3)
        count = output.counted(len(report.taken), "tensor")
        output.print_note(f"{count} copied from the model folder, since the run does not have them: {names}")
    elif report.outputs and made:
        _note_left_out(plan, report.outputs[made[0]])
    if not report.outputs and len(plan.targets) == 1:
        _print_coefficients(plan)
    errors = {"predicted error": [plan.predicted_error(index) for index in range(len(plan.targets))]}
    if plan.method == "paper":
        errors["profile error"] = [plan.profile_error(index) for index in range(len(plan.targets))]
    if len(plan.targets) > 1:
        _print_table(report, errors)
    if made:
        output.print_line(_made_text(report, made, errors))
    else:
        output.print_line("every output already exists; nothing was written")


def _print_coefficients(plan: Plan) -> None:
    """Print the snapshots with the largest coefficients, by time."""
    from posthoc_cli.profiles import Point
    from posthoc_cli.snapshots.sources import kind_of

    for target, column in zip(separate(plan.targets), plan.reconstruction.coefficients.T.tolist(), strict=True):
        rows = []
        for source, value in zip(plan.sources, column, strict=True):
            kind = "weights" if isinstance(source.profile, Point) else "EMA"
            tracked = f"{source.info.sigma_rel:g}" if source.info.sigma_rel else kind
            rows.append([source.name, f"{source.info.t:,.12g}", tracked, f"{value:+.6f}"])
        output.print_largest([kind_of(plan.sources[0]), "t", "tracked", f"c({target.label})"], rows, column)
        output.print_line()


def _print_table(report: SynthesisReport, errors: dict[str, list[float | None]]) -> None:
    paths = report.outputs
    one_folder = len({path.parent for path in paths}) == 1  # the last line names it
    rows = []
    for index, target in enumerate(report.plan.targets):
        path = "-" if not paths else paths[index].name if one_folder else str(paths[index])
        cells = [percent(values[index]) for values in errors.values()]
        rows.append([target.title, *cells, path + " (existed)" * (index in report.existing)])
    output.print_table(["target", *errors, "output"], rows, left=["target", "output"])
    output.print_line()


def _made_text(report: SynthesisReport, made: list[int], errors: dict[str, list[float | None]]) -> str:
    """Return the last line: what was made (or would be), from what, how exact, how large, and where."""
    from posthoc_cli.snapshots.sources import counted, kind_of

    plan, paths = report.plan, report.outputs
    single = len(plan.targets) == 1
    averages = plan.targets[0].title if single else output.counted(len(made), "average")
    size = resources.size_text(plan.nbytes) + " each" * (not single)
    count = counted(plan.sources)
    later = "" if plan.last == plan.t else f" (the newest {kind_of(plan.newest)} is of {plan.last:,.12g})"
    worst = [f"{name} {_largest_text([values[index] for index in made])}" for name, values in errors.items()]
    text = f"{averages} at t = {plan.t:,.12g} from {count}{later}, {', '.join(worst)}, {size}"
    if not paths:
        return f"would make {text}; would read {resources.size_text(plan.read_bytes)}; nothing was written"
    place = str(paths[0] if single else paths[0].parent)
    return f"made {text}, in {report.seconds:.1f} s: {'in this folder' if place == '.' else place}"


def _largest_text(errors: list[float | None]) -> str:
    """Return the largest of some errors as text."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return percent(None)
    return "up to " * (len(known) > 1) + percent(max(known))


def _note_left_out(plan: Plan, path: Path) -> None:
    """Print the names of the tensors that an output lacks, and the command that adds them."""
    left_out = [name for name in plan.newest.info.left_out if not name.endswith("_extra_state")]
    if not left_out:
        return
    names = ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3)
    file = path.with_suffix(".safetensors") if path.suffix in (".pt", ".pth", ".bin") else path
    before = "" if file == path else f"make {file.name} instead of {path.name}, then: "
    command = f"{before}ema export {shlex.quote(str(file))} --base FULL.safetensors --out NEW.safetensors"
    reason = f"are not in the output, since the run does not track them ({names})"
    output.print_note(f"{len(left_out)} of the model's tensors {reason}; to add them from a full model: {command}")
