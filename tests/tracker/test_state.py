"""A tracker's own state: as a dict, as a file, through torch.distributed.checkpoint; continuing with other settings."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ema_command import Ema
from factories import averages_in, exact_average
from torch.distributed.checkpoint.stateful import Stateful
from tracker.runs import as_if_killed, contents, step, times, train

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NonFiniteError, NotReadyError
from posthoc_cli.snapshots.directory import read_directory

SETTINGS: dict = {
    "sigma_rels": (0.05, 0.28), "update_every": 2, "checkpoint_every": 10, "checkpoint_dtype": None,
    "resume": "auto",
}  # fmt: skip


class Run:
    """A training whose steps depend on their number only; every step's weights are kept in float64."""

    def __init__(self, folder: Path, t_unit: str = "steps", **settings: object) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        self.own_clock = t_unit != "steps"
        self.tracker = PostHocEMA.from_model(self.model, folder, t_unit=t_unit, **(SETTINGS | settings))
        self.weights: dict[int, np.ndarray] = {}

    def train(self, first: int, last: int) -> None:
        for number in range(first, last + 1):
            step(self.model, number)
            self.weights[number] = self.model[0].weight.detach().double().numpy().copy()
            self.tracker.update_(self.model, number**1.5 if self.own_clock else None)
        self.tracker.flush()

    def restore(self, other: Run) -> None:
        """Load another run's model, as from a training checkpoint."""
        self.model.load_state_dict(other.model.state_dict())
        self.weights |= other.weights

    def live(self, sigma_rel: float) -> np.ndarray:
        with self.tracker.model(self.model, sigma_rel):
            return self.model[0].weight.detach().double().numpy().copy()

    def check(self, sigma_rel: float, times: list[int]) -> None:
        """Assert that the present average is that over updates at these times."""
        exact = exact_average([self.weights[t] for t in times], sigma_rel, times)
        # Float32: an update rounds by at most 2**-24 of the largest magnitude, and there are len(times).
        assert np.abs(self.live(sigma_rel) - exact).max() < len(times) * 2**-24 * np.abs(exact).max() * 4


def trained(folder: Path, steps: int, t_unit: str = "steps", **settings: object) -> Run:
    run = Run(folder, t_unit, **settings)
    run.train(1, steps)
    return run


