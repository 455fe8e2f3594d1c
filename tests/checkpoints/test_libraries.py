"""Averages that other libraries stored, written by the libraries themselves where they are
installed."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import edm2_layout
import numpy as np
import pytest
import torch
from checkpoint_layouts import check_average
from factories import Span, exact_weights

from posthoc_cli import Run, errors, import_checkpoints, synthesize
from posthoc_cli.profiles import gamma_from_sigma_rel

WIDTHS = (0.05, 0.28)
Imported = Callable[..., Run]


ASKED: list[tuple[str, dict[str, Any], str]] = [
    ("ema_model.w", {}, "^sigma_rels: must be given to an import: files of ema-pytorch, such as 0"),
    ("ema_model.w", {"sigma_rels": WIDTHS}, "^update_every: must be given"),
    (
        "ema_model.w",
        {"sigma_rels": (0.05,), "update_every": 1},
        r"^sigma_rels: must be one for each average, also for that in 1\.",
    ),
    (
        "w",
        {"sigma_rels": WIDTHS, "update_every": 5},
        "^update_after_step: must be given .* is 100",
    ),
]


@pytest.mark.parametrize(("name", "settings", "reason"), ASKED)
def test_what_numbered_files_lack_is_asked_for(
    name: str,
    settings: dict[str, Any],
    reason: str,
    tmp_path: Path,
) -> None:
    """With a wrong `update_after_step`, averages were 8 % off."""
    for number in (0, 1):
        content = {"initted": torch.tensor(True), name: torch.ones(3)}
        torch.save(content, tmp_path / f"{number}.200.pt")
    with pytest.raises(errors.InvalidValueError, match=reason):
        import_checkpoints(tmp_path, None, dry_run=True, **settings)


@pytest.mark.parametrize(("update_every", "rate"), [(10, "falling"), (100, "constant")])
def test_the_error_of_a_repair_is_known(
    tmp_path: Path,
    imported: Imported,
    update_every: int,
    rate: str,
) -> None:
    """Stored averages are mostly of the first weights, which are far smaller than those of the
    synthesized average."""
    steps = 6000
    size = 300
    fraction = np.arange(steps)[:, None] / steps
    random = np.random.default_rng(5)
    moves = (1 - fraction if rate == "falling" else 1) * random.standard_normal((steps, size))
    moves[0] *= 20
    for before, row in pairwise(moves):  # momentum
        row += 0.8 * before
    path = np.cumsum(moves, axis=0)
    calls = np.arange(1, steps + 1, update_every)
    for number, width in enumerate(WIDTHS):
        average = np.zeros(size)
        shares = (calls / (calls + 1)) ** (gamma_from_sigma_rel(width) + 1)
        for call, share in zip(calls, [0, *shares[1:]], strict=True):
            average = share * average + (1 - share) * path[call - 1]
            if (last := call + update_every - 1) % 300 == 0:
                value = {
                    "initted": torch.tensor(True),
                    "ema_model.weight": torch.from_numpy(average).half(),
                }
                torch.save(value, tmp_path / f"{number}.{last}.pt")
    plan = imported(tmp_path, sigma_rels=WIDTHS, update_every=update_every).plan(
        [0.05, 0.1, 0.15, 0.2, 0.25]
    )
    made = torch.stack(dict(synthesize(plan))["weight"]).double().numpy()
    true = (
        np.array(
            [
                exact_weights(width, np.arange(1.0, steps + 1))
                for width in (0.05, 0.1, 0.15, 0.2, 0.25)
            ]
        )
        @ path
    )
    error = np.linalg.norm(made - true, axis=1) / np.linalg.norm(true, axis=1)
    ratios = error / [plan.predicted_error(index) for index in range(5)]
    assert np.all((ratios > 0.5) & (ratios < 1.7)), ratios


def test_pickles_of_edm2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = {}
    for kimg in (0, 1024, 2048):
        for width in (0.05, 0.1):
            net = edm2_layout.network()
            edm2_layout.save(tmp_path / f"network-snapshot-{kimg:07d}-{width:.3f}.pkl", net)
            states[1000 * kimg, width] = net.state_dict()
        # as its training does
        torch.save({"net": net.state_dict()}, tmp_path / f"training-state-{kimg:07d}.pt")
    run = Run(tmp_path)
    assert [(source.t, round(source.sigma_rel, 3)) for source in run.sources] == [
        (t, width) for t in (1_024_000, 2_048_000) for width in (0.05, 0.1)
    ]
    assert run.sources[0].t_unit == "images"
    assert set(run.tensors) == set(net.state_dict())
    check_average(run, states, 0.07, at="t sigma_rel", exact=1e-6)
    published = tmp_path / "edm2-img512-s-2147483-0.050.pkl"
    published.write_bytes((tmp_path / "network-snapshot-0001024-0.050.pkl").read_bytes())
    assert [(one.t, one.sigma_rel) for one in Run(published).sources] == [(2_147_483_000, 0.05)]
    other = published.rename(tmp_path / "other.pkl")
    with pytest.raises(errors.FileFormatError, match=r"other.pkl: is no file of edm2"):
        import_checkpoints(other, None, dry_run=True, kind="edm2")


def test_weights_in_the_models_dtype_have_no_rounding_error(tmp_path: Path) -> None:
    increments = torch.randn(
        4000, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    path = 100 + (increments * torch.linspace(1, 0.1, 4000, dtype=torch.float64)[:, None]).cumsum(0)
    for t in (1000, 2000, 3000, 4000):
        torch.save({"w": path[t - 1].bfloat16()}, tmp_path / f"step{t}.pt")
    plan = Run(tmp_path).plan(Span(3000, 4000))
    assert plan.reconstruction.coefficients[-2:, 0] == pytest.approx([0.5, 0.5], abs=0.02)
