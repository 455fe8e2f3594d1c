"""Averages of sharded models: the parts of snapshots, averaged weights in the models, and how they
continue.

Each agrees with the averages of one process.
"""

from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors, heavy
from factories import sketch_of
from forked import program
from groups import alone, averages, check_group, run_group, truth
from tracker.runs import assert_near, steps, times

from posthoc_cli import Run
from posthoc_cli.errors import RankError, VanishedError
from posthoc_cli.group import Group


@heavy
@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        (4, ["hsdp", "fsdp-tp"]),
        (2, ["tp"]),
    ],
)
def test_averages_of_a_sharded_model_are_those_of_one_process(ranks, kinds, tmp_path):
    """The parts of snapshots are bit for bit; a model has them in a block, and its own weights
    after it."""
    averages(tmp_path, 8, 10)
    check_group(program("sharding/averages_of_a_sharded_model"), ranks, tmp_path, *kinds)
    single = Run(tmp_path / "single")
    exact = truth(0.2, [2, 4, 6, 8, 10])
    assert_near(single.average(0.2), exact)
    for kind in kinds:
        run = Run(tmp_path / f"run-{kind}")
        for found, true in zip(run.snapshots, single.snapshots, strict=True):
            check_same_snapshot(found, true)
        assert_same_tensors(run.average(0.15), single.average(0.15))


def check_same_snapshot(found, true):
    assert found.t == true.t
    assert found.sigma_rel == true.sigma_rel
    for name in true.entries:
        assert torch.equal(found.tensor(name), true.tensor(name)), (true.path, name)
    measured = found.measurements
    assert measured.norm == pytest.approx(true.measurements.norm)
    assert measured.rounding == pytest.approx(true.measurements.rounding)


def test_a_block_restores_chunks_that_it_has_converted_or_replaced(tmp_path):
    """Of `fully_shard`, whose modules keep the memory, and of DTensors alone."""
    check_group(program("sharding/converting_blocks"), 2, tmp_path)
    with alone(tmp_path / "alone", 6):
        pass
    for kind in ("fsdp", "tp"):
        pairs = zip(Run(tmp_path / kind).snapshots, Run(tmp_path / "alone").snapshots, strict=True)
        for found, true in pairs:
            check_same_snapshot(found, true)


def test_a_complete_tensor_that_a_block_has_replaced_is_an_error_with_the_raw_weights(tmp_path):
    """A forward pass gathers it; torch would use the other one in the next pass."""
    for out in check_group(program("sharding/replaced_tensor"), 2, tmp_path):
        assert out == "True True\n"


@heavy
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not report peak memory"
)
def test_a_process_holds_its_share_and_no_complete_tensor_set(tmp_path):
    """Memory in units of a process's share of the float32 parameters; a complete set would be one
    unit more, of two.

    Tracking holds the averages, their staged copies for snapshots, and a copy of the parameters. An
    evaluation holds the two live averages, the result, and the model's own values. Resuming holds
    the averages.
    """
    for out in check_group(program("sharding/share_of_memory"), 2, tmp_path):
        tracking, evaluation, resuming = map(float, out.split())
        assert tracking < 9.5, out
        assert evaluation < 4.5, out
        assert resuming < 6.5, out


@pytest.mark.parametrize("last", [24, 22, 21])
def test_a_training_that_ends_before_another_process_has_written_keeps_no_more(tmp_path, last):
    """At a snapshot, at an update, and between two."""
    check_group(program("sharding/ending_first"), 2, tmp_path, str(last))
    assert len(times(tmp_path / "run")) == 4


def test_processes_write_and_thin_one_after_the_other(tmp_path):
    """A collective operation in any thread would wait forever. Nothing is thinned before all have
    written the next."""
    first, _ = check_group(program("sharding/writing_in_turn"), 2, tmp_path)
    assert first.strip() == "[4.0, 4.0, 8.0]"
    one_by_one = Run(tmp_path / "one by one").snapshots
    assert len(one_by_one) == 4
    assert one_by_one[-1].t == 24
    late = times(tmp_path / "late")
    assert 12 in late
    assert 4 not in late


def test_an_error_of_one_process_is_raised_in_all_and_each_model_keeps_its_weights(tmp_path):
    """Also an error within the block. A full disk is an error of its own process."""
    one, other = check_group(program("sharding/failing_process"), 2, tmp_path)
    damaged, spread = one.splitlines()
    assert damaged.startswith("RankError rank 1: ")
    assert "is damaged" in damaged
    assert spread.startswith("ModelMismatchError tensor '")
    damaged, spread, full = other.splitlines()
    assert damaged.startswith("FileFormatError ")
    assert spread.startswith("ModelMismatchError tensor '")
    assert full.startswith("WriteError ")


