"""Runs in an object store that a tracker writes: the spool, uploads, and the lease of the one writer."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import alone, check_group, run_group
from remote.faulty import FaultyServer

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import LockedError, RemoteError, WriteError
from posthoc_cli.remote import lease, store
from posthoc_cli.remote.lease import Lease
from posthoc_cli.remote.store import RemotePath
from posthoc_cli.snapshots.directory import find_snapshots
from posthoc_cli.snapshots.tensor_file import tensor_from_bytes
from posthoc_cli.tracker import pipeline
from posthoc_cli.tracker import spool as spools

URL = "s3://bucket/some/run"
SETTINGS = {"update_every": 1, "checkpoint_every": 10, "max_checkpoints": 4}
CONDITIONS = ("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH")
MODEL = torch.nn.Linear(4, 4, bias=False)
WALK = torch.randn(200, 4, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)


@pytest.fixture(autouse=True)
def spool(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the spool; each request is retried once."""
    monkeypatch.setitem(store.RETRIES, "max_retries", 1)
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "spool"))
    return tmp_path / "spool"


def tracked(place: str | Path = URL, **settings: Any) -> PostHocEMA:
    return PostHocEMA.from_model(MODEL, place, **SETTINGS | settings)


def train(tracker: PostHocEMA, last: int) -> None:
    """Train up to a step."""
    for step in range(tracker.step + 1, last + 1):
        with torch.no_grad():
            MODEL.weight.copy_(WALK[step % len(WALK)])
        tracker.update_(MODEL)


def steps(url: str = URL) -> list[int]:
    """The steps that have snapshots in the store."""
    return sorted({snapshot.info.step for snapshot in find_snapshots(RemotePath(url))})


def waiting(spool: Path) -> list[Path]:
    return sorted(spool.rglob("*.safetensors"))


def assert_same_as_on_a_disk(folder: Path, *, is_exact: bool = True, **settings: Any) -> None:
    """Check that the run in the store has the snapshots, and the exact averages, of the same training on a disk."""
    with tracked(folder, **settings) as tracker:
        train(tracker, 95)
    stored, local = find_snapshots(RemotePath(URL)), find_snapshots(folder)
    assert [snapshot.name for snapshot in stored] == [snapshot.name for snapshot in local]
    found, wanted = (Run(place).average(0.15)["weight"] for place in (URL, folder))
    assert torch.equal(found, wanted) or not is_exact


def is_upload(request: dict[str, Any]) -> bool:
    return request["METHOD"] in ("PUT", "POST") and request["KEY"].endswith(".safetensors")


def uploads(answer: object, key: str = "") -> Any:
    """An answer to the uploads of snapshots only, whose keys contain a text."""
    return lambda request: answer if is_upload(request) and key in request["KEY"] else None


def slow_uploads(seconds: float) -> Any:
    return lambda request: time.sleep(seconds) if is_upload(request) else None


