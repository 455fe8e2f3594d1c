"""Runs in an object store that a tracker writes: spool, uploads, one writer."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import alone, check_group, run_group
from remote.faulty import FaultyServer

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import LockedError, MismatchError, RemoteError, WriteError
from posthoc_cli.remote import lease, store
from posthoc_cli.remote.lease import Lease
from posthoc_cli.remote.store import RemotePath, remote_path
from posthoc_cli.snapshots.directory import find_snapshots
from posthoc_cli.snapshots.tensor_file import tensor_from_bytes
from posthoc_cli.tracker import pipeline
from posthoc_cli.tracker import spool as spools

SETTINGS = {"update_every": 1, "checkpoint_every": 10, "max_checkpoints": 4}
CONDITIONS = ("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH")


@pytest.fixture(autouse=True)
def _repeated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.RETRIES, "max_retries", 1)


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for what is not uploaded yet."""
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "spool"))
    return tmp_path / "spool"


@pytest.fixture
def model() -> torch.nn.Linear:
    return torch.nn.Linear(4, 4, bias=False)


URL = "s3://bucket/some/run"


def train(model: torch.nn.Linear, tracker: PostHocEMA, first: int, last: int) -> None:
    values = torch.randn(200, 4, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)
    for number in range(first, last + 1):
        with torch.no_grad():
            model.weight.copy_(values[number])
        tracker.update_(model)


def same_run_here(folder: Path, last: int = 95, **settings: object) -> Path:
    """The same training, in a directory."""
    model = torch.nn.Linear(4, 4, bias=False)
    with PostHocEMA.from_model(model, folder, **SETTINGS | settings) as tracker:
        train(model, tracker, 1, last)
    return folder


def check_same(folder: Path) -> None:
    """The run in the store has the snapshots and the averages of that in a folder."""
    there, here = find_snapshots(remote_path(URL)), find_snapshots(folder)
    assert [one.name for one in there] == [one.name for one in here]
    assert torch.equal(Run(URL).average(0.15)["weight"], Run(folder).average(0.15)["weight"])


def waiting(spool: Path) -> list[Path]:
    return sorted(spool.rglob("*.safetensors"))


def only_snapshots(answer: object) -> object:
    """An answer to requests that write snapshots only."""
    return lambda request: answer if is_upload(request) else None


def is_upload(request: dict) -> bool:
    return request["REQUEST_METHOD"] in ("PUT", "POST") and request["PATH_INFO"].endswith(".safetensors")


