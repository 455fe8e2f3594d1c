"""How a training continues: exactly, from the tracker's state; from snapshots of the model's
weights; or not at all.

A run continues at the newest time whose sample of raw weights equals the model's, or at a step that
the user names.
"""

import base64
import copy
import math
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import forked
import groups
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from ema_command import Ema
from factories import averages_in
from groups import check_group, truth
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from tracker.runs import Training, assert_near, contents, superseded, times, update

from posthoc_cli import PostHocEMA, PostHocError, Run
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    LockedError,
    MismatchError,
    ModelMismatchError,
    NonFiniteError,
    NotReadyError,
    WriteError,
)
from posthoc_cli.snapshots.snapshot import Snapshot

SETTINGS: dict[str, Any] = {
    "update_every": 2,
    "checkpoint_every": 10,
    "checkpoint_dtype": None,
}
OF_NO_SNAPSHOT = (
    r"model: its weights are those of no snapshot of .*restore the model's checkpoint.*resume=\d+"
)


def begin(model: nn.Module, folder: Path, **settings: Any) -> PostHocEMA:
    return PostHocEMA.from_model(model, folder, **SETTINGS | settings)


def resume(
    model: nn.Module,
    folder: Path,
    way: str = "from_model",
    **settings: Any,
) -> PostHocEMA:
    if way == "from_path":
        return PostHocEMA.from_path(folder, model)
    return begin(model, folder, resume="auto", **settings)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Path]:
    """A training of 100 steps, with snapshots at 10 times."""
    training = Training()
    folder = tmp_path_factory.mktemp("trained")
    with begin(training.model, folder) as ema:
        training.run(100, ema)
    return training, folder


@pytest.fixture
def finished(trained: tuple[Training, Path], tmp_path: Path) -> Training:
    shutil.copytree(trained[1], tmp_path, dirs_exist_ok=True)
    return trained[0].at(100)


def begun(folder: Path, last: int, **settings: Any) -> Training:
    training = Training()
    with begin(training.model, folder, **settings) as ema:
        return training.run(last, ema)


State = dict[str, Any]


def state_after(training: Training, last: int, ema: PostHocEMA, **options: Any) -> State:
    training.run(last, ema, **options)
    return ema.state_dict()


def remove(folder: Path, *times: float, sigma_rel: float = 0.28) -> None:
    for snapshot in Run(folder).snapshots:
        if snapshot.t in times and snapshot.sigma_rel == sigma_rel:
            snapshot.path.unlink()


# --- from the state


def test_a_run_may_be_interrupted_at_any_step(tmp_path: Path) -> None:
    """Snapshots, also where some were thinned, are then those of a run without interruption."""
    settings = {"checkpoint_every": 4, "max_checkpoints": 2, "device": "cpu"}
    last = 14
    training = Training()
    states = []
    with begin(training.model, tmp_path / "complete", **settings) as ema:
        for number in range(1, last + 1):
            training.run(number, ema)
            states.append(ema.state_dict())
            shutil.copytree(
                tmp_path / "complete",
                tmp_path / str(number),
                ignore=shutil.ignore_patterns(".ema*"),
            )
    for number, state in enumerate(states, 1):
        again = training.at(number)
        folder = tmp_path / str(number)
        with resume(again.model, folder, **settings) as ema:
            ema.load_state_dict(state)
            again.run(last, ema)
        assert contents(folder) == contents(tmp_path / "complete")


def test_an_abandoned_attempt_is_not_mixed_into_the_one_that_continues(tmp_path: Path) -> None:
    """Back to an early state and on to other weights, then from a late state of the first attempt,
    and so on."""
    training = Training()
    with begin(training.model, tmp_path) as ema:
        early = state_after(training, 15, ema)
        late = state_after(training, 35, ema)
        first = contents(tmp_path)
        ema.load_state_dict(early)
        other = training.at(15).run(45, ema, salt=1)
        of_other = ema.state_dict()
        ema.load_state_dict(late)
        training.at(35).run(50, ema)
    left = contents(tmp_path)
    for name in left.keys() & first.keys():
        assert left[name] == first[name]
    assert times(tmp_path) == {10, 40, 50}
    assert superseded(tmp_path) == 10
    ends = []
    for salt in (1, 2):  # the last snapshots of both are of the same time
        again = other.at(45)
        with resume(again.model, tmp_path) as ema:
            ema.load_state_dict(of_other)
            ends.append(state_after(again, 46, ema, salt=salt))
            assert again.error(ema) < 1e-6
        assert times(tmp_path) == {10, 46}
    with resume(again.model, tmp_path) as ema:
        ema.load_state_dict(ends[0])
        assert times(tmp_path) == {10}


