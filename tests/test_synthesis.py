"""Coefficients times snapshots, compared with sums in NumPy float64; and the errors of planning."""

import pytest
import torch
from checking import refused
from factories import RUN_ID, exact_gamma, write_snapshot
from sums import UNIT, assert_sums

from posthoc_cli import (
    Beta,
    HalfLife,
    PowerFunction,
    Request,
    Run,
    Window,
    disk_sources,
    plan_synthesis,
    synthesize,
)
from posthoc_cli.dtypes import parse_dtype, stored_name, torch_dtype
from posthoc_cli.errors import InvalidValueError, NonFiniteError
from posthoc_cli.run_clock import Clock
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.synthesis.engine import check_device

TIMES = (10, 20, 30, 40)
TARGETS = (0.04, 0.1, 0.2)


def write_random(directory, dtype=torch.float32, **fields):
    """Write snapshots of two profiles at TIMES, each with random weights and a counter equal to its
    time."""
    for t in TIMES:
        for sigma_rel in (0.05, 0.28):
            values = {
                "w": torch.randn(3, 7).to(dtype),
                "odd": torch.randn(13).to(dtype),
                "scalar": torch.randn(()).to(dtype),
                "empty": torch.empty(0, 4, dtype=dtype),
                "count": torch.tensor(t),
            }
            write_snapshot(directory, t, sigma_rel, RUN_ID, values, **fields)


def plan_of(directory, targets=TARGETS, **options):
    return plan_synthesis(disk_sources(directory), Request(targets, **options))


@pytest.mark.parametrize("stored", UNIT)
@pytest.mark.parametrize("own", UNIT)
def test_results_are_the_sums_within_rounding(tmp_path, own, stored):
    averages = ("w", "odd", "scalar", "empty")
    roles = dict.fromkeys(averages, f"average {stored_name(own)}")
    write_random(tmp_path, stored, tensors=roles)
    plan = plan_of(tmp_path)
    for name in averages:
        assert plan.entries[name].dtype == stored_name(own)
    is_coarse = own != torch.float64 and stored.itemsize < 4
    wide = torch.float32 if is_coarse else torch.float64
    assert_sums(plan, wide, rounding=UNIT[own])


@pytest.mark.parametrize(
    ("t", "newest"),
    [
        (None, 40),
        (39.999, 30),
        (10, 10),
    ],
)
def test_only_snapshots_at_or_before_the_time_are_used_and_copies_come_from_the_newest_of_them(
    tmp_path,
    t,
    newest,
):
    write_random(tmp_path)
    plan = plan_of(tmp_path, t=t)
    assert {source.t for source in plan.sources} == {time for time in TIMES if time <= newest}
    assert dict(synthesize(plan))["count"] == [newest] * 3


def test_a_copy_comes_from_the_newest_snapshot_also_where_no_target_needs_it(tmp_path):
    write_random(tmp_path)
    plan = plan_of(tmp_path, [PowerFunction.from_sigma_rel(0.05, 10.0)])
    assert not plan.reconstruction.coefficients[1:].any()
    assert dict(synthesize(plan))["count"] == [40]


def test_the_entries_of_a_plan_are_what_it_makes(tmp_path):
    """Tied tensors appear under each of their names."""
    write_random(tmp_path, aliases={"tied": "w"})
    plan = plan_of(tmp_path, dtype="bf16")
    tensors = dict(synthesize(plan))
    assert plan.entries["tied"] == Entry("BF16", (3, 7))
    assert plan.entries["count"] == Entry("I64", ())
    assert plan.entries.keys() == tensors.keys()
    for name, (value, *_) in tensors.items():
        entry = Entry(stored_name(value.dtype), tuple(value.shape))
        assert entry == plan.entries[name]
    assert torch.equal(tensors["tied"][0], tensors["w"][0])


def test_the_metadata_of_an_output_describe_how_it_was_made(tmp_path):
    for t in TIMES:
        values = {
            "w": torch.randn(3, 7),
            "count": torch.tensor(t),
        }
        fields = {"aliases": {"count too": "count"}, "t_unit": "images"}
        write_snapshot(tmp_path, t, 0.05, RUN_ID, values, **fields)
    plan = plan_of(tmp_path, [0.1, 0.06], t=35.5)
    info = plan.output_info(1)
    assert info.sigma_rel == 0.06
    assert info.gamma == pytest.approx(exact_gamma(0.06), rel=1e-12)
    assert info.t == 35.5
    assert info.t_unit == "images"
    assert info.copies == ("count", "count too")
    files = [used.file for used in info.snapshots]
    coefficients = [used.coefficient for used in info.snapshots]
    assert files == [source.name for source in plan.sources]
    assert coefficients == plan.reconstruction.coefficients[:, 1].tolist()
    assert info.profile_error == plan.reconstruction.profile_error[1]


