"""The choice of the tensors that a run tracks, by globs on their names; BatchNorm's running statistics among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from posthoc_cli.errors import InvalidValueError, check_word

BUFFERS = ("statistics", "copy", "average")
"""The treatments of buffers."""
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
GLOBS = ("include", "exclude", "copy_only")
"""The fields of a selection that are globs on names."""


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
        return (not self.include or _matches(name, self.include)) and not _matches(name, self.exclude)

    def copies(self, name: str) -> bool:
        """Return whether a glob of `copy_only` matches a name."""
        return _matches(name, self.copy_only)

    def resumed(self, roles: Mapping[str, str]) -> Selection:
        """Return the selection for resuming a run whose tensors have these roles: running statistics keep theirs."""
        if self.buffers == "copy" and "statistic" in roles.values():
            return replace(self, buffers="statistics").resumed(roles)
        copies = running_statistics(name for name, role in roles.items() if role == "copy")
        kept = tuple(sorted(name for name in copies if not self.copies(name)))
        return replace(self, copy_only=self.copy_only + kept) if self.buffers == "statistics" else self


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def make_selection(include: str | Iterable[str] | None, exclude: str | Iterable[str] | None, buffers: str) -> Selection:
    """Return a selection from a user's arguments; raise InvalidValueError, naming the argument, if one is invalid."""
    check_word("buffers", buffers, BUFFERS)
    named = _globs("include", include)
    return Selection(not named, named, _globs("exclude", exclude), buffers)


def check_globs(selection: Selection, names: Iterable[str]) -> None:
    """Raise InvalidValueError if a glob matches none of a model's names: it is usually misspelt."""
    names = list(names)
    for argument in GLOBS:
        for glob in getattr(selection, argument):
            if not any(fnmatchcase(name, glob) for name in names):
                examples = ", ".join(map(repr, names[:3])) or "none"
                reason = f"matches no tensor of the model; it has names such as {examples}"
                raise InvalidValueError(argument, reason, value=repr(glob))


def _globs(argument: str, globs: str | Iterable[str] | None) -> tuple[str, ...]:
    if globs is None:
        return ()
    listed = (globs,) if isinstance(globs, str) or not isinstance(globs, Iterable) else tuple(globs)
    if not all(isinstance(glob, str) and glob for glob in listed):
        raise InvalidValueError(argument, "must be a glob on names, such as 'decoder.*', or a list", value=repr(globs))
    return listed


def running_statistics(names: Iterable[str]) -> frozenset[str]:
    """Return the names of BatchNorm's running means and variances: a layer has both, and a count of batches."""
    known = frozenset(names)
    layers = {name.removesuffix(_STATISTICS[0]) for name in known if name.split(".")[-1] == _STATISTICS[0]}
    complete = [layer for layer in layers if all(layer + part in known for part in _STATISTICS)]
    return frozenset(layer + part for layer in complete for part in _STATISTICS[:2])


def statistics_notice(copies: Iterable[str]) -> str | None:
    """Return advice, in one line, about running statistics among the names of copies; None without any."""
    layers = len(running_statistics(copies)) // 2
    if not layers:
        return None
    counted = f"{layers:,} BatchNorm layer{'s' * (layers > 1)}"
    return (
        f"the running statistics of {counted} are copies, which belong to the raw weights: recompute them with "
        "posthoc_cli.update_bn(model, loader) before you measure or use an average"
    )
