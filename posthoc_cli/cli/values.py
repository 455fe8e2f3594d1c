"""From words on the command line to values."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import check_sigma_rel

MOST_VALUES = 10_000


def parse_numbers(text: str, option: str) -> list[float]:
    """Numbers from `0.05,0.10`, `0.05:0.25:0.05` or `0.05,0.06,...,0.25`, in the order given, each once.

    Steps are exact decimals, so that `0.05:0.25:0.05` ends at 0.25 and holds 0.15, not 0.15000000000000002.

    Raises:
        InvalidValueError: naming the option, the part, and the accepted forms.
    """
    parts = [part.strip() for part in text.split(",")]
    numbers: list[Decimal] = []
    for index, part in enumerate(parts):
        if part == "...":
            if not 2 <= index < len(parts) - 1:
                raise InvalidValueError(f"{option} {text}: '...' needs two numbers before it and one after")
            last, step = numbers[-1], numbers[-1] - numbers[-2]
            numbers += _steps(last + step, _number(parts[index + 1], option), step, text, option)
        elif ":" in part:
            ends = part.split(":")
            if len(ends) != 3:
                raise InvalidValueError(f"{option} {part}: a range is START:STOP:STEP, such as 0.05:0.25:0.05")
            start, stop, step = (_number(end, option) for end in ends)
            numbers += _steps(start, stop, step, part, option)
        else:
            numbers.append(_number(part, option))
    return list(dict.fromkeys(float(number) for number in numbers))


def _number(text: str, option: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("nan")
    if not text.strip() or not number.is_finite():
        shown = text if text.strip() else "(empty)"
        raise InvalidValueError(
            f"{option} {shown}: must be a number, a list such as 0.05,0.10 or a range such as 0.05:0.25:0.05"
        )
    return number


def _steps(start: Decimal, stop: Decimal, step: Decimal, text: str, option: str) -> list[Decimal]:
    if step == 0 or (stop - start) * step < 0:
        raise InvalidValueError(f"{option} {text}: the step must lead from the start to the stop, and not be 0")
    count = int((stop - start) / step) + 1
    if count > MOST_VALUES:
        raise InvalidValueError(f"{option} {text}: makes {count:,} values; at most {MOST_VALUES:,} are accepted")
    return [start + index * step for index in range(count)]


def parse_sigma_rels(text: str) -> list[float]:
    """Targets from `--sigma-rel`, all in range.

    Raises:
        InvalidValueError: naming the option and the range.
    """
    return [check_sigma_rel(value) for value in parse_numbers(text, "--sigma-rel")]
