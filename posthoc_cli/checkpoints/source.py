"""A checkpoint as a source of averages: what its file says, and what `ema import` may be told of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from posthoc_cli.checkpoints import KINDS
from posthoc_cli.checkpoints.read_model import FoundChunk, Tensors, tensor_shape
from posthoc_cli.checkpoints.read_step import read_number
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError, InvalidValueError, brief, check_count, check_word, shown
from posthoc_cli.profiles import (
    Clock,
    Point,
    PowerFunction,
    RecordedPowerFunction,
    StoredProfile,
    check_sigma_rel,
    gamma_from_sigma_rel,
)
from posthoc_cli.profiles.other_libraries import POWER, RAMP_UP, WARM_UPS, Decay, OrdinaryEMA
from posthoc_cli.reconstruction import Steps, StoredAverage
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.format import TensorEntry
from posthoc_cli.snapshots.reading import BackingFile
from posthoc_cli.snapshots.selection import check_globs, make_selection
from posthoc_cli.snapshots.sources import FileSource

_NO_WEIGHTS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of the names of BatchNorm's statistics, which are copied: a variance must not be extrapolated."""


@dataclass(frozen=True)
class Settings:
    """What checkpoints do not say themselves, and which of their tensors to take.

    Attributes:
        kind: one of `checkpoints.KINDS`; None to find that of each file.
        step_from: a regular expression whose group is the step, searched in a path; it may be 1_500 or 1.5k, too.
        prefix: what names of the model's tensors begin with; it is left out of the names.
        include, exclude: globs on the names that remain.
        sigma_rels: widths of the averages of `ema-pytorch` or `posthoc-ema`, in the order of their numbers.
        update_every, update_after_step: settings of these libraries; torchtitan's `update_every_n_steps`, `start_step`.
        ema_decay: of ordinary EMAs, in (0, 1), or "half-life:500000" in steps or images; `update_every` is theirs, too.
        ema_warmup: "ratio" of (1 + n) / (10 + n), "power" of 1 - (1 + n)**(-2/3), "power:0.75" of another power, or
            "ramp-up" of a half-life that is 0.05 of the training so far, "ramp-up:0.1" of another share.
        ema_restarts: steps at which an ordinary EMA began again from the weights.
        ema_uncertainty: of the time constant, relative, where the decay was found.
        ema_late: steps by which each of `ema_restarts` may be later, where they were found.
        steps_per_epoch: where files know only the epoch.
    """

    kind: str | None = None
    step_from: str | None = None
    prefix: str = ""
    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None
    sigma_rels: Sequence[float] = ()
    update_every: int | None = None
    update_after_step: int | None = None
    ema_decay: float | str | None = None
    ema_warmup: str | None = None
    ema_restarts: Sequence[int] = ()
    ema_uncertainty: float | None = None
    ema_late: int | None = None
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.kind is not None:
            check_word("kind", self.kind, KINDS)
        for name in ("sigma_rels", "ema_restarts"):
            if isinstance(given := getattr(self, name), Iterable):
                vars(self)[name] = tuple(given)
        restarts = self.ema_restarts
        are_steps = isinstance(restarts, tuple) and all(type(step) is int and step > 0 for step in restarts)
        for name, is_right, wanted in (
            ("sigma_rels", isinstance(self.sigma_rels, tuple), "a list of widths"),
            ("ema_restarts", are_steps, "steps, above 0"),
            ("prefix", isinstance(self.prefix, str), "a text"),
        ):
            if not is_right:
                raise InvalidValueError(name, f"must be {wanted}", value=brief(getattr(self, name)))
        for sigma_rel in self.sigma_rels:
            check_sigma_rel(sigma_rel)
        for name, least in (("update_every", 1), ("update_after_step", 0), ("steps_per_epoch", 1), ("ema_late", 0)):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, least)
        Decay(**{"decay": 0.5, **self.rule()})
        groups = 0
        with suppress(re.error, TypeError):
            groups = 1 if self.step_from is None else re.compile(self.step_from).groups
        if groups != 1:
            reason = r"must be a regular expression with one group, for the step, such as 'step(\d+)'"
            raise InvalidValueError("step_from", reason, value=self.step_from or "")
        selection = make_selection(self.include, self.exclude, "copy")
        plain = {"include": selection.include, "exclude": selection.exclude}
        vars(self).update(plain)

    def rule(self, every: float = 1.0) -> dict[str, Any]:
        """What is given of the decays of an ordinary EMA that is updated so often, as arguments of `Decay`."""
        rule: dict[str, Any] = {}
        if isinstance(self.ema_decay, str):
            half_life = read_number(self.ema_decay.removeprefix("half-life:")) or 0.0
            if half_life <= 0:
                reason = "must lie in (0, 1), or be a half-life such as half-life:500000"
                raise InvalidValueError("ema_decay", reason, value=repr(self.ema_decay))
            rule["decay"] = 0.5 ** (every / half_life)
        elif self.ema_decay is not None:
            rule["decay"] = self.ema_decay
        if self.ema_uncertainty is not None:
            rule["uncertainty"] = self.ema_uncertainty
        if self.ema_warmup is not None:
            kind, colon, text = str(self.ema_warmup).partition(":")
            usual = {"power": POWER, "ramp-up": RAMP_UP}.get(kind)
            number = read_number(text) if colon else usual
            if kind not in WARM_UPS or (kind == "ratio") is (number is not None) or number == 0:
                reason = f"must be one of {', '.join(WARM_UPS)}, or as power:0.75, ramp-up:0.1"
                raise InvalidValueError("ema_warmup", reason, value=repr(self.ema_warmup))
            rule |= {"warm_up": kind} | ({} if number is None else {"power": float(number)})
        return rule

    @property
    def given(self) -> dict[str, Any]:
        """Those that differ from their defaults, as plain values for JSON."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {name: value for name, value in values.items() if value not in (None, "", [])}

    @property
    def said(self) -> Settings:
        """The same without a decay that was found, and what was found with it: more files show another one."""
        if self.ema_uncertainty is None:
            return self
        return replace(self, ema_decay=None, ema_warmup=None, ema_restarts=(), ema_uncertainty=None, ema_late=None)

    def chosen(self, found: Tensors, but: Collection[str] = ()) -> Tensors:
        """The tensors that `include` and `exclude` leave, without those named in `but`."""
        selection = make_selection(self.include, self.exclude, "copy")
        check_globs(selection, found)
        chosen = {name: find for name, find in found.items() if selection.names(name) and name not in but}
        if not chosen:
            raise InvalidValueError("include and exclude", "leave no tensor of the model")
        return chosen


UNSPECIFIED = Settings()


# --- checkpoints


@dataclass(frozen=True)
class CheckpointInfo(fmt.SourceInfo):
    """What is known of a checkpoint beside its tensors: see `format.SourceInfo`.

    Attributes:
        profile: what its tensors are of: the weights at one time (`Point`), or an average.
        step: of the training; `t` is that of the profile.
        t_unit: what `t` counts.
        tensors: role and dtype of each.
        aliases: further names of tensors.
        sigma_rel: of the power function that an average was asked for; 0 for others.
        decay: that of an ordinary EMA, without its warm-up; 0 for others, and where it is unknown.
        run_id: made of names, shapes and content; empty until checkpoints were compared with each other.
        left_out: names of the model's state that are not used.
    """

    profile: StoredProfile
    step: int
    t_unit: str
    tensors: dict[str, fmt.TrackedTensor]
    aliases: dict[str, str]
    sigma_rel: float = 0.0
    decay: float = 0.0
    run_id: str = ""
    left_out: tuple[str, ...] = ()
    measurements: None = None
    sketch: str = ""

    @property
    def t(self) -> float:  # type: ignore[override]  # in a frozen class no field can be assigned either
        """Its time."""
        return self.profile.t

    @property
    def t_first(self) -> float:  # type: ignore[override]
        """The earliest time that has mass in averages of a run with this profile, on a clock of steps or images."""
        return float(getattr(self.profile, "t_first", min(1.0, self.t)))

    @property
    def gamma(self) -> float:
        """The exponent of `sigma_rel`; 0 without."""
        return gamma_from_sigma_rel(self.sigma_rel) if self.sigma_rel else 0.0

    @property
    def clock_pairs(self) -> tuple[tuple[int, float], ...]:
        """Its step and time."""
        return ((self.step, self.t),)

    def average(self, profile: StoredProfile | None = None) -> StoredAverage:
        """What reconstruction uses of it, with another profile if one is given; as if updated at every step."""
        own: Any = profile or self.profile
        if isinstance(own, PowerFunction):
            own = RecordedPowerFunction(own.gamma, own.t, self.t_first, 1.0)
        eps = EPS["F64" if {self.tensors[name].dtype for name in self.averages} == {"F64"} else "F32"]
        return StoredAverage(own, self.step, eps, None, self.t / self.step, Steps(Clock([self.step], [self.t]), 1))

    @property
    def holds(self) -> str:
        """What its tensors are of, for people."""
        if isinstance(self.profile, Point):
            return "weights"
        if self.decay:
            return f"EMA of decay {self.decay:.12g}"
        tracked = f" tracked as sigma_rel {self.sigma_rel:g}," * bool(self.sigma_rel)
        is_power = isinstance(self.profile, PowerFunction)
        return f"average of sigma_rel {self.sigma_rel:g}" if is_power else f"average{tracked} of its own profile"


@dataclass(frozen=True)
class Updates:
    """How an ordinary EMA was updated, as far as its file says.

    Attributes:
        rule: arguments of `profiles.other_libraries.Decay`; without "decay" where that is not there.
        count: how many were made; None if that is not there.
        every: calls between updates, as the library does it by default; images of a batch, 0 where that is not there.
        from_first: whether the first call is an update, and not the one of number `every`.
    """

    rule: dict[str, Any] = field(default_factory=dict)
    count: int | None = None
    every: int = 1
    from_first: bool = False

    def profile(self, path: Path, step: int, settings: Settings, default: float) -> OrdinaryEMA | None:
        """The profile at a step, of the `default` decay where none is known; None without."""
        every, later, count = settings.update_every or self.every, settings.update_after_step or 0, self.count
        rule = {"decay": default} | self.rule | settings.rule(every)
        if not rule["decay"]:
            return None
        if began := max((begin for begin in settings.ema_restarts if begin < step), default=0):
            rule |= {"copies": 0, "late": settings.ema_late or 0}
            first, count = began + every, (step - began) // every
        elif count is None:
            first = later + 1 if self.from_first else (later // every + 1) * every
            count = max(0, (step - first) // every + 1)
        elif count > step:
            raise FileFormatError(path, f"has counted {count:,} updates of its EMA, and is of step {step:,}")
        elif self.every > 1:  # calls are counted, of which the first is an update
            if settings.update_after_step is not None:
                rule["copies"] = later + 1
            rule["stride"], first, count = every, step - count + 1, (count - 1) // every + 1
        else:
            if settings.update_every is None and count:
                every = max(1, step // count)
                every = every if -(-step // every) - count in (0, 1) else 1
            last = (step - 1) // every * every + 1 if self.from_first else step // every * every
            first = last - (count - 1) * every
            if count and first < 1:
                reason = f"cannot be: {path.name} has counted {count:,} updates by step {step:,}"
                raise InvalidValueError("update_every", reason, value=every)
        return Decay(**rule).profile(step, count, every, first)


@dataclass(frozen=True)
class Checkpoint(FileSource):
    """The tensors of a checkpoint, or of an average that another program stored, and what is known about them.

    Its `header` says what is where, as if all were in one file.

    Attributes:
        kind: one of `formats.TABLE`; empty of a copy that an import made.
        label: its name, where that of its file or folder is not enough.
        updates: of an ordinary EMA that is no copy.
    """

    info: CheckpointInfo
    kind: str = ""
    label: str = ""
    updates: Updates | None = None

    @property
    def name(self) -> str:
        """The name of the file or folder; of several of one name with folders above it; of two in one with a word."""
        return self.label or self.path.name

    @property
    def profile(self) -> StoredProfile:
        """What its tensors are of."""
        return self.info.profile

    def told(self, settings: Settings, default: float = 0.0) -> Checkpoint:
        """The same; an ordinary EMA with the profile that its file and the settings say.

        Where neither says the decay it stays 0, and the profile is that of the `default`; without one unchanged.
        """
        profile = self.updates and self.updates.profile(self.path, self.info.step, settings, default)
        if not (self.updates and profile):
            return self
        is_known = settings.ema_decay is not None or "decay" in self.updates.rule
        decay = profile.settings["decay"] if is_known else 0.0
        return replace(self, info=replace(self.info, profile=profile, decay=decay))

    @property
    def identity(self) -> str:
        """16 hexadecimal digits of the content of its files."""
        if self.header.metadata:
            return super().identity
        identities = {part.path: part.identity for part in self.parts}
        return xxhash.xxh3_64_hexdigest("".join(identities[file] for file in sorted(identities)).encode())


def make_checkpoint(
    path: Path,
    found: Tensors,
    profile: StoredProfile,
    step: int,
    kind: str = "checkpoints",
    t_unit: str = "steps",
    sigma_rel: float = 0.0,
    updates: Updates | None = None,
) -> Checkpoint:
    """A checkpoint of these tensors; of a power function, or what was meant as one, with its `sigma_rel`.

    Raises:
        FileFormatError: a tensor has no name that a model's could have, or a dtype that is not read.
    """
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    layers: dict[tuple[Path, int], dict[str, FoundChunk]] = {}
    known: dict[tuple[Path, TensorEntry], str] = {}
    for name, find in found.items():
        if name in ("", "__metadata__") or "\0" in name or name.encode("utf-8", "replace").decode() != name:
            raise FileFormatError(path, f"tensor {shown(name)}: a model's tensor cannot have this name")
        chunks = find()
        place = chunks[0].path, chunks[0].tensor
        if len(chunks) == 1 and place[1].nbytes and (other := known.setdefault(place, name)) != name:
            aliases[name] = other  # tied: both are the same bytes
            continue
        dtypes = {chunk.tensor.dtype for chunk in chunks}
        if len(dtypes) > 1:
            raise FileFormatError(path, f"tensor {shown(name)}: its chunks are of several dtypes")
        spec = fmt.TensorSpec(name, dtypes.pop(), tensor_shape(chunks))
        entries[name] = TensorEntry(spec.dtype, spec.shape, 0, spec.nbytes)
        counts: Counter[Path] = Counter()
        for chunk in chunks:
            layers.setdefault((chunk.path, counts[chunk.path]), {})[name] = chunk
            counts[chunk.path] += 1
    parts = tuple(
        BackingFile(
            file,
            fmt.FileHeader.of_foreign({name: chunk.tensor for name, chunk in held.items()}),
            {name: chunk.box for name, chunk in held.items()},
            next(iter(held.values())).identity,
        )
        for (file, _), held in layers.items()
    )
    stored = parts[0].header.tensors if len(parts) == 1 and len(parts[0].header.tensors) == len(entries) else entries
    tensors = {name: _tracked(name, entry.dtype) for name, entry in entries.items()}
    info = CheckpointInfo(profile, step, t_unit, tensors, aliases, sigma_rel)
    return Checkpoint(path, fmt.FileHeader.of_foreign(stored), info, parts, kind, "", updates)


def _tracked(name: str, dtype: str) -> fmt.TrackedTensor:
    """How a synthesis treats a tensor: floating-point numbers are averaged, others copied."""
    is_weight = dtype in EPS and name.rpartition(".")[2] not in _NO_WEIGHTS
    return fmt.TrackedTensor("average" if is_weight else "copy", dtype)
