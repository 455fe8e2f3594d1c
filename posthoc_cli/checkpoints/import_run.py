"""The import: makes a run of other programs' files, with the settings that these files do not
hold."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.checkpoints.audit import (
    DOES_NOT_MOVE,
    LOSES_UPDATES,
    ONCE,
    SET_BACK,
    SOME_TENSORS,
    Audit,
    audits_of,
)
from posthoc_cli.checkpoints.manifest import write_manifest
from posthoc_cli.checkpoints.open_run import checked_run, is_copy, read_place
from posthoc_cli.checkpoints.settings import UNSPECIFIED, ImportSettings
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.errors import DirectoryError, InvalidValueError
from posthoc_cli.profiles import RULES, OrdinaryEMA, Point
from posthoc_cli.snapshots.directory import inspect_directory, is_import
from posthoc_cli.snapshots.sources import Source

log = logging.getLogger(__name__)

# largest relative uncertainty of a long time constant that an import accepts
_VAGUE = 0.05

# Largest difference in length between a found decay and the round one that is taken: a quarter of
# all odd decays are as near to one by chance. It must also be as likely, within two uncertainties,
# as all true lengths of `any_ema.py`.
_NEAR = 0.1

_STRIDES = (2, 4, 5, 8, 10, 16, 20)
"""Usual intervals of an average's updates, in steps, of decays of 0.9 and more, besides an epoch
and half the time between two files."""

# uncertainty of the time of a restart that was found, relative to the time between two checkpoints
_LATE = 0.1


@dataclass(frozen=True, repr=False)
class Import:
    """The result of an import."""

    checkpoints: tuple[Checkpoint, ...]
    out: Path | None  # folder of the run; None in a dry run without an output
    numbers: str  # what the numbers of files are taken for
    checks: tuple[str, ...]  # results of the comparison of settings and files, a line each
    written: bool  # not in a dry run, and not if the run existed already

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} x {what}" for what, count in self.counts.items())
        return f"Import({str(self.out)!r}: {counts})"

    @property
    def counts(self) -> Counter[str]:
        return Counter(checkpoint.holds for checkpoint in self.checkpoints)

    def to_dict(self) -> dict[str, Any]:
        listed = self.checkpoints
        rows = [
            {"path": str(checkpoint.path), "t": checkpoint.t, "holds": checkpoint.holds}
            for checkpoint in listed
        ]
        return {
            "run": listed[0].run_id,
            "out": None if self.out is None else str(self.out),
            "written": self.written,
            "numbers": self.numbers,
            "checks": list(self.checks),
            "checkpoints": rows,
        }


def import_checkpoints(
    directory: str | Path,
    out: str | Path | None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    **settings: Any,
) -> Import:
    """Make a run of other programs' checkpoints or averages, which every command and `Run` opens.

    The run is a manifest of a few kB that refers to the files in their place.
    The same import into the same folder does nothing, or takes in what has changed at `directory`.

    Arguments:
        directory: a folder, a file, or a glob that names files or folders.
        out: folder of the run; None only in a dry run.
        overwrite: replace an import of something else, or with other settings.
        dry_run: read and check only.
        settings: fields of `settings.ImportSettings`, such as `sigma_rels=(0.05, 0.28)`.

    Raises:
        InvalidValueError: a setting is missing, or does not fit the files. DirectoryError,
        FileFormatError, MismatchError: there are no checkpoints, or they are not of one run.
        OutputExistsError: `out` exists, and holds something else. WriteError: the system refused.
    """
    given = ImportSettings(**settings)
    origin = files.given_path("directory", directory)
    target = None
    if out is not None:
        target = files.local_path("out", out)
    elif not dry_run:
        raise InvalidValueError("out", "is missing; only a dry run needs no output")
    if is_import(origin) or (origin.is_dir() and inspect_directory(origin).snapshots):
        reason = "holds a run already, of a tracker or an import, which needs no import"
        raise DirectoryError(origin, reason, "import the files of other programs themselves")
    place = read_place(origin, given)
    checkpoints = checked_run(place.checkpoints)
    given, checks = _with_decay(checkpoints, given)
    if place.may_be_epochs:
        _check_unit(given, place.says)
    checkpoints = checked_run([checkpoint.with_settings(given) for checkpoint in checkpoints])
    written = False
    if target is not None and not dry_run:
        files.check_parent(target)
        written = write_manifest(target, origin, given, checkpoints, overwrite)
    return Import(tuple(checkpoints), target, place.says, tuple(checks), written)


def _check_unit(given: ImportSettings, says: str) -> None:
    """Raise InvalidValueError if numbers may be epochs: the decay that an import has found is not a
    round one."""
    found = given.ema_decay
    was_given = given.without_findings.ema_decay is not None
    is_limit = given.ema_warmup == "none"  # and not the last of a warm-up
    if found is None or was_given or not is_limit or _round_decays(found, 1e-9):
        return
    reason = f"must be given: numbers are {says}, but decay {found:.6g} a step is not a round one"
    raise InvalidValueError("steps_per_epoch", reason, "give 1 if they are steps")


# --- the decay


def with_checked_decays(sources: Sequence[Source]) -> Sequence[Source]:
    """Return the sources of a run that is not an import, after comparing the decays that files say
    with the weights beside the averages, if there are any; raise an InvalidValueError if they do
    not fit."""
    checkpoints = [checkpoint for checkpoint in sources if isinstance(checkpoint, Checkpoint)]
    weights = {checkpoint.t for checkpoint in checkpoints if isinstance(checkpoint.profile, Point)}
    averages = [
        checkpoint for checkpoint in checkpoints if checkpoint.decay and checkpoint.t in weights
    ]
    if len(averages) < 2:
        return sources
    given, _ = _check_decay(checkpoints, UNSPECIFIED)
    if given == UNSPECIFIED:
        return sources
    return checked_run([checkpoint.with_settings(given) for checkpoint in checkpoints])


def _with_decay(
    sources: Sequence[Checkpoint],
    given: ImportSettings,
) -> tuple[ImportSettings, list[str]]:
    """Return the settings with what determines the decay of ordinary EMAs: said, and then checked,
    or found; and lines about it."""
    averages = [source for source in sources if not isinstance(source.profile, Point)]
    last = sources[-1].step
    _check_begun(averages, given, last)
    updates = [source.updates for source in averages if source.updates is not None]
    checks: list[str] = []
    if any(source.needs_steps(given) for source in updates):
        given = replace(given, last_step=last)
        sources = [source.with_settings(given) for source in sources]
        checks = [f"steps: taken as {last:,}, the last checkpoint's"]
    if not all(source.is_known for source in sources):
        audit = _audit(sources, given)
        _warn_of_stride(audit, given, updates)
        given, text = _found_decay(audit, _with_starts(given, audit), updates)
        checks.append(text)
    elif any(isinstance(source.profile, OrdinaryEMA) for source in averages):
        given, texts = _check_decay(sources, given)
        checks += texts
    return given, checks


def _check_begun(
    averages: Sequence[Checkpoint],
    given: ImportSettings,
    last: int,
) -> None:
    """Raise InvalidValueError if averages are said to begin after the last checkpoint."""
    if given.update_after_step and all(map(is_copy, averages)):
        reason = f"is not before the last checkpoint, of step {last:,}: no average has begun"
        raise InvalidValueError("update_after_step", reason, value=given.update_after_step)


def _found_decay(
    audit: Audit,
    given: ImportSettings,
    updates: Sequence[Updates],
) -> tuple[ImportSettings, str]:
    """Return the settings with the decay that an audit of ordinary EMAs has found, and a line about
    it."""
    decay = audit.found or 0.0
    sigma = audit.uncertainty or 0.0
    text = f"found: {audit.text}"
    if audit.what == "sigma_rel":
        width = float(f"{decay:.4g}")
        return replace(given, sigma_rels=(width,), ema_uncertainty=sigma), text
    near = []
    if audit.length is not None:
        near = _round_decays(decay, min(2 * sigma, _NEAR))
    if near:  # it is probably exact
        decay = near[0]
        sigma /= 2
        text += f"; taken as {decay:g}"
    given = replace(given, ema_uncertainty=sigma)
    if any(update.calls == "counted" for update in updates):
        after = given.update_after_step or 0
        given = replace(given, update_every=given.update_every or 1, update_after_step=after)
    if schedule := _schedule_in(audit):
        last = given.steps or round(audit.intervals[-1].end)
        return replace(given, ema_warmup=f"{schedule}:{decay:.12g}", last_step=last), text
    warm_up = given.ema_warmup or audit.warm_up or "none"
    return replace(given, ema_decay=decay, ema_warmup=warm_up), text


def _warn_of_stride(
    audit: Audit,
    given: ImportSettings,
    updates: Sequence[Updates],
) -> None:
    """Warn if an average looks like one of a round decay that is updated at every n-th step, whose
    weights have the same mean age: errors are then several times larger than predicted."""
    is_said = any(update.count is not None or update.every > 1 for update in updates)
    if is_said or given.update_every or audit.length is None or audit.warm_up:
        return
    decay = audit.found or 0.0
    age = decay / (1 - decay)
    distance = min(2 * (audit.uncertainty or 0.0), _NEAR)
    if _round_decays(decay, distance):
        return
    choices = []
    for every in sorted({*_STRIDES, round(audit.spacing / 2), given.steps_per_epoch or 1}):
        for near in _round_decays(age / (age + every), distance):
            if near >= 0.9:
                choices.append(f"{near:g} at every {every} steps")
    if choices:
        reason = f"decay {decay:.7g} was found, but {' or '.join(choices)} would look alike"
        hint = "in that case give `update_every`, or errors are larger than predicted"
        log.warning("%s; %s", reason, hint)


def _schedule_in(audit: Audit) -> str:
    """Return the name of the schedule that an audit has found; empty if it is another rule."""
    name, _, _ = audit.warm_up.partition(":")
    return name if RULES[name].is_schedule else ""


def _audit(sources: Sequence[Checkpoint], given: ImportSettings) -> Audit:
    """Return what an audit of ordinary EMAs of unknown decay finds; raise InvalidValueError if that
    is nothing, or too vague."""
    # Some files may say their decay, of which all have the same.
    unclaimed = [replace(source, decay=0.0, sigma_rel=0.0) for source in sources]
    audit = next(audits_of(unclaimed, given=given), None)
    if audit is None:
        reason = "the files do not hold it, and it cannot be found without weights next to the "
        raise _unknown_decay(sources, f"{reason}averages in two files or more")
    _check_is_average(audit)
    if audit.verdict not in ("found", "began again") or audit.found is None:
        raise _unknown_decay(sources, audit.text, audit)
    limit = _VAGUE
    if audit.what == "decay":
        # An average that is shorter than the time between checkpoints is almost the weights.
        updates = audit.spacing * (1 - audit.found)  # in a time constant, between checkpoints
        limit *= (1 + updates) ** 2
    if (audit.uncertainty or 0.0) > limit:
        raise _unknown_decay(sources, f"the files show it too vaguely: {audit.text}", audit)
    return audit


def _fitting_warm_up(sources: Sequence[Checkpoint], given: ImportSettings) -> str:
    """Return the warm-up with which the given decay fits the files; empty if there is none."""
    if given.ema_decay is None:
        return ""
    try:
        audit = _audit(sources, replace(given, ema_decay=None))
    except InvalidValueError:
        return ""
    if audit.verdict != "found" or not audit.found or _schedule_in(audit):
        return ""
    factor = (1 - audit.found) / (1 - given.ema_decay)
    is_near = abs(math.log(factor)) <= 3 * (audit.uncertainty or 0.0)
    return audit.warm_up if is_near else ""


def _unknown_decay(
    sources: Sequence[Checkpoint],
    reason: str,
    audit: Audit | None = None,
) -> InvalidValueError:
    """Return the error that asks for the decay, by the settings that the files' library has."""
    hint = "add `ema_warmup` if it rises"
    if audit and audit.warm_up:
        hint = f"add `ema_warmup` {audit.warm_up} if it rises so"
    if any(source.kind == "ema" for source in sources):
        hint += ", or give `sigma_rels` if it is a power function"
    if audit and audit.length and audit.uncertainty and audit.what == "decay":
        decay = 1 - 1 / max(audit.length, 1.1)
        likely = _round_decays(decay, min(audit.uncertainty, 1.0))
        if likely:
            choices = " or ".join(f"{decay:g}" for decay in likely)
            hint = f"{choices} would fit; {hint}"
    return InvalidValueError("ema_decay", f"must be given: {reason}", hint)


