"""The commands that make, choose or delete weights."""

from __future__ import annotations

import functools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument

from posthoc_cli import files, resources
from posthoc_cli.checkpoints import KINDS
from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError, check_alone, first_of, percent
from posthoc_cli.report.facts import title_of
from posthoc_cli.targets import RANGES, Groups, parse_numbers

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.import_run import Import
    from posthoc_cli.snapshots.prune import Pruning
    from posthoc_cli.sweep.search import Trial


def synthesize(
    directory: str = options.DIRECTORY_OR_CHECKPOINTS,
    sigma_rel: list[str] = options.SIGMA_REL,
    target: list[str] = options.TARGET,
    group: list[str] = options.TARGETS(
        [],
        metavar="GLOB=SIGMA_REL",
        help="The length of tensors by name: 'unet.up.*=0.12'. The first match counts.",
    ),
    out: str | None = options.OUTPUT(
        None, "--out", "-o", help="A file; or a folder, for a file per target."
    ),
    dtype: options.Dtype = options.DTYPE,
    layout: options.Layout | None = options.LAYOUT,
    max_shard_size: str | None = options.MAX_SHARD_SIZE,
    like: str | None = options.LIKE_MODEL,
    average: str | None = options.LIKE_AVERAGE,
    weights: bool = options.LIKE_WEIGHTS,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
    t: float | None = options.TIME,
    step: str | None = options.STEP,
    dry_run: bool = options.HOW(
        False, "--dry-run", help="Show coefficients, errors and sizes; write nothing."
    ),
    max_error: str | None = options.HOW(
        None,
        metavar="ERROR",
        show_default="warn at 1%",
        help="Fail if a predicted error exceeds this: 0.01, or 1%.",
    ),
    method: options.Method | None = options.METHOD,
    device: str = options.HOW(
        "auto", help="Where to compute the sums: auto, cpu, cuda, cuda:1, mps."
    ),
) -> None:
    """Make the average of any length from snapshots.

    Name one or more targets by --sigma-rel and --target. The snapshots are read once for all
    targets, each block is verified, and an output appears complete or not at all.

    The predicted error is the expected relative L2 distance of the weights from the true average.
    --method paper also shows the profile error: the distance between the target profile and the
    reconstructed one; --json shows both.

    DIR may also contain checkpoints, or averages of other libraries: see ema guide checkpoints.

    For one large model on many machines: torchrun -m posthoc_cli synthesize ... makes a folder of
    shards, of which each process writes some. If a job was killed, run it again.
    """
    from posthoc_cli.export.writing import is_rank

    targets = options.parse_targets(sigma_rel, target)
    if group:
        targets.append(Groups(options.parse_groups(group)))
    run = options.open_run(directory)
    if not targets:
        raise InvalidValueError("no target", _NO_TARGET)
    report = run.write(
        targets,
        out,
        t=t,
        step=options.optional(options.parse_count, step, "--step"),
        method=method,
        max_error=options.optional(options.parse_max_error, max_error),
        dtype=dtype,
        layout=layout,
        max_shard_size=max_shard_size,
        device=device,
        overwrite=overwrite,
        dry_run=dry_run,
        distributed=is_rank(),
        like=options.optional(options.existing, like),
        average=average,
        weights=weights,
        progress=output.progress_bar(),
    )
    if report is not None:
        output.warn_of_statistics(report.plan.newest.copies)
        output.show(report.to_dict(), as_json, _print_synthesize)


_NO_TARGET = (
    "name at least one by --sigma-rel 0.15, --target beta:0.9999 (`ema guide synthesis` lists the "
    "kinds) or --group '*=0.1'"
)


