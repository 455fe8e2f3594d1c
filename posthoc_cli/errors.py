"""All errors that this package raises on purpose, with the exit codes of `ema`. A public module.

Each error has the fields `subject` (the file, tensor, argument or method that is wrong), `value`
(the value of an argument), `reason` (what is wrong and what would be accepted) and `hint` (what to
do). The message joins them in one line. `quote` escapes and shortens names and values that were
read from files.

An error has exit code 2, wrong usage, if another command line is the remedy: it asks for what an
undamaged input does not offer, or the name of its output is taken. The code is 1 if an input is
damaged, if inputs do not fit each other, and if a check or the system fails.
"""

from __future__ import annotations

import copy
import logging
import math
import operator
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypeVar

_LONGEST = 200
_LONGEST_LINE = 5_000
_PACKAGE = __name__.partition(".")[0]
_Error = TypeVar("_Error", bound="PostHocError")


class PostHocError(Exception):
    """The base class of all errors; `value` is empty if the subject is not an argument, `hint` may
    be."""

    exit_code = 1

    def __init__(
        self,
        subject: object,
        reason: str,
        hint: str = "",
        *,
        value: object = "",
    ) -> None:
        super().__init__(subject, reason)
        self.subject = str(subject)
        self.reason = reason
        self.hint = hint
        self.value = str(value)

    def __str__(self) -> str:
        what = f"{self.subject} {self.value}" if self.value else self.subject
        return one_line(f"{what}: {self.reason}" + (f"; {self.hint}" if self.hint else ""))

    def with_hint(self: _Error, hint: str) -> _Error:
        error = copy.copy(self)
        error.hint = f"{self.hint}; {hint}" if self.hint else hint
        return error


class InvalidValueError(PostHocError, ValueError):
    """An argument or option outside what is accepted."""

    exit_code = 2


class DirectoryError(PostHocError):
    """A snapshot directory that is absent, empty or foreign."""

    exit_code = 2


class FileFormatError(PostHocError):
    """A file that is damaged, truncated or of another format."""


class UnsuitableError(FileFormatError):
    """An undamaged file that does not hold what the call asks for; other arguments would help."""

    exit_code = 2


class VanishedError(FileFormatError):
    """A file that was deleted or moved while it was in use, for example because a tracker thinned
    its snapshots."""


class MismatchError(PostHocError, ValueError):
    """Snapshots that differ in run, shapes, dtypes or names; a ValueError as in
    `pytorch-posthoc-ema`."""


class ModelMismatchError(PostHocError):
    """A model whose tensors are not the tracked ones. `weights` are the model's own, by name, if a
    block could not put them back."""

    weights: Mapping[str, Any] = {}


class NonFiniteError(PostHocError):
    """nan or infinity in an average or a result."""


class LockedError(PostHocError):
    """A directory that another writer holds."""


class OutputExistsError(PostHocError):
    """An output that already exists and may not be replaced."""

    exit_code = 2


class InexactError(PostHocError):
    """A target whose predicted error is above the accepted one."""


class WarnedError(PostHocError):
    """A warning, where the caller accepts none."""


class CommandError(PostHocError):
    """A user's own command that failed or printed no metric. The reason quotes its output."""


class MissingDependencyError(PostHocError):
    """An optional library that is not installed; the message says how to install it."""


class RankError(PostHocError):
    """Another process of a job failed or died; this one stops."""


class _SystemError(PostHocError, OSError):
    """An error that carries the `errno` of the operating system's error."""

    def __init__(
        self,
        subject: object,
        reason: str,
        hint: str = "",
        *,
        errno: int | None = None,
    ) -> None:
        super().__init__(subject, reason, hint)
        # OSError would take them from its positional arguments
        self.errno = errno
        self.strerror = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.subject, self.reason), {**vars(self), "errno": self.errno}


class WriteError(_SystemError):
    """A write that the system refused (disk full, no permission). Nothing partial is left."""


class RemoteError(_SystemError):
    """A request that an object store refused or did not answer."""


class NotReadyError(PostHocError, RuntimeError):
    """An average that does not exist yet, because no update was made."""


class RefusedCallError(PostHocError, RuntimeError):
    """A call that its object does not take now: a tracker that is closed, attached, in another call
    or of another process; a model that holds averaged weights."""


# --- texts for people


def escape_text(text: str) -> str:
    """Escape characters that control a terminal: control codes, line ends, changes of direction."""
    characters = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def one_line(text: str) -> str:
    """Escape control characters of a message, and limit its length."""
    line = escape_text(text[:_LONGEST_LINE])
    return f"{line}..." if len(text) > _LONGEST_LINE else line


def quote(value: object) -> str:
    """Quote a name or value from a file for a message: escaped, in one line, and shortened."""
    if isinstance(value, str):
        quoted = repr(value[:_LONGEST])
        return f"{quoted}..." if len(value) > _LONGEST else quoted
    if isinstance(value, int) and abs(value) >= 2**63:
        return "an int of many digits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__}"


_options = dict[str, str]()  # by the names of arguments; empty where no command line runs


def argument(name: str) -> str:
    """Write the name of an argument of ours for a message: `name`, or in a command the option."""
    return _options.get(name, f"`{name}`")


@contextmanager
def name_options(options: Mapping[str, str]) -> Iterator[None]:
    """Write arguments as these options in the block."""
    _options.update(options)
    try:
        yield
    finally:
        _options.clear()


