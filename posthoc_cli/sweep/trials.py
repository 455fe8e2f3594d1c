"""A trial: the user's command as a process, and the metric that it prints or writes.

Each process has a separate process group, so that all its remaining children can be ended with it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, argument, escape_text, list_first, quote
from posthoc_cli.sweep.search import LARGEST

_GRACE = 0.5  # seconds between SIGTERM and SIGKILL
_TICK = 0.01  # seconds between looks at a process
_TAIL = 10_000_000  # bytes at the end of standard output that are searched for the metric
_END_OF_LOG = 300  # bytes at the end of a log that a message shows
_END_OF_OUTPUT = 10_000  # characters at the end of an output whose names a hint may name
_DEEPEST = 100  # brackets in brackets; json.loads takes some 1,000, results of programs have 10
_STRING_OR_BRACKET = re.compile(
    r'"(?:[^"\\\n]|\\.)*\\?(?:"|$)'
    r"|(?P<first>^[^\S\n]*)?(?P<opening>[\[{])"
    r"|(?P<closing>[\]}])(?P<last>[^\S\n]*$)?",
    re.MULTILINE,
)
_CLOSING = {"[": "]", "{": "}"}
_SPACE = r"[^\S\n]"
_NUMBER = (
    rf"(?:{_SPACE}*[:=]{_SPACE}*|{_SPACE}+)"
    r"([-+]?(?:(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?|nan|inf))(?!\w|[.,]\d)"
)
_NAMED_NUMBER = re.compile(rf"(?<![\w.])([A-Za-z][\w.]*){_NUMBER}", re.IGNORECASE)
# Each of these expressions reads a character a few times, however long the line is.


class TrialError(Exception):
    """A trial has no usable metric; the text says why."""


class NoMetricError(TrialError):
    """The metric is found nowhere; `hint` says how to find it, in terms of our own options."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def measure(
    words: Sequence[str],
    folder: Path,
    log: Path,
    metric: Metric | None,
) -> tuple[float | None, float | None]:
    """Run a command, and find its metric, if one is asked for, and the standard error of the
    metric, if any; a TrialError says why it has none.

    `folder` is where files with the metric may be; `log` the path of the logs of standard output
    and error, without the endings .out and .err.
    """
    out = log.with_name(f"{log.name}.out")
    err = log.with_name(f"{log.name}.err")
    for path in (out, err):
        # the process of a killed sweep may still write to the old file
        files.unlink_if_exists(path)
    try:
        _run(words, out, err)
    except TrialError as error:
        raise TrialError(f"{error}: {_last_words(out, err)}") from error
    return (None, None) if metric is None else metric.read(out, folder)


def _last_words(out: Path, err: Path) -> str:
    """Find the last line of standard error, which says most of a traceback, or else the end of
    standard output."""
    _, _, line = _read_tail(err, _END_OF_LOG).strip().rpartition("\n")
    text = line or " ".join(_read_tail(out, _END_OF_LOG).split())
    return escape_text(text) or "it wrote nothing"