def _print_synthesize(report: dict[str, Any]) -> None:
    targets = report["targets"]
    first = targets[0]
    errors = ["predicted_error"]
    if first["method"] == "paper":
        errors.append("profile_error")
    _print_origin(report)
    if len(targets) > 1:
        rows = []
        for target in targets:
            path = Path(target["output"] or "-")  # all in one folder
            rows.append(target | {"file": path.name})
        output.print_rows(rows, ["target", *errors, "output:file"])
        output.print_line()
    elif not first["output"]:
        output.print_coefficients(first["snapshots"])
        output.print_line()
    text = _summary(report, errors)
    if first["output"] is None:
        read = resources.size_text(report["read_bytes"])
        output.print_line(f"would make {text}; would read {read}; nothing was written")
    else:
        path = Path(first["output"])
        written = path if len(targets) == 1 else path.parent
        where = "in this folder" if written == Path() else str(written)
        output.print_line(f"made {text}, in {first['seconds']:.1f} s: {where}")


def _print_origin(report: dict[str, Any]) -> None:
    """Print which snapshots were chosen, and what an output lacks or has from elsewhere."""
    path = report["targets"][0]["output"]
    if report["choice"] is not None:
        output.print_line(f"from {report['choice']}")
    if copied := report.get("like"):
        _note_copied(copied)
    elif report["left_out"] and path:
        _note_left_out(report["left_out"], Path(path))


def _summary(
    report: dict[str, Any],
    errors: list[str],
) -> str:
    """Return what was made of what, with the largest of each kind of error."""
    targets = report["targets"]
    first = targets[0]
    what = first["target"]
    size = resources.size_text(first["bytes"])
    if len(targets) > 1:
        what = output.counted(len(targets), "average")
        size += " each"
    parts = [f"{what} at t = {first['t']:,.12g} from {report['sources']}"]
    for key in errors:
        largest = _largest([target[key] for target in targets])
        parts.append(f"{title_of(key)} {largest}")
    return ", ".join([*parts, size])


def _largest(errors: list[float | None]) -> str:
    if None in errors:
        return percent(None)
    largest = percent(max(filter(None, errors), default=0.0))
    return f"up to {largest}" if len(errors) > 1 else largest


def _listed(names: list[str]) -> str:
    return f"{output.counted(len(names), 'tensor')} ({first_of(names, 3)})"


def _note_left_out(names: list[str], path: Path) -> None:
    """Print the names of the tensors that an output lacks, and the command that adds them."""
    file = path
    before = ""
    if path.suffix in (".pt", ".pth", ".bin"):
        file = path.with_suffix(".safetensors")
        before = f"make {file.name} instead of {path.name}, then: "
    quoted = shlex.quote(str(file))
    command = f"{before}ema export {quoted} --base FULL.safetensors --out NEW.safetensors"
    lacks = f"the output lacks {_listed(names)} of the model, which the run does not track"
    output.print_note(f"{lacks}; to add it from a full model: {command}")


