"""URLs as paths, the requests that are made of object stores, and their errors in one line.

`obstore` makes them for S3, Google's and Azure's stores and HTTP servers; it repeats what is worth it. Credentials and
endpoints come from the environment, under the names that the stores' own tools use. A URL keeps what it holds of
secrets, a user or a query, in `_SECRETS`: nothing else than the request itself sees them.

A request raises an OSError, which callers give the name of what they do: a FileNotFoundError, a FileExistsError of
`put`, or else a `RemoteError`, whose text holds nothing of what was sent.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit

from posthoc_cli.errors import InvalidValueError, MissingDependencyError, PostHocError, RemoteError

Result = TypeVar("Result")

SCHEMES = ("s3", "gs", "az", "https", "http", "hf")

CLIENT = {"timeout": "60s", "connect_timeout": "5s"}
"""Of one request, the body included."""

RETRIES: dict[str, Any] = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
"""Of requests that fail in a way which may pass: 17 seconds of waiting together."""

_SECRETS: dict[str, tuple[str, str]] = {}
"""By a shown URL of a web server: the user with a password, and the query, that it was given with."""


class Known(NamedTuple):
    """What a store says of an object: a `tag`, which may be missing, is another one for other content.

    `modified` is in seconds since 1970. Some stores tell content apart by a `version` instead.
    """

    size: int
    tag: str = ""
    modified: float = 0.0
    version: str = ""


def shown_url(text: str) -> str:
    """A URL as it is shown, without what may be secret; `text` may be what a Path made of it, with one slash.

    Raises:
        InvalidValueError: its scheme is unknown, or it holds credentials that cannot be used.
    """
    scheme, _, rest = text.partition(":")
    host, slash, path = rest.strip("/").partition("/")
    scheme, user, query, is_web = scheme.lower(), "", "", scheme.lower() in ("http", "https")
    if scheme != "hf":  # whose revisions are behind an @
        user, _, host = host.rpartition("@")
    if is_web or scheme not in SCHEMES:
        path, _, query = path.partition("?")
    shown = f"{scheme}://{host}{slash}{path}".rstrip("/")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InvalidValueError(shown, f"is a URL of an unknown kind; must be a path, or begin with one of {known}")
    if not host:
        raise InvalidValueError(shown, "must name a bucket, a host or a repository")
    if user and not is_web:
        raise InvalidValueError(shown, "holds credentials, which are read from the environment only")
    if user or query:
        _SECRETS[shown] = (user, query)
    return shown


def endpoint() -> str:
    """The server that is asked in place of Amazon's; empty for none."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _place(url: str, seconds: int = 0) -> tuple[Any, str]:
    """The store of a shown URL, with what is secret, and the key in it; a request may take `seconds`, or `CLIENT`'s."""
    scheme, _, rest = url.partition("://")
    host, _, key = rest.partition("/")
    with told(url, "opened"):
        if scheme == "hf":
            from posthoc_cli.remote import hub

            return hub, rest
        above = [known for known in _SECRETS if f"{url}/".startswith(f"{known}/")]  # a query is for what is below, too
        user, query = _SECRETS[max(above, key=len)] if above else ("", "")
        root = f"{scheme}://{user}{'@' * bool(user)}{host}/{'?' * bool(query)}{query}"
        return _opened(root, endpoint(), seconds), unquote(key) if scheme.startswith("http") else key


@lru_cache(maxsize=64)
def _opened(root: str, endpoint: str, seconds: int) -> Any:
    scheme = urlsplit(root).scheme
    try:
        from obstore.store import HTTPStore, from_url
    except ImportError:
        reason = f"obstore is needed for {scheme}:// and is not installed"
        raise MissingDependencyError("obstore", reason, 'pip install "posthoc-cli[remote]"') from None
    client: Any = CLIENT | ({"timeout": f"{seconds}s"} if seconds else {})
    if scheme == "http" or (scheme == "s3" and endpoint.startswith("http:")):
        client["allow_http"] = True
    make: Any = HTTPStore if scheme in ("http", "https") else from_url
    return make(root, client_options=client, retry_config=RETRIES)


# --- paths