def test_a_run_is_in_the_store_when_the_tracker_is_closed(server: FaultyServer, spool: Path, tmp_path: Path) -> None:
    with tracked() as tracker:
        assert str(tracker.checkpoint_dir) == URL
        train(tracker, 40)
        tracker.flush()
        assert steps() == [10, 20, 30, 40]
        train(tracker, 95)
    assert not waiting(spool)
    seen = [line.removesuffix(".safetensors") for line in server.seen if line.endswith(".safetensors")]
    assert_same_as_on_a_disk(tmp_path / "local")
    # Thinning keeps four snapshots of each profile: once four are stored, there are never fewer.
    for sigma_rel in ("0.05", "0.28"):
        methods = [line.split(" ")[0] for line in seen if line.endswith(f"-{sigma_rel}")]
        changes = [{"PUT": 1, "DELETE": -1}[method] for method in methods if method in ("PUT", "DELETE")]
        counts = [sum(changes[:number]) for number in range(len(changes) + 1)]
        assert min(counts[counts.index(4) :]) == 4 and max(counts) > 4 and "DELETE" in methods


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
def test_training_continues_while_the_store_fails(
    server: FaultyServer, spool: Path, tmp_path: Path, answer: object, reason: str,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tracker = tracked()
    train(tracker, 25)
    tracker.flush()
    if answer == "stall":
        monkeypatch.setitem(store.CLIENT, "timeout", "1s")
        store._opened.cache_clear()
    server.answer = uploads(answer)
    train(tracker, 75)
    with pytest.raises(WriteError, match=reason) as caught:
        tracker.close()
    assert str(spool) in str(caught.value) and "\n" not in str(caught.value)
    assert len([record for record in caplog.records if "not uploaded" in record.getMessage()]) <= 1
    assert "topsecret" not in caplog.text + str(caught.value)
    assert steps() == [10, 20] and len(waiting(spool)) >= 4
    server.answer = lambda _: None
    with PostHocEMA.from_path(URL, MODEL) as tracker:
        assert not waiting(spool)  # opening the run has uploaded the rest
        train(tracker, 95)
    assert_same_as_on_a_disk(tmp_path / "local", is_exact=False)  # it was continued from rounded snapshots


def test_training_never_waits_for_a_slow_store(server: FaultyServer, spool: Path) -> None:
    answers = threading.Event()

    def wait(request: dict[str, Any]) -> None:
        if is_upload(request):
            answers.wait(30)

    tracker = tracked(max_checkpoints=None)
    train(tracker, 10)
    tracker.flush()
    before = len(waiting(spool))
    server.answer = wait
    train(tracker, 60)
    assert tracker.state_dict()["step"] == 60
    until = time.monotonic() + 20
    while len(waiting(spool)) < before + 10 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(waiting(spool)) == before + 10  # no upload has an answer yet
    answers.set()
    tracker.close()
    assert 60 in steps()


def test_uploads_that_fail_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = tracked(checkpoint_every=1)
    train(tracker, 1)
    attempts = []

    def fail(*_: object, **__: object) -> None:
        attempts.append(time.sleep(0.3))
        raise RemoteError(URL, "cannot be written: no connection to the server")

    with monkeypatch.context() as patch:
        patch.setattr(spools.store, "put", fail)
        train(tracker, 40)
        before = len(attempts)
        with pytest.raises(WriteError, match="no connection"):
            tracker.flush()
        assert len(attempts) - before <= 4
    tracker.close()


def test_a_full_spool_makes_training_wait_with_one_warning(
    server: FaultyServer, spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(spools.shutil, "disk_usage", lambda _: usage._replace(free=0))
    server.answer = slow_uploads(0.1)
    counts = []
    with tracked() as tracker:
        tracker.on_snapshot(lambda _: counts.append(len(waiting(spool))))
        train(tracker, 95)
    assert max(counts) <= 8  # four that the next ones are measured against, two that wait, two being written
    assert len([record for record in caplog.records if "waits for uploads" in record.getMessage()]) == 1
    assert_same_as_on_a_disk(tmp_path / "local")


def test_snapshots_of_a_later_time_are_set_aside_in_the_store(spool: Path) -> None:
    with tracked() as tracker:
        train(tracker, 40)
    with tracked(resume=20) as tracker:
        train(tracker, 25)
    assert steps() == [10, 20, 25]
    assert steps(f"{URL}/superseded") == [30, 40]
    assert not waiting(spool)


def test_files_left_by_another_attempt_are_set_aside(
    server: FaultyServer, spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stored() -> dict[str, str]:
        return {snapshot.name: snapshot.identity for snapshot in find_snapshots(RemotePath(URL))}

    tracker = tracked()
    train(tracker, 20)
    tracker.flush()
    server.answer = uploads(503)
    train(tracker, 30)
    with pytest.raises(WriteError):
        tracker.close()
    server.answer = lambda _: None
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "other machine"))
    with tracked(resume=20) as tracker:
        train(tracker, 60)
        tracker.flush()
        before = stored()
        monkeypatch.setenv("EMA_SPOOL", str(spool))
        with pytest.raises(LockedError, match="is writing here"):  # the files left would be read, too
            PostHocEMA.from_path(URL, MODEL)
    PostHocEMA.from_path(URL, MODEL)
    assert "the run was continued elsewhere" in caplog.text
    assert stored() == before
    assert steps(f"{URL}/superseded") == [30]
    assert not waiting(spool)


def test_averages_are_at_hand_while_uploads_are_under_way(server: FaultyServer, tmp_path: Path) -> None:
    server.answer = slow_uploads(0.05)
    with tracked() as tracker, tracked(tmp_path / "local") as local:
        for last in (15, 40, 77):
            train(tracker, last)
            train(local, last)
            local.flush()
            assert torch.equal(tracker.state_dict(sigma_rel=0.1)["weight"], local.state_dict(sigma_rel=0.1)["weight"])
        assert tracker.run.plan([0.1]).t == 70


def test_a_spool_that_is_removed_while_training_is_made_again(spool: Path) -> None:
    with tracked(max_checkpoints=None) as tracker:
        train(tracker, 15)
        tracker.flush()
        shutil.rmtree(spool)
        train(tracker, 45)
    assert steps() == [10, 20, 30, 40, 45]


def test_a_place_that_cannot_be_used_is_an_error_at_once(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(RemoteError, match="no connection to the server"):
        tracked()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    with pytest.raises(RemoteError, match="there is no such bucket"):
        tracked("s3://missing/run", resume="auto").update_(MODEL)
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "file"))
    with pytest.raises(WriteError, match=r"file/.*: cannot be made, .*s3://bucket/some/run: .*; set EMA_SPOOL to"):
        tracked()


