"""Failures of requests: they are retried where that helps, or are an error of one line without a
secret."""

import os
import re
import socket
from datetime import timedelta

import forked
import pytest
import torch
from factories import random_walk, write_run
from remote.servers import serving
from safetensors.torch import load_file, save_file

from posthoc_cli import Run
from posthoc_cli.errors import RemoteError
from posthoc_cli.remote import store

SHAPES = {"large": (400, 350), "small": (7,)}
"""Tensors of more bytes than the first request of a file reads."""


@pytest.fixture(scope="session")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "bucket/run").mkdir(parents=True)
    write_run(folder / "bucket/run", random_walk(6, SHAPES), (3, 6))
    return folder


@pytest.fixture
def served(_folder, monkeypatch, serve):
    """A server that fails on request; each request is retried three times."""
    short = timedelta(milliseconds=5)
    backoff = {"init_backoff": short, "max_backoff": short, "base": 2}
    monkeypatch.setitem(store.RETRIES, "max_retries", 3)
    monkeypatch.setitem(store.RETRIES, "backoff", backoff)
    return serve(_folder)


RUN = "s3://bucket/run"


# A fault of a server is a function of the number of a request and its handler; it returns whether
# it has answered.


def reset(handler):
    return handler.reset()


def cut(handler):
    return handler.cut()


def deny(handler):
    return handler.refuse(403, "AccessDenied")


def fail(handler):
    return handler.refuse(500, "InternalError")


def once(number, act):
    return lambda asked, handler: asked == number and act(handler)


def listing(act):
    return lambda _, handler: "list-type" in handler.path and act(handler)


def bodies(act):
    return lambda _, handler: ".safetensors" in handler.path and act(handler)


# --- failures that pass


def requests_of_a_synthesis(server, out):
    server.asked.clear()
    Run(RUN).write(0.1, out)
    return len(server.asked)


def test_a_connection_that_breaks_at_any_request_of_a_synthesis_changes_nothing(served, tmp_path):
    """Every eighth request is tried, in turns by the three ways to break."""
    sound = tmp_path / "sound.safetensors"
    again = tmp_path / "again.safetensors"
    count = requests_of_a_synthesis(served, sound)
    assert count > 20
    acts = (reset, fail, cut)
    for number in range(1, count + 1, 8):
        act = acts[number % 3]
        served.fault = once(number, act)
        requests_of_a_synthesis(served, again)
        assert again.read_bytes() == sound.read_bytes()
        again.unlink()


def test_a_listing_that_is_cut_is_asked_for_again(served):
    cuts = iter([True] * 3)
    served.fault = listing(lambda handler: next(cuts, False) and handler.cut())
    assert Run(RUN).t == 6
    assert next(cuts, None) is None


# --- failures that last


def shorter(data, info):
    return data[:-1], info


def replaced(data, info):
    return data, info._replace(tag="other")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shorter, r"the answer has [\d,]+ bytes of [\d,]+"),
        (replaced, "was replaced while it was being used"),
    ],
)
def test_a_wrong_answer_of_a_server_is_an_error(served, monkeypatch, harm, message):
    """Of one that sends less than it says, or an object that was replaced."""
    get = store.get

    def harmed(url, begin, *rest):
        answer = get(url, begin, *rest)
        return harm(*answer) if begin else answer

    monkeypatch.setattr(store, "get", harmed)
    with pytest.raises(RemoteError, match=message):
        Run(RUN).average(0.1)


def error_of_a_synthesis(ema, folder):
    """Return the error, which is one line without a secret; nothing is left."""
    out = folder / "out.safetensors"
    done = ema("synthesize", RUN, "--sigma-rel", "0.1", "--out", out)
    assert done.code in (1, 2)
    assert not list(folder.iterdir())
    assert "secret" not in done.error.lower()
    assert "AKIA" not in done.error
    return done.error


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (500, "InternalError", "the server answers 500"),
        (404, "NoSuchBucket", "there is no such bucket"),
        (400, "ExpiredToken", "the credentials are missing, expired or not accepted"),
    ],
)
def test_a_server_that_refuses_everything_is_one_line(served, ema, tmp_path, status, code, reason):
    served.fault = lambda _, handler: handler.refuse(status, code)
    error = error_of_a_synthesis(ema, tmp_path)
    assert error.startswith(f"{RUN}: cannot be read: {reason}")


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (bodies(cut), "cannot be read: the connection was lost, or the answer is incomplete"),
        (bodies(deny), "safetensors: cannot be read: access is denied"),
        (listing(cut), f"{RUN}: cannot be listed: the answer is incomplete"),
    ],
)
def test_a_lasting_failure_is_one_line(served, ema, tmp_path, fault, problem):
    served.fault = fault
    error = error_of_a_synthesis(ema, tmp_path)
    assert problem in error