def test_a_run_is_in_the_store_when_the_tracker_is_closed(
    server: FaultyServer, spool: Path, tmp_path: Path, model: torch.nn.Linear
) -> None:
    with PostHocEMA.from_model(model, URL, **SETTINGS) as tracker:
        assert str(tracker.checkpoint_dir) == URL
        train(model, tracker, 1, 40)
        tracker.flush()
        assert [s.info.step for s in find_snapshots(RemotePath(URL))] == [10, 10, 20, 20, 30, 30, 40, 40]
        train(model, tracker, 41, 95)
    assert not waiting(spool)
    check_same(same_run_here(tmp_path / "local"))
    # Thinning keeps four of each profile: there were never fewer after these were there.
    counts = {"0.05": [0], "0.28": [0]}
    for method, name in (seen.split(" ") for seen in server.seen if seen.endswith(".safetensors")):
        if method in ("PUT", "DELETE"):
            sigma_rel = name.removesuffix(".safetensors").rpartition("-")[2]
            counts[sigma_rel].append(counts[sigma_rel][-1] + (1 if method == "PUT" else -1))
    assert all(min(own[own.index(4) :]) == 4 and max(own) > 4 for own in counts.values())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (500, "the server answers 500"),
        ("reset", "the connection was lost"),
        ("stall", "the server did not answer in time"),
        ("403 AccessDenied", "access is denied"),
        ("400 ExpiredToken", "the credentials have expired; renew them"),
        ("403 RequestTimeTooSkewed", "the clock of this machine is wrong"),
    ],
)
def test_training_goes_on_while_the_store_fails(
    server: FaultyServer, spool: Path, tmp_path: Path, model: torch.nn.Linear, answer: object, reason: str,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tracker = PostHocEMA.from_model(model, URL, **SETTINGS)
    train(model, tracker, 1, 25)
    tracker.flush()
    if answer == "stall":
        monkeypatch.setitem(store.CLIENT, "timeout", "1s")
        store._opened.cache_clear()
    server.answer = only_snapshots(answer)
    train(model, tracker, 26, 75)
    with pytest.raises(WriteError, match=reason) as caught:
        tracker.close()
    assert str(spool) in str(caught.value)
    assert "\n" not in str(caught.value)
    told = [record.getMessage() for record in caplog.records if "not uploaded" in record.getMessage()]
    assert len(told) <= 1
    assert "topsecret" not in caplog.text + str(caught.value)
    assert [s.info.step for s in find_snapshots(RemotePath(URL))] == [10, 10, 20, 20]
    assert len(waiting(spool)) >= 4
    server.answer = lambda _: None
    with PostHocEMA.from_path(URL, model) as tracker:
        assert not waiting(spool)  # what was left is there as soon as the run is opened
        train(model, tracker, tracker.step + 1, 95)
    assert [s.name for s in find_snapshots(remote_path(URL))] == [
        s.name for s in find_snapshots(same_run_here(tmp_path / "local"))
    ]


def test_training_never_waits_for_a_slow_store(server: FaultyServer, spool: Path, model: torch.nn.Linear) -> None:
    answers = threading.Event()

    def wait(request: dict[str, Any]) -> None:
        if is_upload(request):
            answers.wait(30)

    tracker = PostHocEMA.from_model(model, URL, **SETTINGS | {"max_checkpoints": None})
    train(model, tracker, 1, 10)
    tracker.flush()
    before = len(waiting(spool))
    server.answer = wait
    train(model, tracker, 11, 60)
    assert tracker.state_dict()["step"] == 60
    until = time.monotonic() + 20
    while len(waiting(spool)) < before + 10 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(waiting(spool)) == before + 10  # no upload has an answer yet
    answers.set()
    tracker.close()
    assert {s.info.step for s in find_snapshots(RemotePath(URL))} >= {60}


def test_uploads_that_fail_do_not_pile_up(
    server: FaultyServer, model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = PostHocEMA.from_model(model, URL, **SETTINGS | {"checkpoint_every": 1})
    train(model, tracker, 1, 1)
    tried = []

    def fail(*_: object, **__: object) -> None:
        tried.append(time.sleep(0.3))
        raise RemoteError(URL, "cannot be written: no connection to the server")

    with monkeypatch.context() as patch:
        patch.setattr(spools.store, "put", fail)
        train(model, tracker, 2, 40)
        so_far = len(tried)
        with pytest.raises(WriteError, match="no connection"):
            tracker.flush()
        assert len(tried) - so_far <= 4
    tracker.close()


def test_a_full_spool_makes_training_wait_with_one_warning(
    server: FaultyServer, spool: Path, tmp_path: Path, model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(spools.shutil, "disk_usage", lambda _: usage._replace(free=0))
    server.answer = lambda request: time.sleep(0.1) if is_upload(request) else None
    most = []
    with PostHocEMA.from_model(model, URL, **SETTINGS) as tracker:
        tracker.on_snapshot(lambda _: most.append(len(waiting(spool))))
        train(model, tracker, 1, 95)
    assert max(most) <= 8  # four that the next ones are measured against, two that wait, two being written
    assert len([record for record in caplog.records if "waits for uploads" in record.getMessage()]) == 1
    check_same(same_run_here(tmp_path / "local"))


def test_a_run_goes_on_from_another_machine(
    server: FaultyServer, tmp_path: Path, model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PostHocEMA.from_model(model, URL, **SETTINGS, keep_state=True) as tracker:
        train(model, tracker, 1, 45)
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "other machine"))
    with pytest.raises(MismatchError, match="holds snapshots of run"):
        PostHocEMA.from_model(model, URL, **SETTINGS)
    with PostHocEMA.from_model(model, URL, **SETTINGS, keep_state=True, resume="auto") as tracker:
        assert tracker.step == 45
        train(model, tracker, 46, 95)
    check_same(same_run_here(tmp_path / "local", keep_state=True))


def test_snapshots_of_a_later_time_are_set_aside_in_the_store(
    server: FaultyServer, spool: Path, model: torch.nn.Linear
) -> None:
    with PostHocEMA.from_model(model, URL, **SETTINGS) as tracker:
        train(model, tracker, 1, 40)
    with PostHocEMA.from_model(model, URL, **SETTINGS, resume=20) as tracker:
        train(model, tracker, 21, 25)
    assert sorted({s.info.step for s in find_snapshots(RemotePath(URL))}) == [10, 20, 25]
    assert sorted({s.info.step for s in find_snapshots(RemotePath(f"{URL}/superseded"))}) == [30, 40]
    assert not waiting(spool)


def test_what_is_left_of_another_attempt_is_set_aside(
    server: FaultyServer, spool: Path, tmp_path: Path, model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tracker = PostHocEMA.from_model(model, URL, **SETTINGS)
    train(model, tracker, 1, 20)
    tracker.flush()
    server.answer = only_snapshots(503)
    train(model, tracker, 21, 30)
    with pytest.raises(WriteError):
        tracker.close()
    server.answer = lambda _: None
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "other machine"))
    with PostHocEMA.from_model(model, URL, **SETTINGS, resume=20) as tracker:
        train(model, tracker, 21, 60)
        tracker.flush()
        before = {s.name: s.identity for s in find_snapshots(RemotePath(URL))}
        monkeypatch.setenv("EMA_SPOOL", str(spool))
        with pytest.raises(LockedError, match="is writing here"):  # what is left would be read, too
            PostHocEMA.from_path(URL, model)
    PostHocEMA.from_path(URL, model)
    assert "has gone on elsewhere" in caplog.text
    assert {s.name: s.identity for s in find_snapshots(RemotePath(URL))} == before
    assert {s.info.step for s in find_snapshots(RemotePath(f"{URL}/superseded"))} == {30}
    assert not waiting(spool)


def test_averages_can_be_had_while_uploads_are_under_way(
    server: FaultyServer, tmp_path: Path, model: torch.nn.Linear
) -> None:
    server.answer = lambda request: time.sleep(0.05) if is_upload(request) else None
    here = torch.nn.Linear(4, 4, bias=False)
    with (
        PostHocEMA.from_model(model, URL, **SETTINGS) as tracker,
        PostHocEMA.from_model(here, tmp_path / "local", **SETTINGS) as local,
    ):
        for last in (15, 40, 77):
            train(model, tracker, tracker.step + 1, last)
            train(here, local, local.step + 1, last)
            local.flush()
            assert torch.equal(tracker.state_dict(sigma_rel=0.1)["weight"], local.state_dict(sigma_rel=0.1)["weight"])
        assert tracker.run.plan([0.1]).t == 70


def test_a_spool_that_is_removed_while_training_is_made_again(
    server: FaultyServer, spool: Path, model: torch.nn.Linear
) -> None:
    with PostHocEMA.from_model(model, URL, **SETTINGS | {"max_checkpoints": None}) as tracker:
        train(model, tracker, 1, 15)
        tracker.flush()
        shutil.rmtree(spool)
        train(model, tracker, 16, 45)
    assert {s.info.step for s in find_snapshots(RemotePath(URL))} == {10, 20, 30, 40, 45}


def test_a_spool_that_cannot_be_made_is_an_error_that_names_the_variable(
    model: torch.nn.Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "file"))
    with pytest.raises(WriteError, match=r"file/.*: cannot be made, .*s3://bucket/some/run: .*; set EMA_SPOOL to"):
        PostHocEMA.from_model(model, URL)


