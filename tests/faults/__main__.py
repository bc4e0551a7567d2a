"""``make faults``: everything that is tried, with a line for each stage; ``FAULTS=0.1`` tries a seeded tenth."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from faults import disk_trials

NUM_KILLS, NUM_FAILURES = 300, 300
PART = float(os.environ.get("FAULTS", "1"))
ONLY = sys.argv[1:]


def say(line: str) -> None:
    """Show how far it is."""
    print(f"{time.monotonic() - BEGAN:6.0f} s  {line}", flush=True)


def disk_stage(title: str, number: int, trials: disk_trials.Trials) -> list[str]:
    """Try commands on a disk, print a table, and return what was wrong."""
    say(f"{title}: {number} of all changes of the disk that the commands make")
    with tempfile.TemporaryDirectory() as folder:
        tallies = trials(Path(folder) / "bench", number, say)
    print(f"| command | changes | {title} | wrong |\n|---|---|---|---|")
    for one in tallies:
        print(f"| {one.name} | {one.num_changes} | {one.num_trials} | {len(one.wrong)} |")
    total = sum(one.num_trials for one in tallies)
    print(f"| all | {sum(one.num_changes for one in tallies)} | {total} | {sum(len(one.wrong) for one in tallies)} |")
    return [line for one in tallies for line in one.wrong]


STAGES = {
    "kills": lambda: disk_stage("kills", round(NUM_KILLS * PART), disk_trials.kills),
    "failures": lambda: disk_stage("failing disks", round(NUM_FAILURES * PART), disk_trials.failures),
}
BEGAN = time.monotonic()

if __name__ == "__main__":
    wrong = [line for name, stage in STAGES.items() if not ONLY or name in ONLY for line in stage()]
    for line in wrong:
        print(f"WRONG  {line}")
    say(f"{len(wrong)} wrong")
    sys.exit(bool(wrong))
