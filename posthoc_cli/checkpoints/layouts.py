"""What programs store in a checkpoint: the weights, an average of them, and how it was updated.

To add a program, try its files first: sets of tensors are found by themselves, at any depth, if a
word in a key says which is the average (`content.AVERAGE_WORD`). Then

1. if values beside the average say its decay or count its updates: add a row to `LIBRARIES`;
2. if the two sets lie under fixed keys that no word tells apart: add a row to `FIXED`;
3. if names of files or tensors need more than that: write a function, and add it to `FINDERS`;
4. new names of the step, of a model's file, or of a training's state, or an average in the model's
   place: add a row to `programs.PROGRAMS`; a word for a state that is not a model: to
   `content.NO_MODEL`; the key of an average that an optimizer keeps of each parameter: to
   `sets._KEPT_BY_OPTIMIZERS`;
5. add the kind to `KINDS` in `checkpoints/__init__.py`, and to `TAKES` if it is not an ordinary
   EMA; a line to the guide `checkpoints`, and a test that writes such files beside
   `tests/checkpoints/test_programs.py`;
6. for a warm-up of its own: a row of `profiles.WARM_UPS`, which every import then tries, too; the
   help of `--ema-warmup` in `cli/making.py`, the table in the guide, and the tables of
   `tests/checkpoints/test_decay_rules.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.clock import UNREAD, Reading
from posthoc_cli.checkpoints.content import (
    AVERAGE_WORD,
    NO_MODEL,
    Content,
    Tensors,
    Values,
    names_in,
    open_checkpoint,
    stripped,
)
from posthoc_cli.checkpoints.programs import program_of_averages
from posthoc_cli.checkpoints.sets import (
    Pair,
    Sets,
    completed,
    lies_below,
    match_list,
    match_names,
    twin_parts,
)
from posthoc_cli.checkpoints.settings import UNSPECIFIED, ImportSettings, warm_up_of
from posthoc_cli.checkpoints.source import Checkpoint, are_near, first_values, make_checkpoint
from posthoc_cli.checkpoints.updates import Calls, Updates
from posthoc_cli.errors import FileFormatError, InvalidValueError, UnsuitableError, shown
from posthoc_cli.profiles import (
    RAMP_UP,
    UNLIMITED,
    FloatArray,
    PowerFunction,
    StoredProfile,
    ema_pytorch_profile,
    gamma_from_sigma_rel,
)
from posthoc_cli.snapshots.tensorfile import parse_object, read_small_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds: an average, the weights under the same names, or one of them."""

    content: Content
    kind: str
    averaged: Tensors = field(default_factory=dict)  # by name; empty if the checkpoint has none
    weights: Tensors = field(default_factory=dict)
    # of an ordinary EMA; its profile follows in `Checkpoint.with_settings`
    updates: Updates | None = None
    # of another average, at a step
    profile: Callable[[int], StoredProfile] | None = None
    sigma_rel: float = 0.0  # and the width that its user asked for
    reading: Reading = UNREAD  # its number
    time: int = 0  # on the clock of its run; 0 before the training
    # settings that must be given, and the reason
    asks: Mapping[str, str] = field(default_factory=dict)
    # keys of the average and the weights if nothing tells which is which
    undecided: tuple[str, ...] = ()
    # the weights, if an undecided set is not an average
    model: Tensors = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # paths of the sets that are neither of these
    weights_key: str = ""  # what leads to the weights in the checkpoint

    @property
    def path(self) -> Path:
        return self.content.path

    @property
    def tensors(self) -> Tensors:
        """The tensors of the model: those of the average, and the weights that it lacks."""
        if self.averaged:
            return completed(self.averaged, self.weights)
        return self.weights

    @property
    def starts(self) -> tuple[FloatArray, FloatArray]:
        """The first elements of the average, and of its weights: of matrices if there are any, as
        the vectors of two networks may be near each other, such as those of norms."""
        shared = self.averaged.keys() & self.weights.keys()
        names = {name for name in shared if len(self.weights[name].shape) > 1} or shared
        averaged = {name: self.averaged[name] for name in names}
        weights = {name: self.weights[name] for name in names}
        ours = first_values(make_checkpoint(self.content, averaged))
        return ours, first_values(make_checkpoint(self.content, weights))

    @property
    def without_average(self) -> Found:
        return Found(
            self.content,
            self.kind,
            weights=self.model or self.weights,
            reading=self.reading,
            time=self.time,
            unused=self.unused,
            weights_key=self.weights_key,
        )

    def swapped(self) -> Found:
        """Return the same with the averages as weights, and these weights as averages."""
        averaged = {name: tensor for name, tensor in self.weights.items() if name in self.averaged}
        weights = {**self.weights, **self.averaged}
        undecided = self.undecided[::-1]
        return replace(self, averaged=averaged, weights=weights, undecided=undecided)