SECOND_STEPS = range(2, 41, 2)
THREE = {"sigma_rels": (0.05, 0.15, 0.28)}


@pytest.mark.parametrize(
    ("before", "after", "updates"),
    [
        ({}, {"update_every": 5, "checkpoint_every": 5}, [*SECOND_STEPS[:11], 25, 30, 35, 40]),
        (THREE, {}, SECOND_STEPS),
        (THREE, {"sigma_rels": (0.15,)}, SECOND_STEPS),
    ],
)
@pytest.mark.parametrize("exactly", [True, False])
def test_a_resumed_run_takes_its_new_settings_and_stays_exact(
    tmp_path: Path,
    before: dict,
    after: dict,
    updates: range,
    exactly: bool,
    ema: Ema,
) -> None:
    """From its state, or from the last snapshots; profiles that are dropped end there."""
    training = Training()
    with begin(training.model, tmp_path, **before) as first:
        state = state_after(training, 22, first)
    training = training.at(22)
    with resume(training.model, tmp_path, **after) as second:
        assert second.step == 22
        if exactly:
            second.load_state_dict(state)
        training.run(40, second)
        assert training.error(second, updates) < 1e-6
        profiles = second.settings.sigma_rels
    # whose last snapshots the exact state does not list
    dropped = len(first.settings.sigma_rels) - len(profiles)
    assert superseded(tmp_path) == exactly * dropped
    check_settings(tmp_path, SETTINGS | after, profiles)
    assert ema("info", tmp_path).code == 0  # which does not miss the dropped profiles


def check_settings(folder: Path, wanted: dict, profiles: tuple[float, ...]) -> None:
    """Check that the newest snapshots and a new tracker have these settings."""
    *_, newest = snapshots = Run(folder).snapshots
    schedule = newest.schedule
    assert schedule.update_every == newest.max_interval == wanted["update_every"]
    assert schedule.checkpoint_every == wanted["checkpoint_every"]
    assert newest.t_first == 2
    assert newest.t == 40
    of_this_time = [s.sigma_rel for s in snapshots if s.t == 40]
    assert of_this_time == [*profiles]
    again = PostHocEMA.from_path(folder)
    assert again.step == 40
    assert again.settings.sigma_rels == profiles
    assert again.settings.schedule == schedule


def test_a_profile_cannot_begin_in_mid_run_but_before_the_first_update(tmp_path: Path) -> None:
    early = Training()
    with begin(early.model, tmp_path / "early") as ema:
        before = state_after(early, 1, ema)
        after = state_after(early, 4, ema)
    late = early.at(1)
    refused = r"sigma_rels: 0\.15 is none of the tracked ones, 0\.05, 0\.28"
    with begin(late.model, tmp_path / "late", **THREE) as ema:
        ema.load_state_dict(before)
        late.run(10, ema)
        assert late.error(ema) < 1e-6
        with pytest.raises(InvalidValueError, match=refused):
            ema.load_state_dict(after)
        assert late.error(ema) < 1e-6
    with pytest.raises(InvalidValueError, match=refused):
        resume(early.model, tmp_path / "early", **THREE)


