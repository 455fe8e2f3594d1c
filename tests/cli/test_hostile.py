"""Untrusted directories, names and environments: no other file is changed, no code is run, and
nothing leaks."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from checking import assert_same_tensors, load_output
from ema_command import Ema, run_ema, unmeasured_environment
from factories import RUN_ID, contents, write_snapshot
from safetensors.torch import save_file

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import DirectoryError


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "precious"
    path.write_bytes(b"mine")
    return path


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out.png"])
def test_a_link_in_place_of_an_output_is_replaced_itself_and_only_with_overwrite(
    ema: Ema,
    run: Path,
    tmp_path: Path,
    precious: Path,
    name: str,
) -> None:
    out = tmp_path / name
    out.symlink_to(precious)
    command = ["synthesize", run, "--sigma-rel", "0.1", "--out", out]
    if name.endswith("png"):
        command = ["error-plot", run, "--out", out]
    assert "already exists" in ema(*command).error
    assert out.is_symlink()
    assert ema(*command, "--overwrite").code == 0
    assert not out.is_symlink()
    assert precious.read_bytes() == b"mine"


def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path: Path, precious: Path) -> None:
    lock = tmp_path / ".ema.lock"
    absent = precious.with_name("nothing")
    model = torch.nn.Linear(1, 1)
    for make_link, message in (
        (lambda: lock.symlink_to(precious), str(tmp_path)),
        (lambda: lock.symlink_to(absent), str(tmp_path)),
        (lambda: lock.hardlink_to(precious), "is not a lock: it is a hard link"),
    ):
        make_link()
        with pytest.raises(DirectoryError, match=message):
            PostHocEMA.from_model(model, tmp_path).update_(model)
        lock.unlink()
    assert not absent.exists()
    assert precious.read_bytes() == b"mine"


def test_texts_from_files_are_escaped_on_the_terminal(tmp_path: Path) -> None:
    """Names of tensors and of files, and units."""
    name = "\x1b]0;x\x07\u202e\nema: error: "
    run = tmp_path / "run"
    write_snapshot(run, 10, 0.05, RUN_ID, {name: torch.tensor([float("nan")])}, t_unit=name)
    command = ["synthesize", run, "--sigma-rel", "0.1", "--out", tmp_path / f"{name}.pt"]
    plain = run_ema(*command)
    debugging = run_ema("--debug", *command)
    assert "Traceback" not in plain.err
    assert "Traceback" in debugging.err
    (run / "\x1b[31m\u202e.tmp.safetensors").write_text("no")
    for result in (plain, debugging, run_ema("verify", run), run_ema("info", run)):
        assert result.code == 1
        assert (result.out + result.err).replace("\n", "").isprintable()
        assert "\\x1b" in result.out + result.err


def test_names_that_the_encoding_of_the_terminal_lacks_are_escaped(
    run: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "\u65e5\u672c"))
    save_file({"w": torch.ones(2)}, folder / "\u65e5\u672c.safetensors")
    code = f"import sys; sys.stdout.reconfigure(encoding='latin-1'); {forked.EMA}"
    for arguments in (
        ["info", folder],
        ["synthesize", folder, "--sigma-rel", "0.1", "--out", folder / "o.pt"],
    ):
        assert "\\u65e5\\u672c" in forked.check(code, *arguments).out


LEAKING = """
import sys, torch
from posthoc_cli import PostHocEMA
from posthoc_cli.cli import main

model = torch.nn.Linear(3, 3)
tracker = PostHocEMA.from_model(model, "run", update_every=1, checkpoint_every=1)
for _ in range(3):
    tracker.update_(model)
tracker.close()
for line in (
    "synthesize run --sigma-rel 0.1 --out a.safetensors",
    "synthesize run --sigma-rel 0.1 --out a.pt",
    "synthesize run --sigma-rel 0.1 --layout sharded --max-shard-size 20 --out shards",
    "export a.safetensors --out c.safetensors",
    "error-plot run --out a.png",
    "error-plot run --out a.svg",
    "plan --steps 100 --params 10 --out a.pdf",
):
    sys.argv = ["ema", *line.split()]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, line
"""


def test_nothing_of_the_user_the_host_or_the_environment_is_in_a_file(tmp_path: Path) -> None:
    home = tmp_path / "home-of-somebody"
    home.mkdir()
    secrets = {"HOME": str(home), "HOSTNAME": "secret-host", "KEY": "s3cret"}
    secrets |= dict.fromkeys(("USER", "LOGNAME"), "secret-user")
    forked.check(LEAKING, cwd=home, env=unmeasured_environment() | secrets)
    words = [
        "home-of-somebody",
        "secret-host",
        "secret-user",
        "s3cret",
        str(tmp_path),
        sys.prefix,
    ]
    for word in (socket.gethostname(), getpass.getuser()):
        if len(word) >= 8:  # shorter: chance matches
            words.append(word)
    made = contents(home)
    pictures = {".png", ".svg", ".pdf"}
    assert {Path(name).suffix for name in made} >= {".safetensors", ".pt", ".json", *pictures}
    for name, content in made.items():
        forbidden = [*words]
        if Path(name).suffix in pictures:
            forbidden += ["Date", "Matplotlib v"]
        for word in forbidden:
            assert word.encode() not in content, (name, word)


AS_ON_WINDOWS = """
import os, signal, sys

for name in [*sys.modules]:
    if name.startswith("posthoc_cli"):
        del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("preadv", "pread", "pwrite", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "killpg"):
    delattr(os, name)
del signal.SIGHUP
from posthoc_cli.cli import main

for line in LINES.splitlines():
    sys.argv = ["ema", *line.split()]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, line
"""
READING = """\
info run
verify run
synthesize run --sigma-rel 0.1 --layout sharded --out shards
synthesize run --sigma-rel 0.1 --layout dcp --out dcp
export shards --out a.pt
error-plot run --out a.svg"""


def test_commands_that_read_a_run_need_no_module_that_windows_lacks(
    run: Path,
    tmp_path: Path,
) -> None:
    forked.check(AS_ON_WINDOWS.replace("LINES", repr(READING)), cwd=run.parent)
    assert_same_tensors(load_output(tmp_path / "a.pt"), load_output(tmp_path / "shards"))


EVIL = """
backend: module://evil
text.usetex: True
text.latex.preamble: \\\\input{/etc/passwd}
font.size: 40
axes.facecolor: red
savefig.directory: /
"""


def test_a_matplotlibrc_in_the_working_directory_neither_runs_anything_nor_changes_a_picture(
    ema: Ema,
    tmp_path: Path,
) -> None:
    line = ["plan", "--steps", "100", "--params", "10", "--out"]
    assert ema(*line, tmp_path / "plain.png").code == 0
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "matplotlibrc").write_text(EVIL)
    (evil / "evil.py").write_text("open('executed', 'w')")
    for program in ("latex", "dvipng", "kpsewhich"):
        (evil / program).write_text("#!/bin/sh\ntouch executed\n")
        (evil / program).chmod(0o755)
    environment = unmeasured_environment()
    environment["PATH"] = f"{evil}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "posthoc_cli", *line, "picture.png"]
    subprocess.run(command, cwd=evil, env=environment, check=True)
    assert not (evil / "executed").exists()
    assert (evil / "picture.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
