"""What to say where the shell has split an argument that needs quotes: a pattern of files, or the
command of a sweep."""

from __future__ import annotations

import glob
import itertools
import os
import shlex
from collections.abc import Container, Sequence
from pathlib import Path

from posthoc_cli.errors import InvalidValueError

_TAKE_PATTERNS = ("audit", "error-plot", "import", "info", "sweep", "synthesize")
"""Commands whose DIR may be a pattern."""
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
    return ""


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


def refuse_split(paths: Sequence[str]) -> None:
    """Raise an InvalidValueError if these are the files of one pattern."""
    pattern = _find_pattern(paths)
    if pattern and all(Path(path).is_file() for path in paths):
        raise InvalidValueError("DIR", f"{_SPLIT_PATTERN}: {pattern}")
