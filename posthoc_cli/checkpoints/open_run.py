"""Open a directory, files or folders of any program as the sources of a run.

Files whose names differ in numbers alone are a series. A run is one series, or two: of weights and
of averages, as words in names, contents or the user say. Other files are left out, and named: a
further copy of the newest one, the state of an optimizer, another model. Times come from contents
and names, never from the order or the age of files. The manifest of an import holds the settings
that files do not.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from posthoc_cli import files
from posthoc_cli.checkpoints.ask import ASKED, Answer, QuestionError
from posthoc_cli.checkpoints.clock import UNREAD, Times, read_signs, read_times
from posthoc_cli.checkpoints.containers import KIND, find_container, foreign_error
from posthoc_cli.checkpoints.content import Content, list_names, open_checkpoint
from posthoc_cli.checkpoints.folders import (
    AVERAGE_WORD,
    Layout,
    OneFile,
    find_layout,
    layout_at,
    list_members,
    make_glob,
)
from posthoc_cli.checkpoints.layouts import (
    Found,
    check_applies,
    check_given,
    named_decay,
    recognise,
    role_by_glob,
    says_its_profile,
)
from posthoc_cli.checkpoints.manifest import Manifest
from posthoc_cli.checkpoints.sets import TensorSets, match_names
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.source import (
    Checkpoint,
    are_near,
    first_values,
    make_checkpoint,
)
from posthoc_cli.decay_rules import OrdinaryEMA
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    PostHocError,
    UnsuitableError,
    VanishedError,
    list_first,
    quote,
)
from posthoc_cli.profiles import FloatArray, Point, StoredProfile
from posthoc_cli.snapshots.directory import is_import, is_snapshot_name
from posthoc_cli.snapshots.snapshot import check_globs
from posthoc_cli.snapshots.sources import by_time, model_difference

log = logging.getLogger(__name__)

_EPOCHS = 1000  # largest number that is read as perhaps epochs: few trainings have more
_GROWTH = 1.3
"""Factor between the norms of successive files that no average reaches: even if weights grow evenly
from 0 for the whole training, their averages grow by less after three files."""
_COMPARED_FILES = 5  # newest, which are opened once more to see how two sets move
_SLOWER = 0.8  # averages of any length move by a third less than the weights


def open_import(manifest: Manifest) -> list[Checkpoint]:
    """Open the checkpoints of an import, at the times that it has found; raise FileFormatError if a
    file is not as it was."""
    opened = []
    try:
        for path, _, time in manifest.checkpoints:
            found = _recognise(open_checkpoint(path), manifest.settings)
            opened.append(replace(found, time=time))
        unit, is_stated = manifest.unit
        clock = Times(unit, is_stated, "", ())
        checkpoints = _make_all(opened, clock, manifest.settings)
    except PostHocError:
        for path in manifest.files:
            manifest.check_file(path)
        raise
    for checkpoint in checkpoints:
        for path, identity in checkpoint.opened.items():
            manifest.check_identity(path, identity.nbytes, identity.sample)
    return checkpoints


# --- all checkpoints at a place


@dataclass(frozen=True)
class Place:
    """What was found at a place."""

    checkpoints: list[Checkpoint]
    says: str  # what the numbers of files are taken for
    notes: tuple[str, ...] = ()  # what is not used
    may_be_epochs: bool = False  # whether few numbers of no stated unit are taken for steps


def read_place(
    place: str | Path,
    settings: ImportSettings,
    is_audit: bool = False,
) -> Place:
    """Find all checkpoints at a place, without outputs of this package, with the profiles that are
    known.

    Raise a QuestionError about what the files leave open; for an audit, which says how an average
    moves, not about its motion.
    """
    reader = _Reader(place, settings)
    run = reader.run()
    for file in run:
        check_given(file, settings)
    times = _read_run_times(run, settings)
    run = _leave_out_untrained(run, times.numbers)
    if not is_audit:
        run = _check_roles(run, settings)
    check_applies(any(file.averaged for file in run), settings)
    has_decays = any(file.updates is not None for file in run)
    may_be_epochs = False
    if has_decays:
        _check_unit(times)
        may_be_epochs = not times.is_stated and max(times.numbers) <= _EPOCHS
        times = replace(times, is_stated=True)
    notes = [*reader.notes, *_note_unused(run)]
    checkpoints = _make_all(run, times, settings)
    return Place(checkpoints, times.says, tuple(notes), may_be_epochs)


def _check_unit(times: Times) -> None:
    """Raise a QuestionError if numbers are epochs: the decay of an average counts steps."""
    if times.unit == "epochs":
        reason = f"must be given: decays are of steps, and numbers are {times.says}"
        raise QuestionError("steps_per_epoch", reason, {"steps_per_epoch": ASKED})


def _read_run_times(run: Sequence[Found], settings: ImportSettings) -> Times:
    if all(file.reading is not UNREAD for file in run):
        reading = run[0].reading
        says = f"{reading.unit}, by {reading.origin}"
        return Times(reading.unit, True, says, [file.reading.number for file in run])
    signs = []
    for file in run:
        updates = file.updates
        count = 0
        if updates is not None and updates.calls != "counted":
            count = updates.count or 0
        signs.append(replace(read_signs(file.content, settings), count=count))
    return read_times(signs, settings)


def _leave_out_untrained(run: Sequence[Found], times: Sequence[int]) -> list[Found]:
    """Return the checkpoints of a training that has begun, with their times."""
    if max(times) <= 0:
        reason = "all files have the number 0, which may be something else than a step"
        hint = "name the files of one run with a glob, or import with `step_from`"
        raise InvalidValueError(run[0].path, reason, hint)
    used = []
    for file, time in zip(run, times, strict=True):
        if time > 0:
            used.append(replace(file, time=time))
        elif time == 0:
            reason = "left out: it holds the weights before the training, of step 0"
            log.warning("%s: %s", file.path, reason)
    return used


def _note_unused(run: Sequence[Found]) -> list[str]:
    """Name the sets of tensors of a file that are not used, with the option that would use one."""
    for file in run:
        if not file.unused:
            continue
        first = file.unused[0]
        averages = [key for key in file.unused if AVERAGE_WORD.search(key)]
        option = f"`average` '{averages[0]}'" if averages else f"`weights` '{first}'"
        text = f"{file.path.name} also holds {list_names(file.unused)}, not used: an import with "
        text += f"{option} takes it"
        if file.averaged:
            text += ", and with `kind` checkpoints the model alone"
        return [text]
    return []


# --- which files


@dataclass(frozen=True)
class Candidate:
    """A file or folder that may be a checkpoint, and what it is."""

    path: Path
    layout: Layout


@dataclass
class _Series:
    """Candidates whose names differ in numbers alone."""

    glob: str  # of their names; empty for names without a number
    members: list[Candidate] = field(default_factory=list)
    role: str = ""  # "weights", "average" or "both", of its first member; empty if it has no model

    @property
    def folder(self) -> Path:
        return self.members[0].path.parent


class _Reader:
    """The files at a place, each opened once."""

    def __init__(self, place: str | Path, settings: ImportSettings) -> None:
        self.place = place
        self.settings = settings
        self.left_out = dict[str, str]()  # names, with the reasons
        self._contents = dict[Path, Content]()
        self.candidates = candidates_at(place)

    @property
    def notes(self) -> list[str]:
        """What is left out, in one line."""
        named = [f"{name} ({reason})" for name, reason in self.left_out.items()]
        return [f"left out: {list_first(named, 6)}"] if named else []

    def run(self) -> list[Found]:
        """Find what the files of one run hold."""
        if not self.candidates:
            explain_nothing(self.place)
        chosen = self._choose()
        found = []
        for candidate in chosen:
            content = self._open(candidate)
            if content.values.get(KIND) == "output":
                continue
            if not content.tensors and len(chosen) > 1:
                self._leave_out(candidate, "holds no tensors")
            else:
                found.append(_recognise(content, self.settings))
        if not found and self.settings.step_from:
            reason = f"finds no number in {self.candidates[0].path}"
            raise InvalidValueError("step_from", reason, value=self.settings.step_from)
        if not found:
            hint = "name their folder, a file, or a glob such as 'out/step*.pt'"
            raise DirectoryError(self.place, "holds no checkpoints", hint)
        return found

    def _open(self, candidate: Candidate) -> Content:
        if candidate.path not in self._contents:
            self._contents[candidate.path] = open_checkpoint(candidate.path, candidate.layout)
        return self._contents[candidate.path]

    def _leave_out(self, candidate: Candidate, reason: str) -> None:
        name = candidate.path.name
        if any(each.path.name == name and each is not candidate for each in self.candidates):
            name = f"{candidate.path.parent.name}/{name}"
        self.left_out[name] = reason

    # --- series

    def _choose(self) -> list[Candidate]:
        """Choose the candidates of one run: one series, or the weights and their averages."""
        named = [each for each in self.candidates if says_its_profile(each.path)]
        if named:
            return self._keep(named)
        candidates = self.candidates
        pattern = self.settings.step_from
        if pattern:
            candidates = [each for each in candidates if re.search(pattern, str(each.path))]
        series = _group_series(candidates, pattern)
        numbered = [each for each in series if each.glob]
        if not numbered:
            return self._keep(candidates)
        by_glob = []
        for each in numbered:
            if role_by_glob(each.members[0].path, self.settings):
                by_glob += each.members
        if by_glob and (self.settings.weights or not self.settings.average):
            return self._keep(by_glob)
        most = max(len(each.members) for each in numbered)
        rivals = []
        for each in numbered:
            is_average = AVERAGE_WORD.search(each.glob) is not None
            if 2 * len(each.members) > most or is_average:
                rivals.append(each)
        if len(rivals) > 1:
            rivals = self._with_models(rivals)
        return self._keep([member for each in rivals for member in each.members])

    def _keep(self, chosen: list[Candidate]) -> list[Candidate]:
        kept = {each.path for each in chosen}
        for candidate in self.candidates:
            if candidate.path not in kept and candidate.path.name not in self.left_out:
                self._leave_out(candidate, "another name")
        return chosen

    def _with_models(self, series: list[_Series]) -> list[_Series]:
        """Choose the series that are one run; raise a QuestionError if the choice is not clear."""
        held = []
        for each in series:
            each.role = self._find_role(each)
            if each.role:
                held.append(each)
        if not held:
            return series  # whose error says why
        averages = self._select_decay([each for each in held if each.role == "average"])
        weights = [each for each in held if each.role == "weights"]
        others = [each for each in held if each.role == "both"]
        if others and not weights and len(others) == 1 and not averages:
            return others
        if not others and len(weights) <= 1 and len(averages) <= 1:
            return [*weights, *averages]
        raise self._ask_which(held)

    def _find_role(self, series: _Series) -> str:
        """Find what the first file of a series holds that can be recognised."""
        first = series.members[0]
        try:
            found = _recognise(self._open(first), self.settings)
        except VanishedError:
            raise
        except FileFormatError as error:
            self._leave_out(first, error.reason)
            return ""
        except QuestionError:
            return "both"
        if found.averaged:
            return "both" if found.weights else "average"
        return "weights"

    def _select_decay(self, averages: list[_Series]) -> list[_Series]:
        """Keep the averages of guided-diffusion that have the given decay."""
        decays = {}
        for each in averages:
            decay = named_decay(each.members[0].path)
            if decay is not None:
                decays[each.glob] = decay
        if len(decays) < 2:
            return averages
        given = self.settings.ema_decay
        if given not in decays.values():
            choices = sorted({*decays.values()})
            text = " or ".join(f"{decay:g}" for decay in choices)
            reason = f"must be given: the files are of several averages, {text}"
            raise QuestionError("ema_decay", reason, *({"ema_decay": decay} for decay in choices))
        return [each for each in averages if decays.get(each.glob) in (None, given)]

    def _ask_which(self, series: Sequence[_Series]) -> QuestionError:
        """Make the question about several series, with globs that match nothing else."""
        series = sorted(series, key=lambda each: -self._open(each.members[0]).nbytes)
        answers: list[Answer] = []
        if len(series) == 2 and self._are_pairs(*series):
            slower, faster = self._sort_by_motion(series)
            answers.append(self._pair(slower, faster))
            series = [faster, slower]
        weights = [each for each in series if each.role == "weights"]
        if len(weights) == 1:
            averages = [each for each in series if each.role == "average"]
            answers += [self._pair(each, weights[0]) for each in averages]
        for each in series:
            answers.append({"place": str(each.folder / self._exact_glob(each))})
        counted = [f"{len(each.members)} x {each.glob}" for each in series]
        reason = f"holds several series of files, {list_first(counted)}"
        return QuestionError(self.place, reason, *answers)

    def _pair(self, average: _Series, weights: _Series) -> Answer:
        return {"average": self._exact_glob(average), "weights": self._exact_glob(weights)}

    def _are_pairs(self, first: _Series, other: _Series) -> bool:
        """Return whether two series have the same numbers, and tensors of the same names."""
        numbers = [_numbers(first), _numbers(other)]
        if numbers[0] != numbers[1] or first.role != other.role or len(numbers[0]) < 2:
            return False
        tensors = [self._open(each.members[0]).tensors for each in (first, other)]
        return tensors[0].keys() == tensors[1].keys()

    def _sort_by_motion(self, series: Sequence[_Series]) -> list[_Series]:
        """Sort two series by how far they move from file to file; averages move less."""
        moved = []
        for each in series:
            rows = []
            for member in each.members[-_COMPARED_FILES:]:
                found = _recognise(self._open(member), self.settings)
                rows.append(first_values(make_checkpoint(found.content, found.tensors)))
            moved.append(float(np.square(np.diff(rows, axis=0)).sum()))
        order = np.argsort(moved)
        return [series[index] for index in order]

    def _exact_glob(self, series: _Series) -> str:
        """Make a glob of a series that matches no other candidate."""
        own = {member.path for member in series.members}
        others = [each.path.name for each in self.candidates if each.path not in own]
        if any(fnmatchcase(name, series.glob) for name in others):
            return series.glob.replace("*", "*[0-9]")
        return series.glob


def _numbers(series: _Series) -> list[list[str]]:
    return sorted(re.findall("[0-9]+", member.path.name) for member in series.members)


def _group_series(candidates: Sequence[Candidate], step_from: str | None) -> list[_Series]:
    """Group candidates by their names without numbers, and without what a pattern finds; or by the
    names of their folders, if a glob named files in several folders."""
    are_apart = len({candidate.path.parent for candidate in candidates}) > 1
    by_glob = dict[str, _Series]()
    for candidate in candidates:
        path = _without_step(candidate.path, step_from)
        pattern = make_glob(path.name)
        if "*" not in pattern:
            outer = make_glob(path.parent.name)
            pattern = f"{outer}/{pattern}" if are_apart and "*" in outer else ""
        by_glob.setdefault(pattern, _Series(pattern)).members.append(candidate)
    return [*by_glob.values()]


def _without_step(path: Path, step_from: str | None) -> Path:
    """Replace what the user's pattern finds in a path by a 0."""
    match = re.search(step_from, str(path)) if step_from else None
    if match is None:
        return path
    text = str(path)
    return Path(f"{text[: match.start(1)]}0{text[match.end(1) :]}")


