"""What programs store in a checkpoint: the weights, an average of them, and how it was updated.

To add a layout, try its files first: sets of tensors are found by themselves, at any depth, if a
word in a key or in the name of a file says which is the average (`folders.AVERAGE_WORD`). Then

1. for files of another kind than safetensors and pickles: a reader and a row of
   `containers.CONTAINERS`;
2. if values beside the average say its decay or count its updates: a function that reads them, and
   a row of `LIBRARIES`;
3. if the two sets lie under fixed keys that no word tells apart: a row of `FIXED`;
4. if names of files say the time and the profile: a function in `BY_NAME`;
5. for a new name of a step or an epoch: an item of `clock.STEPS` or `clock.EPOCHS`;
6. a line in the guide `checkpoints`, and a test that writes such files in
   `tests/checkpoints/test_programs.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.ask import ASKED, Answer, QuestionError
from posthoc_cli.checkpoints.clock import Time
from posthoc_cli.checkpoints.containers import strip_ending
from posthoc_cli.checkpoints.content import Content, Tensors, Values, list_names
from posthoc_cli.checkpoints.folders import AVERAGE_WORD
from posthoc_cli.checkpoints.places import Place
from posthoc_cli.checkpoints.sets import Pair, TensorSets, are_mmcv_buffers, complete, match_names
from posthoc_cli.checkpoints.settings import UNSPECIFIED, ImportSettings
from posthoc_cli.checkpoints.source import Checkpoint, are_near, first_values, make_checkpoint
from posthoc_cli.checkpoints.updates import Calls, Updates
from posthoc_cli.decay_rules import RAMP_UP, UNLIMITED, ema_pytorch_profile
from posthoc_cli.errors import FileFormatError, InvalidValueError, argument
from posthoc_cli.profiles import FloatArray, PowerFunction, StoredProfile, gamma_from_sigma_rel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds: an average, the weights under the same names, or one of the two."""

    sets: TensorSets
    kind: str  # one of `KINDS`
    pair: Pair
    # of an ordinary EMA; its profile follows in `Checkpoint.with_settings`
    updates: Updates | None = None
    # of another average, at a step
    profile: Callable[[int], StoredProfile] | None = None
    sigma_rel: float = 0.0  # and the width that its user asked for
    reading: Time | None = None  # its number, if its name states it with the profile
    time: int = 0  # on the clock of its run; 0 before the training
    lacks: tuple[str, ...] = ()  # settings that must be given
    unused: tuple[str, ...] = ()  # paths of the sets that are neither of these

    @property
    def content(self) -> Content:
        return self.sets.content

    @property
    def path(self) -> Path:
        return self.content.path

    @property
    def averaged(self) -> Tensors:
        return self.pair.averaged

    @property
    def weights(self) -> Tensors:
        return self.pair.weights

    @property
    def count(self) -> int:
        """Updates that its average has counted, one for each step; 0 if none are known."""
        if self.updates is None or self.updates.calls == "counted":
            return 0
        return self.updates.count or 0

    @property
    def tensors(self) -> Tensors:
        """The tensors of the model: the average's, and the weights that the average lacks."""
        if self.averaged:
            return complete(self.averaged, self.weights)
        return self.weights

    @property
    def twins(self) -> list[str]:
        """The unused sets that have as many tensors as the weights or the average."""
        counts = {len(self.averaged or self.weights), len(self.weights)}
        return [key for key in self.unused if self.sets.counts[key] in counts]

    def is_unlike(self, key: str) -> bool:
        """Return whether a set is a network none of whose names the weights have."""
        is_matched = match_names(self.sets.below(key), self.weights)
        return self.sets.holds_network(key) and not is_matched

    def paired_with(self, key: str) -> Found:
        """Take another set for the average of the weights; for none if it does not match."""
        averaged = match_names(self.sets.below(key), self.weights)
        return replace(self, pair=replace(self.pair, averaged=averaged))

    @property
    def starts(self) -> tuple[FloatArray, FloatArray]:
        """The first elements of the average, and of its weights: of matrices if there are any, as
        the vectors of two networks, such as the gains of norms, may be near each other."""
        shared = self.averaged.keys() & self.weights.keys()
        names = {name for name in shared if len(self.weights[name].shape) > 1} or shared
        ours = make_checkpoint(self.content, {name: self.averaged[name] for name in names})
        theirs = make_checkpoint(self.content, {name: self.weights[name] for name in names})
        with ours:  # the file stays open
            return first_values(ours), first_values(theirs)