def same(one: object, other: object) -> bool:
    """Return whether two states are equal, tensors by value."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


WITHOUT_GROUP = pytest.mark.filterwarnings("ignore")  # torch warns where there is no process group


@WITHOUT_GROUP
@pytest.mark.parametrize(("steps", "group"), [(1, False), (7, True), (15, False)])
def test_torch_distributed_checkpoint_fills_all_of_the_state(
    tmp_path: Path, steps: int, group: bool, request: pytest.FixtureRequest
) -> None:
    run, fresh = trained(tmp_path / "run", steps, "images"), Run(tmp_path / "run", "images")
    assert isinstance(run.tracker, Stateful)
    expected = run.tracker.state_dict()
    run.tracker.close()
    if group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        request.addfinalizer(dist.destroy_process_group)
    dcp.save({"ema": run.tracker}, checkpoint_id=tmp_path / "dcp")
    dcp.load({"ema": fresh.tracker}, checkpoint_id=tmp_path / "dcp")
    assert same(fresh.tracker.state_dict(), expected)
    fresh.restore(run)
    fresh.train(steps + 1, 20)
    trained(tmp_path / "complete", 20, "images")
    assert contents(tmp_path / "run") == contents(tmp_path / "complete")


@WITHOUT_GROUP
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_torch_distributed_checkpoint_loads_fewer_profiles_by_their_sigma_rel(tmp_path: Path, sigma_rel: float) -> None:
    model = torch.nn.Linear(3, 3)
    tracker = PostHocEMA.from_model(model, tmp_path / "run", **SETTINGS | {"sigma_rels": (0.05, 0.1, 0.28)})
    train(model, tracker, 1, 4)
    expected = tracker.state_dict()
    tracker.close()
    fewer = PostHocEMA.from_model(model, tmp_path / "run", **SETTINGS | {"sigma_rels": (sigma_rel,)})
    dcp.save({"ema": tracker}, checkpoint_id=tmp_path / "dcp")
    dcp.load({"ema": fewer}, checkpoint_id=tmp_path / "dcp")
    found = fewer.state_dict()
    assert found["sigma_rels"] == [sigma_rel]
    (average,) = averages_in(found).values()
    assert same(average, averages_in(expected)[repr(sigma_rel)])


@pytest.mark.parametrize("steps", [1, 15])
def test_the_state_holds_only_types_that_torch_loads_with_weights_only(tmp_path: Path, steps: int) -> None:
    state = trained(tmp_path / "run", steps, "images").tracker.state_dict()

    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return type(value) is dict and all(type(key) is str and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in (int, float, bool, str, type(None), torch.Tensor)

    assert plain(state)
    torch.save(state, tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt", weights_only=True), state)


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps, lambda one: torch.save(one, io.BytesIO())])
def test_copying_or_pickling_a_tracker_is_an_error_with_a_way_out(tmp_path: Path, take) -> None:  # type: ignore[no-untyped-def]
    model = torch.nn.Linear(2, 2)
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        holder = torch.nn.Module()
        holder.tracker = tracker
        for thing in (tracker, holder):
            with pytest.raises(NotReadyError, match=r"ema\.state_dict\(\).*outside of the module"):
                take(thing)
        tracker.update_(model)  # still works


def continued(tmp_path: Path, before: dict, after: dict, first: int, last: int) -> Run:
    """Return a run of `first` steps that a tracker with other settings continues up to `last`."""
    early = trained(tmp_path / "run", first, **before)
    state = early.tracker.state_dict()
    early.tracker.close()
    late = Run(tmp_path / "run", **after)
    late.restore(early)
    late.tracker.load_state_dict(state)
    late.train(first + 1, last)
    return late


def test_another_stride_keeps_the_profile_exact(tmp_path: Path) -> None:
    run = continued(tmp_path, {}, {"update_every": 5, "checkpoint_every": 5}, 13, 40)
    for sigma_rel in (0.05, 0.28):
        run.check(sigma_rel, [*range(2, 13, 2), *range(15, 41, 5)])
    run.tracker.close()
    as_if_killed(tmp_path / "run")
    newest = read_directory(tmp_path / "run")[-1]
    assert (newest.max_interval, newest.t_first, newest.t) == (5, 2, 40)
    assert (newest.schedule.update_every, newest.schedule.checkpoint_every) == (5, 5)
    assert times(tmp_path / "run") == {10, 15, 20, 25, 30, 35, 40}


def test_a_profile_may_be_dropped_and_the_others_stay_exact(tmp_path: Path, ema: Ema) -> None:
    run = continued(tmp_path, {"sigma_rels": (0.05, 0.15, 0.28)}, {}, 21, 40)
    for sigma_rel in (0.05, 0.28):
        run.check(sigma_rel, list(range(2, 41, 2)))
    found = [(s.t, s.sigma_rel) for s in read_directory(tmp_path / "run")]
    assert [t for t, sigma_rel in found if sigma_rel == 0.15] == [10, 20]
    assert [t for t, sigma_rel in found if sigma_rel == 0.28] == [10, 20, 30, 40]
    run.tracker.close()
    assert ema("info", tmp_path / "run").code == 0  # which does not miss the dropped profile
    exact = exact_average([run.weights[t] for t in range(2, 21, 2)], 0.15, range(2, 21, 2))
    stored = PostHocEMA.from_path(tmp_path / "run").state_dict(sigma_rel=0.15, t=20)["0.weight"].double().numpy()
    assert np.abs(stored - exact).max() < 10 * 2**-24 * np.abs(exact).max() * 4
    with PostHocEMA.from_path(tmp_path / "run", run.model) as again:
        assert (again.step, again.settings.sigma_rels) == (40, (0.05, 0.28))


def test_a_profile_cannot_begin_in_mid_run_but_before_the_first_update(tmp_path: Path) -> None:
    early = trained(tmp_path / "early", 1)
    three = Run(tmp_path / "three", sigma_rels=(0.05, 0.1, 0.28))
    three.tracker.load_state_dict(early.tracker.state_dict())
    three.restore(early)
    three.train(2, 10)
    three.check(0.1, list(range(2, 11, 2)))
    early.train(2, 4)
    before = three.tracker.state_dict()
    message = r"sigma_rels: 0\.1 is none of the tracked ones, 0\.05, 0\.28: an average cannot begin in mid-run"
    with pytest.raises(InvalidValueError, match=message):
        three.tracker.load_state_dict(early.tracker.state_dict())
    assert same(three.tracker.state_dict(), before)


NOT_IN_BOTH = "is in the state or in the model, but not in both"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The state of a run after 4 steps; tests must not change it."""
    return trained(tmp_path_factory.mktemp("run"), 4).tracker.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"state: must come from state_dict\(\) .*, of version 6, not 2"),
        ({"t_unit": "images"}, r"state: counts time in 'images', this tracker in 'steps'"),
        ({"sigma_rels": [0.1, 0.2]}, r"0\.05 is none of the tracked ones, 0\.1"),
        ({"sigma_rels": [0.05, float("nan")]}, r"state: sigma_rels: must be a list, each a finite number"),
        ({"standing": {}}, r"state: inherited: must be one for each profile, not 0"),
        ({"clock": [0.5, 0.9, 1.1, 10**5000, 4.0]}, "state: clock: "),
        ({"high": {"0.05": {}, "0.28": {}}}, r"tensor '0\.bias': " + NOT_IN_BOTH),
        ({"mean": {"0.05": {}, "0.28": {}}}, r"tensor '0\.bias': " + NOT_IN_BOTH),
        ({"copies": {"more": torch.zeros(1)}}, NOT_IN_BOTH),
        (torch.zeros(2), r"tensor '0\.weight': is .* shape \[2\] in the state, not .* shape \[4, 3\]"),
        (torch.zeros(4, 3, dtype=torch.float16), r"tensor '0\.weight': is torch\.float16 .* in the state"),
        (torch.full((4, 3), float("nan")), r"tensor '0\.weight': .* holds nan or infinity"),
    ],
)
def test_an_altered_state_is_refused(tmp_path: Path, state: dict, change: dict | torch.Tensor, message: str) -> None:
    """The alteration is of an entry, or of one tensor."""
    tracker = trained(tmp_path, 3).tracker
    before, altered = tracker.state_dict(), copy.deepcopy(state)
    if isinstance(change, dict):
        altered |= change
    else:
        altered["high"]["0.28"]["0.weight"] = change
    with pytest.raises((InvalidValueError, ModelMismatchError, NonFiniteError), match=message) as refused:
        tracker.load_state_dict(altered)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert same(tracker.state_dict(), before)


def test_a_state_shares_no_memory_with_the_tracker(tmp_path: Path) -> None:
    run = trained(tmp_path, 4)
    state = run.tracker.state_dict()
    kept = copy.deepcopy(state)
    run.tracker.load_state_dict(state)
    run.train(5, 8)
    assert same(state, kept)
    live = run.live(0.28)
    for kind in ("high", "mean"):
        for tensor in state[kind]["0.28"].values():
            tensor.zero_()
    assert np.array_equal(run.live(0.28), live)
