"""Which tensors of a model a run tracks, and BatchNorm's statistics among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from posthoc_cli.errors import InvalidValueError, Log, check_word, list_first, quote
from posthoc_cli.snapshots.source import Source

log = Log(__name__)

BUFFERS = ("statistics", "copy", "average")  # the treatments of buffers

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Selection:
    """A choice of tensors, by globs on their names; see `PostHocEMA.from_model`."""

    only_trainable: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    buffers: str = "statistics"
    copy_only: tuple[str, ...] = ()

    def names(self, name: str) -> bool:
        """Return whether the globs select a name. `*` matches any characters including dots."""
        if self.include and not _matches(name, self.include):
            return False
        return not _matches(name, self.exclude)

    def copies(self, name: str) -> bool:
        return _matches(name, self.copy_only)

    def adapt_to(self, run: Source) -> Selection:
        """Adapt the selection to a run that is resumed: running statistics keep their role."""
        buffers = self.buffers
        if buffers == "copy" and any(each.role == "statistic" for each in run.tensors.values()):
            buffers = "statistics"
        if buffers != "statistics":
            return self
        statistics = sorted(running_statistics(run.copies))
        kept = [name for name in statistics if not self.copies(name)]
        return replace(self, buffers=buffers, copy_only=(*self.copy_only, *kept))


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def make_selection(
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    buffers: str,
) -> Selection:
    """Make a selection from a user's arguments; raise InvalidValueError, naming the argument, if
    one is invalid."""
    check_word("buffers", buffers, BUFFERS)
    included = _globs("include", include)
    return Selection(not included, included, _globs("exclude", exclude), buffers)


def _globs(
    argument: str,
    given: str | Iterable[str] | None,
) -> tuple[str, ...]:
    globs: tuple[Any, ...] = ()
    if isinstance(given, Iterable) and not isinstance(given, str):
        globs = tuple(given)
    elif given is not None:
        globs = (given,)
    if not all(isinstance(glob, str) and glob for glob in globs):
        reason = "must be a glob on names, such as 'decoder.*', or a list"
        raise InvalidValueError(argument, reason, value=repr(given))
    return globs


def check_globs(selection: Selection, names: Iterable[str]) -> None:
    """Raise InvalidValueError if a glob matches none of a model's names: it is usually misspelt."""
    names = list(names)
    examples = list_first(map(quote, names), 3) or "none"
    for argument in ("include", "exclude", "copy_only"):
        for glob in getattr(selection, argument):
            if not any(fnmatchcase(name, glob) for name in names):
                reason = f"matches no tensor of the model; it has names such as {examples}"
                raise InvalidValueError(argument, reason, value=repr(glob))


def running_statistics(names: Iterable[str]) -> frozenset[str]:
    """Find the names of BatchNorm's running means and variances: a layer has both, and a count of
    batches."""
    known = frozenset(names)
    mean = STATISTICS[0]
    statistics = set[str]()
    for name in known:
        if name.split(".")[-1] == mean:
            layer = name.removesuffix(mean)
            parts = [layer + part for part in STATISTICS]
            if known.issuperset(parts):
                statistics.update(parts[:2])
    return frozenset(statistics)


def statistics_notice(copies: Iterable[str]) -> str | None:
    """Write advice, in one line, about running statistics among the names of copies; None without
    any."""
    if not running_statistics(copies):
        return None
    return (
        "the running statistics of BatchNorm are copies, which belong to the raw weights: "
        "recompute them with torch.optim.swa_utils.update_bn(loader, model) before you measure or "
        "use an average"
    )


def note_statistics(copies: Iterable[str]) -> None:
    """Say that an average has BatchNorm's statistics from the raw weights. This is no warning: the
    evaluation may recompute them, and no option would."""
    if notice := statistics_notice(copies):
        log.info(notice)