# --- what is at a place


def holds_checkpoints(place: str | Path) -> bool:
    """Return whether a directory, file or glob seems to name checkpoints or an import, without
    opening a file."""
    try:
        return is_import(place) or bool(candidates_at(place))
    except (FileFormatError, InvalidValueError):  # raised again when they are opened
        return True
    except DirectoryError:  # also from a glob
        return files.is_glob(place)


def candidates_at(place: str | Path) -> list[Candidate]:
    """List the files and folders that may each be a checkpoint."""
    path = files.expand_user(place)
    matches = _list_matches(path)
    if not matches:
        raise DirectoryError(place, "no file or folder matches")
    if matches != [path] or not path.is_dir():
        found = []
        for match in matches:
            layout = layout_at(match)
            if layout is not None:
                found.append(Candidate(match, layout))
        return found
    return _candidates_in(path)


def _candidates_in(folder: Path) -> list[Candidate]:
    """List the entries of a folder that are each a checkpoint, or the folder if it is one
    itself."""
    members = {}
    for entry, layout in list_members(folder).items():
        if not is_snapshot_name(entry):
            members[entry] = layout
    own = find_layout(folder, members)
    if own is None:
        return [Candidate(entry, layout) for entry, layout in members.items()]
    if isinstance(own, OneFile) and own.path.parent == folder:
        return [Candidate(own.path, own)]
    return [Candidate(folder, own)]


