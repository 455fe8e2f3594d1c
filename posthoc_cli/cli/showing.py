"""The commands that describe, compare and check, and write nothing but pictures and pages."""

from __future__ import annotations

import importlib.resources
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument

from posthoc_cli import files, resources
from posthoc_cli.cli import options, output
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    PostHocError,
    check_alone,
    check_word,
)
from posthoc_cli.planning import ErrorCurve, listed
from posthoc_cli.report.facts import facts
from posthoc_cli.targets import bad, parse_numbers, parse_targets

if TYPE_CHECKING:
    from posthoc_cli.snapshots.verify import Verification


def info(
    path: str = Argument(
        ...,
        metavar="DIR|FILE",
        help="Snapshots, outputs, checkpoints, a model in shards or its index, or one file.",
    ),
    as_json: bool = options.JSON,
) -> int:
    """Show what a directory or a file contains.

    Reads headers only. Exit code 1 if a directory has a problem, such as mixed runs or damaged
    headers. ema verify checks every byte.
    """
    report = options.open_run(path, directory=False).info()
    output.show(report, as_json, _print_info)
    return int(bool(report.get("problems")))


def _print_info(report: dict[str, Any]) -> None:
    output.print_pairs(facts(report))
    if profiles := report.get("profiles"):
        rows = []
        for profile in profiles:
            times = profile["times"]
            ends = {"count": len(times), "first": times[0], "last": times[-1]}
            rows.append(profile | ends)
        columns = [
            "sigma_rel",
            "snapshots:count",
            "first t:first",
            "last t:last",
            "rounding:relative_rounding_range",
            "size:bytes",
        ]
        output.print_line()
        output.print_rows(rows, columns)
    if checkpoints := report.get("checkpoints"):
        output.print_some(checkpoints, ["checkpoint:file", "t", "holds", "size:bytes"])
    if outputs := report.get("outputs"):
        rows = []
        for row in outputs:
            name = Path(row["path"]).name
            rows.append({"profile": row["kind"]} | row | {"name": name})
        output.print_some(rows, ["output:name", "profile", "t", "predicted_error", "size:bytes"])
    if report["kind"] == "output":
        output.print_line()
        output.print_coefficients(report["snapshots"])
    for kind in ("note", "problem"):
        for text in report.get(f"{kind}s", ()):
            output.print_line(f"{kind}: {text}")


def verify(
    paths: list[str] = Argument(
        ..., metavar="DIR|FILE", help="Directories or files: snapshots, outputs, parts or shards."
    ),
    as_json: bool = options.JSON,
) -> int:
    """Check every byte of snapshots and outputs.

    Reads all files and checks checksums, headers against contents, and that all files belong to one
    run. Exit code 1 if anything is wrong. Files of other programs have no checksums: only their
    structure is checked.

    Move a broken snapshot out of its directory: the others work without it.
    """
    reports: list[dict[str, Any]] = []
    code = 0
    for path in paths:
        try:
            check = _checked(options.existing(path, name="DIR|FILE"))
        except PostHocError as error:
            if len(paths) == 1:
                raise
            output.print_note(f"ema: error: {error}")
            code = max(code, error.exit_code)
            continue
        reports.append(check.to_dict())
        if not check.is_fine:
            code = max(code, 1)
        if not as_json:
            if len(paths) > 1:  # files are named relative to their path
                if len(reports) > 1:
                    output.print_line()
                output.print_line(f"{check.path}:")
            _print_verify(reports[-1])
    if as_json:
        output.print_json(
            reports[0] if len(reports) == 1 else {"kind": "several", "paths": reports}
        )
    return code


def _checked(path: Path) -> Verification:
    from posthoc_cli.run import Run

    try:
        return Run(path).check(output.progress_bar())
    except DirectoryError:
        options.check_not_above_run(path)
        raise


def _print_verify(report: dict[str, Any]) -> None:
    fine = [file for file in report["files"] if file["state"] in ("intact", "unchecked")]
    wrong = [file for file in report["files"] if file not in fine]
    if len(fine) > output.MOST_ROWS:
        output.print_line(
            f"{output.counted(len(fine), 'file')} with nothing wrong; --json lists them"
        )
    elif fine:
        output.print_rows(fine, ["file:path", "what", "state"])
    for file in wrong:
        detail = file["detail"]
        if not detail.startswith(file["state"]):
            detail = f"{file['state']}: {detail}".removesuffix(": ")
        output.print_line(f"{file['path']}: {file['what']}: {detail}")
    for name in report["leftovers"]:
        output.print_line(f"{name}: left by an interrupted write, or by one in progress")
    if report["files"] or report["leftovers"]:
        output.print_line()
    for kind in ("note", "problem"):
        for text in report[f"{kind}s"]:
            output.print_line(f"{kind}: {text}")
    output.print_line(_verdict(report, wrong))