def test_a_failure_while_an_archive_is_opened_is_no_damage(served, ema):
    place = served.folder / "bucket/archive/step1.pt"
    place.parent.mkdir()
    torch.save({"w": torch.ones(200_000)}, place)  # its end is not in the first request

    def fault(_, handler):
        is_first = handler.headers.get("range", "bytes=0-").startswith("bytes=0-")
        return not is_first and fail(handler)

    served.fault = fault
    error = ema("info", "s3://bucket/archive/step1.pt").error
    assert error.endswith("step1.pt: cannot be read: the server answers 500 InternalError")


def test_with_permission_to_read_and_not_to_list_a_file_is_read(served, ema):
    """Such a store gives the same answer for a missing object as for a forbidden one."""

    def fault(_, handler):
        place, _, _ = handler.path.lstrip("/").partition("?")
        exists = (served.folder / place).is_file()
        return not exists and deny(handler)

    served.fault = fault
    assert "all intact" in ema("verify", f"{RUN}/0000000000000006-0.05.safetensors").out
    assert ema("verify", f"{RUN}/none.safetensors").error.endswith("access is denied")


@pytest.mark.usefixtures("served")
def test_without_a_server_the_error_says_what_to_check(ema, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert "no answer of the server; check the URL and the network" in ema("info", RUN).error


# --- repositories of the Hub, read by its own client

REVISIONS = "hf://org/model-160m@step*"


@pytest.fixture
def repository(tmp_path):
    """A server of a repository with one checkpoint in each revision."""
    for step in (1000, 3000, 512000):
        folder = tmp_path / f"served/org/model-160m/step{step}"
        folder.mkdir(parents=True)
        weights = {"w": torch.randn(300, 400)}
        torch.save(weights, folder / "pytorch_model.bin")
        save_file(weights, folder / "model.safetensors")
    (tmp_path / "served/org/model-160m/main").mkdir()
    with serving(tmp_path / "served") as server:
        yield server


EMA_OF_HUB = f"""
import sys
for name in [*sys.modules]:
    if name.startswith("huggingface_hub"):  # which reads the environment when it is imported
        del sys.modules[name]
{forked.EMA}
"""


@pytest.fixture
def ema_of_hub(repository, tmp_path):
    """Return a function that runs `ema` with the repository's server in place of the Hub."""
    settings = {
        "HF_ENDPOINT": repository.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_topsecret",
    }

    def ema(*arguments):
        return forked.run(EMA_OF_HUB, *arguments, env=os.environ | settings)

    return ema


def test_revisions_of_a_repository_are_checkpoints_of_a_run(repository, tmp_path, ema_of_hub):
    out = tmp_path / "mean.safetensors"
    info = ema_of_hub("info", REVISIONS, "--json").json
    assert [checkpoint["t"] for checkpoint in info["checkpoints"]] == [1000, 3000, 512000]
    ema_of_hub("synthesize", REVISIONS, "--target", "last:2", "--out", out)
    stored = sorted((tmp_path / "served").rglob("model.safetensors"))
    _, one, other = (load_file(path)["w"].double() for path in stored)
    found = load_file(out)["w"].double()
    torch.testing.assert_close(found, (one + other) / 2, rtol=3e-7, atol=1e-8)
    downloads = []
    for asked in repository.asked:
        if re.match("GET .*/resolve/", asked):
            downloads.append(asked)
    assert len(downloads) == len({*downloads}) == 3  # by both commands, since copies are kept


def test_a_revision_that_a_repository_lacks_is_an_error_of_one_line(ema_of_hub):
    refused = ema_of_hub("info", "hf://org/model-160m@none")
    assert refused.code == 2
    assert "no such" in refused.error
    assert "topsecret" not in refused.error


def test_a_run_on_the_hub_is_shown_by_its_url_without_a_request():
    assert repr(Run("hf://org/model@step1")) == "Run('hf://org/model@step1')"


def test_a_download_from_the_hub_that_is_refused_says_why(repository, ema_of_hub):
    repository.fault = lambda _, handler: "/resolve/" in handler.path and deny(handler)
    error = ema_of_hub("info", REVISIONS).error
    assert "model.safetensors: cannot be downloaded: access is denied" in error


def test_a_cache_of_the_hub_that_cannot_be_written_is_named(ema_of_hub, tmp_path):
    home = tmp_path / "home"
    home.touch()
    error = ema_of_hub("info", REVISIONS).error
    assert f"cannot be written to {home}/hub: not a directory" in error
    assert "HF_HOME names another folder" in error