# --- one writer


def lease_note() -> dict[str, Any]:
    """The note in the lease of the run."""
    note: dict[str, Any] = json.loads(bytes(store.get(f"{URL}/{lease.NAME}", 0, 1000)[0]))
    return note


def test_a_run_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = tracked()
    train(tracker, 20)
    tracker.flush()
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "other machine"))
    other = PostHocEMA.from_path(URL, MODEL)
    with pytest.raises(LockedError, match=r"process \d+ on .* is writing here"):
        train(other, 21)
    with pytest.raises(LockedError, match=r"process \d+ on .* is writing here"):
        Run(URL).prune(keep=1)
    tracker.close()
    train(other, 30)
    other.close()
    with pytest.raises(LockedError, match="opened by a tracker of this process; open the run by its URL"):
        other.run.prune(keep=1)
    assert steps() == [10, 20, 30]
    Run(URL).prune(keep=1)
    assert steps() == [30]


def test_a_lease_that_another_process_has_taken_ends_the_training(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.0)  # the lease is checked before each upload
    tracker = tracked()
    train(tracker, 10)
    tracker.flush()
    note = json.dumps({"token": "another", "host": "node7", "process": 12})
    store.put(f"{URL}/{lease.NAME}", note.encode(), create=False)
    until = time.monotonic() + 60
    with pytest.raises(LockedError, match="process 12 on node7 is writing here"):
        while time.monotonic() < until:
            train(tracker, tracker.step + 10)
    with pytest.raises(LockedError, match="node7"):
        tracker.close()
    assert steps() == [10]
    assert {int(path.name[:16]) for path in waiting(spool)} >= {20, tracker.step}
    assert lease_note()["host"] == "node7"


def test_a_lease_is_renewed_until_its_holder_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.3)
    held = Lease(RemotePath(URL), "token")
    first, until = lease_note(), time.monotonic() + 30
    while lease_note() == first and time.monotonic() < until:
        held.check()
    assert lease_note() != first and lease_note()["token"] == "token"
    held.release()
    assert lease_note() == {}


def test_a_lease_is_taken_over_when_it_has_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)  # the clock of this machine does not matter
    run = RemotePath(URL)
    held = Lease(run, "first")
    with pytest.raises(LockedError, match="is writing here"):
        Lease(run, "second")
    with monkeypatch.context() as patch:
        patch.setattr(lease, "SECONDS", -10.0)  # the store's clock is past the end of each lease
        Lease(run, "second").release()
    with pytest.raises(LockedError, match="has taken the run"):
        held.renew()
    Lease(run, "third")
    Lease(run, "third").release()  # of the same spool, whose lock the new tracker holds