def recognise(content: Content, settings: ImportSettings) -> Found:
    """Find what a checkpoint holds: by its name if it states the profile of an average, else by the
    sets that settings or words name."""
    for find in BY_NAME:
        found = find(content, settings)
        if found is not None and settings.kind in (None, found.kind):
            return found
    sets = TensorSets(content, (settings.average, settings.weights))
    try:
        found = _recognise_sets(sets, settings)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InvalidValueError):
            raise
        reason = f"holds an EMA whose settings cannot be read: {error}"
        raise FileFormatError(content.path, reason) from error
    used = [*found.averaged.values(), *found.weights.values()]
    return replace(found, unused=sets.without(used))


def role_by_glob(path: Path, settings: ImportSettings) -> str:
    """Return "ema" or "checkpoints" for a file that a glob in `average` or `weights` names; else an
    empty text."""
    for kind, text in (("ema", settings.average), ("checkpoints", settings.weights)):
        if text and (fnmatchcase(path.name, text) or ("/" in text and path.match(text))):
            return kind
    return ""


def _recognise_sets(sets: TensorSets, settings: ImportSettings) -> Found:
    content = sets.content
    kind = role_by_glob(content.path, settings)
    if kind:
        settings = replace(settings, kind=kind, average=None, weights=None)
    if settings.kind == "checkpoints":
        return _find_weights(sets, settings)
    if settings.average is None and settings.weights is None:
        finders: list[Callable[[TensorSets], Found | None]] = [row.find for row in FIXED]
        for find in (*finders, _torchtitan):
            fixed = find(sets)
            if fixed is not None:
                return fixed
    pair = _find_average(sets, settings)
    if pair is not None:
        return _describe(sets, pair)
    if settings.kind == "ema" or (settings.weights is None and _is_average_file(content.path)):
        return _describe(sets, Pair(averaged=sets.model()))
    found = _find_weights(sets, settings)
    if settings.weights is None and are_mmcv_buffers(found.weights):
        reason = "holds the weights twice, under names that begin with ema_ and without; a hook "
        reason += "such as mmcv's swaps the two, and nothing shows which are the averages"
        path = sets.model_path() or "*"
        buffers = {"average": "ema_*", "weights": path}
        raise QuestionError(content.path, reason, buffers, {"average": path, "weights": "ema_*"})
    return found


def _is_average_file(path: Path) -> bool:
    """Return whether the name of a file, or of its folder, says that it holds an average."""
    stem = re.sub(r"\.(?!\d)", "_", strip_ending(path.name))  # not within `ema_0.999`
    return AVERAGE_WORD.search(stem) is not None or bool(AVERAGE_WORD.fullmatch(path.parent.name))


def _find_weights(sets: TensorSets, settings: ImportSettings) -> Found:
    if settings.weights is None:
        pair = Pair(weights=sets.model(), weights_key=sets.model_path())
    else:
        key = sets.find_path(settings.weights, "weights")
        pair = Pair(weights=sets.below(key), weights_key=key)
    return Found(sets, "checkpoints", pair)


