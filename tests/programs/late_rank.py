"""A rank that looks at the run later than the others, when a file has changed."""

import os
from pathlib import Path

from posthoc_cli.group import Group
from posthoc_cli.snapshots import directory

late, read = Path("late"), Path("read")
inspect, from_all = directory.inspect_directory, Group.from_all


def inspect_late(path, *look):
    if late.exists():
        read.open().close()  # waits until the first rank has read the directory
        for file in sorted(late.iterdir()):
            file.rename(path / file.name)
        late.rmdir()
    return inspect(path, *look)


def tell_once(group, value):
    Group.from_all = from_all
    read.open("w").close()
    return from_all(group, value)


if os.environ["RANK"] == "0":
    Group.from_all = tell_once
if os.environ["RANK"] == "1":
    directory.inspect_directory = inspect_late
