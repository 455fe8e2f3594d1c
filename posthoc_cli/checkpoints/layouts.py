"""What programs store in a checkpoint: the weights, an average of them, and how it was updated.

To add a layout, try its files first: sets of tensors are found by themselves, at any depth, if a
word in a key or in the name of a file says which is the average (`folders.AVERAGE_WORD`). Then all
commands may work by guesses alone: `ema info` says what shows the numbers, and `ema import` whether
the decay was "found" (measured) or is "given". Then

1. for files of another kind than safetensors and pickles: a reader and a row of
   `containers.CONTAINERS`;
2. if values beside the average, or beside what holds it, say its decay or count its updates: a row
   of `LIBRARIES` with the numbers and texts that show it, and a function that makes `Updates` of
   these values, by their keys from there on. A count is no sign of a warm-up but in `_with_decay`;
3. if the two sets lie under fixed keys that no word tells apart: the keys in its row, too;
4. if names of files say the time and the profile: a function in `BY_NAME`;
5. for a new name of a step or an epoch: an item of `clock.STEPS` or `clock.EPOCHS`; of a value that
   lies deeper its whole path, as "counter.updates";
6. a line in the guide `layouts`, and a test in `tests/checkpoints/test_programs.py` that writes
   such files (`store` of `saved` the content for each of `walks.saves()`) and compares the sets
   (`check`, `read`), the times (`times`), and an average (`distance` from
   `truth.exact(history(), 0.1)`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.checkpoints.ask import ASKED, Answer, QuestionError
from posthoc_cli.checkpoints.clock import Time
from posthoc_cli.checkpoints.containers import strip_ending
from posthoc_cli.checkpoints.content import Content, Tensors, Values, list_names
from posthoc_cli.checkpoints.folders import AVERAGE_WORD
from posthoc_cli.checkpoints.places import Place
from posthoc_cli.checkpoints.sets import Found, TensorSets
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.source import Checkpoint, are_near, make_checkpoint
from posthoc_cli.checkpoints.updates import Calls, Updates
from posthoc_cli.decay_rules import RAMP_UP, UNLIMITED, ema_pytorch_profile
from posthoc_cli.errors import FileFormatError, InvalidValueError, argument
from posthoc_cli.profiles import PowerFunction, gamma_from_sigma_rel

log = logging.getLogger(__name__)


def recognise(content: Content, settings: ImportSettings, like: Found | None = None) -> Found:
    """Find what a checkpoint holds: by its name if it states the profile of an average, else by the
    sets that settings or words name; or, with the same names and shapes, the sets of a file `like`
    it, which was recognised by the same settings."""
    for find in BY_NAME:
        found = find(content, settings)
        if found is not None and settings.kind in (None, found.kind):
            return found
    if like is not None and _is_alike(content, like.content, settings):
        found = like.sets_in(content)
    else:
        sets = TensorSets(content, (settings.average, settings.weights))
        found = _recognise_sets(sets, settings)
        used = [*found.averaged.values(), *found.weights.values()]
        found = replace(found, unused=sets.without(used))
    return _with_updates(found) if found.averaged else found


def _is_alike(content: Content, other: Content, settings: ImportSettings) -> bool:
    """Return whether nothing tells the sets of two checkpoints apart."""
    return (
        content.shapes == other.shapes
        and len(content.files) == len(other.files)
        and content.values.keys() == other.values.keys()
        and not (content.trackers or other.trackers)
        and _are_counted(content) == _are_counted(other)
        and role_by_glob(content.path, settings) == role_by_glob(other.path, settings)
        and _is_average_file(content.path) == _is_average_file(other.path)
    )


def role_by_glob(path: Path, settings: ImportSettings) -> str:
    """Return "ema" or "checkpoints" for a file that a glob in `average` or `weights` names; else an
    empty text."""
    for kind, text in (("ema", settings.average), ("checkpoints", settings.weights)):
        if not text:
            continue
        for pattern in map(str, files.expand_braces(Path(text))):
            if fnmatchcase(path.name, pattern) or ("/" in pattern and path.match(pattern)):
                return kind
    return ""


def _recognise_sets(sets: TensorSets, settings: ImportSettings) -> Found:
    content = sets.content
    kind = role_by_glob(content.path, settings)
    if kind:
        settings = replace(settings, kind=kind, average=None, weights=None)
    if settings.kind == "checkpoints":
        return _find_weights(sets if settings.weights else sets.with_parts(), settings)
    if settings.average is None and settings.weights is None:
        if found := _torchtitan(sets):
            return found
        settings = _name_fixed(sets, settings)
    if average := _find_average(sets, settings):
        return average
    if settings.kind == "ema" or (settings.weights is None and _is_average_file(content.path)):
        return Found(sets, sets.model())
    weights = _find_weights(sets, settings)
    path = weights.weights_key
    if settings.weights is None and sets.pairs("ema_*", path):
        reason = "holds the weights twice, under names that begin with ema_ and without; a hook "
        reason += "such as mmcv's swaps the two, and nothing shows which are the averages"
        buffers: Answer = {"average": "ema_*"}
        if not path:  # no key names the others
            raise QuestionError(content.path, reason, buffers)
        swapped: Answer = {"average": path, "weights": "ema_*"}
        raise QuestionError(content.path, reason, {**buffers, "weights": path}, swapped)
    return weights


def _is_average_file(path: Path) -> bool:
    """Return whether the name of a file, or of its folder, says that it holds an average."""
    stem = re.sub(r"\.(?!\d)", "_", strip_ending(path.name))  # not within `ema_0.999`
    return AVERAGE_WORD.search(stem) is not None or bool(AVERAGE_WORD.fullmatch(path.parent.name))


def _name_fixed(sets: TensorSets, settings: ImportSettings) -> ImportSettings:
    """Name the average that a tracker's callback has saved, or the two sets of a program that
    stores them under fixed keys, once it has counted an update."""
    for path in sets.content.tracker_averages:
        if sets.counts[path]:
            return replace(settings, average=path)
    for row in _are_counted(sets.content):
        if sets.below(row.average) and sets.below(row.weights):
            return replace(settings, average=row.average, weights=row.weights)
    return settings


def _are_counted(content: Content) -> list[Library]:
    """List the programs with fixed keys whose average has counted an update."""
    return [row for row in LIBRARIES if row.weights and content.values.get(row.marks[0])]


def _find_weights(sets: TensorSets, settings: ImportSettings) -> Found:
    if settings.weights is None:
        return Found(sets, weights=sets.model(), weights_key=sets.model_path())
    key = sets.find_path(settings.weights, "weights")
    return Found(sets, weights=sets.below(key), weights_key=key)


def _find_average(sets: TensorSets, settings: ImportSettings) -> Found | None:
    """Find the average that the settings or a word name, with the weights that match it; alone if
    it is named, or if it is all of a checkpoint. None if there is none."""
    weights = None
    if settings.weights is not None:
        weights = sets.find_path(settings.weights, "weights")
    is_named = settings.average is not None
    candidates = [*sets.averages, *_averaged_models(sets)]
    if settings.average is not None:
        candidates = [sets.find_path(settings.average, "average")]
    pairs = []
    for path in candidates:
        pairs += sets.pairs(path, weights, is_named)
    if len(pairs) > 1:
        keys = [pair.average_key for pair in pairs]
        reason = f"which of its sets of tensors is the average is unclear: {list_names(keys)}"
        answers: list[Answer] = [{"average": key} for key in keys]
        if len({pair.weights_key for pair in pairs}) > 1:  # each of a part of the model
            answers.insert(0, {"kind": "checkpoints"})
        raise QuestionError(sets.content.path, reason, *answers)
    if pairs:
        return pairs[0]
    if is_named or (len(candidates) == 1 and weights is None and sets.is_all(candidates[0])):
        return sets.alone(candidates[0])
    return None


def _averaged_models(sets: TensorSets) -> list[str]:
    """Find the sets that torch's `AveragedModel` wrote, though no word says so: its count lies
    beside them."""
    found = []
    for name in sets.content.values:
        outer, dot, last = name.rpartition(".")
        path = f"{outer}{dot}module"
        if last == "n_averaged" and sets.counts[path] and not sets.is_averaged(path):
            found.append(path)
    return found


# --- ordinary EMAs: what values beside them say


@dataclass(frozen=True)
class Library:
    """A program that stores values about an average, beside it or in what it lies in."""

    marks: tuple[str, ...]  # the values that show it
    read: Callable[[Values], Updates]
    average: str = ""  # its key; empty for any
    weights: str = ""  # the key of the weights, if no word tells the two sets apart
    # settings that its files do not hold, each with the program's default
    lacks: Mapping[str, str] = field(default_factory=dict)


def _read_count(value: Any) -> int | None:
    if isinstance(value, int | float) and value >= 0:
        return int(value)
    return None


def _diffusers(values: Values) -> Updates:
    rule: Values = {
        "decay": float(values["decay"]),
        "warm_up": "power" if values.get("use_ema_warmup") else "ratio",
        "copies": 1 + int(values.get("update_after_step") or 0),
    }
    for name in ("inv_gamma", "power"):
        if name in values:
            rule[name] = float(values[name])
    rule["least"] = float(values.get("min_decay") or 0.0)
    inv_gamma = rule.get("inv_gamma", 1.0)
    power = rule.get("power", 1.0)
    if inv_gamma <= 0 or power < 0:
        raise ValueError("its warm-up never begins")
    return Updates(rule, _read_count(values["optimization_step"]))


def _with_decay(values: Values) -> Updates:
    """Read the updates of torch-ema, LitEma, ACE, OpenFold and NeMo: a count means that a warm-up
    was used."""
    count = _read_count(values.get("num_updates"))
    is_rising = count is not None and bool(values.get("faster_decay_at_start", True))
    decay = round(float(values["decay"]), 7)
    rule = {"decay": decay, "warm_up": "ratio" if is_rising else ""}
    every = _read_count(values.get("every_n_steps")) or 1
    return Updates(rule, count, every)


def _of_module(values: Values) -> Updates:
    """Read the updates of NequIP's `EMAWeights`, which keeps its settings as a module's state."""
    return _with_decay(_values_below(values, "_extra_state."))


def _counting(
    values: Values,
    name: str = "updates",
    calls: Calls = "multiples",
    **rule: Any,
) -> Updates:
    """Read the number of updates from a value; they follow a rule."""
    return Updates(rule, _read_count(values.get(name)), calls=calls)


_YOLO: Values = {"decay": 0.9999, "warm_up": "exp", "tau": 2000.0}
_AVERAGED_MODEL: Values = {"calls": "from first", "copies": 1}
LIBRARIES = (
    Library(  # Lightning's EMAWeightAveraging
        ("averaging_state.n_averaged",),
        partial(_counting, name="averaging_state.n_averaged", **_AVERAGED_MODEL),
        "state_dict",
        "current_model_state",
    ),
    Library(  # mmengine, whose hook swaps the two before a checkpoint is written
        ("ema_state_dict.steps",),
        partial(_counting, name="ema_state_dict.steps", **_AVERAGED_MODEL),
        "state_dict",
        "ema_state_dict.module",
    ),
    Library(("optimization_step", "decay"), _diffusers),
    Library(
        ("initted", "step"),  # ema-pytorch
        partial(_counting, name="step", calls="counted", warm_up="power"),
        lacks={"update_every": "10", "update_after_step": "100"},
    ),
    Library(("n_averaged",), partial(_counting, name="n_averaged", **_AVERAGED_MODEL)),
    Library(("updates",), partial(_counting, **_YOLO), "ema"),  # ultralytics, YOLOv5
    Library(("_extra_state.decay", "_extra_state.num_updates"), _of_module),
    Library(("decay",), _with_decay),
    Library(("updates",), _counting),  # RT-DETR, D-FINE
)
"""The first one whose values are there counts."""


def _find_library(average_key: str, values: Values) -> tuple[Library | None, Values]:
    """Find the program that stored an average, and the values beside its marks."""
    places = [average_key]
    while places[-1]:
        outer, _, _ = places[-1].rpartition(".")
        places.append(outer)
    for library in LIBRARIES:
        if library.average not in ("", average_key):
            continue
        for place in places:
            start = f"{place}." if place else ""
            marks = [values.get(start + mark) for mark in library.marks]
            if all(isinstance(value, int | float | str) for value in marks):
                return library, _values_below(values, start)
    return None, {}


def _values_below(values: Values, start: str) -> Values:
    below = {}
    for name, value in values.items():
        if name.startswith(start):
            below[name.removeprefix(start)] = value
    return below


_DECAY_IN_NAME = re.compile(r"ema_(0\.\d+)_")
"""Pattern of names such as guided-diffusion's `ema_0.9999_000050.pt`, next to `model000050.pt`."""


