"""An S3 server on the loopback interface that fails on request."""

from __future__ import annotations

import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Answer = Callable[[dict[str, Any]], int | str | None]
"""Returns None to answer a request, a status, a status with an error code as "403 ExpiredToken", or
what the connection does: "reset", or "stall" for a while first."""


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:  # type: ignore[override]
        pass


class FaultyServer:
    """A server at `url`; `answer` is asked about each request, and `seen` lists those it left
    alone, as "PUT key"."""

    def __init__(self) -> None:
        self.answer: Answer = lambda _: None
        self.seen: list[str] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1",
            0,
            self._serve,
            threaded=True,
            request_handler=_Quiet,
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _serve(self, environ: dict[str, Any], start: Any) -> Any:
        method = environ["REQUEST_METHOD"]
        key = environ["PATH_INFO"].partition("/")[2].partition("/")[2]
        # a bulk deletion, of one object
        if method == "POST" and "delete" in environ["QUERY_STRING"]:
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            method = "DELETE"
            key = re.findall(r"<Key>(.*)</Key>", body.decode())[0]
            environ["wsgi.input"] = io.BytesIO(body)
        environ |= {"METHOD": method, "KEY": key}
        answer = self.answer(environ)
        if answer in ("reset", "stall"):
            time.sleep(1.5 * (answer == "stall"))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if answer is not None:
            status, _, code = str(answer).partition(" ")
            start(f"{status} Error", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code></Error>".encode()]
        body = self._app(environ, start)
        self.seen.append(f"{method} {key}")
        return body

    @contextmanager
    def running(self) -> Iterator[FaultyServer]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        yield self
        self._server.shutdown()
        self._server.server_close()
