"""Failures of requests: they are retried where that helps, or are an error of one line without a
secret."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from ema_command import Ema, Result
from factories import random_walk, write_run
from remote.servers import Server, serving
from safetensors.torch import load_file, save_file

from posthoc_cli import Run
from posthoc_cli.errors import RemoteError
from posthoc_cli.remote import store

LARGE = {"large": (400, 350), "small": (7,)}
"""Tensors of more bytes than the first request of a file reads."""


@pytest.fixture(scope="session")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "bucket/run").mkdir(parents=True)
    write_run(folder / "bucket/run", random_walk(6, LARGE), (3, 6), dtype=torch.float32)
    return folder


@pytest.fixture
def served(
    _folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    serve: Callable[[Path], Server],
) -> Server:
    """A server that fails on request; each request is retried three times."""
    backoff = {"init_backoff": SHORT, "max_backoff": SHORT, "base": 2}
    monkeypatch.setitem(store.RETRIES, "max_retries", 3)
    monkeypatch.setitem(store.RETRIES, "backoff", backoff)
    return serve(_folder)


SHORT = timedelta(milliseconds=5)
RUN = "s3://bucket/run"


Act = Callable[[Any], bool]
"""What a server does with a request: its handler is given, and whether it has answered returned."""
Fault = Callable[[int, Any], bool]
"""The same, given the number of the request, too."""


def once(number: int, act: Act) -> Fault:
    return lambda asked, handler: asked == number and act(handler)


def reset(handler: Any) -> bool:
    return handler.reset()


def cut(handler: Any) -> bool:
    return handler.cut()


def deny(handler: Any) -> bool:
    return handler.refuse(403, "AccessDenied")


def fail(handler: Any) -> bool:
    return handler.refuse(500, "InternalError")


ACTS = (reset, fail, cut)


def requests_of_a_synthesis(server: Server, out: Path) -> int:
    server.asked.clear()
    Run(RUN).write(0.1, out)
    return len(server.asked)


def test_a_connection_that_breaks_at_any_request_of_a_synthesis_changes_nothing(
    served: Server,
    tmp_path: Path,
) -> None:
    """Every eighth request is tried, in turns by the three ways to break."""
    sound = tmp_path / "sound.safetensors"
    again = tmp_path / "again.safetensors"
    count = requests_of_a_synthesis(served, sound)
    assert count > 20
    for number in range(1, count + 1, 8):
        served.fault = once(number, ACTS[number % len(ACTS)])
        requests_of_a_synthesis(served, again)
        assert again.read_bytes() == sound.read_bytes()
        again.unlink()


def test_a_listing_that_is_cut_is_asked_for_again(served: Server) -> None:
    cuts = iter([True] * 3)
    served.fault = listing(lambda handler: next(cuts, False) and handler.cut())
    assert Run(RUN).t == 6
    assert next(cuts, None) is None


Answer = tuple[memoryview, store.ObjectInfo]


def shorter(data: memoryview, info: store.ObjectInfo) -> Answer:
    return data[:-1], info


def of_another_object(data: memoryview, info: store.ObjectInfo) -> Answer:
    return data, info._replace(tag="other")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shorter, r"the answer has [\d,]+ bytes of [\d,]+"),
        (of_another_object, "was replaced while it was being used"),
    ],
)
def test_a_wrong_answer_of_a_server_is_an_error(
    served: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[..., Answer],
    message: str,
) -> None:
    """Of one that does not compare the tag, or sends less than it says."""
    get = store.get

    def harmed(url: str, begin: int, *rest: Any) -> Answer:
        answer = get(url, begin, *rest)
        return harm(*answer) if begin else answer

    monkeypatch.setattr(store, "get", harmed)
    with pytest.raises(RemoteError, match=message):
        Run(RUN).write(0.1, tmp_path / "out.safetensors")


def always(status: int, code: str) -> Fault:
    """Return a refusal of all requests; the answer to a HEAD has no body to hold the reason."""
    return lambda _, handler: handler.refuse(status, code)


def listing(act: Act) -> Fault:
    return lambda _, handler: "list-type" in handler.path and act(handler)


def bodies(act: Act) -> Fault:
    def fault(_: int, handler: Any) -> bool:
        is_body = ".safetensors" in handler.path and handler.command == "GET"
        return is_body and act(handler)

    return fault


def stall(handler: Any) -> bool:
    """Send the beginning of an answer only."""
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-99/100")
    handler.send_header("Content-Length", "100")
    handler.send_header("ETag", '"x"')
    handler.send_header("Last-Modified", handler.date_time_string())
    handler.end_headers()
    handler.wfile.write(b"12345")
    time.sleep(1)
    return handler.reset()


LIST = f"{RUN}: cannot be listed: "
READ = f"{RUN}: cannot be read: "
LOST = "cannot be read: the connection was lost, or the answer is incomplete"
FAULTS = {
    "500s": (always(500, "InternalError"), READ + "the server answers 500"),
    "short answers": (bodies(cut), LOST),
    "no bucket": (always(404, "NoSuchBucket"), READ + "there is no such bucket"),
    "expired": (
        always(400, "ExpiredToken"),
        READ + "the credentials are missing, expired or not accepted",
    ),
    "short listings": (listing(cut), LIST + "the answer is incomplete"),
    "not to read": (bodies(deny), "safetensors: cannot be read: access is denied"),
    "slow bodies": (bodies(stall), "safetensors: cannot be read: no answer of the server"),
    "too many": (always(503, "SlowDown"), READ + "the server answers 503 SlowDown"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_lasting_failure_is_one_line(
    served: Server,
    ema: Ema,
    tmp_path: Path,
    what: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if what == "slow bodies":
        monkeypatch.setitem(store.CLIENT, "timeout", "0.3s")
    served.fault, wanted = FAULTS[what]
    done = ema("synthesize", RUN, "--sigma-rel", "0.1", "--out", tmp_path / "out.safetensors")
    assert done.code in (1, 2)
    assert wanted in done.error
    assert not list(tmp_path.iterdir())
    assert "ecret" not in done.err.lower().replace("aws_secret_access_key", "")
    assert "AKIA" not in done.err + caplog.text


def test_a_failure_while_an_archive_is_opened_is_no_damage(served: Server, ema: Ema) -> None:
    place = served.folder / "bucket/archive/step1.pt"
    place.parent.mkdir()
    torch.save({"w": torch.ones(200_000)}, place)  # its end is not in the first request

    def fault(_: int, handler: Any) -> bool:
        is_first = handler.headers.get("range", "bytes=0-").startswith("bytes=0-")
        return not is_first and fail(handler)

    served.fault = fault
    error = ema("info", "s3://bucket/archive/step1.pt").error
    assert error.endswith("step1.pt: cannot be read: the server answers 500 InternalError")


def test_with_permission_to_read_and_not_to_list_a_file_is_read(served: Server, ema: Ema) -> None:
    """Such a store gives the same answer for a missing object as for a forbidden one."""

    def fault(_: int, handler: Any) -> bool:
        place, _, _ = handler.path.lstrip("/").partition("?")
        exists = (served.folder / place).is_file()
        return not exists and deny(handler)

    served.fault = fault
    file = f"{RUN}/0000000000000006-0.05.safetensors"
    assert ema("info", file).code == 0
    assert "all intact" in ema("verify", file).out
    assert ema("verify", f"{RUN}/none.safetensors").error.endswith("access is denied")


def test_without_credentials_or_a_server_the_error_says_what_to_do(
    served: Server,
    ema: Ema,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert "no answer of the server; check the URL and the network" in ema("info", RUN).error
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"{served.url}/metadata.nothing")
    store.open_bucket.cache_clear()
    assert ema("info", RUN).error == (
        f"{RUN}: cannot be read: the credentials are missing, expired or not accepted; "
        "`ema guide remote` says where they are read from"
    )


# --- repositories of the Hub, read by its own client

STEPS = (1000, 3000, 512000)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Server]:
    """A server of a repository with one checkpoint in each revision."""
    for step in STEPS:
        folder = tmp_path / f"served/org/model-160m/step{step}"
        folder.mkdir(parents=True)
        weights = {"w": torch.randn(300, 400)}
        torch.save(weights, folder / "pytorch_model.bin")
        save_file(weights, folder / "model.safetensors")
    (tmp_path / "served/org/model-160m/main").mkdir()
    with serving(tmp_path / "served") as server:
        yield server


REVISIONS = "hf://org/model-160m@step*"
EMA_OF_HUB = f"""
import sys
for name in [*sys.modules]:
    if name.startswith("huggingface_hub"):  # which reads the environment when it is imported
        del sys.modules[name]
{forked.EMA}
"""


@pytest.fixture
def ema_of_hub(repository: Server, tmp_path: Path) -> Ema:
    """Return a function that runs `ema` with the repository's server in place of the Hub."""

    def ema(*arguments: object, home: Path = tmp_path / "home") -> Result:
        settings = {
            "HF_ENDPOINT": repository.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_topsecret",
        }
        return forked.run(EMA_OF_HUB, *arguments, env=os.environ | settings)

    return ema