def _verdict(
    report: dict[str, Any],
    wrong: list[dict[str, Any]],
) -> str:
    """Return the last line: how many files are intact, or which are not."""
    files = report["files"]
    total = output.counted(len(files), "file")
    if wrong:
        states = {file["state"] for file in wrong}
        verdict = states.pop() if len(states) == 1 else "not in order"
        verb = "is" if len(wrong) == 1 else "are"
        return f"{len(wrong):,} of {total} {verb} {verdict}"
    unchecked = sum(file["state"] == "unchecked" for file in files)
    if report["bytes"]:
        size = resources.size_text(report["bytes"])
        verb = "read" if unchecked else "verified"
        total += f", {size} {verb} in {report['seconds']:.1f} s"
    if not unchecked:
        return f"{total}: all intact"
    return f"{total}: {len(files) - unchecked:,} intact, {unchecked:,} without checksums"


def audit(
    directory: str = Argument(
        ..., metavar="DIR", help="Checkpoints with an average and the weights."
    ),
    claimed: float | None = options.RUN(
        None,
        metavar="DECAY",
        show_default="from the files or the import",
        help="The decay that it should have.",
    ),
    out: str | None = options.PICTURE,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
) -> int:
    """Find which decay an average really has.

    Compares averages with the weights in the same checkpoints, from one to the next, on a sample of
    100,000 elements. Shows the decay of each interval, and what is wrong: an average that is too
    long or too short, as if updated once a microbatch, does not move, or began again at a resume.

    Exit code 1 if an average is not what it claims to be.
    """
    picture = options.new_picture(out, overwrite)
    audits = options.open_path(directory).audit(claimed)
    report = {"audits": [audit.to_dict() for audit in audits]}
    if not audits[0].intervals:
        picture = None  # there is nothing to draw
    if picture is not None:
        from posthoc_cli import plots

        output.write_picture(lambda: plots.audit_figure(report["audits"][0]), picture, overwrite)
    output.show(report, as_json, _print_audits, picture)
    return int(any(audit.is_bad for audit in audits))


def _print_audits(report: dict[str, Any]) -> None:
    for audit in report["audits"]:
        _print_audit(audit)


def _print_audit(audit: dict[str, Any]) -> None:
    name = audit["name"]
    claim = [] if audit["claimed"] is None else ["claimed", "ratio"]
    rows = list(map(_audit_row, audit["intervals"]))
    if rows:
        of = f" of {name}" if name else ""
        title = f"sigma_rel found{of}"
        if audit["what"] == "decay":
            title = f"time constant{of}, in steps, by interval"
        output.print_line(title)
        output.print_rows(rows, ["from:begin", "to:end", "found", *claim, "unexplained", "note"])
        output.print_line()
    text = audit["text"]
    if not text.endswith(audit["verdict"]):
        text = f"{audit['verdict']}: {text}"
    output.print_line(f"{name}: {text}" if name else text)


def _audit_row(interval: dict[str, Any]) -> dict[str, Any]:
    """Return the row of one interval, with rounded lengths and their ratio."""
    length = interval["found"]
    claimed = interval["claimed"]
    row = {key: "-" if value is None else value for key, value in interval.items()}
    row["found"] = "-" if length is None else f"{length:,.4g}"
    row["claimed"] = "" if claimed is None else f"{claimed:,.4g}"
    if length is not None and claimed is not None:
        row["ratio"] = f"{length / claimed:.3g}"
    return row


def report(
    directories: list[str] = Argument(
        ..., metavar="DIR", help="A directory of snapshots or of checkpoints; several are compared."
    ),
    sweep: list[Path] = options.RUN(
        [], metavar="DIR", help="The folder that ema sweep has written for such a run. Repeatable."
    ),
    out: str = options.OUTPUT("report.html", "--out", "-o", help="The page."),
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
) -> None:
    """Make a page about a run and its best length.

    Writes one HTML file that needs no network: what the run is, the metric against the length with
    its noise, how exact each length is, all trials, and the commands to repeat them. Several runs
    or sweeps are compared.
    """
    from posthoc_cli.report.page import render

    page = files.new_file(out, (".html",), overwrite)
    runs = list(map(options.open_run, directories))
    folders = [files.expanded(folder) for folder in sweep]
    # a name that is not valid text holds lone surrogates
    text = render(runs, folders, page).encode(errors="backslashreplace")
    files.write_atomically(page, text, overwrite)
    output.show({"output": str(page), "bytes": len(text)}, as_json, lambda _: None, page)


