"""A web server on the loopback interface that serves ranges of files, fails on request, and counts
requests.

It implements as much of S3 as reading a bucket needs, so that each request of a run can be made to
fail.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape


class Server(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        asked: the method and the path of each request.
        fault: called with the number of a request and its handler; returns whether it has answered.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked = []
        self.fault = lambda _number, _handler: False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """Ignore clients that close the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    is_cut = False

    def log_message(self, *_):
        """Log nothing."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.fault(len(self.server.asked), self):
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
        headers = {
            "ETag": tag,
            "Last-Modified": self.date_time_string(int(path.stat().st_mtime)),
            "X-Repo-Commit": self._revision(),  # a header of the Hub
        }
        if wanted:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        data = path.read_bytes()
        self.answer(206 if wanted else 200, data[begin:end], headers)

    def _revision(self):
        _, _, rest = self.path.partition("/resolve/")
        revision, _, _ = rest.partition("/")
        return revision

    def _describe_repository(self, parts):
        """Answer as the Hub: `org/model` is a folder that holds a folder for each revision, which
        is its own commit."""
        organization, model, *rest = parts
        repository = self.server.folder / organization / model
        what, revision, *_ = [*rest, "main", "main"]
        folder = repository / revision
        facts = {"id": f"{organization}/{model}", "sha": revision, "siblings": []}
        if what == "refs":
            branches = [_branch(path.name) for path in sorted(repository.iterdir())]
            facts = {"branches": branches, "tags": [], "converts": []}
        elif not folder.is_dir():
            self.refuse(404, "RevisionNotFound")
            return
        elif what == "tree":
            facts = [_file_of_tree(path) for path in sorted(folder.iterdir())]
        self.answer(200, json.dumps(facts).encode(), {})

    def _list(self, bucket, prefix, delimiter):
        """Answer with the object that stands for a folder, too, as some tools make it."""
        folders = set()
        text = _contents_of_listing(prefix, 0)
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
        self.answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode(), {})

    def refuse(self, status, code):
        text = f"<Error><Code>{code}</Code><Message>secret</Message></Error>"
        self.answer(status, text.encode(), {"X-Error-Code": code})  # a header of the Hub
        return True

    def answer(self, status, data, headers):
        """Answer with data, or with half of them if the answer is to be cut."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
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
    """Return a text that differs for other content."""
    return hashlib.sha1(path.read_bytes()).hexdigest()


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
