"""The road from a place to the sources of a run, for every command.

`places` lists what may be a checkpoint, `choose` says which ones are a run, of weights, averages or
both; here they get their times and roles, and become sources, whose decays `decays` finds. Times
come from contents and names, never from the order or the age of files. The manifest of an import
says all of this: nothing is decided again.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash

from posthoc_cli import files
from posthoc_cli.checkpoints.ask import ASKED, Answer, QuestionError, with_command
from posthoc_cli.checkpoints.choose import Chooser
from posthoc_cli.checkpoints.clock import Time, read_times
from posthoc_cli.checkpoints.content import Content, list_names
from posthoc_cli.checkpoints.decays import settle_decays
from posthoc_cli.checkpoints.folders import AVERAGE_WORD
from posthoc_cli.checkpoints.layouts import check_applies, check_given, recognise
from posthoc_cli.checkpoints.manifest import Listed, Manifest, read_manifest
from posthoc_cli.checkpoints.places import Place, check_foreign, explain_nothing
from posthoc_cli.checkpoints.sets import Found, match_names
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.source import (
    COMPARED_FILES,
    Checkpoint,
    are_near,
    first_values,
    first_values_of,
    is_copy,
    make_checkpoint,
    moves_less,
    moves_towards,
)
from posthoc_cli.checkpoints.trackers import note_trackers
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    PostHocError,
    UnsuitableError,
    argument,
    quote,
)
from posthoc_cli.profiles import FloatArray, Point, StoredProfile
from posthoc_cli.snapshots.directory import MANIFEST, is_import
from posthoc_cli.snapshots.output_info import AVERAGE_OF_TWO
from posthoc_cli.snapshots.selection import check_globs
from posthoc_cli.snapshots.source import by_time, model_difference
from posthoc_cli.snapshots.sources import Sources
from posthoc_cli.snapshots.tensorfile import KeptOpen

log = logging.getLogger(__name__)

_EPOCHS = 1000  # largest number that is read as perhaps epochs: few trainings have more
_TARGET = re.compile("target|teacher|momentum", re.IGNORECASE)
# Least cosine between successive motions at which weights may be an average: for an EMA of 100
# steps in files 100 steps apart it is 0.5 to 0.9, for weights late in a training -0.3 to 0.4.
_ALIKE = 0.5


@dataclass(frozen=True)
class _Found:
    """The checkpoints that files make with some settings."""

    checkpoints: Sequence[Checkpoint]
    settings: ImportSettings  # given, or found
    numbers: str  # what the numbers of files are taken for
    notes: tuple[str, ...]  # what is not used
    notices: tuple[str, ...]  # what is not used, without a doubt
    may_be_epochs: bool  # whether few numbers of no stated unit are taken for steps
    checks: tuple[str, ...] = ()  # lines about the decay

    @property
    def findings(self) -> tuple[str, ...]:
        counts = Counter(checkpoint.holds for checkpoint in self.checkpoints)
        contents = ", ".join(f"{count:,} x {what}" for what, count in counts.items())
        return contents, *self.checks


def find(
    name: str | Path,
    given: Mapping[str, Any] = MappingProxyType({}),
    settle: bool = True,
    look: files.Look | None = None,
    kept: KeptOpen | None = None,
) -> Sources:
    """Find the run at a place, or open an import, which has its settings, and takes none.

    A question about what files leave open ends in the command that answers it. Without `settle`, as
    for an audit, no values are read: averages whose decay no file states get placeholders as
    profiles, and nothing is asked about how they move.
    """
    path = files.expand_user(name)
    look = look or files.Look()
    if is_import(path):
        for setting, value in given.items():
            reason = "is a setting of imports, and this is one: give it the files' folder instead"
            raise InvalidValueError(setting, reason, value=value)
        return _open_import(path, look)
    with nullcontext(kept) if kept else KeptOpen() as kept:
        place = Place(name, look, kept)
        places = {str(name): place}  # each file of them is read once

        def attempt(name: str | Path, values: Mapping[str, Any]) -> _Found:
            place = places.setdefault(str(name), Place(name, kept=kept))
            settings = ImportSettings(**values)
            if settle or values != given:  # a line to paste, which is an import
                return _read_with_decays(place, settings)
            return _read(place, settings, is_unclaimed=True)

        try:
            found = with_command(name, given, attempt)
        except PostHocError:  # which has no sources that hold them
            for notice in place.tracker_notes:
                log.info("%s: %s", name, notice)
            raise
    return Sources(
        path,
        tuple(found.checkpoints),
        look=look,
        settings=found.settings.given,
        numbers=found.numbers,
        notes=found.notes,
        notices=(*place.tracker_notes, *found.notices),
        findings=found.findings if settle else (),
    )


def _read_with_decays(place: Place, given: ImportSettings) -> _Found:
    run = _read(place, given)
    numbers = run.numbers if run.may_be_epochs else ""
    settings, checks, warnings = settle_decays(run.checkpoints, given, numbers)
    checkpoints = [checkpoint.with_settings(settings) for checkpoint in run.checkpoints]
    notes = (*run.notes, *warnings, *_note_on_motion(checkpoints, settings))
    return replace(
        run, checkpoints=checkpoints, settings=settings, notes=notes, checks=tuple(checks)
    )


def _note_on_motion(checkpoints: Sequence[Checkpoint], settings: ImportSettings) -> list[str]:
    """Note that files move as averages do, each in the direction of the one before. Weights that
    drift do the same."""
    newest = checkpoints[-COMPARED_FILES:]
    are_weights = all(isinstance(source.profile, Point) for source in checkpoints)
    if settings.kind or not are_weights or len(newest) < 4:
        return []
    motions = np.diff([first_values(source) for source in newest], axis=0)
    along = float((motions[1:] * motions[:-1]).sum())
    size = float(np.linalg.norm(motions[1:]) * np.linalg.norm(motions[:-1]))
    if along <= _ALIKE * size:
        return []
    text = f"the files move alike from one to the next (cosine {along / size:.2f}), as averages do,"
    text += f" or weights that drift; if they hold an EMA, import with {argument('kind')} ema"
    return [text]


# --- an import


def _open_import(folder: Path, look: files.Look) -> Sources:
    """Open the checkpoints of an import in the roles and at the times that it has found; raise
    FileFormatError if a file is not as it was."""
    look.add(folder / MANIFEST)
    manifest = read_manifest(folder)
    for path in manifest.files:
        look.add(path)
    contents = dict[Path, Content]()
    checkpoints = []
    try:
        for listed in manifest.checkpoints:
            if listed.path not in contents:
                contents[listed.path] = Place(listed.path, look).open_at(listed.path)
            checkpoints.append(_restore(listed, contents[listed.path], manifest))
    except PostHocError:
        for path in manifest.files:
            manifest.check_file(path)
        raise
    for checkpoint in checkpoints:
        for file in checkpoint.opened.values():
            manifest.check_identity(file)
    run = _make_run(checkpoints)
    trackers = chain.from_iterable(content.trackers for content in contents.values())
    return Sources(
        folder,
        tuple(run),
        look=look,
        settings=manifest.settings.given,
        notices=tuple(note_trackers(manifest.origin, trackers)),
    )


def _restore(listed: Listed, content: Content, manifest: Manifest) -> Checkpoint:
    missing = [name for name in listed.names.values() if name not in content.tensors]
    if missing:
        reason = f"lacks tensor {quote(missing[0])}, which {manifest.folder} refers to"
        raise FileFormatError(listed.path, reason, "import again")
    tensors = {name: content.tensors[stored] for name, stored in listed.names.items()}
    unit, is_stated = manifest.unit
    about: dict[str, Any] = {"t_unit": unit, "is_stated": is_stated}
    profile: StoredProfile = Point(float(listed.step))
    if listed.is_average and listed.updates is None:  # the name of the file says its profile
        found = recognise(content, manifest.settings)
        if found.profile is None:
            raise FileFormatError(listed.path, "is not the average that was imported")
        profile = found.profile(listed.step)
        about["sigma_rel"] = found.sigma_rel
    about["updates"] = listed.updates
    checkpoint = make_checkpoint(content, tensors, profile, listed.step, **about)
    return checkpoint.with_settings(manifest.settings)


# --- the checkpoints at a place


def _read(place: Place, settings: ImportSettings, is_unclaimed: bool = False) -> _Found:
    """Read all checkpoints at a place, without outputs of this package, with the profiles that are
    known; raise a QuestionError about what the files leave open."""
    chooser = Chooser(place, settings)
    if not chooser.candidates:
        explain_nothing(place)
    members = chooser.choose()
    try:
        run = _with_one_prefix([member.found for member in members])
    except UnsuitableError:  # perhaps the state of a training, beside a model of another kind
        check_foreign(place)
        raise
    if settings.average and not any(file.averaged for file in run):
        recognise(run[-1].content, settings)  # whose error says what there is
        raise InvalidValueError("average", "is no name of a file here", value=settings.average)
    _check_averages(run)
    if not is_unclaimed:
        _check_unmatched(run[-1], settings)
        _check_targets(run, settings)
    for file in run:
        check_given(file, settings)
    times = read_times({member.path: member.all_signs for member in members}, settings)
    notes = list[str]()
    run = _leave_out_untrained(run, times, notes)
    if not is_unclaimed:
        run = [_without_tracked(file, settings) for file in run]
        run = _check_roles(run, settings, notes)
    check_applies(any(file.averaged for file in run), settings)
    last = max(times, key=lambda time: time.number)
    may_be_epochs = False
    if any(file.updates is not None for file in run):
        _check_unit(last)
        may_be_epochs = not last.is_stated and last.number <= _EPOCHS
        last = replace(last, is_stated=True)
    certain = _find_certain(run)
    notes += [*chooser.notes, *_note_unused(run, certain)]
    notices = _note_swapped(run)
    for reason in dict.fromkeys(certain.values()):
        keys = [key for key in certain if certain[key] == reason]
        notices.append(f"not used, as {reason}: {list_names(keys)}")
    checkpoints = _make_run(_make_all(run, last, settings))
    return _Found(checkpoints, settings, last.origin, tuple(notes), tuple(notices), may_be_epochs)


def _with_one_prefix(run: Sequence[Found]) -> list[Found]:
    """Give the tensors of all files the names of the first one, where wrappers such as DDP's
    `module.` alone make them differ, as after a resume."""
    ours = run[0].tensors
    named = []
    for file in run:
        if file.tensors.keys().isdisjoint(ours):
            averaged = match_names(file.averaged, ours)
            weights = match_names(file.weights, ours)
            if len(averaged) == len(file.averaged) and len(weights) == len(file.weights):
                file = replace(file, averaged=averaged, weights=weights)
        named.append(file)
    return named


def _check_averages(run: Sequence[Found]) -> None:
    """Raise MismatchError if an average fits its weights in some files alone, or lacks a tensor
    that it has in another file."""
    first = next((file for file in run if file.averaged), None)
    if first is None:
        return
    key = first.average_key
    for file in run:
        if not file.averaged:
            if key in file.unused:
                reason = f"do not match: {quote(key)} of {file.path.name} does not fit its weights"
                raise _mismatch(first.path, file.path, reason, "exclude")
            continue
        for name in first.averaged.keys() ^ file.averaged.keys():
            if {**first.averaged, **file.averaged}[name].shape not in ((), (1,)):
                lacking = file if name in first.averaged else first
                reason = f"do not match: {lacking.path.name} lacks {quote(name)} of the average"
                raise _mismatch(first.path, file.path, reason, "exclude")


def _check_unmatched(file: Found, settings: ImportSettings) -> None:
    """Raise a QuestionError if a word calls a network an average, and no weights have its names."""
    if settings.kind or settings.average or settings.weights:
        return
    for key in file.unused:
        if AVERAGE_WORD.search(key) and file.is_unlike(key):
            reason = f"must be given: {quote(key)} in {file.path.name} has tensors of other names "
            reason += "than the weights: it is a part of the model, or an average of another one"
            raise QuestionError("average", reason, {"kind": "checkpoints"}, {"average": key})


def _check_targets(run: Sequence[Found], settings: ImportSettings) -> None:
    """Raise a QuestionError if what a word such as `target` calls an average is one of a part of
    the model, which has other parts, too, as in reinforcement learning."""
    both = [file for file in run if file.averaged and file.weights]
    if len(both) < 2 or settings.average or settings.kind:
        return
    pair = both[0]
    if not _TARGET.search(pair.average_key):
        return
    whole = recognise(both[0].content, replace(settings, kind="checkpoints"))
    used = {tensor.name for tensor in (*pair.weights.values(), *pair.averaged.values())}
    rest = [name for name, tensor in whole.weights.items() if tensor.name not in used]
    if not rest:
        return
    reason = f"must be given: {quote(pair.average_key)} is an average of {quote(pair.weights_key)}"
    reason += f", a part of the model, which also has {list_names(rest, 3)}; an import with "
    reason += f"{argument('average')} {quote(pair.average_key)} takes its average alone"
    part: Answer = {"average": pair.average_key, "weights": pair.weights_key}
    raise QuestionError("kind", reason, {"kind": "checkpoints"}, part)


def _check_unit(time: Time) -> None:
    """Raise a QuestionError if numbers are epochs: the decay of an average counts steps."""
    if time.unit == "epochs":
        reason = f"must be given: decays are of steps, and numbers are {time.origin}"
        raise QuestionError("steps_per_epoch", reason, {"steps_per_epoch": ASKED})


def _leave_out_untrained(
    run: Sequence[Found], times: Sequence[Time], notes: list[str]
) -> list[Found]:
    """Return the checkpoints of a training that has begun, with their times; note what is left
    out."""
    numbers = [time.number for time in times]
    if max(numbers) <= 0:
        reason = "all files have the number 0, which may be something else than a step"
        hint = f"name the files of one run with a glob, or import with {argument('step_from')}"
        raise InvalidValueError(run[0].path, reason, hint)
    used = []
    for file, number in zip(run, numbers, strict=True):
        if number > 0:
            used.append(replace(file, time=number))
        elif number == 0:
            reason = "left out: it holds the weights before the training, of step 0"
            notes.append(f"{file.path.name}: {reason}")
    return used


def _note_swapped(run: Sequence[Found]) -> list[str]:
    """Name the files that say that they were written while the average was swapped in."""
    names = [file.path.name for file in run if file.was_swapped]
    if not names:
        return []
    text = "the average and the weights are exchanged back in files that say that the average was "
    return [f"{text}swapped in when they were written: {list_names(names, 3)}"]


def _find_certain(run: Sequence[Found]) -> dict[str, str]:
    """Find the sets that are not used without a doubt, by what the first and the last file hold,
    with the reason."""
    first = min(run, key=lambda file: file.time)
    last = max(run, key=lambda file: file.time)
    found = {}
    for key in first.unused:
        is_average = AVERAGE_WORD.search(key.rpartition(".")[2])
        if first is last or key not in last.unused or is_average:
            continue
        if reason := _explain_unused(key, first, last):
            found[key] = reason
    return found


def _explain_unused(key: str, *run: Found) -> str:
    """Say what a set is that is not used: of a frozen network, of no network, or a copy in another
    format. Empty if this is unclear."""
    ours = [first_values_of(file.content, file.sets.below(key)) for file in run]
    if len(ours[0]) and np.array_equal(ours[0], ours[-1]):
        return "it never changes"
    if run[0].sets.holds_statistics(key):
        return "statistics of the data"
    weights = [first_values_of(file.content, file.weights) for file in run]
    return "a copy of the weights" if all(map(np.array_equal, ours, weights)) else ""


def _note_unused(run: Sequence[Found], certain: Collection[str]) -> list[str]:
    """Name the sets of tensors of a file that are not used, with the option that would use one."""
    for file in run:
        unused = [key for key in file.unused if key not in certain]
        if not unused:
            continue
        first = unused[0]
        averages = [key for key in unused if AVERAGE_WORD.search(key)]
        option = f"{argument('weights')} '{first}'"
        if averages:
            option = f"{argument('average')} '{averages[0]}'"
        if length := file.content.tracker_averages.get(first):
            option = f"{argument('average')} '{first}' {argument('sigma_rels')} {length}"
        text = f"{file.path.name} also holds {list_names(unused)}, not used: an import with "
        text += f"{option} takes it"
        if file.averaged:
            text += f", and with {argument('kind')} checkpoints the model alone"
        return [text]
    return []


# --- which of two sets is the average


def _check_roles(run: list[Found], settings: ImportSettings, notes: list[str]) -> list[Found]:
    """Return the checkpoints, without an average that never moves, which is noted.

    Raise a QuestionError if what a word calls an average equals the weights, or is unrelated to
    them. How it moves is no sign against a word: of files far apart, or where a rate falls, an
    average may move as far as the weights. The audit says whether they explain how.
    """
    both = [file for file in run if file.averaged and file.weights]
    if len(both) < 2:
        _check_twins(run, settings)
        return run
    ours, theirs = _read_starts(both)
    pair = both[0]
    named = quote(pair.average_key) if pair.average_key else "the average"
    model = quote(pair.weights_key) if pair.weights_key else "the model"
    if not np.diff(ours, axis=0).any() and np.diff(theirs, axis=0).any():
        notes.append(f"{named} never moves, and is not used")
        return [_without_average(file) for file in run]
    others: list[Answer] = []
    for key in both[0].twins:
        others.append({"average": pair.average_key, "weights": key})
    alone: Answer = {"kind": "checkpoints"}
    if np.diff(theirs, axis=0).any() and np.array_equal(ours, theirs):
        reason = f"must be given: {named} equals {model} in all files, as if they were written "
        reason += "while the average was swapped in"
        raise QuestionError("weights", reason, *others, alone)
    is_named = settings.average is not None or "ema" in pair.average_key.lower()
    if not is_named and not are_near(ours[-1], theirs[-1]):
        reason = f"must be given: {named} is unrelated to {model}, as no average is"
        raise QuestionError("average", reason, *others, alone)
    return run


def _check_twins(run: Sequence[Found], settings: ImportSettings) -> None:
    """Raise a QuestionError if files hold another set near the weights, or two within them, and one
    of the two moves less, as averages do: no word says which is the average. Two networks of a
    model may be near each other, too: there the one must also move towards the other."""
    if len(run) < 2 or not all(file.weights for file in run) or settings.weights or settings.kind:
        return
    own = run[0].weights_key
    twins = run[0].sets.twins_in(own)
    if own:
        twins += [(key, own) for key in run[0].twins]
    for one, other in twins:
        pairs = [file.paired(one, other) for file in run]
        if not all(file.averaged for file in pairs):
            continue
        ours, theirs = _read_starts(pairs)
        answer = {"average": one, "weights": other}
        if moves_less(theirs, ours):
            ours, theirs = theirs, ours
            answer = {"average": other, "weights": one}
        is_average = moves_less(ours, theirs) and (other == own or moves_towards(ours, theirs))
        if not is_average:
            continue
        reason = f"must be given: the files hold {quote(one)} and {quote(other)}, and of the two "
        reason += f"{quote(answer['average'])} moves less, as averages do"
        raise QuestionError("average", reason, answer, {"kind": "checkpoints"})


def _without_tracked(file: Found, settings: ImportSettings) -> Found:
    """Leave out an average that a tracker's callback has saved: of any length, the tracker's
    snapshots make a more exact one."""
    is_tracked = file.average_key in file.content.tracker_averages
    if settings.average or not (is_tracked and file.weights):
        return file
    unused = (file.average_key, *file.unused)
    return replace(_without_average(file), unused=unused)


def _without_average(file: Found) -> Found:
    return replace(file, averaged={}, updates=None)


def _read_starts(run: Sequence[Found]) -> tuple[FloatArray, FloatArray]:
    """Read the first elements of the newest averages and weights: [times, elements] each."""
    in_order = sorted(run, key=lambda file: file.time)
    pairs = [file.starts for file in in_order[-COMPARED_FILES:]]
    return np.stack([ours for ours, _ in pairs]), np.stack([theirs for _, theirs in pairs])


# --- sources


def _make_all(run: Sequence[Found], clock: Time, settings: ImportSettings) -> list[Checkpoint]:
    names = dict[str, None]()
    for file in run:
        names.update(dict.fromkeys([*file.averaged, *file.weights]))
    check_globs(settings.selection, names)
    every = _interval_of_counts(run)
    checkpoints = []
    for file in _exchange(run, settings):
        checkpoints += _make(file, clock, settings, every)
    for name, entry in checkpoints[0].entries.items():
        if entry.dtype.startswith("F8"):
            reason = f"tensor {quote(name)} has 8 bits a value, too few for averages"
            hint = (
                f"save the weights in 16 bits or more, or leave it out with {argument('exclude')}"
            )
            raise UnsuitableError(checkpoints[0].path, reason, hint)
    return checkpoints


def _exchange(run: Sequence[Found], settings: ImportSettings) -> list[Found]:
    """Exchange the average and the weights of the steps that settings name, in one file or in two;
    raise InvalidValueError for a step of which there are not both, or several averages."""
    turned = {id(file): file for file in run}
    for step in settings.exchanged:
        files = [file for file in run if file.time == step]
        averages = [file for file in files if file.averaged]
        weights = [file for file in files if file.weights]
        if len(averages) != 1 or len(weights) != 1:
            reason = "is the step of no files that hold one average and the weights"
            raise InvalidValueError("exchanged", reason, value=step)
        for file in (averages[0], weights[0]):
            turned[id(file)] = file.exchanged(averages[0], weights[0])
    return [*turned.values()]


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


def _make(file: Found, clock: Time, settings: ImportSettings, every: int) -> list[Checkpoint]:
    """Make the sources in a checkpoint: the weights, the average, or both. Its updates may be
    `every` so many steps."""
    time = file.time
    averaged = settings.select(file.tensors if file.averaged else {})
    weights = settings.select(file.weights)
    profile: StoredProfile = Point(float(time))
    about: dict[str, Any] = {"t_unit": clock.unit, "is_stated": clock.is_stated}
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


def _make_run(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return checkpoints by time, as one run: with a common run id, and distinct names.

    An average that has not begun is
    a copy of the weights, and is left out next to them. A MismatchError names the first two that
    are of different models, or of one time with different values.
    """
    ordered = by_time(_with_names(checkpoints))
    first = ordered[0]
    for other in ordered:
        if difference := model_difference(first, other):
            raise _mismatch(first.path, other.path, difference, "include", "exclude")
    _check_times(ordered)
    weights = {each.t: each for each in ordered if isinstance(each.profile, Point)}
    copies = [each for each in ordered if each.t in weights and is_copy(each)]
    if copies:
        _check_copies(copies, weights)
    run = [each for each in ordered if each not in copies]
    shapes = [(name, entry.shape) for name, entry in sorted(first.entries.items())]
    known = repr((shapes, first.identity))
    run_id = xxhash.xxh3_128_hexdigest(known.encode())
    averages = [each for each in run if not isinstance(each.profile, Point)]
    is_alone = len({each.t for each in run}) == 1 and len(averages) < 2
    return by_time([replace(each, run_id=run_id, is_alone=is_alone) for each in run])


