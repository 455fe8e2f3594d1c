"""Arguments that the shell has split, since they were not in quotes."""

import glob
import shlex
from pathlib import Path

import pytest
import torch
from ema_command import run_ema


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    """Checkpoints in files and in folders, and a working directory that holds both."""
    monkeypatch.chdir(tmp_path)
    Path("ck").mkdir()
    for step in (18, 19, 20, 21, 22):
        weights = {"w": torch.full((3,), float(step))}
        torch.save(weights, f"ck/epoch_{step:03}.pt")
        folder = Path(f"out [1]/checkpoint-{step}")
        folder.mkdir(parents=True)
        torch.save(weights, folder / "model.pt")


def as_a_shell(line):
    """Split a line as a shell does, with the files of its patterns."""
    words = []
    for word in shlex.split(line):
        found = sorted(glob.glob(word))  # noqa: PTH207
        words += found or [word]
    return words


PATTERNS = {
    "synthesize ck/*.pt --target last:2 --out a.pt": "'ck/epoch_0*.pt'",
    "synthesize --target last:2 --out a.pt ck/epoch_02*.pt": "'ck/epoch_02*.pt'",
    "info ck/epoch_01*": "'ck/epoch_01*.pt'",
    "import ck/*.pt --out run": "'ck/epoch_0*.pt'",
    "audit ck/*": "'ck/epoch_0*.pt'",
    "error-plot ck/*.pt": "'ck/epoch_0*.pt'",
    "sweep ck/*.pt --eval 'true {weights}' --minimize": "'ck/epoch_0*.pt'",
    "info out*/checkpoint-*": "'out [[]1]/checkpoint-*'",
}
"""Lines, and the pattern that each meant."""


def test_the_pattern_is_as_short_as_may_be():
    """Here all names end in 0.pt, which the user has not typed."""
    for path in Path("ck").iterdir():
        if path.stem[-1] != "0":
            path.unlink()
    torch.save({"w": torch.ones(3)}, "ck/epoch_030.pt")
    refused = run_ema(*as_a_shell("info ck/epoch*.pt"))
    assert refused.error.endswith("put it in quotes: 'ck/epoch_0*.pt'")


@pytest.mark.parametrize("line", PATTERNS)
def test_a_pattern_without_quotes_is_named_with_quotes(line):
    refused = run_ema(*as_a_shell(line))
    assert refused.code == 2
    assert refused.error.endswith(f"of a pattern; put it in quotes: {PATTERNS[line]}")


def test_the_pattern_in_quotes_goes_through():
    refused = run_ema(*as_a_shell("synthesize ck/epoch_02*.pt --target last:2 --out a.pt"))
    _, _, pattern = refused.error.rpartition(": ")
    done = run_ema(*shlex.split(f"synthesize {pattern} --target last:2 --out a.pt"))
    assert done.code == 0, done.err
    assert torch.load("a.pt")["w"].tolist() == [21.5] * 3


COMMANDS = (
    "python3 eval.py {weights}",
    "python3 eval.py --data x {weights}",
    "python3 eval.py --metric x {weights}",
    "sh -c 'x {weights} | tail'",
    "python3 eval.py",
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("line", ["sweep ck --eval {} --minimize", "sweep ck --minimize --eval {}"])
def test_the_command_of_a_sweep_without_quotes_is_named_with_quotes(line, command):
    refused = run_ema(*shlex.split(line.replace("{}", command)))
    assert refused.code == 2
    _, _, advice = refused.error.partition(" has split the command; put it in quotes: ")
    assert shlex.split(advice) == ["--eval", command]


SPACES = {
    "synthesize my run/ck 1 --target last:2 --out a.pt": "'my run/ck 1'",
    "info my run/ck 1": "'my run/ck 1'",
    "info my run/ck 1/epoch_*.pt": "'my run/ck 1/epoch_*.pt'",
    "sweep my run/ck 1 --eval 'true {weights}' --minimize": "'my run/ck 1'",
    "sweep --raw my run/ck 1/epoch_022.pt ck --eval 'true {weights}' --minimize":
        "'my run/ck 1/epoch_022.pt'",
    "synthesize ck --target last:2 --like my run/ck 1/epoch_022.pt --out a.pt":
        "'my run/ck 1/epoch_022.pt'",
    "error-plot my run/ck 1": "'my run/ck 1'",
    "verify ck my run/ck 1": "'my run/ck 1'",
    "import my run/ck 1 --out run": "'my run/ck 1'",
    "audit a b": "'a b'",  # of which a exists, too
}  # fmt: skip
"""Lines, and the path that each meant."""


@pytest.mark.parametrize("line", SPACES)
def test_a_path_with_spaces_without_quotes_is_named_with_quotes(line):
    for folder in ("my run", "a", "a b"):
        Path(folder).mkdir()
    Path("ck").rename("my run/ck 1")
    Path("ck").mkdir()
    refused = run_ema(*shlex.split(line))
    assert refused.code == 2
    expected = f"split a path at its spaces; put it in quotes: {SPACES[line]}"
    assert refused.error.endswith(expected)


def test_the_name_of_an_output_with_spaces_is_asked_for_in_quotes():
    refused = run_ema(*shlex.split("synthesize ck --target last:2 --out my average.pt"))
    assert "(average.pt); put a path with spaces in quotes (see " in refused.error


def test_two_folders_whose_names_together_are_a_third_one_are_two():
    for step in (18, 19, 20):
        for folder in ("a", "b", "a b"):
            Path(folder).mkdir(exist_ok=True)
            torch.save({"w": torch.full((3,), float(step))}, f"{folder}/epoch_{step}.pt")
    assert run_ema(*shlex.split("error-plot a b --json")).code == 0


OTHERS = (
    "prune ck/*.pt --keep 3",  # which takes no pattern
    "export ck/*.pt --out a.pt",
    "info ck out*",  # which no pattern means
    "info ck/epoch_018.pt ck/epoch_021.pt",
    "sweep ck --eval 'python3 {weights}' --minimise",
    "synthesize ck --target last:2 --sigma 3",
)


@pytest.mark.parametrize("line", OTHERS)
def test_other_mistakes_ask_for_no_quotes(line):
    refused = run_ema(*as_a_shell(line))
    assert refused.code == 2
    assert "in quotes" not in refused.error
