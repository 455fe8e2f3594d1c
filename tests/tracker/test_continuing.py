"""How a training continues: exactly, from the tracker's state; from snapshots of the model's
weights; or not at all.

A run continues at the newest time whose sample of raw weights equals the model's, or at a step that
the user names.
"""

import base64
import copy
import json
import math
import os
import shutil
from unittest.mock import Mock

import forked
import groups
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from checking import refused
from factories import averages_in, forge, info_of
from groups import check_group, truth
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from tracker.runs import Training, assert_near, contents, steps, superseded, times, update

from posthoc_cli import PostHocEMA, PostHocError, Run
from posthoc_cli.errors import (
    DirectoryError,
    LockedError,
    MismatchError,
    ModelMismatchError,
    RefusedCallError,
)

SETTINGS = {
    "update_every": 2,
    "checkpoint_every": 10,
    "checkpoint_dtype": None,
}


def begin(model, folder, **settings):
    return PostHocEMA.from_model(model, folder, **SETTINGS | settings)


def resume(model, folder, **settings):
    return begin(model, folder, resume="auto", **settings)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A training of 100 steps, with snapshots at 10 times."""
    training = Training()
    folder = tmp_path_factory.mktemp("trained")
    with begin(training.model, folder) as ema:
        training.run(100, ema)
    return training, folder


@pytest.fixture
def finished(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path, dirs_exist_ok=True)
    return trained[0].at(100)


def begun(folder, last, **settings):
    training = Training()
    with begin(training.model, folder, **settings) as ema:
        return training.run(last, ema)


def state_after(training, last, ema, **options):
    training.run(last, ema, **options)
    return ema.state_dict()


def remove(folder, *times, sigma_rel=0.28):
    for snapshot in Run(folder).snapshots:
        if snapshot.t in times and snapshot.sigma_rel == sigma_rel:
            snapshot.path.unlink()


# --- from the state


def test_a_run_may_be_interrupted_at_any_step(tmp_path):
    """Snapshots, also where some were thinned, are then those of a run without interruption. The
    program makes its tensors elsewhere."""
    settings = {"checkpoint_every": 4, "max_checkpoints": 2, "device": "cpu"}
    training = Training()
    states = []
    with begin(training.model, tmp_path / "complete", **settings) as ema:
        for number in range(1, 15):
            states.append(state_after(training, number, ema))
            shutil.copytree(
                tmp_path / "complete",
                tmp_path / str(number),
                ignore=shutil.ignore_patterns(".ema*"),
            )
    for number, state in enumerate(states, 1):
        again = training.at(number)
        folder = tmp_path / str(number)
        with resume(again.model, folder, **settings) as ema:
            with torch.device("meta"):
                ema.load_state_dict(state)
            again.run(14, ema)
        assert contents(folder) == contents(tmp_path / "complete")


@pytest.mark.parametrize("exactly", [True, False])
def test_a_resumed_run_takes_its_new_settings_and_stays_exact(tmp_path, exactly, ema):
    """From its state, or from the last snapshots; profiles that are dropped end there."""
    training = Training()
    with begin(training.model, tmp_path, sigma_rels=(0.05, 0.15, 0.28)) as first:
        state = state_after(training, 22, first)
    again = training.at(22)
    settings = {"update_every": 5, "checkpoint_every": 5, "sigma_rels": (0.15,)}
    with resume(again.model, tmp_path, **settings) as second:
        assert second.step == 22
        if exactly:
            second.load_state_dict(state)
        again.run(40, second)
        assert again.error(second, [*range(2, 23, 2), 25, 30, 35, 40]) < 1e-6
    assert superseded(tmp_path) == 0
    newest = Run(tmp_path).snapshots[-1]
    assert newest.schedule.update_every == newest.schedule.checkpoint_every == 5
    assert ema("info", tmp_path).code == 0  # which does not miss the dropped profiles


def test_a_profile_cannot_begin_in_mid_run(tmp_path):
    training = Training()
    with begin(training.model, tmp_path / "early") as ema:
        state = state_after(training, 4, ema)
    more = {"sigma_rels": (0.05, 0.15)}
    with refused("sigma_rels", "0.15"):
        resume(training.model, tmp_path / "early", **more)
    late = begin(training.model, tmp_path / "late", **more)
    with refused("sigma_rels", "0.15"):
        late.load_state_dict(state)


@pytest.mark.filterwarnings("ignore")  # torch's, where there is no process group
def test_torch_distributed_checkpoint_keeps_all_of_the_state(tmp_path):
    """On the user's own clock, also where it equals the steps."""
    training = Training()
    with begin(training.model, tmp_path, t_unit="images") as ema:
        state = state_after(training, 15, ema, scale=1.0)
        assert isinstance(ema, Stateful)
        dcp.save({"ema": ema}, checkpoint_id=tmp_path / "dcp")
    with resume(training.model, tmp_path, t_unit="images") as ema:
        dcp.load({"ema": ema}, checkpoint_id=tmp_path / "dcp")
        assert same(ema.state_dict(), state)
        training.run(20, ema, scale=1.0)


