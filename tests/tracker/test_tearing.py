"""Averages read, and updates interrupted, at any moment: every caller sees the averages of one
update.

Any number of threads gives the same bits, and torch's own threads and settings are left alone.

All elements of the model are equal, hence all elements of an average are: a different element was
read, or left, in the middle of an update. The definition gives the correct value at each step.
"""

import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import averages_in, exact_average, info_of
from safetensors.torch import load_file
from torch import nn
from tracker.runs import EITHER_DEVICE, Training, contents, track, update

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import RefusedCallError

SIGMA_RELS = (0.2, 0.21)
"""Two similar widths: profiles that share a mean then have nearly its weights and differ from the
truth only by rounding, although the model's values jump."""

EVERY = 2
"""The number of calls from one update to the next."""

TOLERANCE = 40 * 2.0**-24
"""The relative tolerance: a float32 mean is rounded up to 32 times, the average once; a torn
average is off by 1e-5."""


def value_at(step):
    return float(np.float32(1 + (step * 0.6180339887) % 1))


def truth(sigma_rel, step):
    """Return the average after the last update up to a step by the definition."""
    steps = range(EVERY, step + 1, EVERY)
    values = [value_at(number) for number in steps]
    return float(exact_average(values, sigma_rel, steps))


class Equal(nn.Module):
    """A model in which all elements of all parameters are equal."""

    def __init__(self, elements):
        super().__init__()
        self.large = nn.Parameter(torch.zeros(elements))
        self.small = nn.ParameterList([torch.zeros(7, 3) for _ in range(5)])
        self.wide = nn.Parameter(torch.zeros(100, dtype=torch.float64))

    def go_to(self, step):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(value_at(step))


def start(folder, model, device, checkpoint_every):
    return PostHocEMA.from_model(
        model,
        folder,
        SIGMA_RELS,
        update_every=EVERY,
        checkpoint_every=checkpoint_every,
        max_checkpoints=3,
        checkpoint_dtype=None,
        device=device,
    )


def train(tracker, model, steps):
    for _ in range(steps):
        model.go_to(tracker.step + 1)
        tracker.update_(model)


def check(tensors, right, tolerance=TOLERANCE):
    for name, tensor in tensors.items():
        off = tensor.double() - right
        assert float(off.abs().max()) <= tolerance * right, name


def check_state(state):
    info = info_of(state)
    step = info["step"]
    updates = step // EVERY
    assert info["t"] == step
    assert info["standing"]["step"] == EVERY * updates
    assert info["standing"]["updates"] == updates
    for sigma_rel, tensors in averages_in(state).items():
        check(tensors, truth(float(sigma_rel), step))


def check_equal(weights):
    """Check that all elements of an average are equal."""
    check(weights, float(weights["wide"][0]), 2 * TOLERANCE)


@EITHER_DEVICE
def test_averages_that_another_thread_reads_are_those_of_one_update(tmp_path, device):
    model = Equal(300_000)
    other = Equal(300_000)
    chance = random.Random(0)
    tracker = start(tmp_path, model, device, 10**6)

    def read():
        for _ in range(10):
            time.sleep(chance.uniform(0, 0.001))
            check_state(tracker.state_dict())
            time.sleep(chance.uniform(0, 0.001))
            check_equal(tracker.state_dict(0.2))
            with tracker.model(other, 0.21) as averaged:
                check_equal(averaged.state_dict())

    train(tracker, model, 2)
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(read)
        while not reader.done():
            train(tracker, model, 1)
    reader.result()
    tracker.close()


class Stop(BaseException):
    """What a signal handler raises, like KeyboardInterrupt."""


class Interruptions:
    """Updates that a signal interrupts, whose handler does something once."""

    def __init__(self, tracker, model):
        self._tracker = tracker
        self._model = model
        self._chance = random.Random(0)
        self._way = ""

    def update(self, way=""):
        """Make an update, and within it what a way says, by default one at random."""
        chosen = way or self._chance.choice(("stop", "read"))
        self._model.go_to(self._tracker.step + 1)
        delay = self._chance.uniform(1e-6, 0.004)
        # The signal of an earlier update may come at any time: outside it does nothing. The
        # statement after the update is inside, for one that comes just then.
        try:
            self._way = chosen
            signal.setitimer(signal.ITIMER_REAL, delay)
            self._tracker.update_(self._model)
            self._way = ""
        except Stop:
            pass
        except RefusedCallError:
            assert chosen == "close"
        self._way = ""

    def handle(self, *_):
        way = self._way
        self._way = ""
        if way == "stop":
            raise Stop
        calls = {"read": self._tracker.state_dict, "close": self._tracker.close}
        if way in calls:
            with suppress(RefusedCallError):  # within the call, not just before or after it
                calls[way]()