Finder = Callable[[Sets, ImportSettings], Found | None]


def recognise(content: Content, settings: ImportSettings) -> Found:
    """Return what a checkpoint holds: as its kind if one is given, else as the first that fits."""
    sets = Sets(content, (settings.average, settings.weights))
    try:
        found = _found(sets, settings)
    except (TypeError, ValueError, OverflowError) as error:
        reason = f"holds an EMA whose settings cannot be read: {error}"
        raise FileFormatError(content.path, reason) from error
    used = [*found.averaged.values(), *found.weights.values()]
    return replace(found, unused=sets.without(used))


def _found(sets: Sets, settings: ImportSettings) -> Found:
    if settings.kind != "checkpoints":
        for found in _averages(sets, settings):
            if settings.kind in (None, found.kind):
                return found
    if settings.kind == "ema":
        return _all_averaged(sets, settings)
    if settings.kind in (None, "checkpoints"):
        return _weights(sets, settings)
    raise UnsuitableError(sets.content.path, f"is not a file of {settings.kind}")


def without_words(found: Found, settings: ImportSettings) -> Found:
    """Return a checkpoint as the weights of a model in which no word says that a set is an average;
    without that set if it lies outside of the model."""
    sets = Sets(found.content)
    averages = sets.averages
    sets.averages = []
    if len(sets.models) == 1:
        (key,) = sets.models
        whole = replace(found, model={}, weights=sets.model(settings.prefix), weights_key=key)
    else:
        sets.averages = averages
        whole = found
    unused = sets.without(whole.weights.values())
    return replace(whole.without_average, unused=unused)


def _averages(sets: Sets, settings: ImportSettings) -> Iterator[Found]:
    for finder in FINDERS:
        found = finder(sets, settings)
        if found is None:
            continue
        for either in (found, found.swapped()):
            is_average = _is_named(either.averaged, settings.average)
            if is_average and _is_named(either.weights, settings.weights):
                yield either
                break
    found = _find_average(sets, settings)
    if found is not None:
        yield found


def _is_named(tensors: Tensors, text: str | None) -> bool:
    """Return whether a text or glob means a set that all of these tensors are in; so it is without
    a text."""
    if text is None:
        return True
    return bool(tensors) and all(lies_below(tensor, text) for tensor in tensors.values())


def _weights(sets: Sets, settings: ImportSettings) -> Found:
    if settings.weights is not None:
        path = sets.named(settings.weights)
        weights = sets.below(path)
        if path in sets.kept and all(map(str.isdecimal, weights)):
            weights = match_list(sets.content, weights, sets.model())
        return Found(sets.content, "checkpoints", weights=weights)
    weights = sets.model(settings.prefix)
    asks = {}
    program = program_of_averages(sets.content.values.keys())
    if program:
        reason = f"{program} saves its EMA in place of the weights, unless that is off"
        asks["kind"] = f", ema or checkpoints: {reason}"
    return Found(sets.content, "checkpoints", weights=weights, asks=asks)