@pytest.mark.filterwarnings("ignore")  # torch's, where there is no process group
def test_a_state_with_fewer_fields_is_loaded_by_torch_distributed_checkpoint(tmp_path):
    """As an earlier version wrote it: a field that its record lacks has the default."""
    training = Training()
    with begin(training.model, tmp_path) as ema:
        state = state_after(training, 15, ema)
    record = json.loads(state["info"])
    assert record.pop("weights")
    state["info"] = json.dumps(record)
    dcp.save({"ema": state}, checkpoint_id=tmp_path / "dcp")
    with resume(training.model, tmp_path) as ema:
        dcp.load({"ema": ema}, checkpoint_id=tmp_path / "dcp")
        assert ema.step == 15
        training.run(20, ema)
        assert training.error(ema, range(2, 21, 2)) < 1e-6


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.mark.parametrize(
    ("change", "subject", "fact"),
    [
        ({"version": 2}, "state", "2"),
        ({"info": {"t_unit": "images"}}, "state", "'images'"),
        ({"info": {"last": {"step": 2, "t": float("nan")}}}, "state", "last: t"),
        ({"copies": {"more": torch.zeros(1)}}, "tensor '1.num_batches_tracked'", ""),
        (torch.zeros(2), "tensor '0.weight'", "[2]"),
        (torch.zeros(24, 8, dtype=torch.float16), "tensor '0.weight'", "float16"),
        (torch.full((24, 8), float("nan")), "tensor '0.weight'", "nan"),
        ({"info": {"run_id": "0" * 32}}, "", "0000"),
    ],
)
def test_an_altered_state_or_one_of_another_run_is_refused(tmp_path, change, subject, fact):
    """The alteration is of an entry, or of one tensor."""
    training = begun(tmp_path, 10)
    with resume(training.model, tmp_path) as ema:
        training.run(11, ema)
        before = ema.state_dict()
        files = contents(tmp_path)
        altered = copy.deepcopy(before)
        if isinstance(change, dict):
            if "info" in change:
                info = json.loads(before["info"]) | change["info"]
                change = {"info": json.dumps(info)}
            altered |= change
        else:
            altered["high"]["0.28"]["0.weight"] = change
        with refused(subject or tmp_path, fact, kind=PostHocError):
            ema.load_state_dict(altered)
        assert same(ema.state_dict(), before)
        assert contents(tmp_path) == files


def test_a_state_shares_no_memory_with_the_tracker_and_needs_no_pickles(tmp_path):
    training = Training()
    with begin(training.model, tmp_path) as ema:
        state = state_after(training, 4, ema)
        torch.save(state, tmp_path / "state.pt")
        kept = torch.load(tmp_path / "state.pt", weights_only=True)
        ema.load_state_dict(state)
        training.run(8, ema)
        assert same(state, kept)
        later = ema.state_dict()
        for tensor in ema.state_dict()["high"]["0.28"].values():
            tensor.zero_()
        assert same(ema.state_dict(), later)


def test_copying_or_pickling_a_tracker_is_an_error_with_a_way_out(tmp_path):
    """As where it is a part of a model."""
    tracker = begin(nn.Linear(2, 2), tmp_path)
    with refused("PostHocEMA", kind=RefusedCallError):
        copy.deepcopy(tracker)


# --- from the snapshots of a time at which the network had the model's weights


def test_a_run_is_not_resumed_with_fresh_weights(finished, tmp_path):
    """Nor with others that the network had at no time with snapshots."""
    mixed = finished.at(80).model
    mixed[0].weight.data[:12] = finished.path[69]["0.weight"][:12]
    before = contents(tmp_path)
    for model in (Training().model, finished.at(81).model, mixed):
        ema = resume(model, tmp_path)
        for _ in range(2):  # every call raises the error
            with refused("model", kind=ModelMismatchError):
                ema.update_(model)
        ema.load_into(model, 0.15)  # any model may be filled
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", [40, "auto"])
def test_an_earlier_checkpoint_resumes_from_its_own_step(finished, tmp_path, step, caplog):
    """Later snapshots are set aside."""
    again = finished.at(40)
    ema = begin(again.model, tmp_path, resume=step)
    state = ema.state_dict()
    assert ema.step == info_of(state)["step"] == 40
    assert_near(ema.state_dict(0.28), averages_in(state)["0.28"])
    assert len(times(tmp_path)) == 10
    with ema:
        again.run(105, ema, salt=1)
        assert again.error(ema) < 1e-6
    assert times(tmp_path) == {*range(10, 101, 10), 104}
    assert superseded(tmp_path) == 12
    assert "continues from t = 40: 12 later snapshots" in caplog.text


