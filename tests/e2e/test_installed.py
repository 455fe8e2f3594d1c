"""The installed `ema` in a separate process, and a training script as users write it."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from factories import random_walk, write_run

import posthoc_cli

EMA = Path(sys.executable).with_name("ema")
GUIDES = Path(posthoc_cli.__file__).parent / "guides"


def test_the_peers_example_runs_with_only_its_import_changed(tmp_path):
    example = forked.program("peers_example")
    forked.check(f"import warnings; warnings.simplefilter('error')\n{example}", cwd=tmp_path)
    assert (tmp_path / "error.png").stat().st_size > 10_000


def test_a_guide_is_rendered_in_the_pager_of_a_terminal_and_is_its_source_in_a_pipe(tmp_path):
    source = (GUIDES / "exactness.md").read_text()
    assert forked.check(forked.EMA, "guide", "exactness").out == source
    parent, terminal = pty.openpty()
    environment = os.environ | {
        "PAGER": f"cat > {tmp_path}/paged",
        "TERM": "dumb",
        "COLUMNS": "200",
    }
    command = [EMA, "guide", "exactness"]
    subprocess.run(command, stdin=terminal, stdout=terminal, env=environment, check=True)
    for descriptor in (parent, terminal):
        os.close(descriptor)
    lines = (tmp_path / "paged").read_text().splitlines()
    assert "Exactness: how close a result is to the true average" in lines[0]
    assert max(map(len, lines)) <= 120


def written_to(stdout):
    return subprocess.run([EMA, "guide"], stdout=stdout, stderr=subprocess.PIPE, check=False)


def test_a_closed_pipe_is_no_error_message():
    """With `| head` the exit code is 141, as of a process that SIGPIPE has ended; 1 would mean
    damage."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = written_to(closed)
    assert done.stderr == b""
    assert done.returncode == 141


def test_a_full_disk_is_an_error_message():
    with Path("/dev/full").open("w") as full:
        done = written_to(full)
    assert done.stderr == b"ema: error: standard output: no space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("number", "code", "out"),
    [
        (signal.SIGINT, 130, "out.safetensors"),
        (signal.SIGTERM, 143, "folder"),
        (signal.SIGHUP, 129, "out.safetensors"),
    ],
)
def test_an_interruption_leaves_nothing(tmp_path, number, code, out):
    run = tmp_path / "run"
    write_run(run, random_walk(40, {"w": (3,)}), (10, 20, 30, 40))
    words = ("--sigma-rel", "0.05", "--out", tmp_path / out)
    process = forked.Forked(forked.SLOW + forked.EMA, "synthesize", run, *words)
    while not list(tmp_path.rglob(".ema-*")):
        assert process.poll(0.01) is None
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.wait() == code
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert errors == "ema: interrupted\n"
    assert list(tmp_path.iterdir()) == [run]
