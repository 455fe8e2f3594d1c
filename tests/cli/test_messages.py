"""The messages for wrong input: one line that names the input and what is accepted; no file is written or changed.

The cases are in messages.txt: a command, then its exit code and message. To add a case, write the command, set
EMA_RECORD_MESSAGES=1, run this test, and read the difference.
"""

from __future__ import annotations

import ast
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ema_command import Ema
from factories import OTHER_RUN_ID, contents, flip_bit, read_snapshot, rewrite_snapshot
from safetensors.numpy import save_file

import posthoc_cli

MESSAGES = Path(__file__).parent.parent / "messages.txt"


def recorded() -> dict[str, str]:
    """Return the exit code and message of each command."""
    found = re.findall(r"^\$ ema (.*)\n(.*)$", MESSAGES.read_text(), re.MULTILINE)
    return dict(found)


def lose_a_tensor(path: Path) -> None:
    tensors = dict(read_snapshot(path).tensors)
    del tensors["0.weight"]
    rewrite_snapshot(path, lambda values: values.pop("0.weight"), tensors=tensors)


HARMS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "flipped-payload": lambda path: flip_bit(path, -3), "flipped-header": lambda path: flip_bit(path, 40),
    "other-run": lambda path: rewrite_snapshot(path, run_id=OTHER_RUN_ID), "lost-tensor": lose_a_tensor,
}  # fmt: skip
"""The harm done to one snapshot of the directory of each name."""


@pytest.fixture(scope="module")
def place(_recorded_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a run, and with files and directories that cannot be used instead of one."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(_recorded_run, place / "run")
    for name, harm in HARMS.items():
        shutil.copytree(_recorded_run, place / name)
        harm(place / name / "0000000000000300-0.28.safetensors")
    for folder in ("empty", "foreign", "other"):
        (place / folder).mkdir()
    for model in ("model", "foreign/model"):
        save_file({"w": np.ones(3, np.float32)}, place / f"{model}.safetensors")
    (place / "m.pt").write_bytes(pickle.dumps({"w": 1}))
    (place / "broken.safetensors").write_bytes(b"no header")
    for name in ("text", "there.safetensors", "there.png", "other/notes.txt"):
        (place / name).write_text("precious")
    return place


@pytest.mark.parametrize("command", sorted({line.split()[0] for line in recorded()}))
def test_wrong_input_is_one_line_and_changes_nothing(
    ema: Ema, place: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    expected = {line: answer for line, answer in recorded().items() if line.split()[0] == command}
    found = {}
    for line in expected:
        result = ema(*shlex.split(line))
        # Ids are random, and the last digits of measurements in headers differ between processors.
        message = re.sub(r"\b[0-9a-f]{8} and", "ID and", re.sub(r"[\d,]+ bytes|says [\d,]+", "N bytes", result.error))
        found[line] = f"{result.code} {message}"
        assert result.out == "" or result.code == 1, line
    assert contents(place) == before
    if os.environ.get("EMA_RECORD_MESSAGES"):
        head = MESSAGES.read_text().split("\n")[0]
        cases = "".join(f"$ ema {line}\n{answer}\n" for line, answer in (recorded() | found).items())
        MESSAGES.write_text(f"{head}\n\n{cases}")
    else:
        assert found == expected


def test_no_error_of_the_library_names_an_option_or_a_command() -> None:
    package = Path(posthoc_cli.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] in ("cli", "demo"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                assert not re.search(r"""(\s|`|["'])--[a-z]|\bema [a-z]+\b""", ast.unparse(node)), path


def test_a_warning_comes_once_for_one_cause(ema: Ema, tmp_path: Path) -> None:
    """A report reads the checkpoints several times; here they contain EMAs with an unknown decay."""
    for step in (10, 20):
        weights = {"w": torch.full((3, 2), float(step))}
        average = {"n_averaged": torch.tensor(step), "module.w": weights["w"]}
        torch.save({"model": weights, "ema": average}, tmp_path / f"{step}.pt")
    done = ema("report", tmp_path, "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert done.err.count("left out of averages") == 1
