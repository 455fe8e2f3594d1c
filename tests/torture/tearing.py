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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import averages_in, exact_gamma

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import NotReadyError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.tracker.state import open_state
from torture.tally import Tally

SIGMA_RELS = (0.05, 0.28)
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
    return (
        min(float(tensor.min()) for tensor in tensors.values()),
        max(float(tensor.max()) for tensor in tensors.values()),
    )


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
        exact, (low, high) = truth.at(sigma_rel, updated), spread(tensors)
        if max(exact - low, high - exact) > TOLERANCE * exact:
            wrong.append(f"sigma_rel {sigma_rel} at step {updated}: from {low} to {high}, and it is {exact}")
    return wrong


def wrong_file(path: Path, truth: Truth) -> list[str]:
    """The same of a file."""
    with open_state(path) as state:
        parts = {kind: {key: dict(own) for key, own in state[kind].items()} for kind in ("totals", "recent")}
        return wrong_state(state | parts, truth)


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

    def from_file() -> list[str]:
        tracker.save_state(path)
        return wrong_file(path, truth)

    def swapped_in() -> list[str]:
        with tracker.model(other, sigma_rel=0.15) as averaged:
            return wrong_weights(averaged.state_dict())

    def tracked() -> list[str]:
        with tracker.averaged(other, tracked=0.05) as averaged:
            return wrong_weights(averaged.state_dict())

    ways: dict[str, Callable[[], list[str]]] = {
        "state_dict()": lambda: wrong_state(tracker.state_dict(), truth),
        "state_dict(0.05)": lambda: wrong_weights(tracker.state_dict(0.05)),
        "state_dict(0.15)": lambda: wrong_weights(tracker.state_dict(0.15)),
        "save_state": from_file,
        "model": swapped_in,
        "averaged": tracked,
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
    tally, truth = Tally(), Truth()
    number = 0
    while tally.tried < count:
        device = ("model", "cpu")[number % 2]
        run = folder / f"{number}"
        _interrupt(run, min(100, count - tally.tried), device, truth, tally, chance, elements)
        shutil.rmtree(run)
        number += 1
    return tally


class Interruptions:
    """What the handler of a signal does, while it is armed."""

    def __init__(self, tracker: PostHocEMA, model: Equal, truth: Truth) -> None:
        self.tracker, self.model, self.truth = tracker, model, truth
        self.way = ""
        self.armed = False
        self.has_updated = False
        self.wrong: list[str] = []

    def handle(self, *_: object) -> None:
        """Called by Python, anywhere in the main thread."""
        if not self.armed:
            return
        self.armed = False
        if self.way == "exit":
            raise SystemExit
        if self.way == "exception":
            raise Stop
        if self.way == "state":
            self.wrong += wrong_state(self.tracker.state_dict(), self.truth)
        if self.way == "file":
            path = self.tracker.checkpoint_dir.with_name("state")  # the directory may not be there yet
            self.tracker.save_state(path)
            self.wrong += wrong_file(path, self.truth)
        if self.way == "flush":
            self.tracker.flush()
        if self.way == "close":
            self.tracker.close()
        if self.way == "update":
            self._update_again()

    def _update_again(self) -> None:
        before = self.tracker.step
        try:
            self.tracker.update_(self.model)
        except NotReadyError:
            return
        self.has_updated = True  # before or after the other call, with values of that one's step
        if self.tracker.step != before + 1:
            self.wrong.append(f"an update within an update: step {before} became {self.tracker.step}")


WAYS = ("exit", "exception", "state", "file", "flush", "update")


def _interrupt(
    run: Path, tries: int, device: str, truth: Truth, tally: Tally, chance: random.Random, elements: int
) -> None:
    model = Equal(elements)
    tracker = start(run, model, device, 10 * EVERY)
    interruptions = Interruptions(tracker, model, truth)
    before = signal.signal(signal.SIGALRM, interruptions.handle)
    usual = 0.002
    try:
        for number in range(tries):
            interruptions.way = chance.choice(WAYS) if number < tries - 1 else "close"
            started = time.perf_counter()
            _one_call(interruptions, chance.uniform(1e-6, 1.5 * usual))
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


def _one_call(interruptions: Interruptions, after: float) -> None:
    """Call `update_` with the values of the step that it is for; what was not counted is called again next time."""
    try:
        try:
            interruptions.model.go_to(interruptions.tracker.step + 1)
            interruptions.armed = True
            signal.setitimer(signal.ITIMER_REAL, after)
            interruptions.tracker.update_(interruptions.model)
        finally:
            interruptions.armed = False
    except (SystemExit, Stop):
        interruptions.armed = False
    except NotReadyError:
        if interruptions.way != "close":
            raise


def _wrong_run(run: Path, model: Equal, truth: Truth) -> list[str]:
    """What is wrong with what a training has left: its snapshots, and that it can be gone on from."""
    wrong = []
    if not run.exists() or not [*run.glob("*.safetensors")]:
        return []
    for snapshot in read_directory(run):
        weights = PostHocEMA.from_path(run).state_dict(snapshot.info.sigma_rel, t=snapshot.info.t)
        exact, (low, high) = truth.at(repr(snapshot.info.sigma_rel), snapshot.info.step), spread(weights)
        if max(exact - low, high - exact) > 2 * TOLERANCE * exact:
            wrong.append(f"{snapshot.path.name}: from {low} to {high}, and it is {exact}")
    with PostHocEMA.from_path(run, model) as again:
        model.go_to(again.step + 1)
        again.update_(model)
    return wrong
