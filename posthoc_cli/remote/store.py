"""The requests that are made of object stores, and their errors in one line.

`obstore` makes them for S3, Google's and Azure's stores and HTTP servers; it repeats what is worth it. Credentials and
endpoints come from the environment, under the names that the stores' own tools use. A URL keeps what it holds of
secrets, a user or a query, in `_SECRETS`: nothing else than the request itself sees them.

A request raises an OSError, which callers give the name of what they do: a FileNotFoundError, a FileExistsError of
`put`, or else a `RemoteError`, whose text holds nothing of what was sent.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from posthoc_cli.errors import InvalidValueError, MissingDependencyError, RemoteError

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
    """What a store says of an object: `key` is its name in the store, a `tag` is another one for other content.

    A tag may be missing. `modified` is in seconds since 1970. Some stores tell content apart by a `version` instead.
    """

    key: str
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


def split(url: str) -> tuple[str, str]:
    """A shown URL as that of its store, with what is secret, and a key in it."""
    scheme, _, rest = url.partition("://")
    if scheme == "hf":
        return "hf://", rest
    host, _, key = rest.partition("/")
    place, user, query = url, "", ""
    while "/" in place:  # a query is for what is below, too
        if place in _SECRETS:
            user, query = _SECRETS[place]
            break
        place = place.rpartition("/")[0]
    return f"{scheme}://{user}{'@' * bool(user)}{host}/{'?' * bool(query)}{query}", key


def opened(root: str) -> Any:
    """The store of a URL from `split`, one for each endpoint."""
    return _opened(root, endpoint())


def endpoint() -> str:
    """The server that is asked in place of Amazon's; empty for none."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


@lru_cache(maxsize=64)
def _opened(root: str, endpoint: str) -> Any:
    scheme = urlsplit(root).scheme
    if scheme == "hf":
        from posthoc_cli.remote.hub import Hub

        return Hub()
    try:
        from obstore.store import HTTPStore, from_url
    except ImportError:
        reason = f"obstore is needed for {scheme}:// and is not installed"
        raise MissingDependencyError("obstore", reason, 'pip install "posthoc-cli[remote]"') from None
    plain = root.startswith("http:") or (scheme == "s3" and endpoint.startswith("http:"))
    client: Any = CLIENT | ({"allow_http": True} if plain else {})
    retries: Any = RETRIES
    if scheme in ("http", "https"):
        return HTTPStore(root, client_options=client, retry_config=retries)
    return from_url(root, client_options=client, retry_config=retries)


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


def listed(url: str) -> tuple[list[str], list[Known]]:
    """The folders and the objects directly in a folder, by their keys; both empty where there is no such folder."""
    store, key = _place(url)
    with told(url, "listed"):
        found = store.list_with_delimiter(key or None)
        own = [_known(one) for one in found["objects"]]
    return list(found["common_prefixes"]), [one for one in own if one.key != key]


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


_WHOLE, _PART, _MOST_PARTS = 64 * 1024 * 1024, 8 * 1024 * 1024, 9_000
"""Bytes that are sent by one request, and of a part of more; S3 takes 10,000 parts."""


def put(url: str, data: bytes | memoryview | Path, *, create: bool = True, replaces: Known | None = None) -> Known:
    """Write an object, complete or not at all; returns what the store says of it.

    With `create` a FileExistsError if it is there, else it is replaced; with `replaces` only if it is still this one,
    or a RemoteError with the errno ESTALE. Both are one request, or of a store without such requests a RemoteError,
    ENOTSUP. Only files above 64 MiB go in parts, and no store can refuse these: that there is no such object is asked
    before.
    """
    store, key = _place(url)
    mode: Any = "create" if create else "overwrite"
    if replaces is not None:
        mode = {"e_tag": replaces.tag} | ({"version": replaces.version} if replaces.version else {})
    size = data.stat().st_size if isinstance(data, Path) else len(data)
    if size > _WHOLE and create:
        with suppress(FileNotFoundError):
            head(url)
            raise FileExistsError(errno.EEXIST, "is there already", url)
    with told(url, "written"):
        if size <= _WHOLE:
            done = store.put(key, data, mode=mode, use_multipart=False)
        else:
            done = store.put(key, data, chunk_size=max(_PART, -(-size // _MOST_PARTS)), max_concurrency=4)
    return Known(key, size, done.get("e_tag") or "", version=done.get("version") or "")


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


def _place(url: str) -> tuple[Any, str]:
    root, key = split(url)
    with told(url, "opened"):
        return opened(root), unquote(key) if root.startswith("http") else key


def _known(found: Any) -> Known:
    modified: datetime | None = found["last_modified"]
    seconds = modified.timestamp() if modified else 0.0
    return Known(found["path"], found["size"], found["e_tag"] or "", seconds, found.get("version") or "")


# --- errors


_ACCESS = "`ema guide remote` says where they are read from"
_REASONS = (
    ("<Code>NoSuchBucket<", errno.EIO, "there is no such bucket", ""),
    ("<Code>ContainerNotFound<", errno.EIO, "there is no such container", ""),
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
    ("status code: 429", errno.EIO, "the store asks for fewer requests", "try again later"),
    ("status code: 503|<Code>SlowDown<",
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
        raise _as_os_error(url, verb, error) from None  # its text holds the request


def _as_os_error(url: str, verb: str, error: Exception) -> OSError:
    kind, answer = type(error).__name__, getattr(error, "response", None)
    if kind in ("FileExistsError", "AlreadyExistsError"):
        return FileExistsError(errno.EEXIST, "is there already", url)
    status = 404 if isinstance(error, FileNotFoundError) else getattr(answer, "status_code", "")
    text = f"{kind}: {f'status code: {status}' * bool(status)} {error}"
    text = re.sub(r"\(code: (\w+)\)", r"<Code>\1<", text)  # of one removal among several
    number, reason, hint = next(
        (number, found.expand(reason).strip(), hint)
        for pattern, number, reason, hint in _REASONS
        if (found := re.search(pattern, text, re.DOTALL))
    )
    if number == errno.ENOENT:
        return FileNotFoundError(number, os.strerror(number), url)
    return RemoteError(url, reason if number == errno.ESTALE else f"cannot be {verb}: {reason}", hint, errno=number)