def _find_average(sets: TensorSets, settings: ImportSettings) -> Pair | None:
    """Find the average that the settings or a word name, with the weights that match it; alone if
    it is named, or if it is all of a checkpoint. None if there is none."""
    weights = None
    if settings.weights is not None:
        weights = sets.find_path(settings.weights, "weights")
    if settings.average is not None:
        path = sets.find_path(settings.average, "average")
        return sets.pair(path, weights, is_named=True) or sets.alone(path)
    candidates = [*sets.averages, *_averaged_models(sets)]
    pairs = []
    for path in candidates:
        pair = sets.pair(path, weights)
        if pair is not None:
            pairs.append(pair)
        else:
            pairs += sets.pairs_within(path, weights)
    if len(pairs) > 1:
        keys = [pair.average_key for pair in pairs]
        reason = f"which of its sets of tensors is the average is unclear: {list_names(keys)}"
        answers: list[Answer] = [{"average": key} for key in keys]
        if len({pair.weights_key for pair in pairs}) > 1:  # each of a part of the model
            answers.insert(0, {"kind": "checkpoints"})
        raise QuestionError(sets.content.path, reason, *answers)
    if pairs:
        return pairs[0]
    if len(candidates) == 1 and weights is None and sets.is_all(candidates[0]):
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
    key: str = ""  # of the average; empty for any
    lacks: tuple[str, ...] = ()  # settings that its files do not hold


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


def _counting(
    values: Values,
    name: str = "updates",
    calls: Calls = "multiples",
    **rule: Any,
) -> Updates:
    """Read the number of updates from a value; they follow a rule."""
    return Updates(rule, _read_count(values.get(name)), calls=calls)


_YOLO: Values = {"decay": 0.9999, "warm_up": "exp", "tau": 2000.0}
LIBRARIES = (
    Library(("optimization_step", "decay"), _diffusers),
    Library(
        ("initted", "step"),  # ema-pytorch
        partial(_counting, name="step", calls="counted", warm_up="power"),
        lacks=("update_every", "update_after_step"),
    ),
    Library(("n_averaged",), partial(_counting, name="n_averaged", calls="from first", copies=1)),
    Library(("updates",), partial(_counting, **_YOLO), key="ema"),  # ultralytics, YOLOv5
    Library(("decay",), _with_decay),
    Library(("updates",), _counting),  # RT-DETR, D-FINE
)
"""The first one whose values are there counts."""


def _find_library(
    content: Content,
    average_key: str,
) -> tuple[Library | None, Values]:
    """Find the program that stored an average, and the values beside its marks."""
    places = [average_key]
    while places[-1]:
        outer, _, _ = places[-1].rpartition(".")
        places.append(outer)
    for library in LIBRARIES:
        if library.key not in ("", average_key):
            continue
        for place in places:
            start = f"{place}." if place else ""
            marks = [content.values.get(start + mark) for mark in library.marks]
            if all(isinstance(value, int | float | str) for value in marks):
                return library, _values_below(content.values, start)
    return None, {}


def _values_below(values: Values, start: str) -> Values:
    below = {}
    for name, value in values.items():
        if name.startswith(start):
            below[name.removeprefix(start)] = value
    return below


def _describe(sets: TensorSets, pair: Pair) -> Found:
    """Describe an average with what the values beside it, or the name of its file, say of its
    updates."""
    library, values = _find_library(sets.content, pair.average_key)
    if library is not None:
        return Found(sets, "ema", pair, library.read(values), lacks=library.lacks)
    decay = named_decay(sets.content.path)
    updates = Updates({} if decay is None else {"decay": decay})
    return Found(sets, "ema", pair, updates)


def named_decay(path: Path) -> float | None:
    """Find the decay in a name such as guided-diffusion's `ema_0.9999_000050.pt`, next to
    `model000050.pt`."""
    match = re.match(r"ema_(0\.\d+)_", path.name)
    return float(match[1]) if match else None


@dataclass(frozen=True)
class Fixed:
    """A program that stores an average and the weights under fixed keys, with a number of
    updates."""

    average: str
    weights: str
    count: str

    def find(self, sets: TensorSets) -> Found | None:
        count = _read_count(sets.content.values.get(self.count))
        averaged = sets.below(self.average)
        weights = sets.below(self.weights)
        if not (averaged and weights and count):
            return None
        pair = Pair(averaged, weights, self.average, self.weights)
        return Found(sets, "ema", pair, Updates({"copies": 1}, count, calls="from first"))