def abbreviate(value: object) -> str:
    """Shorten an argument's value for a message, in one line."""
    return " ".join(repr(value)[:40].split()).removesuffix(".0")


def list_first(texts: Iterable[str], most: int = 5) -> str:
    """List the first texts in one line, and how many more there are."""
    every = [*texts]
    listed = ", ".join(every[:most])
    left = len(every) - most
    return f"{listed} and {left:,} more" if left > 0 else listed


def count_noun(count: int, what: str) -> str:
    """Write a count with its noun: "1 file", "1,200 files"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def percent(error: float | None) -> str:
    """Write a relative error; tiny (rounding) and huge ones (weights near 0) become bounds."""
    if error is None:
        return "unknown"
    if 0 < error < 1e-7:
        return "< 1e-5 %"
    if error >= 10:
        return "> 1,000 %"
    return f"{100 * error:.2g} %" if error < 0.995 else f"{100 * error:,.0f} %"


def at_most(share: float | None) -> str:
    """Write a lost gain, which is a bound: really lost is half of it or less."""
    return percent(share) if share is None else f"at most about {percent(share)}"


@contextmanager
def collect_warnings(strict: bool = False) -> Iterator[list[str]]:
    """Collect what this package warns of in the block, each text once.

    Raises:
        WarnedError: with `strict`, at the first warning; a call that raises it leaves no output.
    """
    texts: list[str] = []

    def take(_: str, text: str) -> None:
        texts.append(text)
        if strict:
            raise WarnedError("warning", text)

    handler = EachOnce(take)
    logger = logging.getLogger(_PACKAGE)
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


class EachOnce(logging.Handler):
    """A log handler that passes each distinct message, by default each warning, once to `show`,
    with the name of its level."""

    def __init__(
        self,
        show: Callable[[str, str], None],
        level: int = logging.WARNING,
    ) -> None:
        super().__init__(level)
        self._show = show
        self._seen = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self._seen:
            self._seen.add(text)
            self._show(record.levelname.lower(), text)


def show_unhandled(_: str, text: str) -> None:
    """Print a warning with the package's name if the program has set up no logging, as
    `logging.lastResort` does.

    If the stream is absent, closed or full, the training goes on.
    """
    if not logging.getLogger().handlers and sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"posthoc_cli: {text}\n")


class Log(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic from Python 3.11 on
    """The log of a module, which keeps the messages of a tracker's threads for `log_kept_messages`.

    Those threads must take no lock of Python's logging: the code that a signal handler has
    interrupted may hold one, and the handler may wait for such a thread.
    """

    def __init__(self, module: str) -> None:
        super().__init__(logging.getLogger(module), {})

    def log(
        self,
        level: int,
        msg: object,
        *args: object,
        **_: Any,
    ) -> None:
        if hasattr(_thread, "keeps_messages"):
            kept_messages.append((self.logger, level, msg, args))
        else:
            self.logger.log(level, msg, *args, stacklevel=3)


_thread = threading.local()
kept_messages: deque[tuple[logging.Logger, int, object, tuple[object, ...]]] = deque()
"""Messages of threads that keep them, in their order."""


def keep_messages() -> None:
    """Keep the messages of the present thread from now on."""
    _thread.keeps_messages = True


def log_kept_messages() -> None:
    """Log the messages that other threads have kept."""
    with suppress(IndexError):
        while True:
            logger, level, text, arguments = kept_messages.popleft()
            logger.log(level, text, *arguments)


# --- checks of arguments: the errors say what would be accepted


def check_number(
    name: str,
    value: object,
    accepts: Callable[[float], bool],
    accepted: str,
) -> float:
    """Convert to a float; raise InvalidValueError ("must {accepted}") unless `accepts` it, which
    refuses nan."""
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
    if not accepts(number):
        raise InvalidValueError(name, f"must {accepted}", value=abbreviate(value))
    return number


def check_count(
    name: str,
    value: object,
    least: int = 1,
    hint: str = "",
) -> int:
    """Convert to an int; raise InvalidValueError, with a hint, unless it is a whole number of at
    least `least`."""
    count = least - 1
    if not isinstance(value, bool):
        with suppress(TypeError):
            count = operator.index(value)  # type: ignore[arg-type]
    if count < least:
        reason = f"must be a whole number, at least {least}"
        raise InvalidValueError(name, reason, hint, value=quote(value))
    return count


def at_most_one(**given: object) -> None:
    """Raise InvalidValueError if several of these arguments are given; None and False are not."""
    present = [name for name, value in given.items() if value is not None and value is not False]
    if len(present) > 1:
        names = ", ".join(map(argument, given))
        raise InvalidValueError(present[0], f"give at most one of {names}")


def check_word(
    name: str,
    value: object,
    accepted: Iterable[object],
) -> None:
    """Raise InvalidValueError unless `value` is one of the accepted words."""
    words = [*accepted]
    if value not in words:
        reason = f"must be one of {', '.join(map(str, words))}"
        raise InvalidValueError(name, reason, did_you_mean(value, words), value=abbreviate(value))


def did_you_mean(value: object, words: Iterable[object]) -> str:
    """Suggest the word that may be meant; nothing if none is like the value."""
    for word in get_close_matches(str(value), map(str, words), 1):
        if word != str(value):
            return f"did you mean {word}?"
    return ""