def sweep(
    directory: str = options.DIRECTORY_OR_CHECKPOINTS,
    sigma_rel: str | None = options.TARGETS(
        None,
        show_default="all exact within 1 %",
        help="A range to search, 0.02:0.28, or a list to measure.",
    ),
    target: str | None = options.TARGETS(
        None,
        metavar="KIND:VALUE",
        help=f"Or of another kind: {RANGES}",
    ),
    command: str = options.HOW(
        ...,
        "--run",
        metavar="COMMAND",
        help=(
            "The evaluation, without a shell. {weights} becomes an average's file; also "
            "{sigma_rel}, {seed}, {dir}."
        ),
    ),
    metric: str | None = options.HOW(
        None,
        metavar="KEY",
        show_default="the last line that is a number",
        help=(
            "The word before it, as loss in loss: 2.67, or its key in a JSON object; or "
            "r.json:acc: acc of the newest r.json in {dir}."
        ),
    ),
    minimize: bool = options.HOW(False, "--minimize", help="Lower is better."),
    maximize: bool = options.HOW(False, "--maximize", help="Higher is better."),
    look: bool = options.HOW(
        False, "--look", help="No metric: only show the images of some lengths, side by side."
    ),
    repeats: int = options.HOW(
        1, metavar="COUNT", help="Trials of each length, with the seeds 0, 1, ..."
    ),
    budget: int = options.HOW(20, metavar="COUNT", help="The most lengths to measure."),
    out: str = options.OUTPUT(
        "sweep",
        "--out",
        "-o",
        help="Folder for trials, logs and the best average: new, or of an earlier sweep.",
    ),
    like: str | None = options.LIKE_MODEL,
    as_json: bool = options.JSON,
    images: str | None = options.OUTPUT(
        None,
        metavar="GLOB",
        show_default="png, jpg, webp, gif",
        help="The images in {dir} to keep, the newest 16 of each trial; or none.",
    ),
    t: float | None = options.TIME,
    raw: str | None = options.RUN(
        None, metavar="CHECKPOINT", help="The raw weights, to measure them too: last.pt."
    ),
) -> None:
    """Find the best length by your own metric, or by eye.

    Runs the command for averages of several lengths, one after another, and measures more lengths
    where the best may be, until it is known within the noise of the metric. It also prints the
    range that is equal within the noise.

    Images that the command writes to {dir} are kept, and a page shows them with a slider over the
    length. --look makes this page without a metric.

    A standard error next to the metric (acc_stderr) is used as its noise. A failed trial does not
    count; two in a row that fail alike end the sweep. The same call continues an earlier one. OUT
    receives trials.jsonl, sweep.json, logs, images, their page and the best average.
    """
    from posthoc_cli.report.page import render
    from posthoc_cli.sweep import Axis, Sweep
    from posthoc_cli.sweep.trials import Metric

    check_alone(minimize=minimize, maximize=maximize, look=look)
    if not (minimize or maximize or look):
        reason = "say whether lower or higher is better"
        hint = "add --minimize or --maximize; or --look, to compare images without a metric"
        raise InvalidValueError("--minimize", reason, hint)
    check_alone(look=look, metric=metric)
    check_alone(sigma_rel=sigma_rel, target=target)
    widths = options.optional(Axis.parse, sigma_rel, "--sigma-rel", "sigma_rel")
    axis = options.optional(Axis.parse, target, "--target") or widths
    folder = files.local_path("--out", out)
    run = options.open_run(directory)
    output.warn_of_statistics(run.sources[-1].copies)
    show = output.print_note if as_json else output.print_line

    def say(trial: Trial, number: int, expected: int) -> None:
        if trial.error is not None:
            _warn_of_failure(trial, folder)
        left = _time_left(trial.seconds * (expected - number))
        show(f"trial {number} of about {expected}: {_result(trial)}{left}")

    report = Sweep(
        run,
        command,
        Metric() if metric is None else Metric.parse(metric),
        folder,
        axis=axis,
        minimize=None if look else minimize,
        repeats=repeats,
        budget=budget,
        t=t,
        like=options.optional(options.existing, like),
        raw=options.optional(options.existing, raw),
        images=images,
        again=shlex.join(["ema", *sys.argv[1:]]),
        say=say,
        progress=output.progress_bar("trials"),
    ).run_all()
    if (folder / "images").is_dir():
        page = folder / "report.html"
        content = render(run, [folder], page)
        files.write_atomically(page, content.encode(), overwrite=True)
        report = replace(report, outputs=(*report.outputs, page))
    output.show(report.to_dict(), as_json, _print_sweep)


def _warn_of_failure(trial: Trial, out: Path) -> None:
    log = out / "logs" / f"{trial.name}.*"
    reason = f"{trial.target}, seed {trial.seed}: {trial.error}"
    output.print_note(f"ema: warning: {reason}; see {log}")


def _result(trial: Trial) -> str:
    title = f"{trial.target}, seed {trial.seed}"
    if trial.error is not None:
        return f"{title} failed"
    if trial.value is not None:
        title += f": {trial.value:.6g}"
    if trial.standard_error is not None:
        title += f" ± {trial.standard_error:.2g}"
    return f"{title} ({trial.seconds:.1f} s)"