def test_revisions_of_a_repository_are_checkpoints_of_a_run(
    repository: Server,
    tmp_path: Path,
    ema_of_hub: Ema,
) -> None:
    out = tmp_path / "mean.safetensors"
    info = ema_of_hub("info", REVISIONS, "--json").json
    assert [checkpoint["t"] for checkpoint in info["checkpoints"]] == list(STEPS)
    done = ema_of_hub("synthesize", REVISIONS, "--target", "last:2", "--out", out)
    assert done.code == 0, done.err
    stored = sorted((tmp_path / "served").rglob("model.safetensors"))
    _, *last = stored
    one, other = (load_file(path)["w"].double() for path in last)
    found = load_file(out)["w"].double()
    torch.testing.assert_close(found, (one + other) / 2, rtol=3e-7, atol=1e-8)
    once = sum(path.stat().st_size for path in stored)
    assert repository.sent == once  # by both commands, since copies are kept


def test_a_revision_that_a_repository_lacks_is_an_error_of_one_line(
    repository: Server,
    ema_of_hub: Ema,
) -> None:
    refused = ema_of_hub("info", "hf://org/model-160m@none")
    assert refused.code == 2
    assert "no such" in refused.error
    assert "topsecret" not in refused.err
    assert repr(Run("hf://org/model-160m@step1")).startswith("Run('hf://org/model-160m@step1': ")


def test_a_download_from_the_hub_that_is_refused_says_why(
    repository: Server,
    ema_of_hub: Ema,
) -> None:
    def refuse(_number: int, handler: Any) -> bool:
        return "/resolve/" in handler.path and handler.refuse(403, "AccessDenied")

    repository.fault = refuse
    done = ema_of_hub("info", REVISIONS)
    assert done.code == 1
    assert "model.safetensors: cannot be downloaded: access is denied" in done.err


def test_a_cache_of_the_hub_that_cannot_be_written_is_named(
    ema_of_hub: Ema,
    tmp_path: Path,
) -> None:
    home = tmp_path / "file"
    home.touch()
    done = ema_of_hub("info", REVISIONS, home=home)
    assert done.code == 1
    assert f"cannot be written to {home}/hub: not a directory" in done.err
    assert "HF_HOME names another folder" in done.err
