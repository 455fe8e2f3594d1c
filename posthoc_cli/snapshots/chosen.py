"""Which snapshots of a large directory a reconstruction works with; see `planning.choose`."""

from __future__ import annotations

from collections.abc import Sequence

from posthoc_cli.planning import choose
from posthoc_cli.snapshots.segments import One


def chosen_up_to(items: Sequence[One], t: float) -> tuple[list[One], list[One]]:
    """Those to make averages at `t` of, at or before it; and as few of the later ones: they tell how the network moved.

    Both by time, then sigma_rel.
    """
    ordered = sorted(items, key=lambda item: (item.info.t, item.info.sigma_rel))
    return _chosen([o for o in ordered if o.info.t <= t]), _chosen([o for o in ordered if o.info.t > t])


def _chosen(items: Sequence[One]) -> list[One]:
    return [items[index] for index in choose([item.info.profile.pure for item in items])]
