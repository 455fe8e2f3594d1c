"""A checkpoint as a source of averages, and the settings that an import adds to what its file
says."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash

from posthoc_cli.checkpoints import KINDS
from posthoc_cli.checkpoints.index import FoundChunk, Tensors, tensor_shape
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError, InvalidValueError, brief, check_alone, shown
from posthoc_cli.profiles import (
    POWER,
    POWER_FUNCTION,
    RAMP_UP,
    UNLIMITED,
    WARM_UPS,
    Clock,
    DecayRule,
    OrdinaryEMA,
    Point,
    PowerFunction,
    StoredProfile,
    check_sigma_rel,
    gamma_from_sigma_rel,
    sigma_rel_from_gamma,
)
from posthoc_cli.reconstruction import Steps, StoredAverage
from posthoc_cli.snapshots.snapshot import Count, check_globs, converted, kinds_of, make_selection
from posthoc_cli.snapshots.sources import Rule, Source, TrackedTensor
from posthoc_cli.snapshots.tensorfile import Box, Entry, TensorFile

# of BatchNorm: a variance is not extrapolated
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_ANY_DECAY = 0.999  # in place of an unknown decay


# --- settings

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_NUMBER = re.compile(
    r"((?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:_[0-9]{3})+)|[0-9]+)(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)([kmb]?)",
    re.I,
)


def read_number(text: str) -> float | None:
    """Return the number in a text such as 1500, 1,500, 1_500, 1.5k or 1.5e3, an int if possible;
    else None."""
    match = _NUMBER.fullmatch(text)
    if match is None or sum(map(str.isdigit, text)) > 19:
        return None
    value = Decimal(re.sub("[,_]", "", match[1])) * _UNITS[match[2].lower()]
    return int(value) if value == value.to_integral_value() else float(value)


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error:
        return 0


def _half_life(value: Any) -> float:
    """Return the number in "half-life:500000" or "half-life:5%"; 0 if the value is another one."""
    return (
        read_number(value.removeprefix("half-life:").removesuffix("%"))
        if isinstance(value, str)
        else None
    ) or 0.0


def _warm_up(text: str) -> dict[str, Any] | None:
    """Return the arguments of `DecayRule` for "none", "ratio" or "power:0.75"; None if the text is
    another one."""
    kind, colon, number = text.partition(":")
    usual = {"power": POWER, "ramp-up": RAMP_UP}.get(kind)
    power = read_number(number) if colon else usual
    if kind not in (*WARM_UPS, "none") or (usual is None) is not (power is None) or power == 0:
        return None
    return {"warm_up": "" if kind == "none" else kind} | ({"power": float(power)} if power else {})


_Kind = Annotated[str, Rule(f"one of {', '.join(KINDS)}", lambda kind: kind in KINDS)]
_Pattern = Annotated[
    str,
    Rule(
        r"a regular expression with one group, for the step, such as 'step(\d+)'",
        lambda text: _groups(text) == 1,
    ),
]
_Restarts = Annotated[tuple[int, ...], Rule("steps, above 0", lambda steps: 0 not in steps)]
_Decay = Annotated[
    Any,
    Rule(
        "in (0, 1), or a half-life such as half-life:500000 or half-life:5%",
        lambda value: _half_life(value) > 0 or (isinstance(value, int | float) and 0 < value < 1),
    ),
]
_WarmUp = Annotated[
    str,
    Rule(
        f"one of none, {', '.join(WARM_UPS)}, or as power:0.75, ramp-up:0.1",
        lambda text: _warm_up(text) is not None,
    ),
]


@dataclass(frozen=True)
class ImportSettings:
    """What checkpoints do not say themselves, and which of their tensors to take; see the guide
    `checkpoints`."""

    kind: _Kind | None = None  # None to recognise the kind of each file
    step_from: _Pattern | None = (
        None  # what to search in a path; its group is the step, also as 1_500 or 1.5k
    )
    prefix: str = ""  # of the names of the model's tensors; it is removed
    include: tuple[str, ...] = ()  # globs on the names without the prefix
    exclude: tuple[str, ...] = ()
    # Widths of power functions: of averages in the order of the numbers in their names, or of the
    # one in each file.
    sigma_rels: tuple[float, ...] = ()
    update_every: Count | None = None  # interval of the updates of an average
    update_after_step: int | None = None  # the step after which they began
    ema_decay: _Decay | None = (
        None  # of ordinary EMAs, in (0, 1), or "half-life:500000" in steps or images, or in %
    )
    ema_warmup: _WarmUp | None = (
        None  # one of `WARM_UPS`, or with its number, as "power:0.75"; "none" for none
    )
    ema_restarts: _Restarts = ()  # steps at which an ordinary EMA restarted from the weights
    ema_uncertainty: float | None = (
        None  # relative, of the time constant, if an import found the decay
    )
    ema_late: int | None = (
        None  # number of steps by which a start may have been later, if an import found it
    )
    steps_per_epoch: Count | None = None  # for files that hold only the epoch
    average: str | None = None  # key or prefix of the average's tensors in a file, such as "ema"
    weights: str | None = None  # and of the weights'

    def __post_init__(self) -> None:
        globs = make_selection(self.include, self.exclude, "copy")
        vars(self).update(include=globs.include, exclude=globs.exclude)
        for name, kind in kinds_of(ImportSettings).items():
            value = getattr(self, name)
            try:
                vars(self)[name] = converted(
                    tuple(value) if isinstance(value, list | np.ndarray) else value, kind
                )
            except ValueError as error:
                raise InvalidValueError(
                    name, str(error).partition(", not ")[0], value=brief(value)
                ) from None
        for sigma_rel in self.sigma_rels:
            check_sigma_rel(sigma_rel, "sigma_rels")
        check_alone(sigma_rels=self.sigma_rels or None, ema_decay=self.ema_decay)

    def rule(self, every: float = 1.0) -> dict[str, Any]:
        """Return the given arguments of `DecayRule` for an ordinary EMA that is updated at this
        interval."""
        rule: dict[str, Any] = {}
        if half_life := _half_life(self.ema_decay):
            rule["decay"] = 0.5 ** (every / half_life)
            if str(self.ema_decay).endswith("%"):
                rule = {"decay": UNLIMITED, "warm_up": "ramp-up", "power": half_life / 100}
        elif self.ema_decay is not None:
            rule["decay"] = self.ema_decay
        elif self.sigma_rels:
            power = gamma_from_sigma_rel(self.sigma_rels[0]) + 1
            rule = {"decay": UNLIMITED, "warm_up": POWER_FUNCTION, "power": power, "copies": 1}
        if self.ema_uncertainty is not None:
            rule["uncertainty"] = self.ema_uncertainty
        return rule | (_warm_up(self.ema_warmup or "") or {})

    @property
    def given(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as plain values for JSON."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }
        return {name: value for name, value in values.items() if value not in (None, "", [])}

    @property
    def without_findings(self) -> ImportSettings:
        """The settings without a decay and starts that an import found: with more files it finds
        others."""
        names: tuple[str, ...] = (
            () if self.ema_late is None else ("update_after_step", "ema_restarts", "ema_late")
        )
        if self.ema_uncertainty is not None:
            names += ("ema_decay", "ema_warmup", "sigma_rels", "ema_uncertainty")
        return replace(self, **{name: getattr(UNSPECIFIED, name) for name in names})

    def select(self, tensors: Tensors) -> Tensors:
        selection = make_selection(self.include, self.exclude, "copy")
        check_globs(selection, tensors)
        if selected := {name: find for name, find in tensors.items() if selection.names(name)}:
            return selected
        raise InvalidValueError("include and exclude", "leave no tensor of the model")


UNSPECIFIED = ImportSettings()


# --- checkpoints


@dataclass(frozen=True)
class Updates:
    """How an ordinary EMA was updated, as far as its file says."""

    # arguments of `DecayRule`; without "decay" if it is unknown
    rule: dict[str, Any] = field(default_factory=dict)
    count: int | None = None  # number of updates; None if it is unknown
    every: int = 1  # calls between updates; for EDM images of a batch, 0 if they are unknown
    from_first: bool = False  # whether the first call is an update, and not call number `every`
    counts_calls: bool = (
        False  # whether `count` is of calls, whatever their number between two updates
    )
    # whether a first update after the begin is at the step that settings name, and copies
    at_start: bool = False

    def profile(self, path: Path, step: int, settings: ImportSettings) -> OrdinaryEMA:
        """Return the profile at a step, that of `_ANY_DECAY` if none is known."""
        every, after, count = (
            settings.update_every or self.every,
            settings.update_after_step or 0,
            self.count,
        )
        said = settings.rule(every)
        # another kind of rule
        of_file = {} if "decay" in said and self.rule.get("decay") == UNLIMITED else self.rule
        rule = {"decay": _ANY_DECAY} | of_file | said
        if restart := max(
            (restart for restart in settings.ema_restarts if restart < step), default=0
        ):
            rule |= {"copies": 0, "late": settings.ema_late or 0}
            first, count = restart + every, (step - restart) // every
        elif count is None:
            first = after + 1 if self.from_first else (after // every + 1) * every
            if after and self.at_start:
                first, rule["copies"] = after, 1
            first = min(first, step + every)  # of no updates until then: a copy of the weights
            count = (step - first) // every + 1
            rule |= {"late": settings.ema_late or 0} if after else {}
        elif self.counts_calls:
            rule["copies"] = 1 + after
            rule["stride"], first, count = every, step - count + 1, (count - 1) // every + 1
        else:
            last = (step - 1) // every * every + 1 if self.from_first else step // every * every
            first = last - (count - 1) * every
            if settings.update_every is None and count and not 0 <= step - count <= 1:
                first = 0  # 50 updates at step 100 may be one in two steps, or all since the 51st
        if first < 1:
            counted = f"{path.name} has counted {self.count:,} updates of its EMA by step {step:,}"
            raise InvalidValueError(
                "update_every", f"must be given, and fit: {counted}", "1 if the EMA began late"
            )
        return DecayRule(**rule).profile(step, count, every, first)


@dataclass(frozen=True, repr=False)
class Checkpoint(Source):
    """A checkpoint, or an average that another program stored; see `Source` for what is not said
    here."""

    word, sketch, sample, measurements, left_out = "checkpoint", "", "", None, ()
    path: Path
    files: tuple[TensorFile, ...] = field(compare=False)
    entries: Mapping[str, Entry]
    profile: StoredProfile  # `Point` for weights, or that of an average; `t` is its time
    step: int
    tensors: dict[str, TrackedTensor]
    aliases: dict[str, str]
    t_unit: str = "steps"
    # the width that the user of another library asked for; 0 for weights and other averages
    sigma_rel: float = 0.0
    decay: float = (
        0.0  # of an ordinary EMA after its warm-up; 0 if it is unknown, and for other tensors
    )
    # hash of names, shapes and content; empty until checkpoints were compared with each other
    run_id: str = ""
    kind: str = "checkpoints"  # one of `layouts.TABLE`
    name: str = ""  # that of the file or folder, or more of its path if that is not distinct
    updates: Updates | None = None  # of an ordinary EMA; None for other tensors

    @property
    def t(self) -> float:  # type: ignore[override]  # in a frozen class no field can be assigned either
        return self.profile.t

    @property
    def t_first(self) -> float:  # type: ignore[override]
        """The earliest time that has mass in averages of a run with this profile, on a clock of
        steps or images."""
        return float(getattr(self.profile, "t_first", min(1.0, self.t)))

    @property
    def clock_pairs(self) -> tuple[tuple[int, float], ...]:
        return ((self.step, self.t),)

    def average(self, profile: StoredProfile | None = None) -> StoredAverage:
        """Return the input of a reconstruction, with its own or another profile, as if updated at
        every step."""
        used: Any = profile or self.profile
        eps = EPS[
            "F64" if {self.tensors[name].dtype for name in self.averages} == {"F64"} else "F32"
        ]
        steps = Steps(Clock([self.step], [self.t]), 1)
        return StoredAverage(used, self.step, eps, None, steps, t_first=self.t_first)

    @property
    def holds(self) -> str:
        """A phrase that says what its tensors are."""
        if isinstance(self.profile, Point):
            return "weights"
        if self.decay:
            return f"EMA of decay {self.decay:.12g}"
        known = "of" if isinstance(self.profile, PowerFunction) else "tracked as"
        return f"average {known} sigma_rel {self.sigma_rel:g}"

    @property
    def is_known(self) -> bool:
        """Whether its profile is known, and no placeholder for that of an ordinary EMA."""
        return self.updates is None or bool(self.decay or self.sigma_rel)

    @property
    def file_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.entries.values())

    def with_settings(self, settings: ImportSettings) -> Checkpoint:
        """Return the checkpoint, an ordinary EMA with the profile that its file and the settings
        determine, if any."""
        if self.updates is None:
            return self
        profile = self.updates.profile(self.path, self.step, settings)
        rule, decay, sigma_rel = profile.settings, 0.0, 0.0
        if settings.ema_decay is not None or settings.sigma_rels or "decay" in self.updates.rule:
            power = (
                rule["power"] if rule["warm_up"] == POWER_FUNCTION else math.log(2) / rule["power"]
            )
            if rule["decay"] == UNLIMITED and power > 1:
                sigma_rel = sigma_rel_from_gamma(power - 1)
            else:
                decay = rule["decay"]
        return replace(self, profile=profile, decay=decay, sigma_rel=sigma_rel)

    @property
    def identity(self) -> str:
        identities = {file.path: file.checksum for file in self.files}
        return xxhash.xxh3_64_hexdigest(
            "".join(identities[file] for file in sorted(identities)).encode()
        )


def make_checkpoint(
    path: Path, tensors: Tensors, profile: StoredProfile, step: int, **fields: Any
) -> Checkpoint:
    """Return a checkpoint of these tensors, with further fields of `Checkpoint`."""
    specs, aliases, known = dict[str, Entry](), dict[str, str](), dict[tuple[Path, Entry], str]()
    # of a file that has several chunks of a tensor
    layers: dict[tuple[Path, int], dict[str, FoundChunk]] = {}
    for name, find in tensors.items():
        chunks, problem = find(), ""
        first = chunks[0]
        if (
            name in ("", "__metadata__")
            or "\0" in name
            or name.encode("utf-8", "replace").decode() != name
        ):
            problem = "a model's tensor cannot have this name"
        elif any(chunk.tensor.dtype != first.tensor.dtype for chunk in chunks):
            problem = "its chunks are of several dtypes"
        if problem:
            raise FileFormatError(path, f"tensor {shown(name)}: {problem}")
        if (
            len(chunks) == 1
            and first.tensor.nbytes
            and known.setdefault((first.path, first.tensor), name) != name
        ):
            # tied weights: both names have the same bytes
            aliases[name] = known[first.path, first.tensor]
            continue
        specs[name] = Entry(first.tensor.dtype, tensor_shape(chunks))
        counts = Counter[Path]()
        for chunk in chunks:
            layers.setdefault((chunk.path, counts[chunk.path]), {})[name] = chunk
            counts[chunk.path] += 1
    held = []
    for (file, _), of_file in layers.items():
        identity, stamp = next(iter(of_file.values())).identity
        entries = {name: chunk.tensor for name, chunk in of_file.items()}
        boxes = {name: chunk.box for name, chunk in of_file.items()}
        if len(layers) == 1 and all(
            box == Box.full(specs[name].shape) for name, box in boxes.items()
        ):
            boxes = {}
        held.append(TensorFile(file, entries, stamp, boxes=boxes, checksum=identity))
    roles = {
        name: TrackedTensor(
            "copy" if spec.dtype not in EPS or _is_statistic(name, specs) else "average", spec.dtype
        )
        for name, spec in specs.items()
    }
    return Checkpoint(
        path, tuple(held), specs, profile, step, roles, aliases, name=path.name, **fields
    )


def _is_statistic(name: str, names: Collection[str]) -> bool:
    """Return whether a tensor is of BatchNorm, or one of spectral norm's two vectors; weight norm's
    is a weight."""
    stem = name[:-1]
    is_vector = name.endswith(("_u", "_v")) and f"{stem}u" in names and f"{stem}v" in names
    is_of_norm = f"{stem}orig" in names or ("parametrizations." in name and stem.endswith("._"))
    return name.rpartition(".")[2] in _STATISTICS or (is_vector and is_of_norm)
