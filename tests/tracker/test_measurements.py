"""What a snapshot measures about itself is what a direct computation in float64 finds.

The exact averages are those of the tracker at the time of a snapshot, the stored ones what safetensors reads.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from factories import tiny_model
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import DirectoryError, NonFiniteError, WriteError
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.tracker import measuring
from posthoc_cli.tracker.buffers import FlatTensors

Tensors = dict[str, torch.Tensor]
SETTINGS: dict = {"update_every": 1, "checkpoint_every": 5}


@dataclass
class Watched:
    """A tracker and its exact averages at every call, by t and sigma_rel."""

    tracker: PostHocEMA
    exact: dict[tuple[float, float], Tensors] = field(default_factory=dict)

    def train(self, model: torch.nn.Module, first: int, last: int) -> None:
        for step in range(first, last + 1):
            generator = torch.Generator().manual_seed(step)
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_((change * 0.1).to(parameter))
            self.tracker.update_(model)
            for source in self.tracker._live_sources():
                self.exact[source.info.t, source.info.sigma_rel] = dict(source.averages)
        self.tracker.flush()


def kept_by(tracker: PostHocEMA) -> tuple[tuple[FlatTensors, ...], tuple[FlatTensors, ...]]:
    """What the averages are kept in: totals and recent means."""
    kept = tracker._pipeline.now.averages.accumulators
    assert kept is not None
    return kept.totals, kept.recent


def squares(tensors: Tensors, other: Tensors | None = None) -> float:
    """The squared distance, of float64 values; only tensors that both have."""
    total = 0.0
    for name, tensor in tensors.items():
        difference = tensor.double().numpy() - (0 if other is None else other[name].double().numpy())
        total += float(np.sum(difference**2))
    return total


def expected(watched: Watched, snapshot: Snapshot, written: list[Snapshot]) -> Measurements:
    """By definition; `written` are all snapshots that there were by then, also those that are gone by now."""
    info = snapshot.info
    exact = watched.exact[info.t, info.sigma_rel]
    distances = {}
    for (t, sigma_rel), other in watched.exact.items():
        if t == info.t and sigma_rel != info.sigma_rel:
            distances[t, sigma_rel] = (squares(exact, other), 0.0)
    for other in written:
        key = (other.info.t, other.info.sigma_rel)
        if key[0] in sorted(s.info.t for s in written if s.info.t < info.t and s.info.sigma_rel == key[1])[-2:]:
            stored = load_file(other.path)
            distances[key] = (squares(exact, stored), squares(watched.exact[key], stored))
    return squares(exact), squares(exact, load_file(snapshot.path)), distances  # type: ignore[return-value]


def check(watched: Watched, snapshot: Snapshot, written: list[Snapshot]) -> None:
    norm, rounding, distances = expected(watched, snapshot, written)  # type: ignore[misc]
    found = snapshot.info.measurements
    assert found is not None
    # Differences of float32 are rounded by 2^-24 of themselves; sums are float64.
    assert found.norm == pytest.approx(norm, rel=1e-12)
    assert found.rounding == pytest.approx(rounding, rel=1e-6)
    assert {(d.t, d.sigma_rel) for d in found.distances} == set(distances)
    for distance in found.distances:
        squared, rounding = distances[distance.t, distance.sigma_rel]
        assert distance.squared == pytest.approx(squared, rel=1e-6)
        assert distance.rounding == pytest.approx(rounding, rel=1e-6)


def check_all(watched: Watched, folder: Path) -> None:
    snapshots = read_directory(folder)
    for snapshot in snapshots:
        check(watched, snapshot, [s for s in snapshots if s.info.t < snapshot.info.t])


# --- when they are written -------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rels", [(0.1,), (0.05, 0.28), (0.05, 0.1, 0.28)])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_measurements_are_those_of_a_direct_computation(
    tmp_path: Path, sigma_rels: tuple[float, ...], stored: str | None, dtype: torch.dtype
) -> None:
    """A model with tied parameters, buffers (not measured) and a frozen parameter."""
    model = tiny_model().to(dtype)
    with PostHocEMA.from_model(model, tmp_path, sigma_rels, checkpoint_dtype=stored, **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 15)
    check_all(watched, tmp_path)
    last = read_directory(tmp_path)[-1].info
    assert last.sigma_rels == sigma_rels
    assert last.measurements is not None
    assert len(last.measurements.distances) == 3 * len(sigma_rels) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_distance_to_the_weights_is_measured_where_they_are_at_hand(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    with PostHocEMA.from_model(model, tmp_path, (0.05, 0.28), on_nonfinite="skip", **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 5)
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        watched.train(model, 6, 9)
        with torch.no_grad():
            model.norm.bias[0] = float("nan")
        tracker.update_(model)  # due, but skipped: what is stored is the average of step 9
    for snapshot in read_directory(tmp_path):
        assert snapshot.info.measurements is not None
        found = snapshot.info.measurements.weights
        if snapshot.info.t == 5:
            exact = squares(watched.exact[5, snapshot.info.sigma_rel], weights)
            assert found == pytest.approx(exact, rel=1e-5)
        else:
            assert found is None


def test_a_tensor_of_many_chunks_is_measured_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CPU_CHUNK", 1_000)
    model = torch.nn.Linear(123, 457)
    model.empty = torch.nn.Parameter(torch.empty(0, 3))
    model.scalar = torch.nn.Parameter(torch.tensor(2.0))
    model.turned = torch.nn.Parameter(torch.randn(70, 90).T)
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 10)
    check_all(watched, tmp_path)


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_a_tensor_that_is_kept_in_float32_counts_as_it_is_stored(tmp_path: Path, scale: float) -> None:
    """Too large, or too small, for float16: nothing of that tensor is rounded."""
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(scale)
    model.weight.requires_grad_(False)  # stays as it is, and tracked
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, only_trainable=False) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 10)
    for snapshot in read_directory(tmp_path):
        assert {name: entry.dtype for name, entry in snapshot.header.tensors.items()} == {
            "weight": "F32",
            "bias": "F16",
        }
    check_all(watched, tmp_path)


def test_values_that_only_float64_holds_stay_there_and_are_not_measured(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        model.bias.fill_(1e200)
    with PostHocEMA.from_model(model, tmp_path, (0.28,), update_every=1, checkpoint_every=1) as tracker:
        tracker.update_(model)
        tracker.update_(model)
    for snapshot in read_directory(tmp_path):
        assert snapshot.header.tensors["bias"].dtype == "F64"
        assert snapshot.info.measurements is None
        assert torch.equal(load_file(snapshot.path)["bias"], model.bias)


def test_a_distance_that_overflows_is_left_out(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    with PostHocEMA.from_model(model, tmp_path, update_every=1) as tracker:
        tracker.update_(model)
        for total, recent, value in zip(*kept_by(tracker), (-3e38, 3e38), strict=True):
            total.views["weight"].fill_(value)
            recent.views["weight"].fill_(value)
        tracker.snapshot()
    for snapshot in read_directory(tmp_path):
        assert snapshot.info.measurements == Measurements(pytest.approx(4 * 9e76), 0.0, ())  # type: ignore[arg-type]


def test_a_snapshot_that_was_thinned_away_is_still_named(tmp_path: Path) -> None:
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, max_checkpoints=2) as tracker:
        Watched(tracker).train(model, 1, 20)
    snapshots = read_directory(tmp_path)
    kept = {s.info.t for s in snapshots}
    assert snapshots[-1].info.measurements is not None
    named = {d.t for d in snapshots[-1].info.measurements.distances}
    assert {15, 20} <= named
    assert not named <= kept


def test_safetensors_and_readers_of_its_metadata_open_the_files(tmp_path: Path) -> None:
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        Watched(tracker).train(model, 1, 10)
    with safetensors.safe_open(read_directory(tmp_path)[-1].path, "pt") as opened:
        assert '"distances":[{"t":10.0,"sigma_rel":0.05,' in opened.metadata()["ema.measurements"]
        assert opened.metadata()["ema.sigma_rels"] == "[0.05,0.28]"


# --- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["state", "directory"])
def test_a_resumed_run_measures_to_what_is_on_disk(tmp_path: Path, resume: str) -> None:
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
    check_all(after, tmp_path)
    last = read_directory(tmp_path)[-1].info.measurements
    assert last is not None
    assert {d.t for d in last.distances} == {10, 15, 20}


def test_measurements_after_an_exact_resume_are_the_same(tmp_path: Path) -> None:
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path / "run", **SETTINGS) as tracker:
        Watched(tracker).train(model, 1, 12)
        state, weights = tracker.state_dict(), {n: t.clone() for n, t in model.state_dict().items()}
        Watched(tracker).train(model, 13, 20)
        first = [s.info for s in read_directory(tmp_path / "run")]
        tracker.load_state_dict(state)
        model.load_state_dict(weights)
        Watched(tracker).train(model, 13, 20)
    assert [s.info for s in read_directory(tmp_path / "run")] == first


def test_a_run_goes_on_without_a_profile_whose_snapshots_were_deleted_only_when_told_so(tmp_path: Path) -> None:
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        Watched(tracker).train(model, 1, 10)
    for path in tmp_path.glob("*-0.28.safetensors"):
        path.unlink()
    message = r"every profile \(0\.05, 0\.28\) .* go on without some \(the newest are of 0\.05\) with .*sigma_rels="
    with PostHocEMA.from_path(tmp_path, model) as tracker, pytest.raises(DirectoryError, match=message):
        tracker.update_(model)
    with PostHocEMA.from_path(tmp_path, model, sigma_rels=(0.05,)) as tracker:
        Watched(tracker).train(model, 11, 15)
        assert set(tracker.state_dict(sigma_rel=0.05)) == set(model.state_dict()) - {"frozen"}
    last = read_directory(tmp_path)[-1].info
    assert last.sigma_rels == (0.05,)
    assert last.measurements is not None
    assert [(d.t, d.sigma_rel) for d in last.measurements.distances] == [(5, 0.05), (10, 0.05)]


# --- what is in the way ----------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage(path: Path) -> None:
    """The last byte: the last tensor of the payload, so that others are read before it is found."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_by_another(path: Path) -> None:
    path.write_bytes(next(p for p in sorted(path.parent.glob("*.safetensors")) if p != path).read_bytes())


