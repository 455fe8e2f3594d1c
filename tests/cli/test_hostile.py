"""Untrusted directories, names and environments: no other file is changed, no code is run, and
nothing leaks."""

import getpass
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from checking import heavy, refused
from ema_command import unmeasured_environment
from factories import RUN_ID, contents, write_snapshot
from safetensors.torch import save_file

from posthoc_cli.errors import WriteError
from posthoc_cli.plots import PICTURES
from posthoc_cli.snapshots.directory import DirectoryLock


@pytest.fixture
def precious(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "precious"
    path.write_bytes(b"mine")
    return path


@pytest.mark.parametrize(
    "line",
    [
        "synthesize run --sigma-rel 0.1 --out out.safetensors",
        "synthesize run --sigma-rel 0.1 --out out.pt",
        "error-plot run --out out.png",
    ],
)
def test_a_link_in_place_of_an_output_is_replaced_itself_and_only_with_overwrite(
    typed, precious, line
):
    *_, name = line.split()
    out = Path(name)
    out.symlink_to(precious)
    assert typed(line).error.startswith(name)
    assert out.is_symlink()
    assert typed(f"{line} --overwrite").code == 0
    assert not out.is_symlink()
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["precious", "nothing"])
def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path, precious, name):
    linked = precious.with_name(name)
    (tmp_path / ".ema.lock").symlink_to(linked)
    with refused(tmp_path, kind=WriteError):
        DirectoryLock(tmp_path)
    assert contents(precious.parent) == {"precious": b"mine"}


def test_texts_from_files_are_escaped_on_the_terminal(ema, tmp_path):
    """Names of tensors and of files, and units."""
    name = "\x1b]0;x\x07\u202e\nema: error: "
    run = tmp_path / "run"
    write_snapshot(run, 10, 0.05, RUN_ID, {name: torch.tensor([float("nan")])}, t_unit=name)
    command = ["synthesize", run, "--sigma-rel", "0.1", "--out", tmp_path / f"{name}.pt"]
    plain = ema(*command)
    debugging = ema("--debug", *command)
    assert "Traceback" not in plain.err
    assert "Traceback" in debugging.err
    (run / "\x1b[31m\u202e.tmp.safetensors").write_text("no")
    verified = ema("verify", run)
    described = ema("info", run)
    for result in (plain, debugging, verified, described):
        assert result.code == 1
        printed = result.out + result.err
        assert printed.replace("\n", "").isprintable()
        assert "\\x1b" in printed


def test_names_that_the_encoding_of_the_terminal_lacks_are_escaped(tmp_path):
    path = tmp_path / "\u65e5\u672c.safetensors"
    save_file({"w": torch.ones(2)}, path)
    code = f"import sys; sys.stdout.reconfigure(encoding='latin-1'); {forked.EMA}"
    done = forked.check(code, "info", path)
    assert "\\u65e5\\u672c" in done.out


LEAKING = forked.program("leaking_training")


def test_nothing_of_the_user_the_host_or_the_environment_is_in_a_file(tmp_path):
    home = tmp_path / "home-of-somebody"
    home.mkdir()
    secrets = {"HOME": str(home), "HOSTNAME": "secret-host", "KEY": "secret-key"}
    secrets |= dict.fromkeys(("USER", "LOGNAME"), "secret-user")
    forked.check(LEAKING, cwd=home, env=unmeasured_environment() | secrets)
    forbidden = ["home-of-somebody", "secret", str(tmp_path), sys.prefix]
    for word in (socket.gethostname(), getpass.getuser()):
        if len(word) >= 8:  # shorter: chance matches
            forbidden.append(word)
    made = contents(home)
    for name, content in made.items():
        for word in forbidden:
            assert word.encode() not in content, (name, word)
    pictures = [content for name, content in made.items() if name.endswith(PICTURES)]
    assert len(pictures) == 3
    for content in pictures:
        assert b"Date" not in content
        assert b"Matplotlib v" not in content


EVIL = """
backend: module://evil
font.size: 40
axes.facecolor: red
savefig.directory: /
"""


@heavy
def test_a_matplotlibrc_in_the_working_directory_neither_runs_anything_nor_changes_a_picture(
    ema, run, tmp_path
):
    line = ["error-plot", run, "--out"]
    ema(*line, tmp_path / "plain.png")
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "matplotlibrc").write_text(EVIL)
    (evil / "evil.py").write_text("open('executed', 'w')")
    command = [sys.executable, "-m", "posthoc_cli", *line, "picture.png"]
    environment = unmeasured_environment()
    subprocess.run(command, cwd=evil, env=environment, check=True)
    assert not (evil / "executed").exists()
    assert (evil / "picture.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