class Stored:
    """The average and the weights that a training's checkpoint holds, as they are.

    `average` is the key or prefix of the average's tensors, or a glob of it; by default the one
    whose key says it. Each of the two may raise FileFormatError.
    """

    def __init__(
        self,
        path: Path,
        average: str | None = None,
    ) -> None:
        self._content = open_checkpoint(path)
        self._settings = replace(UNSPECIFIED, average=average)

    @cached_property
    def average(self) -> Checkpoint | None:
        """The average; None if there is none."""
        self._check_decided()
        found = self._found
        if self._settings.average is None:
            self._warn_if_unrelated()
        return self._made(found.tensors) if found.averaged else None

    @cached_property
    def weights(self) -> Checkpoint:
        try:
            found = self._found
        except FileFormatError:  # perhaps of several averages
            return self._made(Sets(self._content).model())
        self._check_decided()
        return self._made(found.weights or Sets(self._content).model())

    @cached_property
    def _found(self) -> Found:
        found = recognise(self._content, self._settings)
        if found.model:  # one file does not show how parts move
            return found.without_average
        return found

    def _check_decided(self) -> None:
        if self._found.undecided:
            first, other = self._found.undecided
            reason = "holds two sets, and nothing tells which is the average"
            hint = "name it by `average`, or name the folder of all files"
            raise UnsuitableError(self._content.path, f"{reason}: {first} or {other}", hint)

    def _warn_if_unrelated(self) -> None:
        """Warn if the average is as far from the weights as another network is, such as the other
        tower of a model, whose key is `target_encoder`."""
        if not are_near(*self._found.starts):
            reason = "the set that its key calls an average is unrelated to the weights"
            hint = "name it by `average` if it is one"
            log.warning("%s: %s; %s", self._content.path, reason, hint)

    @property
    def groups(self) -> str:
        return names_in(self._content.groups()) or "it has none"

    def _made(self, tensors: Tensors) -> Checkpoint:
        return make_checkpoint(self._content, tensors)


# --- ordinary EMAs, whose sets are found by their keys


@dataclass(frozen=True)
class Library:
    """A program that stores values about an average, beside it or in what it lies in."""

    kind: str
    marks: tuple[str, ...]  # the values that show it
    read: Callable[[Values], Updates]
    # the key of the average; empty for any
    key: str = ""


def _count(value: Any) -> int | None:
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
    return Updates(rule, _count(values["optimization_step"]))


def _with_decay(values: Values) -> Updates:
    """Return the updates of torch-ema, LitEma, ACE, OpenFold and NeMo: a count says that a warm-up
    was used."""
    count = _count(values.get("num_updates"))
    is_rising = count is not None and bool(values.get("faster_decay_at_start", True))
    decay = round(float(values["decay"]), 7)
    rule = {"decay": decay, "warm_up": "ratio" if is_rising else ""}
    every = _count(values.get("every_n_steps")) or 1
    return Updates(rule, count, every)


def _counting(
    values: Values,
    name: str = "updates",
    calls: Calls = "multiples",
    **rule: Any,
) -> Updates:
    """Return the updates that a value counts, if there is one, and which follow a rule."""
    return Updates(rule, _count(values.get(name)), calls=calls)


def _audiocraft(values: Values) -> Updates:
    rule: Values = {"warm_up": "unbiased"}
    decay = values.get("xp.cfg.optim.ema.decay")
    if isinstance(decay, float):
        rule["decay"] = decay
    every = _count(values.get("xp.cfg.optim.ema.updates")) or 1
    return Updates(rule, every=every)


