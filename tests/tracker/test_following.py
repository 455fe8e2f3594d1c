"""on_change="follow": a model whose tensors change while it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import averages_in, exact_average, read_snapshot, write_snapshot

from posthoc_cli import PostHocEMA
from posthoc_cli.checkpoints.opening import disk_sources
from posthoc_cli.errors import InvalidValueError, MismatchError, ModelMismatchError, NonFiniteError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.pruning import plan_pruning
from posthoc_cli.synthesis.plan import plan_synthesis

SETTINGS: dict = {
    "sigma_rels": (0.05, 0.28), "update_every": 1, "checkpoint_every": 5, "checkpoint_dtype": None,
    "on_change": "follow",
}  # fmt: skip

States = list[dict[str, torch.Tensor]]


def network() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"back": torch.nn.Linear(2, 2).requires_grad_(False), "head": torch.nn.Linear(2, 3)})


def begun(folder: Path, **settings: object) -> tuple[torch.nn.ModuleDict, PostHocEMA, States]:
    model = network()
    return model, PostHocEMA.from_model(model, folder, **SETTINGS | settings), []


def train(model: torch.nn.Module, run: PostHocEMA, states: States, count: int) -> None:
    """Steps whose values depend on their number only."""
    for _ in range(count):
        generator = torch.Generator().manual_seed(len(states))
        for parameter in model.parameters():
            change = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(change * parameter.requires_grad)
        run.update_(model)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})


def expected(states: States, name: str, sigma_rel: float, begin: int = 1) -> np.ndarray:
    """The average of a tensor whose first update was at step `begin`: before it, it had that update's value."""
    values = [states[max(step, begin) - 1][name].double() for step in range(1, len(states) + 1)]
    return exact_average(values, sigma_rel, range(1, len(states) + 1))


def check(run: PostHocEMA, states: States, begins: dict[str, int], sigma_rel: float = 0.28) -> None:
    weights = run.state_dict(sigma_rel=sigma_rel)
    assert set(weights) == set(begins)
    for name, begin in begins.items():
        np.testing.assert_allclose(weights[name], expected(states, name, sigma_rel, begin), rtol=1e-5, atol=1e-5)


OLD = {"head.weight": 1, "head.bias": 1}


def changed_run(folder: Path, steps: tuple[int, int, int] = (10, 10, 10)) -> tuple[torch.nn.ModuleDict, States]:
    """Thawed after the first steps, then a part is frozen and another added."""
    model, states = network(), []
    with PostHocEMA.from_model(model, folder, **SETTINGS) as run:
        train(model, run, states, steps[0])
        model["back"].requires_grad_(True)
        train(model, run, states, steps[1])
        check(run, states, OLD | {"back.weight": 11, "back.bias": 11})
        model["head"].weight.requires_grad_(False)
        model["more"] = torch.nn.Linear(3, 1)
        train(model, run, states, steps[2])
        check(run, states, {"head.bias": 1, "back.weight": 11, "back.bias": 11, "more.weight": 21, "more.bias": 21})
    return model, states


def test_averages_go_on_and_new_ones_begin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, states = changed_run(tmp_path)
    assert "new: back.weight, back.bias; a new segment of snapshots begins" in caplog.text
    assert "new: more.weight, more.bias; gone: head.weight; a new segment" in caplog.text
    assert {s.info.t: s.info.segment for s in read_directory(tmp_path)} == {5: 0, 10: 0, 15: 1, 20: 1, 25: 2, 30: 2}
    run = PostHocEMA.from_path(tmp_path)
    for t, begins in ((10, OLD), (20, OLD | {"back.weight": 11, "back.bias": 11})):
        weights = run.state_dict(sigma_rel=0.28, t=t)
        assert set(weights) == set(begins)
        for name, begin in begins.items():
            np.testing.assert_allclose(weights[name], expected(states[:t], name, 0.28, begin), rtol=1e-5, atol=1e-5)


def test_a_synthesis_uses_the_segment_of_its_time_and_figures_show_the_newest(tmp_path: Path) -> None:
    changed_run(tmp_path)
    figure = PostHocEMA.from_path(tmp_path).reconstruction_error()
    assert "4 averages" in figure.axes[0].get_legend().get_texts()[0].get_text()
    sources = disk_sources(tmp_path)
    for t, segment in ((30, 2), (20, 1), (17, 1), (10, 0), (7, 0)):
        plan = plan_synthesis(sources, [0.15], t=t)
        assert {source.info.segment for source in plan.sources} == {segment}
        assert plan.aside == 8
    with pytest.raises(InvalidValueError, match=r"t 12: .* between the snapshots at 10 and 15; take one of them"):
        plan_synthesis(sources, [0.15], t=12)
    for snapshot in read_directory(tmp_path):
        assert snapshot.info.measurements is not None
        partners = [d.t for d in snapshot.info.measurements.distances]
        assert all(t > 10 * snapshot.info.segment for t in partners)


def test_a_parameter_that_is_thawed_again_begins_again(tmp_path: Path) -> None:
    model, run, states = begun(tmp_path)
    with run:
        train(model, run, states, 10)
        model["head"].bias.requires_grad_(False)
        train(model, run, states, 4)
        model["head"].bias.requires_grad_(True)
        train(model, run, states, 6)
        check(run, states, {"head.weight": 1, "head.bias": 15})
    assert sorted({s.info.segment for s in read_directory(tmp_path)}) == [0, 2]


