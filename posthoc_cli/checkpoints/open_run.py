"""Open a directory, files or folders of any program as the sources of a run.

What each file holds is found by its content and name; its time by its content, else by its name,
never by the order or the age of files. Files that do not belong to the run are left out, and named:
a further copy of the newest one, the state of an optimizer, another model. The manifest of an
import holds the settings that files do not.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from posthoc_cli import files
from posthoc_cli.checkpoints.clock import (
    UNREAD,
    Times,
    checked_number,
    read_time,
    times_of,
)
from posthoc_cli.checkpoints.content import (
    DCP_METADATA,
    KIND,
    NO_MODEL,
    SHARD,
    Content,
    Values,
    glob_of,
    has_tensors,
    holds_average,
    holds_model,
    may_be_weights,
    names_in,
    open_checkpoint,
)
from posthoc_cli.checkpoints.layouts import (
    Found,
    check_given,
    check_settings,
    named_decay,
    recognise,
    within,
    without_words,
)
from posthoc_cli.checkpoints.lost_updates import MOST_LOST, digits_of, lost_share
from posthoc_cli.checkpoints.manifest import Manifest, read_manifest
from posthoc_cli.checkpoints.nested import nested_in
from posthoc_cli.checkpoints.programs import WEIGHTS_STATES, program_of
from posthoc_cli.checkpoints.sets import Sets, unwrapped
from posthoc_cli.checkpoints.settings import UNSPECIFIED, ImportSettings
from posthoc_cli.checkpoints.source import (
    COMPARED,
    Checkpoint,
    are_near,
    first_values,
    make_checkpoint,
)
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    PostHocError,
    VanishedError,
    first_of,
    shown,
)
from posthoc_cli.profiles import FloatArray, OrdinaryEMA, Point, StoredProfile
from posthoc_cli.snapshots.directory import is_import, is_snapshot_name
from posthoc_cli.snapshots.outputs import describe_tensors
from posthoc_cli.snapshots.snapshot import check_globs
from posthoc_cli.snapshots.sources import by_time, model_difference

log = logging.getLogger(__name__)

_BY_GLOB = "name the files of one run by a glob"
_NO_STEP = "no step"  # why a file is left out
_EPOCHS = 1000  # largest number that is read as perhaps epochs: few trainings have more
_SCALE = re.compile(r"_scale(?:_inv)?$|(?<=\.)scale_(?=weight$)")  # in the name of a scale
_STATE = re.compile(r"[-_]states?$")  # of folders with the state of a training, and its weights
_GROWTH = 1.3
"""Least factor between the norms of successive files that no averages have: of weights that grow
evenly from 0 for the whole training, averages grow by less after three files."""
_SLOWER = 0.8  # averages of any length move by a third less than the weights
_TOWARDS = 0.5
"""Least cosine between the motion of a far average and its way to the weights: 1 if these stay, and
0 of networks of their own."""
_LATEST = 20  # averages whose motion shows whether they lose updates: fewer show it less often
_LOST = 0.5  # largest share of an average that the next one has lost if its motion goes on
_DIGITS = 8  # motion in one interval after which none in the next is unlikely
_STILL = 0.9


def open_checkpoints(
    place: str | Path,
    unclaimed: bool = False,
) -> list[Checkpoint]:
    """Return the checkpoints in a directory, of a glob or of an import, by time. Read only headers
    and indexes.

    Ordinary EMAs of unknown decay are left out with a warning. With `unclaimed` they are included,
    so that an audit can find their decay.
    """
    path = files.expanded(place)
    if is_import(path):
        return checked_run(_imported(read_manifest(path)))
    found = read_place(place, UNSPECIFIED, asks=unclaimed)
    if unclaimed:
        return checked_run(found.checkpoints)
    return _known_run(place, found)


def _known_run(place: str | Path, found: Place) -> list[Checkpoint]:
    """Return the checkpoints of a place as a run, without averages of unknown decay."""
    known = [checkpoint for checkpoint in found.checkpoints if checkpoint.is_known]
    left_out = [checkpoint for checkpoint in found.checkpoints if not checkpoint.is_known]
    if not known:
        reason = "holds EMAs, and neither their decay nor weights next to them"
        if found.lacks_steps:
            reason = f"holds EMAs, and {found.lacks_steps}"
        raise InvalidValueError(place, reason, "give ema_decay to an import")
    if left_out:
        what = f"{len(left_out):,} EMAs, such as {left_out[0].path.name}"
        if len(left_out) == 1:
            what = f"1 EMA, {left_out[0].path.name}"
        reason = "their files do not say the decay; `ema import` finds it, or takes `ema_decay`"
        if found.lacks_steps:
            reason = found.lacks_steps
        log.warning("%s: %s, left out of averages: %s", place, what, reason)
    _warn_if_equal(found.checkpoints)
    return checked_run(known)


def _warn_if_equal(checkpoints: Sequence[Checkpoint]) -> None:
    """Warn if the newest average and the weights beside it are equal."""
    newest = by_time(checkpoints)[-2:]
    paths = {checkpoint.path for checkpoint in newest}
    if len(newest) > len(paths) and not _are_unequal(*newest):
        reason = "its weights equal its average: they are not raw weights if it has begun"
        log.warning("%s: %s; an import takes others by `weights`", newest[0].path, reason)


def _imported(manifest: Manifest) -> list[Checkpoint]:
    """Return the checkpoints of an import; raise FileFormatError if a file is not as it was."""
    try:
        checkpoints = _opened_again(manifest)
    except PostHocError:
        for path in manifest.files:
            manifest.check_file(path)
        raise
    for checkpoint in checkpoints:
        for path, identity in checkpoint.opened.items():
            manifest.check_identity(path, identity.nbytes, identity.sample)
    return checkpoints


def _opened_again(manifest: Manifest) -> list[Checkpoint]:
    """Return the checkpoints of an import, at the times that it has found."""
    opened = []
    for path, kind, time in manifest.checkpoints:
        found = recognise(open_checkpoint(path), replace(manifest.settings, kind=kind))
        opened.append(replace(found, time=time))
    unit, is_stated = manifest.unit
    clock = Times(unit, is_stated, "", ())
    return _all_made(_decided(opened, manifest.settings), clock, manifest.settings)


# --- all checkpoints at a place


@dataclass(frozen=True)
class Place:
    """What was found at a place."""

    checkpoints: list[Checkpoint]
    says: str  # what the numbers of files are taken for
    written_by: str = ""  # the programs that a layout or the name of a step shows
    notes: tuple[str, ...] = ()  # what is not used
    lacks_steps: str = ""  # why profiles of EMAs cannot be known
    may_be_epochs: bool = False  # whether few numbers of no stated unit are taken for steps


_LeftOut = dict[str, str]
"""The names of what is left out of a run, with the reasons."""


def _text_of(left_out: _LeftOut) -> str:
    """Return what is left out in one line; empty if there is nothing."""
    named = [f"{name} ({reason})" for name, reason in left_out.items()]
    return f"left out: {first_of(named, 6)}" if named else ""


def read_place(
    place: str | Path,
    settings: ImportSettings,
    asks: bool = True,
) -> Place:
    """Return all checkpoints at a place, without outputs of this package, with the profiles that
    are known.

    `asks`: raise InvalidValueError if EMAs need the steps of an epoch, which nothing says.
    """
    left_out = _LeftOut()
    paths = _of_one_average(_candidates(place, left_out), settings)
    run = _one_run(*_open_all(paths, settings), settings, left_out)
    if not run:
        hint = "name their folder, a file, or a glob such as 'out/step*.pt'"
        raise DirectoryError(place, "holds no checkpoints", hint)
    check_settings({file.kind for file in run}, settings)
    times = times_of([file.reading for file in run], settings)
    used = _decided(_begun(run, times.numbers), settings)
    has_decays = any(file.updates is not None for file in used)
    doubt = ""
    if has_decays or settings.ema_decay:
        doubt = _lacks_steps(times, used, asks)
    lacks_steps = "" if asks else doubt
    if has_decays and times.unit == "steps" and not lacks_steps:
        times = replace(times, is_stated=True)
    notes = _noted(place, left_out, used)
    if lacks_steps:
        used = [replace(file, updates=file.updates and Updates()) for file in used]
    checkpoints = _all_made(used, times, settings)
    return Place(checkpoints, times.says, _programs(run), notes, lacks_steps, bool(doubt))


def _noted(
    place: str | Path,
    left_out: _LeftOut,
    used: Sequence[Found],
) -> tuple[str, ...]:
    """Log, and return, what is not used."""
    notes = tuple(filter(None, (_text_of(left_out), _unused(used))))
    for note in notes:
        log.warning("%s: %s", place, note)
    return notes


def _programs(run: Sequence[Found]) -> str:
    """Return the programs that wrote the files, as far as these show it."""
    names = dict[str, None]()
    for file in run:
        is_known = file.kind not in ("ema", "checkpoints")
        names[file.kind if is_known else program_of(file.reading.value)] = None
    return "; ".join(filter(None, names))


def _warn_of_copies(checkpoint: Checkpoint) -> None:
    """Warn if most elements are integers of 8 bits, as of quantised weights, or if more than a few
    are complex, as in a table of rotations; masks are fewer."""
    sizes = Counter[str]()
    for entry in checkpoint.entries.values():
        sizes[entry.dtype] += entry.size
    copied = "copied from the newest"
    if 2 * (sizes["I8"] + sizes["U8"]) > sizes.total():
        reason = f"most elements are integers, {copied}: quantised weights have no average"
        log.warning("%s: %s", checkpoint.path, reason)
    if 100 * sizes["C64"] > sizes.total():
        reason = f"complex elements are {copied}: for averages save torch.view_as_real"
        log.warning("%s: %s", checkpoint.path, reason)


def _warn_of_scales(checkpoint: Checkpoint) -> None:
    """Warn of a tensor of floating-point numbers of 8 bits that a scale beside it belongs to."""
    for scale in checkpoint.entries:
        name = _SCALE.sub("", scale)
        scaled = checkpoint.entries.get(name)
        if name == scale or scaled is None or not scaled.dtype.startswith("F8"):
            continue
        reason = f"{shown(name)} is of 8 bits, in units of {shown(scale)}: its average is wrong"
        hint = "unless these are equal in all files; save the weights in 16 bits or more"
        log.warning("%s: %s %s", checkpoint.path, reason, hint)
        return


def _begun(
    run: Sequence[Found],
    times: Sequence[int],
) -> list[Found]:
    """Return the checkpoints of a training that has begun, with their times."""
    if max(times) <= 0:
        reason = "its number is 0, as that of all files, so that it may be something else"
        raise InvalidValueError(run[0].path, reason, f"{_BY_GLOB}, or import with `step_from`")
    used = []
    for file, time in zip(run, times, strict=True):
        if time > 0:
            used.append(replace(file, time=time))
        elif time == 0:
            reason = "left out, as its weights are those before the training, of step 0"
            log.warning("%s: %s", file.path, reason)
    return used


def _lacks_steps(
    times: Times,
    used: Sequence[Found],
    asks: bool,
) -> str:
    """Return why the decays of averages, which are of steps, have no place in times; empty if they
    have."""
    decays = "their decay is of steps, and numbers are"
    if times.unit == "epochs":
        if asks:
            reason = f"must be given: decays are of steps, and numbers are {times.says}"
            raise InvalidValueError("steps_per_epoch", reason, "it is a setting of imports")
        return f"{decays} {times.says}; import with `steps_per_epoch`"
    has_counts = any(file.reading.count for file in used)
    is_said = times.is_stated or has_counts or times.unit != "steps"
    if is_said or max(times.numbers) > _EPOCHS:
        return ""
    return f"{decays} {times.says}; `ema import` checks it"


def _unused(opened: Sequence[Found]) -> str:
    """Return a sentence about the sets of tensors of a file that are not used."""
    for file in opened:
        if keys := file.unused:
            what = f"{file.path.name} also holds {names_in(keys)}, not used"
            text = f"{what}: an import takes another set by `average` or `weights`"
            if file.averaged:
                text += ", and the model alone by `kind` checkpoints"
            return text
    return ""


def _of_one_average(
    paths: list[Path],
    settings: ImportSettings,
) -> list[Path]:
    """Return the files of guided-diffusion without averages of another decay than the given one."""
    decays = {}
    for path in paths:
        decay = named_decay(path)
        if decay is not None:
            decays[path] = decay
    if len({*decays.values()}) < 2:
        return paths
    if settings.ema_decay not in decays.values():
        named = sorted(set(decays.values()))
        choices = " or ".join(f"{decay:g}" for decay in named)
        reason = f"must be given: the files are of several averages, {choices}"
        raise InvalidValueError("ema_decay", reason)
    given = settings.ema_decay
    return [path for path in paths if decays.get(path, given) == given]


def _open_all(
    paths: Sequence[Path],
    settings: ImportSettings,
) -> tuple[list[Found], dict[Path, PostHocError]]:
    """Return what files hold, without outputs of this package, and why others cannot be used."""
    opened = []
    errors: dict[Path, PostHocError] = {}
    for path in paths:
        try:
            content = open_checkpoint(path)
            if content.values.get(KIND) == "output":
                continue
            found = recognise(content, settings)
            if found.reading is UNREAD:
                found = replace(found, reading=read_time(content, settings))
            reading = replace(found.reading, count=_count_of(found))
            checked_number(path, reading.number)
            opened.append(replace(found, reading=reading))
        except VanishedError:
            raise
        except (FileFormatError, InvalidValueError) as error:
            errors[path] = error
    if settings.average and not settings.kind and opened and errors:  # it may have begun later
        weights = replace(settings, average=None, kind="checkpoints")
        others, errors = _open_all([*errors], weights)
        opened += others
    if settings.step_from is not None:
        opened = _of_one_unit(opened)
    return opened, errors


def _count_of(found: Found) -> int:
    """Return the updates that an average has counted, one for each step; 0 if it has not."""
    updates = found.updates
    if updates is None or updates.calls == "counted":
        return 0
    return updates.count or 0


def _of_one_unit(opened: list[Found]) -> list[Found]:
    """Return checkpoints whose numbers one pattern finds, all with the unit of those that have a
    word."""
    units = {file.reading.unit for file in opened} - {""}
    if len(units) != 1:
        return opened
    unit = units.pop()
    of_unit = []
    for file in opened:
        reading = replace(file.reading, unit=unit)
        of_unit.append(replace(file, reading=reading))
    return of_unit


# --- which of them are one run


def _one_run(
    opened: list[Found],
    errors: Mapping[Path, PostHocError],
    settings: ImportSettings,
    left_out: _LeftOut,
) -> list[Found]:
    """Return the checkpoints that are one run; raise an error of the others if none is, or if a
    file with a name as of the run cannot be read."""
    stems = {_stem(file.path) for file in opened}
    for path, error in errors.items():
        if not opened or (_stem(path) in stems and has_tensors(path)):
            raise error
        name = path.name
        if any(file.path.name == name for file in opened):
            name = f"{path.parent.name}/{name}"
        is_stepless = isinstance(error, InvalidValueError)
        left_out[name] = _NO_STEP if is_stepless else error.reason
    opened = _aligned(_with_numbers(opened, left_out))
    model = partial(_model, settings=settings)
    opened = _largest_group(opened, model, "another model", left_out)
    opened = _largest_group(opened, _kind_of_number, "another kind of number", left_out)
    units = {file.reading.unit: file for file in opened}
    for unit, name in {"steps": "steps", "": "an unknown unit"}.items():
        if unit in units and "epochs" in units:
            reason = f"are numbered by {name} and by epochs"
            raise _mismatch(units[unit], units["epochs"], reason)
    return opened


def _with_numbers(
    opened: Sequence[Found],
    left_out: _LeftOut,
) -> list[Found]:
    """Return the checkpoints without files that have no number next to some that have one: the
    number of their folder is that of an experiment."""
    numbered = {file.path.parent for file in opened if not file.reading.is_of_folder}
    kept = []
    for file in opened:
        if file.reading.is_of_folder and file.path.parent in numbered:
            left_out[file.path.name] = _NO_STEP
        else:
            kept.append(file)
    return kept


def _aligned(opened: list[Found]) -> list[Found]:
    """Return checkpoints with the numbers that files without one would have in their names, by the
    epoch in their contents."""
    named = [file.reading for file in opened if not file.reading.is_nameless]
    apart = {file.epoch - file.number for file in named if file.epoch is not None}
    if len(apart) != 1:
        return opened
    offset = apart.pop()
    aligned = []
    for file in opened:
        own = file.reading
        if own.is_nameless:
            number = own.number - offset
            reading = replace(named[0], number=number, epoch=own.epoch, count=own.count)
            file = replace(file, reading=replace(reading, path=file.path))
        aligned.append(file)
    return aligned


def _stem(path: Path) -> str:
    """Return what is before the first digit of a name, or if it has none the name in its folder,
    whatever number that has."""
    before, *others = re.split("[0-9]", path.name)
    folder = re.sub("[0-9]+", "", path.parent.name)
    return before if others else f"{folder}/{before}"


def _kind_of_number(file: Found) -> object:
    """Return what the number of a checkpoint is, without what only its source differs in."""
    return file.reading.unit or file.reading.is_marked


def _model(file: Found, settings: ImportSettings) -> object:
    """Return the names and shapes of the tensors of a checkpoint that settings choose, without
    wrappers."""
    shapes = set()
    chosen = settings.selection
    for name, tensor in file.tensors.items():
        if chosen.names(name.removeprefix(settings.prefix)):
            shapes.add((unwrapped(name), tensor.shape))
    return frozenset(shapes)


def _largest_group(
    opened: list[Found],
    key: Callable[[Found], object],
    reason: str,
    left_out: _LeftOut,
) -> list[Found]:
    """Return the checkpoints of the most frequent key; all if another one is half as frequent, so
    that an error names what is different."""
    groups = dict[object, list[Found]]()
    for file in opened:
        groups.setdefault(key(file), []).append(file)
    if not opened:
        return opened
    largest, *others = sorted(groups.values(), key=len, reverse=True)
    if any(2 * len(group) > len(largest) for group in others):
        return opened
    for group in others:
        for file in group:
            left_out[file.path.name] = reason
    return largest


# --- which of two sets is the average


def _decided(opened: list[Found], settings: ImportSettings) -> list[Found]:
    """Return the checkpoints; where files do not say which of two sets is the average, it is the
    one that moves less from file to file, and near the other. There is none if the sets are equal,
    or one never moves.

    Raise InvalidValueError if there may be another one; of parts of a model there is none then.
    """
    if not any(file.undecided for file in opened):
        return _related(opened, settings)
    both = _starts(opened)
    ours, theirs = both
    average, weights = np.square(np.diff(both, axis=1)).sum(axis=(1, 2)).tolist()
    slower, faster = sorted((average, weights))
    follows = slower > 0 and slower <= _SLOWER * faster and are_near(ours, theirs)
    first = opened[0]
    if np.array_equal(ours, theirs) or (first.model and not follows):
        return [file.without_average for file in opened]
    is_still = slower == 0 and faster > 0
    if not (follows or is_still):
        what = " or ".join(first.undecided)
        reason = f"must be given: {first.path.name} holds two sets, and neither follows the other"
        raise InvalidValueError("average", f"{reason}: {what}")
    if weights < average:
        opened = [file.swapped() for file in opened]
    return _with_slower(opened, is_still)


def _with_slower(
    opened: list[Found],
    is_still: bool,
) -> list[Found]:
    """Return the checkpoints with the slower set as the average, or without it if it is still."""
    first = opened[0]
    name, _ = first.undecided
    says = f"the average is {name}, which moves less from file to file"
    if is_still:
        says = f"{name} never moves, and is not used"
        opened = [file.without_average for file in opened]
    log.warning("%s: %s", first.path.parent, says)
    return opened


def _starts(opened: Sequence[Found]) -> FloatArray:
    """Return the first elements of averages and weights, by time: [two, times, elements]."""
    in_order = sorted(opened, key=lambda file: file.time)
    rows = np.stack([file.starts for file in in_order])
    return np.swapaxes(rows, 0, 1)


def _related(opened: list[Found], settings: ImportSettings) -> list[Found]:
    """Return the checkpoints; as weights alone if the set that a word calls an average is another
    network, such as the second of two encoders: far from the weights, and not moving there."""
    pairs = [file for file in opened if file.kind == "ema" and file.averaged and file.weights]
    if settings.average or len(pairs) < 2:
        return opened
    newest = max(pairs, key=lambda file: file.time)
    tensor = next(iter(newest.averaged.values()))
    is_sure = "ema" in tensor.name.lower()  # no word for anything else
    if is_sure or are_near(*newest.starts):
        return opened
    ours, theirs = _starts(pairs)
    motion = np.diff(ours, axis=0)
    ways = theirs - ours
    way = ways[1:] + ways[:-1]
    lengths = np.sqrt(np.square(motion).sum() * np.square(way).sum())
    if (motion * way).sum() >= _TOWARDS * lengths:
        return opened
    reason = "is taken for no average: it is far from the weights, and does not move towards them"
    log.warning("%s: %s %s", newest.path, tensor.name, reason)
    return [without_words(file, settings) for file in opened]


def _all_made(
    opened: Sequence[Found],
    times: Times,
    settings: ImportSettings,
) -> list[Checkpoint]:
    newest = max(opened, key=lambda file: file.time)
    checkpoints = []
    names = dict[str, None]()
    for file in opened:
        for tensors in within(file, settings):
            names.update(dict.fromkeys(tensors))
    check_globs(settings.selection, names)
    for file in opened:
        checkpoints += _made(_named_as(newest, file), times, settings)
    _warn_of_copies(checkpoints[-1])
    _warn_of_scales(checkpoints[0])
    return checkpoints


def _named_as(newest: Found, found: Found) -> Found:
    """Return a checkpoint under the names of the newest one, if they differ in wrappers alone: of a
    training that was compiled, or distributed, since a resume."""
    names = newest.tensors.keys()
    if found.tensors.keys() == names:
        return found
    ours = {unwrapped(name) for name in found.tensors}
    theirs = {unwrapped(name): name for name in names}
    are_distinct = len(ours) == len(found.tensors)
    if ours != theirs.keys() or not are_distinct:
        return found
    averaged = {theirs[unwrapped(name)]: tensor for name, tensor in found.averaged.items()}
    weights = {theirs[unwrapped(name)]: tensor for name, tensor in found.weights.items()}
    return replace(found, averaged=averaged, weights=weights)


def _made(
    found: Found,
    times: Times,
    settings: ImportSettings,
) -> list[Checkpoint]:
    """Return the sources in a checkpoint: the weights, the average, or both."""
    check_given(found, settings)
    time = found.time
    averaged, weights = map(settings.select, within(found, settings))
    profile: StoredProfile = Point(float(time))
    about = {
        "kind": found.kind,
        "t_unit": times.unit,
        "is_stated": times.is_stated,
    }
    checkpoints = []
    if weights:
        chosen = {name: weights[name] for name in averaged or weights}
        checkpoints.append(make_checkpoint(found.content, chosen, profile, time, **about))
    if averaged:
        if found.profile is not None:
            profile = found.profile(time)
        about |= {"sigma_rel": found.sigma_rel, "updates": found.updates}
        average = make_checkpoint(found.content, averaged, profile, time, **about)
        checkpoints.append(average.with_settings(settings))
    return checkpoints


# --- what is at a place


def holds_checkpoints(place: str | Path) -> bool:
    """Return whether a directory, file or glob seems to name checkpoints or an import, without
    opening a file."""
    try:
        return is_import(place) or bool(_candidates(place, _LeftOut()))
    except (FileFormatError, InvalidValueError):  # raised again when they are opened
        return True
    except DirectoryError:  # also that of a glob
        return files.is_glob(place)


def _candidates(place: str | Path, left_out: _LeftOut) -> list[Path]:
    """Return the files and folders that may each be a checkpoint."""
    path = files.expanded(place)
    matches = _matches(path)
    if not matches:
        raise DirectoryError(place, "no file or folder has such a name")
    if matches != [path]:
        return matches
    is_checkpoint = not path.is_dir() or (path / DCP_METADATA).is_file()
    if is_checkpoint:
        return matches
    return _candidates_in(path, left_out)


def _matches(pattern: Path) -> list[Path]:
    """Return the files and folders that a glob or a path names."""
    if not files.is_glob(pattern):
        return [pattern] if pattern.exists() else []
    if files.is_url(pattern):
        from posthoc_cli.remote.store import matching

        return matching(pattern)
    # Path.glob takes no absolute patterns
    return sorted(map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207


def _candidates_in(folder: Path, left_out: _LeftOut) -> list[Path]:
    """Return the entries of a folder that may each be a checkpoint."""
    entries = sorted(files.system.list(folder))
    others = [entry for entry in entries if entry.name[0] != "." and not is_snapshot_name(entry)]
    folders = _folders_among(others, left_out)
    loose = _files_among(others)
    if not folders and not loose:
        of_weights = [entry for entry in entries if WEIGHTS_STATES.fullmatch(entry.name)]
        return of_weights or nested_in(folder, entries)
    # Next to files, a folder without a number, such as "averages", is not a checkpoint; next to
    # folders, no file is one.
    is_series = _is_series_beside_states(folder, loose, folders)
    has_numbers = any(re.search(r"\d", entry.name) for entry in folders)
    if loose and (is_series or not has_numbers):
        for entry in folders:
            left_out[entry.name] = "a folder beside files"
        return loose
    for entry in loose:
        left_out[entry.name] = "a file beside folders"
    return folders


def _folders_among(entries: Sequence[Path], left_out: _LeftOut) -> list[Path]:
    """Return the folders that each hold a model."""
    folders = []
    for entry in entries:
        if not entry.is_dir() or NO_MODEL.search(entry.name):
            continue
        if holds_model(entry):
            folders.append(entry)
        elif any(may_be_weights(inner.name) for inner in files.system.list(entry)):
            left_out[entry.name] = "a folder of files"
    return folders


def _files_among(entries: Sequence[Path]) -> list[Path]:
    """Return the files that may hold weights, and states of the training with an average."""
    loose = []
    states = dict[str, list[Path]]()
    for entry in entries:
        if entry.is_dir() or SHARD.search(entry.name):
            continue
        if may_be_weights(entry.name):
            loose.append(entry)
        else:
            states.setdefault(_stem(entry), []).append(entry)
    for of_stem in states.values():
        if holds_average(of_stem[-1]):
            loose += of_stem
    return loose


def _is_series_beside_states(
    folder: Path,
    loose: Sequence[Path],
    folders: Sequence[Path],
) -> bool:
    """Return whether files are a series of weights, and the folders beside them states of the same
    training; raise InvalidValueError if there are more states."""
    series = [entry for entry in loose if re.search("[0-9]", entry.name)]
    if len(series) < 2 or not all(_STATE.search(entry.name) for entry in folders):
        return False
    if len(loose) < len(folders):
        globs = f"'{folder / '*state'}' or '{folder / f'{_stem(series[0])}*{series[0].suffix}'}'"
        reason = "holds a series of files, and more folders of states"
        raise InvalidValueError(folder, reason, f"name one of them by a glob: {globs}")
    return bool(folders)


# --- several checkpoints as one run


def checked_run(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
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
            raise _mismatch(first, other, difference, "`include`, `exclude` or `prefix`")
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
        hint = "name by a glob the files in which its first value has faded"
        raise InvalidValueError("update_after_step", reason, hint)


def _without_duplicates(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    kept = dict[tuple[float, str], Checkpoint]()
    for other in sorted(checkpoints, key=lambda checkpoint: not _has_number(checkpoint)):
        twin = kept.setdefault((other.t, other.holds), other)
        if twin is not other and _are_unequal(twin, other):
            if _has_number(other):
                raise _mismatch(twin, other, f"are both of {twin.t_unit[:-1]} {twin.t:,.12g}")
            log.warning("%s: left out, as %s has the same number", other.path, twin.name)
    return [*kept.values()]


def _has_number(checkpoint: Checkpoint) -> bool:
    return re.search("[0-9]", checkpoint.path.name) is not None


def _mismatch(
    first: Checkpoint | Found,
    other: Checkpoint | Found,
    difference: str,
    settings: str = "`step_from`",
) -> MismatchError:
    ours = glob_of(first.path.name)
    theirs = glob_of(other.path.name)
    hint = _BY_GLOB
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
    if all(average.is_known for average in averages[-4:]):
        _check_updates(averages[-_LATEST:])


def _first_values(averages: Sequence[Checkpoint]) -> FloatArray:
    """Return the first elements of averages, [times, elements]."""
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


def _check_updates(averages: Sequence[Checkpoint]) -> None:
    """Raise InvalidValueError if long averages in half precision lose updates; warn if short ones
    seem to, or if they move too little to show that."""
    newest = averages[-1]
    moves = _moves(averages)
    if not moves.size:
        return
    is_expected = np.abs(moves[:-1]) > _DIGITS
    following = moves[1:]
    # Where the average keeps little, elements may stand still with their weights.
    tails = [later.profile.tail(earlier.t) for earlier, later in pairwise(averages[1:])]
    is_long = np.array(tails) < _LOST
    share = lost_share(following[is_long], is_expected[is_long])
    where = f"{newest.path.name}: the average of decay {newest.decay:.12g} is in half precision"
    if share > MOST_LOST:
        reason = f"{where}, and loses updates: {share:.0%} of the elements that move by {_DIGITS}"
        hint = "`kind` checkpoints with `weights` takes it"
        raise InvalidValueError("average", f"{reason} digits then stand still", hint)
    stands = moves == 0
    if lost_share(following, is_expected) > MOST_LOST or stands.mean() > _STILL:
        log.warning("%s, and much of it stands still: errors hold if only files are", where)


def _moves(averages: Sequence[Checkpoint]) -> FloatArray:
    """Return the motion of averages between times in digits of F16 or BF16, of the elements of
    `first_values` that are stored so: [times, elements]."""
    newest = averages[-1]
    entries = [newest.entries[name] for name in sorted(newest.averages)]
    counts = [min(entry.size, COMPARED) for entry in entries]
    dtypes = np.repeat([entry.dtype for entry in entries], counts)
    values = _first_values(averages)
    moves = []
    for dtype in ("F16", "BF16"):
        of_dtype = values[:, dtypes == dtype]
        moves.append(np.diff(of_dtype, axis=0) / digits_of(of_dtype[:-1], dtype))
    return np.concatenate(moves, axis=1)


def _with_names(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints with distinct names, from the folder of all on, for coefficients and
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


# --- for JSON


def describe_checkpoints(place: Path) -> Values:
    """Return times, tensors and sizes from the indexes of files alone, for JSON."""
    found = Place([], "")
    if is_import(place):
        checkpoints = open_checkpoints(place)
    else:
        found = read_place(place, UNSPECIFIED, asks=False)
        checkpoints = _known_run(place, found)
    newest = checkpoints[-1]
    rows = []
    for checkpoint in checkpoints:
        row = {
            "file": checkpoint.name,
            "t": checkpoint.t,
            "holds": checkpoint.holds,
            "bytes": checkpoint.file_bytes,
            "identity": checkpoint.identity,
        }
        rows.append(row)
    described = {
        "kind": "checkpoints",
        "path": str(place),
        "run": newest.run_id,
        "t_unit": newest.t_unit,
        "t": newest.t,
        "step": newest.step,
        "written_by": found.written_by,
        "numbers": found.says,
        **describe_tensors(newest),
        "bytes": sum(checkpoint.file_bytes for checkpoint in checkpoints),
        "checkpoints": rows,
        "notes": list(found.notes),
    }
    if is_import(place):
        manifest = read_manifest(place)
        described["refers_to"] = str(manifest.origin)
        described["files"] = len(manifest.files)
        described["settings"] = manifest.settings.given
    return described


def describe_files(place: Path, error: PostHocError) -> Values:
    """Return what files hold that need an import, for JSON, and what that import would have
    to be told; raise the error that says so if none can be opened."""
    paths = _candidates(place, _LeftOut())
    rows: list[Values] = []
    opened = []
    for path in paths:
        try:
            content = open_checkpoint(path)
        except FileFormatError as wrong:
            rows.append({"file": path.name, "holds": wrong.reason})
            continue
        opened.append(content)
        holds = _sets_in(content)
        rows.append({"file": path.name, "holds": holds, "bytes": content.nbytes})
    if not opened or (place.is_file() and not opened[0].tensors):
        raise error
    described: Values = {"kind": "checkpoints", "path": str(place), "checkpoints": rows}
    if len(paths) == 1:
        described["kind"] = "checkpoint"
        with suppress(FileFormatError):
            tensors = recognise(opened[0], UNSPECIFIED).tensors
            checkpoint = make_checkpoint(opened[0], tensors)
            described |= {**describe_tensors(checkpoint), "bytes": checkpoint.file_bytes}
    if isinstance(error, InvalidValueError):
        return {**described, "notes": [f"cannot be used as it is: {error}"]}
    return {**described, "problems": [str(error)]}


def _sets_in(content: Content) -> str:
    """Return the keys of the sets of tensors in a checkpoint, with their numbers of tensors."""
    sets = Sets(content)
    named = []
    for key in sets.keys:
        count = sets.counts[key]
        if count > 1:
            named.append(f"{key} ({count})")
    return first_of(named, 4) or f"{len(content.tensors)} tensors"
