"""URLs as paths, requests to object stores, and their errors in one line.

`obstore` makes the requests to S3, Google's and Azure's stores, and retries those that may succeed
later. Credentials and endpoints come from the environment, under the names that the stores' own
tools use.

A failed request raises an OSError: a FileNotFoundError, or else a `RemoteError`, whose text holds
nothing of what was sent.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from posthoc_cli.errors import InvalidValueError, MissingDependencyError, PostHocError, RemoteError

SCHEMES = ("s3", "gs", "az", "hf")

# timeouts of one request; the first includes its body
CLIENT = {"timeout": "60s", "connect_timeout": "5s"}

RETRIES: dict[str, Any] = {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}
"""Retries of a request whose failure may be temporary: about 25 seconds of waiting in all."""


class ObjectInfo(NamedTuple):
    """The facts that a store reports about an object; `tag` may be empty, and differs for other
    content."""

    size: int
    tag: str = ""


FOLDER = ObjectInfo(0)
"""What stands for the facts about a folder."""


def _place(url: str) -> tuple[Any, str]:
    """Return the store of a URL and the key in it."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    with request_errors(url, "opened"):
        if scheme == "hf":
            from posthoc_cli.remote import hub

            return hub, rest
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        return open_bucket(f"{scheme}://{bucket}/", endpoint), key


@lru_cache(maxsize=64)
def open_bucket(bucket: str, endpoint: str) -> Any:
    """Return the store of a bucket; `endpoint` is the server that replaces Amazon's, or empty."""
    try:
        from obstore.store import from_url
    except ImportError:
        reason = f"is needed for {bucket}, and is not installed"
        raise MissingDependencyError(
            "obstore", reason, 'pip install "posthoc-cli[remote]"'
        ) from None
    client: Any = CLIENT | {"allow_http": endpoint.startswith("http:")}
    options: Any = {"client_options": client, "retry_config": RETRIES}
    return from_url(bucket, **options)


# --- paths

_NONE = (errno.ENOENT, errno.EACCES)
"""Errors about a missing object; where listing is not permitted, access to it is "denied"."""


class RemotePath(PosixPath):
    """The path of an object or a folder in a store; made by `remote_path` only.

    Functions that do not know about URLs, such as `open`, fail: they would use a folder of the
    working directory.
    """

    _known: ObjectInfo | None = None  # None if the store has not reported them

    def __str__(self) -> str:
        """Return the URL, of which a Path keeps one of two slashes; of a path relative to another,
        its names."""
        scheme, colon, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}" if colon else scheme

    def __fspath__(self) -> str:
        """Raise an error: the operating system cannot open a URL."""
        raise PostHocError(self, "is a URL; must be a path on a file system of this machine")

    def absolute(self) -> RemotePath:
        return self

    def is_symlink(self) -> bool:
        """Return False: a store has no links."""
        return False

    def _ask(self) -> ObjectInfo:
        """Return the facts about an object, or FOLDER; raise a FileNotFoundError if the path is
        neither."""
        if self._known is None:
            try:
                self._known = head(str(self))
            except OSError as error:
                if error.errno not in _NONE:
                    raise
                with suppress(RemoteError) if error.errno == errno.EACCES else nullcontext():
                    self._known = FOLDER if listed(str(self)) else None
                if self._known is None:
                    raise
        return self._known

    def is_file(self, **_: Any) -> bool:
        """Return whether it is an object that may be read: an optional file is often one without
        permission."""
        try:
            return self._ask() is not FOLDER
        except OSError as error:
            if error.errno not in _NONE:
                raise
            return False

    def is_dir(self, **_: Any) -> bool:
        with suppress(FileNotFoundError):
            return self._ask() is FOLDER
        return False

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self, **_: Any) -> os.stat_result:
        """Return the kind and the size of an object, or the kind of a folder, as the store reports
        them now."""
        self._known = None
        info = self._ask()
        mode = stat.S_IFDIR if info is FOLDER else stat.S_IFREG
        return os.stat_result((mode | 0o666, 0, 0, 1, 0, 0, info.size, 0, 0, 0))

    lstat = stat

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """Yield the paths in the folder; raise a FileNotFoundError without one, a
        NotADirectoryError for an object."""
        if self._ask() is not FOLDER:
            raise _system_error(errno.ENOTDIR, str(self))
        for name, info in listed(str(self)).items():
            child = self / name
            child._known = info
            yield child

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """Yield the matches in this folder, hidden names included; `model@step*` matches revisions
        of the Hub."""
        if is_on_hub(str(self)) and "@" in pattern:
            repository, _at, revision = pattern.partition("@")
            store, key = _place(str(self / repository))
            with request_errors(str(self / repository), "listed"):
                names = fnmatch.filter(store.revisions(key), revision)
            yield from (self / f"{repository}@{quote(name, safe='')}" for name in names)
        else:
            with suppress(FileNotFoundError, NotADirectoryError):
                yield from (
                    child for child in self.iterdir() if fnmatch.fnmatchcase(child.name, pattern)
                )