def _run(
    words: Sequence[str],
    out: Path,
    err: Path,
) -> None:
    """Run a command until it ends; raise a TrialError if it fails. All its remaining children end
    with it."""
    with out.open("wb") as stdout, err.open("wb") as stderr, ThreadPoolExecutor(1) as pool:
        # In another thread, since the exception of a signal would lose a process that is just being
        # started.
        starting = pool.submit(
            lambda: subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        )
        try:
            process = starting.result()
            # not `wait`: another thread may receive the signal of Ctrl-C
            while process.poll() is None:
                time.sleep(_TICK)
        except OSError as failure:
            raise TrialError(f"cannot be started: {failure.strerror or failure}") from failure
        finally:
            if starting.exception() is None:
                _end_group(starting.result())
    if code := process.returncode:
        raise TrialError(f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the group of a process, also on a second Ctrl-C; the group keeps the id of a process that
    has ended."""
    try:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- metrics


@dataclass(frozen=True)
class Metric:
    """The place where a command prints or writes the metric.

    `key` is the key of a member of a JSON object, with dots between the keys of nested objects:
    `results.acc`, or the word before a number, as in `loss: 2.67`; None if the metric is a line of
    standard output that is a number. `file` is the name or pattern of JSON files in the trial's
    folder or below, of which the newest is used; None for standard output, where the last counts.
    """

    key: str | None = None
    file: str | None = None

    @property
    def text(self) -> str:
        """The metric as --metric takes it."""
        return ":".join(filter(None, (self.file, self.key)))

    @classmethod
    def parse(cls, text: str) -> Metric:
        """Parse `KEY` or `FILE.json:KEY`; raise an InvalidValueError for other texts."""
        file, key = re.fullmatch(r"(?:(.*?\.json):)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        if not key:
            reason = (
                "must be a key such as loss, or a file and a key such as results.json:results.acc"
            )
            raise InvalidValueError("metric", reason, value=text or "(empty)")
        return cls(key, file)

    def read(
        self,
        stdout: Path,
        folder: Path,
    ) -> tuple[float, float | None]:
        """Read the metric and its standard error, if any; raise a TrialError if there is no
        metric."""
        key = self.key or ""
        if self.file is None:
            text = _read_tail(stdout, _TAIL).replace("\r", "\n")
            printed = _find_printed(text, self.key)
        else:
            path, stored = _find_stored(folder, self.file)
            printed = iter([stored])
        found = None
        names = dict[str, None]()
        for value in printed:
            members = _members(value)
            names |= dict.fromkeys(members)
            if key in members:
                found = members
        if found is not None:
            return _check(found, key)
        if self.file is None:
            raise _no_metric_error(text, self.key, names)
        closest = get_close_matches(key, names, 5, 0)
        reason = f"{path.name} has no member {quote(self.key)}{_list_names(closest)}"
        raise NoMetricError(reason, "")


def _no_metric_error(text: str, key: str | None, members: Iterable[str]) -> NoMetricError:
    """Make the error for an output without the metric, which says what its last line is, and hints
    at the names that are there."""
    reason = "no line of its standard output is a number alone"
    if key is not None:
        reason = f"its standard output has no number after {quote(key)}"
    _, _, last = text.strip()[-_END_OF_LOG:].rpartition("\n")
    if last:
        reason += f"; the last line is `{escape_text(last.strip())}`"
    else:
        reason += ", and is empty"
    named = _NAMED_NUMBER.findall(last if key is None else text[-_END_OF_OUTPUT:])
    names = [*dict.fromkeys([*filter(None, members), *(name for name, _ in named)])]
    names = names[:3] if key is None else get_close_matches(key, names, 3, 0)
    hint = f"add {argument('metric')} {' or '.join(names)}" if names else ""
    return NoMetricError(reason, hint)


def _check(
    members: dict[str, Any],
    name: str,
) -> tuple[float, float | None]:
    number = _number(members[name])
    if number is None:
        raise TrialError(f"{quote(name)} is {quote(members[name])}, not a number")
    if not abs(number) <= LARGEST:
        raise TrialError(f"its metric is {number}")
    return number, _standard_error(members, name)


def _find_printed(text: str, key: str | None) -> Iterator[Any]:
    """Yield the numbers, the JSON objects and lists, and the numbers after the key, each on one or
    more complete lines."""
    ends = _match_brackets(text)
    named = re.compile(rf"(?<![\w.]){re.escape(key or '')}{_NUMBER}", re.IGNORECASE)
    end = broken = 0
    for line in re.finditer(r"^[^\S\n]*(.+)$", text, re.MULTILINE):
        if line.start() < end:
            continue  # within a JSON value
        with suppress(ValueError):
            yield float(line[1])
        if key and (numbers := named.findall(line[0])):
            yield {key: numbers[-1]}
        begin = line.start(1)
        stop = ends.get(begin, begin)
        if begin < stop and not begin < broken < stop:
            try:
                yield json.loads(text[begin:stop], parse_int=float)
                end = stop
            except json.JSONDecodeError as error:
                broken = begin + error.pos  # no value around this place is valid


def _match_brackets(text: str) -> dict[int, int]:
    """Find the end of each JSON object or list that begins and ends its lines, by its beginning, if
    it is one: in a single pass, since any line of a log may begin with a bracket."""
    ends = {}
    opened = deque[re.Match[str]](maxlen=_DEEPEST)
    for token in _STRING_OR_BRACKET.finditer(text):
        if token["opening"]:
            opened.append(token)
        elif token["closing"]:
            if not opened or _CLOSING[opened[-1]["opening"]] != token["closing"]:
                opened.clear()
                continue
            first = opened.pop()
            if first["first"] is not None and token["last"] is not None:
                ends[first.start("opening")] = token.end("closing")
    return ends


def _find_stored(folder: Path, pattern: str) -> tuple[Path, Any]:
    """Find the newest matching file, and read its JSON value; raise a TrialError if there is
    none."""
    names = []
    matching = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder)
            names.append(str(name))
            if name.match(pattern):
                matching.append(path)
    if not matching:
        raise TrialError(f"there is no {pattern} in its folder{_list_names(names)}")
    newest = max(matching, key=lambda path: (path.stat().st_mtime_ns, path))
    try:
        return newest, json.loads(newest.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrialError(f"{newest.name} cannot be read: {error}") from error


def _read_tail(path: Path, count: int) -> str:
    """Read the last `count` bytes of a file as text."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - count))
        return file.read().decode(errors="replace")


def _members(value: Any) -> dict[str, Any]:
    """List the members of a JSON object and of objects in it, by dotted keys; a number has the key
    ""."""
    if isinstance(value, float):
        return {"": value}
    members: dict[str, Any] = {}
    objects = [("", value)] if isinstance(value, dict) else []
    for prefix, holder in objects:  # it grows meanwhile
        for name, member in holder.items():
            if isinstance(member, dict):
                objects.append((f"{prefix}{name}.", member))
            else:
                members.setdefault(prefix + name, member)
    return members


def _standard_error(
    members: dict[str, Any],
    name: str,
) -> float | None:
    """Find the standard error of a member, such as `acc_stderr` of `acc`, or lm-eval's
    `acc_stderr,none`, if any."""
    head, comma, tail = name.partition(",")
    for word in ("stderr", "se", "standard_error"):
        error = _number(members.get(f"{head}_{word}{comma}{tail}"))
        if error is not None and 0 < error <= LARGEST:
            return error
    return None


def _number(value: Any) -> float | None:
    """Convert a number, or the text of one, to a float; None for other values."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _list_names(names: list[str]) -> str:
    """Write the end of a message that lists the first names."""
    return f"; found {list_first(map(quote, names))}" if names else ""