def test_tied_parameters_and_half_precision_of_a_sharded_model(tmp_path):
    for out in check_group(program("sharding/tied_half"), 2, tmp_path):
        assert out.startswith(
            "RefusedCallError PostHocEMA: averages of which each process keeps a part need all "
        )


def test_what_processes_of_a_sharded_model_cannot_do_is_named_in_all(tmp_path):
    alone(tmp_path / "taken", 4)
    outs = check_group(program("sharding/refused_calls"), 2, tmp_path)
    expected = [
        f"{tmp_path}/taken: ",
        "RankError rank 1: has sigma_rels (0.1,), and rank 0 has (0.05, 0.28)",
        "RankError rank 1: has checkpoint_dir ",
        "RankError rank 1: has include ('first*',), and rank 0 has ()",
        "tensor 'weight': has the placement P",
        "tensor 'weight': has 8 rows ",
        "tensor 'weight': has 7 rows ",
        "ModelMismatchError model: ",
        "is sharded over processes",
    ]
    if Path("/proc/self/cwd").exists():
        expected.append(f"{tmp_path}/1/run: ")
    for out in outs:
        for line, text in zip(out.splitlines(), expected, strict=True):
            assert text in line
    assert steps(tmp_path / "other") == [1, 1]
    assert not list(tmp_path.glob("[01]/**/part-*"))


@heavy
@pytest.mark.parametrize("last", [8, 6])
def test_a_clock_that_differs_between_processes_is_named_at_a_snapshot(last, tmp_path):
    """Each process would write its part for another time, and none would be complete: of snapshots
    on the schedule, and off it."""
    _, second = check_group(program("sharding/differing_clocks"), 2, tmp_path, last)
    own = f"a snapshot of step {last}, t = {10 * last - 1}"
    other = f"step {last}, t = {10 * last};"
    assert f"rank 1: has a part of {own}, and another process of {other} call update_" in second
    assert times(tmp_path / "run") == {40}


def test_a_late_part_of_a_process_that_has_outlived_its_training_is_named(tmp_path):
    check_group(program("sharding/outliving_process"), 2, tmp_path, 0)
    for part in (tmp_path / "run").glob("*8-*/*2-of*"):
        late = tmp_path / "late" / part.parent.name
        late.mkdir(parents=True)
        part.rename(late / part.name)
    _, notes = check_group(program("sharding/outliving_process"), 2, tmp_path, 50)
    mixed = "has 1 of 2 parts, 1 of 2 parts, of different sessions of the training"
    assert notes.count(mixed) == 2


@heavy
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_resumes_bit_for_bit_on_one_arrangement_of_processes_after_the_other(tmp_path):
    """From one process to FSDP, HSDP, tensor parallelism and back."""
    for ranks, stages in (
        (1, "single:run:0,3"),
        (4, "fsdp,hsdp,fsdp-tp,tp:run:3,7,8,9,11"),
        (1, "single:run:11,12"),
    ):
        check_group(program("sharding/stages"), ranks, tmp_path, stages)
    alone(tmp_path / "single", 12)
    # Each stage of `run` has ended with a snapshot off the schedule.
    run = Run(tmp_path / "run")
    scheduled = [snapshot for snapshot in run.snapshots if snapshot.t % 4 == 0]
    for found, true in zip(scheduled, Run(tmp_path / "single").snapshots, strict=True):
        check_same_snapshot(found, true)
    assert len(run.snapshots) == len(scheduled) + 6
    assert_near(run.average(0.2, t=12), truth(0.2, [2, 4, 6, 8, 10, 12]))


def test_each_process_resumes_the_path_of_its_part(tmp_path):
    stages = ("fsdp,fsdp:resumed:0,5,8", "fsdp:straight:0,8")
    check_group(program("sharding/stages"), 2, tmp_path, *stages)
    straight = Run(tmp_path / "straight").snapshots[-1]
    resumed = Run(tmp_path / "resumed").snapshots[-1]
    assert resumed.t == 8
    assert sketch_of(straight).folds.sum() > 2
    assert resumed.sketch == straight.sketch


