"""Outputs whose tensors have averages of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from posthoc_cli.errors import InvalidValueError, shown
from posthoc_cli.export.outputs import check_space, layout_of, make_sink
from posthoc_cli.snapshots.format import OutputInfo, output_metadata
from posthoc_cli.synthesis.engine import Options, synthesize_into
from posthoc_cli.synthesis.plan import Plan, with_consistent_plan
from posthoc_cli.targets import SigmaRel, Target

Groups = Mapping[str, float]
"""sigma_rel by glob on tensors' names; the first glob that matches counts."""


def write_groups(
    plan: Callable[[Sequence[Target]], Plan], wanted: Sequence[Groups], paths: Sequence[Path], options: Options
) -> list[float | None]:
    """Write an output for each of `wanted`, all in one pass over the snapshots; none appears before all are complete.

    Arguments:
        plan: plans targets with the snapshots that are there now.
        wanted: with the same globs, in the same order.

    Returns:
        The predicted error of each output: the largest of its groups; None if one is not known.

    Raises:
        InvalidValueError: a tensor that no glob matches, or a glob without a tensor.
        WriteError, OutputExistsError, FileFormatError, NonFiniteError: as in `write_synthesis`.
    """

    def write(plans: list[Plan]) -> list[float | None]:
        whole = replace(plans[0], part=None)
        check_space(dict.fromkeys(paths, whole.nbytes))
        infos = [_info(plans, groups, index) for index, groups in enumerate(wanted)]
        with ExitStack() as stack:
            sinks = []
            for path, info in zip(paths, infos, strict=True):
                layout = layout_of(path, options.layout)
                sinks.append(make_sink(layout, path, whole.specs(), output_metadata(info), options))
                stack.callback(sinks[-1].discard)
            for one in plans:
                opened = lambda tile, names=one.names: [sink.open_tile(tile, names) for sink in sinks]  # noqa: E731
                with closing(synthesize_into(one, opened, options)) as made:
                    for _ in made:
                        pass
            for sink in sinks:
                sink.commit()
        return [info.predicted_error for info in infos]

    def make() -> list[Plan]:
        plans = [plan([SigmaRel(groups[glob]) for groups in wanted]) for glob in wanted[0]]
        parts = group_parts(plans[0], list(wanted[0]))
        return [replace(one, part=part) for one, part in zip(plans, parts, strict=True)]

    return with_consistent_plan(make, write)


def group_parts(plan: Plan, globs: Sequence[str]) -> list[frozenset[str]]:
    """The stored tensors of each group; an InvalidValueError if a tensor has none, or a group no tensor."""
    parts: list[set[str]] = [set() for _ in globs]
    for name, names in plan.names.items():
        group = next((k for k, glob in enumerate(globs) if any(fnmatchcase(each, glob) for each in names)), None)
        if group is None:
            reason = f"none matches tensor {shown(name)}"
            raise InvalidValueError("group", reason, "add '*=0.1' for all others", value=", ".join(globs))
        parts[group].add(name)
    for glob, part in zip(globs, parts, strict=True):
        if not part:
            some = ", ".join(map(shown, list(plan.names)[:3]))
            reason = f"matches no tensor that is not in a group before it; there are {some}"
            raise InvalidValueError("group", reason, value=repr(glob))
    return list(map(frozenset, parts))


def _info(plans: Sequence[Plan], groups: Groups, index: int) -> OutputInfo:
    """What the output says of itself: its snapshots are those of the groups, one group after another."""
    infos = [plan.output_info(index) for plan in plans]
    errors = [info.predicted_error for info in infos if info.predicted_error is not None]
    return replace(
        infos[0],
        profile=title(groups),
        sigma_rel=None,
        gamma=None,
        profile_error=max(info.profile_error for info in infos),
        predicted_error=max(errors) if len(errors) == len(infos) else None,
        snapshots=tuple(used for info in infos for used in info.snapshots),
        copies=tuple(name for info in infos for name in info.copies),
    )


def title(groups: Groups) -> str:
    """For people: `sigma_rel 0.12 (unet.up.*), 0.08 (*)`."""
    return "sigma_rel " + ", ".join(f"{width!r} ({glob})" for glob, width in groups.items())