def test_a_step_is_a_time_on_the_clock_of_steps_and_must_be_a_snapshots_on_another_clock(tmp_path):
    write_random(tmp_path / "steps")
    assert plan_of(tmp_path / "steps", step=25).t == 25
    for step in (10, 20):
        clock = {"step": step, "t_unit": "images"}
        write_snapshot(tmp_path, 64.0 * step, 0.05, RUN_ID, {"w": torch.ones(3)}, **clock)
    assert plan_of(tmp_path, [0.04], step=20).t == 1280
    between = r"step 15: lies between the snapshots at 10 and 20; .* give t in images"
    with pytest.raises(InvalidValueError, match=between):
        plan_of(tmp_path, [0.04], step=15)


# --- targets in steps


def write_clock(folder, times):
    """Write snapshots of steps 10, 20, ... at these times, in images."""
    for number, t in enumerate(times, 1):
        clock = {"step": 10 * number, "t_unit": "images"}
        write_snapshot(folder, float(t), 0.05, RUN_ID, {"w": torch.randn(30)}, **clock)
    return folder


@pytest.mark.parametrize(
    ("target", "instead"),
    [
        (Window(5), "--target decay:linear:20% --out"),
        (Beta(0.9), "--sigma-rel 0.2546 --out"),
        (HalfLife(4), "--sigma-rel 0.1825 --out"),
    ],
)
def test_a_target_in_steps_is_refused_where_steps_are_not_equally_long(tmp_path, target, instead):
    """Between the last two snapshots a step has 40 images: the last 5 steps took 200 of 1,000. The
    mean ages of the others are 9.49 and 5.77 steps, or 0.380 and 0.231 of the images."""
    folder = write_clock(tmp_path, [100, 600, 1000])
    command = f"ema synthesize {folder} {instead}"
    with refused(f"target {target.title}", command):
        Run(folder).plan(target)
    with refused(f"target {target.title}", instead):
        Run(folder).error_curve(others=target)
    assert Run(folder).plan([0.1]).steps is None


def test_a_target_in_steps_is_made_where_all_steps_are_equally_long(tmp_path):
    plan = Run(write_clock(tmp_path, [640, 1280, 1920])).plan([Window(5), Beta(0.9), 0.1])
    assert plan.steps == 30
    same = [Window(5).profile(1920.0, Clock((30,), (1920.0,)), 64.0).tail(1700.0)]
    assert same == [pytest.approx(220 / 320)]
    assert [target["as"] for target in plan.to_dict()["targets"]] == [
        None,
        "sigma_rel 0.228",
        "decay 0.74",
    ]


@pytest.mark.parametrize(
    ("value", "dtype", "fact"),
    [
        (float("nan"), None, "`exclude`"),
        (float("-inf"), "bf16", "infinity"),
        (70_000.0, "float16", "70000"),
    ],
)
def test_a_stored_value_that_is_not_finite_is_refused_by_name_and_nothing_is_written(
    tmp_path,
    value,
    dtype,
    fact,
):
    run = tmp_path / "run"
    for t, last in ((20, value), (10, 2.0)):
        values = {
            "good": torch.randn(3, 7),
            "bad\n": torch.tensor([1.0, last]),
        }
        write_snapshot(run, t, 0.05, RUN_ID, values)
    with pytest.raises(NonFiniteError, match=rf"'bad\\n'.*{fact}"):
        Run(run).write(0.05, tmp_path / "out.safetensors", dtype=dtype)
    assert [*tmp_path.iterdir()] == [run]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_nan_that_no_sample_holds_is_refused_by_the_name_of_its_file(tmp_path, dtype):
    values = torch.zeros(4_000_000)
    write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": values})
    values[500_001] = torch.nan
    path = write_snapshot(tmp_path, 20, 0.05, RUN_ID, {"w": values})
    with refused(path, "'w'", kind=NonFiniteError):
        Run(tmp_path).average(0.04, dtype=dtype)


def test_a_device_that_does_not_exist_is_refused_with_the_devices_that_do():
    assert check_device("auto") == torch.device("cpu")
    for device in ("", "cuda:99", "meta", "CPU "):
        with refused(f"device '{device}'", "auto, cpu"):
            check_device(device)


# --- the names of the dtypes of safetensors files for users and in torch


def test_a_dtype_that_the_format_lacks_is_refused_with_the_tensor():
    with refused("tensor 'w'"):
        stored_name(torch.complex128, "w")


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("fp16", torch.float16),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_dtypes_of_averages_are_given_as_words_or_torch_dtypes(word, dtype):
    assert torch_dtype(parse_dtype(word)) == dtype
    assert parse_dtype(word) == parse_dtype(dtype)


@pytest.mark.parametrize("dtype", ["half", torch.int64])
def test_another_dtype_is_refused_for_averages(dtype):
    with refused("dtype"):
        parse_dtype(dtype)
