"""The weights that a sweep measures: averages, and what they are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from posthoc_cli import files
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.errors import (
    CommandError,
    DirectoryError,
    InvalidValueError,
    MismatchError,
    quote,
)
from posthoc_cli.export.convert import export_file
from posthoc_cli.export.writing import write_averages
from posthoc_cli.profiles import Point
from posthoc_cli.request import OutputRequest, Request
from posthoc_cli.snapshots.snapshot import Snapshot, recorded_weights
from posthoc_cli.snapshots.source import Source
from posthoc_cli.snapshots.sources import Sources, use
from posthoc_cli.snapshots.tensorfile import read_file
from posthoc_cli.snapshots.weights_sample import are_equal, places
from posthoc_cli.sweep.trial import Spot
from posthoc_cli.synthesis.base import check_shape
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.synthesis.weights import make_weights
from posthoc_cli.targets import Mean, SigmaRel, Target

if TYPE_CHECKING:
    from torch import Generator, Tensor


LAST_WEIGHTS = "last weights"


class HeldSources:
    """The sources that averages of a sweep are made from: those that it began with, until one of
    them vanishes, and then those that remain."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def renew(self, sources: Sources) -> None:
        self.sources = sources


def hold_until(sources: Sources, t: float) -> Sources:
    """Return sources whose `again` raises a CommandError if what remains has no average at `t`."""

    def read() -> Sources:
        try:
            newer = sources.again()
        except DirectoryError:
            newer = None
        if newer is None or not newer.times[0] <= t <= newer.t:
            reason = f"the {sources.newest.word}s that averages at t = {t:,.12g} are made of were "
            hint = "its trials are kept; copy the files elsewhere, or let the training keep them"
            raise CommandError("the sweep", f"{reason}removed while it ran", hint)
        return hold_until(newer, t)

    return replace(sources, read=read)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights to measure.

    Attributes:
        title: their name in messages.
        text: what {sigma_rel} becomes in a command.
        sigma_rel: the length of an average; None for what averages are compared with.
        t: where an average ends that ends earlier than the others.
        base_share: of the weights that a fine-tuning started from.
        notes: what speaks against the weights, once they were made.
    """

    title: str
    text: str
    sigma_rel: float | None = None
    t: float | None = None
    base_share: float = 0.0
    notes: list[str] = field(default_factory=list, compare=False)

    def write(self, path: Path, like: Path | None) -> Plan | None:
        """Write the weights to a file, or to a copy of the checkpoint `like`; return their plan, if
        they are a target of a run."""
        raise NotImplementedError

    def make(self) -> tuple[Mapping[str, Tensor], Plan | None]:
        """Make the weights in memory, and return their plan, too, if they are a target of a run."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RunWeights(Candidate):
    """Weights that are a target of a run at a time."""

    held: HeldSources
    target: Target
    time: float
    base: str | Path | None = None  # None without a share of it

    def write(self, path: Path, like: Path | None, overwrite: bool = False) -> Plan:
        request = OutputRequest(self.target, path, like=like, overwrite=overwrite, **self._options)
        written = write_averages(
            lambda: self.held.sources, request, is_quiet=True, renew=self.held.renew
        )
        assert written is not None  # as of a process other than the first one
        return written.plan

    def make(self) -> tuple[Mapping[str, Tensor], Plan]:
        def average(sources: Sources) -> tuple[Mapping[str, Tensor], Plan]:
            plan = plan_synthesis(sources, Request(self.target, **self._options))
            return make_weights(plan), plan

        return use(self.held.sources, average, self.held.renew)

    @property
    def _options(self) -> dict[str, Any]:
        if self.base is None:
            return {"t": self.time}
        return {"t": self.time, "base": self.base, "base_share": self.base_share}


@dataclass(frozen=True, kw_only=True)
class RawFile(Candidate):
    """The last weights of a run that has none, in a checkpoint."""

    sources: Sources
    path: Path

    def write(self, path: Path, like: Path | None) -> Plan | None:
        with self._plain_file(path.parent) as plain:
            _move(plain, path, like)
        return None

    def make(self) -> tuple[Mapping[str, Tensor], Plan | None]:
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory() as folder, self._plain_file(Path(folder)) as plain:
            return load_file(plain), None

    @contextmanager
    def _plain_file(self, folder: Path) -> Iterator[Path]:
        """Write the weights as averages are written."""
        plain = folder / "raw.safetensors"
        try:
            export_file(self.path, plain, raw=True)
        except InvalidValueError:  # a file of nothing but weights
            export_file(self.path, plain)
        lacking = self.sources.tensors.keys() - read_file(plain).entries.keys()
        if lacking:
            reason = f"lacks tensor {quote(min(lacking))} of the averages"
            raise MismatchError(self.path, reason)
        self._note_other_step(plain)
        yield plain
        files.unlink_if_exists(plain)

    def _note_other_step(self, plain: Path) -> None:
        """Note if the weights differ from what the hook has recorded with the last snapshots."""
        snapshots = []
        for source in self.sources:
            if isinstance(source, Snapshot):
                snapshots.append(source)
        if not snapshots:
            return
        newest = snapshots[-1]
        recorded = recorded_weights(snapshots).get(newest.step)
        if recorded is None:
            return
        shapes = {name: newest.entries[name].shape for name in newest.averaged}
        values = []
        with safe_open(plain, "pt") as file:
            for name, elements in groupby(places(shapes), key=itemgetter(0)):
                tensor = file.get_tensor(name)
                check_shape(self.path, name, tuple(tensor.shape), shapes[name])
                flat = tensor.flatten().float()
                values += [float(flat[index]) for _, index in elements]
        if not are_equal(np.array(values, np.float32), recorded):
            note = f"{self.path}: holds other weights than the model had at step {newest.step}, "
            self.notes.append(note + "the run's last one; the gain is over those")


