"""The running averages: state, and the arithmetic of one update."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from posthoc_cli.profiles import gamma_from_sigma_rel, new_value_share
from posthoc_cli.tracker.layout import BlockReader, FlatTensors, Layout, lay_out


@dataclass(frozen=True, eq=False)
class AverageSet:
    """One accumulator a profile, of the same tensors."""

    layout: Layout
    accumulators: tuple[FlatTensors, ...]

    @classmethod
    def empty(cls, layout: Layout, profiles: int) -> AverageSet:
        """Room for averages."""
        return cls(layout, tuple(FlatTensors(layout, wide=True) for _ in range(profiles)))

    @property
    def on_host(self) -> bool:
        """Whether all of it is in the host's memory."""
        return all(group.device.type == "cpu" for group in self.layout)

    def to_host(self) -> AverageSet:
        """A copy in the host's memory."""
        layout = tuple(replace(group, device=torch.device("cpu")) for group in self.layout)
        copy = AverageSet.empty(layout, len(self.accumulators))
        for own, other in zip(copy.accumulators, self.accumulators, strict=True):
            own.fill(other.views)
        return copy


@dataclass
class _Pending:
    """An update that may be interrupted.

    Attributes:
        old, new: the averages to change, and where to write them.
        shares: see `RunningAverages._shares`.
        copies, t, step: see `RunningAverages.update_`.
        done: number of the last block that was taken in, and of the profile that took it.
    """

    old: AverageSet
    new: AverageSet
    shares: list[float] | None
    copies: dict[str, torch.Tensor]
    t: float
    step: int
    done: tuple[int, int] = (-1, -1)


class RunningAverages:
    """Averages of the same tensors with several profiles.

    An update changes them in place, unless they are held: then it leaves what is held as it is and writes to another
    set of tensors, which costs no more time. So snapshots are written while training goes on.

    Attributes:
        sigma_rels, gammas: the profiles.
        values: for each profile, name -> accumulator; empty before the first update.
        copies: name -> tensor as it was at `t`.
        t, step: time and calls at the last update; 0 before.
        t_first: time of the first update; 0 before.
        max_interval: the longest time between two updates so far.
    """

    def __init__(self, sigma_rels: Sequence[float]) -> None:
        self.sigma_rels = tuple(sigma_rels)
        self.gammas = tuple(gamma_from_sigma_rel(sigma_rel) for sigma_rel in sigma_rels)
        self.values: tuple[Mapping[str, torch.Tensor], ...] = tuple({} for _ in sigma_rels)
        self.copies: dict[str, torch.Tensor] = {}
        self.t = 0.0
        self.step = 0
        self.t_first = 0.0
        self.max_interval = 0.0
        self._set: AverageSet | None = None
        self._held: list[AverageSet] = []
        self._spare: list[AverageSet] = []
        self._lock = threading.Lock()

    @property
    def exist(self) -> bool:
        """Whether there was an update yet."""
        return self.t > 0

    @torch.inference_mode(False)  # made there, accumulators could never be updated outside
    @torch.no_grad()
    def update_(self, values: BlockReader, copies: Mapping[str, torch.Tensor], t: float, step: int) -> None:
        """Take in the model's values as they are at time `t`: averages <- averages + (1 - beta) (values - averages).

        Arguments:
            values: the parameters'; where their layout is another than before, the averages follow it.
            copies: buffers, by name; kept as they are given.
            t, step: time and number of the call.
        """
        old = self._laid_out(values.layout)
        pending = _Pending(old, self._target(old), self._shares(t), dict(copies), t, step)
        try:
            self._finish(pending, values)
        except KeyboardInterrupt:
            self._finish(pending, values)  # a part of the averages may have taken the values in: so must the rest
            raise

    def _shares(self, t: float) -> list[float] | None:
        """How much the values of `t` count, a profile; None for the first ones, which are the averages."""
        return [new_value_share(gamma, self.t, t) for gamma in self.gammas] if self.exist else None

    def _finish(self, update: _Pending, values: BlockReader) -> None:
        """All of an update that is not done yet."""
        accumulators = list(zip(update.old.accumulators, update.new.accumulators, strict=True))
        for number, (block, own) in enumerate(values):
            part = slice(block.begin, block.end)
            for index, (source, target) in enumerate(accumulators):
                if (number, index) > update.done:
                    before, room = source.flats[block.group][part], target.flats[block.group][part]
                    update.done = number, index  # Ctrl-C comes when what is called here has returned
                    if update.shares is None:
                        room.copy_(own)
                    else:
                        torch.lerp(before, own, update.shares[index], out=room)
        self._take(update.old, update.new)
        self.copies = update.copies
        if self.exist:
            self.max_interval = max(self.max_interval, update.t - self.t)
        else:
            self.t_first = update.t
        self.step = update.step
        self.t = update.t

    @torch.inference_mode(False)
    @torch.no_grad()
    def hold(self) -> AverageSet:
        """The averages as they are now, in the host's memory, left as they are until `release`.

        Those on an accelerator are copied: it has no room for another set.
        """
        current = self._set if self._set is not None and self._is_current(self._set) else None
        current = current or self._laid_out(lay_out(self.values[0]))
        self.values = tuple(flat.views for flat in current.accumulators)
        if not current.on_host:
            return current.to_host()
        with self._lock:
            self._held.append(current)
        return current

    def release(self, held: AverageSet) -> None:
        """What `hold` gave is no longer needed; from any thread."""
        with self._lock:
            if any(held is one for one in self._held):
                self._held.remove(held)
                self._recycle(held)

    def _recycle(self, used: AverageSet) -> None:
        """Keep one set for the next time that averages are held: making one takes longer than an update."""
        needed = used is self._set or any(used is held for held in self._held)
        if not needed and not self._spare and self._set is not None and used.layout == self._set.layout:
            self._spare.append(used)

    def _target(self, old: AverageSet) -> AverageSet:
        """Where an update may write."""
        with self._lock:
            if not any(old is held for held in self._held):
                return old
            if self._spare:
                return self._spare.pop()
        return AverageSet.empty(old.layout, len(self.gammas))

    def _take(self, old: AverageSet, new: AverageSet) -> None:
        with self._lock:
            self._set = new
            self._recycle(old)
        self.values = tuple(flat.views for flat in new.accumulators)

    def _is_current(self, one: AverageSet) -> bool:
        """Whether a set holds `values`, which may also have been loaded from elsewhere."""
        return all(values is flat.views for values, flat in zip(self.values, one.accumulators, strict=True))

    def _laid_out(self, layout: Layout) -> AverageSet:
        """The averages in a layout; those that lie otherwise are moved, name by name."""
        current = self._set
        if current is not None and current.layout == layout and self._is_current(current):
            return current
        moved = AverageSet.empty(layout, len(self.gammas))
        if self.exist:
            for flat, values in zip(moved.accumulators, self.values, strict=True):
                flat.fill(values)
        with self._lock:
            self._set = moved
            self._spare.clear()
        return moved
