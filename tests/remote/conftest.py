"""Servers on the loopback interface that speak what object stores and the Hub speak."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterator

import pytest

from posthoc_cli.remote import store

pytest.importorskip("obstore")
moto = pytest.importorskip("moto.server")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a new bucket; the environment is that of a user of this server."""
    environment = {"AWS_ENDPOINT_URL": s3_server, "AWS_REGION": "us-east-1"}
    environment |= {"AWS_ACCESS_KEY_ID": "AKIASECRETID", "AWS_SECRET_ACCESS_KEY": "topsecret"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"[:40]
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT"))
    store._opened.cache_clear()
    return f"s3://{name}"
