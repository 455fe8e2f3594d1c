"""What a synthesis of a model too large for any test takes, on paper: bytes, time on one machine and on several.

    seconds of a process = bytes read / min(read rate, rate of the sums) + bytes written / write rate

Reading overlaps with the sums, so that the slower one counts; writing and fsync are counted as if they came after
it. The rates are those that `scripts/bench_synthesis.py` measures on the machine in question.
"""

from __future__ import annotations

import argparse

GB = 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=float, default=70e9)
    parser.add_argument("--snapshots", type=int, default=40)
    parser.add_argument("--item-bytes", type=int, default=2, help="of a stored and of a written element")
    parser.add_argument("--targets", type=int, default=1)
    parser.add_argument("--machines", type=int, default=8)
    parser.add_argument("--disk", type=float, default=2.2, help="GB/s that a machine's disk reads")
    parser.add_argument("--disk-write", type=float, default=1.6, help="GB/s that it writes, fsync included")
    parser.add_argument("--cores", type=float, default=11.0, help="GB/s of verified input that its cores sum up")
    asked = parser.parse_args()
    model = asked.parameters * asked.item_bytes / GB
    read, written = model * asked.snapshots, model * asked.targets
    print("| | one machine |", f"{asked.machines} machines |")
    print("| --- | ---: | ---: |")
    rows = [("GB read, each", read), ("GB written, each", written)]
    writing = written / asked.disk_write
    rows.append((f"s from a disk of {asked.disk:g} GB/s", read / min(asked.disk, asked.cores) + writing))
    rows.append((f"s from memory at {asked.cores:g} GB/s", read / asked.cores + writing))
    for name, value in rows:
        print(f"| {name} | {value:,.4g} | {value / asked.machines:,.4g} |")


if __name__ == "__main__":
    main()