def test_a_resumed_run_follows_and_goes_on_exactly(tmp_path: Path) -> None:
    changed_run(tmp_path / "straight")
    model, states = network(), []
    with PostHocEMA.from_model(model, tmp_path / "cut", **SETTINGS) as run:
        train(model, run, states, 10)
        model["back"].requires_grad_(True)
        train(model, run, states, 7)
        state = run.state_dict()
    with PostHocEMA.from_model(model, tmp_path / "cut", **SETTINGS) as run:
        run.load_state_dict(state)
        train(model, run, states, 3)
        model["head"].weight.requires_grad_(False)
        model["more"] = torch.nn.Linear(3, 1)
        train(model, run, states, 5)
    cut, straight = (PostHocEMA.from_path(tmp_path / name).state_dict(0.28, t=20) for name in ("cut", "straight"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in straight.items())
    # From the snapshots alone, with a model that has changed meanwhile.
    model["head"].weight.requires_grad_(True)
    with pytest.raises(ModelMismatchError, match=r"'head\.weight'.*on_change='follow'"):
        PostHocEMA.from_path(tmp_path / "cut", model)
    with PostHocEMA.from_path(tmp_path / "cut", model, on_change="follow") as run:
        train(model, run, states, 5)
        begins = OLD | {"back.weight": 11, "back.bias": 11, "more.weight": 21, "more.bias": 21, "head.weight": 26}
        check(run, states, begins)
    assert read_directory(tmp_path / "cut")[-1].info.segment == 3


def test_thinning_and_pruning_keep_to_a_segment(tmp_path: Path) -> None:
    model, states = network(), []
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, max_checkpoints=2) as run:
        train(model, run, states, 30)
        model["back"].requires_grad_(True)
        train(model, run, states, 30)
    snapshots = read_directory(tmp_path)
    assert [sum(s.info.segment == segment for s in snapshots) for segment in (0, 1)] == [4, 4]
    pruning = plan_pruning(snapshots, keep=1)
    assert {snapshot.info.segment for snapshot in pruning.gone} == {1}
    assert (len(pruning.kept), len(pruning.gone)) == (6, 2)


def test_a_new_parameter_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    model, run, states = begun(tmp_path)
    with run:
        train(model, run, states, 3)
        model["more"] = torch.nn.Linear(2, 2)
        with torch.no_grad():
            model["more"].weight.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match=r"'more.weight': is new, and holds nan"):
            run.update_(model)
        assert set(run.state_dict(sigma_rel=0.28)) == set(OLD)


def test_nothing_is_followed_unasked(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="on_change 'adapt': must be one of raise, follow"):
        PostHocEMA.from_model(network(), tmp_path, on_change="adapt")
    model, states = network(), []
    with PostHocEMA.from_model(model, tmp_path, **(SETTINGS | {"on_change": "raise"})) as run:
        train(model, run, states, 5)
        model["back"].requires_grad_(True)
        with pytest.raises(ModelMismatchError, match=r"'back\.weight'.*on_change='follow', which goes on with it"):
            run.update_(model)


def test_segments_that_lie_in_each_other_do_not_belong_together(tmp_path: Path) -> None:
    changed_run(tmp_path)
    paths = sorted(tmp_path.glob("*.safetensors"))
    early, late = read_snapshot(paths[0]), read_snapshot(paths[-1])
    values = {name: torch.zeros(entry.shape) for name, entry in early.header.tensors.items()}
    info = replace(early.info, segment=7, measurements=None)
    fields = {field: value for field, value in vars(info).items() if field not in ("t", "sigma_rel", "run_id")}
    for path in tmp_path.glob("*5-*.safetensors"):
        path.unlink()
    write_snapshot(tmp_path, info.t, info.sigma_rel, info.run_id, values, **fields)
    assert late.info.segment == 2
    with pytest.raises(MismatchError, match="the segments 7 and 0 do not follow each other in time"):
        read_directory(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("bad", ["head", "back"])
def test_a_new_average_does_not_begin_at_an_update_that_is_skipped(tmp_path: Path, device: str, bad: str) -> None:
    """Whether the value that is not finite is in a tensor that is new, or in one that stays."""
    model, states = network(), []
    settings = SETTINGS | {"on_nonfinite": "warn", "device": device}
    with PostHocEMA.from_model(model, tmp_path, **settings) as run:
        train(model, run, states, 9)
        model["back"].requires_grad_(True)
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            model["back"].weight.fill_(100.0)
            model[bad].bias.fill_(torch.nan)
        with pytest.warns(RuntimeWarning, match=rf"'{bad}\.bias'.* holds nan or infinity"):
            run.update_(model)
        model.load_state_dict(kept)
        run.update_(model)
        average = averages_in(run.state_dict())["0.28"]
        assert torch.equal(average["back.weight"].float(), model["back"].weight)
        assert run.step == 11
    assert {s.info.t: s.info.segment for s in read_directory(tmp_path)} == {5: 0, 9: 0, 11: 1}
