"""A server on the loopback interface with the protocols of object stores and the Hub."""

from contextlib import ExitStack

import pytest

from posthoc_cli.remote import store

pytest.importorskip("obstore")

from remote.servers import serving


@pytest.fixture
def serve(monkeypatch):
    """Return a function that serves the buckets in a folder, and sets the environment of a user of
    that server."""
    with ExitStack() as stack:

        def start(folder):
            server = stack.enter_context(serving(folder))
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            monkeypatch.setenv("AWS_REGION", "us-east-1")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRETID")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
            monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
            store.open_bucket.cache_clear()
            return server

        yield start
    store.open_bucket.cache_clear()
