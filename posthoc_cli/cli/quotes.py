"""What to say where the shell has split an argument that needs quotes: a pattern of files, a path
with spaces, or the command of a sweep."""

from __future__ import annotations

import glob
import itertools
import os
import re
import shlex
from collections.abc import Container, Sequence
from pathlib import Path

from posthoc_cli.errors import InvalidValueError

_TAKE_PATTERNS = ("audit", "error-plot", "import", "info", "sweep", "synthesize")
"""Commands whose DIR may be a pattern."""
_SPLIT_PATH = "the shell has split a path at its spaces; put it in quotes"
_MOST_WORDS = 8  # of a path with spaces that is looked for
_SPLIT_PATTERN = "the shell has made several of a pattern; put it in quotes"


def find_split(words: Sequence[str], command: str | None, options: Container[str]) -> str:
    """Find the argument of a wrong command line that the shell has split, and write the message
    that says what to quote; nothing if there is none.

    Arguments:
        words: the arguments of `ema`.
        command: the name of the option that takes a command, if this command has one.
        options: the names of all its options.
    """
    if command in words:
        _, *rest = words[words.index(command) :]
        if quoted := _join_command(rest, options):
            split = f"{command}: the shell has split the command"
            return f"{split}; put it in quotes: {command} {quoted}"
    if words[0] in _TAKE_PATTERNS:
        for exists, paths in itertools.groupby(words[1:], os.path.exists):
            if exists and (pattern := _find_pattern([*paths])):
                return f"DIR: {_SPLIT_PATTERN}: {pattern}"
    if path := _find_spaced_path(words[1:]):
        return f"{_SPLIT_PATH}: {path}"
    return ""


def may_be_split(message: str) -> bool:
    """Return whether a message of click is about arguments too many that may be the rest of an
    output's name: none of them exists."""
    extra = re.search(r"extra argument\S* \((.*)\)", message)
    if extra is None:
        return False
    return not any(map(os.path.exists, [extra[1], *extra[1].split()]))


def _join_command(words: Sequence[str], options: Container[str]) -> str:
    """Quote the words of a command: those before the next option of ours, or up to the last
    placeholder."""
    end = 0
    for index, word in enumerate(words, start=1):
        if "{weights}" in word or (end == index - 1 and word not in options):
            end = index
    if end < 2 or " " in words[0]:
        return ""
    parts = [shlex.quote(word) if " " in word else word for word in words[:end]]
    return shlex.quote(" ".join(parts))


def _find_pattern(paths: Sequence[str]) -> str:
    """Find a pattern in quotes of exactly these several files or folders."""
    start = os.path.commonprefix(paths)  # noqa: RUF071
    ends = [path[len(start) :][::-1] for path in paths]
    end = os.path.commonprefix(ends)[::-1]  # noqa: RUF071
    for ending in (Path(end).suffix or end, end):
        pattern = f"{glob.escape(start)}*{glob.escape(ending)}"
        is_exact = sorted(glob.glob(pattern)) == sorted(paths)  # noqa: PTH207
        if is_exact and len(paths) > 1 and pattern != "*":
            return shlex.quote(pattern)
    return ""


def _find_spaced_path(words: Sequence[str]) -> str:
    """Find several words that are one path, of something that exists, in quotes; a word of it may
    exist, too, but not all."""
    for begin in range(len(words)):
        for end in range(min(len(words), begin + _MOST_WORDS), begin + 1, -1):
            joined = words[begin:end]
            path = " ".join(joined)
            if glob.glob(path) and not all(map(os.path.exists, joined)):  # noqa: PTH207
                return shlex.quote(path)
    return ""


def refuse_spaces(paths: Sequence[str]) -> None:
    """Raise an InvalidValueError if several of these are one path with spaces."""
    if path := _find_spaced_path(paths):
        raise InvalidValueError("DIR", f"{_SPLIT_PATH}: {path}")


def refuse_split(paths: Sequence[str]) -> None:
    """Raise an InvalidValueError if these are the files of one pattern, or a path with spaces."""
    refuse_spaces(paths)
    pattern = _find_pattern(paths)
    if pattern and all(Path(path).is_file() for path in paths):
        raise InvalidValueError("DIR", f"{_SPLIT_PATTERN}: {pattern}")
