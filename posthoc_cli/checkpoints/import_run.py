"""The import: makes a run of other programs' files, with the settings that these files do not
hold."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from glob import escape as glob_escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from posthoc_cli import files
from posthoc_cli.checkpoints.ask import ASKED, ProposalError, QuestionError, with_command
from posthoc_cli.checkpoints.audit import (
    DOES_NOT_MOVE,
    EQUALS,
    RARE,
    SET_BACK,
    SOME_TENSORS,
    TOO_COARSE,
    UNRELATED,
    Audit,
    Candidate,
    audit_averages,
    round_decays,
)
from posthoc_cli.checkpoints.manifest import read_manifest, write_manifest
from posthoc_cli.checkpoints.open_run import (
    PlaceRun,
    is_copy,
    make_run,
    open_import,
    read_place,
)
from posthoc_cli.checkpoints.settings import FOUND, UNSPECIFIED, ImportSettings, parse_warm_up
from posthoc_cli.checkpoints.source import Checkpoint, first_values
from posthoc_cli.decay_rules import POWER_FUNCTION, RULES, OrdinaryEMA, WarmUp
from posthoc_cli.errors import DirectoryError, InvalidValueError, argument
from posthoc_cli.profiles import Point
from posthoc_cli.snapshots.directory import inspect_directory, is_import

log = logging.getLogger(__name__)

_SURE = 0.05  # largest uncertainty of a length from which a decay is taken
_CLEAR = 0.12  # and one from which a decay is proposed
_MOST_DOUBT = 3.0  # of the logarithm of a length
_LARGE = 4.0  # times the norm of an average: more than of weights that grow evenly from 0
# Least cosine between successive motions at which weights may be an average: for an EMA of 100
# steps in files 100 steps apart it is 0.5 to 0.9, for weights late in a training -0.3 to 0.4.
_ALIKE = 0.5
_COMPARED = 6  # newest files whose motion and size are compared

Settings = dict[str, Any]
"""Fields of `ImportSettings` to change."""


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
        return count_contents(self.checkpoints)

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

    The run is a small index of the checkpoints; nothing is copied.
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
    origin = files.check_path("directory", directory)
    target = None
    if out is not None:
        target = files.local_path("out", out)
    elif not dry_run:
        raise InvalidValueError("out", f"is required (except with {argument('dry_run')})")
    if is_import(origin) or (origin.is_dir() and inspect_directory(origin).snapshots):
        reason = "is a run already, and needs no import"
        raise DirectoryError(origin, reason, "name the files of the other program")
    found = find_run(origin, given)
    checkpoints = found.checkpoints
    given = found.settings
    written = False
    if target is not None and not dry_run:
        files.check_parent(target)
        written = write_manifest(target, origin, given, checkpoints, overwrite)
    return Import(tuple(checkpoints), target, found.says, found.checks, written)


@dataclass(frozen=True)
class FoundRun:
    """The run that the files at a place make with some settings."""

    checkpoints: list[Checkpoint]
    settings: ImportSettings  # given, or found
    says: str  # what the numbers of files are taken for
    checks: tuple[str, ...]  # lines about the decay
    notes: tuple[str, ...]  # what is not used

    @property
    def summary(self) -> str:
        """One line about what the files hold, and how the decay was found."""
        counts = count_contents(self.checkpoints)
        held = ", ".join(f"{count:,} x {what}" for what, count in counts.items())
        return "; ".join([held, *self.checks])


def count_contents(checkpoints: Sequence[Checkpoint]) -> Counter[str]:
    """Count checkpoints by what they hold, in words."""
    return Counter(checkpoint.holds for checkpoint in checkpoints)


def find_run(place: str | Path, given: ImportSettings) -> FoundRun:
    """Find the run at a place; a question about what its files leave open ends in the command that
    answers it."""
    found = with_command(place, given.given, _find)
    _log_notes(place, found.notes)
    return found


def _log_notes(place: str | Path, notes: Sequence[str]) -> None:
    for note in notes:
        log.warning("%s: %s", place, note)


def _find(origin: str | Path, values: Mapping[str, Any]) -> FoundRun:
    given = ImportSettings(**values)
    place = read_place(origin, given)
    numbers = place.says if place.may_be_epochs else ""
    given, checks = check_decays(origin, make_run(place.checkpoints), given, numbers)
    checkpoints = make_run([checkpoint.with_settings(given) for checkpoint in place.checkpoints])
    notes = (*place.notes, *_note_on_motion(checkpoints, given))
    return FoundRun(checkpoints, given, place.says, tuple(checks), notes)


def _note_on_motion(checkpoints: Sequence[Checkpoint], given: ImportSettings) -> list[str]:
    """Note that files move as averages do, each in the direction of the one before. Weights that
    drift do the same."""
    newest = checkpoints[-_COMPARED:]
    are_weights = all(isinstance(source.profile, Point) for source in checkpoints)
    if given.kind or not are_weights or len(newest) < 4:
        return []
    motions = np.diff([first_values(source) for source in newest], axis=0)
    along = float((motions[1:] * motions[:-1]).sum())
    size = float(np.linalg.norm(motions[1:]) * np.linalg.norm(motions[:-1]))
    if along <= _ALIKE * size:
        return []
    text = (
        f"the files move alike from one to the next (cosine {along / size:.2f}), as averages do, "
    )
    return [f"{text}or weights that drift; if they hold an EMA, import with {argument('kind')} ema"]


def open_checkpoints(place: str | Path) -> list[Checkpoint]:
    """Open the checkpoints of an import, or the checkpoints at a place as an import would take
    them."""
    path = files.expand_user(place)
    if is_import(path):
        return make_run(open_import(read_manifest(path)))
    found = find_run(place, UNSPECIFIED)
    if found.checks:
        log.info("%s: %s", place, found.summary)
    return found.checkpoints


def open_unclaimed(place: str | Path, given: Settings | None = None) -> list[Checkpoint]:
    """Open the checkpoints at a place without reading their values: averages whose decay no file
    states get placeholders as profiles.

    An import has its settings, and takes none.
    """
    path = files.expand_user(place)
    given = given or {}
    if not is_import(path):
        return make_run(place_at(place, is_audit=True, given=given).checkpoints)
    for name, value in given.items():
        reason = "is a setting of imports, and this is one: give it the files' folder instead"
        raise InvalidValueError(name, reason, value=value)
    return make_run(open_import(read_manifest(path)))


def place_at(
    place: str | Path,
    is_audit: bool = False,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> PlaceRun:
    """Read a place with the given settings; a question ends in the command of the import that
    answers it.

    For `is_audit` see `read_place`.
    """

    def attempt(origin: str | Path, values: Mapping[str, Any]) -> PlaceRun:
        if values != given:
            _find(origin, values)
        return read_place(origin, ImportSettings(**values), is_audit)

    found = with_command(place, given, attempt)
    _log_notes(place, found.notes)
    return found


# --- the decay


def check_decays(
    place: str | Path,
    checkpoints: Sequence[Checkpoint],
    given: ImportSettings,
    numbers: str = "",
) -> tuple[ImportSettings, list[str]]:
    """Complete the settings with what determines the averages at a place, and write lines about it:
    a stated decay, which is compared with the weights, or the round decay that they show.

    `numbers` is what the numbers of files are taken for, if these may be epochs. Raise
    InvalidValueError, with a command that goes through, if nothing says or shows the decay, or if
    they contradict it.
    """
    return _Decays(place, checkpoints, given, numbers).settle()


@dataclass(frozen=True)
class _Decays:
    """The decays of the averages at a place."""

    place: str | Path
    checkpoints: Sequence[Checkpoint]
    given: ImportSettings
    numbers: str
    is_trial: bool = False  # of a command to be proposed: its errors are not shown

    @property
    def averages(self) -> list[Checkpoint]:
        return [source for source in self.checkpoints if source.updates is not None]

    def settle(self) -> tuple[ImportSettings, list[str]]:
        """Decide the settings, and note how in lines about them."""
        averages = self.averages
        last = self.checkpoints[-1].step
        if self.given.update_after_step and all(map(is_copy, averages)):
            reason = f"is not before the last checkpoint, of step {last:,}: no average has begun"
            value = self.given.update_after_step
            raise InvalidValueError("update_after_step", reason, value=value)
        if any(source.updates.needs_steps(self.given) for source in averages if source.updates):
            given = replace(self.given, last_step=last)
            settled = self._with(given)
            given, lines = settled.settle()
            return given, [f"steps: taken as {last:,}, the last checkpoint's", *lines]
        if not all(source.is_known for source in averages):
            return self._find()
        if averages:
            return self._confirm()
        return self.given, []

    def _with(self, given: ImportSettings, is_trial: bool = False) -> _Decays:
        changed = [checkpoint.with_settings(given) for checkpoint in self.checkpoints]
        return _Decays(self.place, changed, given, self.numbers, is_trial or self.is_trial)

    # --- a decay that nothing says

    def _find(self) -> tuple[ImportSettings, list[str]]:
        """Complete the settings with the decay that the files show."""
        # some files may say their decay, of which all have the same
        unclaimed = [replace(source, decay=0.0, sigma_rel=0.0) for source in self.checkpoints]
        audit = next(audit_averages(unclaimed, given=self.given), None)
        if audit is None:
            reason = "the files do not hold it, and it cannot be found without weights next to the "
            raise self._question("ema_decay", f"{reason}averages in two files or more")
        self._check_is_average(audit)
        sigma = audit.uncertainty or 0.0
        rounded = self._round_decays(audit, sigma)
        is_reached = not any(candidate.rises for candidate in audit.candidates)
        if audit.verdict == "found" and len(rounded) == 1 and sigma <= _SURE and is_reached:
            (changes,) = rounded
            shown = changes.get("ema_decay") or changes["ema_warmup"]
            text = f"found: {audit.text}; taken as {shown}"
            return self._adopt(changes, 0.0), [text]
        if audit.verdict == "found" and self.given.ema_decay == FOUND:
            (candidate,) = audit.candidates
            changes = _express_as_settings(candidate, candidate.value)
            return self._adopt(changes, sigma), [f"found: {audit.text}"]
        rounded = self._round_decays(audit, 2 * sigma)
        proposals = rounded
        if audit.verdict == "found" and sigma <= _CLEAR:
            proposals = [*rounded, {"ema_decay": FOUND}]
        if self.numbers and not rounded:
            reason = f"numbers are {self.numbers}, and the decay is not a round one: {audit.text}"
            raise self._question("steps_per_epoch", reason, {"steps_per_epoch": ASKED}, *proposals)
        reason = audit.text if rounded else audit.text + self._round_epochs(audit)
        if not proposals:
            reason += f"; {argument('kind')} checkpoints takes the weights alone"
        raise self._question("ema_decay", reason, *proposals)

    def _round_epochs(self, audit: Audit) -> str:
        """Find a simple number of steps per epoch, the nearest to the given one, at which the decay
        is round."""
        given = self.given.steps_per_epoch
        if not given or not audit.length:
            return ""
        power = 10 ** math.floor(math.log10(given))
        simple = {digits * power // 2 for digits in (1, 2, 3, 4, 5, 6, 8, 10, 20)}
        for number in sorted(simple - {0, given}, key=lambda number: abs(math.log(number / given))):
            decay = 1 - given / (audit.length * number)
            for rounded in round_decays(decay, audit.uncertainty or 0.0):
                return f"; with {argument('steps_per_epoch')} {number:,} it would be {rounded:g}"
        return ""

    def _adopt(self, changes: Settings, uncertainty: float) -> ImportSettings:
        """Put a decay that was found into the settings."""
        found: Settings = {"ema_decay": None, "ema_uncertainty": uncertainty}
        found |= changes
        if replace(self.given, **found).warm_up_row.is_schedule and not self.given.steps:
            found["last_step"] = self.checkpoints[-1].step
        if any(source.updates.calls == "counted" for source in self.averages if source.updates):
            found["update_every"] = self.given.update_every or 1
            found["update_after_step"] = self.given.update_after_step or 0
        return replace(self.given, **found)

    def _round_decays(self, audit: Audit, distance: float) -> list[Settings]:
        """List settings with round decays within a relative distance of the length that was found,
        the likeliest first; a decay that still rises fits any higher one."""
        rounded = []
        for candidate in audit.candidates:
            if candidate.rises:
                highest = 10.0 ** math.floor(math.log10(1 - candidate.value) - 1)
                rounded.append(_express_as_settings(candidate, round(1 - highest, 12)))
            elif candidate.warm_up != POWER_FUNCTION and (audit.uncertainty or 0.0) <= _CLEAR:
                near = round_decays(candidate.value, distance)
                row = _row(candidate)
                if row.is_schedule and row.usual:
                    ratio = (1 - row.usual) / (1 - candidate.value)
                    if abs(math.log(ratio)) <= distance:
                        near.append(row.usual)
                rounded += [_express_as_settings(candidate, decay) for decay in near]
        return rounded

    # --- a decay that files or settings say

    def _confirm(self) -> tuple[ImportSettings, list[str]]:
        """Compare the averages that the settings describe with the weights."""
        given = self.given
        name = "sigma_rels" if given.sigma_rels else "ema_decay"
        updates = [source.updates for source in self.averages if source.updates]
        if given.steps and not any(update.ends(given) for update in updates):
            reason = "is of no use: these averages have no decay that rises to 1"
            raise InvalidValueError("steps", reason, value=given.steps)
        lines = []
        for audit in audit_averages(self.checkpoints, given=given):
            is_odd = audit.verdict in (SET_BACK, TOO_COARSE) and self._is_given
            is_odd = is_odd or (audit.verdict == RARE and bool(self.given.update_every))
            if not is_odd:
                self._check_is_average(audit)
            if warm_up := self._warm_up_to(audit):
                given, checks = self._with(replace(self.given, ema_warmup=warm_up)).settle()
                return given, [f"ema_warmup: taken as {warm_up}, which the files show", *checks]
            if audit.is_bad and not is_odd:
                raise self._refute(audit)
            if is_odd or audit.verdict == "undetermined":
                reason = "is taken as given, which the files do not show: predicted errors hold if"
                log.warning("%s %s it is right: %s", name, reason, audit.text)
            doubt = max(given.ema_doubt or 0.0, audit.difference)
            given = replace(given, ema_doubt=min(doubt, _MOST_DOUBT) or None)
            if audit.verdict == SET_BACK:
                given = replace(given, ema_restart=audit.set_back_at)
            lines.append(f"given: {audit.text}")
        if not lines:
            self._check_warm_up()
            _check_alone(self.averages)
            reason = "is as given or in files: without weights next to the averages it cannot be "
            lines.append(f"{name} {reason}checked")
        return given, lines

    @property
    def _is_given(self) -> bool:
        """Whether the user says the decay, and not files."""
        given = self.given
        is_rule = given.warm_up_row.is_schedule or bool(given.sigma_rels)
        return is_rule or given.ema_decay not in (None, FOUND)

    def _warm_up_to(self, audit: Audit) -> str:
        """Find the warm-up that leads to the given decay, if the files show that decay; else ""."""
        given = self.given
        if given.ema_warmup is not None or not self._is_given or len(audit.candidates) != 1:
            return ""
        (candidate,) = audit.candidates
        is_rule = candidate.warm_up in (POWER_FUNCTION, "none") or _row(candidate).is_schedule
        if audit.verdict != "another rule" or is_rule or candidate.rises:
            return ""
        decay = given.rule().get("decay", 0.0)
        difference = abs(math.log((1 - decay) / (1 - candidate.value)))
        return candidate.warm_up if difference <= 2 * (audit.uncertainty or 0.0) else ""

    def _check_warm_up(self) -> None:
        """Raise InvalidValueError for a warm-up other than what files state."""
        given = parse_warm_up(self.given.ema_warmup or "")
        for source in self.averages:
            stated = source.updates.rule.get("warm_up") if source.updates else None
            if given and stated and given["warm_up"] != stated:
                reason = f"contradicts {source.path.name}, whose decay rises by {stated}, and "
                reason += "without weights next to the averages nothing shows which is right"
                raise InvalidValueError("ema_warmup", reason, value=self.given.ema_warmup)

    def _refute(self, audit: Audit) -> InvalidValueError:
        """Make the error that names the setting which an audit refutes."""
        reason = f"does not fit the files: {audit.text}"
        given = self.given
        proposals: list[Settings] = []
        for candidate in audit.candidates:
            if given.ema_decay and candidate.warm_up != POWER_FUNCTION:
                same = {"ema_decay": given.ema_decay, "ema_warmup": candidate.warm_up}
                proposals.append(same)
        rounded = self._round_decays(audit, audit.uncertainty or 0.0)
        proposals += [{"ema_warmup": "none"} | changes for changes in rounded]
        if len(audit.candidates) == 1 and (audit.uncertainty or 1.0) <= _CLEAR:
            proposals.append({"ema_decay": FOUND})
        if given.warm_up_row.is_schedule:
            return self._refusal("ema_warmup", reason, proposals, given.ema_warmup)
        name = "sigma_rels" if given.sigma_rels else "ema_decay"
        proposals = [{"sigma_rels": ()} | changes for changes in proposals]
        return self._refusal(name, reason, proposals, f"{audit.claimed:.12g}")

    # --- what both refuse

    def _check_is_average(self, audit: Audit) -> None:
        """Raise InvalidValueError if no decay describes an average, or if nothing says when it
        began."""
        weights = self.given.command(self.place, kind="checkpoints")
        if audit.verdict in (SET_BACK, DOES_NOT_MOVE):
            option = argument("update_after_step")
            side = f"name files of one side by a glob, later ones with {option}"
            if later := self._glob_from(audit.set_back_at):
                side = "for later files, with the step N at which it began: "
                side += self.given.command(later, update_after_step=ASKED)
            reason = f"{audit.text}; {side}; or take the weights alone"
            raise InvalidValueError("average", reason, weights)
        if audit.verdict == UNRELATED:
            average = _find_key(self.averages[-1])
            model = _find_key(next(each for each in self.checkpoints if each.updates is None))
            swapped = [{"average": model, "weights": average}] if average and model else []
            raise QuestionError("average", audit.text, *swapped, {"kind": "checkpoints"})
        if audit.verdict in (EQUALS, TOO_COARSE):
            raise InvalidValueError("average", f"{audit.text}; take the weights alone", weights)
        if audit.verdict == RARE:
            proposals = [{"update_every": every} for every in audit.every]
            raise self._question("update_every", audit.text, *proposals)
        if audit.verdict == SOME_TENSORS:
            way = f"leave them out with {argument('exclude')}, or take the weights alone"
            reason = f"{audit.text}; {way}"
            raise InvalidValueError("average", reason, weights)
        begins = self._last_copy(audit)
        if begins and self.given.update_after_step is None:
            what = f"no average differs from the weights until step {begins:,.12g}"
            raise self._question("update_after_step", f"{what}, after which it began")

    def _glob_from(self, time: float | None) -> str:
        """Make a glob of the later files alone, with as many digits as the newest; empty if there
        is none."""
        newest = self.checkpoints[-1].path
        if time is None:
            return ""
        later = {source.path for source in self.checkpoints if source.t >= time}
        earlier = {source.path for source in self.checkpoints if source.t < time}
        alike = [str(path) for path in later if len(str(path)) == len(str(newest))]
        glob = "".join(map(_glob_of_characters, zip(*alike, strict=True)))
        is_apart = not any(fnmatch(str(path), glob) for path in earlier)
        return glob if is_apart and len(alike) > 1 else ""

    def _last_copy(self, audit: Audit) -> float:
        """Find the last time of weights without an average, or with a copy, that nothing else
        explains; 0 if there is none."""
        first = self.averages[0]
        if first.updates is None or first.updates.count is not None:
            return 0.0
        weights = [source.t for source in self.checkpoints if source.updates is None]
        earlier = [t for t in weights if t < first.t]
        if len(weights) - len(earlier) != len(self.averages):
            earlier = []  # averages are in some files only
        last = max([*earlier, audit.copied_until or 0.0])
        if not isinstance(first.profile, OrdinaryEMA) or first.profile.rule.copies:
            return 0.0
        settings = first.profile.settings
        return 0.0 if settings["first"] - settings["every"] >= last else last

    # --- questions

    def _question(self, name: str, reason: str, *proposals: Settings) -> InvalidValueError:
        """Make the error that asks for a setting."""
        if self.is_trial:
            return ProposalError(name, reason)
        open_one = {name: ASKED}
        return self._refusal(name, f"must be given: {reason}", [*proposals, open_one])

    def _refusal(
        self,
        name: str,
        reason: str,
        proposals: Sequence[Settings],
        value: object = "",
    ) -> InvalidValueError:
        """Make an error whose hint is the first command that goes through; it names the other
        choices."""
        going = []
        if not self.is_trial:
            going = [changes for changes in proposals if self._goes_through(changes)]
        if not going:
            return InvalidValueError(name, reason, value=value)
        best, *others = going
        if choices := [_options(changes) for changes in others if ASKED not in changes.values()]:
            reason += f"; {' or '.join(choices)} would fit, too"
        command = self.given.command(self.place, **best)
        return ProposalError(name, reason, f"paste: {command}", value=value)

    def _goes_through(self, changes: Settings) -> bool:
        if ASKED in changes.values():
            return True
        try:
            self._with(replace(self.given, **changes), is_trial=True).settle()
        except ProposalError:  # another question
            return True
        except InvalidValueError:
            return False
        return True


def _find_key(checkpoint: Checkpoint) -> str:
    """Find the key of a set in a file; empty if it has none."""
    name, stored = next(iter(checkpoint.stored.items()))
    return stored.removesuffix(name).rstrip(".") if stored != name else ""


def _express_as_settings(candidate: Candidate, value: float) -> Settings:
    """Express a rule with another value as settings."""
    if candidate.warm_up == POWER_FUNCTION:
        return {"sigma_rels": (min(float(f"{value:.4g}"), 0.2886),)}
    if _row(candidate).is_schedule:
        return {"ema_warmup": f"{candidate.warm_up}:{value:.12g}"}
    changes: Settings = {"ema_decay": value}
    if candidate.warm_up != "none":
        changes["ema_warmup"] = candidate.warm_up
    return changes


def _glob_of_characters(characters: Sequence[str]) -> str:
    first = min(characters)
    last = max(characters)
    return glob_escape(first) if first == last else f"[{first}-{last}]"


def _row(candidate: Candidate) -> WarmUp:
    name, _, _ = candidate.warm_up.partition(":")
    return RULES[name.replace("none", "")]


def _options(changes: Settings) -> str:
    options = []
    for name, value in changes.items():
        if value not in ((), "none"):
            options.append(f"{argument(name)} {value}")
    return " ".join(options)


def _check_alone(averages: Sequence[Checkpoint]) -> None:
    """Raise InvalidValueError if the weights that would make such averages are far larger than the
    averages.

    The mean of what an average took in since an earlier one is (e' - B e) / (1 - B), with the share
    B that is left of e: it is nearly e' if B is 1.
    """
    newest = averages[-_COMPARED:]
    values = [first_values(average) for average in newest]
    for earlier, later, before, after in zip(newest, newest[1:], values, values[1:], strict=False):
        kept = 1 - float(later.profile.tail(earlier.t))
        if kept > 0.995:
            continue
        mean = (after - kept * before) / (1 - kept)
        if np.linalg.norm(mean) > _LARGE * np.linalg.norm(after):
            reason = f"does not fit: the weights between {earlier.path.name} and {later.path.name} "
            reason += "would be far larger than their average"
            hint = "it rises, is shorter, or numbers are no steps"
            raise InvalidValueError("ema_decay", reason, hint)
