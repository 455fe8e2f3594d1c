"""Where the outputs of several targets go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.export.layouts import layout_of
from posthoc_cli.targets import Target

_SUFFIXES = {"safetensors": ".safetensors", "pt": ".pt", "sharded": ""}
_SIGMA_REL, _TARGET = "{sigma_rel}", "{target}"


def output_paths(targets: Sequence[Target], out: str, layout: str | None) -> tuple[list[Path], Path | None]:
    """Where each target goes, and the folder to be made for them, if one was named.

    The output may be a pattern with `{sigma_rel}` or `{target}` to fill in, a file (for one target), or a folder that
    takes a file a target. With the layout "sharded" a folder holds one model, so that several targets get a folder
    each within it.

    Raises:
        InvalidValueError: several targets, but one output for them or for two of them; a name to be filled in with
            the sigma_rel of a target that has none, or with anything else.
    """
    if not out:
        raise InvalidValueError(
            "out", "is empty", f"name a file, a folder, or a pattern with {_SIGMA_REL} or {_TARGET}"
        )
    unknown = [name for name in re.findall(r"\{\w*\}", out) if name not in (_SIGMA_REL, _TARGET)]
    if unknown:
        raise InvalidValueError("out", f"{unknown[0]} is not known; must be {_SIGMA_REL} or {_TARGET}", value=out)
    paths, folder = _paths(targets, out, layout)
    taken: dict[Path, Target] = {}
    for target, path in zip(targets, paths, strict=True):
        if path in taken:
            raise InvalidValueError(
                "out",
                f"{taken[path].title} and {target.title} would both become {path}; a profile is named after "
                "its file: rename one",
                value=out,
            )
        taken[path] = target
    return paths, folder


def export_paths(sources: Sequence[Path], out: Path, layout: str | None) -> list[Path]:
    """Where the exports of several models go: into the folder `out`, each under the name that it has.

    Raises:
        InvalidValueError: the output is a file.
    """
    if out.suffix in (".safetensors", ".pt", ".pth", ".bin") and not out.is_dir():
        raise InvalidValueError("out", f"{len(sources)} models need a folder", value=out)
    suffix = _SUFFIXES[layout_of(Path("x.safetensors"), layout)]
    return [out / f"{source.name.removesuffix('.safetensors')}{suffix}" for source in sources]


def _paths(targets: Sequence[Target], out: str, layout: str | None) -> tuple[list[Path], Path | None]:
    if _SIGMA_REL in out or _TARGET in out:
        return [_filled_in(out, target) for target in targets], None
    path = files.expanded(out)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InvalidValueError("out", "is a pipe or a device", "name a file or a folder", value=out)
    is_folder = path.is_dir() or path.suffix == "" or out.endswith("/")
    if len(targets) == 1 and (layout == "sharded" or not is_folder):
        return [path], None
    if not is_folder and path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        place = _TARGET if any(target.sigma_rel is None for target in targets) else _SIGMA_REL
        raise InvalidValueError(
            "out",
            f"{len(targets)} targets need a folder, or a name with {place} in it, such as "
            f"{path.stem}-{place}{path.suffix}",
            value=out,
        )
    suffix = _SUFFIXES[layout_of(Path("x.safetensors"), layout)]
    return [path / f"{_name(target)}{suffix}" for target in targets], path


def _filled_in(pattern: str, target: Target) -> Path:
    if _SIGMA_REL in pattern and target.sigma_rel is None:
        raise InvalidValueError("out", f"{target.title} has no sigma_rel", f"write {_TARGET} for it", value=pattern)
    return files.expanded(pattern.replace(_SIGMA_REL, repr(target.sigma_rel)).replace(_TARGET, _name(target)))


def _name(target: Target) -> str:
    """What a target's file is called, without an ending: `sigma_rel-0.15`, `beta-0.9999`."""
    return target.label if target.sigma_rel is None else f"sigma_rel-{target.sigma_rel!r}"