def _time_left(seconds: float) -> str:
    if seconds < 1:
        return ""
    if seconds >= 120:
        return f", about {seconds / 60:.0f} min left"
    return f", about {seconds:.0f} s left"


def _print_sweep(report: dict[str, Any]) -> None:
    from posthoc_cli.sweep.search import answer

    texts = answer(report)
    pairs = [
        ("measured", texts["measured"]),
        ("wrote", ", ".join(report["outputs"])),
    ]
    if "best" in texts:
        if texts["raw"] == "not measured":
            texts["raw"] += ": the run lacks them; name their file by --raw"
        pairs = [
            ("best", texts["best"]),
            (texts["metric"], texts["value"]),
            ("raw weights", texts["raw"]),
            ("gain", texts["gain"]),
            ("estimate", texts["estimate"]),
            ("equal within the noise", texts["equal"]),
            *pairs,
        ]
    output.print_line()
    output.print_pairs([(name, text) for name, text in pairs if text])


def export(
    file: str = Argument(
        ...,
        metavar="FILE|DIR",
        help="An output of ema synthesize, a snapshot, or any safetensors file; a training's "
        "checkpoint, such as "
        "last.pt or a DCP folder; or a folder of shards or its index.",
    ),
    out: str = options.OUTPUT(
        ..., "--out", "-o", help="A .safetensors or .pt file, or a folder, for shards."
    ),
    dtype: options.Dtype = options.DTYPE,
    layout: options.Layout | None = options.LAYOUT,
    max_shard_size: str | None = options.MAX_SHARD_SIZE,
    like: str | None = options.LIKE_MODEL,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
    base: str | None = options.HOW(
        None, help="A full model (a file or folder), from which missing tensors are taken."
    ),
    weights: bool = options.HOW(
        False, "--weights", help="Take, or with --like replace, a checkpoint's raw weights."
    ),
    average: str | None = options.HOW(
        None,
        metavar="KEY",
        show_default="by its name",
        help="The key, prefix or glob of a checkpoint's average, that of --like if given.",
    ),
    prefix: str = options.HOW("", help="Put this in front of every name in FILE."),
    strip_prefix: str = options.HOW("", help="Remove this from the front of the names in FILE."),
) -> None:
    """Write averaged weights in another layout or dtype.

    Of a training's checkpoint, the average that it contains is written. Tensors can be renamed, and
    a full model can supply the tensors that were not tracked. --like writes them into a copy of a
    checkpoint, from which the training can go on.

    Layouts: one safetensors file; shards with an index, under the names that Hugging Face libraries
    expect (one file if all tensors fit into it); a .pt state dict for
    torch.load(weights_only=True).
    """
    from posthoc_cli.export.convert import export_file

    source = options.existing(file, name="FILE")
    report = export_file(
        source,
        out,
        layout,
        dtype,
        options.optional(options.existing, base),
        prefix,
        strip_prefix,
        overwrite,
        max_shard_size,
        weights,
        average,
        options.optional(options.existing, like),
        output.progress_bar(),
    )
    output.show(report.to_dict(), as_json, functools.partial(_print_export, base))


def _print_export(
    base: str | None,
    report: dict[str, Any],
) -> None:
    if copied := report.get("like"):
        _note_copied(copied)
    added = f", {report['from_base']} of them from {base}" if base is not None else ""
    size = resources.size_text(report["bytes"])
    output.print_line(
        f"wrote {report['tensors']} tensors{added}, {size}, in {report['seconds']:.1f} s: "
        f"{report['output']}"
    )


def _note_copied(copied: dict[str, Any]) -> None:
    """Print what a copy of a checkpoint has from the average, and what of the checkpoint."""
    name = Path(copied["path"]).resolve().name
    if copied["replaced"] == "average":
        output.print_note(f"replaced the average in {name}; its weights stay as they are")
    else:
        output.print_note(f"replaced the weights in {name}")
    if kept := copied["kept"]:
        output.print_note(f"kept {_listed(kept)} of {name}, which the run does not have")
    if shared := copied["shared"]:
        output.print_note(f"not written: {_listed(shared)}, of which {name} has the weights alone")
    if left_out := copied["left_out"]:
        output.print_note(f"not copied: {first_of(left_out)}")


