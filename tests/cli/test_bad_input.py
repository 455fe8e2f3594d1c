"""Wrong input: one line that names the thing and what would be accepted, nothing written or changed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from ema_command import Ema
from factories import OTHER_RUN_ID, read_snapshot

from posthoc_cli.snapshots.format import TensorSpec, snapshot_metadata
from posthoc_cli.snapshots.reader import Snapshot, TensorFile
from posthoc_cli.snapshots.writer import TensorFileWriter

Harm = Callable[[Path], None]


def states(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def victim(run: Path) -> Path:
    return sorted(run.glob("*.safetensors"))[5]


# --- directories -----------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def truncate(run: Path) -> None:
    path = victim(run)
    path.write_bytes(path.read_bytes()[:-7])


def flip_payload(run: Path) -> None:
    flip(victim(run), -3)


def flip_header(run: Path) -> None:
    flip(victim(run), 40)


def rewrite(path: Path, change: Callable[[Snapshot, dict[str, bytes]], tuple]) -> None:
    """Write a snapshot anew, whole and with right checksums, but with other content."""
    snapshot = read_snapshot(path)
    with TensorFile(path) as file:
        data = {name: file.read(name).tobytes() for name in snapshot.header.tensors}
    info, shapes = change(snapshot, data)
    specs = [
        TensorSpec(name, snapshot.header.tensors[name].dtype, shapes.get(name, snapshot.header.tensors[name].shape))
        for name in data
    ]
    with TensorFileWriter(path, specs, snapshot_metadata(info), overwrite=True) as writer:
        for name, content in data.items():
            writer.write(name, content)
        writer.commit()


def other_run(run: Path) -> None:
    rewrite(victim(run), lambda s, _: (replace(s.info, run_id=OTHER_RUN_ID), {}))


def lose_tensor(run: Path) -> None:
    def change(snapshot: Snapshot, data: dict[str, bytes]) -> tuple:
        del data["0.weight"]
        return replace(snapshot.info, tensors={n: t for n, t in snapshot.info.tensors.items() if n in data}), {}

    rewrite(victim(run), change)


def other_shape(run: Path) -> None:
    rewrite(victim(run), lambda s, _: (s.info, {"0.weight": (4, 3)}))


def empty(run: Path) -> None:
    for path in run.iterdir():
        path.unlink()


def foreign(run: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    empty(run)
    save_file({"weight": np.zeros(3, dtype=np.float32)}, run / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (empty, ["run: no snapshots here"]),
        (foreign, ["model.safetensors", "not a snapshot"]),
        (truncate, ["000000000300-0.28.safetensors", "truncated"]),
        (flip_payload, ["000000000300-0.28.safetensors", "tensor ", "checksum"]),
        (flip_header, ["000000000300-0.28.safetensors", "damaged"]),
        (other_run, ["000000000100-0.05.safetensors", "000000000300-0.28.safetensors", "different runs"]),
        (lose_tensor, ["000000000100-0.05.safetensors", "000000000300-0.28.safetensors", "'0.weight' is missing"]),
        (other_shape, ["000000000300-0.28.safetensors", "'0.weight' has the shapes [3, 4] and [4, 3]"]),
    ],
)
def test_a_harmed_directory(ema: Ema, run: Path, tmp_path: Path, harm: Harm, words: list[str]) -> None:
    harm(run)
    before = states(tmp_path)
    result = ema("synthesize", run, "--sigma-rel", "0.15", "--out", tmp_path / "out.safetensors")
    assert result.code == 1
    for word in words:
        assert word in result.error
    assert states(tmp_path) == before


@pytest.mark.parametrize("harm", [truncate, flip_header, other_run, lose_tensor, other_shape])
def test_info_says_what_is_wrong_and_the_rest_all_the_same(ema: Ema, run: Path, harm: Harm) -> None:
    harm(run)
    result = ema("info", run)
    assert result.code == 1
    assert "problem: " in result.out
    assert "000000000300-0.28.safetensors" in result.out
    assert "snapshots" in result.out


def test_a_lost_snapshot_is_a_gap_and_no_obstacle(ema: Ema, run: Path, tmp_path: Path) -> None:
    """At the newest time; thinning leaves the profiles at different earlier ones."""
    victim(run).unlink()
    assert ema("info", run).code == 0
    newest = sorted(run.glob("*-0.28.safetensors"))[-1]
    newest.unlink()
    result = ema("info", run)
    assert result.code == 0
    assert "the newest: no snapshot of sigma_rel 0.28" in result.out
    assert ema("synthesize", run, "--sigma-rel", "0.15", "--out", tmp_path / "out.safetensors").code == 0


# --- options ---------------------------------------------------------------------------------------

RANGE = "must lie in (0, 0.2887); 0.2887 is the uniform average over all of training"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma-rel", "0"], [f"--sigma-rel 0: {RANGE}"]),
        (["--sigma-rel", "-1"], [f"--sigma-rel -1: {RANGE}"]),
        (["--sigma-rel", "0.2887"], [f"--sigma-rel 0.2887: {RANGE}"]),
        (["--sigma-rel", "0.4"], [f"--sigma-rel 0.4: {RANGE}"]),
        (["--sigma-rel", "nan"], ["--sigma-rel nan: must be a number"]),
        (["--sigma-rel", "abc"], ["--sigma-rel abc: must be a number, a list"]),
        (["--sigma-rel", ""], ["--sigma-rel (empty): must be a number"]),
        (["--sigma-rel", "0.1,,0.2"], ["--sigma-rel (empty)"]),
        (["--sigma-rel", "0.05:0.25:0"], ["--sigma-rel 0.05:0.25:0: the step"]),
        (["--sigma-rel", "0.25:0.05:0.05"], ["the step"]),
        (["--sigma-rel", "0.05:0.25"], ["START:STOP:STEP"]),
        (["--sigma-rel", "0.05,...,0.25"], ["'...' needs two numbers before it"]),
        (["--sigma-rel", "0.05:0.25:1e-9"], ["at most 10,000"]),
        (["--sigma-rel", "1e-400"], ["--sigma-rel"]),
        (["--sigma-rel", "1e-300"], ["--sigma-rel 1e-300: too short to be told from no averaging"]),
        (["--sigma-rel", "sNaN"], ["--sigma-rel sNaN: must be a number"]),
        (
            ["--sigma-rel", "0.1", "--step", "99"],
            ["--step 99: must lie between the first snapshot, 100, and the last, 2,000"],
        ),
        (["--sigma-rel", "0.1", "--step", "2001"], ["--step 2001: must lie between"]),
        (["--sigma-rel", "0.1", "--t", "nan"], ["--t nan: must lie between"]),
        (["--sigma-rel", "0.1", "--t", "500", "--step", "500"], ["--t and --step: give one of them"]),
        (["--sigma-rel", "0.1", "--dtype", "int3"], ["--dtype int3: must be one of float64", "bf16, keep"]),
        (["--sigma-rel", "0.1", "--device", "cuda:99"], ["--device 'cuda:99': is not there; choose from auto, cpu"]),
        (["--sigma-rel", "0.1", "--device", "toaster"], ["choose from auto, cpu"]),
        (["--sigma-rel", "0.1", "--method", "magic"], ["--method 'magic': must be one of minvar, paper"]),
        (["--sigma-rel", "0.1", "--format", "zip"], ["--format 'zip': must be one of safetensors, sharded, pt"]),
        (["--sigma-rel", "0.1", "--max-shard-size", "0GB"], ["--max-shard-size '0GB'"]),
        (["--sigma-rel", "0.1", "--force", "--skip-existing"], ["give one of them"]),
        (["--sigma-rel", "0.1,0.2"], ["2 targets need a folder", "out-{sigma_rel}.safetensors"]),
        ([], ["--sigma-rel"]),
        (["--sigma-rel", "0.1", "--sigma"], ["No such option: --sigma"]),
    ],
)
def test_a_wrong_option(ema: Ema, run: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    before = states(tmp_path)
    result = ema("synthesize", run, *options, "--out", tmp_path / "out.safetensors")
    assert result.code == 2
    for word in words:
        assert word in result.error
    assert result.out == ""
    assert states(tmp_path) == before


def test_an_output_is_needed_unless_it_is_a_dry_run(ema: Ema, run: Path) -> None:
    result = ema("synthesize", run, "--sigma-rel", "0.1")
    assert result.code == 2
    assert "--out" in result.error
    assert "--out: is empty" in ema("synthesize", run, "--sigma-rel", "0.1", "--out", "").error


@pytest.mark.parametrize("out", ["nowhere/out.safetensors", "nowhere/deep/folder", "out.zip"])
def test_an_output_that_cannot_be(ema: Ema, run: Path, tmp_path: Path, out: str) -> None:
    before = states(tmp_path)
    result = ema("synthesize", run, "--sigma-rel", "0.1", "--out", tmp_path / out)
    assert result.code == 2
    assert out.split("/")[0] in result.error
    assert states(tmp_path) == before


# --- the system ------------------------------------------------------------------------------------


AS_ANOTHER_USER = """
import contextlib, os, sys
from posthoc_cli.cli import main
run, warm_up, out = sys.argv[1:]
sys.argv = ["ema", "synthesize", run, "--sigma-rel", "0.15", "--quiet", "--out", warm_up]
with contextlib.suppress(SystemExit):
    main()  # imports everything, while this process may still read it
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
sys.argv[-1] = out
main()
"""


def test_an_output_directory_without_write_permission(run: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to other users, by each session that begins
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(run, folder / "run")
        closed = folder / "closed"
        closed.mkdir(mode=0o555)
        arguments = [folder / "run", folder / "warm-up.safetensors", closed / "out.safetensors"]
        done = forked.run(AS_ANOTHER_USER, *arguments)
        assert (done.code, done.out) == (1, "")
        assert done.error == f"{closed}/out.safetensors: cannot be written: permission denied; nothing partial is left"
        assert list(closed.iterdir()) == []


@pytest.mark.parametrize("out", ["out.safetensors", "out.pt", "shards"])
def test_a_full_disk(run: Path, tmp_path: Path, out: str) -> None:
    """RLIMIT_FSIZE refuses the write as a full disk would, with another errno."""
    code = (
        "import resource, sys, torch, posthoc_cli.export; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)); "
        "from posthoc_cli.cli import main; main()"
    )
    before = states(tmp_path)
    arguments = ["synthesize", str(run), "--sigma-rel", "0.15", "--out", str(tmp_path / out)]
    done = forked.run(code, *arguments)
    assert done.code == 1
    assert done.error.startswith(str(tmp_path / out))
    assert "cannot be written" in done.error
    assert states(tmp_path) == before
    assert not (tmp_path / out).exists()