# --- one writer


def test_a_run_has_one_writer(
    server: FaultyServer, tmp_path: Path, model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = PostHocEMA.from_model(model, URL, **SETTINGS)
    train(model, tracker, 1, 10)
    tracker.flush()
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "other machine"))
    other = PostHocEMA.from_path(URL, model)
    with pytest.raises(LockedError, match=r"process \d+ on .* is writing here"):
        train(model, other, 11, 11)
    tracker.close()
    train(model, other, 11, 20)
    other.close()
    assert {s.info.step for s in find_snapshots(RemotePath(URL))} == {10, 20}


def test_a_lease_that_another_process_has_taken_ends_the_training(
    server: FaultyServer, spool: Path, model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.0)  # it is looked at before each upload
    tracker = PostHocEMA.from_model(model, URL, **SETTINGS)
    train(model, tracker, 1, 10)
    tracker.flush()
    note = json.dumps({"token": "another", "host": "node7", "process": 12})
    store.put(f"{URL}/{lease.NAME}", note.encode(), create=False)
    with pytest.raises(LockedError, match="process 12 on node7 is writing here"):
        for last in range(20, 2000, 10):
            train(model, tracker, tracker.step + 1, last)
            time.sleep(0.1)
    with pytest.raises(LockedError, match="node7"):
        tracker.close()
    assert {s.info.step for s in find_snapshots(RemotePath(URL))} == {10}
    assert {int(path.name[:16]) for path in waiting(spool)} >= {20, tracker.step}
    assert json.loads(bytes(store.get(f"{URL}/{lease.NAME}", 0, 1000)[0]))["host"] == "node7"


