"""`ema profile`: convert between sigma_rel and a classical beta."""

from __future__ import annotations

from posthoc_cli.cli import options, output
from posthoc_cli.errors import InvalidValueError, check_alone
from posthoc_cli.targets import bad, parse_numbers, parse_targets

_COMMON_WIDTHS = "0.001,0.01,0.03,0.05,0.10,0.15,0.20,0.27"


def profile(
    sigma_rel: str | None = options.TARGETS(
        None, show_default="common widths", help="A number, a list or a range."
    ),
    target: str | None = options.TARGETS(
        None,
        metavar="KIND:VALUE",
        help="Or classical EMAs: beta:0.9999 or half-life:5000, a list or range; with --steps.",
    ),
    steps: str | None = options.HOW(
        None, metavar="COUNT", show_default="1000", help="Length of training: 100000, 1e5."
    ),
    as_json: bool = options.JSON,
) -> None:
    """Convert between sigma_rel and a classical beta.

    A classical EMA, average <- beta average + (1 - beta) weights, corresponds to the power function
    that has the same mean age after --steps: beta / (1 - beta) steps. The largest sigma_rel is
    0.2887, the uniform average.
    """
    from posthoc_cli.profiles import convert

    check_alone(sigma_rel=sigma_rel, target=target)
    if target is not None and steps is None:
        reason = "is missing: the sigma_rel of a decay depends on the length of training"
        raise InvalidValueError("--steps", reason, "such as --steps 100000")
    count = options.parse_count(steps or "1000", "--steps")
    if target is None:
        text = _COMMON_WIDTHS if sigma_rel is None else sigma_rel
        rows = convert(count, parse_numbers(text, "--sigma-rel"), [])
    else:
        betas = _betas(target)
        try:
            rows = convert(count, [], betas)
        except InvalidValueError as error:
            if error.subject == "steps":
                raise
            # about a beta, where the target may be a half-life
            raise bad("--target", target, error.reason) from error
    if as_json:
        output.print_json({"steps": count, "profiles": rows})
        return
    for row in rows:
        row |= {key: float(f"{value:.8g}") for key, value in row.items()}
    output.print_rows(rows, ["sigma_rel", "gamma", "mean_age:mean_age", "std", "beta"])
    output.print_line(
        f"mean_age and std in steps, at step {count:,}; beta: classical EMA with the same mean age"
    )


def _betas(text: str) -> list[float]:
    targets = parse_targets(text, "--target")
    betas = [target.beta for target in targets if target.beta is not None]
    if len(betas) < len(targets):
        raise bad("--target", text, "must be beta:0.9999 or half-life:5000, also a list or a range")
    return betas