class RemotePath(PosixPath):
    """The path of an object or of a folder in a store; of the text from `shown_url`, and of nothing else.

    What does not know about URLs, as `open`, fails: it would mean a folder of the working directory.

    Attributes:
        known: what the listing that this path is from has said of the object; None for a folder, and without one.
        is_spooled: whether the system may have the file, too, under the path's name for it.
    """

    is_spooled = False
    known: Known | None = None
    _is_listed = False

    def __str__(self) -> str:
        """The URL; a Path keeps one of two slashes. Of what is relative to another path, the names alone."""
        scheme, colon, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}" if colon else scheme

    def __fspath__(self) -> str:
        """Refuse to be a name for the system."""
        raise PostHocError(self, "is a URL; must be a path on a file system of this machine here")

    def absolute(self) -> RemotePath:
        """The path itself."""
        return self

    def resolve(self, strict: bool = False) -> RemotePath:  # noqa: ARG002
        """The path itself."""
        return self

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def is_file(self, **_: Any) -> bool:
        """Whether it is an object."""
        if self._is_listed:
            return self.known is not None
        try:
            self.known, self._is_listed = head(str(self)), True
        except FileNotFoundError:
            return False
        except RemoteError as error:  # the same answer where nothing is there and folders must not be listed
            if error.errno != errno.EACCES:
                raise
            return False
        return True

    def is_dir(self, **_: Any) -> bool:
        """Whether an object is below it."""
        if not self._is_listed and not self._is_web and not self.is_file():
            with suppress(FileNotFoundError):
                self._is_listed = bool(listed(str(self)))
        return self._is_listed and self.known is None

    @property
    def _is_web(self) -> bool:
        """Whether it is of a web server, which has no folders."""
        return str(self).startswith("http")

    def exists(self, **_: Any) -> bool:
        """Whether it is either."""
        return self.is_file() or self.is_dir()

    def stat(self, **_: Any) -> os.stat_result:
        """The kind, size and time of an object, or the kind of a folder; a FileNotFoundError if it is neither."""
        try:
            found = head(str(self))
        except FileNotFoundError:
            if not self.is_dir():
                raise
            return os.stat_result((stat.S_IFDIR | 0o777, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        when = int(found.modified)
        return os.stat_result((stat.S_IFREG | 0o666, 0, 0, 1, 0, 0, found.size, when, when, when))

    def lstat(self) -> os.stat_result:
        """The same: there are no links."""
        return self.stat()

    def unlink(self, missing_ok: bool = True) -> None:  # noqa: ARG002 - a store does not say
        """Remove the object, if there is one."""
        delete(str(self))

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """What is in the folder; a FileNotFoundError if there is none, a NotADirectoryError of an object."""
        found: dict[str, Known | None] = {}
        try:
            if not self.known and not self._is_web:
                found = listed(str(self))
        except RemoteError:  # of an object it is the same that folders cannot be listed
            if not self.is_file():
                raise
        if not found:
            head(str(self))
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))
        for name, known in found.items():
            child = self / name
            child.known, child._is_listed = known, True
            yield child

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """What matches in this folder; nothing is left out for its dot. `model@step*` are revisions of the Hub's."""
        if str(self).startswith("hf://") and "@" in pattern:
            repository, _at, wanted = pattern.partition("@")
            names = fnmatch.filter(revisions(str(self / repository)), wanted)
            yield from (self / f"{repository}@{quote(name, safe='')}" for name in names)
        else:
            with suppress(FileNotFoundError, NotADirectoryError):
                yield from (child for child in self.iterdir() if fnmatch.fnmatchcase(child.name, pattern))


def remote_path(text: str) -> RemotePath:
    """The path of a URL; also of what a Path made of it, with one slash. Errors as of `shown_url`."""
    return RemotePath(shown_url(text))


def matching(pattern: Path) -> list[Path]:
    """What a pattern that is a URL names, sorted; nothing where its folder is absent."""
    first, *parts = pattern.parts
    found = [RemotePath(first)]
    for part in parts:
        is_name = not glob.has_magic(part)
        found = [one for folder in found for one in ([folder / part] if is_name else folder.glob(part))]
    return sorted(one for one in found if not is_name or one.exists())


# --- requests


def head(url: str) -> Known:
    """What the store knows of an object; a FileNotFoundError if there is none."""
    store, key = _place(url)
    if not key:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)  # a bucket
    try:
        with told(url):
            return _known(store.head(key))
    except RemoteError as error:
        if error.errno != errno.EACCES:
            raise
    return get(url, 0, 1)[1]  # whose answer has a body, which says why