def test_a_checkpoint_in_half_precision_or_weights_that_do_not_move_resume(finished, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        again = finished.at(80)
        again.model.to(dtype).float()
        assert resume(again.model, tmp_path).step == 80
    for last in (10, 20, 30):
        with resume(finished.model, tmp_path / "still") as ema:
            update(ema, finished.model, 10)
            assert ema.step == last


def test_a_snapshot_on_request_is_a_place_to_resume_from(tmp_path):
    """Between two updates it takes in the weights, with the true interval."""
    first = Training()
    with begin(first.model, tmp_path, update_every=10) as ema:
        first.run(25, ema)
        ema.snapshot()
        ema.snapshot()  # a second call has nothing to add
        first.run(40, ema)
    again = first.at(25)
    with resume(again.model, tmp_path, update_every=10) as ema:
        again.run(50, ema, salt=1)
        assert again.error(ema, [10, 20, 25, 30, 40, 50]) < 1e-6


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("step", [15, 20])
def test_a_snapshot_on_request_is_kept_until_the_next_request(tmp_path, step, most):
    """On the schedule, when its snapshots are there already, or off it; also in continued runs,
    which come back to the user's own checkpoint twice, and however few snapshots are kept."""
    settings = {"max_checkpoints": most}
    training = Training()
    with begin(training.model, tmp_path, **settings) as ema:
        training.run(step, ema)
        ema.snapshot()
        training.run(100, ema)
        ema.snapshot(keep=False)  # as for an evaluation
        training.run(120, ema)
    for salt in (1, 2):
        again = training.at(step)
        with resume(again.model, tmp_path, **settings) as ema:
            again.run(90, ema, salt=salt)
            assert ema.step == 90
        assert step in steps(tmp_path)
        assert len(times(tmp_path)) == max(most, 2)
    with resume(again.model, tmp_path, **settings) as ema:
        ema.update_(again.model)
        ema.snapshot()
        update(ema, again.model, 70)
    assert 91 in steps(tmp_path)
    assert len(times(tmp_path)) == max(most, 2)
    if most < 4:
        assert step not in steps(tmp_path)


def test_a_resume_needs_a_time_with_all_profiles(finished, tmp_path):
    """Its snapshots are set aside."""
    remove(tmp_path, 100)
    ema = resume(finished.model, tmp_path)
    with refused("model", kind=ModelMismatchError):
        finished.run(101, ema)
    with refused("resume 100"):
        begin(finished.model, tmp_path, resume=100)
    again = finished.at(90)
    with resume(again.model, tmp_path) as ema:
        again.run(102, ema)
        assert again.error(ema) < 1e-6
    assert superseded(tmp_path) == 1
    remove(tmp_path, *range(10, 103))
    with refused("resume"):
        resume(finished.model, tmp_path)


def test_a_run_that_was_killed_while_it_wrote_its_first_snapshots_begins_again(tmp_path):
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


OTHER_NETWORK = "the averages continue from step 40; the model has other weights"


def test_a_step_continues_whatever_the_weights_with_one_warning(finished, tmp_path, caplog):
    again = finished.at(54)
    with begin(again.model, tmp_path, resume=40) as ema:
        again.path = finished.path[:40]
        again.run(42, ema)
        assert again.error(ema) < 1e-6
    assert caplog.text.count(OTHER_NETWORK) == 1


@pytest.mark.parametrize("restored", [40, 54])
def test_a_state_is_exact_whatever_the_weights_with_one_warning(tmp_path, restored, caplog):
    """With those of the state's own step there is none."""
    training = Training()
    with begin(training.model, tmp_path, t_unit="images") as ema:
        state = state_after(training, 40, ema, scale=10.0)
        training.run(54, ema, scale=10.0)
    again = training.at(restored)
    with resume(again.model, tmp_path, t_unit="images") as ema:
        ema.load_state_dict(state)
        again.path = training.path[:40]
        again.run(42, ema, scale=10.0)
        assert again.error(ema) < 1e-6
    assert caplog.text.count(OTHER_NETWORK) == (restored == 54)


def test_rounded_snapshots_that_a_run_resumes_from_are_one_warning(tmp_path, caplog):
    training = begun(tmp_path, 20, checkpoint_dtype="float16")
    with resume(training.model, tmp_path) as ema:
        training.run(25, ema)
    assert caplog.text.count("the averages continue from step 20, rounded") == 1


def test_a_header_holds_the_weights_of_its_time(tmp_path):
    """The format defines the elements of the sample. A snapshot off the schedule holds those of the
    last update."""
    training = begun(tmp_path, 77, device="cpu", buffers="copy")
    newest = Run(tmp_path).snapshots[-1]
    sample = np.frombuffer(base64.b64decode(newest.sample), "<f4")
    assert sample.tolist() == values_of_sample(newest, training.path[75])


def values_of_sample(snapshot, tensors):
    values = []
    for name, places in sampled(snapshot).items():
        values += tensors[name].reshape(-1)[places].tolist()
    return values


def test_a_run_goes_on_from_snapshots_of_format_3_and_of_4(tmp_path, caplog):
    """In format 3 the sample also had the values of the average, after those of the network."""
    training = begun(tmp_path, 20)
    for snapshot in Run(tmp_path).snapshots:
        of_network = values_of_sample(snapshot, training.path[snapshot.step - 1])
        of_average = values_of_sample(snapshot, load_file(snapshot.path))
        both = np.array(of_network + of_average, "<f4").tobytes()
        sample = json.dumps(base64.b64encode(both).decode())
        if snapshot.step == 20:
            forge(snapshot.path, {"format": "3", "sample": sample})
    with resume(training.model, tmp_path) as ema:
        assert ema.step == 20
        training.run(30, ema)
    assert ema.state_dict(0.15).t == 30
    at_20 = training.at(20)
    with resume(at_20.model, tmp_path) as ema:
        assert ema.step == 20
    assert "other weights" not in caplog.text


def sampled(snapshot):
    """Return the elements of the sample, by the name of the tensor."""
    names = sorted(snapshot.averaged)
    places = {name: set() for name in names}
    for k in range(512):
        name = names[k * len(names) // 512]
        drawn = xxhash.xxh3_64_intdigest(f"{k}/{name}".encode())
        places[name].add(drawn % math.prod(snapshot.entries[name].shape))
    return {name: sorted(own) for name, own in places.items()}


SHARDED = """
kind, weights, first, last = arguments[0], *map(int, arguments[1:])
model = spread(Net(), kind)
move(model, weights)
with PostHocEMA.from_model(model, folder / "run", **SETTINGS, resume="auto") as ema:
    if weights == 1_000:
        refused(lambda: ema.update_(model))
    else:
        train(model, first, first, ema)
        assert ema.step == first, ema.step
        train(model, first + 1, last, ema)
"""


def test_processes_decide_together_with_the_samples_of_another_arrangement(tmp_path):
    """The weights of step 8 resume from there, not from 12; those of step 1,000 are refused. One
    process goes on at the end."""
    check_group(SHARDED, 2, tmp_path, "tp", 0, 1, 12)
    for out in check_group(SHARDED, 3, tmp_path, "fsdp", 1_000, 0, 0):
        assert out.startswith("ModelMismatchError model: ")
    check_group(SHARDED, 3, tmp_path, "fsdp", 8, 9, 16)
    groups.alone(tmp_path / "run", 20, resume="auto")
    for width in (0.1, 0.2):
        exact = truth(width, range(2, 21, 2))
        assert_near(Run(tmp_path / "run").average(width), exact, within=2e-6)


# --- who may write


def test_a_run_that_does_not_fit_is_refused_at_once(tmp_path):
    model = begun(tmp_path, 10).model
    before = contents(tmp_path)
    with refused(tmp_path, "resume='auto'", "resume=10", "resume=0", kind=MismatchError):
        begin(model, tmp_path)
    with refused("t_unit 'images'"):
        begin(model, tmp_path, resume="auto", t_unit="images")
    with refused("resume 'yes'"):
        begin(model, tmp_path, resume="yes")
    with refused("resume 5", " 10"):
        begin(model, tmp_path, resume=5)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_or_read_is_refused_at_once(tmp_path, monkeypatch):
    model = Training().model
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name in ("file", "file/run", "nowhere"):
        with pytest.raises(DirectoryError):
            begin(model, tmp_path / name)
    monkeypatch.setattr(os, "access", Mock(return_value=False))  # root may write everywhere
    with refused(tmp_path, kind=DirectoryError):
        begin(model, tmp_path / "new" / "run")


def test_another_model_is_refused_at_once_and_a_frozen_one_read(tmp_path):
    training = begun(tmp_path, 10)
    model = training.model
    other = nn.Linear(3, 4)
    with refused("tensor '0.weight'", str(tmp_path), kind=ModelMismatchError):
        PostHocEMA.from_path(tmp_path, other)
    PostHocEMA.from_path(tmp_path, model.requires_grad_(False))  # for an evaluation
    with PostHocEMA.from_path(tmp_path, model.requires_grad_(True)) as third:  # no lock was taken
        training.run(12, third)


def test_a_directory_in_which_a_tracker_of_this_process_writes_is_refused_to_others(tmp_path):
    training = Training()
    first = begin(training.model, tmp_path)
    training.run(9, first)
    with refused(tmp_path, "this process", kind=LockedError):
        begin(training.model, tmp_path).update_(training.model)
    first.snapshot()
    with refused(tmp_path, "this process", kind=LockedError):
        PostHocEMA.from_path(tmp_path, training.model).update_(training.model)
    first.close()
    assert repr(first) == f"PostHocEMA({str(tmp_path)!r}, step 9, sigma_rels 0.05, 0.28, closed)"


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


def test_one_writer_and_any_number_of_readers(tmp_path):
    """Also in other processes, whose death releases the directory; so does the end of a tracker."""
    training = Training()
    with forked.waiting(WRITER, tmp_path) as holder:
        training.run(10)
        reader = PostHocEMA.from_path(tmp_path, training.model)
        other = PostHocEMA.from_path(tmp_path, training.model)
        assert reader.state_dict(0.15).keys() == training.path[0].keys()
        with refused(tmp_path, f"process {holder.pid} ", kind=LockedError):
            reader.update_(training.model)
        holder.kill()
        holder.wait()
    training.run(21, reader)
    reader.close()
    again = training.at(10)
    again.run(11, other)
    assert superseded(tmp_path) == 2  # of step 20
    del other  # a garbage-collected tracker releases the directory
    PostHocEMA.from_path(tmp_path, again.model, step=10).update_(again.model)


def test_a_tracker_without_a_model_reads_and_takes_no_updates(tmp_path):
    training = begun(tmp_path, 10)
    reader = PostHocEMA.from_path(tmp_path)
    assert reader.state_dict(0.15).keys() == training.path[0].keys()
    with refused(tmp_path, "from_path", kind=RefusedCallError):
        reader.update_(training.model)


def test_a_closed_tracker_reads_but_does_not_write(tmp_path):
    training = Training()
    with begin(training.model, tmp_path) as ema:
        state = state_after(training, 10, ema)
    ema.close()
    assert ema.closed
    assert ema.state_dict(0.15).keys() == training.path[0].keys()
    with refused(tmp_path, "closed", kind=RefusedCallError):
        ema.load_state_dict(state)


def test_a_failing_resume_releases_the_directory(finished, tmp_path):
    (tmp_path / "superseded").write_text("a file where the folder should be")
    model = finished.at(10).model
    failed = PostHocEMA.from_path(tmp_path, model, step=10)
    with refused(tmp_path / "superseded", kind=DirectoryError):
        failed.update_(model)
    (tmp_path / "superseded").unlink()
    PostHocEMA.from_path(tmp_path, model, step=10).update_(model)


def test_a_training_killed_before_its_first_checkpoint_is_told_to_begin_anew_and_does(tmp_path):
    """A script runs again, with weights of its beginning, which no snapshot has."""
    begun(tmp_path, 13)
    again = Training()
    tracker = resume(again.model, tmp_path)
    with refused("model", "resume=0", kind=ModelMismatchError):
        tracker.update_(again.model)
    model = nn.Linear(3, 2)  # any other
    with begin(model, tmp_path, resume=0, sigma_rels=(0.1, 0.2), t_unit="images") as ema:
        assert not ema.has_average
        assert times(tmp_path) == {10, 12}
        ema.update_(model, t=10.0)
        ema.update_(model, t=20.0)
    assert times(tmp_path) == {20}
    assert superseded(tmp_path) == 4
    assert Run(tmp_path).average(0.1).keys() == {"weight", "bias"}


def test_a_relative_directory_in_a_deleted_working_directory_is_an_error_of_one_line(
    tmp_path,
    monkeypatch,
):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    model = nn.Linear(2, 2)
    with refused("checkpoint_dir run"):
        PostHocEMA.from_model(model, "run")
    PostHocEMA.from_model(model, tmp_path / "run").update_(model)
