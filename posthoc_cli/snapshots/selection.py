"""Which tensors of a model a run tracks: what the user chose, as a snapshot's header keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from posthoc_cli.errors import InvalidValueError

BUFFERS = ("copy", "average", "skip")
"""What may become of buffers."""


@dataclass(frozen=True)
class Selection:
    """The choice of tensors; see `PostHocEMA.from_model`.

    Attributes:
        only_trainable: parameters that do not require gradients are left out.
        include: globs; what none of them matches is left out. Empty: all are included.
        exclude: globs; what one of them matches is left out.
        buffers: "copy", "average" or "skip".
        copy_only: globs; a tensor that one of them matches is copied and not averaged, whether it requires gradients or
            not.
    """

    only_trainable: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    buffers: str = "copy"
    copy_only: tuple[str, ...] = ()

    def names(self, name: str) -> bool:
        """Whether the globs take a name. `*` stands for any characters, dots too."""
        if self.include and not any(fnmatchcase(name, glob) for glob in self.include):
            return False
        return not any(fnmatchcase(name, glob) for glob in self.exclude)

    def copies(self, name: str) -> bool:
        """Whether `copy_only` has a glob for a name."""
        return any(fnmatchcase(name, glob) for glob in self.copy_only)


def make_selection(
    only_trainable: bool,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    buffers: str,
    copy_only: str | Iterable[str] | None = None,
) -> Selection:
    """A checked selection.

    Raises:
        InvalidValueError: naming the argument and what would be accepted.
    """
    if buffers not in BUFFERS:
        raise InvalidValueError("buffers", f"must be one of {', '.join(BUFFERS)}", value=f"{buffers!r}")
    globs = {"include": include, "exclude": exclude, "copy_only": copy_only}
    return Selection(
        bool(only_trainable), buffers=buffers, **{what: _globs(what, given) for what, given in globs.items()}
    )


def check_globs(selection: Selection, names: Iterable[str]) -> None:
    """Raise an InvalidValueError where a glob matches none of a model's names: it is misspelt, as a rule."""
    names = list(names)
    for what in ("include", "exclude", "copy_only"):
        for glob in getattr(selection, what):
            if not any(fnmatchcase(name, glob) for name in names):
                raise InvalidValueError(
                    f"{what} {glob!r}",
                    "matches no tensor of the model; its names are such as "
                    f"{', '.join(map(repr, names[:3])) or 'none'}",
                )


def _globs(what: str, globs: str | Iterable[str] | None) -> tuple[str, ...]:
    if globs is None:
        return ()
    given = (globs,) if isinstance(globs, str) else globs
    listed = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(glob, str) and glob for glob in listed):
        raise InvalidValueError(f"{what} {globs!r}", "must be a glob on names, such as 'decoder.*', or a list of them")
    return listed
