"""Averages read, and updates interrupted, at random moments: every reader sees the averages of one update.

All elements of the model are equal, hence all elements of an average are: a different element was read, or left, in the
middle of an update. The definition gives the correct value at each step.
"""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from factories import averages_in, exact_gamma, save_state

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import NotReadyError
from posthoc_cli.snapshots.directory import read_directory
from torture import Tally

SIGMA_RELS = (0.2, 0.21)
"""Two similar widths: profiles that share a mean then have nearly its weights and differ from the truth only by
rounding, although the model's values jump."""

MOST = 100_000
"""The largest number of steps of a training."""

TOLERANCE = 40 * 2.0**-24
"""The relative tolerance: a float32 mean is rounded up to 32 times, the average once; a torn average is off by 1e-5."""

EVERY = 2
"""The number of calls from one update to the next."""


def value_at(step: int) -> float:
    """Return the value of all elements of the model after a step."""
    return float(np.float32(1 + (step * 0.6180339887) % 1))


@cache
def truth(sigma_rel: str) -> npt.NDArray[np.float64]:
    """Return the averages after each update by the definition: update t_k has weight t_k^(g+1) - t_(k-1)^(g+1)."""
    times = np.arange(0, MOST + 1, EVERY, dtype=np.float64)
    values = np.array([value_at(int(t)) for t in times[1:]])
    powers = (times / MOST) ** (exact_gamma(float(sigma_rel)) + 1)
    return np.cumsum(values * np.diff(powers)) / powers[1:]