def import_(
    directory: str = Argument(
        ..., metavar="DIR", help="The checkpoints or averages: a folder, a file or a glob."
    ),
    out: str | None = options.OUTPUT(
        None, "--out", "-o", metavar="RUN", help="The folder of the new run."
    ),
    kind: str | None = options.RUN(
        None,
        "--from",
        metavar="KIND",
        show_default="found by names and contents",
        help=f"What DIR contains: {', '.join(KINDS)}.",
    ),
    step_from: str | None = options.RUN(
        None,
        metavar="PATTERN",
        show_default="content or name",
        help=r"A pattern of the steps in names: 'step(\d+)'.",
    ),
    prefix: str = options.RUN(
        "", help="Take only tensors with this prefix, such as model., and remove it."
    ),
    include: list[str] = options.RUN(
        [], metavar="GLOB", help="Take only tensors with these names."
    ),
    exclude: list[str] = options.RUN(
        [], metavar="GLOB", help="Leave out tensors with these names."
    ),
    sigma_rels: str | None = options.RUN(
        None, help="Widths of the averages, by their numbers: 0.05,0.28."
    ),
    update_every: int | None = options.RUN(None, help="Steps between two updates of the averages."),
    update_after_step: int | None = options.RUN(
        None, show_default="the library's", help="Steps before the first update of the averages."
    ),
    ema_decay: str | None = options.RUN(
        None,
        metavar="DECAY",
        show_default="from the files, else by comparison",
        help=(
            "The decay of ordinary EMAs: 0.9999, half-life:500000, or half-life:5% of the "
            "training so far."
        ),
    ),
    ema_warmup: str | None = options.RUN(
        None,
        metavar="RULE",
        show_default="from the files, else by comparison",
        help=(
            "How it rises: ratio, power[:0.75], ramp-up (EDM), exp[:2000] (YOLO), unbiased, "
            "cosine[:0.996] or linear[:0.996] to 1 (DINO, I-JEPA); none."
        ),
    ),
    steps: int | None = options.RUN(
        None,
        show_default="the last checkpoint's",
        help="Steps of the whole training, after which cosine and linear are at 1.",
    ),
    ema_restarts: list[int] = options.RUN(
        [],
        metavar="STEP",
        show_default="by comparison",
        help="A step at which the EMAs began anew. Repeatable.",
    ),
    steps_per_epoch: int | None = options.RUN(
        None, help="Steps per epoch, for files whose numbers are epochs."
    ),
    first_epoch: int | None = options.RUN(
        None, show_default="by the numbers", help="The number of the first epoch: 0 or 1."
    ),
    average: str | None = options.RUN(
        None,
        metavar="KEY",
        show_default="by its name",
        help="The key or prefix of the average's tensors in the files.",
    ),
    weights: str | None = options.RUN(
        None,
        metavar="KEY",
        show_default="by its names",
        help="The key or prefix of the weights' tensors in the files.",
    ),
    overwrite: bool = options.OUTPUT(
        False,
        "--overwrite",
        "--force",
        "-f",
        help="Replace an import of other files, or with other settings.",
    ),
    dry_run: bool = options.OUTPUT(False, "--dry-run", help="Show what was found; write nothing."),
    as_json: bool = options.JSON,
) -> None:
    """Make a run of other programs' checkpoints.

    Needed if the files lack a setting, such as update_every: give it here once, and every command
    takes RUN, except prune and export.

    RUN is a manifest of a few kB that refers to the files by path: move both together. Repeat the
    call to take in what has changed in DIR.
    """
    from posthoc_cli.checkpoints.import_run import import_checkpoints

    report = import_checkpoints(
        options.open_path(directory).directory,
        out,
        overwrite=overwrite,
        dry_run=dry_run,
        kind=kind,
        step_from=step_from,
        prefix=prefix,
        include=include,
        exclude=exclude,
        sigma_rels=options.optional(parse_numbers, sigma_rels, "--sigma-rels") or (),
        update_every=update_every,
        update_after_step=update_after_step,
        ema_decay=options.optional(_parse_decay, ema_decay),
        ema_warmup=ema_warmup,
        steps=steps,
        ema_restarts=ema_restarts,
        steps_per_epoch=steps_per_epoch,
        first_epoch=first_epoch,
        average=average,
        weights=weights,
    )
    if as_json:
        output.print_json(report.to_dict())
    else:
        _print_import(report, dry_run)