def _with_starts(given: ImportSettings, audit: Audit) -> ImportSettings:
    """Return the settings with the starts that an audit found, unless they say any."""
    if not audit.starts or given.ema_restarts or given.update_after_step is not None:
        return given
    starts = tuple(map(round, audit.starts))
    given = replace(given, ema_late=round(_LATE * audit.spacing))
    if audit.is_late:
        return replace(given, update_after_step=starts[0], ema_restarts=starts[1:])
    return replace(given, ema_restarts=starts)


def _round_decays(decay: float, distance: float) -> list[float]:
    """Return the decays 1 - 10^-k, 1 - 2 10^-k and 1 - 5 10^-k whose time constants are within a
    relative distance, the nearest first."""
    rest = 1 - decay
    power = 10.0 ** math.floor(math.log10(rest))
    near = []
    for digit in (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0):
        candidate = digit * power
        log_ratio = abs(math.log(candidate / rest))
        if log_ratio <= distance and candidate <= 0.5:
            near.append((log_ratio, round(1 - candidate, 15)))
    return [decay for _, decay in sorted(near)]


def _check_is_average(audit: Audit) -> None:
    """Raise an InvalidValueError if no decay describes an average."""
    hint = "`kind` checkpoints takes the weights alone"
    if audit.verdict == DOES_NOT_MOVE:
        hint += ", and `update_every` says that it is updated less often"
    if audit.verdict in (SET_BACK, DOES_NOT_MOVE):
        raise InvalidValueError("average", audit.text, f"name files of one side by a glob; {hint}")
    if audit.verdict == ONCE:
        raise InvalidValueError("update_every", f"must be given: {audit.text}")
    if audit.verdict == LOSES_UPDATES:
        raise InvalidValueError("average", audit.text, hint)
    if audit.verdict == SOME_TENSORS:
        raise InvalidValueError("average", audit.text, f"leave them out by `exclude`; {hint}")