def exact(sigma_rel: str, step: int) -> float:
    """Return the average after the last update up to a step."""
    return float(truth(sigma_rel)[step // EVERY - 1])


class Equal(torch.nn.Module):
    """A model in which all elements of all parameters are equal."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.large = torch.nn.Parameter(torch.zeros(elements))
        self.small = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(7, 3)) for _ in range(5)])
        self.wide = torch.nn.Parameter(torch.zeros(100, dtype=torch.float64))

    def go_to(self, step: int) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(value_at(step))


def spread(tensors: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Return the smallest and the largest of all elements."""
    return min(float(t.min()) for t in tensors.values()), max(float(t.max()) for t in tensors.values())


def away(tensors: Mapping[str, torch.Tensor], sigma_rel: str, step: int, tolerance: float = TOLERANCE) -> list[str]:
    """Return a line if an element is too far from the correct value."""
    (low, high), right = spread(tensors), exact(sigma_rel, step)
    is_near = max(right - low, high - right) <= tolerance * right
    return [] if is_near else [f"sigma_rel {sigma_rel} at {step}: from {low} to {high}, and it is {right}"]


def wrong_state(state: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a tracker's state."""
    step, updated = state["step"], state["averages_step"]
    if not updated <= step < updated + EVERY or state["t"] != step or state["averages_t"] != updated:
        return [f"step {step} at t = {state['t']} with averages of {updated} at {state['averages_t']}"]
    if list(state["clock"])[-2:] != [step, step]:
        return [f"step {step} with a clock that ends at {list(state['clock'])[-2:]}"]
    if state["updates"] != updated // EVERY:
        return [f"{state['updates']} updates up to step {updated}"]
    averages = averages_in(state) if updated else {}
    return [line for sigma_rel, tensors in averages.items() for line in away(tensors, sigma_rel, updated)]


def wrong_file(tracker: PostHocEMA, path: Path) -> list[str]:
    """Save a tracker's state to a file; return what is wrong with it."""
    save_state(tracker, path)
    return wrong_state(torch.load(path, weights_only=True))


def wrong_weights(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what is wrong with an average of any length: a sum of tracked ones with coefficients up to about 4."""
    low, high = spread(weights)
    return [] if high - low <= 8 * TOLERANCE * high else [f"from {low} to {high}"]


def start(folder: Path, model: Equal, device: str, checkpoint_every: int) -> PostHocEMA:
    return PostHocEMA.from_model(
        model, folder, SIGMA_RELS, EVERY, checkpoint_every, max_checkpoints=3, checkpoint_dtype=None, device=device
    )


# --- reads


def torn_reads(folder: Path, count: int, chance: random.Random, elements: int = 300_000) -> Tally:
    """Read averages `count` times in total, in every way, while another thread updates them."""
    tally = Tally()
    for device, reads in (("model", count // 2), ("cpu", count - count // 2)):
        model = Equal(elements)
        tracker = start(folder / device, model, device, 10 * MOST)
        reader = threading.Thread(target=_read, args=(tracker, elements, reads, tally, chance))
        while tracker.step < 2 or (reader.is_alive() and tracker.step < MOST):
            model.go_to(tracker.step + 1)
            tracker.update_(model)
            if tracker.step == 2:
                reader.start()
        reader.join()
        tracker.close()
        shutil.rmtree(folder / device)
    return tally


def _read(tracker: PostHocEMA, elements: int, reads: int, tally: Tally, chance: random.Random) -> None:
    other, path = Equal(elements), tracker.checkpoint_dir / "state"

    def swapped_in(block: Callable[..., Any], **which: float) -> list[str]:
        with block(other, **which) as averaged:
            return wrong_weights(averaged.state_dict())

    ways: dict[str, Callable[[], list[str]]] = {
        "state_dict()": lambda: wrong_state(tracker.state_dict()),
        "state_dict(0.2)": lambda: wrong_weights(tracker.state_dict(0.2)),
        "state_dict(0.205)": lambda: wrong_weights(tracker.state_dict(0.205)),
        "file": lambda: wrong_file(tracker, path),
        "model": lambda: swapped_in(tracker.model, sigma_rel=0.205),
        "tracked": lambda: swapped_in(tracker.model, sigma_rel=0.2),
    }
    for _, (way, wrong) in zip(range(reads), cycle(ways.items()), strict=False):
        time.sleep(chance.uniform(0, 0.001))
        tally.tried += 1
        tally.lost += [f"{way}: {line}" for line in wrong()]


# --- states


class Stop(Exception):  # noqa: N818  # like SystemExit
    """The exception that a signal handler raises."""


def torn_states(folder: Path, count: int, chance: random.Random, elements: int = 100_000) -> Tally:
    """Interrupt updates `count` times in total: by SystemExit, by an Exception, by a handler that reads or closes."""
    tally, devices = Tally(), cycle(("model", "cpu"))
    while tally.tried < count:
        _interrupt(folder / "run", min(100, count - tally.tried), next(devices), tally, chance, elements)
        shutil.rmtree(folder / "run", ignore_errors=True)
    return tally


class Interruptions:
    """A signal handler that interrupts a call in one of several ways while it is armed."""

    def __init__(self, tracker: PostHocEMA, model: Equal) -> None:
        self.tracker, self.model = tracker, model
        path = tracker.checkpoint_dir.with_name("state")  # the directory may not exist yet
        self.ways: dict[str, Callable[[], list[str] | None]] = {
            "exit": lambda: _raise(SystemExit()),
            "exception": lambda: _raise(Stop()),
            "state": lambda: wrong_state(tracker.state_dict()),
            "file": lambda: wrong_file(tracker, path),
            "flush": tracker.flush,
            "update": self._update,
        }
        self.way = ""
        self.armed = self.has_updated = False
        self.wrong: list[str] = []

    def handle(self, *_: object) -> None:
        """Handle the signal: Python calls this anywhere in the main thread."""
        if self.armed:
            self.armed = False
            self.wrong += self.ways.get(self.way, self.tracker.close)() or []

    def _update(self) -> list[str]:
        before = self.tracker.step
        with suppress(NotReadyError):
            self.tracker.update_(self.model)
            self.has_updated = True  # with the values of the interrupted call's step, before or after that call
            if self.tracker.step != before + 1:
                return [f"an update within an update: step {before} became {self.tracker.step}"]
        return []

    def call(self, after: float) -> None:
        """Call `update_` with the values of its step and interrupt it; a later call repeats a step that failed."""
        self.model.go_to(self.tracker.step + 1)
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, after)
            self.tracker.update_(self.model)
        except (SystemExit, Stop):
            pass
        except NotReadyError:
            if self.way != "close":
                raise
        finally:
            self.armed = False


def _raise(error: BaseException) -> None:
    raise error


def _interrupt(run: Path, tries: int, device: str, tally: Tally, chance: random.Random, elements: int) -> None:
    model, usual = Equal(elements), 0.002
    tracker = start(run, model, device, 10 * EVERY)
    interruptions = Interruptions(tracker, model)
    before = signal.signal(signal.SIGALRM, interruptions.handle)
    try:
        for number in range(tries):
            interruptions.way = chance.choice([*interruptions.ways]) if number < tries - 1 else "close"
            started = time.perf_counter()
            interruptions.call(chance.uniform(1e-6, 1.5 * usual))
            usual = min(0.02, 0.9 * usual + 0.1 * (time.perf_counter() - started))
            tally.tried += 1
            if interruptions.has_updated:
                break
            where = f"{device}, {interruptions.way} at step {tracker.step}"
            if interruptions.way != "close":
                interruptions.wrong += wrong_state(tracker.state_dict())
            tally.lost += [f"{where}: {line}" for line in interruptions.wrong]
            interruptions.wrong = []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        with suppress(NotReadyError):  # a handler may have closed the tracker during the last update
            tracker.close()
    if not interruptions.has_updated:
        tally.lost += [f"{device}: {line}" for line in _wrong_run(run, model)]


def _wrong_run(run: Path, model: Equal) -> list[str]:
    """Return what is wrong with the snapshots of a training; then resume it for one step."""
    if not any(run.glob("*.safetensors")):
        return []
    wrong = []
    for snapshot in read_directory(run):
        sigma_rel, t = snapshot.info.sigma_rel, snapshot.info.t
        weights = PostHocEMA.from_path(run).state_dict(sigma_rel, t=t)
        wrong += away(weights, repr(sigma_rel), snapshot.info.step, 2 * TOLERANCE)
    with PostHocEMA.from_path(run, model, step=PostHocEMA.from_path(run).step) as again:  # values jump about
        model.go_to(again.step + 1)
        again.update_(model)
    return wrong
