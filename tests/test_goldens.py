"""Seeded runs whose snapshots, outputs and reports equal the recorded ones, so that a redesign changes no bit.

Contents of tensors are compared by hash. Tensors in float64 and numbers in headers and reports are rounded first: their
last digits differ between processors. Set EMA_RECORD_GOLDENS=1 in the environment to record the goldens again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from posthoc_cli import PostHocEMA

GOLDENS = Path(__file__).with_name("goldens.json")

Report = dict[str, Any]

IGNORED = {"seconds", "reason", "bytes"}


def rounded(number: float, digits: int = 4) -> str:
    """Return the text of a number with so many digits; below 1e-12, where only rounding errors are left, that of 0."""
    return f"{number:.{digits}g}" if abs(number) > 1e-12 else "0"


def content(path: Path) -> Report:
    """Return hashes of a file's tensors and, apart from checksums, its metadata with rounded numbers."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).contiguous() for name in sorted(file.keys())}
        texts = {key: text for key, text in (file.metadata() or {}).items() if "checksum" not in key}
    number = r"-?\d+\.\d+(e[-+]?\d+)?"
    metadata = {key: re.sub(number, lambda match: rounded(float(match[0])), text) for key, text in texts.items()}
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        stable = tensor.float() if tensor.dtype == torch.float64 else tensor
        digest.update(stable.reshape(-1).view(torch.uint8).numpy().tobytes())
    text = json.dumps(metadata, sort_keys=True)
    return {"tensors": digest.hexdigest()[:16], "metadata": hashlib.sha256(text.encode()).hexdigest()[:16]}


def folder(path: Path) -> Report:
    """Return the hashes of every safetensors file below a folder."""
    return {str(file.relative_to(path)): content(file) for file in sorted(path.rglob("*.safetensors"))}


def without_places(report: Any) -> Any:
    """Return a report with rounded numbers, without values that differ between machines."""
    if isinstance(report, dict):
        return {key: without_places(value) for key, value in report.items() if key not in IGNORED}
    if isinstance(report, list):
        return [without_places(value) for value in report]
    if isinstance(report, float):  # small numbers are what is left of sums that cancel
        return float(rounded(report, 4 if abs(report) > 1e-6 else 1))
    return report


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 6).half())
    network[2].bias.requires_grad_(False)
    return network.to(dtype) if dtype != torch.float32 else network


def walk(network: torch.nn.Module, steps: int) -> Iterator[int]:
    """Move all parameters at random, step by step."""
    for step in range(steps):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype))
        yield step


def thinned(directory: Path) -> None:
    """Train the usual run, which is thinned and has a last snapshot off the schedule."""
    network = model()
    with PostHocEMA.from_model(network, directory, update_every=2, checkpoint_every=10, max_checkpoints=5) as tracker:
        for _ in walk(network, 126):
            tracker.update_(network)


def images(directory: Path) -> None:
    """Train with a clock in images and three profiles at full precision, resumed from snapshots in the middle."""
    network = model()
    options: dict[str, Any] = {"sigma_rels": (0.05, 0.1, 0.28), "checkpoint_dtype": None, "t_unit": "images"}
    tracker = PostHocEMA.from_model(network, directory, update_every=1, checkpoint_every=8, **options)
    steps = walk(network, 96)

    def train(tracker: PostHocEMA, steps: Iterable[int]) -> None:
        with tracker:
            for step in steps:
                tracker.update_(network, t=32.0 * (step + 1) + 0.5 * step**1.5)

    train(tracker, islice(steps, 48))
    train(PostHocEMA.from_path(directory, network), steps)


def narrow(directory: Path) -> None:
    """Train in bfloat16 with tied weights, tensors that are left out or copied, and an exact state."""
    network = model(torch.bfloat16)
    network[0].tied = network[0].weight
    with PostHocEMA.from_model(
        network, directory, update_every=1, checkpoint_every=20, exclude="1.*", keep_state=True
    ) as tracker:
        for _ in walk(network, 100):
            tracker.update_(network)