LIBRARIES = (
    Library("diffusers-ema", ("optimization_step", "decay"), _diffusers),
    Library(
        "ema-pytorch-ema",
        ("initted", "step"),
        partial(_counting, name="step", calls="counted", warm_up="power"),
    ),
    Library(
        "averaged-model",
        ("n_averaged",),
        partial(_counting, name="n_averaged", calls="from first", copies=1),
    ),
    Library(
        "ultralytics",
        ("updates",),
        partial(_counting, decay=0.9999, warm_up="exp", tau=2000.0),
        key="ema",
    ),
    Library("audiocraft", ("ema.count", "xp.sig"), _audiocraft),
    Library("composer", ("ema_weights_active",), _counting),
    Library("torch-ema", ("decay",), _with_decay),
    Library("ema", ("updates",), _counting),  # RT-DETR, D-FINE
)
"""The first one whose values are there counts."""


def _library_of(
    content: Content,
    average_key: str,
) -> tuple[Library | None, Values]:
    """Return the program that stored an average, and the values beside its marks."""
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
                return library, stripped(content.values, start)
    return None, {}


def _find_average(sets: Sets, settings: ImportSettings) -> Found | None:
    """Return the average that the settings name, or a word, and the weights that match it."""
    weights = None
    prefix = settings.prefix.rstrip(".")
    if settings.weights is not None:
        weights = sets.named(settings.weights)
    elif prefix and sets.counts[prefix]:
        weights = prefix
    if settings.average is not None:
        path = sets.named(settings.average)
        pair = sets.pair(path, weights, is_named=True) or sets.alone(path)
        return _described(sets, pair, settings)
    candidates = [*sets.averages, *_anchored(sets)]
    pairs = _pairs(sets, candidates, weights)
    sets.check_one([pair.average_key for pair in pairs])
    if pairs:
        return _described(sets, pairs[0], settings)
    if candidates:
        alone = _alone(sets, candidates)
        return _described(sets, alone, settings) if alone else None
    file = sets.content.path
    if AVERAGE_WORD.search(file.name) or AVERAGE_WORD.fullmatch(file.parent.name):
        return _all_averaged(sets, settings)
    if not settings.include and not settings.exclude:
        _check_slashes(sets.content)
    return _find_twin(sets) if weights is None else None


def _find_twin(sets: Sets) -> Found | None:
    """Return the model and another set of the same tensors, of which the values will tell whether
    it is an average; None unless there is one such set."""
    models = sets.models
    pairs = dict[frozenset[str], tuple[str, str]]()
    for path in models:
        for other in sets.keys:
            if path and sets.are_alike(other, path):
                pairs.setdefault(frozenset((other, path)), (other, path))
    if len(pairs) == 1:
        ((twin, path),) = pairs.values()
        model = sets.below(path)
        averaged = match_names(sets.below(twin), model)
        if averaged and len(model) > 1:
            return Found(
                sets.content,
                "ema",
                averaged,
                model,
                Updates(),
                undecided=(twin, path),
                weights_key=path,
            )
    return _find_twin_parts(sets, models[0]) if len(models) == 1 else None


def _find_twin_parts(sets: Sets, path: str) -> Found | None:
    """Return the model with other parts of the same tensors, such as `visual_encoder_m` and
    `text_encoder_m` of ALBEF; None if there are none, or if they are less than half of it."""
    model = sets.below(path)
    twins = twin_parts(model)
    averaged = {}
    weights = dict(model)
    for name, tensor in model.items():
        for part, twin in twins.items():
            if name.startswith(f"{twin}."):
                averaged[part + name.removeprefix(twin)] = tensor
                del weights[name]
    if not averaged:
        return None
    names = (", ".join(twins.values()), ", ".join(twins))
    return Found(
        sets.content,
        "ema",
        averaged,
        weights,
        Updates(),
        undecided=names,
        model=model,
        weights_key=path,
    )


def _pairs(
    sets: Sets,
    averages: Sequence[str],
    weights: str | None,
) -> list[Pair]:
    """Return the averages that weights match; parts of one average that are alike as one."""
    pairs = []
    for path in averages:
        pair = sets.pair(path, weights)
        if pair is not None:
            pairs.append(pair)
    updates = {repr(_updates_of(sets.content, pair)) for pair in pairs}
    if len(pairs) > 1 and len(updates) == 1:
        return sets.joined(pairs)
    return pairs