def _with_updates(found: Found) -> Found:
    """Add what the values beside an average, or the name of its file, say of its updates."""
    if any(_TITAN_EMA.fullmatch(tensor.name) for tensor in found.averaged.values()):
        rule: Values = {"decay": UNLIMITED, "warm_up": "ramp-up", "power": RAMP_UP}
        return replace(found, updates=Updates(rule, calls="after copy"))
    library, values = _find_library(found.average_key, found.content.values)
    if library is None:
        named = _DECAY_IN_NAME.match(found.path.name)
        return replace(found, updates=Updates({"decay": float(named[1])} if named else {}))
    try:
        updates = library.read(values)
    except (TypeError, ValueError, OverflowError) as error:
        reason = f"holds an EMA whose settings cannot be read: {error}"
        raise FileFormatError(found.path, reason) from error
    if found.weights and values.get("_extra_state.is_holding_ema_weights") is False:
        found = replace(found.exchanged(found, found), was_swapped=True)
    return replace(found, updates=updates, lacks=library.lacks)


_TITAN_EMA = re.compile(r"(?:ema_optimizer\.)*state\.(.+)\.ema_params")


def _torchtitan(sets: TensorSets) -> Found | None:
    """The update at `start_step` + n `update_every` keeps 2**(-1 / (0.05 n)), or another
    `half_life_fraction`."""
    averaged = {}
    for name, tensor in sets.content.tensors.items():
        if match := _TITAN_EMA.fullmatch(name):
            averaged[match[1]] = tensor
    return Found(sets, averaged, sets.model()) if averaged else None