def _list_matches(pattern: Path) -> list[Path]:
    """List the files and folders that a glob or a path names."""
    if not files.is_glob(pattern):
        return [pattern] if pattern.exists() else []
    if files.is_url(pattern):
        return [*pattern.parent.glob(pattern.name)]
    # Path.glob takes no absolute patterns
    return sorted(map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207


def explain_nothing(place: str | Path) -> None:
    """Raise the error that says why nothing at a place is a checkpoint, and what might be meant."""
    folder = files.expand_user(place)
    if not folder.is_dir():
        return
    answers = dict[str, Answer]()
    sets = []
    for entry in sorted(files.system.list(folder)):
        if entry.is_dir():
            for inner in _folders_with_checkpoints(entry, 2):
                sets.append(inner)
                pattern = folder / make_glob(str(inner.relative_to(folder)))
                answers[str(inner)] = {"place": str(inner)}
                answers.setdefault(str(pattern), {"place": str(pattern / "*")})
        elif re.search("[0-9]", entry.name):
            row = find_container(entry)
            if row is not None and row.read is None:
                raise foreign_error(entry, row)
            if row is not None:
                pattern = folder / make_glob(entry.name)
                answers[str(pattern)] = {"place": str(pattern)}
    both: list[Answer] = []
    averages = [inner for inner in sets if AVERAGE_WORD.search(inner.name)]
    if len(sets) == 2 and len(averages) == 1 and sets[0].parent == sets[1].parent:
        both.append({"place": str(sets[0].parent / "*" / "*")})
    if answers:
        raise QuestionError(place, "holds no checkpoints itself", *both, *answers.values())


def _folders_with_checkpoints(folder: Path, levels: int) -> list[Path]:
    """Find the folders below a folder that hold the checkpoints of a training, by names alone."""
    with suppress(PostHocError):
        if list_members(folder):
            return [folder]
    found = []
    for entry in sorted(files.system.list(folder)) if levels else ():
        if entry.is_dir() and not entry.name.startswith("."):
            found += _folders_with_checkpoints(entry, levels - 1)
    return found


# --- which of two sets is the average


def _recognise(content: Content, settings: ImportSettings) -> Found:
    """Find what a checkpoint holds; its weights if it lacks the named average, which may have begun
    later."""
    try:
        return recognise(content, settings)
    except UnsuitableError:
        if settings.average is None or settings.kind:
            raise
        return recognise(content, replace(settings, average=None, kind="checkpoints"))


def _check_roles(run: list[Found], settings: ImportSettings) -> list[Found]:
    """Return the checkpoints, without an average that never moves.

    Raise a QuestionError if what a word calls an average equals the weights, or is unrelated to
    them. How it moves is no sign against a word: of files far apart, or where a rate falls, an
    average may move as far as the weights. The audit says whether they explain how.
    """
    both = [file for file in run if file.averaged and file.weights]
    if len(both) < 2:
        _check_twins(run, settings)
        return run
    ours, theirs = _read_starts(both)
    average, weights = _measure_motions(ours, theirs)
    pair = both[0].pair
    named = quote(pair.average_key) if pair.average_key else "the average"
    model = quote(pair.weights_key) if pair.weights_key else "the model"
    if average == 0 < weights:
        log.warning("%s: %s never moves, and is not used", both[0].path.parent, named)
        return [_without_average(file) for file in run]
    others: list[Answer] = []
    for key in _find_twins(both[0]):
        others.append({"average": pair.average_key, "weights": key})
    alone: Answer = {"kind": "checkpoints"}
    if weights > 0 and np.array_equal(ours, theirs):
        reason = f"must be given: {named} equals {model} in all files, as if they were written "
        reason += "while the average was swapped in"
        raise QuestionError("weights", reason, *others, alone)
    is_named = settings.average is not None or "ema" in pair.average_key.lower()
    if not is_named and not are_near(ours[-1], theirs[-1]):
        reason = f"must be given: {named} is unrelated to {model}, as no average is"
        raise QuestionError("average", reason, *others, alone)
    return run


def _check_twins(run: Sequence[Found], settings: ImportSettings) -> None:
    """Raise a QuestionError if files hold another set near the weights, and one of the two moves
    less, as averages do: no word says which is the average."""
    if len(run) < 2 or not all(file.weights for file in run) or settings.weights or settings.kind:
        return
    for key in _find_twins(run[0]):
        pairs = []
        for file in run:
            average = TensorSets(file.content, (key,)).below(key)
            pair = replace(file.pair, averaged=match_names(average, file.weights))
            pairs.append(replace(file, pair=pair))
        if not all(file.averaged for file in pairs):
            continue
        theirs, ours = _read_starts(pairs)
        motion, own = _measure_motions(theirs, ours)
        motions = {key: motion, file.pair.weights_key: own}
        slower, faster = sorted(motions, key=lambda each: motions[each])
        is_slower = 0 < motions[slower] <= _SLOWER * motions[faster]
        if is_slower and are_near(ours[-1], theirs[-1]) and faster:
            reason = f"must be given: the files hold {quote(key)}, too, and of the two "
            reason += f"{quote(slower)} moves less, as averages do"
            answer = {"average": slower, "weights": faster}
            raise QuestionError("average", reason, answer, {"kind": "checkpoints"})


def _measure_motions(ours: FloatArray, theirs: FloatArray) -> tuple[float, float]:
    """Measure how far two sets, [times, elements], move from time to time, squared."""
    average, weights = np.square(np.diff([ours, theirs], axis=1)).sum(axis=(1, 2)).tolist()
    return average, weights


def _without_average(file: Found) -> Found:
    return replace(file, pair=replace(file.pair, averaged={}), updates=None, kind="checkpoints")


def _read_starts(run: Sequence[Found]) -> tuple[FloatArray, FloatArray]:
    """Read the first elements of the newest averages and weights: [times, elements] each."""
    in_order = sorted(run, key=lambda file: file.time)
    pairs = [file.starts for file in in_order[-_COMPARED_FILES:]]
    return np.stack([ours for ours, _ in pairs]), np.stack([theirs for _, theirs in pairs])


def _find_twins(file: Found) -> list[str]:
    """List the unused sets that have as many tensors as the weights or the average."""
    counts = {len(file.averaged or file.weights), len(file.weights)}
    found = []
    for key in file.unused:
        below = [name for name in file.content.tensors if name.startswith(f"{key}.")]
        if len(below) in counts:
            found.append(key)
    return found


# --- sources


def _make_all(run: Sequence[Found], times: Times, settings: ImportSettings) -> list[Checkpoint]:
    names = dict[str, None]()
    for file in run:
        names.update(dict.fromkeys([*file.averaged, *file.weights]))
    check_globs(settings.selection, names)
    every = _interval_of_counts(run)
    checkpoints = []
    for file in run:
        checkpoints += _make(file, times, settings, every)
    for name, entry in checkpoints[0].entries.items():
        if entry.dtype.startswith("F8"):
            reason = f"tensor {quote(name)} has 8 bits a value, too few for averages"
            hint = "save the weights in 16 bits or more, or leave it out with `exclude`"
            raise UnsuitableError(checkpoints[0].path, reason, hint)
    return checkpoints


def _interval_of_counts(run: Sequence[Found]) -> int:
    """Find the interval of updates that the counts in the first and the last file show; else 1."""
    points = []
    for file in run:
        if file.updates and file.updates.count:
            points.append((file.time, file.updates.count))
    if len(points) < 2:
        return 1
    steps, updates = np.subtract(max(points), min(points)).tolist()
    is_whole = updates > 0 and steps % updates == 0
    return steps // updates if is_whole else 1


def _make(file: Found, times: Times, settings: ImportSettings, every: int) -> list[Checkpoint]:
    """Make the sources in a checkpoint: the weights, the average, or both. Its updates may be
    `every` so many steps."""
    time = file.time
    averaged = settings.select(file.tensors if file.averaged else {})
    weights = settings.select(file.weights)
    profile: StoredProfile = Point(float(time))
    about = {"kind": file.kind, "t_unit": times.unit, "is_stated": times.is_stated}
    checkpoints = []
    if weights:
        chosen = {name: weights[name] for name in averaged or weights}
        checkpoints.append(make_checkpoint(file.content, chosen, profile, time, **about))
    if averaged:
        if file.profile is not None:
            profile = file.profile(time)
        about |= {"sigma_rel": file.sigma_rel, "updates": file.updates}
        average = make_checkpoint(file.content, averaged, profile, time, **about)
        checkpoints.append(_with_profile(average, settings, every))
    return checkpoints


def _with_profile(average: Checkpoint, settings: ImportSettings, every: int) -> Checkpoint:
    """Give an average its profile.

    Raise a QuestionError if its count of updates does not fit its step: it began late, has another
    interval, or is no EMA, as Lightning's SWA.
    """
    try:
        return average.with_settings(settings)
    except InvalidValueError as error:
        answers: list[Answer] = [{"update_every": every}, {"kind": "checkpoints"}]
        if settings.update_every:
            del answers[0]
        raise QuestionError(error.subject, error.reason, *answers, value=error.value) from error


# --- several checkpoints as one run


def make_run(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return checkpoints by time, as one run: with a common run id, and distinct names.

    Of duplicates, such as a file `last` or `best` next to numbered files, take the first by name;
    of different ones of one time the one whose name has a number. An average that has not begun is
    a copy of the weights, and is left out next to them. A MismatchError names the first two that
    are of different models, or of one time with different values.
    """
    ordered = by_time(_with_names(checkpoints))
    first = ordered[0]
    for other in ordered:
        if difference := model_difference(first, other):
            raise _mismatch(first, other, difference, "`include` or `exclude`")
    kept = _without_duplicates(ordered)
    weights = {
        checkpoint.t: checkpoint for checkpoint in kept if isinstance(checkpoint.profile, Point)
    }
    run = list[Checkpoint]()
    copies = list[Checkpoint]()
    for checkpoint in kept:
        if checkpoint.t in weights and is_copy(checkpoint):
            copies.append(checkpoint)
        else:
            run.append(checkpoint)
    if copies:
        _check_copies(by_time(copies), weights)
    _check_averages(run)
    shapes = [(name, entry.shape) for name, entry in sorted(first.entries.items())]
    known = repr((shapes, first.identity))
    run_id = xxhash.xxh3_128_hexdigest(known.encode())
    return by_time([replace(checkpoint, run_id=run_id) for checkpoint in run])


def _check_copies(
    copies: Sequence[Checkpoint],
    weights: Mapping[float, Checkpoint],
) -> None:
    """Raise InvalidValueError if averages that have not begun are no copies of the weights, but
    stand still: they go on from earlier weights."""
    earlier = copies[0]
    later = copies[-1]
    if _are_unequal(weights[earlier.t], weights[later.t]) and not _are_unequal(earlier, later):
        names = f"{earlier.path.name} and {later.path.name}"
        reason = f"{names} hold the same average, and other weights, from which it cannot begin"
        hint = "name with a glob the files in which its first value has faded"
        raise InvalidValueError("update_after_step", reason, hint)


def _without_duplicates(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    kept = dict[tuple[float, str, bool], Checkpoint]()
    for other in sorted(checkpoints, key=lambda checkpoint: not _has_number(checkpoint)):
        is_raw = isinstance(other.profile, Point)
        twin = kept.setdefault((other.t, other.holds, is_raw), other)
        if twin is not other and _are_unequal(twin, other):
            if _has_number(other):
                raise _mismatch(twin, other, f"are both at {twin.t_unit[:-1]} {twin.t:,.12g}")
            log.warning("%s: left out, as %s has the same number", other.path, twin.name)
    return [*kept.values()]


def _has_number(checkpoint: Checkpoint) -> bool:
    return re.search("[0-9]", checkpoint.path.name) is not None


def _mismatch(
    first: Checkpoint,
    other: Checkpoint,
    difference: str,
    settings: str = "`step_from`",
) -> MismatchError:
    ours = make_glob(first.path.name)
    theirs = make_glob(other.path.name)
    hint = "name the files of one run with a glob"
    if ours != theirs:
        hint += f", such as '{ours}' or '{theirs}'"
    hint += f", or import with {settings}"
    return MismatchError(f"{first.path} and {other.path}", difference, hint)


def is_copy(checkpoint: Checkpoint) -> bool:
    """Return whether an ordinary EMA had not begun, so that it is a copy of the weights."""
    profile = checkpoint.profile
    return isinstance(profile, OrdinaryEMA) and profile.times[0] == profile.t


def _are_unequal(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two checkpoints of a model differ in the first elements of a tensor."""
    return not np.array_equal(first_values(one), first_values(other), equal_nan=True)


def _check_averages(run: Sequence[Checkpoint]) -> None:
    """Check the newest averages of a run without weights, by their first elements."""
    averages = by_time([average for average in run if isinstance(average.profile, OrdinaryEMA)])
    if len(averages) < 4 or len(averages) < len(run):
        return
    _warn_of_growth(averages[-1], _first_values(averages[-4:]))


def _first_values(averages: Sequence[Checkpoint]) -> FloatArray:
    """Read the first elements of averages, [times, elements]."""
    return np.stack([first_values(average) for average in averages])


def _warn_of_growth(newest: Checkpoint, values: FloatArray) -> None:
    """Warn if averages, [times, elements], grow from file to file: they may be sums, or moments."""
    squares = np.square(values).sum(axis=1)
    norms = np.sqrt(squares).tolist()
    factors = [b / a for a, b in pairwise(norms) if a > 0]
    if factors and min(factors) > _GROWTH:
        name = newest.path.name
        log.warning(
            "%s: norms grow by %.3g from file to file: is this an average?", name, factors[-1]
        )


def _with_names(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Give checkpoints distinct names, which begin at the folder of all; for coefficients and
    reports."""
    counts = Counter(checkpoint.path for checkpoint in checkpoints)
    folder = os.path.commonpath([str(path.parent) for path in counts])
    shared = len(Path(folder).parts)
    named = []
    for checkpoint in checkpoints:
        name = "/".join(checkpoint.path.parts[shared:])
        if counts[checkpoint.path] > 1 and not isinstance(checkpoint.profile, Point):
            name += " (average)"
        named.append(replace(checkpoint, name=name))
    return named