def _check_copies(copies: Sequence[Checkpoint], weights: Mapping[float, Checkpoint]) -> None:
    """Raise InvalidValueError if averages that have not begun are no copies of the weights, but
    stand still: they go on from earlier weights."""
    first = copies[0]
    last = copies[-1]
    are_moved = _are_unequal(weights[first.t], weights[last.t])
    if are_moved and not _are_unequal(first, last):
        names = f"{first.path.name} and {last.path.name}"
        reason = f"{names} hold the same average, and other weights, from which it cannot begin"
        hint = "name with a glob the files in which its first value has faded"
        raise InvalidValueError("update_after_step", reason, hint)


def _are_unequal(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two checkpoints of a model differ in the first elements of a tensor."""
    return not np.array_equal(first_values(one), first_values(other), equal_nan=True)


def _check_times(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise MismatchError if two checkpoints of one role are of one time."""
    known = dict[tuple[float, str, bool], Checkpoint]()
    for other in checkpoints:
        key = (other.t, other.holds, isinstance(other.profile, Point))
        first = known.setdefault(key, other)
        if first is not other:
            reason = f"are both at {other.t_unit[:-1]} {other.t:,.12g}"
            raise _mismatch(first.path, other.path, reason, "step_from")


def _mismatch(first: Path, other: Path, difference: str, *settings: str) -> MismatchError:
    hint = "name the files of one run with a glob, or import with "
    hint += " or ".join(map(argument, settings))
    return MismatchError(f"{first} and {other}", difference, hint)


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
            name += AVERAGE_OF_TWO
        named.append(replace(checkpoint, name=name))
    return named