def _alone(sets: Sets, averages: Sequence[str]) -> Pair | None:
    """Return the average that is all of a checkpoint, or all that its only group of tensors holds;
    None if there are others."""
    first, *more = averages
    if not more and sets.is_all(first):
        return sets.alone(first)
    groups = [name for name in sets.content.groups() if not NO_MODEL.search(name)]
    if len(groups) != 1:
        return None
    is_within = not more and first.startswith(f"{groups[0]}.")
    return sets.alone(first) if is_within or averages == groups else None


def _check_slashes(content: Content) -> None:
    """Raise FileFormatError if names are paths as of JAX, of several sets and an average."""
    paths = [name for name in content.tensors if "/" in name]
    heads = sorted({path.partition("/")[0] for path in paths})
    if len(heads) > 1 and any(map(AVERAGE_WORD.search, heads)):
        sets = ", ".join(f"{head}/" for head in heads)
        hint = f"import one of them with `include`, such as '{heads[-1]}/*'"
        raise UnsuitableError(content.path, f"holds tensors of {sets}", hint)


def _all_averaged(sets: Sets, settings: ImportSettings) -> Found:
    """Return the model in a file of averages alone."""
    tensors = sets.model(settings.prefix)
    return Found(sets.content, "ema", tensors, updates=_named_updates(sets.content))


def _anchored(sets: Sets) -> list[str]:
    """Return the sets that a value beside them shows to be an average, though no word does."""
    found = []
    for name in sets.content.values:
        outer, dot, last = name.rpartition(".")
        path = f"{outer}{dot}module"
        if last == "n_averaged" and sets.counts[path] and not sets.is_averaged(path):
            found.append(path)
    return found


def _updates_of(content: Content, pair: Pair) -> tuple[str, Updates]:
    """Return the kind of an average, and what the values beside it say of its updates."""
    library, values = _library_of(content, pair.average_key)
    if library is None:
        return "ema", _named_updates(content)
    return library.kind, library.read(values)


def _described(sets: Sets, pair: Pair, settings: ImportSettings) -> Found:
    content = sets.content
    kind, updates = _updates_of(content, pair)
    asks = {}
    if kind == "ema-pytorch-ema" and (settings.ema_decay or settings.update_every):
        unsaid = f": {content.path.name} does not say it; the default of the library is"
        asks = {"update_every": f"{unsaid} 10", "update_after_step": f"{unsaid} 100"}
    found = Found(
        content,
        kind,
        pair.averaged,
        pair.weights,
        updates,
        asks=asks,
        weights_key=pair.weights_key,
    )
    if kind == "ema":
        return found
    flags = [name for name in content.values if name.endswith(".ema_weights_active")]
    if kind == "composer" and any(content.values[name] for name in flags):
        return found.swapped()  # written while its average was swapped in
    return _with_collected(sets, found, pair)


def _named_updates(content: Content) -> Updates:
    decay = named_decay(content.path)
    return Updates({} if decay is None else {"decay": decay})


def named_decay(path: Path) -> float | None:
    """Return the decay in the name of guided-diffusion's `ema_0.9999_000050.pt`, next to
    `model000050.pt`."""
    match = re.match(r"ema_(0\.\d+)_", path.name)
    return float(match[1]) if match else None


# --- checkpoints that were written while the average was swapped in


def _with_collected(sets: Sets, found: Found, pair: Pair) -> Found:
    """Return an average of torch-ema with the raw weights that it has set aside, if it has.

    It keeps them in `collected_params` while the model has the average, and after that: they count
    if the model and the average are equal.
    """
    outer = pair.average_key.rpartition(".")[0]
    collected = sets.below(f"{outer}.collected_params".lstrip("."))
    if not collected or len(collected) != len(pair.averaged):
        return found
    if not np.array_equal(*found.starts):
        return found
    raw = dict(pair.weights)
    for name, tensor in pair.averaged.items():
        raw[name] = collected[tensor.keys[-1]]
    return replace(found, weights=raw)


