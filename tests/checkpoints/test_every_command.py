"""Every command that takes a run opens checkpoints and imports."""

import html
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import assert_same_tensors
from ema_command import Ema
from factories import contents
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA, Run, import_checkpoints

STEPS = 400
ELEMENTS = 3000
SETTINGS: dict[str, Any] = {"step_from": r"at(\d+)", "prefix": "net.", "exclude": "skip.*"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return checkpoints, their import, and snapshots of an even random walk over a quarter of the
    norm."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "ck").mkdir()
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.full((ELEMENTS,), 4.0))
    with PostHocEMA.from_model(model, folder / "ema", checkpoint_every=100) as tracker:
        for step in range(1, STEPS + 1):
            with torch.no_grad():
                model.w += STEPS**-0.5 * torch.randn(ELEMENTS, generator=generator)
            tracker.update_(model)
            if step % 10 == 0:
                held = {
                    "net.w": model.w.detach(),
                    "net.skip.b": torch.ones(2),
                    "head.w": torch.ones(2),
                }
                torch.save({"state_dict": held}, folder / "ck" / f"v2-at{step}.pt")
    import_checkpoints(folder / "ck", folder / "own", **SETTINGS)
    return folder


def test_checkpoints_are_not_called_snapshots(ema: Ema, run: Path) -> None:
    made = ema("synthesize", run / "own", "--target", "decay:linear:383:387", "--dry-run")
    assert made.out.startswith("file ")
    described = ema("info", run / "own", "--json").json
    assert len(described["checkpoints"]) == 40
    assert (described["refers_to"], described["files"]) == (str(run / "ck"), 40)
    assert described["settings"] == SETTINGS | {"exclude": [SETTINGS["exclude"]]}
    assert re.search(r"predicted error \S+ % from the 40 checkpoints up to t = 400", made.err)
    assert "snapshot" not in made.out + made.err


def test_a_sweep_and_its_page_name_what_to_repeat(
    ema: Ema,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    lengths = ("--sigma-rel", "0.1,0.15,0.2", "--minimize", "--out", "swept")
    assert (
        ema("sweep", run / "own", "--run", "sh -c 'echo {sigma_rel}' {weights}", *lengths).code == 0
    )
    wanted = Run(run / "own").average(0.1)
    assert_same_tensors(load_file("swept/best.safetensors"), wanted)
    assert ema("report", run / "own", "--sweep", "swept", "--out", "page.html").code == 0
    text = html.unescape(Path("page.html").read_text())
    assert "40\N{NO-BREAK SPACE}x weights" in text
    commands = text.replace("<span>", "").replace("</span>", "")
    again, make = re.findall("<code>ema (.*?)</code>", commands)
    assert ema(*shlex.split(make)).code == 0
    assert_same_tensors(load_file("model.safetensors"), wanted)
    assert ema(*shlex.split(again), "--sigma-rel", "0.1,0.15,0.2").code == 0


def test_a_setting_that_would_do_nothing_is_refused(ema: Ema, run: Path, tmp_path: Path) -> None:
    refused = ema("import", run / "ema", "--prefix", "w", "--out", tmp_path / "new")
    assert (refused.code, f"{run / 'ema'}: holds a run already" in refused.error) == (2, True)
    options = {
        "--sigma-rels": "0.05,0.28",
        "--update-every": 10,
        "--update-after-step": 10,
        "--ema-decay": 0.99,
    }
    for option, value in options.items():
        refused = ema(
            "import",
            run / "ck",
            "--step-from",
            r"at(\d+)",
            option,
            value,
            "--out",
            tmp_path / "new",
        )
        assert refused.code == 2
        reason = "does not apply to files that are taken for checkpoints"
        assert refused.error.startswith(f"{option}: {reason}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", ["safetensors", "distributed"])
def test_care_is_for_own_files(layout: str, write: Callable[[str], Path], ema: Ema) -> None:
    folder = write(layout)
    before = contents(folder)
    verified = ema("verify", folder)
    if layout == "safetensors":
        assert "0 intact" in verified.out
    else:
        assert (
            f"{folder}: holds checkpoints of other programs, which have no checksums"
            in verified.error
        )
    assert "no snapshots here" in ema("prune", folder, "--keep", "2", "--yes").error
    assert contents(folder) == before
    damaged = next(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".distcp"))
    os.truncate(damaged, 1000)
    assert (
        "ema verify"
        not in ema("synthesize", folder, "--sigma-rel", "0.2", "--out", folder / "o.pt").error
    )