_WITHOUT = "without it the import finds the length"


def _check_kind(checkpoints: Sequence[Checkpoint], given: ImportSettings) -> None:
    """Raise an InvalidValueError if the files leave a given sigma_rel undetermined since they show
    a decay."""
    if len(given.sigma_rels) != 1:
        return
    without = replace(given, sigma_rels=())
    unclaimed = [checkpoint.with_settings(without) for checkpoint in checkpoints]
    try:
        audit = _audit(unclaimed, without)
    except InvalidValueError:
        return
    if audit.what == "decay":
        reason = f"does not fit the files: {audit.text}"
        raise InvalidValueError("sigma_rels", reason, _WITHOUT, value=given.sigma_rels[0])


def _misfit(
    audit: Audit,
    checkpoints: Sequence[Checkpoint],
    given: ImportSettings,
) -> InvalidValueError:
    """Return the error that names the setting which an audit refutes."""
    reason = f"does not fit the files: {audit.text}"
    if given.warm_up_row.is_schedule:
        return InvalidValueError("ema_warmup", reason, value=given.ema_warmup)
    claimed = f"{audit.claimed:.12g}"
    if given.sigma_rels:
        return InvalidValueError("sigma_rels", reason, _WITHOUT, value=claimed)
    hint = "`ema_decay` and `ema_warmup` of an import together replace what files say"
    warm_up = ""
    if given.ema_warmup is None:
        warm_up = _fitting_warm_up(checkpoints, given)
    if warm_up:
        reason = "does not fit the files without the warm-up that they show"
        hint = f"add `ema_warmup` {warm_up}"
    return InvalidValueError("ema_decay", reason, hint, value=claimed)