def _raw_buffers(sets: Sets, settings: ImportSettings) -> Found | None:
    """Return the two sets of mmcv's hook: buffers `ema_backbone_conv_weight` beside the weights.

    It swaps the two before a checkpoint is written, but for one written in between.
    """
    if len(sets.models) != 1:
        return None
    (path,) = sets.models
    named = sets.below(path)
    buffers = {}
    model = {}
    for name, tensor in named.items():
        if re.fullmatch(r"ema_\w+", name):
            buffers[name.removeprefix("ema_")] = tensor
        else:
            model[name] = tensor
    matched = match_names(buffers, model)
    if not matched or 2 * len(matched) < len(model):
        return None
    averaged = {name: model[name] for name in matched}
    found = Found(sets.content, "mmcv", averaged, {**model, **matched}, Updates())
    text = settings.average or settings.weights
    if text is None:
        return replace(found, undecided=(path or "the model", "ema_*"))
    if text.startswith("ema_") == (text == settings.average):
        return found.swapped()
    return found


# --- ordinary EMAs under fixed keys


@dataclass(frozen=True)
class Fixed:
    """A program that stores an average and the weights under fixed keys, with a number of
    updates."""

    kind: str
    average: str
    weights: str
    count: str


FIXED = (
    Fixed("lightning-ema", "state_dict", "current_model_state", "averaging_state.n_averaged"),
    # Its hook swaps the two before a checkpoint is written.
    Fixed("mmengine", "state_dict", "ema_state_dict.module", "ema_state_dict.steps"),
)


def _find_fixed(sets: Sets, _: ImportSettings) -> Found | None:
    content = sets.content
    for fixed in FIXED:
        count = _count(content.values.get(fixed.count))
        averaged = content.under(fixed.average)
        weights = content.under(fixed.weights)
        if averaged and weights and count:
            updates = Updates({"copies": 1}, count, calls="from first")
            return Found(content, fixed.kind, averaged, weights, updates)
    return None


_TITAN_EMA = re.compile(r"(?:ema_optimizer\.)*state\.(.+)\.ema_params")


def _torchtitan(sets: Sets, _: ImportSettings) -> Found | None:
    """The update at `start_step` + n `update_every` keeps 2**(-1 / (0.05 n)), or another
    `half_life_fraction`."""
    tensors = sets.content.tensors.items()
    averaged = {
        match[1]: tensor for name, tensor in tensors if (match := _TITAN_EMA.fullmatch(name))
    }
    if not averaged:
        return None
    rule = {"decay": UNLIMITED, "warm_up": "ramp-up", "power": RAMP_UP}
    updates = Updates(rule, calls="after copy")
    return Found(sets.content, "torchtitan", averaged, sets.model(), updates)


# --- files whose names say what they are


_IN_NAMES = "the names of files"
_EDM_FILE = re.compile(r"network-snapshot-(?P<step>\d{1,20})\.pkl")
_EDM_OPTIONS = "training_options.json"