def listed(url: str) -> dict[str, Known | None]:
    """The folders, without more, and the objects directly in a folder, by name; none where there is no such folder."""
    store, key = _place(url)
    with told(url, "listed"):
        found = store.list_with_delimiter(key or None)
    objects = {one["path"]: _known(one) for one in found["objects"] if one["path"] != key}
    places = dict.fromkeys(found["common_prefixes"]) | objects
    return {place.rpartition("/")[2]: known for place, known in places.items()}


def get(url: str, begin: int, end: int, tag: str = "") -> tuple[memoryview, Known]:
    """The bytes `begin` to `end` of an object, fewer at its end; with a tag only if it still has this one."""
    store, key = _place(url)
    options: dict[str, Any] = {"range": (begin, end)}
    if tag and not tag.startswith("W/"):  # which never matches
        options["if_match"] = tag
    with told(url):
        try:
            found = store.get(key, options=options)
            return memoryview(found.bytes()), _known(found.meta)
        except Exception as error:
            if "416 Range Not Satisfiable" not in str(error):
                raise
        return memoryview(b""), _known(store.head(key))  # nothing is there


def revisions(url: str) -> list[str]:
    """The names of the branches and tags of a repository of the Hub."""
    store, key = _place(url)
    with told(url, "listed"):
        return list(store.revisions(key))


_WHOLE = 5_000 * 1024 * 1024
"""Bytes that each store takes in one request."""

_PART, _MOST_PARTS = 8 * 1024 * 1024, 9_000
"""Bytes of a part of a larger file, and how many parts there are at most; S3 takes 10,000."""

_SLOWEST = 500_000
"""Bytes a second that are sent by one request at least."""