TRAININGS = {"thinned": thinned, "images": images, "narrow": narrow}


COMMANDS = {
    "one": "synthesize thinned --sigma-rel 0.15 -o one.safetensors --json",
    "several": "synthesize thinned --sigma-rel 0.06,0.1,0.2 --target beta:0.9 --target window:40 --dtype float32 "
    "-o several/ --json",
    "paper": "synthesize images --sigma-rel 0.12 --method paper --t 2000 --dtype float64 -o paper.safetensors --json",
    "between": "synthesize images --target between:600:2400 -o between.safetensors --json",
    "narrow": "synthesize narrow --sigma-rel 0.07 --step 80 -o narrow.safetensors --json",
    "sharded": "synthesize images --sigma-rel 0.2 --layout sharded --max-shard-size 200 -o sharded/ --json",
    "dry": "synthesize thinned --sigma-rel 0.1 --dry-run --json",
    "export": "export sharded --dtype bfloat16 -o exported.safetensors --json",
    "export-snapshot": "export {snapshot} -o snapshot.safetensors --json",
    "info": "info thinned --json",
    "info-images": "info images --json",
    "info-output": "info one.safetensors --json",
    "info-state": "info narrow/state.safetensors --json",
    "info-model": "info sharded --json",
    "verify": "verify thinned --json",
    "verify-output": "verify several --json",
    "prune": "prune images --keep 4 --dry-run --json",
    "prune-error": "prune images --max-error 0.05 --dry-run --json",
    "errors": "error-plot images --json -o errors.png",
    "errors-planned": "error-plot --sigma-rels 0.05,0.28 --steps 4000 --checkpoint-every 200 --json -o planned.png",
    "plan": "plan --steps 3000 --params 100K --max-size 100MB --json",
    "plan-one": "plan --steps 40000 --params 1M --max-size 300MB --sigma-rels 0.05,0.28 --json",
    "profile": "profile --sigma-rel 0.1,0.2 --steps 10000 --json",
}


def record(place: Path, run: Callable[[list[str]], str]) -> Report:
    """Make all goldens in `place`, the working directory; `run` returns the output of a command."""
    found: Report = {"snapshots": {}, "reports": {}, "outputs": {}}
    with mock.patch("secrets.token_hex", side_effect=_run_id):
        for name, train in TRAININGS.items():
            train(place / name)
            found["snapshots"][name] = folder(place / name)
    snapshot = sorted(path for path in (place / "images").glob("*.safetensors") if path.name[0].isdigit())[0]
    for name, words in COMMANDS.items():
        printed = run(words.format(snapshot=snapshot.relative_to(place)).split())
        found["reports"][name] = without_places(json.loads(printed))
    for path in sorted(place.iterdir()):
        if path.name not in TRAININGS and (path.is_dir() or path.suffix == ".safetensors"):
            found["outputs"][path.name] = folder(path) if path.is_dir() else content(path)
    return found


def _lines(entries: Report) -> str:
    """Return JSON members, one per line."""
    return ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())


def _run_id(nbytes: int) -> str:
    """Return a constant run id of 16 bytes, and random names of temporary files, which are shorter."""
    return "5eed" * 8 if nbytes == 16 else os.urandom(nbytes).hex()


def test_a_recorded_run_is_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: Any) -> None:
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> str:
        result = ema(*words)
        assert result.code == 0, (words, result.err)
        return str(result.out)

    found = json.loads(json.dumps(record(tmp_path, run)))
    if os.environ.get("EMA_RECORD_GOLDENS"):
        lines = [f"{json.dumps(kind)}: {{\n{_lines(entries)}\n}}" for kind, entries in found.items()]
        GOLDENS.write_text("{" + ",\n".join(lines) + "}\n")
    expected = json.loads(GOLDENS.read_text())
    assert found["snapshots"] == expected["snapshots"]
    assert found["outputs"] == expected["outputs"]
    for name in COMMANDS:
        assert found["reports"][name] == expected["reports"][name], name