@pytest.mark.parametrize("spoil", [remove, truncate, damage, replace_by_another])
def test_an_earlier_snapshot_that_cannot_be_read_is_left_out_with_a_warning(
    tmp_path: Path, spoil, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        Watched(tracker).train(model, 1, 10)
        victim = read_directory(tmp_path)[-1].path
        spoil(victim)
        with caplog.at_level(logging.WARNING):
            Watched(tracker).train(model, 11, 20)
        victim.unlink(missing_ok=True)
    # It is among the two newest at both times.
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


def test_a_profile_that_could_not_be_written_is_written_when_it_is_due_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two files fails: the first stays, whole, and nothing of the second."""
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 9)
        real, calls = files.system.fsync, iter(range(9))

        def fail_second(descriptor: int) -> None:
            if next(calls) == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        with monkeypatch.context() as fault:
            fault.setattr(files.system, "fsync", fail_second)
            with pytest.raises(WriteError, match="no space left"):
                watched.train(model, 10, 10)
        assert [(s.info.t, s.info.sigma_rel) for s in read_directory(tmp_path)] == [(5, 0.05), (5, 0.28), (10, 0.05)]
        assert not list(tmp_path.glob(".ema-*"))
        tracker.snapshot()
        for source in tracker._live_sources():
            watched.exact[10, source.info.sigma_rel] = dict(source.averages)
        check_all(watched, tmp_path)


def test_an_average_that_is_not_finite_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, final_snapshot=False) as tracker:
        Watched(tracker).train(model, 1, 4)
        _, recent = kept_by(tracker)
        recent[1].views["norm.bias"][1] = float("nan")
        with pytest.raises(NonFiniteError, match=r"'norm\.bias': holds nan or infinity"):
            Watched(tracker).train(model, 5, 5)
    assert not list(tmp_path.glob("*.safetensors"))


# --- live averages ---------------------------------------------------------------------------------


def test_live_averages_are_measured_as_snapshots_are_and_without_rounding(tmp_path: Path) -> None:
    """To each other, and to the newest stored ones: without these, a target between snapshots was 11 times off."""
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, (0.05, 0.1, 0.28), **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 7)
        live = [source.info for source in tracker._sources() if source.info.t == 7]
        stored = read_directory(tmp_path)
    assert [info.sigma_rel for info in live] == [0.05, 0.1, 0.28]
    for info in live:
        found = info.measurements
        assert found is not None
        exact = watched.exact[7, info.sigma_rel]
        assert found.norm == pytest.approx(squares(exact), rel=1e-12)
        assert found.rounding == 0
        expected = {(7, s): (watched.exact[7, s], 0.0) for s in (0.05, 0.1, 0.28) if s != info.sigma_rel}
        for snapshot in stored:
            key, copy = (snapshot.info.t, snapshot.info.sigma_rel), load_file(snapshot.path)
            expected[key] = copy, squares(watched.exact[key], copy)
        assert {(d.t, d.sigma_rel) for d in found.distances} == set(expected)
        for distance in found.distances:
            other, rounding = expected[distance.t, distance.sigma_rel]
            assert distance.squared == pytest.approx(squares(exact, other), rel=1e-6)
            assert distance.rounding == pytest.approx(rounding, rel=1e-6)
    assert [source.info.measurements for source in tracker._live_sources()] == [None] * 3  # only when asked for


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_averages_on_a_device_are_measured_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "DEVICE_CHUNK", 1_000)
    model = torch.nn.Linear(123, 45).cuda()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        watched = Watched(tracker)
        for last in (5, 10):
            watched.train(model, last - 4, last)
        watched.exact = {key: {n: t.cpu() for n, t in value.items()} for key, value in watched.exact.items()}
    check_all(watched, tmp_path)