FIXED = (
    # Lightning's EMAWeightAveraging
    Fixed("state_dict", "current_model_state", "averaging_state.n_averaged"),
    # mmengine, whose hook swaps the two before a checkpoint is written
    Fixed("state_dict", "ema_state_dict.module", "ema_state_dict.steps"),
)

_TITAN_EMA = re.compile(r"(?:ema_optimizer\.)*state\.(.+)\.ema_params")


def _torchtitan(sets: TensorSets) -> Found | None:
    """The update at `start_step` + n `update_every` keeps 2**(-1 / (0.05 n)), or another
    `half_life_fraction`."""
    averaged = {}
    for name, tensor in sets.content.tensors.items():
        if match := _TITAN_EMA.fullmatch(name):
            averaged[match[1]] = tensor
    if not averaged:
        return None
    rule = {"decay": UNLIMITED, "warm_up": "ramp-up", "power": RAMP_UP}
    updates = Updates(rule, calls="after copy")
    return Found(sets, "ema", Pair(averaged, sets.model()), updates)


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
    lacks = ("sigma_rels", "update_every")
    return Found(
        sets,
        "ema-pytorch" if has_model else "posthoc-ema",
        Pair(averaged),
        profile=partial(ema_pytorch_profile, gamma, every=every, first=first),
        sigma_rel=width,
        reading=Time(int(match["step"]), "steps", _IN_NAMES),
        lacks=lacks if has_model else (*lacks, "update_after_step"),
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
        "edm2",
        Pair(sets.below("ema") if sets.counts["ema"] else sets.model()),
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
    "ema_restarts",
}  # fmt: skip
_DEFAULTS = {"update_every": "10", "update_after_step": "100"}  # of ema-pytorch


def check_given(found: Found, settings: ImportSettings) -> None:
    """Raise InvalidValueError for a setting that a file lacks, or that does not apply to it."""
    name = found.path.name
    missing = [each for each in found.lacks if getattr(settings, each) in (None, ())]
    if missing:
        reason = f"must be given: files of its library, such as {name}, do not hold it"
        usual = [f"{each} is {_DEFAULTS[each]}" for each in missing if each in _DEFAULTS]
        if usual:
            reason += f"; by default {' and '.join(usual)}"
        raise QuestionError(missing[0], reason, dict.fromkeys(missing, ASKED))
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

    `average` is the key or prefix of the average's tensors, or a glob of it; by default the one
    that is called an average. Each of the two may raise FileFormatError or InvalidValueError.
    """

    def __init__(
        self,
        path: Path,
        average: str | None = None,
    ) -> None:
        self._content = Place(path).open_at(path)
        self._settings = replace(UNSPECIFIED, average=average)

    @cached_property
    def average(self) -> Checkpoint | None:
        """The average; None if there is none."""
        found = self._found
        if not found.averaged:
            return None
        if self._settings.average is None and not are_near(*found.starts):
            option = argument("average")
            reason = f"the average is unrelated to the weights; name it with {option} if it is one"
            log.warning("%s: %s", self._content.path, reason)
        return self._make(found.tensors)

    @cached_property
    def weights(self) -> Checkpoint:
        try:
            found = self._found
        except (FileFormatError, InvalidValueError):  # perhaps of several averages
            return self._make(TensorSets(self._content).model())
        return self._make(found.weights or TensorSets(self._content).model())

    @cached_property
    def _found(self) -> Found:
        return recognise(self._content, self._settings)

    @property
    def groups(self) -> str:
        """The names of the outermost sets, for a message."""
        keys = dict.fromkeys(tensor.keys[0] for tensor in self._content.tensors.values())
        return list_names([*keys]) or "it has none"

    def _make(self, tensors: Tensors) -> Checkpoint:
        return make_checkpoint(self._content, tensors)