def remote_path(text: str) -> RemotePath:
    """Return the path of a URL, or of what a Path made of it, with one slash.

    Raises InvalidValueError for an unknown scheme, and for credentials, which the error does not
    show.
    """
    scheme, _, rest = text.partition(":")
    host, slash, path = rest.strip("/").partition("/")
    scheme = scheme.lower()
    user = ""
    problem = ""
    if scheme != "hf":  # whose revisions follow an @
        user, _, host = host.rpartition("@")
    if scheme not in SCHEMES:
        path = path.partition("?")[0]
        known = ", ".join(f"{name}://" for name in SCHEMES)
        problem = f"is a URL of an unknown kind; must be a path, or begin with one of {known}"
    elif not host:
        problem = "must name a bucket or a repository"
    elif user:
        problem = "holds credentials, which are read from the environment only"
    shown = f"{scheme}://{host}{slash}{path}".rstrip("/")
    if problem:
        raise InvalidValueError(shown, problem)
    return RemotePath(shown)


def matching(pattern: Path) -> list[Path]:
    """Return the paths that match a pattern that is a URL, sorted; none where its folder does not
    exist."""
    first, *parts = pattern.parts
    paths = [RemotePath(first)]
    for part in parts:
        is_name = not glob.has_magic(part)
        paths = [
            match
            for folder in paths
            for match in ([folder / part] if is_name else folder.glob(part))
        ]
    return sorted(path for path in paths if not is_name or path.exists())


# --- requests


def head(url: str) -> ObjectInfo:
    """Return the facts about an object; raise a FileNotFoundError if it does not exist.

    A byte is read from a bucket: the answer to a HEAD request has no body, which would hold the
    reason of a refusal.
    """
    if is_on_hub(url):
        hub, key = _place(url)
        with request_errors(url):
            return _info(hub.head(key))
    _, info = get(url, 0, 1)
    return info


def is_on_hub(url: str) -> bool:
    """Return whether a URL names something on the Hugging Face Hub."""
    return url.startswith("hf://")


def download(url: str) -> Path:
    """Return the path of a copy of a file of the Hub, in the cache of `huggingface_hub`."""
    hub, key = _place(url)
    with request_errors(url, "downloaded"):
        copy: Path = hub.download(key)
        return copy


_LISTINGS = 4  # attempts at a complete answer, which the library does not make itself


def listed(url: str) -> dict[str, ObjectInfo]:
    """Return the objects and the folders directly in a folder, by name; none where it does not
    exist."""
    store, key = _place(url)
    for left in reversed(range(_LISTINGS)):
        try:
            with request_errors(url, "listed"):
                answer = store.list_with_delimiter(key or None)
            break
        except RemoteError as error:
            if error.errno != errno.EAGAIN or not left:
                raise
    entries = dict.fromkeys(answer["common_prefixes"], FOLDER)
    for entry in answer["objects"]:
        if entry["path"] != key:
            entries[entry["path"]] = _info(entry)
    return {path.rpartition("/")[2]: info for path, info in entries.items()}


def get(url: str, begin: int, end: int) -> tuple[memoryview, ObjectInfo]:
    """Return the bytes `begin` to `end` of an object, fewer at its end."""
    store, key = _place(url)
    if not key:
        raise _system_error(errno.ENOENT, url)  # a bucket
    try:
        with request_errors(url):
            answer = store.get(key, options={"range": (begin, end)})
            return memoryview(answer.bytes()), _info(answer.meta)
    except RemoteError as error:
        if error.errno != errno.ERANGE:
            raise
    with request_errors(url):
        return memoryview(b""), _info(store.head(key))  # the range begins at the end of the object


_START = 256 * 1024
"""Bytes of the first request, enough for the header of most files; reads of less than an eighth
request as many."""


