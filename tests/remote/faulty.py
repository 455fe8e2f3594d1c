"""A server that speaks S3 on the loopback interface, and fails when it is told to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Answer = Callable[[dict[str, Any]], int | str | None]
"""Of a request: None to answer it, a status, a status with the code of an error, as "403 ExpiredToken", or what the
connection does: "reset", or "stall" for a while first."""


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:  # type: ignore[override]
        pass


class FaultyServer:
    """Its `url`; `answer` is asked about each request; `seen` has what came, as "PUT some/key"."""

    def __init__(self) -> None:
        self.answer: Answer = lambda _: None
        self.seen: list[str] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _serve(self, environ: dict[str, Any], start: Any) -> Any:
        key = environ["PATH_INFO"].partition("/")[2].partition("/")[2]
        said = self.answer(environ)
        if said in ("reset", "stall"):
            time.sleep(1.5 * (said == "stall"))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if said is not None:
            status, _, code = str(said).partition(" ")
            start(f"{status} Error", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code></Error>".encode()]
        done = self._app(environ, start)
        self.seen.append(f"{environ['REQUEST_METHOD']} {key}")
        return done

    @contextmanager
    def running(self) -> Iterator[FaultyServer]:
        """The server, answering."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        yield self
        self._server.shutdown()
        self._server.server_close()
