"""Whether outputs fit on their disks, asked before the first byte is written."""

from __future__ import annotations

import errno
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from posthoc_cli.errors import WriteError


def check_space(outputs: Mapping[Path, int]) -> None:
    """Check that every disk has room for its outputs, of so many bytes each.

    An output that is replaced keeps its room until the new one is complete.

    Raises:
        WriteError: naming the place, what is needed and what is free.
    """
    disks: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for path, nbytes in outputs.items():
        place = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
        if place is not None:  # else making the output says what is wrong
            disks[place.stat().st_dev].append((place, nbytes))
    for places in disks.values():
        place, needed = places[0][0], sum(nbytes for _, nbytes in places)
        free = shutil.disk_usage(place).free
        if needed > free:
            count = "the output takes" if len(places) == 1 else f"the {len(places)} outputs take"
            raise WriteError(
                place,
                f"{count} {needed:,} bytes, and {free:,} are free on this disk; nothing was written",
                errno=errno.ENOSPC,
            )