# --- averages whose files' names say what they are


_IN_NAMES = "the names of files"
_NUMBERED = re.compile(r"(?P<number>\d{1,20})[._](?P<step>\d{1,20})\.(?:pt|safetensors)")


def _read_numbered(content: Content, settings: ImportSettings) -> Found | None:
    """Recognise averages of ema-pytorch and pytorch-posthoc-ema by their numbers; their settings
    are not in the files."""
    match = _NUMBERED.fullmatch(content.path.name)
    if not (match and says_its_profile(content)):
        return None
    sets = TensorSets(content)
    has_model = sets.counts["ema_model"] > 0
    first = 1 if has_model else max(settings.update_after_step or 0, 1)
    number = int(match["number"])
    width = 0.0
    gamma = 0.0
    if number < len(settings.sigma_rels):
        width = settings.sigma_rels[number]
        gamma = gamma_from_sigma_rel(width)
    every = settings.update_every or 1
    averaged = dict(sets.below("ema_model") if has_model else sets.below(""))
    for counter in ("initted", "step"):
        averaged.pop(counter, None)
    lacks = {"sigma_rels": "", "update_every": "100"}
    if not has_model:
        lacks |= {"update_every": "10", "update_after_step": "100"}
    return Found(
        sets,
        averaged,
        profile=partial(ema_pytorch_profile, gamma, every=every, first=first),
        kind="ema-pytorch" if has_model else "posthoc-ema",
        sigma_rel=width,
        reading=Time(int(match["step"]), "steps", _IN_NAMES),
        lacks=lacks,
    )


