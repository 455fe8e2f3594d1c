"""Averages that other libraries stored, written by the libraries themselves where they are
installed."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import edm2_layout
import numpy as np
import pytest
import torch
from checkpoint_layouts import check_average
from factories import FloatArray, Span, exact_weights

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.profiles import gamma_from_sigma_rel

WIDTHS = (0.05, 0.28)
Imported = Callable[..., Run]


ASKED = [
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
def test_what_numbered_files_lack_is_asked_for(name, settings, reason, tmp_path):
    """With a wrong `update_after_step`, averages were 8 % off."""
    for number in (0, 1):
        content = {"initted": torch.tensor(True), name: torch.ones(3)}
        torch.save(content, tmp_path / f"{number}.200.pt")
    with pytest.raises(InvalidValueError, match=reason):
        import_checkpoints(tmp_path, None, dry_run=True, **settings)


@pytest.mark.parametrize(
    ("update_every", "rate"),
    [
        (10, "falling"),
        (100, "constant"),
    ],
)
def test_the_error_of_a_repair_is_known(tmp_path, imported, update_every, rate):
    """Stored averages are mostly of the first weights, which are far smaller than those of the
    synthesized average."""
    path = with_momentum(rate)
    for number, width in enumerate(WIDTHS):
        for step, average in stored_averages(path, width, update_every):
            content = {
                "initted": torch.tensor(True),
                "ema_model.weight": torch.from_numpy(average).half(),
            }
            torch.save(content, tmp_path / f"{number}.{step}.pt")
    run = imported(tmp_path, sigma_rels=WIDTHS, update_every=update_every)
    for width in (0.05, 0.1, 0.15, 0.2, 0.25):
        made = run.average(width)
        true = exact_weights(width, range(1, len(path) + 1)) @ path
        distance = np.linalg.norm(made["weight"].double().numpy() - true)
        error = distance / np.linalg.norm(true)
        assert 0.5 < error / made.predicted_error < 1.7


def with_momentum(rate: str) -> FloatArray:
    """Return weights that begin small, and whose moves continue, at a rate that falls or not."""
    random = np.random.default_rng(5)
    moves = random.standard_normal((6000, 300))
    if rate == "falling":
        left = 1 - np.arange(6000) / 6000
        moves *= left[:, None]
    moves[0] *= 20
    for before, row in pairwise(moves):
        row += 0.8 * before
    return np.cumsum(moves, axis=0)


def stored_averages(
    path: FloatArray,
    width: float,
    every: int,
) -> Iterator[tuple[int, FloatArray]]:
    """Yield steps and averages, in which each value has the share of one step."""
    exponent = gamma_from_sigma_rel(width) + 1
    average = path[0]
    for call in range(1, len(path) + 1, every):
        if call > 1:
            kept = (call / (call + 1)) ** exponent
            average = kept * average + (1 - kept) * path[call - 1]
        last = call + every - 1
        if last % 300 == 0:
            yield last, average


def test_pickles_of_edm2(tmp_path):
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
    assert [source.t for source in run.sources] == [1_024_000, 1_024_000, 2_048_000, 2_048_000]
    widths = [source.sigma_rel for source in run.sources]
    assert widths == pytest.approx([0.05, 0.1, 0.05, 0.1])
    assert run.sources[0].t_unit == "images"
    assert set(run.tensors) == set(net.state_dict())
    check_average(run, states, 0.07, at="t sigma_rel", exact=1e-6)


def test_a_published_file_of_edm2_has_its_time_and_width_in_its_name(tmp_path):
    file = tmp_path / "edm2-img512-s-2147483-0.050.pkl"
    edm2_layout.save(file, edm2_layout.network())
    (source,) = Run(file).sources
    assert source.t == 2_147_483_000
    assert source.sigma_rel == 0.05


def test_a_file_of_another_name_is_not_of_edm2(tmp_path):
    file = tmp_path / "other.pkl"
    edm2_layout.save(file, edm2_layout.network())
    with pytest.raises(FileFormatError, match=r"other.pkl: is no file of edm2"):
        import_checkpoints(file, None, dry_run=True, kind="edm2")


def test_weights_in_the_models_dtype_have_no_rounding_error(tmp_path):
    moves = torch.randn(4000, 500).double()
    falling = torch.linspace(1, 0.1, 4000).double()
    path = 100 + torch.cumsum(falling[:, None] * moves, dim=0)
    for t in (1000, 2000, 3000, 4000):
        torch.save({"w": path[t - 1].bfloat16()}, tmp_path / f"step{t}.pt")
    plan = Run(tmp_path).plan(Span(3000, 4000))
    *_, before, last = plan.reconstruction.coefficients[:, 0]
    assert before == pytest.approx(0.5, abs=0.02)
    assert last == pytest.approx(0.5, abs=0.02)