def error_plot(
    directories: list[str] = Argument(
        ...,
        metavar="DIR",
        help="Directories of snapshots or of checkpoints, or globs of checkpoints.",
    ),
    out: str | None = options.PICTURE,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
    target: list[str] = options.TARGETS(
        [], metavar="TARGET", help="Also this average: window:1000. Repeatable."
    ),
    sigma_range: str = options.TARGETS(
        "0.01:0.2886", metavar="LOW:HIGH", help="The curve's range of sigma_rel."
    ),
    t: float | None = options.TIME,
    method: options.Method | None = options.METHOD,
) -> None:
    """Draw how exact averages of any length will be.

    The curve is the predicted error: the expected relative L2 distance of the weights from the true
    average. Tracked profiles are marked; the range below 1 % is shaded and named in the title.
    --method paper adds the profile error, the published measure: the relative L2 distance between
    the target profile and the reconstructed one.

    ema plan draws the same curve before a training.
    """
    from posthoc_cli import plots

    if out is None and not as_json:
        raise InvalidValueError("--out", "name a picture (.png, .svg, .pdf), or add --json")
    picture = options.new_picture(out, overwrite)
    targets = options.parse_targets([], target)
    ends = options.parse_sigma_range(sigma_range)
    runs = list(map(options.open_run, directories))
    curves = [run.error_curve(ends, t=t, method=method, others=targets) for run in runs]
    if picture is not None:
        output.write_picture(
            lambda: plots.error_figure(curves, method == "paper"), picture, overwrite
        )
    report = {"curves": [curve.to_dict() for curve in curves]}
    output.show(report, as_json, lambda _: _print_curves(curves, method == "paper"), picture)


def _print_curves(curves: Sequence[ErrorCurve], is_paper: bool) -> None:
    columns = ["  target:target", "width", "predicted_error"]
    if is_paper:
        columns.append("profile_error")
    for curve in curves:
        output.print_line(curve.label)
        pairs = [("  predicted error", curve.good_range)]
        if curve.tracked:
            pairs.append(("  tracked", listed(curve.tracked)))
        output.print_pairs(pairs)
        rows = curve.to_dict()["others"]
        for row in rows:
            row["target"] = f"  {row['target']}"
            row["width"] = f"{row['sigma_rel']:.3g}"
        if rows:
            output.print_rows(rows, columns)


_PLAN_COLUMNS = [
    ":marked",
    "tracked",
    "dtype",
    "kept:snapshots_each",
    "every:checkpoint_every",
    "disk:bytes",
]


def plan(
    steps: str = options.RUN(
        ..., metavar="COUNT", help="Steps of training (calls of update_): 400000, 4e5, 400K."
    ),
    params: str = options.RUN(
        ..., metavar="COUNT", help="Averaged parameters of the network: 1.2e9, 1.2B, 350M."
    ),
    disk: str | None = options.RUN(
        None, metavar="SIZE", help="Mark the most exact schedule within this disk space."
    ),
    sigma_range: str = options.SIGMA_RANGE,
    out: str | None = options.PICTURE,
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.JSON,
) -> None:
    """Show what to track and store, before training.

    Lists five schedules with their size on disk and their predicted error over --sigma-range, and
    the line of code for each. They track the ends of the range, and keep 8 to 20 snapshots of each
    profile.

    Errors assume that the network moves evenly, as a random walk that covers a quarter of the norm
    of its weights during training. The disk space is that of all averages while the last ones are
    written: one more of each profile than is kept. Headers and buffers are not counted.
    """
    from posthoc_cli.run import plan_training

    picture = options.new_picture(out, overwrite)
    report = plan_training(
        options.parse_count(steps, "--steps"),
        options.parse_count(params, "--params", "1.2e9, 1.2B or 350M"),
        options.optional(resources.parse_bytes, disk, "--disk"),
        sigma_range=options.parse_sigma_range(sigma_range),
    )
    if picture is not None:
        from posthoc_cli import plots

        output.write_picture(
            lambda: plots.error_figure([each.errors for each in report.proposals]),
            picture,
            overwrite,
        )
    output.show(report.to_dict(), as_json, _print_plan, picture)


