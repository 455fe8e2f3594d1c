"""What `ema import` does: a run of other programs' files, with the settings that these do not hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli import files
from posthoc_cli.checkpoints.audit import audit_sources
from posthoc_cli.checkpoints.formats import TABLE
from posthoc_cli.checkpoints.import_files import copy_path, is_import, make_manifest, write_copies, write_manifest
from posthoc_cli.checkpoints.open_run import checked_run, open_checkpoints
from posthoc_cli.checkpoints.source import Checkpoint, Settings
from posthoc_cli.errors import DirectoryError, InvalidValueError
from posthoc_cli.profiles.other_libraries import OrdinaryEMA
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots.directory import inspect_directory


@dataclass(frozen=True)
class Import:
    """What was imported.

    Attributes:
        checkpoints: as they were found.
        out: the folder of the run; None in a dry run without.
        paths: the file of each: where it is, or its copy.
        checks: what came out when the settings were compared with the files, a line each.
        written: whether anything was: not in a dry run, and not where the run was there already.
        dry_run: whether it was one.
    """

    checkpoints: tuple[Checkpoint, ...]
    out: Path | None
    paths: tuple[Path, ...]
    checks: tuple[str, ...]
    written: bool
    dry_run: bool

    @property
    def counts(self) -> Counter[str]:
        """How many checkpoints hold what."""
        return Counter(one.info.holds for one in self.checkpoints)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "run": self.checkpoints[0].info.run_id,
            "out": None if self.out is None else str(self.out),
            "written": self.written,
            "checks": list(self.checks),
            "checkpoints": [
                {"from": str(one.path), "to": str(path), "t": one.info.t, "holds": one.info.holds}
                for one, path in zip(self.checkpoints, self.paths, strict=True)
            ],
        }


def import_checkpoints(
    directory: str | Path,
    out: str | Path | None,
    *,
    copy: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: ProgressBar = no_bar,
    **settings: Any,
) -> Import:
    """Make a run of other programs' checkpoints or averages, which every command and `Run` opens.

    It refers to the files where they are, by a manifest of a few kB; or it is made of copies with checksums. The same
    import into the same folder does nothing, or takes in what has changed at `directory`.

    Arguments:
        directory: a folder, a file, or a glob that names files or folders.
        out: the folder to make; None only in a dry run.
        copy: write copies with checksums; all, or none.
        overwrite: replace an import of something else, or with other settings.
        dry_run: read and check only.
        progress: opens a progress bar.
        settings: the fields of `source.Settings`, such as `sigma_rels=(0.05, 0.28), update_every=10`.

    Raises:
        InvalidValueError: a setting is missing, or does not fit the files.
        DirectoryError, FileFormatError, MismatchError: there are no checkpoints, or not of one run.
        OutputExistsError: `out` is there, and holds something else.
        NonFiniteError: a tensor to be copied holds nan or infinity.
        WriteError: the system refused.
    """
    given, origin = Settings(**settings), files.expanded(files.given_path("directory", directory))
    target = None if out is None else files.expanded(files.given_path("out", out))
    if target is None and not dry_run:
        raise InvalidValueError("out", "is missing; only a dry run needs no output")
    if target is not None and files.is_url(target):
        files.check_writable("out", target)
        if copy:
            reason = "is a URL; copies are written to a disk"
            raise InvalidValueError("out", reason, "upload the folder when it is complete", value=target)
        if not files.is_url(origin):
            reason = "is a URL, and would refer to files of this machine"
            raise InvalidValueError("out", reason, "upload the files, and import them by URL", value=target)
    found = _found(origin, given)
    said, profiles = "", [one.profile for one in found if isinstance(one.profile, OrdinaryEMA)]
    if profiles and given.update_every is None:  # what the files show together, and one alone may not
        given = replace(given, update_every=profiles[-1].settings["every"])
    if any(isinstance(one.profile, OrdinaryEMA) and not one.info.decay for one in found):
        given, said = _with_decay(found, given)
        found = checked_run([one.told(given) for one in found])
    of_kind = [(kind, [one for one in found if one.kind == name]) for name, kind in TABLE.items()]
    checks = [kind.check(own, given) for kind, own in of_kind if own and kind.check]
    checks += [said] if said else _check_decay(found)
    paths = tuple(copy_path(target, one.info) if copy and target else one.path for one in found)
    written = False
    if target is not None and not dry_run:
        files.check_parent("out", target)
        if copy:
            written = write_copies(found, target, overwrite, progress)
        else:
            written = write_manifest(make_manifest(target, origin, given, found), overwrite)
    return Import(tuple(found), target, paths, tuple(checks), written, dry_run)


def _found(origin: Path, settings: Settings) -> list[Checkpoint]:
    """Other programs' files, with EMAs of unknown decay; a DirectoryError if it holds our own."""
    if not is_import(origin):
        if origin.is_dir() and inspect_directory(origin).snapshots:
            raise DirectoryError(origin, "holds snapshots of a tracker, which need no import")
        found = open_checkpoints(origin, settings, unclaimed=True)
        if all(one.kind for one in found):
            return found
    raise DirectoryError(origin, "is an import", "import the files that it was made of")


