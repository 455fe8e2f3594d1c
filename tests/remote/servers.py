"""A web server on the loopback interface that serves ranges of files, fails on request, and counts
requests.

It implements as much of S3 as reading a bucket needs, so that each request of a run can be made to
fail.
"""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape


class Server(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        asked: one line for each request: its method, path and range.
        sent: total bytes of the bodies.
        fault: called with the number of a request and its handler; returns whether it has answered.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked = list[str]()
        self.sent = 0
        self.fault: Callable[[int, Any], bool] = lambda _number, _handler: False
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """Ignore clients that close the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    is_cut = False
    server: Server

    def log_message(self, *_):
        """Log nothing."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        with self.server.lock:
            requested = self.headers.get("range", "")
            self.server.asked.append(f"{self.command} {self.path} {requested}".strip())
            number = len(self.server.asked)
        if self.server.fault(number, self):
            return
        url = urlsplit(self.path)
        place = unquote(url.path).replace("/resolve/", "/").lstrip("/")  # a path of the Hub
        query = dict(parse_qsl(url.query))
        path = self.server.folder / place
        if url.path.startswith("/api/models/"):
            self._describe_repository(unquote(url.path).split("/")[3:])
        elif "list-type" in query:
            self._list(path, query.get("prefix", ""), query.get("delimiter", ""))
        elif path.is_file():
            self._send(path)
        else:
            self.refuse(404, "NoSuchKey")

    def _send(self, path):
        size = path.stat().st_size
        tag = f'"{_version(path)}"'
        if self.headers.get("if-match", tag) != tag:
            self.refuse(412, "PreconditionFailed")
            return
        begin = 0
        end = size
        wanted = self.headers.get("range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin = int(first)
            end = min(int(last) + 1 if last else size, size)
            if begin >= size:
                self.refuse(416, "InvalidRange")
                return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", tag)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", self._revision())  # a header of the Hub
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        self.wfile.flush()
        if self.command == "GET":
            self.body(path, begin, end)

    def _revision(self):
        _, _, rest = self.path.partition("/resolve/")
        revision, _, _ = rest.partition("/")
        return revision

    def body(self, path, begin, end):
        """Send bytes of a file, half of them if the answer is to be cut."""
        if self.is_cut:
            end = (begin + end) // 2
        with path.open("rb") as file:
            sent = self.connection.sendfile(file, begin, end - begin) if end > begin else 0
        with self.server.lock:
            self.server.sent += sent
        if self.is_cut:
            self.reset()

    def _describe_repository(self, parts):
        """Answer as the Hub: `org/model` is a folder that holds a folder for each revision, which
        is its own commit."""
        organization, model, *rest = parts
        repository = self.server.folder / organization / model
        what, revision, *_ = [*rest, "main", "main"]
        folder = repository / revision
        facts: Any = {"id": f"{organization}/{model}", "sha": revision, "siblings": []}
        if what == "refs":
            branches = [_branch(path.name) for path in sorted(repository.iterdir())]
            facts = {"branches": branches, "tags": [], "converts": []}
        elif not folder.is_dir():
            self.refuse(404, "RevisionNotFound")
            return
        elif what == "tree":
            facts = [_file_of_tree(path) for path in sorted(folder.iterdir())]
        self.answer(200, json.dumps(facts).encode())

    def _list(self, bucket, prefix, delimiter):
        folders = set()
        text = ""
        for path in sorted(bucket.rglob("*")):
            key = path.relative_to(bucket).as_posix()
            if not path.is_file() or not key.startswith(prefix):
                continue
            within = key[len(prefix) :]
            if delimiter and delimiter in within:
                folders.add(prefix + within.partition(delimiter)[0] + delimiter)
            else:
                text += _contents_of_listing(key, path.stat().st_size)
        for folder in sorted(folders):
            text += f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
        text = f"<IsTruncated>false</IsTruncated>{text}"
        self.answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())

    def refuse(self, status, code):
        self.answer(status, f"<Error><Code>{code}</Code><Message>secret</Message></Error>".encode())
        return True

    def answer(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "RevisionNotFound")  # a header of the Hub
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if self.is_cut else data)
        if self.is_cut:
            self.reset()

    def cut(self):
        """Let the answer end in the middle of its body."""
        self.is_cut = True
        return False

    def reset(self):
        self.close_connection = True
        self.connection.shutdown(2)
        return True


def _version(path):
    """Return a text that changes with the content, and differs between files."""
    status = path.stat()
    return f"{status.st_ino:020x}{status.st_mtime_ns:020x}"


def _branch(name):
    return {"name": name, "ref": f"refs/heads/{name}", "targetCommit": name}


def _file_of_tree(path):
    return {
        "type": "file" if path.is_file() else "directory",
        "path": path.name,
        "oid": _version(path),
        "size": path.stat().st_size,
    }


def _contents_of_listing(key, size):
    facts = f"<Size>{size}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    return f"<Contents><Key>{escape(key)}</Key>{facts}<ETag>&quot;x&quot;</ETag></Contents>"


@contextmanager
def serving(folder):
    server = Server(folder)
    thread = threading.Thread(
        target=server.serve_forever,
        kwargs={"poll_interval": 0.05},
        daemon=True,
    )
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