def _print_import(report: Import, dry_run: bool) -> None:
    output.print_line(f"numbers are {report.numbers}")
    for what, count in report.counts.items():
        output.print_line(f"{count:,} x {what}")
    for check in report.checks:
        output.print_line(check)
    if report.written:
        output.print_line(f"wrote a run that refers to these files: {report.out}")
    elif dry_run:
        output.print_line("nothing was written")
    else:
        output.print_line(f"nothing was written: {report.out} is this import already")


def _parse_decay(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def prune(
    directory: str = options.DIRECTORY,
    keep: str | None = options.HOW(
        None, metavar="COUNT", help="Keep the snapshots of this number of times."
    ),
    max_error: str | None = options.HOW(
        None, metavar="ERROR", help="Or as few as keep the predicted errors below: 1e-3."
    ),
    yes: bool = options.HOW(False, "--yes", "-y", help="Do not ask."),
    dry_run: bool = options.HOW(
        False, "--dry-run", help="Show what would be deleted; delete nothing."
    ),
    sigma_range: str = options.SIGMA_RANGE,
    as_json: bool = options.JSON,
) -> int:
    """Delete the snapshots that matter least.

    Shows which snapshots would be deleted and the predicted error over the range without them, then
    asks. All snapshots of a time go, or none; the newest of each profile are kept. Deletes only
    after every remaining snapshot was read and verified, and never while a tracker writes to the
    directory; an interruption leaves a valid directory.
    """
    count = options.optional(options.parse_count, keep, "--keep", "20")
    can_ask = sys.stdin.isatty() and not as_json
    error = options.optional(options.parse_max_error, max_error)
    ends = options.parse_sigma_range(sigma_range)
    run = options.open_run(directory)

    def agree(planned: Pruning) -> bool:
        if not (yes or can_ask):
            reason = "is needed with --json, and without a terminal that could answer"
            raise InvalidValueError("--yes", reason, "--dry-run shows what would be deleted")
        if not as_json:
            _print_prune(planned.to_dict(), ends)
        what = output.counted(len(planned.to_delete), "snapshot")
        return yes or typer.confirm(f"delete {what} for good?", err=True)

    pruning = run.prune(
        keep=count,
        max_error=error,
        sigma_range=ends,
        dry_run=dry_run,
        agree=agree,
        progress=output.progress_bar(),
    )
    report = pruning.to_dict()
    if as_json:
        output.print_json(report)
    else:
        if dry_run or not report["gone"]:
            _print_prune(report, ends)
        _print_end(report, dry_run)
    return int(bool(report["gone"]) and not (report["deleted"] or dry_run))


def _print_prune(
    report: dict[str, Any],
    sigma_range: tuple[float, float],
) -> None:
    gone = report["gone"]
    kept = report["kept"]
    if gone:
        rows = sorted(gone, key=lambda snapshot: (snapshot["t"], snapshot["sigma_rel"]))
        output.print_rows(rows, ["to delete:file", "t", "sigma_rel", "size:bytes"])
        output.print_line()
    all_snapshots = {
        "when": "now",
        "count": len(kept) + len(gone),
        "bytes": report["bytes"] + report["gone_bytes"],
    }
    remaining = {"when": "afterwards", "count": len(kept), "bytes": report["bytes"]}
    columns = [":when", "snapshots:count", "size:bytes", "worst_error", "median_error"]
    output.print_rows([all_snapshots | report["before"], remaining | report["after"]], columns)
    low, high = sigma_range
    assumptions = {
        "assumed": ", if the network moves evenly",
        "sampled": ", from a sample of the weights",
    }
    basis = assumptions.get(report["prior"], "")
    output.print_line(f"predicted errors for sigma_rel {low:g} to {high:g}{basis}")


def _print_end(report: dict[str, Any], dry_run: bool) -> None:
    count = output.counted(len(report["gone"]), "snapshot")
    what = f"{count}, {resources.size_text(report['gone_bytes'])}"
    if not report["gone"]:
        output.print_line("nothing has to be deleted")
    elif report["deleted"]:
        output.print_line(f"deleted {what}; {len(report['kept'])} are left, verified")
    elif dry_run:
        output.print_line(f"would delete {what}; nothing was deleted")
    else:
        output.print_line("nothing was deleted")


def demo(
    out: str | None = options.OUTPUT(
        None,
        "--out",
        "-o",
        show_default="ema-demo, ema-demo-2, ...",
        help="The folder for all files of the demo; new, or empty.",
    ),
    as_json: bool = options.JSON,
    steps: str = options.HOW("6000", metavar="COUNT", help="Steps of training: a multiple of 100."),
) -> None:
    """Train a small diffusion model and choose its average.

    Takes less than a minute and downloads nothing. Trains with the hook on generated images,
    measures the validation loss of averages of many lengths, makes the best one, and draws
    pictures, samples and a page. Prints every command that it runs.
    """
    from posthoc_cli.demo import free_folder, run

    count = options.parse_count(steps, "--steps", "6000, 6e3 or 6K")
    say = output.print_note if as_json else output.print_line
    folder = free_folder() if out is None else files.local_path("--out", out)
    progress = output.progress_bar(unit="steps")
    output.show(run(folder, count, say, progress), as_json, _print_demo)


def _print_demo(results: dict[str, Any]) -> None:
    output.print_line()
    output.print_line("Which length is best? The loss on images that the training has not seen:")
    rows = [{"what": "raw weights", "loss": f"{results['raw']:.5f}", "versus": "", "mark": ""}]
    best = results["best"]
    losses = {}
    for average in results["averages"]:
        width = average["sigma_rel"]
        losses[width] = f"{average['loss']:.5f}"
        versus = f"{100 * (average['loss'] / results['raw'] - 1):+.2f} %"
        mark = "<- best" if width == best else ""
        rows.append({"what": f"{width:g}", "loss": losses[width], "versus": versus, "mark": mark})
    output.print_rows(rows, ["sigma_rel:what", "validation loss:loss", "vs raw:versus", ":mark"])
    low, high = results["equal_within_noise"]
    output.print_line(f"sigma_rel {low:g} to {high:g} are equal within the noise")
    tracked = " or ".join(f"{width:g}" for width in results["tracked"])
    plain = " or ".join(losses[width] for width in results["tracked"])
    output.print_line(f"a plain EMA of {tracked}: {plain}; yours, of {best:g}: {losses[best]}")
    _print_next_commands(Path(results["out"]), results["seconds"])


def _print_next_commands(out: Path, seconds: float) -> None:
    from posthoc_cli.demo import command_name

    output.print_line()
    output.print_line(f"done in {seconds:.0f} s. Open {out / 'report.html'}, and try:")
    mine = ["--sigma-rel", "0.13", "--out", out / "mine.safetensors"]
    schedule = ["--steps", "100000", "--params", "100K", "--disk", "10MB"]
    for words in (
        ["synthesize", out / "snapshots", *mine],
        ["info", out / "best.safetensors"],
        ["plan", *schedule, "--out", out / "plan.png"],
    ):
        line = shlex.join([command_name(), *map(str, words)])
        output.print_line(f"  {line}")
