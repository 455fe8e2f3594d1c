"""The measurements in a snapshot's header agree with a direct computation in float64.

The exact averages are those of the tracker at the time of a snapshot, the stored ones those that safetensors reads.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from factories import flip_bit, refuse_for_space, tiny_model
from safetensors.torch import load_file
from tracker.runs import train

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import DirectoryError, NonFiniteError, WriteError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.tracker import layout, measuring
from posthoc_cli.tracker.sharding import THIS_PROCESS
from posthoc_cli.tracker.synthesizer import Synthesizer

Tensors = dict[str, torch.Tensor]
SETTINGS: dict = {"update_every": 1, "checkpoint_every": 5}


@dataclass
class Watched:
    """A tracker and its exact averages at the times of its snapshots, by t and sigma_rel."""

    tracker: PostHocEMA
    exact: dict[tuple[float, float], Tensors] = field(default_factory=dict)

    def train(self, model: torch.nn.Module, first: int, last: int) -> None:
        for step in range(first, last + 1):
            generator = torch.Generator().manual_seed(step)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.add_((change * 0.1).to(parameter))
            self.tracker.update_(model)
            if step % SETTINGS["checkpoint_every"] == 0 or step == last:
                self.look()
        self.tracker.flush()

    def look(self) -> None:
        for sigma_rel in self.tracker.settings.sigma_rels:
            self.exact[self.tracker.t, sigma_rel] = self.tracker.state_dict(sigma_rel, dtype="float64")

    def check(self, info: Snapshot, stored: Tensors, snapshots: list[Snapshot]) -> None:
        """Compare with the definition: squared distances to the averages of the same time, and to the two newest
        earlier files of each profile, whose values are rounded."""
        every = {key: {name: values[name] for name in info.averages} for key, values in self.exact.items()}
        exact, found = every[info.t, info.sigma_rel], info.measurements
        assert found is not None
        expected = {
            (t, sigma_rel): (squares(exact, other), 0.0)
            for (t, sigma_rel), other in every.items()
            if t == info.t and sigma_rel != info.sigma_rel
        }
        for sigma_rel in {s.info.sigma_rel for s in snapshots}:
            before = [s for s in snapshots if s.info.t < info.t and s.info.sigma_rel == sigma_rel]
            for t, path in sorted((s.info.t, s.path) for s in before)[-2:]:
                other = load_file(path)
                expected[t, sigma_rel] = squares(exact, other), squares(every[t, sigma_rel], other)
        # Differences of float32 are rounded by 2^-24 of themselves; sums are float64.
        assert found.norm == pytest.approx(squares(exact), rel=1e-12)
        assert found.rounding == pytest.approx(squares(exact, stored), rel=1e-6)
        distances = {(d.t, d.sigma_rel): (d.squared, d.rounding) for d in found.distances}
        assert distances.keys() == expected.keys()
        for key, pair in expected.items():
            assert distances[key] == pytest.approx(pair, rel=1e-6)

    def check_all(self, folder: Path) -> None:
        snapshots = read_directory(folder)
        for snapshot in snapshots:
            self.check(snapshot.info, load_file(snapshot.path), snapshots)


def squares(tensors: Tensors, other: Tensors | None = None) -> float:
    """Return the squared norm, or the squared distance from `other`, in float64."""
    total = 0.0
    for name, tensor in tensors.items():
        difference = tensor.double().numpy() - (0 if other is None else other[name].double().numpy())
        total += float(np.sum(difference**2))
    return total


def watched_run(model: torch.nn.Module, folder: Path, last: int, *rels: tuple[float, ...], **settings: Any) -> Watched:
    with PostHocEMA.from_model(model, folder, *rels, **SETTINGS | settings) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, last)
    return watched


@pytest.mark.parametrize("sigma_rels", [(0.1,), (0.05, 0.28), (0.05, 0.1, 0.28)])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_measurements_are_those_of_a_direct_computation(
    tmp_path: Path, sigma_rels: tuple[float, ...], stored: str | None, dtype: torch.dtype
) -> None:
    """A model with tied parameters, buffers (not measured) and a frozen parameter."""
    model = tiny_model().to(dtype)
    watched_run(model, tmp_path, 15, sigma_rels, checkpoint_dtype=stored).check_all(tmp_path)
    last = read_directory(tmp_path)[-1].info
    assert last.sigma_rels == sigma_rels
    assert last.measurements is not None
    assert len(last.measurements.distances) == 3 * len(sigma_rels) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_distance_to_the_weights_is_measured_if_they_are_known(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    with PostHocEMA.from_model(model, tmp_path, (0.05, 0.28), on_nonfinite="skip", **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 5)
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        watched.train(model, 6, 9)
        with torch.no_grad():
            model.norm.bias[0] = float("nan")
        with pytest.warns(RuntimeWarning, match="update skipped"):
            tracker.update_(model)  # skipped: the snapshot that is due stores the average of step 9
    for snapshot in read_directory(tmp_path):
        assert snapshot.info.measurements is not None
        found = snapshot.info.measurements.weights
        if snapshot.info.t == 5:
            own = watched.exact[5, snapshot.info.sigma_rel]
            exact = squares({name: own[name] for name in snapshot.info.averages}, weights)
            assert found == pytest.approx(exact, rel=1e-5)
        else:
            assert found is None


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_tensor_of_many_slabs_is_measured_and_stored_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Tensors do not end where tiles and slabs end, nor tiles where slabs end."""
    for name, elements in {"TILE": 2**8, "DEVICE_TILE": 2**8, "SLAB": 2**11}.items():
        monkeypatch.setattr(layout, name, elements)
    model = torch.nn.Linear(123, 457)
    model.empty = torch.nn.Parameter(torch.empty(0, 3))
    model.scalar = torch.nn.Parameter(torch.tensor(2.0))
    model.turned = torch.nn.Parameter(torch.randn(70, 90).T)
    watched_run(model, tmp_path, 10, device=device).check_all(tmp_path)