def _with_decay(sources: Sequence[Checkpoint], given: Settings) -> tuple[Settings, str]:
    """The settings with the decay that ordinary EMAs show, and a line on it."""
    unclaimed = [replace(one, info=replace(one.info, decay=0.0)) for one in sources]  # also those that say theirs
    try:
        (audit, *_) = audit_sources(unclaimed, every=given.update_every or 1)
    except InvalidValueError:
        reason = "must be given: the files do not hold it, and it cannot be found without weights beside the averages"
        raise InvalidValueError("ema_decay", reason) from None
    sigma = audit.uncertainty or 0.0
    spacing = float(np.median([one.end - one.begin for one in audit.intervals] or [1.0]))
    is_clear = audit.found is not None and sigma <= _VAGUE * (1 + spacing * (1 - audit.found)) ** 2
    if audit.verdict not in ("found", "began again") or audit.found is None or not is_clear:
        vague = " the files show it too vaguely:" * (audit.verdict == "found")
        raise InvalidValueError("ema_decay", f"must be given:{vague} {audit.text}", "say which decay the EMAs have")
    decay = _usual(audit.found, sigma)
    found = replace(
        given,
        ema_decay=decay,
        ema_warmup=given.ema_warmup or audit.warm_up or None,
        ema_restarts=given.ema_restarts or tuple(round(time) for time in audit.starts),
        ema_uncertainty=sigma if decay == audit.found else sigma / 2,  # it is probably exact
        ema_late=None if given.ema_restarts or not audit.starts else round(_LATE * spacing),
    )
    return found, f"found: {audit.text}" + f"; taken as {decay:g}" * (decay != audit.found)


_VAGUE = 0.05
"""Relative uncertainty of a long time constant that is too much to go on with; of one that is shorter than the time
between checkpoints it matters less, since an average of it is almost the weights."""

_LATE = 0.1
"""Uncertainty of a restart that was found, in times between two checkpoints."""


def _usual(decay: float, uncertainty: float) -> float:
    """1 - 10^-k, 1 - 2 10^-k or 1 - 5 10^-k if its time constant is as likely; else the decay.

    That is within twice the relative uncertainty, and within 3 %: such decays are far apart.
    """
    rest = 1 - decay
    power = 10.0 ** math.floor(math.log10(rest))
    near = min((1.0, 2.0, 5.0, 10.0), key=lambda digit: abs(math.log(digit * power / rest)))
    rounded = round(1 - near * power, 15)
    return rounded if abs(math.log((1 - rounded) / rest)) <= min(2 * uncertainty, 0.03) else decay


def _check_decay(found: Sequence[Checkpoint]) -> Iterator[str]:
    """Compare the decay of ordinary EMAs that was said with what the files show."""
    if not any(one.info.decay for one in found):
        return
    try:
        audits = audit_sources(found)
    except InvalidValueError:
        yield "ema_decay is as given: without weights beside the averages it cannot be checked"
        return
    for audit in audits:
        if audit.is_bad:
            raise InvalidValueError("ema_decay", f"does not fit the files: {audit.text}", value=audit.claimed)
        yield f"given: {audit.text}"