_EDM2 = re.compile(
    r"(?:network-snapshot|edm2(?:-[a-z0-9]+)+)-(?P<step>\d{1,20})-(?P<width>\d*\.\d+)\.pkl"
)


def _edm2(content: Content, _: ImportSettings) -> Found | None:
    """Recognise power functions of EDM2, with the images and the width in the name."""
    match = _EDM2.fullmatch(content.path.name)
    if not match:
        return None
    width = float(match["width"])
    sets = TensorSets(content)
    return Found(
        sets,
        sets.below("ema") if sets.counts["ema"] else sets.model(),
        kind="edm2",
        profile=partial(PowerFunction.from_sigma_rel, width),
        sigma_rel=width,
        reading=Time(1000 * int(match["step"]), "images", _IN_NAMES),
    )


BY_NAME: tuple[Callable[[Content, ImportSettings], Found | None], ...] = (_edm2, _read_numbered)


def says_its_profile(content: Content) -> bool:
    """Return whether the name of a file states the time and the profile."""
    name = content.path.name
    is_numbered = _NUMBERED.fullmatch(name) and "initted" in content.tensors
    return bool(_EDM2.fullmatch(name) or is_numbered)


# --- what an import must be told

_OF_AVERAGES = {
    "sigma_rels", "update_every", "update_after_step", "ema_decay", "ema_warmup", "steps",
}  # fmt: skip