def _check_decay(
    checkpoints: Sequence[Checkpoint],
    given: ImportSettings,
) -> tuple[ImportSettings, list[str]]:
    """Compare the known decay of ordinary EMAs with the files; return the settings with starts, and
    lines about it."""
    checks = []
    name = "sigma_rels" if given.sigma_rels else "ema_decay"
    if given.steps and not any(
        checkpoint.updates and checkpoint.updates.ends(given) for checkpoint in checkpoints
    ):
        reason = "is of no use: these averages have no decay that rises to 1"
        raise InvalidValueError("steps", reason, value=given.steps)
    for audit in audits_of(checkpoints):
        _check_is_average(audit)
        if audit.is_bad:
            raise _misfit(audit, checkpoints, given)
        if audit.verdict == "undetermined":
            _check_kind(checkpoints, given)
            reason = "is taken as given, and could not be checked: predicted errors hold if it"
            log.warning("%s %s is right: %s", name, reason, audit.text)
            doubt = min(audit.difference, 3.0)
            given = replace(given, ema_doubt=doubt or None)
        given = _with_starts(given, audit)
        checks.append(f"given: {audit.text}")
    if not checks:
        reason = (
            "is as given or in files: without weights next to the averages it cannot be checked"
        )
        checks.append(f"{name} {reason}")
    return given, checks