def test_a_lease_is_taken_over_when_it_has_expired(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)  # no clock of this machine has a part in it
    run = RemotePath(URL)
    monkeypatch.setattr(lease, "SECONDS", 2.0)
    held = Lease(run, "first")
    time.sleep(3.5)  # it was renewed
    held.check()
    with pytest.raises(LockedError, match="is writing here"):
        Lease(run, "second")
    held._released.set()  # as if the process had been stopped
    time.sleep(4)
    Lease(run, "second").release()
    with pytest.raises(LockedError):
        held.check()
    Lease(run, "third")
    Lease(run, "third").release()  # of the same spool, whose lock the new one holds


def test_a_forked_process_does_not_end_the_lease(
    server: FaultyServer, model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.0)
    with PostHocEMA.from_model(model, URL, **SETTINGS) as tracker:
        train(model, tracker, 1, 10)
        tracker.flush()
        child = os.fork()
        if child == 0:
            pipeline.finish()  # as at the end of the process
            os._exit(0)
        os.waitpid(child, 0)
        assert json.loads(bytes(store.get(f"{URL}/{lease.NAME}", 0, 1000)[0]))["process"] == os.getpid()
        train(model, tracker, 11, 20)


def test_a_lease_survives_answers_that_are_lost(server: FaultyServer) -> None:
    """The request was done, its answer lost, and the repeated one finds the condition broken."""
    lost: list[bool] = []

    def lose(request: dict) -> str | None:
        key = f"{request['REQUEST_METHOD']} {request['PATH_INFO'].partition('some/')[2]}"
        if key != "PUT run/.ema.lease":
            return None
        lost.append(len(lost) % 2 == 0)
        if not lost[-1]:
            return None
        list(server._app(request, lambda *_: None))
        return "reset"

    server.answer = lose
    taken = Lease(RemotePath(URL), "token")
    taken.renew()
    taken.check()
    assert len(lost) > 5