@pytest.mark.filterwarnings("ignore")  # torch's, where there is no process group
@pytest.mark.parametrize(
    ("last", "scale"),
    [
        (1, 1.0),
        (15, 1.5),
    ],
)
def test_torch_distributed_checkpoint_keeps_all_of_the_state(
    tmp_path: Path,
    last: int,
    scale: float,
) -> None:
    """On the user's own clock, also where it equals the steps; fewer profiles may be loaded."""
    training = Training()
    with begin(training.model, tmp_path / "run", t_unit="images") as ema:
        expected = state_after(training, last, ema, scale=scale)
    assert isinstance(ema, Stateful)
    saved = tmp_path / "dcp"
    dcp.save({"ema": ema}, checkpoint_id=saved)
    again = training.at(last)
    folder = tmp_path / "fewer"
    with resume(again.model, folder, sigma_rels=(0.28,), t_unit="images") as fewer:
        dcp.load({"ema": fewer}, checkpoint_id=saved)
        found = fewer.state_dict()
        assert found["sigma_rels"] == [0.28]
        if last > 1:
            one = averages_in(found)
            other = averages_in(expected)
            assert same(one["0.28"], other["0.28"])
    with resume(again.model, tmp_path / "run", t_unit="images") as second:
        dcp.load({"ema": second}, checkpoint_id=saved)
        found = second.state_dict()
        # the end of the run has written more
        assert same(found, expected | {"snapshots": found["snapshots"]})
        again.run(20, second, scale=scale)
    complete = Training()
    with begin(complete.model, tmp_path / "complete", t_unit="images") as ema:
        complete.run(20, ema, scale=scale)
    assert contents(tmp_path / "run") == contents(tmp_path / "complete")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        same_keys = one.keys() == other.keys()
        return same_keys and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


NOT_IN_BOTH = "is in the state or in the model, but not in both"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"state: must come from state_dict\(\) .*, of version 7, not 2"),
        ({"t_unit": "images"}, r"state: counts time in 'images', this tracker in 'steps'"),
        ({"standing": {"t": float("nan")}}, r"state: standing: t: must be a finite number"),
        ({"step": -1}, "state: step: must be "),
        ({"high": {"0.05": {}, "0.28": {}}}, NOT_IN_BOTH),
        ({"copies": {"more": torch.zeros(1)}}, NOT_IN_BOTH),
        (
            torch.zeros(2),
            r"tensor '0\.weight': is .* shape \[2\] in the state, not .* shape \[24, 8\]",
        ),
        (
            torch.zeros(24, 8, dtype=torch.float16),
            r"tensor '0\.weight': is torch\.float16 .* in the state",
        ),
        (torch.full((24, 8), float("nan")), r"tensor '0\.weight': .* holds nan or infinity"),
        ({"run_id": "0" * 32}, "holds snapshots of run .*, this tracker is run 0000"),
    ],
)
def test_an_altered_state_or_one_of_another_run_is_refused(
    tmp_path: Path,
    change: dict | torch.Tensor,
    message: str,
) -> None:
    """The alteration is of an entry, or of one tensor."""
    training = begun(tmp_path, 10)
    with resume(training.model, tmp_path) as ema:
        training.run(11, ema)
        before = ema.state_dict()
        files = contents(tmp_path)
        altered = copy.deepcopy(before)
        if isinstance(change, dict):
            altered |= change
        else:
            altered["high"]["0.28"]["0.weight"] = change
        with pytest.raises(PostHocError, match=message) as refused:
            ema.load_state_dict(altered)
        assert isinstance(
            refused.value, InvalidValueError | ModelMismatchError | NonFiniteError | MismatchError
        )
        assert len(str(refused.value)) < 500
        assert same(ema.state_dict(), before)
        assert contents(tmp_path) == files


def test_a_state_shares_no_memory_with_the_tracker_and_needs_no_pickles(tmp_path: Path) -> None:
    training = Training()
    with begin(training.model, tmp_path) as ema:
        state = state_after(training, 4, ema)
        torch.save(state, tmp_path / "state.pt")
        kept = torch.load(tmp_path / "state.pt", weights_only=True)
        assert same(state, kept)
        ema.load_state_dict(state)
        training.run(8, ema)
        assert same(state, kept)
        kept = ema.state_dict()
        state = ema.state_dict()
        high = state["high"].values()
        mean = state["mean"].values()
        for own in (state["copies"], *high, *mean):
            for tensor in own.values():
                tensor.zero_()
        assert same(ema.state_dict(), kept)


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps])
def test_copying_or_pickling_a_tracker_is_an_error_with_a_way_out(
    tmp_path: Path,
    take: Any,
) -> None:
    holder = nn.Linear(2, 2)
    holder.tracker = begin(nn.Linear(2, 2), tmp_path)  # type: ignore[assignment]
    for thing in (holder.tracker, holder):
        with pytest.raises(NotReadyError, match=r"ema\.state_dict\(\).*outside of the module"):
            take(thing)