def _print_plan(report: dict[str, Any]) -> None:
    schedules = report["schedules"]
    chosen = report["within_disk"]
    rows = []
    for schedule in schedules:
        name = schedule["name"]
        tracked = ", ".join(map(str, schedule["sigma_rels"]))
        marked = f"{name} *" if name == chosen else name
        rows.append(schedule | {"marked": marked, "tracked": tracked})
    output.print_rows(rows, [*_PLAN_COLUMNS, "worst_error", "median_error"])
    low = schedules[0]["sigma_rel"][0]
    high = schedules[0]["sigma_rel"][-1]
    output.print_line(
        f"predicted errors for sigma_rel {low:g} to {high:g} at the end, if {report['assumption']}"
    )
    if report["disk"] is not None:
        output.print_line("* the most exact within --disk" if chosen else "none is within --disk")
    for schedule in schedules:
        output.print_line()
        output.print_line(f"{schedule['name']}:")
        output.print_line(f"ema = {schedule['call']}")


_COMMON_WIDTHS = "0.001,0.01,0.03,0.05,0.10,0.15,0.20,0.27"


def profile(
    sigma_rel: str | None = options.TARGETS(
        None, show_default="common widths", help="A number, a list or a range."
    ),
    target: str | None = options.TARGETS(
        None,
        metavar="KIND:VALUE",
        help="Or classical EMAs: beta:0.9999 or half-life:5000, a list or range; with --steps.",
    ),
    steps: str | None = options.HOW(
        None, metavar="COUNT", show_default="1000", help="Length of training: 100000, 1e5."
    ),
    as_json: bool = options.JSON,
) -> None:
    """Convert between sigma_rel and a classical beta.

    A classical EMA, average <- beta average + (1 - beta) weights, corresponds to the power function
    that has the same mean age after --steps: beta / (1 - beta) steps. The largest sigma_rel is
    0.2887, the uniform average.
    """
    from posthoc_cli.profiles import convert

    check_alone(sigma_rel=sigma_rel, target=target)
    if target is not None and steps is None:
        reason = "is missing: the sigma_rel of a decay depends on the length of training"
        raise InvalidValueError("--steps", reason, "such as --steps 100000")
    count = options.parse_count(steps or "1000", "--steps")
    if target is None:
        text = _COMMON_WIDTHS if sigma_rel is None else sigma_rel
        rows = convert(count, parse_numbers(text, "--sigma-rel"), [])
    else:
        betas = _betas(target)
        try:
            rows = convert(count, [], betas)
        except InvalidValueError as error:
            if error.subject == "steps":
                raise
            # about a beta, where the target may be a half-life
            raise bad("--target", target, error.reason) from error
    if as_json:
        output.print_json({"steps": count, "profiles": rows})
        return
    for row in rows:
        row |= {key: float(f"{value:.8g}") for key, value in row.items()}
    output.print_rows(rows, ["sigma_rel", "gamma", "mean_age:mean_age", "std", "beta"])
    output.print_line(
        f"mean_age and std in steps, at step {count:,}; beta: classical EMA with the same mean age"
    )


def _betas(text: str) -> list[float]:
    targets = parse_targets(text, "--target")
    betas = [target.beta for target in targets if target.beta is not None]
    if len(betas) < len(targets):
        raise bad("--target", text, "must be beta:0.9999 or half-life:5000, also a list or a range")
    return betas


_WIDEST_GUIDE = 120


def _read_guides() -> dict[str, str]:
    """Return the Markdown source of each guide by name."""
    pages = (importlib.resources.files("posthoc_cli") / "guides").iterdir()
    return {
        page.name[:-3]: page.read_text("utf-8")
        for page in sorted(pages, key=lambda page: page.name)
    }


def guide(
    name: str | None = Argument(None, metavar="NAME", help="The guide (default: a list)."),
    as_json: bool = options.JSON,
) -> None:
    """Show a guide, or list the guides.

    On a terminal the guide is rendered and shown in the pager; in a pipe the Markdown source is
    printed.
    """
    guides = _read_guides()
    if name is not None:
        check_word("guide", name, guides)
    rows = []
    for page in guides if name is None else [name]:
        # A guide begins with a line such as "# Training: record averages while a model trains".
        title, *_ = guides[page].splitlines()
        _, _, about = title.partition(": ")
        rows.append({"guide": page, "about": about})
    if as_json:
        if name is not None:
            rows[0]["text"] = guides[name]
        output.print_json({"guides": rows})
    elif name is None:
        output.print_rows(rows, ["guide", "about"])
    elif not sys.stdout.isatty():
        output.write(guides[name])
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        # show colours, and quit at once if the text fits the screen
        os.environ.setdefault("LESS", "-RFX")
        console = Console(width=min(Console().width, _WIDEST_GUIDE))
        with console.pager(styles=True):
            console.print(Markdown(guides[name], hyperlinks=False))
