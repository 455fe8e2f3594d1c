"""`ema synthesize`: the average of any length, from the snapshots of a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from posthoc_cli import resources
from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError, percent
from posthoc_cli.report.facts import title_of
from posthoc_cli.targets import Groups

EPILOG = (
    "Example:  ema synthesize run/ema --sigma-rel 0.15 --out model.safetensors   or   "
    "ema synthesize run/ema --sigma-rel 0.05,0.06,...,0.25 --target beta:0.9999 --out averages/"
)


def synthesize(
    directory: str | None = options.DIRECTORY_OR_CHECKPOINTS,
    sigma_rel: str | None = options.SIGMA_REL,
    target: list[str] = options.TARGET,
    group: list[str] = options.TARGETS(
        [],
        metavar="GLOB=SIGMA_REL",
        help="The length for tensors whose names match a glob: 'unet.up.*=0.12'. Repeat for others, such as '*=0.08'; "
        "the first match counts.",
    ),
    out: str | None = options.OUTPUT(
        None,
        "--out",
        "-o",
        help="A file; a folder, for one file per target; or a name with {sigma_rel}, which becomes 0.15, or with "
        "{target}, which becomes sigma_rel-0.15, beta-0.9999, ...",
    ),
    dtype: options.Dtype = options.DTYPE,
    layout: options.Layout | None = options.LAYOUT,
    max_shard_size: str | None = options.MAX_SHARD_SIZE,
    like: Path | None = options.LIKE_MODEL,
    component: str | None = options.COMPONENT,
    overwrite: bool = options.OVERWRITE,
    skip_existing: bool = options.OUTPUT(
        False, "--skip-existing", help="Keep existing outputs of the same plan, verified."
    ),
    as_json: bool = options.JSON,
    checkpoints: str | None = options.CHECKPOINTS,
    t: float | None = options.TIME,
    step: str | None = options.STEP,
    dry_run: bool = options.HOW(
        False,
        "--dry-run",
        help="Show coefficients, errors and sizes; write nothing. Reads only headers, and a sample of tensors "
        "if headers lack measurements.",
    ),
    max_error: str | None = options.HOW(
        None, metavar="ERROR", show_default="warn at 1%", help="Fail if a predicted error exceeds this: 0.01, or 1%."
    ),
    method: options.Method | None = options.METHOD,
    device: str = options.HOW("auto", help="Where to compute the sums: auto, cpu, cuda, cuda:1, mps."),
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

    targets = options.parse_targets(sigma_rel, target)
    targets += [Groups(options.parse_groups(group))] if group else []
    run = options.open_run(directory, checkpoints)
    if not targets:
        kinds = "--sigma-rel 0.15, --target beta:0.9999 (`ema guide synthesis` lists the kinds) or --group '*=0.1'"
        raise InvalidValueError("no target", f"name at least one by {kinds}")
    report = run.write(
        targets, out, t=t, step=options.optional(options.parse_count, step, "--step"), method=method,
        max_error=options.optional(options.parse_max_error, max_error), dtype=dtype, layout=layout,
        max_shard_size=max_shard_size, device=device, overwrite=overwrite,
        skip_existing=skip_existing, dry_run=dry_run, distributed=is_rank(), like=like, component=component,
        progress=output.progress_bar(),
    )  # fmt: skip
    if report is not None:
        output.warn_of_statistics(report.plan.newest.info.copies)
        output.show(report.to_dict(), as_json, _print)


def _print(found: dict[str, Any]) -> None:
    targets = found["targets"]
    made = [target for target in targets if not target["skipped"]]
    if found["choice"] is not None:
        output.print_line(f"from {found['choice']}")
    if taken := found["from_model_folder"]:
        output.print_note(f"{_listed(taken)} copied from the model folder, since the run does not have them")
    elif found["left_out"] and made and made[0]["output"]:
        _note_left_out(found["left_out"], Path(made[0]["output"]))
    shown = ["predicted_error", *["profile_error"] * (targets[0]["method"] == "paper")]
    if len(targets) > 1:
        output.print_rows(_rows(targets), ["target", *shown, "output:file"])
        output.print_line()
    elif not targets[0]["output"]:
        output.print_coefficients(targets[0]["snapshots"])
        output.print_line()
    if not made:
        output.print_line("every output already exists; nothing was written")
        return
    one = made[0]
    what = one["target"] if len(targets) == 1 else output.counted(len(made), "average")
    worst = ", ".join(f"{title_of(key)} {_largest([target[key] for target in made])}" for key in shown)
    size = resources.size_text(one["bytes"]) + " each" * (len(targets) > 1)
    text = f"{what} at t = {one['t']:,.12g} from {found['sources']}, {worst}, {size}"
    if one["output"] is None:
        read = resources.size_text(found["read_bytes"])
        output.print_line(f"would make {text}; would read {read}; nothing was written")
    else:
        place = one["output"] if len(targets) == 1 else str(Path(one["output"]).parent)
        output.print_line(f"made {text}, in {one['seconds']:.1f} s: {'in this folder' if place == '.' else place}")


def _rows(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the targets with their outputs' names; the last line says the folder if it is the same for all."""
    paths = [Path(target["output"] or "-") for target in targets]
    one_folder = len({path.parent for path in paths}) == 1
    names = [path.name if one_folder else str(path) for path in paths]
    return [
        target | {"file": name + " (existed)" * target["skipped"]} for target, name in zip(targets, names, strict=True)
    ]


def _largest(errors: list[float | None]) -> str:
    """Return the largest of some errors as text."""
    if None in errors:
        return percent(None)
    return "up to " * (len(errors) > 1) + percent(max(filter(None, errors), default=0.0))


def _listed(names: list[str]) -> str:
    return f"{output.counted(len(names), 'tensor')} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


def _note_left_out(names: list[str], path: Path) -> None:
    """Print the names of the tensors that an output lacks, and the command that adds them."""
    file = path.with_suffix(".safetensors") if path.suffix in (".pt", ".pth", ".bin") else path
    before = "" if file == path else f"make {file.name} instead of {path.name}, then: "
    command = f"{before}ema export {shlex.quote(str(file))} --base FULL.safetensors --out NEW.safetensors"
    reason = "of the model, which the run does not track"
    output.print_note(f"the output lacks {_listed(names)} {reason}; to add it from a full model: {command}")