def _edm(sets: Sets, settings: ImportSettings) -> Found | None:
    """The files of EDM and StyleGAN: the weights of EDM are in `training-state-*.pt` next to the
    pickle.

    Both count images, with the half-life min(its largest, 0.05 of the images so far), so that the
    k-th update of a batch keeps 2**(-1 / (0.05 (k - 1))), and the first one copies.
    """
    path = sets.content.path
    match = _EDM_FILE.fullmatch(path.name)
    averaged = sets.content.under("ema") or sets.content.under("G_ema")
    if not (match and averaged):
        return None
    options = {}
    file = path.with_name(_EDM_OPTIONS)
    if file.is_file():
        text = read_small_file(file, 10_000_000)
        options = parse_object(file, text, "options of a training")
    batch = int(_option(options, "batch_size"))
    every = settings.update_every or batch or 1
    # names count thousands, rounded down
    step = -(-1000 * int(match["step"]) // every) * every
    asks = {}
    if not batch:
        reason = f"neither {path.name} nor {_EDM_OPTIONS} in its folder says it"
        asks["update_every"] = f", the images of a batch: {reason}"
    if settings.ema_decay is not None and not options:
        reason = f"without {_EDM_OPTIONS} {path.name} does not say it"
        asks["ema_warmup"] = f", ramp-up or none: {reason}"
    return Found(
        sets.content,
        "edm",
        averaged,
        _edm_weights(sets.content, path.with_name(f"training-state-{match['step']}.pt")),
        Updates(_edm_rule(options, batch), every=batch),
        reading=Reading(step, "images", _IN_NAMES),
        asks=asks,
    )


def _edm_weights(content: Content, state: Path) -> Tensors:
    """Return the weights, in the state of a training if there is one; it is then one of the
    files."""
    if state.is_file():
        of_state = open_checkpoint(state)
        content.files.update(of_state.files)
        content = of_state
    return content.under("net") or content.under("G")


def _edm_rule(options: Values, batch: int) -> Values:
    rule: Values = {"copies": 1}
    ramps = ("ema_rampup_ratio", "ema_rampup")  # null for none
    if any(name in options and options[name] is None for name in ramps):
        rule["warm_up"] = ""
    elif options:
        share = _option(options, *ramps, default=RAMP_UP)
        rule |= {"warm_up": "ramp-up", "power": float(share)}
    thousands = _option(options, "ema_halflife_kimg", "ema_kimg")
    if batch and thousands:
        rule["decay"] = 0.5 ** (batch / (1000 * thousands))
    return rule


def _option(
    options: Values,
    *names: str,
    default: float = 0,
) -> Any:
    for name in names:
        if isinstance(options.get(name), int | float):
            return options[name]
    return default


_NUMBERED = re.compile(r"(?P<number>\d{1,20})[._](?P<step>\d{1,20})\.(?:pt|safetensors)")


def _numbered(sets: Sets, settings: ImportSettings) -> Found | None:
    """Averages of ema-pytorch and pytorch-posthoc-ema by number, whose settings are not in their
    files."""
    content = sets.content
    name = content.path.name
    match = _NUMBERED.fullmatch(name)
    if not match or "initted" not in content.tensors:
        return None
    inner = content.under("ema_model")
    library = "ema-pytorch" if inner else "posthoc-ema"
    first = 1 if inner else max(settings.update_after_step or 0, 1)
    number = int(match["number"])
    width = 0.0
    gamma = 0.0
    if number < len(settings.sigma_rels):
        width = settings.sigma_rels[number]
        gamma = gamma_from_sigma_rel(width)
    every = settings.update_every or 1
    profile = partial(ema_pytorch_profile, gamma, every=every, first=first)
    tensors = inner or sets.model(settings.prefix)
    unsaid = f" to an import: files of {library}, such as {name}, do not hold it"
    asks = {"sigma_rels": unsaid, "update_every": unsaid}
    if not inner:
        asks["update_after_step"] = f"{unsaid}; the default of the library is 100"
    counters = ("initted", "step")
    averaged = {name: tensor for name, tensor in tensors.items() if name not in counters}
    return Found(
        content,
        library,
        averaged,
        profile=profile,
        sigma_rel=width,
        reading=Reading(int(match["step"]), "steps", _IN_NAMES),
        asks=asks,
    )


_EDM2 = re.compile(
    r"(?:network-snapshot|edm2(?:-[a-z0-9]+)+)-(?P<step>\d{1,20})-(?P<width>\d*\.\d+)\.pkl"
)


def _edm2(sets: Sets, settings: ImportSettings) -> Found | None:
    """Power functions of EDM2, with images and width in the name."""
    match = _EDM2.fullmatch(sets.content.path.name)
    if not match:
        return None
    width = float(match["width"])
    profile = partial(PowerFunction.from_sigma_rel, width)
    tensors = sets.content.under("ema") or sets.model(settings.prefix)
    return Found(
        sets.content,
        "edm2",
        tensors,
        profile=profile,
        sigma_rel=width,
        reading=Reading(1000 * int(match["step"]), "images", _IN_NAMES),
    )


FINDERS: tuple[Finder, ...] = (
    _edm2, _numbered, _torchtitan, _find_fixed, _edm, _raw_buffers,
)  # fmt: skip
"""What finds averages by more than a key, in the order in which a file is tried."""

_OF_TIME = ("step_from", "steps_per_epoch", "first_epoch")
TAKES: dict[str, tuple[str, ...]] = {
    "edm2": (),
    "ema-pytorch": ("sigma_rels", "update_every"),
    "posthoc-ema": ("sigma_rels", "update_every", "update_after_step"),
    "checkpoints": (*_OF_TIME, "weights"),
}
"""The settings that a kind takes besides the selection of tensors; others take all."""


def check_settings(kinds: set[str], settings: ImportSettings) -> None:
    """Raise InvalidValueError about a given setting that does not apply to these kinds."""
    if not kinds <= TAKES.keys():
        return
    known = {"kind", "prefix", "include", "exclude"}
    for kind in kinds:
        known.update(TAKES[kind])
    for name in settings.given:
        if name not in known:
            taken = " and ".join(sorted(kinds))
            reason = f"does not apply to files that are taken for {taken}"
            hint = "of averages give `kind` ema; one within the files is named by `average`"
            raise InvalidValueError(name, reason, hint)


def check_given(found: Found, settings: ImportSettings) -> None:
    """Raise InvalidValueError for a setting that a file lacks, or that contradicts it.

    With a decay a warm-up replaces what the file says, if weights beside the average can show that.
    """
    name = found.path.name
    of_file = found.updates.rule.get("warm_up") if found.updates else None
    is_replaced = settings.ema_decay and found.weights
    if of_file and settings.ema_warmup and not is_replaced:
        given = warm_up_of(settings.ema_warmup) or {}
        if given.get("warm_up") != of_file:
            reason = f"contradicts {name}: averages of {found.kind} rise by {of_file}"
            hint = "if that is wrong, give `ema_decay`, too" if found.weights else ""
            raise InvalidValueError("ema_warmup", reason, hint, value=settings.ema_warmup)
    for setting, why in found.asks.items():
        if getattr(settings, setting) in (None, ()):
            raise InvalidValueError(setting, f"must be given{why}", "it is a setting of imports")
    if found.updates is not None and len(settings.sigma_rels) > 1:
        raise InvalidValueError("sigma_rels", f"must be one, of the average in {name}")
    if settings.sigma_rels and found.profile is not None and not found.sigma_rel:
        reason = f"must be one for each average, also for that in {name}"
        raise InvalidValueError("sigma_rels", reason)


def within(found: Found, settings: ImportSettings) -> tuple[Tensors, Tensors]:
    """Return the tensors of the average and of the weights by their names without the prefix that
    settings give; each may be empty."""
    averaged = found.tensors if found.averaged else {}
    prefix = settings.prefix
    if f".{found.weights_key}.".endswith(f".{prefix}"):  # the set lies there
        prefix = ""
    chosen = []
    for tensors in (averaged, found.weights):
        named = stripped(tensors, prefix)
        if tensors and not named:
            reason = f"no tensor's name begins with {shown(prefix)}; it has {names_in([*tensors])}"
            raise UnsuitableError(found.path, reason)
        chosen.append(named)
    return chosen[0], chosen[1]