def check_given(found: Found, settings: ImportSettings) -> None:
    """Raise InvalidValueError for a setting that a file lacks, or that does not apply to it."""
    name = found.path.name
    missing = [each for each in found.lacks if getattr(settings, each) in (None, ())]
    if missing:
        reason = f"must be given: files of its library, such as {name}, do not hold it"
        usual = [f"{each} is {found.lacks[each]}" for each in missing if found.lacks[each]]
        if usual:
            reason += f"; by default {' and '.join(usual)}"
        raise QuestionError(missing[0], reason, dict.fromkeys(missing, ASKED))
    if found.count and settings.update_after_step is not None:
        reason = f"is of no use: {name} counts the updates of its average"
        raise InvalidValueError("update_after_step", reason, value=settings.update_after_step)
    if found.updates is not None and len(settings.sigma_rels) > 1:
        raise InvalidValueError(
            "sigma_rels", f"must be one number, the width of the average in {name}"
        )
    if found.profile is not None and found.lacks and not found.sigma_rel:
        reason = f"must be one number for each average, {name} included"
        raise InvalidValueError("sigma_rels", reason)


def check_applies(has_averages: bool, settings: ImportSettings) -> None:
    """Raise InvalidValueError for a setting of averages where there are none."""
    for name in settings.given:
        if name in _OF_AVERAGES and not has_averages:
            reason = "does not apply to files that are taken for weights"
            hint = f"to take the files for averages, give {argument('kind')} ema; "
            hint += f"to name one in them, {argument('average')}"
            raise InvalidValueError(name, reason, hint)


# --- one checkpoint, for an export


class Stored:
    """The average and the weights that a training's checkpoint holds, as they are.

    Each of the two may raise FileFormatError or InvalidValueError.

    Arguments:
        raw: whether the weights are asked for, not the average.
        average, weights: the key or prefix of their tensors, or a glob of it; by default the
            average is the set that is called so. If the weights alone are named, they are asked
            for.
    """

    def __init__(
        self,
        path: Path,
        raw: bool = False,
        average: str | None = None,
        weights: str | None = None,
    ) -> None:
        self._content = Place(path).open_at(path)
        self._settings = ImportSettings(average=average, weights=weights)
        self.is_raw = raw or (weights is not None and average is None)

    @cached_property
    def average(self) -> Checkpoint | None:
        """The average; None if there is none."""
        found = self._found
        if not found.averaged:
            return self.weights if self._is_own_average else None
        if self._settings.average is None and not are_near(*found.starts):
            option = argument("average")
            reason = f"the average is unrelated to the weights; name it with {option} if it is one"
            log.warning("%s: %s", self._content.path, reason)
        return make_checkpoint(self._content, found.tensors)

    @cached_property
    def weights(self) -> Checkpoint:
        if self._settings.weights is not None:
            alone = replace(self._settings, kind="checkpoints", average=None)
            return make_checkpoint(self._content, recognise(self._content, alone).weights)
        weights: Tensors = {}
        with suppress(FileFormatError, InvalidValueError):  # perhaps of several averages
            weights = self._found.weights
        return make_checkpoint(self._content, weights or TensorSets(self._content).model())

    @cached_property
    def _found(self) -> Found:
        try:
            return recognise(self._content, self._settings)
        except QuestionError as question:
            answers = []
            for answer in question.answers:  # of an import, which an export has by another name
                answers.append({"raw": True} if "kind" in answer else answer)
            subject, reason = question.subject, question.reason
            raise QuestionError(subject, reason, *answers, value=question.value) from None

    @property
    def _is_own_average(self) -> bool:
        """Whether it is an average that this package has written, without keys."""
        mark = self._content.mark
        return mark is not None and mark.kind == "output" and not mark.copied

    @property
    def has_tracker(self) -> bool:
        """Whether the checkpoint holds the state of one of our trackers."""
        return bool(self._content.trackers)

    @property
    def groups(self) -> str:
        """The names of the outermost sets, for a message."""
        return list_names(self._content.groups) or "it has none"