def test_a_forked_process_does_not_end_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.0)
    with tracked() as tracker:
        train(tracker, 10)
        tracker.flush()
        child = os.fork()
        if child == 0:
            pipeline.finish()  # as at the end of the process
            os._exit(0)
        os.waitpid(child, 0)
        assert lease_note()["process"] == os.getpid()
        train(tracker, 20)


def test_lost_answers_change_nothing(server: FaultyServer) -> None:
    """The first request succeeds, its answer is lost, and the condition of the repeated request fails."""
    requests: Counter[str] = Counter()

    def lose(request: dict[str, Any]) -> str | None:
        if request["METHOD"] != "PUT":
            return None
        requests[request["KEY"]] += 1
        if requests[request["KEY"]] % 2 == 0:
            return None
        list(server._app(request, lambda *_: None))
        return "reset"

    server.answer = lose
    with tracked() as tracker:
        train(tracker, 15)
    assert steps() == [10, 15]
    assert len(requests) == 1 + 4 and min(requests.values()) == 2  # the lease, and two snapshots of each profile


@pytest.mark.parametrize("says_so", [False, True])
def test_a_store_without_conditional_put(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_so: bool
) -> None:
    def ignore(request: dict[str, Any]) -> int | None:
        conditions = [request.pop(name, None) for name in CONDITIONS]
        return 501 if says_so and any(conditions) and request["METHOD"] == "PUT" else None

    server.answer = ignore
    with pytest.raises(RemoteError, match=r"has no conditional put.*; set EMA_LEASE=off if nothing else writes there"):
        train(tracked(), 1)
    monkeypatch.setenv("EMA_LEASE", "off")
    with tracked() as tracker:
        train(tracker, 95)
    assert_same_as_on_a_disk(tmp_path / "local")
    with lease.held(RemotePath(URL)) as check:  # as `ema prune` does
        check()


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


def test_each_process_uploads_what_it_writes(server: FaultyServer, spool: Path, tmp_path: Path) -> None:
    assert check_group(GROUP, 2, tmp_path, "fsdp", URL, 8) == ["0\n", "0\n"]
    server.answer = uploads(503, "000010")
    failed = run_group(GROUP, 2, tmp_path, "fsdp", URL, 10)  # the last snapshots stay in the spool
    assert {result.out for result in failed} == {"8\n"}
    reason = "are not uploaded: cannot be written: the store asks for fewer requests"
    assert any(reason in result.err for result in failed)
    assert steps() == [4, 8]
    server.answer = lambda _: None
    assert check_group(GROUP, 2, tmp_path, "fsdp", URL, 12) == ["10\n", "10\n"]
    assert not waiting(spool)
    alone(tmp_path / "alone", 12)
    stored = [snapshot for snapshot in find_snapshots(RemotePath(URL)) if not snapshot.info.off_schedule]
    for ours, theirs in zip(stored, find_snapshots(tmp_path / "alone"), strict=True):
        assert (ours.info.t, ours.info.sigma_rel) == (theirs.info.t, theirs.info.sigma_rel)
        with ours.open() as one, theirs.open() as other:
            for name, entry in theirs.header.tensors.items():
                values = (tensor_from_bytes(file.read(name), entry.dtype, entry.shape) for file in (one, other))
                torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)


NODES = f"import os\nos.environ['EMA_SPOOL'] += f'/node{{rank}}'\n{GROUP}"


def test_each_node_uploads_what_is_left_in_its_own_spool(server: FaultyServer, spool: Path, tmp_path: Path) -> None:
    server.answer = uploads(503, "000008")
    run_group(NODES, 2, tmp_path, "fsdp", URL, 8)
    assert {path.relative_to(spool).parts[0] for path in waiting(spool)} == {"node0", "node1"}
    assert steps() == [4]
    server.answer = slow_uploads(0.3)
    assert check_group(NODES, 2, tmp_path, "fsdp", URL, 12) == ["8\n", "8\n"]
    assert not waiting(spool)
    assert steps() == [4, 8, 12]
