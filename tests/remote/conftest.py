"""Servers on the loopback interface with the protocols of object stores and the Hub."""

import urllib.request
from collections.abc import Callable, Iterator

import pytest

from posthoc_cli.remote import store

pytest.importorskip("obstore")
pytest.importorskip("moto.server")

from remote.faulty import FaultyServer


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[FaultyServer]:
    with FaultyServer().running() as running:
        yield running


@pytest.fixture
def use_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that sets the environment of a user of the server at a URL."""

    def use(url: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRETID")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        store.open_bucket.cache_clear()

    yield use
    store.open_bucket.cache_clear()


@pytest.fixture
def server(_s3_server: FaultyServer, use_server: Callable[[str], None]) -> FaultyServer:
    """An S3 server that fails on request, with an empty bucket `bucket`."""
    _s3_server.answer = lambda _: None
    _s3_server.seen = []
    urllib.request.urlopen(f"{_s3_server.url}/moto-api/reset", b"")
    making = urllib.request.Request(f"{_s3_server.url}/bucket", method="PUT")
    urllib.request.urlopen(making)
    use_server(_s3_server.url)
    return _s3_server


@pytest.fixture
def bucket(server: FaultyServer) -> str:
    return "s3://bucket"