# --- from the snapshots of a time at which the network had the model's weights


@pytest.mark.parametrize(
    ("way", "weights"),
    [
        ("from_model", "first"),
        ("from_model", "next"),
        ("from_path", "half"),
    ],
)
def test_a_run_is_not_resumed_with_fresh_weights(
    finished: Training,
    tmp_path: Path,
    way: str,
    weights: str,
) -> None:
    """Nor with others that the network had at no time with snapshots, nor if there is but one such
    time."""
    training = finished.at(80)
    if weights == "first":
        for sigma_rel in (0.05, 0.28):
            remove(tmp_path, *range(20, 101, 10), sigma_rel=sigma_rel)
        training = Training()
    elif weights == "next":
        training.run(81)
    else:
        earlier = finished.path[69]["0.weight"]
        training.model[0].weight.data[:12] = earlier[:12]
    before = contents(tmp_path)
    ema = resume(training.model, tmp_path, way)
    for _ in range(2):  # every call raises the error
        with pytest.raises(ModelMismatchError, match=OF_NO_SNAPSHOT):
            ema.update_(training.model)
    assert contents(tmp_path) == before
    assert superseded(tmp_path) == 0
    ema.load_into(training.model, 0.15)  # any model may be filled


@pytest.mark.parametrize(
    ("way", "late"),
    [
        ("from_model", False),
        ("from_path", True),
        ("resume=40", True),
        ("step=40", False),
    ],
)
def test_an_earlier_checkpoint_resumes_from_its_own_step(
    finished: Training,
    tmp_path: Path,
    way: str,
    late: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The checkpoint may be loaded after the tracker was made. Later snapshots are set aside."""
    again = finished.at(40)
    checkpoint = finished.path[39]
    if late:
        again.model.load_state_dict(finished.path[-1])
    if way == "step=40":
        ema = PostHocEMA.from_path(tmp_path, again.model, step=40)
    elif way == "resume=40":
        ema = begin(again.model, tmp_path, resume=40)
    else:
        ema = resume(again.model, tmp_path, way)
    again.model.load_state_dict(checkpoint)
    state = ema.state_dict()
    assert ema.step == state["step"] == 40
    assert_near(ema.state_dict(0.28), averages_in(state)["0.28"])
    assert len(times(tmp_path)) == 10
    with ema:
        again.run(105, ema, salt=1)
        assert again.error(ema) < 1e-6
    assert times(tmp_path) == {*range(10, 101, 10), 104}
    assert superseded(tmp_path) == 12
    assert "training continues from t = 40: 12 snapshots, later, of another attempt" in caplog.text


def test_the_last_checkpoint_that_was_loaded_decides(finished: Training, tmp_path: Path) -> None:
    """A script may build its tracker with one checkpoint, and load another one before it trains."""
    again = finished.at(40)
    ema = resume(again.model, tmp_path)
    again.model.load_state_dict(finished.path[-1])
    assert ema.step == 100
    copy.deepcopy(again.model).load_state_dict(finished.path[39])
    assert ema.step == 100
    again.model.load_state_dict(finished.path[48])
    with pytest.raises(ModelMismatchError, match=OF_NO_SNAPSHOT):
        ema.update_(again.model)


def test_a_checkpoint_in_half_precision_or_weights_that_do_not_move_resume(
    finished: Training,
    tmp_path: Path,
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        again = finished.at(80)
        again.model.to(dtype).float()
        assert resume(again.model, tmp_path).step == 80
    for last in (10, 20, 30):
        with resume(finished.model, tmp_path / "still") as ema:
            update(ema, finished.model, 10)
            assert ema.step == last


@pytest.mark.parametrize("every", [1, 10])
def test_a_snapshot_on_request_is_a_place_to_resume_from(tmp_path: Path, every: int) -> None:
    """Between two updates it takes in the weights, with the true interval."""
    first = Training()
    with begin(first.model, tmp_path, update_every=every) as ema:
        first.run(25, ema)
        ema.snapshot()
        ema.snapshot()  # a second call has nothing to add
        first.run(40, ema)
    again = first.at(25)
    with resume(again.model, tmp_path, update_every=every) as ema:
        assert ema.step == 25
        again.run(50, ema, salt=1)
        updates = {25, *range(every, 51, every)}
        assert again.error(ema, sorted(updates)) < 1e-6


def test_a_time_that_lacks_a_profile_is_none_to_resume_from(
    finished: Training,
    tmp_path: Path,
) -> None:
    """Its snapshots are set aside."""
    remove(tmp_path, 100)
    ema = resume(finished.model, tmp_path)
    with pytest.raises(ModelMismatchError, match=OF_NO_SNAPSHOT):
        finished.run(101, ema)
    message = r"resume 100: this call of update_ has no snapshot"
    with pytest.raises(InvalidValueError, match=message):
        begin(finished.model, tmp_path, resume=100)
    again = finished.at(90)
    with resume(again.model, tmp_path) as ema:
        assert ema.step == 90
        again.run(120, ema, salt=1)
        assert again.error(ema) < 1e-6
    assert superseded(tmp_path) == 1


def test_a_late_snapshot_that_is_left_alone_is_no_beginning(
    finished: Training,
    tmp_path: Path,
) -> None:
    remove(tmp_path, *range(10, 101, 10), sigma_rel=0.05)
    remove(tmp_path, *range(10, 100, 10))
    reason = "resume: no call of update_ has snapshots of all profiles"
    with pytest.raises(InvalidValueError, match=reason):
        resume(finished.model, tmp_path)


def test_a_run_that_was_killed_while_it_wrote_its_first_snapshots_begins_again(
    tmp_path: Path,
) -> None:
    """With its warm-up."""
    begun(tmp_path, 40, update_after_step=35)
    remove(tmp_path, 40)
    new = Training()
    with resume(new.model, tmp_path, update_after_step=35) as ema:
        assert ema.step == 0
        new.run(42, ema)
        assert new.error(ema, [36, 38, 40, 42]) < 1e-6
    assert times(tmp_path) == {40, 42}
    assert superseded(tmp_path) == 1


def test_thinning_keeps_the_same_times_of_all_profiles(tmp_path: Path) -> None:
    """Of a training that moves unevenly, and is stopped off the schedule now and then."""
    training = Training()
    for last in (37, 52, 100):
        options = {"max_checkpoints": 5, "sigma_rels": (0.03, 0.1, 0.28)}
        with resume(training.model, tmp_path, **options) as ema:
            training.run(last, ema, scale=3.0)
            profiles = Counter(snapshot.t for snapshot in ema.run.snapshots)
            assert set(profiles.values()) == {3}
            assert len(profiles) <= 6


@pytest.mark.parametrize(
    ("way", "weights"),
    [
        ("step", 54),
        ("state last", 54),
        ("state first", 40),
        ("own clock", 54),
    ],
)
def test_a_model_that_is_not_the_network_that_is_continued_is_one_warning(
    tmp_path: Path,
    way: str,
    weights: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The averages are those of step 40, of a state or of a step that the user names, and exact
    for the weights that the updates saw; the model's weights may be later."""
    settings: dict = {}
    scale = 0.0
    if way == "own clock":
        settings = {"t_unit": "images"}
        scale = 10.0
    training = Training()
    with begin(training.model, tmp_path, **settings) as ema:
        state = state_after(training, 40, ema, scale=scale)
        training.run(54, ema, scale=scale)
    again = training.at(10)
    saved = training.path[weights - 1]
    if way != "state first":
        again.model.load_state_dict(saved)
    settings["resume"] = 40 if way == "step" else "auto"
    with begin(again.model, tmp_path, **settings) as ema:
        if way != "step":
            ema.load_state_dict(state)
        if way == "state first":
            again.model.load_state_dict(saved)
        assert ema.state_dict()["weights"] == state["weights"]
        again.path = training.path[:40]
        again.run(42, ema, scale=scale)
        assert again.error(ema) < 1e-6
        assert ema.state_dict(0.05).predicted_error < 1e-6
    said = "the averages continue from step 40; the model has other weights than the network"
    assert caplog.text.count(said) == (weights == 54)


@pytest.mark.parametrize("dtype", ["float16", None])
def test_rounded_snapshots_that_a_run_resumes_from_are_one_warning(
    tmp_path: Path,
    dtype: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = Training()
    for last in (20, 25):
        with resume(training.model, tmp_path, checkpoint_dtype=dtype) as ema:
            training.run(last, ema)
    said = "the averages continue from step 20, rounded as its snapshots are, which predicted err"
    assert caplog.text.count(said) == (dtype is not None)


@pytest.mark.parametrize(
    ("device", "last", "at"),
    [
        ("cpu", 80, 80),
        ("model", 77, 76),
    ],
)
def test_a_header_holds_the_weights_and_the_average_of_its_time(
    tmp_path: Path,
    device: str,
    last: int,
    at: int,
) -> None:
    """The format defines the elements of the sample. A snapshot off the schedule holds those of the
    last update."""
    training = begun(tmp_path, last, device=device, buffers="copy")
    newest = Run(tmp_path).snapshots[-1]
    assert newest.t == at
    raw = training.path[at - 1]
    average = load_file(newest.path)
    expected: list[list[float]] = [[], []]  # of the weights and the average
    for name, places in sampled(newest).items():
        expected[0] += raw[name].reshape(-1)[places].tolist()
        expected[1] += average[name].reshape(-1)[places].tolist()
    sample = np.frombuffer(base64.b64decode(newest.sample), "<f4")
    assert sample.reshape(2, -1).tolist() == expected


def sampled(snapshot: Snapshot) -> dict[str, list[int]]:
    """Return the elements of the sample, by the name of the tensor."""
    names = sorted(snapshot.averages)
    places = {name: set[int]() for name in names}
    for k in range(512):
        name = names[k * len(names) // 512]
        drawn = xxhash.xxh3_64_intdigest(f"{k}/{name}".encode())
        places[name].add(drawn % math.prod(snapshot.entries[name].shape))
    return {name: sorted(own) for name, own in places.items()}


SHARDED = """
from posthoc_cli.errors import ModelMismatchError
kind, *numbers = arguments
model = spread(Net(), kind)
for first, weights, last, expected in zip(*[map(int, numbers)] * 4):
    if weights:
        move(model, weights)
    with PostHocEMA.from_model(model, folder / "run", **SETTINGS, resume="auto") as ema:
        for step in range(first, last + 1):
            move(model, step)
            if expected < 0:
                refused(lambda: ema.update_(model), ModelMismatchError)
                break
            ema.update_(model)
            if step == first:
                assert ema.step == expected + 1, ema.step
"""


def test_processes_decide_together_with_the_samples_of_another_arrangement(tmp_path: Path) -> None:
    """The walk at step 8 resumes from there, not from 12; that at step 1,000 is refused. One
    process goes on at the end."""
    refused = (1_000, 0, 1_001, -1)
    resumed = (9, 8, 16, 8)
    check_group(SHARDED, 2, tmp_path, "tp", 1, 0, 16, 0)
    for out in check_group(SHARDED, 3, tmp_path, "fsdp", *refused, *resumed):
        assert "are those of no snapshot of the run" in out
    net = groups.Net()
    groups.move(net, 16)
    with PostHocEMA.from_model(net, tmp_path / "run", **groups.SETTINGS, resume="auto") as ema:
        groups.train(net, 17, 20, ema)
    run = Run(tmp_path / "run")
    for width in (0.1, 0.2):
        for last in (16, 20):
            exact = truth(width, [*range(2, last + 1, 2)])
            assert_near(run.average(width, t=last), exact, within=2e-6)


# --- who may write


WAYS_TO_RESUME = (
    r"restore the model's checkpoint first, .*resume='auto'.*; for a new run resume=0, .* "
    r"another directory; .*load_state_dict.*resume=10 .*step=10\)$"
)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({}, MismatchError, WAYS_TO_RESUME),
        (
            {"resume": "auto", "t_unit": "images"},
            InvalidValueError,
            r"t_unit 'images': the run in .* counts",
        ),
        ({"resume": "yes"}, InvalidValueError, "resume 'yes': must be 'auto', to go on"),
        ({"resume": -1}, InvalidValueError, "resume -1: must be a whole number"),
        ({"resume": 3.5}, InvalidValueError, r"resume 3\.5: must be a whole number"),
        (
            {"resume": 5},
            InvalidValueError,
            "resume 5: this call of update_ has no snapshot; calls .* one: 10",
        ),
    ],
)
def test_a_run_that_does_not_fit_is_refused_at_once(
    tmp_path: Path,
    wrong: dict,
    kind: type[PostHocError],
    message: str,
) -> None:
    model = begun(tmp_path, 10).model
    before = contents(tmp_path)
    with pytest.raises(kind, match=message) as raised:
        begin(model, tmp_path, **wrong)
    assert isinstance(raised.value, ValueError)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_or_read_is_refused_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Training().model
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    for name in ("file", "file/run", "nowhere"):
        with pytest.raises(DirectoryError, match="is not a directory"):
            begin(model, tmp_path / name)
    with pytest.raises(WriteError, match="aaa: cannot be written: file name too long"):
        begin(model, tmp_path / ("a" * 300))
    with pytest.raises(DirectoryError, match="no such directory"):
        begin(model, tmp_path / "new", resume=10)
    for name in ("absent", "empty"):
        with pytest.raises(DirectoryError, match=name):
            PostHocEMA.from_path(tmp_path / name)
    access = Mock(return_value=False)
    monkeypatch.setattr(os, "access", access)  # root may write everywhere
    with pytest.raises(DirectoryError, match=f"{tmp_path.name}: cannot be written to"):
        begin(model, tmp_path / "new" / "run")
    access.assert_called_once_with(tmp_path, os.W_OK | os.X_OK)


def test_another_model_is_refused_at_once_and_a_frozen_one_read(tmp_path: Path) -> None:
    training = begun(tmp_path, 10)
    model = training.model
    other = nn.Linear(3, 4)
    message = r"is of another model; use its model, or another directory$"
    with pytest.raises(ModelMismatchError, match=message):
        resume(other, tmp_path)
    with pytest.raises(ModelMismatchError, match=message):
        PostHocEMA.from_path(tmp_path, other)
    PostHocEMA.from_path(tmp_path, model.requires_grad_(False))  # for an evaluation
    with PostHocEMA.from_path(tmp_path, model.requires_grad_(True)) as third:  # no lock was taken
        training.run(12, third)


def test_a_directory_in_which_a_tracker_of_this_process_writes_is_refused_to_others(
    tmp_path: Path,
) -> None:
    """To a new run, and to another model. A closed run continues at the model's weights."""
    training = Training()
    first = begin(training.model, tmp_path)
    training.run(9, first)  # there is no snapshot yet
    writes = r"another tracker of this process .* is writing here; "
    with pytest.raises(LockedError, match=writes):
        begin(training.model, tmp_path).update_(training.model)
    first.snapshot()
    with pytest.raises(MismatchError, match=r"up to step 9; restore the model.*resume='auto'"):
        begin(training.model, tmp_path)
    # that the training goes on is said before any other reason
    for other in (training.at(9), Training(1)):
        with pytest.raises(LockedError, match=writes):
            resume(other.model, tmp_path, "from_path").update_(other.model)
    first.close()
    with resume(training.model, tmp_path) as tracker:
        training.run(35, tracker)
        assert tracker.state_dict()["standing"]["updates"] == 18  # at 2, 4, ..., 34, and at 9
    assert repr(tracker) == f"PostHocEMA({str(tmp_path)!r}, step 35, sigma_rels 0.05, 0.28, closed)"


WRITER = """
import sys, torch
from posthoc_cli import PostHocEMA
from tracker.runs import Training
training = Training()
tracker = PostHocEMA.from_model(training.model, sys.argv[1], update_every=2, checkpoint_every=10)
training.run(10, tracker)
tracker.flush()
print("ready", flush=True)
"""


def test_one_writer_and_any_number_of_readers(tmp_path: Path) -> None:
    """Also in other processes, whose death releases the directory; so does the end of a tracker."""
    training = Training()
    with forked.waiting(WRITER, tmp_path) as holder:
        training.run(10)
        reader = PostHocEMA.from_path(tmp_path, training.model)
        other = PostHocEMA.from_path(tmp_path, training.model)
        assert reader.state_dict(0.15).keys() == training.path[0].keys()
        with pytest.raises(LockedError, match=f"process {holder.pid} on "):
            reader.update_(training.model)
        holder.kill()
        holder.wait()
    training.run(21, reader)
    assert other.step == 10
    reader.close()
    training = training.at(10)
    training.run(11, other)
    assert superseded(tmp_path) == 2  # of step 20
    del other  # a garbage-collected tracker releases the directory
    with PostHocEMA.from_path(tmp_path, training.model, step=10) as again:
        again.update_(training.model)


def test_a_closed_tracker_reads_but_does_not_write(tmp_path: Path) -> None:
    training = Training()
    with begin(training.model, tmp_path) as ema:
        state = state_after(training, 10, ema)
        assert not ema.closed
    ema.close()
    assert ema.closed
    assert ema.state_dict(0.15).keys() == training.path[0].keys()
    for call in (
        lambda: ema.update_(training.model),
        lambda: ema.load_state_dict(state),
        ema.snapshot,
    ):
        with pytest.raises(NotReadyError, match="was closed"):
            call()
    assert times(tmp_path) == {10}


@pytest.mark.parametrize("way", ["load_state_dict", "from_path"])
def test_a_failing_resume_releases_the_directory(
    finished: Training,
    tmp_path: Path,
    way: str,
) -> None:
    (tmp_path / "superseded").write_text("a file where the folder should be")
    again = finished.at(10)
    failed = PostHocEMA.from_path(tmp_path, again.model, step=10)
    state = failed.state_dict()
    in_the_way = r"superseded: is a link or no directory; .* move it away"
    with pytest.raises(DirectoryError, match=in_the_way):
        if way == "load_state_dict":
            failed.load_state_dict(state)
        else:
            failed.update_(again.model)
    (tmp_path / "superseded").unlink()
    # although `failed` still exists
    with PostHocEMA.from_path(tmp_path, again.model, step=10) as ema:
        again.run(12, ema)
        assert again.error(ema) < 1e-6


@pytest.mark.parametrize(
    "sigma_rels",
    [
        (0.05, 0.28),
        (0.1, 0.2),
    ],
)
def test_a_training_killed_before_its_first_checkpoint_is_told_to_begin_anew_and_does(
    tmp_path: Path,
    sigma_rels: tuple[float, ...],
) -> None:
    """A script runs again, with weights of its beginning, which no snapshot has."""
    training = Training()
    with begin(training.model, tmp_path) as ema:
        training.run(13, ema)
    training = Training()
    tracker = resume(training.model, tmp_path)
    training.run(1)
    anew = r"\); to begin anew say resume=0, which sets the snapshots aside; else restore "
    with pytest.raises(ModelMismatchError, match=anew):
        tracker.update_(training.model)
    with pytest.raises(MismatchError, match=r"for a new run resume=0, "):
        begin(training.model, tmp_path)
    training = Training(seed=1)
    with begin(training.model, tmp_path, resume=0, sigma_rels=sigma_rels) as ema:
        assert not ema.has_average
        assert times(tmp_path) == {10, 12}
        training.run(20, ema)
        assert ema.step == 20
        assert training.error(ema) < 1e-6
    assert times(tmp_path) == {10, 20}
    assert superseded(tmp_path) == 4
    assert {s.sigma_rel for s in Run(tmp_path).snapshots} == {*sigma_rels}


def test_a_new_beginning_takes_any_model_and_an_empty_directory(tmp_path: Path) -> None:
    training = Training()
    with begin(training.model, tmp_path / "run", resume=0) as ema:
        training.run(12, ema)
    other = nn.Linear(3, 2)
    with begin(other, tmp_path / "run", resume=0, t_unit="images") as ema:
        for t in (10.0, 20.0, 30.0, 40.0):
            ema.update_(other, t=t)
    assert times(tmp_path / "run") == {40}
    assert Run(tmp_path / "run").average(0.1).keys() == {"weight", "bias"}


def test_a_relative_directory_in_a_deleted_working_directory_is_an_error_of_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    model = torch.nn.Linear(2, 2)
    with pytest.raises(InvalidValueError, match="checkpoint_dir run: is relative to the working"):
        PostHocEMA.from_model(model, "run")
    PostHocEMA.from_model(model, tmp_path / "run").update_(model)
