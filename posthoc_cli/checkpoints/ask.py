"""Questions: what files leave open, and the imports that would answer it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.errors import InvalidValueError, PostHocError, argument

log = logging.getLogger(__name__)

T = TypeVar("T")
Answer = Mapping[str, Any]
"""Settings of an import by name, and perhaps another `place`: a glob."""
ASKED = "N"
"""A number that the user alone knows, in a command to paste."""

_MOST = 3  # questions in turn that a proposed command may lead to


class QuestionError(InvalidValueError):
    """An error about something that files leave open, with the possible answers, the likeliest
    first."""

    def __init__(
        self,
        subject: object,
        reason: str,
        *answers: Answer,
        value: object = "",
        otherwise: str = "",
        are_models: bool = False,
    ) -> None:
        """`otherwise` is the hint if no answer goes through; `are_models` says that each answer is
        a glob of another model, and that a user may want all of them."""
        super().__init__(subject, reason, " or ".join(map(_phrase, answers[:3])), value=value)
        self.answers = answers
        self.otherwise = otherwise
        self.are_models = are_models


def _phrase(answer: Answer) -> str:
    """Put an answer into words, for a caller that is no import."""
    parts = []
    for name, value in answer.items():
        if name == "place":
            parts.append(f"name '{value}'")
        elif value is True:
            parts.append(argument(name))
        else:
            parts.append(f"{argument(name)} {value!r}")
    return " with ".join(parts)


Attempt = Callable[[str | Path, Mapping[str, Any]], T]
"""Finds a run at a place with some settings, without an output; raises an error if it cannot."""


def with_command(place: str | Path, given: Mapping[str, Any], attempt: Attempt[T]) -> T:
    """Return `attempt(place, given)`. Turn a question into an error that ends in a command to
    paste: the import with the first answer that goes through, perhaps after further questions. Of
    several models the commands for the others are logged."""
    try:
        return attempt(place, given)
    except QuestionError as question:
        hint = question.otherwise
        settings = ImportSettings(**given)
        if answer := _find_answer(question, place, given, attempt, _MOST):
            hint = f"paste: {settings.command(**{'place': place, **answer})}"
            others = question.answers if question.are_models else ()
            for number, other in enumerate(others, 1):
                if other != answer and _goes_through(place, {**given, **other}, attempt, _MOST):
                    command = settings.command(**other, number=number)
                    log.info("for %s, paste: %s", Path(str(other["place"])).name, command)
        subject, reason = question.subject, question.reason
        raise InvalidValueError(subject, reason, hint, value=question.value) from None


def _find_answer(
    question: QuestionError,
    place: str | Path,
    given: Mapping[str, Any],
    attempt: Attempt[T],
    most: int,
) -> Answer | None:
    """Find the first answer that goes through; so many questions in turn may follow."""
    for answer in question.answers:
        settings = {**given, **answer}
        if settings != given and _goes_through(place, settings, attempt, most):
            return answer
    return None


def _goes_through(
    place: str | Path,
    settings: dict[str, Any],
    attempt: Attempt[T],
    most: int,
) -> bool:
    if not most:
        return False
    if any(str(value).rpartition(":")[2] == ASKED for value in settings.values()):
        return True
    place = settings.pop("place", place)
    try:
        attempt(place, settings)
    except QuestionError as question:
        return _find_answer(question, place, settings, attempt, most - 1) is not None
    except PostHocError:
        return False
    return True