@dataclass(frozen=True, kw_only=True)
class RawTensors(Candidate):
    """The last weights of a run that has none, in memory."""

    tensors: Mapping[str, Tensor]

    def make(self) -> tuple[Mapping[str, Tensor], Plan | None]:
        return self.tensors, None


@dataclass(frozen=True, kw_only=True)
class RandomWeights(Candidate):
    """Random values in place of those of other weights, as large as these."""

    others: Candidate
    seed: int

    def write(self, path: Path, like: Path | None) -> Plan | None:
        from safetensors.torch import save_file

        tensors, _ = self.make()
        plain = path.parent / "random.safetensors"
        save_file({**tensors}, plain)
        _move(plain, path, like)
        files.unlink_if_exists(plain)
        return None

    def make(self) -> tuple[Mapping[str, Tensor], Plan | None]:
        import torch

        tensors, _ = self.others.make()
        generator = torch.Generator().manual_seed(self.seed)
        return {name: _randomize(tensor, generator) for name, tensor in tensors.items()}, None


def _randomize(tensor: Tensor, generator: Generator) -> Tensor:
    """Draw normal values whose mean square is that of a tensor, and none below 0 where it has none,
    as a variance; copy integers."""
    import torch

    if not tensor.is_floating_point():
        return tensor.clone()
    values = tensor.float()
    random = torch.randn(tensor.shape, generator=generator) * values.square().mean().sqrt()
    if (values >= 0).all():
        random = random.abs()
    return random.to(tensor.dtype)


def _move(plain: Path, path: Path, like: Path | None) -> None:
    """Make a file of weights an output, or their source in a copy of the checkpoint `like`."""
    if like is None:
        plain.rename(path)
    else:
        export_file(plain, path, like=like)


def average(held: HeldSources, spot: Spot, time: float, base: str | Path | None) -> RunWeights:
    """Find the average of a spot, which ends at `time`."""
    return RunWeights(
        title=spot.title,
        text=repr(spot.sigma_rel),
        sigma_rel=spot.sigma_rel,
        t=spot.t,
        base_share=spot.base_share,
        base=base if spot.base_share else None,
        held=held,
        target=SigmaRel(spot.sigma_rel),
        time=time,
    )


def find_own_ema(sources: Sources) -> RunWeights | None:
    """Find the user's own newest EMA, if the run has one."""
    own = None
    for source in sources:
        if isinstance(source, Checkpoint) and source.decay:
            own = source
    if own is None:
        return None
    return _stored(own, f"your EMA ({own.decay:.7g})", "ema")


def find_compared(
    sources: Sources, t: float, raw: str | Path | Mapping[str, Tensor] | None = None
) -> list[Candidate]:
    """Find what averages at the time `t` are compared with, where it is known: the user's own
    newest EMA, the last weights, also in `raw`, and the weights at an earlier `t`."""
    if raw is not None and not isinstance(raw, Mapping):
        raw = files.check_path("raw", raw)
    points = {}
    for source in sources:
        if isinstance(source.profile, Point):
            points[source.t] = source
    last = points.get(sources.t)
    if last is not None and raw is not None:
        value = raw if isinstance(raw, Path) else None
        raise InvalidValueError(
            "raw", "is not needed: the run contains the last weights", value=value
        )
    compared: list[Candidate] = []
    if (own := find_own_ema(sources)) is not None:
        compared.append(own)
    if last is not None:
        compared.append(_stored(last, LAST_WEIGHTS, "raw"))
    elif isinstance(raw, Path):
        compared.append(RawFile(title=LAST_WEIGHTS, text="raw", sources=sources, path=raw))
    elif raw is not None:
        compared.append(RawTensors(title=LAST_WEIGHTS, text="raw", tensors=raw))
    if t in points and t < sources.t:
        compared.append(_stored(points[t], f"weights at t = {t:,.12g}", "raw"))
    return compared


def find_checkpoints(sources: Sources) -> dict[float, RunWeights]:
    """Find the user's own checkpoints, by their times: of weights, or else of an average."""
    found: dict[float, RunWeights] = {}
    for source in sources:
        if isinstance(source, Checkpoint):
            is_weights = isinstance(source.profile, Point)
            if is_weights or source.t not in found:
                found[source.t] = _stored(source, f"your checkpoint {source.name}", "raw")
    return found


def find_called_best(sources: Sources) -> float | None:
    """Find the time of the checkpoint whose name, or a link beside it, says "best"."""
    local = [source for source in sources if not files.is_url(source.path)]
    linked = set()
    for folder in {source.path.parent for source in local}:
        for beside in folder.iterdir():
            if beside.is_symlink() and "best" in beside.name.lower():
                linked.add(beside.resolve())
    for source in local:
        if "best" in source.name.lower() or source.path.resolve() in linked:
            return source.t
    return None


def _stored(source: Source, title: str, text: str) -> RunWeights:
    """Find a stored average, or stored weights, as they are."""
    held = HeldSources(Sources.of([source]))
    return RunWeights(title=title, text=text, held=held, target=Mean(1), time=source.t)
