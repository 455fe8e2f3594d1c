"""What other libraries' averages hold, by runs of the installed packages."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ema_pytorch import PostHocEMA as LucidrainsEMA
from posthoc_ema import PostHocEMA as NextmlEMA

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import Discrete, gamma_from_sigma_rel
from posthoc_cli.profiles.other_libraries import (
    MOST_TIMES,
    ema_pytorch_profile,
    posthoc_ema_profile,
    torchtitan_profile,
)
from posthoc_cli.snapshots.sources import with_sampled_measurements

WIDTHS = (0.05, 0.28)
STEPS, EVERY = 1000, 250


def walk(steps: int = STEPS) -> torch.Tensor:
    """Weights after each step, float64: shape [steps, 8]."""
    return torch.randn(steps, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)


def model() -> torch.nn.Module:
    return torch.nn.Linear(8, 1, bias=False, dtype=torch.float64)


def averaged(profile: Discrete, path: torch.Tensor) -> torch.Tensor:
    """The sum that a profile says, over the weights after each step."""
    places = profile.times.astype(int) - 1
    assert np.array_equal(places + 1, profile.times)
    return torch.from_numpy(profile.masses) @ path[places]


def lucidrains(network: torch.nn.Module, folder: Path, update_every: int) -> LucidrainsEMA:
    return LucidrainsEMA(
        network, sigma_rels=WIDTHS, update_every=update_every, checkpoint_every_num_steps=EVERY,
        checkpoint_folder=str(folder), checkpoint_dtype=torch.float64,
    )  # fmt: skip


def run(update, network: torch.nn.Module, path: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    for weights in path:
        network.weight.data.copy_(weights)
        update(network)


@pytest.mark.parametrize("update_every", [1, 10, 100])
def test_ema_pytorch(tmp_path: Path, update_every: int) -> None:
    network, path = model(), walk()
    ema = lucidrains(network, tmp_path, update_every)
    run(lambda _: ema.update(), network, path)
    for index, width in enumerate(WIDTHS):
        for step in range(EVERY, STEPS + 1, EVERY):
            stored = torch.load(tmp_path / f"{index}.{step}.pt", weights_only=True)["ema_model.weight"]
            profile = ema_pytorch_profile(gamma_from_sigma_rel(width), step, update_every)
            torch.testing.assert_close(stored[0], averaged(profile, path), rtol=0, atol=1e-9)
            assert profile.t == step


def test_ema_pytorch_goes_on_from_its_state(tmp_path: Path) -> None:
    network, path = model(), walk()
    first = lucidrains(network, tmp_path, 10)
    run(lambda _: first.update(), network, path[:503])
    second = lucidrains(model(), tmp_path, 10)
    second.load_state_dict(first.state_dict())
    for average in second.ema_models:
        average.online_model[0] = network
    run(lambda _: second.update(), network, path[503:])
    stored = torch.load(tmp_path / f"1.{STEPS}.pt", weights_only=True)["ema_model.weight"]
    profile = ema_pytorch_profile(gamma_from_sigma_rel(0.28), STEPS, 10)
    torch.testing.assert_close(stored[0], averaged(profile, path), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("update_every", "update_after_step"), [(1, 100), (10, 100), (100, 137), (10, 0), (10, 1)])
def test_posthoc_ema(tmp_path: Path, update_every: int, update_after_step: int) -> None:
    network, path = model(), walk()
    ema = NextmlEMA.from_model(
        network, tmp_path, sigma_rels=WIDTHS, update_every=update_every, checkpoint_every=EVERY,
        update_after_step=update_after_step,
    )  # fmt: skip
    run(ema.update_, network, path)
    for index, width in enumerate(WIDTHS):
        for step in range(EVERY, STEPS + 1, EVERY):
            stored = torch.load(tmp_path / f"{index}.{step}.pt", weights_only=True)["weight"]
            profile = posthoc_ema_profile(gamma_from_sigma_rel(width), step, update_every, update_after_step)
            torch.testing.assert_close(stored[0], averaged(profile, path), rtol=0, atol=1e-9)
            assert (profile.t, profile.t_first) == (step, max(update_after_step, 1))


def test_very_many_updates_are_joined() -> None:
    gamma, step = gamma_from_sigma_rel(0.1), 10 * MOST_TIMES + 7
    profile = ema_pytorch_profile(gamma, step, 1)
    assert profile.times.size <= MOST_TIMES
    s = np.linspace(0, step, 1001)
    power = 1 - np.minimum((s + 1) / (step + 1), 1) ** (gamma + 1)
    assert np.abs(profile.tail(s) - power).max() < 10 * (gamma + 1) / step
    mean = (profile.masses @ profile.times, (step + 1) * (gamma + 1) / (gamma + 2) - 0.5)
    assert mean[0] == pytest.approx(mean[1], rel=1e-6)


@pytest.mark.parametrize(("update_every", "start_step"), [(1, 0), (10, 0), (1, 300), (7, 100)])
def test_torchtitan(update_every: int, start_step: int) -> None:
    """Its rule step by step in float64: it begins as a copy of the weights before the training, here zeros."""
    path = walk()
    average = torch.zeros_like(path[0])
    for step, weights in enumerate(path, 1):
        elapsed = step - start_step
        if elapsed >= 0 and elapsed % update_every == 0:
            decay = 2.0 ** (-20 / max(elapsed // update_every, 1))
            average = decay * average + (1 - decay) * weights
        if step in (start_step or update_every, start_step + 3 * update_every, 1000):
            profile = torchtitan_profile(step, update_every, start_step)
            made = averaged(profile, path)
            assert (made - average).norm() <= 2e-6 * average.norm() + 1e-12
    steps = np.arange(400.0, 1000)
    power = 1 - (steps / 1000) ** (20 * math.log(2))
    assert start_step or np.abs(profile.tail(steps) - power).max() < 0.015 * update_every
    with pytest.raises(InvalidValueError, match="that of the first update"):
        torchtitan_profile((start_step or update_every) - 1, update_every, start_step)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InvalidValueError, match="at least update_after_step, 100"):
        posthoc_ema_profile(1.0, 99)


# --- the motion that stored averages tell


def drifting_walk(elements: int = 1000) -> torch.Tensor:
    """Weights of norm about 1 whose steps fall to a tenth, and for a part go one way: shape [steps, elements]."""
    generator = torch.Generator().manual_seed(1)
    moves = torch.randn(STEPS, elements, generator=generator, dtype=torch.float64)
    moves += 0.2 * torch.randn(elements, generator=generator, dtype=torch.float64)
    path = (moves * torch.logspace(0, -1, STEPS, dtype=torch.float64)[:, None]).cumsum(0)
    begin = torch.randn(elements, generator=generator, dtype=torch.float64) / elements**0.5
    return begin + 0.3 * path / path[-1].norm()


def stored_run(library: str, folder: Path, path: torch.Tensor, update_every: int, dtype: torch.dtype) -> Run:
    """What a library has stored every 50 steps of a path."""
    network = torch.nn.Linear(path.shape[1], 1, bias=False, dtype=torch.float64)
    settings: dict[str, Any] = {"sigma_rels": WIDTHS, "update_every": update_every, "checkpoint_dtype": dtype}
    if library == "ema-pytorch":
        folders = {"checkpoint_every_num_steps": 50, "checkpoint_folder": str(folder)}
        ema: Any = LucidrainsEMA(network, **settings, **folders)
        run(lambda _: ema.update(), network, path)
    else:
        ema = NextmlEMA.from_model(
            network, folder, checkpoint_every=50, update_after_step=1, max_checkpoints=99, **settings
        )
        run(ema.update_, network, path)
    more = {} if library == "ema-pytorch" else {"update_after_step": 1}
    out = import_checkpoints(folder, folder / "run", kind=library, sigma_rels=WIDTHS, update_every=update_every, **more)
    return Run(out.out or "")


@pytest.mark.parametrize("library", ["ema-pytorch", "posthoc-ema"])
@pytest.mark.parametrize("update_every", [1, 10])
def test_recent_motion_is_told_by_three_successive_averages(tmp_path: Path, library: str, update_every: int) -> None:
    """What a distance is from has the values of its profile, and none of the motion before the last two intervals."""
    path = drifting_walk(elements=50)
    sources = stored_run(library, tmp_path, path, update_every, torch.float64).sources
    measured = dict(
        zip(((one.info.t, one.info.sigma_rel) for one in sources), with_sampled_measurements(sources), strict=True)
    )
    early = path.clone()
    early[:400] += torch.randn(400, path.shape[1], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for source in sources:
        info = measured[source.info.t, source.info.sigma_rel]
        assert info.measurements is not None
        if source.info.t < 150:  # without two earlier ones
            assert len(info.measurements.distances) == source.info.t // 50 * 2 - 1
            continue
        (distance,) = info.measurements.distances
        assert isinstance(distance.other, Discrete)
        assert isinstance(source.profile, Discrete)
        for values in (path, early) if source.info.t > 500 else (path,):
            apart = averaged(source.profile, values) - averaged(distance.other, values)
            assert float(apart.square().sum()) == pytest.approx(distance.squared, rel=1e-6)
        assert distance.other.t == source.info.t - 50


@pytest.mark.parametrize("library", ["ema-pytorch", "posthoc-ema"])
@pytest.mark.parametrize(("update_every", "dtype"), [(10, torch.float16), (10, torch.float32)])
def test_predicted_errors_of_repaired_averages_hold(
    tmp_path: Path, library: str, update_every: int, dtype: torch.dtype
) -> None:
    """By distances of long averages from earlier ones alone, late motion, and with it errors, seemed much larger."""
    path = drifting_walk()
    stored = stored_run(library, tmp_path, path, update_every, dtype)
    ends = np.arange(STEPS + 1) / STEPS
    for width in (0.07, 0.1, 0.15, 0.2, 0.25):
        true = torch.from_numpy(np.diff(ends ** (gamma_from_sigma_rel(width) + 1))) @ path
        made = stored.average(width, dtype="float64")
        error = float((made["weight"][0] - true).norm() / true.norm())
        assert made.predicted_error is not None
        assert 0.5 < error / made.predicted_error < 2, width
