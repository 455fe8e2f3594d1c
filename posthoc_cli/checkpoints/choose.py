"""Choose the checkpoints of one run among all that lie at a place, by what they hold.

1. Every candidate is opened; what cannot be read is left out and named.
2. Checkpoints whose tensors have the same names and shapes are of one model. The model with the
   most of them is chosen.
3. Words in names, settings, or the sets of tensors say the role of each: weights, average, both.
4. The surest sign of time that most have is the clock of the run.
5. Checkpoints of one role, with names that differ in numbers alone, are a series; those with equal
   values are copies.

What this leaves open is a question: a second model with about as many checkpoints, two series of
one role at the same times or in two folders, and what else has a number of its own or a later one.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli import files
from posthoc_cli.checkpoints.ask import Answer, QuestionError
from posthoc_cli.checkpoints.clock import (
    COUNTED,
    GROUPED,
    IN_NAME,
    LONE,
    NEARLY_ALL,
    STATED,
    Signs,
    Time,
    are_gapless,
    ask_about_names,
    confirm,
    has_word,
    is_numbered,
    list_patterns,
    read_signs,
    read_varying,
    sign_of_most,
)
from posthoc_cli.checkpoints.content import Content, Tensors
from posthoc_cli.checkpoints.layouts import recognise, role_by_glob, says_its_profile
from posthoc_cli.checkpoints.names import NUMBER, make_glob, read_name, read_number
from posthoc_cli.checkpoints.places import Place
from posthoc_cli.checkpoints.sets import Found, TensorSets
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.source import (
    COMPARED_FILES,
    are_near,
    first_values_of,
    moves_less,
)
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    UnsuitableError,
    VanishedError,
    list_first,
)
from posthoc_cli.profiles import FloatArray

_ALIKE = 0.9  # share of the tensors that checkpoints of one model have in common
_SHORTER = 0.8  # of a random walk in 5 epochs of 4 files each 0.3, in 2 of 10 0.7; of two seeds 1
# Largest of squared distances to the smallest one. Of 24 trainings of a small network in 4 files it
# was 1.3 (a large weight decay, files 500 steps apart) to 6.4, of 3 to 5 seeds at most 1.12.
_EQUAL = 1.25
_MOST_COMPARED = 6  # files that are read for it
_FEW_VALUES = 64
# Largest squared distance of neighbours to the one of the last file and the first. Of the same
# trainings in 3 to 12 files it was at most 1.41, of 18 of them in slots from 1.5 on; in the others
# files were about equally far, so that no order shows.
_TURNED = 1.5
_LEAST = 1 / 3  # share of a model's tensors that its average has: the trained ones

_OTHER_MODEL = "another model"
_ADVERSARY = re.compile(
    r"(?<![a-z])(?:d|do|dis|disc|discriminators?|net_?d|m[ps]d|critics?)(?![a-z])",
    re.IGNORECASE,
)
"""In names of a discriminator (HiFi-GAN's `do_*`, VITS' `D_*`, ESRGAN's `net_d_*`) or a critic."""

_BEST = re.compile("(?<![a-z])best(?![a-z])", re.IGNORECASE)
_AS_FOLDS = "as folds, seeds or members of an ensemble are"

Shape = tuple[str, tuple[int, ...]]


@dataclass(eq=False)
class Member:
    """A candidate that was opened, and what it says of itself."""

    path: Path
    name: str  # its path from the folder of all candidates on
    content: Content
    settings: ImportSettings
    signs: Signs
    first: Member | None = None  # of those whose names differ in numbers alone; None for it itself
    sign: str | None = None  # the clock of its run

    @cached_property
    def glob(self) -> str:
        """The glob of the names that differ in numbers alone."""
        return make_glob(self.name)

    @cached_property
    def shapes(self) -> Counter[Shape]:
        """The shapes of the selected tensors by the last two parts of their names: what stands
        before them may differ between the files of one model."""
        tensors = self._tensors
        if self.first is not None and self._has_tensors_of(self.first):
            return self.first.shapes
        with suppress(InvalidValueError):
            tensors = self.settings.select(tensors)
        found = Counter[Shape]()
        for name, tensor in tensors.items():
            if tensor.shape not in ((), (1,)):
                found[".".join(name.split(".")[-2:]).replace("_", ""), tensor.shape] += 1
        return found

    def _has_tensors_of(self, other: Member) -> bool:
        is_alike = self.content.shapes == other.content.shapes
        return is_alike and self._tensors.keys() == other._tensors.keys()

    @cached_property
    def _tensors(self) -> Tensors:
        """The tensors of the model; all but the state of a training if it is unclear which these
        are."""
        try:
            return self.found.tensors
        except VanishedError:
            raise
        except (FileFormatError, InvalidValueError):  # raised again when it is used
            return TensorSets(self.content).tensors

    @cached_property
    def found(self) -> Found:
        """What it holds; its weights if it lacks the named average, which may have begun later."""
        settings = self.settings
        like = None
        if self.first is not None:
            with suppress(FileFormatError, InvalidValueError):  # perhaps of that one alone
                like = self.first.found
        try:
            return recognise(self.content, settings, like)
        except UnsuitableError:
            if settings.average is None or settings.kind:
                raise
            return recognise(self.content, replace(settings, average=None, kind="checkpoints"))

    @cached_property
    def role(self) -> str:
        """Whether it holds "weights", an "average" or "both"; "both", too, if that is unclear."""
        named = role_by_glob(self.path, self.settings)
        if named:
            return "average" if named == "ema" else "weights"
        with suppress(FileFormatError, InvalidValueError):
            if not self.found.averaged:
                return "weights"
            if not self.found.weights:
                return "average"
        return "both"

    @cached_property
    def values(self) -> FloatArray:
        """The first values of its tensors."""
        return first_values_of(self.content, self._tensors)

    @property
    def all_signs(self) -> Signs:
        """Its signs, with what the tensors say: the number of a layout, or a count of updates."""
        if self.found.reading is not None:
            return {"given": self.found.reading}
        if not self.found.count:
            return self.signs
        return {**self.signs, COUNTED: Time(self.found.count, "steps", "")}

    @property
    def time(self) -> Time | None:
        """Its number on the clock of its run, or of the surest sign of its own."""
        sign = self.sign or sign_of_most({self.path: self.signs})
        return self.signs[sign] if sign else None

    @property
    def number(self) -> int | None:
        return self.time.number if self.time else None

    def is_later_than(self, other: Member) -> bool:
        """Return whether its number is larger, and counts the same, or something that is stated,
        as epochs beside steps."""
        ours = self.time
        theirs = other.time
        if ours is None or theirs is None or (ours.unit != theirs.unit and not ours.unit):
            return False
        return ours.number > theirs.number

    def is_like(self, other: Member) -> bool:
        """Return whether both are of one model."""
        if self.shapes == other.shapes:
            return True
        common = (self.shapes & other.shapes).total()
        less, more = sorted((self.shapes.total(), other.shapes.total()))
        if "average" in (self.role, other.role):
            return common >= _ALIKE * less and less > _LEAST * more
        return common >= _ALIKE * more

    def is_copy_of(self, other: Member) -> bool:
        """Return whether both hold equal values."""
        return self.values.shape == other.values.shape and np.array_equal(self.values, other.values)


Series = list[Member]
"""Members whose names differ in numbers alone, in one folder."""


class Chooser:
    """The candidates at a place, each opened once."""

    def __init__(self, place: Place, settings: ImportSettings) -> None:
        self.place = place
        self.settings = settings
        self.candidates = place.candidates
        self.left_out = dict[Path, str]()  # with the reasons
        self._copies = set[Path]()
        self._doubts = list[str]()
        folders = {str(path.parent) for path in self.candidates}
        self._root = Path(os.path.commonpath(folders) if folders else "")

    @property
    def notes(self) -> list[str]:
        """What is left out, in one line, and what contradicts given times."""
        named = [f"{self._name(each)} ({reason})" for each, reason in self.left_out.items()]
        notes = [*self.place.notes, *self._doubts]
        if named:
            notes.append(f"left out: {list_first(named, 6)}")
        return notes

    def choose(self) -> list[Member]:
        """Choose the members of one run; raise a QuestionError if several runs are possible."""
        self._leave_out(self.place.states, "the state of a training alone")
        self._leave_out(self.place.outputs, "an output of ema")
        opened = self._open(self._given())
        named = [member for member in opened if says_its_profile(member.content)]
        if named:
            self._leave_out([member for member in opened if member not in named], "another name")
            return named
        if len(opened) < 2:
            return opened
        members = self._of_one_model(opened)
        for alike in _group(members, lambda member: member.glob):
            _settle_signs(alike)
        series = self._choose_series(members)
        if not series:
            return self._choose_untimed(members)
        for each in series:
            self._check_order(each, members)
        self._check_folders(series)
        chosen = {member for each in series for member in each}
        self._check_left_out([member for member in opened if member not in chosen], series)
        return [member for member in members if member in chosen]

    def _given(self) -> list[Path]:
        """List the candidates that the settings do not exclude: they find a step in the path, or
        name roles by globs."""
        candidates = [*self.candidates]
        pattern = self.settings.step_from
        if pattern:
            matching = [path for path in candidates if re.search(pattern, str(path))]
            candidates = matching or candidates  # whose error names one
        named = [path for path in candidates if role_by_glob(path, self.settings)]
        if named and (self.settings.weights or not self.settings.average):
            candidates = named
        self._leave_out([path for path in self.candidates if path not in candidates], "not named")
        return candidates

    def _leave_out(self, left: Iterable[Path | Member], reason: str) -> None:
        for each in left:
            path = each.path if isinstance(each, Member) else each
            self.left_out.setdefault(path, reason)

    # --- 1. what can be read

    def _open(self, candidates: Sequence[Path]) -> list[Member]:
        members = list[Member]()
        has_numbers = any(re.search("[0-9]", self._name(path)) for path in candidates)
        failed = list[tuple[Path, FileFormatError]]()
        for path in candidates:
            try:
                content = self.place.open(path)
            except VanishedError:
                raise
            except FileFormatError as error:
                failed.append((path, error))
                continue
            if content.mark is not None and content.mark.kind == "output":
                self._leave_out([path], "an output of ema")
                continue
            if content.trackers and not content.tensors:
                continue  # a note names the tracker's run
            if not content.tensors and len(candidates) > 1:
                failed.append((path, UnsuitableError(path, "holds no tensors")))
                continue
            signs = read_signs(content, self.settings, self._root if has_numbers else None)
            members.append(Member(path, self._name(path), content, self.settings, signs))
        exports = [member for member in members if member.content.mark is not None]
        if len(exports) < len(members):  # else a training may have been converted
            self._leave_out(exports, "an export of ema")
            members = [member for member in members if member not in exports]
        for series in _group(members, lambda member: member.glob):
            _read_varying(series)
            for member in series[1:]:
                member.first = series[0]
        for path, problem in failed:
            if not members or self._is_of_series(path, members):
                raise problem.with_hint("move it away to leave it out") if members else problem
            self._leave_out([path], problem.reason)
        if not members:
            raise self._nothing_left()
        return members

    def _is_of_series(self, path: Path, members: Iterable[Member]) -> bool:
        """Return whether a path is called as others but for numbers, or is all that its folder has,
        which is called so."""
        folder = self._name(path).rpartition("/")[0]
        folders = set[str]()
        for member in members:
            if member.glob == make_glob(self._name(path)):
                return True
            folders |= {member.name, member.name.rpartition("/")[0]}
        is_alone = folder != "" and folder not in folders
        return is_alone and make_glob(folder) in map(make_glob, folders)

    def _nothing_left(self) -> DirectoryError:
        """Make the error about a place that holds nothing but what this package wrote."""
        held = "the state of a tracker"
        if self.left_out:
            held = "outputs of ema"
        reason = f"holds no checkpoints, only {held}"
        hint = "name their folder, a file, or a glob such as 'out/step*.pt'"
        return DirectoryError(self.place.name, reason, hint)

    def _name(self, path: Path) -> str:
        return "/".join(path.parts[len(self._root.parts) :])

    # --- 2. one model

    def _of_one_model(self, members: list[Member]) -> list[Member]:
        models = [model for model in _group_alike(members) if model[0].shapes]
        if not models:
            return members  # whose error says why
        models.sort(key=_rank_model)
        chosen, *others = models
        for other in others:  # in one series a difference is an error that names it
            globs = {member.glob for member in chosen}
            joining = [member for member in other if member.glob in globs]
            if not _are_parts(chosen + joining):
                chosen += joining
        left = [[member for member in other if member not in chosen] for other in others]
        rivals = [other for other in left if 2 * len(other) > len(chosen) > 1]
        if rivals:
            raise self._ask_about_models([chosen, *rivals])
        self._leave_out([each for each in members if each not in chosen], _OTHER_MODEL)
        return [each for each in members if each in chosen]

    # --- 4. and 5. one clock, and one series of each role

    def _choose_series(self, members: Sequence[Member]) -> list[Series]:
        """Choose the series of one run, at the times that the surest sign of most shows: without
        copies, and single files at the times of others; none if nothing says a time."""
        sign = sign_of_most({member.path: member.signs for member in members})
        timed = [member for member in members if sign in member.signs]
        untimed = [member for member in members if member not in timed]
        for member in timed:
            member.sign = sign
        is_one_of_many = sign == LONE and len(timed) == 1 and len(untimed) > 1
        if _numbers(timed) <= {0} or is_one_of_many:
            return []
        kept = list[Series]()
        is_clear = True
        for series in sorted(self._split(timed), key=len, reverse=True):
            others = [each for each in kept if each[0].role == series[0].role]
            if sign == LONE and others and 2 * len(series) <= len(others[0]):
                untimed += series  # in few names such a number may mean something else
                continue
            left = self._without_copies(series, others)
            rivals = [each for each in others if left and self._are_rivals(each, left)]
            if len(left) == 1 and any(len(each) > 1 for each in rivals):
                self._leave_out(left, f"at the time of one of {self._glob_of(rivals[0])}")
            elif len(left) == 1 and any(len(each) > 1 for each in kept if each not in others):
                self._leave_out(left, "a single file")
            elif left:
                is_clear = is_clear and not rivals
                kept.append(left)
        for series in self._split(untimed):
            self._leave_out(self._without_copies(series, kept), "nothing says its time")
        roles = {each[0].role for each in kept}
        if not is_clear or ("both" in roles and len(roles) > 1):
            raise self._ask_which(kept)
        return kept

    def _choose_untimed(self, members: list[Member]) -> list[Member]:
        """Choose the members whose times the user is asked for, where nothing says one: without
        copies and single files, if others are a series."""
        parts = self._split(members)
        series = [part for part in parts if len(part) > 1]
        if not series:
            return members  # whose error says why
        for part in parts:
            if part not in series:
                self._leave_out(self._without_copies(part, series), "nothing says its time")
        chosen = {member for part in series for member in part}
        return [member for member in members if member in chosen]

    def _without_copies(self, series: Series, others: Iterable[Series]) -> Series:
        """Leave out the copies of members of other series, and of one at the same time."""
        left = Series()
        known = [member for other in others for member in other]
        for member in series:
            at_time = [each for each in left if each.number == member.number]
            twin = next((each for each in known + at_time if member.is_copy_of(each)), None)
            if twin is None:
                left.append(member)
            else:
                self._copies.add(member.path)
                self._leave_out([member], f"a copy of {twin.path.name}")
        return left

    def _are_rivals(self, one: Series, other: Series) -> bool:
        """Return whether two series of one role have a time in common, or lie in two folders that
        the user has not named by a glob."""
        are_apart = self._folder(one[0]) != self._folder(other[0])
        if are_apart and not files.is_glob(files.expand_user(self.place.name)):
            return True
        return not _numbers(one).isdisjoint(_numbers(other))

    def _split(self, members: Iterable[Member]) -> list[Series]:
        """Group members by their names without numbers and their folders; where times repeat in a
        group, by the number in names that tells them apart, as a seed does."""
        series = list[Series]()
        for group in _group(members, lambda member: (member.glob, self._folder(member))):
            series += _split_by_time(group) if len(_numbers(group)) < len(group) else [group]
        return series

    def _check_order(self, series: Series, members: Series) -> None:
        """Raise a QuestionError if one sign alone says that files are times, or another number
        beside it differs, and their values contradict it; note it if the user has given the
        sign."""
        doubt = _doubt_order(series)
        if not doubt:
            return
        if series[0].sign != "given" and _AS_FOLDS in doubt and _are_called_folds(series):
            raise self._ask_which_folder(members)
        reason = f"{self._glob_of(series)}: little but a number says the times of these files, and "
        reason += f"they {doubt}"
        if series[0].sign == "given":
            self._doubts.append(reason)
            return
        paths = [member.path for member in series]
        raise QuestionError(self.place.name, reason, *list_patterns(paths[0], paths))

    def _check_folders(self, several: Sequence[Series]) -> None:
        """Raise a QuestionError if files of one role lie in several folders, and are unrelated to
        those before them, as the best and the last files of folds that state their epochs are."""
        for role in {series[0].role for series in several}:
            alike = [series for series in several if series[0].role == role]
            members = [member for series in alike for member in series]
            if len(alike) == 1 or members[0].sign == "given":
                continue
            for before, after in pairwise(sorted(members, key=_order)):
                are_apart = before.path.parent != after.path.parent
                if are_apart and not are_near(before.values, after.values):
                    raise self._ask_which_folder(members)

    # --- what is left out

    def _check_left_out(self, left: Sequence[Member], chosen: Sequence[Series]) -> None:
        """Raise a QuestionError if a member that was left out, and is no copy, is later than the
        chosen ones, or is of their model and has a number in its name, but is not called the best
        at an earlier time."""
        newest = max((member for series in chosen for member in series), key=_order)
        doubtful = []
        for member in left:
            if member.path in self._copies:
                continue
            is_later = member.is_later_than(newest)
            is_other = self.left_out.get(member.path) == _OTHER_MODEL
            is_best = _BEST.search(member.path.name) and newest.is_later_than(member)
            has_number = is_numbered(member.path, member.signs) and not is_best
            if is_later or (has_number and not is_other):
                doubtful.append(member)
        if doubtful:
            raise self._ask_which([*chosen, *self._split(doubtful)])

    # --- questions

    def _ask_which(self, several: Sequence[Series]) -> InvalidValueError:
        """Make the question which of several series are the run; without a command if they are
        parts of one: any proposal would leave most of them out."""
        several = sorted(several, key=lambda each: (_is_adversary(each), -len(each)))
        counted = [f"{len(each)} x {self._glob_of(each)}" for each in several]
        reason = f"holds several series of files, {list_first(counted)}"
        if _follow_each_other(several):
            reason += ", and their values are of one run: its steps begin anew, as in each epoch"
            hint = "rename copies of the files after the step of the whole training"
            return InvalidValueError(self.place.name, reason, hint)
        rename = "rename copies of the files of one run after their steps: step1000.pt"
        return QuestionError(
            self.place.name, reason, *self._list_answers(several), otherwise=rename
        )

    def _ask_about_models(self, models: Sequence[Series]) -> QuestionError:
        """Make the question which of several models is the run, a command for each; also for each
        of two that are alike, such as the generators of a CycleGAN."""
        several = list[Series]()
        for model in models:
            groups = _group(model, lambda member: member.glob)
            most = max(map(len, groups))
            several += [group for group in groups if len(group) == most]
        counted = [f"{len(each)} x {self._glob_of(each)}" for each in several]
        reason = f"holds several models, {list_first(counted)}: each is a run of its own"
        answers = self._list_answers(several)
        return QuestionError(self.place.name, reason, *answers, are_models=True)

    def _ask_which_folder(self, members: Series) -> QuestionError:
        """Make the question which of several trainings is the run, a command for each folder."""
        folders = _group(members, lambda member: member.path.parent)
        counted = []
        for each in folders:
            name = self._name(each[0].path.parent) or self._glob_of(each)
            counted.append(f"{len(each)} x {name}")
        reason = f"holds models that are unrelated, {_AS_FOLDS}, {list_first(counted)}: each is a "
        reason += "run of its own"
        answers: list[Answer] = []
        for each in folders:
            if len(each) > 1:
                answers.append({"place": files.escape_glob(str(each[0].path.parent))})
        several = "name several checkpoints of one of them"
        return QuestionError(self.place.name, reason, *answers, otherwise=several, are_models=True)

    def _list_answers(self, several: Sequence[Series]) -> list[Answer]:
        """List the pairs of an average and its weights, the series together if they are of one run,
        and each alone, with globs that match nothing else; the longest first."""
        answers: list[Answer] = []
        if len(several) == 2:
            for slower, faster in (several, several[::-1]):
                if _is_average_of(slower, faster):
                    answers.append(self._pair(slower, faster))
                    several = [faster, slower]
        weights = [each for each in several if each[0].role == "weights"]
        if len(weights) == 1:
            averages = [each for each in several if each[0].role == "average"]
            answers += [self._pair(each, weights[0]) for each in averages]
        members = [member for each in several for member in each]
        globs = [self._exact_glob(each) for each in several if len(each) > 1]
        if len({each[0].glob for each in several}) > 1:
            answers += _list_spellings(members)
        run = _cut_at_resumes(several)
        is_most = len(run) >= NEARLY_ALL * len(members)
        are_alike = len({make_glob(member.path.name) for member in run}) == 1
        if is_most and are_alike and _are_near_in_time(run):
            is_whole = len(run) == len(members) and len({member.glob for member in run}) == 1
            names = files.list_in_braces(member.name for member in run)
            globs.insert(0, self._glob_of(run) if is_whole else names)
        root = files.escape_glob(str(self._root))
        return [*answers, *({"place": f"{root}/{pattern}"} for pattern in globs)]

    def _pair(self, average: Series, weights: Series) -> Answer:
        globs = [self._exact_glob(each) for each in (average, weights)]
        names = [pattern.rpartition("/")[2] for pattern in globs]
        ours, theirs = globs if names[0] == names[1] else names
        return {"average": ours, "weights": theirs}

    def _exact_glob(self, series: Series) -> str:
        """Make a glob of a series that matches no other candidate."""
        own = {member.path for member in series}
        others = [self._name(path) for path in self.candidates if path not in own]
        plain = self._glob_of(series)
        for pattern in (plain, plain.replace("*", "*[0-9]")):
            if not any(fnmatchcase(name, pattern) for name in others):
                return pattern
        return _make_glob(series, _spell)

    def _glob_of(self, series: Series) -> str:
        """Make the glob of the names of a series, in which the numbers that all share stay."""
        return _make_glob(series, lambda _: "*")

    def _folder(self, member: Member) -> Path:
        """Find the folder of a series, in which its numbered files or folders lie."""
        folder = member.path.parent
        return folder if is_numbered(member.path, {}) or folder == self._root else folder.parent


def _make_glob(series: Series, wildcard: Callable[[Sequence[str]], str]) -> str:
    """Make the glob of the names of a series, in which a wildcard takes the place of each number
    that differs."""
    names = [member.name for member in series]
    columns = [*zip(*map(NUMBER.findall, names), strict=False)]
    texts = iter([column[0] if len({*column}) == 1 else wildcard(column) for column in columns])
    return NUMBER.sub(lambda _: next(texts, "*"), files.escape_glob(names[0]))


def _spell(numbers: Sequence[str]) -> str:
    """Make the pattern of numbers with as many digits as some have."""
    spelled = sorted({re.sub("[0-9]", "[0-9]", text) for text in numbers}, key=len)
    return spelled[0] if len(spelled) == 1 else f"{{{','.join(spelled)}}}"


def _list_spellings(members: Series) -> list[Answer]:
    """List the patterns of a number that is 1_000 in some names, and 900 in others alike."""
    if len({make_glob(GROUPED.sub("0", member.name)) for member in members}) > 1:
        return []
    longest = max(members, key=lambda member: len(member.name))
    paths = [member.path for member in members]
    return list_patterns(longest.path, paths)


def _numbers(series: Iterable[Member]) -> set[int | None]:
    return {member.number for member in series}


def _is_average_of(one: Series, other: Series) -> bool:
    """Return whether a series has the times of another one and tensors of the same names, and moves
    less, so that it may be its average."""
    are_same = len(one) > 1 and _numbers(one) == _numbers(other) and one[0].role == other[0].role
    if not are_same or one[0].content.tensors.keys() != other[0].content.tensors.keys():
        return False
    return moves_less(_newest_values(one), _newest_values(other))


def _follow_each_other(several: Sequence[Series]) -> bool:
    """Return whether series at the same times are of one run, in the order of all numbers in names:
    then that way through all files is shorter than one from the first file to each series."""
    joined = [member for series in several for member in series]
    alike = {(member.glob, member.values.shape) for member in joined}
    begins = {min(map(_order, series)) for series in several}
    if len(alike) > 1 or len(begins) > 1 or len(_numbers(joined)) == len(joined):
        return False
    firsts = [min(series, key=_numbers_in_name).values for series in several]
    to_each = float(np.square(np.stack(firsts) - firsts[0]).sum())
    to_each += sum(_motion(series, _numbers_in_name) for series in several)
    return _motion(joined, _numbers_in_name) < _SHORTER * to_each


def _cut_at_resumes(several: Sequence[Series]) -> Series:
    """Join series without the times from which a later one goes on, as in the folder of a resume;
    none if two begin at one time."""
    begins = sorted(min(map(_order, series)) for series in several)
    if len({*begins}) < len(begins):
        return []
    joined = Series()
    for series in several:
        later = [begin for begin in begins if begin > min(map(_order, series))]
        joined += [member for member in series if _order(member) < min(later, default=math.inf)]
    return joined


def _are_near_in_time(members: Series) -> bool:
    """Return whether values are near those before them, as in phases of one run."""
    in_order = sorted(members, key=_order)
    return all(are_near(before.values, after.values) for before, after in pairwise(in_order))


def _is_confirmed(series: Series) -> bool:
    """Return whether a word in names, or their numbers and the contents alike, say the times, and
    names differ in nothing but numbers that do, and metrics."""
    if series[0].sign in (LONE, "stated epoch", "given"):
        return False
    columns = zip(*(NUMBER.findall(member.name) for member in series), strict=False)
    varying = [each for each in columns if len({*each}) > 1 and "." not in "".join(each)]
    for column in varying:
        for text, member in zip(column, series, strict=True):
            number = read_number(text)
            signs = [sign for sign, time in member.signs.items() if time.number == number]
            if {*signs} <= {LONE}:
                return False
    return len(varying) > 0


def _are_called_folds(series: Series) -> bool:
    """Return whether a number that differs in names is one of a fold or seed."""
    for marks in zip(*(read_name(member.name) for member in series), strict=False):
        if len({mark.text for mark in marks}) > 1 and re.match("(?i:fold|seed)", marks[0].text):
            return True
    return False


def _doubt_order(series: Series) -> str:
    """Say what contradicts the order of files, for a message; empty if nothing does."""
    in_order = sorted(series, key=_order)
    is_confirmed = _is_confirmed(series)
    if not is_confirmed and _are_equally_far(_compared(in_order[:_MOST_COMPARED])):
        how = "are equally far from each other" if len(series) > 2 else "are unrelated"
        return f"{how}, {_AS_FOLDS}"
    if is_confirmed and not (
        series[0].sign == "step in name" and are_gapless([*map(_order, series)])
    ):
        return ""  # hardly any training saves each step: those may be the numbers of slots
    places = np.linspace(0, len(series) - 1, min(len(series), _MOST_COMPARED)).round()
    if _end_at_their_begin(_compared([in_order[int(place)] for place in places])):
        reason = "go on from the last to the first, as slots that are written in turn do: rename "
        return f"{reason}copies of slots after their steps"
    return ""


def _compared(series: Series) -> list[FloatArray]:
    """Read values to compare; none if they are few, or of several models."""
    values = [member.values for member in series]
    sizes = {*map(len, values)}
    return values if len(sizes) == 1 and min(sizes) >= _FEW_VALUES else []


def _are_equally_far(values: Sequence[FloatArray]) -> bool:
    """Return whether the first files have equal distances, or two are unrelated: the squared
    distance of a walk grows with each file. Few values are equally far by chance."""
    if len(values) < 3:
        return len(values) == 2 and not are_near(*values)
    distances = [_distance(one, other) for one, other in combinations(values, 2)]
    return 0 < max(distances) <= _EQUAL * min(distances)


def _end_at_their_begin(values: Sequence[FloatArray]) -> bool:
    """Return whether the last file is nearer to the first than two neighbours are: the latter of
    them was written before all others."""
    if len(values) < 3:
        return False
    farthest = max(_distance(before, after) for before, after in pairwise(values))
    return farthest > _TURNED * _distance(values[-1], values[0])


def _distance(one: FloatArray, other: FloatArray) -> float:
    return float(np.square(one - other).sum())


def _motion(members: Series, order: Callable[[Member], Any]) -> float:
    """Sum the squared distances of values on the way through members in an order; 0 if they are
    few, or of several models."""
    values = _compared(sorted(members, key=order))
    return sum(_distance(before, after) for before, after in pairwise(values))


def _numbers_in_name(member: Member) -> list[float]:
    return [read_number(text) or 0 for text in NUMBER.findall(member.name)]


def _order(member: Member) -> int:
    return member.number or 0


def _newest_values(series: Series) -> FloatArray:
    in_order = sorted(series, key=_order)
    return np.stack([member.values for member in in_order[-COMPARED_FILES:]])


def _group_alike(members: Iterable[Member]) -> list[list[Member]]:
    """Group members by the model that they are of."""
    models = list[list[Member]]()
    for member in sorted(members, key=lambda each: -each.shapes.total()):
        for model in models:
            if member.is_like(model[0]) or member.is_like(model[-1]):
                model.append(member)
                break
        else:
            models.append([member])
    return models


def _split_by_numbers(members: Series) -> Iterator[list[Series]]:
    """Split members by a number in their names into parts of two or more, by each that does."""
    for column in zip(*(NUMBER.findall(member.name) for member in members), strict=False):
        number = dict(zip(members, column, strict=False))
        parts = _group(members, number.__getitem__)
        if 2 * len(parts) <= len(members):
            yield parts


def _are_parts(members: Series) -> bool:
    """Return whether a number in names tells models apart, each with several files, as in
    `step_100_part0.pt`."""
    for parts in _split_by_numbers(members):
        if len(parts) > 1 and all(len(_group_alike(part)) == 1 for part in parts):
            return True
    return False


def _split_by_time(group: Series) -> list[Series]:
    """Split a group in which times repeat by a number in names, if that gives each part distinct
    times."""
    for parts in _split_by_numbers(group):
        if all(len(_numbers(part)) == len(part) for part in parts):
            return parts
    return [group]


def _read_varying(series: Series) -> None:
    """Take the only number that differs in all names of a series as a sign of time, if no sign of
    time in their names differs."""
    if len(series) < 2 or any(has_word(member.signs) for member in series):
        return
    if len({member.signs[LONE].number for member in series if LONE in member.signs}) == len(series):
        return
    readings = read_varying([member.path.name for member in series])
    for member, reading in zip(series, readings, strict=False):
        member.signs = {**member.signs, LONE: reading}


def _settle_signs(series: Series) -> None:
    """Drop the number in names, or the one that contents state, where one of them is wrong; raise a
    QuestionError if it is unclear which."""
    for named, stated in product(IN_NAME.values(), STATED):
        if len(series) > 1 and all({named, stated} <= {*member.signs} for member in series):
            wrong = _find_wrong(series, named, stated)
            for member in series:
                signs = member.signs.items()
                member.signs = {sign: time for sign, time in signs if sign not in wrong}


def _find_wrong(series: Series, named: str, stated: str) -> set[str]:
    """Find which of two signs is wrong; none if both may be right, as steps beside epochs.

    Where they order the files otherwise, as names of slots that are written in turn do, the order
    whose way through the values is shorter is right, and a lone number in names is no time unless
    its way is. In one order, an epoch that contents state is right where it is ahead of the name:
    what is counted anew falls behind.
    """
    pairs = sorted((member.signs[named].number, member.signs[stated].number) for member in series)
    numbers = [number for number, _ in pairs]
    inside = [number for _, number in pairs]
    if inside != sorted(inside) and all(_says_step(member, named) for member in series):
        return {"stated epoch"}  # it begins anew at a resume
    if min(len({*numbers}), len({*inside})) < len(pairs):
        return set()
    in_names = {named, "confirmed steps", "confirmed epochs"}
    if inside != sorted(inside):
        by_name = _motion(series, lambda member: member.signs[named].number)
        by_content = _motion(series, lambda member: member.signs[stated].number)
        if by_name < _SHORTER * by_content:
            return {stated}
        if named == LONE or by_content < _SHORTER * by_name:
            return in_names
    else:
        are_epochs = named == "epoch in name" or (named == LONE and are_gapless(numbers))
        count_alike = are_epochs == (stated == "stated epoch")
        are_behind = [count_alike and number > each + 1 for number, each in pairs]
        is_ahead = stated == "stated epoch" and any(each > number + 1 for number, each in pairs)
        if is_ahead and not any(are_behind):
            return in_names
        if not is_ahead and not all(are_behind):
            return set()
    if all("confirmed steps" in confirm(each.content, each.signs[named]) for each in series):
        return set()  # contents state it, too: microbatches beside steps
    raise ask_about_names({member.path: member.signs for member in series}, named, stated)


def _says_step(member: Member, named: str) -> bool:
    """Return whether a number in a name is the step that contents state."""
    return "stated" in member.signs and member.signs["stated"].number == member.signs[named].number


def _rank_model(model: Series) -> tuple[bool, bool, int, int]:
    """Rate how unlikely a model is to be the one that a user wants: a single file, a network that
    a training has for its loss alone, fewer files, and fewer parameters are less likely."""
    size = sum(math.prod(shape) * count for (_, shape), count in model[0].shapes.items())
    return len(model) == 1, _is_adversary(model), -len(model), -size


def _is_adversary(members: Series) -> bool:
    return any(_ADVERSARY.search(member.name) for member in members)


def _group(members: Iterable[Member], key: Callable[[Member], Hashable]) -> list[Series]:
    groups = dict[Hashable, Series]()
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return [*groups.values()]
