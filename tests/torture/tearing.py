"""Averages that are read, and updates that are interrupted, at random moments: what is seen is always of one update.

All elements of the model are equal, and so are all of an average: one that is not was read, or left, in the middle of
an update. Which value it must have at each step is known from the definition.
"""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import averages_in, exact_gamma, save_state

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import NotReadyError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.tracker.state import open_state
from torture import Tally

SIGMA_RELS = (0.2, 0.21)
"""Of about the same length: profiles that share a mean then have nearly its weights, and differ from the truth by their
roundings alone, while the values of the model jump about."""

MOST = 100_000
"""Steps of a training at most."""

TOLERANCE = 40 * 2.0**-24
"""Relative: a recent mean in float32 is rounded up to 32 times, then the average once; a torn one is off by 1e-5."""

EVERY = 2
"""Calls from one update to the next."""


def value_at(step: int) -> float:
    """What all elements of the model are after a step."""
    return float(np.float32(1 + (step * 0.6180339887) % 1))


class Truth:
    """The averages after each update, from the definition: the update at t_k counts t_k^(g+1) - t_(k-1)^(g+1)."""

    def __init__(self) -> None:
        times = np.arange(0, MOST + 1, EVERY, dtype=np.float64)
        values = np.array([value_at(int(t)) for t in times[1:]])
        self._averages = {}
        for sigma_rel in SIGMA_RELS:
            exponent = exact_gamma(sigma_rel) + 1
            powers = (times / MOST) ** exponent
            self._averages[repr(sigma_rel)] = np.cumsum(values * np.diff(powers)) / powers[1:]

    def at(self, sigma_rel: str, step: int) -> float:
        """The average after the last update up to a step."""
        return float(self._averages[sigma_rel][step // EVERY - 1])


class Equal(torch.nn.Module):
    """Parameters of which all elements are equal."""

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
    """The smallest and the largest of all elements."""
    return min(float(t.min()) for t in tensors.values()), max(float(t.max()) for t in tensors.values())


def away(tensors: Mapping[str, torch.Tensor], exact: float, tolerance: float = TOLERANCE) -> list[str]:
    """In words, where an element is too far from what all must be."""
    low, high = spread(tensors)
    return [f"from {low} to {high}, and it is {exact}"] if max(exact - low, high - exact) > tolerance * exact else []


def wrong_state(state: Mapping[str, Any], truth: Truth) -> list[str]:
    """What is wrong with a tracker's own state."""
    step, updated = state["step"], state["averages_step"]
    if not updated <= step < updated + EVERY or state["t"] != step or state["averages_t"] != updated:
        return [f"step {step} at t = {state['t']} with averages of {updated} at {state['averages_t']}"]
    if list(state["clock"])[-2:] != [step, step]:
        return [f"step {step} with a clock that ends at {list(state['clock'])[-2:]}"]
    if state["updates"] != updated // EVERY:
        return [f"{state['updates']} updates up to step {updated}"]
    wrong = []
    for sigma_rel, tensors in averages_in(state).items() if updated else ():
        wrong += [f"sigma_rel {sigma_rel} at {updated}: {line}" for line in away(tensors, truth.at(sigma_rel, updated))]
    return wrong


def wrong_file(path: Path, truth: Truth) -> list[str]:
    """The same of a file."""
    with open_state(path) as state:
        parts = {kind: {key: dict(own) for key, own in state[kind].items()} for kind in ("high", "low")}
        return wrong_state(state | parts | {"mean": dict(state["mean"])}, truth)


def wrong_weights(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong with an average of any length: it is a sum of tracked ones, with coefficients of up to about 4."""
    low, high = spread(weights)
    return [] if high - low <= 8 * TOLERANCE * high else [f"from {low} to {high}"]


def start(folder: Path, model: Equal, device: str, checkpoint_every: int) -> PostHocEMA:
    return PostHocEMA.from_model(
        model, folder, SIGMA_RELS, EVERY, checkpoint_every, max_checkpoints=3, checkpoint_dtype=None, device=device
    )


# --- reads


def torn_reads(folder: Path, count: int, chance: random.Random, elements: int = 300_000) -> Tally:
    """Read averages `count` times in all, in every way, while another thread updates them."""
    tally, truth = Tally(), Truth()
    for device in ("model", "cpu"):
        reads = count // 2 if device == "model" else count - count // 2
        model = Equal(elements)
        tracker = start(folder / device, model, device, 10 * MOST)
        for step in (1, 2):
            model.go_to(step)
            tracker.update_(model)
        reader = threading.Thread(target=_read, args=(tracker, model, reads, truth, tally, chance))
        reader.start()
        while reader.is_alive() and tracker.step < MOST:
            model.go_to(tracker.step + 1)
            tracker.update_(model)
        reader.join()
        tracker.close()
        shutil.rmtree(folder / device)
    return tally


def _read(tracker: PostHocEMA, model: Equal, reads: int, truth: Truth, tally: Tally, chance: random.Random) -> None:
    other = Equal(model.large.numel())
    path = tracker.checkpoint_dir / "state"

    def saved() -> list[str]:
        save_state(tracker, path)
        return wrong_file(path, truth)

    def swapped_in(block: Callable[..., Any], **which: float) -> list[str]:
        with block(other, **which) as averaged:
            return wrong_weights(averaged.state_dict())

    ways: dict[str, Callable[[], list[str]]] = {
        "state_dict()": lambda: wrong_state(tracker.state_dict(), truth),
        "state_dict(0.2)": lambda: wrong_weights(tracker.state_dict(0.2)),
        "state_dict(0.205)": lambda: wrong_weights(tracker.state_dict(0.205)),
        "file": saved,
        "model": lambda: swapped_in(tracker.model, sigma_rel=0.205),
        "averaged": lambda: swapped_in(tracker.averaged, tracked=0.2),
    }
    for number in range(reads):
        way = [*ways][number % len(ways)]
        time.sleep(chance.uniform(0, 0.001))
        tally.tried += 1
        tally.lost += [f"{way}: {line}" for line in ways[way]()]


# --- states


class Stop(Exception):  # noqa: N818  # like SystemExit
    """What a signal handler raises."""


def torn_states(folder: Path, count: int, chance: random.Random, elements: int = 100_000) -> Tally:
    """Interrupt updates `count` times in all: by SystemExit, by an Exception, by a handler that reads or closes."""
    tally, truth, devices = Tally(), Truth(), cycle(("model", "cpu"))
    while tally.tried < count:
        _interrupt(folder / "run", min(100, count - tally.tried), next(devices), truth, tally, chance, elements)
        shutil.rmtree(folder / "run", ignore_errors=True)
    return tally


WAYS = ("exit", "exception", "state", "file", "flush", "update")


class Interruptions:
    """What the handler of a signal does, while it is armed."""

    def __init__(self, tracker: PostHocEMA, model: Equal, truth: Truth) -> None:
        self.tracker, self.model, self.truth = tracker, model, truth
        self.way = ""
        self.armed = self.has_updated = False
        self.wrong: list[str] = []

    def handle(self, *_: object) -> None:
        """Called by Python, anywhere in the main thread."""
        if self.armed:
            self.armed = False
            getattr(self, f"_{self.way}")()

    def _exit(self) -> None:
        raise SystemExit

    def _exception(self) -> None:
        raise Stop

    def _state(self) -> None:
        self.wrong += wrong_state(self.tracker.state_dict(), self.truth)

    def _file(self) -> None:
        path = self.tracker.checkpoint_dir.with_name("state")  # the directory may not be there yet
        save_state(self.tracker, path)
        self.wrong += wrong_file(path, self.truth)

    def _flush(self) -> None:
        self.tracker.flush()

    def _close(self) -> None:
        self.tracker.close()

    def _update(self) -> None:
        before = self.tracker.step
        with suppress(NotReadyError):
            self.tracker.update_(self.model)
            self.has_updated = True  # before or after the other call, with values of that one's step
            if self.tracker.step != before + 1:
                self.wrong.append(f"an update within an update: step {before} became {self.tracker.step}")

    def call(self, after: float) -> None:
        """Call `update_` with the values of its step, and interrupt it; what was not counted is called again."""
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


def _interrupt(
    run: Path, tries: int, device: str, truth: Truth, tally: Tally, chance: random.Random, elements: int
) -> None:
    model, usual = Equal(elements), 0.002
    tracker = start(run, model, device, 10 * EVERY)
    interruptions = Interruptions(tracker, model, truth)
    before = signal.signal(signal.SIGALRM, interruptions.handle)
    try:
        for number in range(tries):
            interruptions.way = chance.choice(WAYS) if number < tries - 1 else "close"
            started = time.perf_counter()
            interruptions.call(chance.uniform(1e-6, 1.5 * usual))
            usual = min(0.02, 0.9 * usual + 0.1 * (time.perf_counter() - started))
            tally.tried += 1
            if interruptions.has_updated:
                break
            where = f"{device}, {interruptions.way} at step {tracker.step}"
            if interruptions.way != "close":
                interruptions.wrong += wrong_state(tracker.state_dict(), truth)
            tally.lost += [f"{where}: {line}" for line in interruptions.wrong]
            interruptions.wrong = []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        with suppress(NotReadyError):  # the last update, where a handler has closed the tracker beneath it
            tracker.close()
    if not interruptions.has_updated:
        tally.lost += [f"{device}: {line}" for line in _wrong_run(run, model, truth)]


def _wrong_run(run: Path, model: Equal, truth: Truth) -> list[str]:
    """What is wrong with what a training has left: its snapshots, and that it can be gone on from."""
    if not any(run.glob("*.safetensors")):
        return []
    wrong = []
    for snapshot in read_directory(run):
        weights = PostHocEMA.from_path(run).state_dict(snapshot.info.sigma_rel, t=snapshot.info.t)
        exact = truth.at(repr(snapshot.info.sigma_rel), snapshot.info.step)
        wrong += [f"{snapshot.path.name}: {line}" for line in away(weights, exact, 2 * TOLERANCE)]
    with PostHocEMA.from_path(run, model, step=PostHocEMA.from_path(run).step) as again:  # values jump about
        model.go_to(again.step + 1)
        again.update_(model)
    return wrong
