"""Steps in names: plain digits are read, numbers that may mean something else are refused."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from posthoc_cli import Run, errors, import_checkpoints

READ = {
    "checkpoint-500": 500, "global_step1000": 1000, "iter_0005000": 5000, "s400": 400, "epoch=3-step=1500-v1": 1500,
    "step_1000_loss_0.25": 1000, "model-7b-step-1000": 1000, "ckpt_5": 5, "ddpm-timesteps-1000-ckpt-500": 500,
    "checkpoint-5-step-1000": 1000, "1000_steps": 1000, "step-20240105": 20240105, "run-2024-01-05-step-7": 7,
}  # fmt: skip
"""Names with a step."""

REFUSED = {
    "step_1_000": "'1_000' may be something else", "1_000_steps": "'1_000' may", "step-1.5k": "'1.5' may",
    "step-1,000": "'1,000' may", "v1.5": "'v1.5' may", "model-fp16": "'fp16' may", "100kimg": "'100kimg' may",
    "model-1M-steps": "'1M' may", "step_1e5": "'1e' may", "llama-7B": "'7B' may", "checkpoint-7b": "'7b' may",
    "20240105": "'20240105' may be a date", "checkpoint-20240105": "'20240105' may be a date",
    "checkpoint-2024-01-05": "'2024-01-05' may", "llama-1B-600k": "tells its step", "00010-of-00020": "tells its step",
    "step²": "tells its step",
}  # fmt: skip
"""Names that may mean something else, and parts of their errors."""


def save(folder: Path, *names: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        save_file({"w": torch.full((3,), float(number))}, folder / f"{name}.safetensors")
    return Run(folder)


@pytest.mark.parametrize("name", READ)
def test_a_name_tells_its_step(tmp_path: Path, name: str) -> None:
    assert save(tmp_path / "files", name).step == READ[name]
    save(tmp_path / "folders" / name, "model")
    assert Run(tmp_path / "folders").step == READ[name]
    if re.search("step|checkpoint-|iter|ckpt", name):  # the folder of a file, only with such a word
        assert Run(tmp_path / "folders" / name / "model.safetensors").step == READ[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_may_mean_something_else_is_refused(tmp_path: Path, name: str) -> None:
    reason = f"{name}.safetensors: .*{REFUSED[name]}.*import with `step_from`"
    with pytest.raises(errors.InvalidValueError, match=reason):
        _ = save(tmp_path, name).step


def test_a_number_of_another_folder_is_no_step(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidValueError, match=r"best.safetensors: neither .* import with `step_from`"):
        _ = save(tmp_path / "exp2024", "best").step


def test_a_number_without_a_word_is_refused_next_to_one_with_a_word(tmp_path: Path) -> None:
    run = save(tmp_path, "step100", "step200", "best-2")
    reason = "best-2.safetensors: its name has no word such as step at its number, as 'step100.safetensors' has"
    with pytest.raises(errors.InvalidValueError, match=re.escape(reason)):
        _ = run.sources


def test_a_pattern_finds_numbers_as_people_write_them(tmp_path: Path) -> None:
    """The remedy for every name that is refused."""
    save(tmp_path, "step_1_000", "step_2_000", "step_3.5k", "step_4,000")
    run = Run(import_checkpoints(tmp_path, tmp_path / "run", step_from=r"step_([\d._,k]+)\.").out or "")
    assert [source.step for source in run.sources] == [1000, 2000, 3500, 4000]
    for pattern in (r"step(_1_000)", r"(st)ep"):
        with pytest.raises(errors.InvalidValueError, match="finds no number in"):
            import_checkpoints(tmp_path, None, dry_run=True, step_from=pattern)