@pytest.mark.parametrize("scale", [1e6, 1e-6, 2e-8])
def test_a_tensor_that_is_stored_in_float32_counts_as_not_rounded(tmp_path: Path, scale: float) -> None:
    """Its values would be too large, too small (subnormal) or zero in float16."""
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(scale)
    model.weight.requires_grad_(False)  # constant, but tracked
    watched_run(model, tmp_path, 10, include="*").check_all(tmp_path)
    for snapshot in read_directory(tmp_path):
        found = {name: entry.dtype for name, entry in snapshot.entries.items()}
        assert found == {"weight": "F32", "bias": "F16"}


def test_values_that_only_float64_can_hold_are_stored_in_it_and_not_measured(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        model.bias.fill_(1e200)
    with PostHocEMA.from_model(model, tmp_path, (0.28,), update_every=1, checkpoint_every=1) as tracker:
        tracker.update_(model)
        tracker.update_(model)
    for snapshot in read_directory(tmp_path):
        assert snapshot.entries["bias"].dtype == "F64"
        assert snapshot.info.measurements is None
        assert torch.equal(load_file(snapshot.path)["bias"], model.bias)


def test_a_snapshot_that_was_thinned_away_is_still_named(tmp_path: Path) -> None:
    watched_run(tiny_model(), tmp_path, 20, max_checkpoints=2)
    snapshots = read_directory(tmp_path)
    assert snapshots[-1].info.measurements is not None
    named = {d.t for d in snapshots[-1].info.measurements.distances}
    assert {15, 20} <= named
    assert not named <= {s.info.t for s in snapshots}
    with safetensors.safe_open(snapshots[-1].path, "pt") as opened:
        content = json.loads(opened.metadata()["ema"])
    assert content["measurements"]["distances"][0]["t"] in named
    assert content["sigma_rels"] == [0.05, 0.28]


@pytest.mark.parametrize("resume", ["state", "directory"])
def test_a_resumed_run_measures_distances_to_the_files_on_disk(tmp_path: Path, resume: str) -> None:
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        before = Watched(tracker)
        before.train(model, 1, 12 if resume == "state" else 10)
        state = tracker.state_dict()
        if resume == "state":
            shutil.copytree(tmp_path, tmp_path.parent / "kept")
            before.train(model, 13, 20)
    with PostHocEMA.from_path(tmp_path, model) as tracker:
        if resume == "state":
            tracker.load_state_dict(state)
        after = Watched(tracker, {key: value for key, value in before.exact.items() if key[0] <= 12})
        after.train(model, tracker.step + 1, 20)
    after.check_all(tmp_path)
    last = read_directory(tmp_path)[-1].info.measurements
    assert last is not None
    assert {d.t for d in last.distances} == {10, 15, 20}


def test_a_run_resumes_without_a_profile_whose_snapshots_were_deleted_only_on_request(tmp_path: Path) -> None:
    model = tiny_model()
    watched_run(model, tmp_path, 10)
    for path in tmp_path.glob("*-0.28.safetensors"):
        path.unlink()
    message = (
        r"sigma_rel 0\.28 has no snapshot at step 10, .*; at most 1 % is accepted; .*or track fewer: .*sigma_rels="
    )
    with PostHocEMA.from_path(tmp_path, model) as tracker, pytest.raises(DirectoryError, match=message):
        tracker.update_(model)
    with PostHocEMA.from_model(model, tmp_path, (0.05,), **SETTINGS, resume="auto") as tracker:
        Watched(tracker).train(model, 11, 15)
        assert set(tracker.state_dict(sigma_rel=0.05)) == set(model.state_dict()) - {"frozen"}
    last = read_directory(tmp_path)[-1].info
    assert last.sigma_rels == (0.05,)
    assert last.measurements is not None
    assert [(d.t, d.sigma_rel) for d in last.measurements.distances] == [(5, 0.05), (10, 0.05)]


def test_a_run_whose_newest_time_is_incomplete_names_the_step_that_resumes_it(tmp_path: Path) -> None:
    """As after a kill between the two files of a time, early in a training."""
    model = tiny_model()
    watched_run(model, tmp_path, 10)
    max(tmp_path.glob("*-0.28.safetensors")).unlink()
    with (
        PostHocEMA.from_path(tmp_path, model) as tracker,
        pytest.raises(DirectoryError, match=r"no snapshot at step 10, .*; or from_model\(\.\.\., resume=5\), whatever"),
    ):
        tracker.update_(model)
    with PostHocEMA.from_model(model, tmp_path, (0.05, 0.28), **SETTINGS, resume=5) as tracker:
        Watched(tracker).train(model, 6, 10)


SPOIL: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "damaged": flip_bit,  # in the last tensor of the payload, so that others are read before the damage is found
    "replaced": lambda path: path.write_bytes(min(p for p in path.parent.glob("*-*.safetensors")).read_bytes()),
}