def put(url: str, data: bytes | Path, *, create: bool = True, replaces: Known | None = None) -> Known:
    """Write an object, complete or not at all; returns what the store says of it.

    With `create` a FileExistsError if it is there, else it is replaced; with `replaces` only if it is still this one,
    or a RemoteError with the errno ESTALE. Both are one request, or of a store without such requests a RemoteError,
    ENOTSUP. Only a file above 5,000 MiB goes in parts, which `obstore` cannot send so: that there is no such object is
    asked before.
    """
    size = data.stat().st_size if isinstance(data, Path) else len(data)
    minutes = size // (60 * _SLOWEST)
    store, key = _place(url, 60 * (1 + minutes) if minutes else 0)
    content: Any = data
    how: dict[str, Any] = {"chunk_size": max(_PART, -(-size // _MOST_PARTS)), "max_concurrency": 4}
    if create and size > _WHOLE:
        with suppress(FileNotFoundError):
            head(url)
            raise FileExistsError(errno.EEXIST, "is there already", url)
    elif create:
        mode = replaces and {"e_tag": replaces.tag} | ({"version": replaces.version} if replaces.version else {})
        content = _mapped(data) if isinstance(data, Path) else data
        how = {"mode": mode or "create", "use_multipart": False}

    with told(url, "written"):
        done = store.put(key, content, **how)
    return Known(size, done.get("e_tag") or "", version=done.get("version") or "")


def _mapped(path: Path) -> mmap.mmap | bytes:
    """The content of a file that nobody shortens meanwhile; the system drops its pages where memory is short."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # an empty file, or a file system without mapping
            return file.read()


def repeated(request: Callable[[], Result]) -> Result:
    """The result of a request with a condition, made again if that fails: no library repeats one whose answer was lost.

    It may have been done then, so that the condition does not hold any more: whoever calls finds out.
    """
    try:
        return request()
    except RemoteError as error:
        if error.errno != errno.EIO:
            raise
    time.sleep(0.5)
    return request()


def copy(url: str, to: str) -> None:
    """Give an object a second name in its store."""
    store, key = _place(url)
    with told(to, "written"):
        store.copy(key, _place(to)[1])


def delete(url: str) -> None:
    """Remove an object; one that is not there is no error."""
    store, key = _place(url)
    with told(url, "removed"), suppress(FileNotFoundError):
        store.delete(key)


def _known(found: Any) -> Known:
    modified: datetime | None = found["last_modified"]
    seconds = modified.timestamp() if modified else 0.0
    return Known(found["size"], found["e_tag"] or "", seconds, found.get("version") or "")


# --- errors


_ACCESS = "`ema guide remote` says where they are read from"
_REASONS = (
    ("<Code>(NoSuchBucket|ContainerNotFound)<", errno.EIO, "there is no such bucket or container", ""),
    ("status code: 404", errno.ENOENT, "", ""),
    (r"//(169\.254\.|metadata\.|sts\.|oauth2\.|login\.)|/latest/api/token|credential",
     errno.EACCES, "no credentials were found", _ACCESS),
    ("MissingAccount", errno.EACCES, "no account is named", "set AZURE_STORAGE_ACCOUNT_NAME"),
    ("OpenCredentials|DecodeCredentials|InvalidAccessKey {", errno.EACCES, "the credentials cannot be read", _ACCESS),
    ("<Code>(ExpiredToken|TokenRefreshRequired)<", errno.EACCES, "the credentials have expired", "renew them"),
    ("<Code>(InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken)<",
     errno.EACCES, "the credentials are not accepted", _ACCESS),
    ("<Code>RequestTimeTooSkewed<", errno.EACCES, "the clock of this machine is wrong", "set it"),
    ("<Code>(AuthorizationHeaderMalformed|PermanentRedirect)<|status code: 301|redirect without LOCATION",
     errno.EIO, "the region is another one", "set AWS_REGION"),
    ("status code: 401", errno.EACCES, "the credentials are missing or not accepted", _ACCESS),
    ("status code: 403|<Code>AccessDenied<", errno.EACCES, "access is denied", ""),
    ("status code: 405", errno.EIO, "the server does not list folders or take files", "name a file"),
    ("status code: 412", errno.ESTALE, "was replaced while it was being used", "run again"),
    ("status code: (429|503)|<Code>SlowDown<",
     errno.EIO, "the store asks for fewer requests, or is not available", "try again later"),
    ("status code: 501", errno.ENOTSUP, "the server answers 501", ""),
    (r"status code: (400)(?:.*<Code>(\w{1,60})<)?", errno.EACCES, r"the server answers \1 \2", ""),
    (r"status code: (\d{3})(?:.*<Code>(\w{1,60})<)?", errno.EIO, r"the server answers \1 \2", ""),
    (r"<Code>(\w{1,60})<", errno.EIO, r"the server answers \1", ""),
    ("^ValueError", errno.EIO, "the store takes no such name", ""),
    ("Connect|dns error", errno.EIO, "no connection to the server", "check the URL, the endpoint and the network"),
    ("Timeout|timed out", errno.EIO, "the server did not answer in time", ""),
    ("^NotImplementedError", errno.ENOTSUP, "the store does not know this kind of request", ""),
    ("", errno.EIO, "the connection was lost, or the answer is incomplete", ""),
)  # fmt: skip
"""By what the text of an error holds, the first that fits: its number, what is wrong, and what to do."""


@contextmanager
def told(url: str, verb: str = "read") -> Iterator[None]:
    """Turn what a library raises about a request into an OSError about the URL, in one line."""
    try:
        yield
    except (MissingDependencyError, RemoteError):
        raise
    except Exception as error:  # noqa: BLE001 - the libraries of three stores have theirs
        kind, answer = type(error).__name__, getattr(error, "response", None)
        status = 404 if isinstance(error, FileNotFoundError) else getattr(answer, "status_code", "")
        text = f"{kind}: {f'status code: {status}' * bool(status)} {error}"
        text = re.sub(r"\(code: (\w+)\)", r"<Code>\1<", text)  # of one removal among several
        number, reason, hint = next(
            (number, found.expand(reason).strip(), hint)
            for pattern, number, reason, hint in _REASONS
            if (found := re.search(pattern, text, re.DOTALL))
        )
        said = reason if number == errno.ESTALE else f"cannot be {verb}: {reason}"
        made: OSError = RemoteError(url, said, hint, errno=number)
        if kind in ("FileExistsError", "AlreadyExistsError"):
            made = FileExistsError(errno.EEXIST, "is there already", url)
        elif number == errno.ENOENT:
            made = FileNotFoundError(number, os.strerror(number), url)
        raise made from None  # the library's text holds the request