def test_a_state_of_complete_or_equally_sharded_tensors_is_loaded_and_others_are_named(tmp_path):
    single = alone(tmp_path / "one", 5)
    torch.save(single.state_dict(), tmp_path / "state.pt")
    for out in check_group(program("sharding/loading_states"), 2, tmp_path):
        more, odd, apart, lacks, figure, *ended = out.splitlines()
        assert more.startswith("ModelMismatchError tensor 'more.weight': ")
        assert odd.startswith("ModelMismatchError tensor 'odd': ")
        assert "[7, 3]" in odd
        assert apart.startswith("ModelMismatchError tensor 'odd': is sharded")
        assert "state: " in lacks
        assert figure.endswith("; tracked: 0.1, 0.2")
        for line in ended:
            assert line.startswith(
                "RefusedCallError PostHocEMA: averages of which each process keeps a part need all "
            )


@pytest.mark.cuda(simulated=False)
def test_averages_with_nccl_are_those_of_one_process(tmp_path):
    """As many processes as accelerators, at most two, make every exchange of tensors."""
    ranks = min(torch.cuda.device_count(), 2)
    exact = truth(0.2, [2, 4, 6, 8])
    torch.save(dict(exact), tmp_path / "truth.pt")
    check_group(program("sharding/averages_with_nccl"), ranks, tmp_path, "nccl", "cuda")


# --- averaged weights of replicas, which one process keeps for all of them


def test_every_replica_gets_the_same_weights_and_the_first_keeps_them(tmp_path):
    """The tracker may be made before the model is wrapped, as in the training scripts of
    diffusers."""
    averages(tmp_path, 10, 14)
    for out in check_group(program("sharding/averages_of_replicas"), 2, tmp_path):
        assert out.startswith(f"NotReadyError {tmp_path / 'run'}: has no average yet: ")


@pytest.mark.parametrize("call", ["train(model, 1, 4, ema)", "ema.models(model, [0.2])"])
def test_a_replica_that_makes_its_tracker_late_is_waited_for(tmp_path, call):
    """No wrapper keeps these three in step. A due snapshot and a call for averages need all."""
    averages(tmp_path, 8)
    first_to_wait = int("train" in call)  # the writer waits for nobody
    check_group(program("sharding/late_replica"), 3, tmp_path, call, str(first_to_wait))


def test_a_process_that_fails_in_a_call_or_has_no_tracker_is_named(tmp_path):
    averages(tmp_path, 8)
    first, second, third = run_group(program("sharding/failing_replica"), 3, tmp_path)
    for result in (first, second, third):
        assert result.code == 0, result.err
    lacks, missing = first.out.splitlines()
    assert lacks.startswith("RankError rank 1: tensor 'odd': ")
    assert missing.startswith(f"RankError rank 1: has no tracker of {tmp_path / 'one-True'}")
    assert second.out.startswith("ModelMismatchError tensor 'odd': ")
    assert third.out.startswith("RankError rank 1: tensor 'odd': ")


def test_a_process_that_has_died_is_an_error_of_the_others(tmp_path):
    code = """
import os
model = spread(Net(), "ddp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
go(ema, model, 1, 8)
ema.flush()
dist.barrier()
if rank == 1:
    os._exit(0)
refused(ema.model(model, 0.2).__enter__)
sys.stdout.flush()
os._exit(0)
"""
    first, _ = run_group(code, 2, tmp_path)
    assert first.out == "RankError another process of this job: failed or died\n", first.err


GONE = VanishedError("a", "is gone")
BROKE = RankError("a", "broke")


@pytest.mark.parametrize(
    ("own", "other", "raised"),
    [
        (GONE, (False, 1, "b"), RankError),
        (GONE, (True, 1, "b"), VanishedError),
        (BROKE, (True, 1, "b"), RankError),
        (None, (True, 1, "b"), VanishedError),
    ],
)
def test_processes_try_again_only_if_snapshots_vanished_and_nothing_else_failed(own, other, raised):
    """All processes of a group must do the same."""

    class Two(Group):
        def from_all(self, value):
            assert value is None or value[0] == (own is GONE)  # what the others are told
            return [value, other]

    def work():
        if own is not None:
            raise own

    with pytest.raises(raised):
        Two(0, (0, 1)).together(work)


def test_an_own_error_says_more_than_that_another_process_has_died():
    class Two(Group):
        def from_all(self, value):
            raise RankError(f"another process than that of {value}", "died")

    def work():
        raise BROKE

    with pytest.raises(RankError, match="broke"):
        Two(0, (0, 1)).together(work)