@pytest.mark.parametrize("spoil", SPOIL)
def test_an_unreadable_snapshot_is_warned_of(tmp_path: Path, spoil: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        Watched(tracker).train(model, 1, 10)
        victim = read_directory(tmp_path)[-1].path
        SPOIL[spoil](victim)
        with caplog.at_level(logging.WARNING):
            train(model, tracker, 11, 20)
            tracker.flush()
        victim.unlink(missing_ok=True)
    # The victim is among the two newest at both times.
    assert len(caplog.records) == 2
    assert all(str(victim) in record.getMessage() for record in caplog.records)
    partners = [
        [(d.t, d.sigma_rel) for d in s.info.measurements.distances]
        for s in read_directory(tmp_path)
        if s.info.t > 10 and s.info.measurements
    ]
    first, second = {(5, 0.05), (10, 0.05), (5, 0.28)}, {(10, 0.05), (15, 0.05), (15, 0.28)}
    assert [set(p) for p in partners] == [
        {(15, 0.28)} | first, {(15, 0.05)} | first, {(20, 0.28)} | second, {(20, 0.05)} | second,
    ]  # fmt: skip


def test_a_profile_that_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the second of two files fails: the first is complete, and nothing is left of the second."""
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 9)
        real, calls = files.system.fsync, iter(range(9))

        def fail_second(descriptor: int) -> None:
            refuse_for_space() if next(calls) == 1 else real(descriptor)

        with monkeypatch.context() as fault:
            fault.setattr(files.system, "fsync", fail_second)
            with pytest.raises(WriteError, match="no space left"):
                watched.train(model, 10, 10)
        assert [(s.info.t, s.info.sigma_rel) for s in read_directory(tmp_path)] == [(5, 0.05), (5, 0.28), (10, 0.05)]
        assert not list(tmp_path.glob(".ema-*"))
        tracker.snapshot()
        watched.look()
        watched.check_all(tmp_path)


def test_live_averages_are_measured_as_snapshots_are_but_without_rounding(tmp_path: Path) -> None:
    """Distances to each other and to the newest stored ones, without which a target between was 11 times off."""
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, (0.05, 0.1, 0.28), **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 7)
        live = [source.info for source in Synthesizer(tracker, THIS_PROCESS, None).sources() if source.info.t == 7]
        assert [info.sigma_rel for info in live] == [0.05, 0.1, 0.28]
        for info in live:
            watched.check(info, watched.exact[7, info.sigma_rel], read_directory(tmp_path))


@pytest.mark.parametrize("measured", [60, 10**6])
@pytest.mark.parametrize("device", ["cpu", "model"])
def test_values_that_are_not_measured_are_stored_or_refused_as_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, measured: int
) -> None:
    """One element that float16 cannot hold, or whose average is infinite, is found in 20 or all that are measured."""
    monkeypatch.setattr(measuring, "MEASURED_ELEMENTS", measured)
    monkeypatch.setattr(layout, "TILE", 256)
    model = torch.nn.Sequential(*(torch.nn.Linear(40, 25, bias=False) for _ in range(3)))
    model.norm = torch.nn.BatchNorm1d(7, affine=False)
    settings: dict = {"update_every": 1, "checkpoint_every": 4, "device": device}
    for place in (0, 321, 517, 998, 999):
        with torch.no_grad():
            model[1].weight.fill_(0.1).view(-1)[place] = 7e4
        with PostHocEMA.from_model(model, tmp_path / f"large-{place}", **settings) as tracker:
            for _ in range(4):
                tracker.update_(model)
        for snapshot in read_directory(tmp_path / f"large-{place}"):
            found = {name: entry.dtype for name, entry in snapshot.entries.items()}
            assert [found.pop(f"{number}.weight") for number in range(3)] == ["F16", "F32", "F16"]
            assert {*found.values()} == {"F32", "I64"}  # statistics, and their count
            assert torch.equal(load_file(snapshot.path)["1.weight"], model[1].weight)
        tracker = PostHocEMA.from_model(model, tmp_path / f"infinite-{place}", **settings)
        with pytest.raises(NonFiniteError, match=r"average of '2.weight': holds nan or infinity"):
            for step in range(4):
                with torch.no_grad():
                    model[2].weight.view(-1)[place] = 3e38 * (-1) ** step  # whose differences are infinite in float32
                tracker.update_(model)
            tracker.flush()
        assert not list((tmp_path / f"infinite-{place}").glob("*.safetensors"))
        torch.nn.init.zeros_(model[2].weight)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_averages_on_a_device_are_measured_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "DEVICE_TILE", 1_000)
    model = torch.nn.Linear(123, 45).cuda()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 10)
        watched.exact = {key: {n: t.cpu() for n, t in value.items()} for key, value in watched.exact.items()}
    watched.check_all(tmp_path)