@EITHER_DEVICE
def test_an_update_that_a_signal_interrupts_was_made_or_was_not(tmp_path, device):
    """Handlers raise, or make a call, which is refused."""
    model = Equal(3_000)
    tracker = start(tmp_path, model, device, 10 * EVERY)
    train(tracker, model, EVERY)
    interruptions = Interruptions(tracker, model)
    before = signal.signal(signal.SIGALRM, interruptions.handle)
    try:
        for _ in range(79):
            interruptions.update()
            check_state(tracker.state_dict())
        interruptions.update("close")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    tracker.close()
    for snapshot in Run(tmp_path).snapshots:
        weights = load_file(snapshot.path)
        check(weights, truth(snapshot.sigma_rel, snapshot.step), 2 * TOLERANCE)


@EITHER_DEVICE
def test_a_snapshot_that_a_signal_interrupts_takes_weights_in_once(tmp_path, device):
    """It takes them in at a step between two updates; the next snapshot must not do so again."""
    model = Equal(30_000)
    tracker = start(tmp_path, model, device, 10**6)
    is_inside = False

    def stop(*_):
        if is_inside:
            raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    chance = random.Random(0)
    try:
        train(tracker, model, 1)
        for number in range(1, 16):
            train(tracker, model, EVERY)
            with suppress(Stop):
                is_inside = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 0.002))
                tracker.snapshot()
                is_inside = False
            is_inside = False
            tracker.snapshot()
            assert info_of(tracker.state_dict())["standing"]["updates"] == 2 * number
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    tracker.close()


def test_a_snapshot_waits_for_weights_that_an_interrupted_one_has_queued(tmp_path):
    """The interruption comes when the job is queued, which is still running as the next one asks
    what was counted."""
    model = Equal(1_000_000)
    tracker = start(tmp_path, model, "cpu", 10**6)

    def stop(frame, event, _):
        if event == "return" and frame.f_code.co_name == "submit":
            sys.setprofile(None)
            raise Stop

    train(tracker, model, EVERY + 1)
    for number in range(2, 4):
        with pytest.raises(Stop):
            sys.setprofile(stop)
            tracker.snapshot()
        tracker.snapshot()
        assert info_of(tracker.state_dict())["standing"]["updates"] == 2 * number - 2
        train(tracker, model, EVERY)
    tracker.close()


# --- threads


@pytest.mark.usefixtures("small_tiles")
def test_bits_are_the_same_for_any_number_of_threads(tmp_path):
    for threads in (1, 7):
        torch.set_num_threads(threads)
        training = Training()
        folder = tmp_path / f"{threads}"
        with track(training.model, folder, checkpoint_every=20, checkpoint_dtype=None) as tracker:
            training.run(60, tracker)
    assert contents(tmp_path / "1") == contents(tmp_path / "7")


@pytest.mark.usefixtures("small_tiles")
@EITHER_DEVICE
def test_threads_of_training_are_left_alone(device, tmp_path):
    """Their number stays, also in threads that start during an update or later."""
    torch.set_num_threads(2)  # conftest sets the number to 1 for each test
    seen = set()
    model = nn.Linear(60, 60)

    def see():
        seen.add(torch.get_num_threads())

    with track(model, tmp_path, device=device, checkpoint_every=2) as tracker:
        for _ in range(4):
            tracker.update_(model)
            thread = threading.Thread(target=see)
            thread.start()
            thread.join()
            see()
    see()
    assert seen == {2}


TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.exists(), reason="the system does not list threads")
@EITHER_DEVICE
def test_threads_of_averages_use_no_more_of_torchs_own(device, tmp_path):
    """On busy cores those wait for each other at every operation. Operations on a tile of this
    model would use some."""
    torch.set_num_threads(4)
    model = nn.Linear(600, 600)
    model.weight.detach().mul(2)  # the training's own threads are there
    counts = []
    with track(model, tmp_path, device=device, checkpoint_every=2) as tracker:
        for _ in range(2):
            threads = len([*TASKS.iterdir()])
            counts.append(threads - threading.active_count())
            update(tracker, model, 4)
            tracker.flush()
    assert counts[0] == counts[1]