@pytest.mark.parametrize("says_so", [False, True])
def test_a_store_without_conditional_put(
    server: FaultyServer, tmp_path: Path, model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch, says_so: bool
) -> None:
    def ignore(request: dict) -> int | None:
        had = [request.pop(name, None) for name in CONDITIONS]
        return 501 if says_so and any(had) and request["REQUEST_METHOD"] == "PUT" else None

    server.answer = ignore
    tracker = PostHocEMA.from_model(model, URL, **SETTINGS)
    with pytest.raises(RemoteError, match=r"has no conditional put.*; set EMA_LEASE=off if nothing else writes there"):
        train(model, tracker, 1, 1)
    monkeypatch.setenv("EMA_LEASE", "off")
    with PostHocEMA.from_model(model, URL, **SETTINGS) as tracker:
        train(model, tracker, 1, 95)
    check_same(same_run_here(tmp_path / "local"))


# --- several processes

GROUP = """
kind, url, last = arguments
model = spread(Net(), kind)
with PostHocEMA.from_model(model, url, **SETTINGS, resume="auto") as ema:
    print(ema.step)
    train(model, ema.step + 1, int(last), ema)
    if ema.keeps_averages and int(last) == 8:
        ema.flush()
        PostHocEMA.from_path(url, model)  # while this one writes
"""


def test_processes_upload_what_they_write(server: FaultyServer, spool: Path, tmp_path: Path) -> None:
    assert check_group(GROUP, 2, tmp_path, "fsdp", URL, 8) == ["0\n", "0\n"]
    server.answer = lambda request: 503 if is_upload(request) and "000010" in request["PATH_INFO"] else None
    failed = run_group(GROUP, 2, tmp_path, "fsdp", URL, 10)  # the last snapshots stay in the spool
    assert {result.out for result in failed} == {"8\n"}
    assert any(
        "are not uploaded: cannot be written: the store asks for fewer requests" in result.err for result in failed
    )
    assert {s.info.step for s in find_snapshots(RemotePath(URL))} == {4, 8}
    server.answer = lambda _: None
    assert check_group(GROUP, 2, tmp_path, "fsdp", URL, 12) == ["10\n", "10\n"]
    assert not waiting(spool)
    alone(tmp_path / "alone", 12)
    for there, here in zip(
        [s for s in find_snapshots(RemotePath(URL)) if not s.info.off_schedule],
        find_snapshots(tmp_path / "alone"),
        strict=True,
    ):
        assert (there.info.t, there.info.sigma_rel) == (here.info.t, here.info.sigma_rel)
        with there.open() as ours, here.open() as theirs:
            for name, entry in here.header.tensors.items():
                values = (tensor_from_bytes(file.read(name), entry.dtype, entry.shape) for file in (ours, theirs))
                torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)


NODES = f"import os\nos.environ['EMA_SPOOL'] += f'/node{{rank}}'\n{GROUP}"


def test_each_node_finishes_what_its_own_spool_has_left(server: FaultyServer, spool: Path, tmp_path: Path) -> None:
    server.answer = lambda request: 503 if is_upload(request) and "000008" in request["PATH_INFO"] else None
    run_group(NODES, 2, tmp_path, "fsdp", URL, 8)
    assert {path.relative_to(spool).parts[0] for path in waiting(spool)} == {"node0", "node1"}
    assert {s.info.step for s in find_snapshots(RemotePath(URL))} == {4}
    server.answer = lambda request: time.sleep(0.3) if is_upload(request) else None
    assert check_group(NODES, 2, tmp_path, "fsdp", URL, 12) == ["8\n", "8\n"]
    assert not waiting(spool)
    assert {s.info.step for s in find_snapshots(RemotePath(URL))} == {4, 8, 12}


# --- the gate


def test_an_unreachable_store_is_an_error_at_once(
    server: FaultyServer, model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(RemoteError, match="no connection to the server"):
        PostHocEMA.from_model(model, URL)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    with pytest.raises(RemoteError, match="there is no such bucket"):
        PostHocEMA.from_model(model, "s3://missing/run", update_every=1, resume="auto").update_(model)
