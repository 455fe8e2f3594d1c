"""Open a directory, files or folders as the sources of a run, whatever wrote them.

The kind of a directory is recognised by its names and contents, or given by the user. Steps come from a checkpoint's
content, else from its name; never from the order or the age of files.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.checkpoints import KINDS
from posthoc_cli.checkpoints.checkpoint import Checkpoint, beside_snapshots, checked_run, make_checkpoint
from posthoc_cli.checkpoints.contents import NOT_WEIGHTS, Contents, Piece, model_in, read_contents
from posthoc_cli.checkpoints.imported import KIND, read_imported
from posthoc_cli.checkpoints.steps import Reading, read_name, read_number
from posthoc_cli.checkpoints.tensor_files import ENDINGS, names_in
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError, shown
from posthoc_cli.profiles import Discrete, Point, PowerFunction, check_sigma_rel, gamma_from_sigma_rel
from posthoc_cli.profiles.other_libraries import (
    DEFAULT_UPDATE_AFTER_STEP,
    TORCHTITAN_GAMMA,
    ema_pytorch_profile,
    posthoc_ema_profile,
    torchtitan_profile,
)
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.description import describe_tensors
from posthoc_cli.snapshots.directory import is_snapshot_name, read_directory
from posthoc_cli.snapshots.headers import parse_json
from posthoc_cli.snapshots.measurements import check_update_every
from posthoc_cli.snapshots.sources import FileSource, Source
from posthoc_cli.snapshots.tensor_file import read_small_file

_INDEXED = re.compile(r"(\d{1,20})[._](\d{1,20})\.(?:pt|safetensors)")
_EDM2 = re.compile(r"network-snapshot-(\d{1,20})-(\d*\.\d+)\.pkl")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_TRAINER_STATE = "trainer_state.json"
_MOST_STATE = 1_000_000_000
_MOST_STEPS = 10**15
_TITAN_EMA = re.compile(r"(?:ema_optimizer\.)?state\.(.+)\.ema_params")
_COUNTERS = ("initted", "step")
"""What `ema-pytorch` and `pytorch-posthoc-ema` store beside the weights."""


@dataclass(frozen=True)
class Origin:
    """Which checkpoints to open, and what they do not say themselves.

    Attributes:
        kind: one of `KINDS`; None to find it.
        step_from: a regular expression whose group is the step, searched in a path; it may be 1_500 or 1.5k, too.
        prefix: what names of the model's tensors begin with; it is left out of the names.
        include, exclude: globs on the names that remain.
        sigma_rels: widths of the averages of `ema-pytorch` or `posthoc-ema`, in the order of their numbers.
        update_every, update_after_step: settings of these libraries; torchtitan's `update_every_n_steps`, `start_step`.
    """

    kind: str | None = None
    step_from: str | None = None
    prefix: str = ""
    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None
    sigma_rels: Sequence[float] = ()
    update_every: int | None = None
    update_after_step: int | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InvalidValueError("kind", f"must be one of {', '.join(KINDS)}", value=f"{self.kind!r}")
        for sigma_rel in self.sigma_rels:
            check_sigma_rel(sigma_rel)
        try:
            groups = 1 if self.step_from is None else re.compile(self.step_from).groups
        except re.error as error:
            reason = f"is no regular expression: {error}"
            raise InvalidValueError("step_from", reason, value=self.step_from or "") from None
        if groups != 1:
            reason = r"must have one group, for the step, such as 'step(\d+)'"
            raise InvalidValueError("step_from", reason, value=self.step_from or "")

    def options(self) -> list[tuple[str, str]]:
        """What was given, as options of a command and their values."""
        found = []
        for name, value in vars(self).items():
            option = "--from" if name == "kind" else f"--{name.replace('_', '-')}"
            if name == "sigma_rels":
                value = ",".join(f"{width:.12g}" for width in value)
            several = (value,) if isinstance(value, str | int) else value or ()
            found += [(option, str(one)) for one in several if one != ""]
        return found

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """An InvalidValueError if one of these attributes was given."""
        for name in names:
            if (value := getattr(self, name)) not in (None, "", ()):
                raise InvalidValueError(name, reason, value=value if isinstance(value, str | int) else "")

    def refuse_for_snapshots(self) -> None:
        """An InvalidValueError if anything but the kind was given."""
        names = [name for name in vars(self) if name != "kind"]
        self.refuse(names, "is for checkpoints, and these are snapshots of a tracker")

    @property
    def selection(self) -> fmt.Selection:
        """The choice of tensors by their names."""
        return fmt.make_selection(self.include, self.exclude, "copy")


UNSPECIFIED = Origin()


def open_checkpoints(place: str | Path, origin: Origin = UNSPECIFIED) -> list[Checkpoint]:
    """The checkpoints in a directory, or those that a glob names, by time. Reads headers, indexes and pickles only.

    Raises:
        DirectoryError: nothing is there that can be opened.
        FileFormatError, MismatchError: a file is damaged, or of another model than the others.
        InvalidValueError: what the files do not hold must be given.
    """
    paths = _places(place)
    kind = origin.kind or _kind_of(paths)
    by_word = next((path.name for path in paths if _named_step(path).by_word), "")
    made = [one for path in paths for one in _READERS.get(kind, _points)(path, origin, by_word)]
    if not made:
        raise DirectoryError(place, f"holds no {kind}" if origin.kind else "holds no checkpoints")
    if not any(one.library for one in made):
        tracked = any(isinstance(one.profile, Discrete) for one in made)
        names = ("sigma_rels",) if tracked else ("sigma_rels", "update_every", "update_after_step")
        origin.refuse(names, "is for averages of other libraries, and here are none; name their kind, if there are")
    return checked_run(made)


def describe_file(path: Path, origin: Origin = UNSPECIFIED) -> dict[str, Any]:
    """Tensors and sizes of one checkpoint, without its time, for JSON; its kind is "checkpoint"."""
    found = _selected(read_contents(path).model_tensors(origin.prefix), origin)
    one = make_checkpoint(path, found, Point(1.0), 1)
    return {"kind": "checkpoint", "path": str(path), **describe_tensors(one), "bytes": one.header.file_bytes}


def disk_sources(directory: str | Path, origin: Origin = UNSPECIFIED, also: str | Path | None = None) -> list[Source]:
    """What a directory holds as sources: the snapshots of a tracker, else checkpoints.

    Arguments:
        directory: of a run; or a file, or a glob that names the files or folders of checkpoints.
        origin: what checkpoints do not say themselves.
        also: where checkpoints of the same training are, to be combined with the snapshots.

    Raises:
        InvalidValueError: `origin` says something about checkpoints, and there are none.
        DirectoryError, FileFormatError, MismatchError: as `read_directory`, and of checkpoints `open_checkpoints`.
    """
    path = Path(directory)
    if origin.kind not in (None, "snapshots") or is_glob(directory):
        return [*open_checkpoints(directory, origin)]
    try:
        snapshots = read_directory(path)
    except DirectoryError as error:
        if origin.kind is not None or not holds_checkpoints(directory):
            raise error
        if also is not None:
            reason = f"are added to the snapshots of a tracker, and {directory} holds none"
            raise InvalidValueError("checkpoints", reason, value=also) from error
        return [*open_checkpoints(directory, origin)]
    if also is None:
        origin.refuse_for_snapshots()
    others = [] if also is None else beside_snapshots(snapshots, open_checkpoints(also, origin))
    return sorted([*snapshots, *others], key=lambda one: (one.info.t, one.info.sigma_rel)) if others else [*snapshots]


def is_glob(place: str | Path) -> bool:
    """Whether a name is a pattern, and not the name of something that is there."""
    return glob.has_magic(str(place)) and not files.expanded(place).exists()


def holds_checkpoints(place: str | Path) -> bool:
    """Whether a directory, file or glob seems to name checkpoints; no file is opened."""
    try:
        return bool(_places(place))
    except DirectoryError:
        return False


def _places(place: str | Path) -> list[Path]:
    """The files and folders that may each be a checkpoint."""
    path = files.expanded(place)
    if is_glob(path):
        found = sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207 - of any path, also an absolute one
        if not found:
            raise DirectoryError(place, "no file or folder has such a name")
        for one in found:
            if any(map(is_snapshot_name, one.glob("*"))):
                raise DirectoryError(one, "holds snapshots of a tracker", "name this folder itself, not by a glob")
        return found
    if not path.is_dir():
        if not path.exists():
            raise DirectoryError(place, "no such file or directory")
        return [path]
    if (path / ".metadata").is_file():
        return [path]
    entries = sorted(entry for entry in files.system.list(path) if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir() and not is_snapshot_name(entry) and _holds_model(entry)]
    loose = [entry for entry in entries if entry.name.endswith(ENDINGS) and not _SHARD.search(entry.name)]
    loose = [entry for entry in loose if not entry.name.startswith(NOT_WEIGHTS)]
    # Beside files a folder without a number, such as "averages", is no checkpoint; beside folders a file is none.
    return folders if not loose or any(re.search(r"\d", folder.name) for folder in folders) else loose


def _holds_model(folder: Path) -> bool:
    try:
        return model_in(folder) is not None
    except FileFormatError:  # raised again when it is opened
        return True


def _kind_of(paths: Sequence[Path]) -> str:
    """The kind of checkpoints, by the names of files and what the first of them holds."""
    names = [path.name for path in paths]
    if names and all(map(_EDM2.fullmatch, names)):
        return "edm2"
    if names and all(map(_INDEXED.fullmatch, names)) and (_COUNTERS[0],) in (found := read_contents(paths[0])).tensors:
        is_first = any(keys[0].startswith("ema_model.") for keys in found.tensors)
        return "ema-pytorch" if is_first else "posthoc-ema"
    return "checkpoints"


# --- ordinary checkpoints


def _points(path: Path, origin: Origin, by_word: str) -> list[Checkpoint]:
    """A checkpoint, and the average in it if torchtitan stored one; nothing of an output of this package.

    `by_word` is a name of another one in which a word such as step tells its step, see `read_name`; empty for none.
    """
    contents = read_contents(path)
    kind = contents.values.get("ema.format")
    if kind == "output":
        return []
    if kind == KIND:
        one = read_imported(path)
        chosen = _chosen(one.info.tensors, origin)
        tensors = {name: tensor for name, tensor in one.info.tensors.items() if name in chosen}
        return [replace(one, info=replace(one.info, tensors=tensors))]
    step = _step(path, contents, origin, by_word)
    averaged = {
        match[1]: find
        for keys, find in contents.tensors.items()
        if (match := _TITAN_EMA.fullmatch(".".join(keys[1:] if keys[0] == "ema_optimizer" else keys)))
    }
    found = _selected(contents.model_tensors(origin.prefix), origin)
    made = [make_checkpoint(path, found, Point(float(step)), step)]
    if averaged and not origin.prefix:
        both = {name: averaged.get(name, find) for name, find in found.items()}
        profile = torchtitan_profile(step, origin.update_every or 1, origin.update_after_step or 0)
        width = PowerFunction(TORCHTITAN_GAMMA, step).sigma_rel
        made.append(make_checkpoint(path, both, profile, step, sigma_rel=width))
    return made


def _selected(
    found: dict[str, Callable[[], list[Piece]]], origin: Origin, but: Sequence[str] = ()
) -> dict[str, Callable[[], list[Piece]]]:
    chosen = _chosen(found, origin)
    return {name: find for name, find in found.items() if name in chosen and name not in but}


def _chosen(names: Collection[str], origin: Origin) -> set[str]:
    """Those names that `include` and `exclude` leave."""
    selection = origin.selection
    fmt.check_globs(selection, names)
    chosen = set(filter(selection.names, names))
    if not chosen:
        raise InvalidValueError("include and exclude", "leave no tensor of the model")
    return chosen


def _step(path: Path, contents: Contents, origin: Origin, by_word: str) -> int:
    """The step of a checkpoint; an InvalidValueError asks for a pattern if it does not tell."""
    hint = r"give step_from, a pattern such as 'step(\d+)'"
    if origin.step_from is not None:
        match = re.search(origin.step_from, str(path))
        number = None if match is None else read_number(match[1] or "")
        if number is None:
            reason = f"finds no number in {path}"
            raise InvalidValueError("step_from", reason, value=origin.step_from)
        return _checked_step(path, number, "leave it out, or give another pattern")
    step = _trainer_step(path) or contents.step
    if step is None:
        named = _named_step(path)
        if named.doubt:
            raise InvalidValueError(path, f"neither its content nor its name tells its step: {named.doubt}", hint)
        if named.step is None:
            raise InvalidValueError(path, "neither its content nor its name tells its step", hint)
        if by_word and not named.by_word:
            reason = f"its name has no word such as step at its number, as {shown(by_word)} has"
            raise InvalidValueError(path, reason, f"leave it out, or {hint}")
        step = named.step
    return _checked_step(path, step, "leave it out, or give step_from")


def _checked_step(path: Path, step: float, hint: str = "leave it out") -> int:
    if not 0 < step <= _MOST_STEPS or step != int(step):
        reason = f"its step is {shown(step)}; must be a whole number from 1 to {_MOST_STEPS:.0e}"
        raise InvalidValueError(path, reason, hint)
    return int(step)


def _trainer_step(path: Path) -> float | None:
    """The step in the state of a transformers Trainer."""
    state = path / _TRAINER_STATE
    if not (path.is_dir() and state.is_file()):
        return None
    found = parse_json(state, read_small_file(state, _MOST_STATE), "state of a Trainer")
    step = found.get("global_step") if isinstance(found, dict) else None
    if type(step) is not int:
        raise FileFormatError(state, "has no global_step")
    return step


def _named_step(path: Path) -> Reading:
    """The step in the name of a file or folder, else of the folder that it is in, if that is named as checkpoints are.

    Other numbers in that name, such as of an experiment or a date, are no steps.
    """
    stem = path.name
    for ending in ENDINGS:
        stem = stem.removesuffix(ending)
    return read_name(stem) if re.search("[0-9]", stem) else read_name(path.parent.name, words_only=True)


# --- averages of other libraries


def _distributed(path: Path, origin: Origin, by_word: str) -> list[Checkpoint]:
    if not path.is_dir():
        raise FileFormatError(path, "is no folder of torch.distributed.checkpoint")
    return _points(path, origin, by_word)


def _karras(path: Path, origin: Origin, _: str) -> list[Checkpoint]:
    """A file of `ema-pytorch` or `pytorch-posthoc-ema`: a number of the average, and a step."""
    match = _INDEXED.fullmatch(path.name)
    if match is None:
        raise FileFormatError(path, "is not named as averages are: <number>.<step>.pt, or <number>_<step>.safetensors")
    index, step = int(match[1]), _checked_step(path, int(match[2]))
    contents = read_contents(path)
    inner = "ema_model." if any(keys[0].startswith("ema_model.") for keys in contents.tensors) else ""
    missing = [name for name, value in (("sigma_rels", origin.sigma_rels), ("update_every", origin.update_every))
               if not value]  # fmt: skip
    if missing or origin.update_every is None:
        reason = "must be given: the files do not hold it"
        raise InvalidValueError(missing[0], reason, f"{path.name} is average {index} of a list such as 0.05,0.28"
                                if missing[0] == "sigma_rels" else "it is the setting of the training")  # fmt: skip
    if index >= len(origin.sigma_rels):
        given = names_in([f"{sigma_rel:g}" for sigma_rel in origin.sigma_rels])
        reason = f"must be one for each average; {path.name} is of number {index}, counted from 0"
        raise InvalidValueError("sigma_rels", reason, value=given)
    gamma = gamma_from_sigma_rel(origin.sigma_rels[index])
    library = "ema-pytorch" if inner else "posthoc-ema"
    if library == "posthoc-ema":
        _check_update_after_step(path, contents, step, origin.update_after_step)
    profile = _tracked_profile(library, gamma, step, origin, origin.update_every)
    found = _selected(contents.model_tensors(origin.prefix or inner), origin, _COUNTERS)
    return [replace(make_checkpoint(path, found, profile, step, sigma_rel=origin.sigma_rels[index]), library=library)]


def _check_update_after_step(path: Path, contents: Contents, step: int, given: int | None) -> None:
    """Compare the setting with what a file of `pytorch-posthoc-ema` has counted: calls from that of this number on."""
    value = DEFAULT_UPDATE_AFTER_STEP if given is None else given
    counted = contents.value("step")
    if counted is None or not math.isfinite(counted[0]):  # above the range of float16
        return
    found, dtype = counted
    due = step - max(value, 1) + 1
    if abs(found - due) <= found * EPS.get(dtype, 0.0) / 2:
        return
    about = "about " * (found * EPS.get(dtype, 0.0) >= 1)
    told = f"{path.name} has counted {found:,.12g} of {step:,} calls, as {about}{step - found + 1:,.12g} makes it"
    if given is None:
        raise InvalidValueError("update_after_step", f"must be given: it is not {value}, the default; {told}")
    raise InvalidValueError("update_after_step", f"does not fit the files: {told}", value=value)


def _tracked_profile(library: str, gamma: float, step: int, origin: Origin, update_every: int) -> Discrete:
    """What one of these libraries really tracks."""
    if library == "ema-pytorch":
        return ema_pytorch_profile(gamma, step, update_every)
    later = DEFAULT_UPDATE_AFTER_STEP if origin.update_after_step is None else origin.update_after_step
    return posthoc_ema_profile(gamma, step, update_every, later)


def check_claims(sources: Sequence[object], origin: Origin) -> dict[int, float]:
    """Compare what the user says of `update_every` with the distances between averages; see `check_update_every`.

    Reads a sample of the tensors. Returns how badly each value fits, the best one first; empty where nothing was said,
    or nothing can be told.

    Raises:
        InvalidValueError: another value fits much better; it is named.
    """
    said = [source for source in sources if isinstance(source, Checkpoint) and source.library]
    if not said or origin.update_every is None:
        return {}
    libraries = {(source.info.t, source.info.sigma_rel): source.library for source in said}

    def profile(source: FileSource, update_every: int) -> Discrete:
        info = source.info
        return _tracked_profile(libraries[info.t, info.sigma_rel], info.gamma, info.step, origin, update_every)

    return check_update_every(said, origin.update_every, profile)


def _edm2(path: Path, origin: Origin, _: str) -> list[Checkpoint]:
    """A pickle of EDM2's training: thousands of images, and a width, in its name."""
    match = _EDM2.fullmatch(path.name)
    if match is None:
        raise FileFormatError(path, "is not named as EDM2's are: network-snapshot-<images in thousands>-<width>.pkl")
    images = 1000 * int(match[1])
    if images == 0:
        return []  # before the training
    _checked_step(path, images)
    profile = PowerFunction.from_sigma_rel(float(match[2]), images)
    found = _selected(read_contents(path).model_tensors(origin.prefix, "ema"), origin)
    return [make_checkpoint(path, found, profile, images, "images", float(match[2]))]


_READERS = {
    "dcp": _distributed, "torchtitan": _distributed, "ema-pytorch": _karras, "posthoc-ema": _karras, "edm2": _edm2,
}  # fmt: skip
