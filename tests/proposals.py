"""What commands propose in their messages: command lines to paste, and options. Each is parsed by
the command that it is for."""

import json
import re
import shlex
from functools import cache

import typer

from posthoc_cli.cli import app

_LINE = re.compile(r"(?:paste: |^ +)(ema .*)$")
"""A command line to paste: the end of a message, or a line of its own."""
_INLINE = re.compile(r"`(ema [^`]*)`")
_VALUE = re.compile(r"(--[a-z-]+) ['\"]")
"""An option with a value in quotes."""
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*\w")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_BEGIN = re.compile(r"^(?:ema: )?(?:error|warning|note|problem): ")
_JSON = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_MISTAKE = re.compile(r"No such option: \S+")
_EVERYWHERE = {"--help", "--debug", "--strict", "--version"}


@cache
def commands():
    """Return the commands, by name."""
    return typer.main.get_command(app).commands


@cache
def options(name):
    """Return the options of a command, by each of their names."""
    found = {}
    for parameter in commands()[name].params:
        if parameter.param_type_name == "option":
            found |= dict.fromkeys(parameter.opts, parameter)
    return found


def parse(line):
    """Parse a command line, or raise an error; nothing is run."""
    program, name, *words = shlex.split(line)
    assert program == "ema"
    commands()[name].make_context(name, words)


def check_proposals(words, printed):
    """Check each proposal in what a command with these words has printed."""
    if not words or words[0] not in commands() or words[0] == "guide":
        return
    if "--help" in words:
        return
    if "--json" in words:
        printed = _JSON.sub(_unpack, printed)
    for line in printed.splitlines():
        if match := _LINE.search(line):
            parse(match[1])
            line = line.removesuffix(match[1])
        if line.startswith(("ema: ", "note: ", "problem: ")):
            _check_message(words, line)


def _unpack(match):
    """Put a text of JSON on a line of its own, as a message."""
    text = json.loads(match[0])
    return f"\nnote: {text}\n" if "--" in text or "`" in text else match[0]


def _check_message(words, message):
    subject, _, text = _MISTAKE.sub("", _BEGIN.sub("", message)).partition(": ")
    text = text or subject
    for line in _INLINE.findall(text):
        name = line.split()[1]
        assert {*_OPTION.findall(line)} <= options(name).keys() | _EVERYWHERE, message
    for option in _VALUE.findall(text):
        assert not getattr(options(words[0]).get(option), "is_flag", False), message
    named = {words[0], *re.findall(r"`ema ([a-z-]+)", text)}
    if re.search(r"\bimport", text):
        named.add("import")
    known = _EVERYWHERE.union(*map(options, named & commands().keys()))
    unknown = {*_OPTION.findall(_QUOTED.sub("''", text))} - known
    assert not unknown, f"{words[0]} proposes {unknown}: {message}"