class RemoteBytes:
    """The bytes of an object, read at any offset by any number of threads; its replacement
    meanwhile is an error.

    It holds a few pieces of the object, which small reads share. Size and `tag`, which may be
    empty, differ for other content; every request checks them.
    """

    def __init__(self, path: Path) -> None:
        self._url = str(path)
        self._start, info = get(self._url, 0, _START)
        self.size = info.size
        self.tag = info.tag
        # As many as tensors that may be read in turns.
        self._piece = lru_cache(maxsize=4)(lambda begin: self._range(begin, begin + _START))

    def read(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view from an offset on; return how many bytes, 0 only at the end
        of the object."""
        begin = offset - offset % _START
        if len(view) >= _START // 8:
            data = self._range(offset, offset + len(view))
        else:
            data = (self._piece(begin) if begin else self._start)[offset - begin :]
        count = min(len(view), len(data))
        view[:count] = data[:count]
        return count

    def _range(self, begin: int, end: int) -> memoryview:
        """Return the bytes of a range by one request, fewer at the end of the object."""
        end = min(end, self.size)
        if begin >= end:
            return memoryview(b"")
        data, info = get(self._url, begin, end)
        if (info.size, info.tag) != (self.size, self.tag):
            raise RemoteError(self._url, "was replaced while it was being used", "run again")
        if len(data) != end - begin:
            raise RemoteError(
                self._url, f"cannot be read: the answer has {len(data):,} bytes of {end - begin:,}"
            )
        return data

    def close(self) -> None:
        """Forget what was read: a request ends with its answer."""
        self._piece.cache_clear()
        self._start = memoryview(b"")


def _info(facts: Any) -> ObjectInfo:
    return ObjectInfo(facts["size"], facts["e_tag"] or "")


# --- errors


def _system_error(number: int, url: str) -> OSError:
    """Return the system's error of this number, such as a FileNotFoundError, about a URL."""
    return OSError(number, os.strerror(number), url)


_REASONS = (
    ("status code: 416 ", errno.ERANGE, "it is shorter than the range asked for", ""),
    (
        "<Code>(NoSuchBucket|ContainerNotFound)<",
        errno.EIO,
        "there is no such bucket or container",
        "",
    ),
    ("status code: 404", errno.ENOENT, "", ""),
    (
        r"//(169\.254\.|metadata\.|sts\.|oauth2\.|login\.)|/latest/api/token|credential|MissingAccount"
        "|status code: 401|OpenCredentials|DecodeCredentials|InvalidAccessKey|ExpiredToken"
        "|TokenRefresh|InvalidToken|SignatureDoesNotMatch",
        errno.EACCES,
        "the credentials are missing, expired or not accepted",
        "`ema guide remote` says where they are read from",
    ),
    (
        "<Code>(AuthorizationHeaderMalformed|PermanentRedirect)<|status code: 301|redirect "
        "without LOCATION",
        errno.EIO,
        "the bucket is in another region",
        "set AWS_REGION",
    ),
    (
        r"status code: 403(?:.*<Code>(?!AccessDenied)(\w{1,60})<)?|<Code>AccessDenied<",
        errno.EACCES,
        r"access is denied \1",
        "",
    ),
    (r"status code: (400)(?:.*<Code>(\w{1,60})<)?", errno.EACCES, r"the server answers \1 \2", ""),
    (
        r"status code: (\d{3})(?:.*<Code>(\w{1,60})<)?|<Code>(\w{1,60})<",
        errno.EIO,
        r"the server answers \1 \2\3",
        "",
    ),
    (
        "^(ValueError|NotImplementedError)",
        errno.EIO,
        "the store does not accept this name, or kind of request",
        "",
    ),
    ("list response", errno.EAGAIN, "the answer is incomplete", ""),
    ("^OfflineModeIsEnabled", errno.EIO, "the network may not be used", "unset HF_HUB_OFFLINE"),
    (
        "Connect|dns error|Timeout|timed out",
        errno.EIO,
        "no answer of the server",
        "check the URL and the network",
    ),
    ("", errno.EIO, "the connection was lost, or the answer is incomplete", ""),
)
"""Patterns of error texts, the first match decides: each with the errno, the reason and what to do.
"""


@contextmanager
def request_errors(url: str, verb: str = "read") -> Iterator[None]:
    """Turn what a library raises about a request into an OSError about the URL, in one line."""
    try:
        yield
    except (MissingDependencyError, RemoteError):
        raise
    except Exception as error:  # noqa: BLE001 - the libraries of three stores have different classes
        number, reason, hint = _reason(error)
        if number == errno.ENOENT:
            raise _system_error(number, url) from None
        # the library's text holds the request
        raise RemoteError(url, f"cannot be {verb}: {reason}", hint, errno=number) from None


def _reason(error: Exception) -> tuple[int, str, str]:
    """Return the errno, the reason and what to do of a library's error."""
    answer = getattr(error, "response", None)
    status = getattr(answer, "status_code", "")
    if isinstance(error, FileNotFoundError):
        status = 404
    status_text = f"status code: {status}" if status else ""
    text = f"{type(error).__name__}: {status_text} {error}"
    # the form of an error of a bulk deletion
    text = re.sub(r"\(code: (\w+)\)", r"<Code>\1<", text)
    for pattern, number, reason, hint in _REASONS:
        if match := re.search(pattern, text, re.DOTALL):
            return number, match.expand(reason).strip(), hint
    raise AssertionError("the last pattern matches every text")
