"""Kill every command that writes, or take its disk away, and run it again: the end is as if nothing had happened."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from faults.disk_faults import KILLED
from faults.forked_commands import command
from faults.writing_commands import Bench, Writer, differences, judge_server, writers

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES)
Say = Callable[[str], None]
Trials = Callable[..., "list[Tally]"]


@dataclass
class Tally:
    """What became of the trials of one command: how many changes it makes, trials, and what was wrong."""

    name: str
    num_changes: int
    num_trials: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def kills(root: Path, number: int, say: Say, only: Sequence[str] = ()) -> list[Tally]:
    """Kill commands at ``number`` of their changes in all, and run each again."""
    return _trials(root, number, say, only, _kill)


def failures(root: Path, number: int, say: Say, only: Sequence[str] = ()) -> list[Tally]:
    """Let the disk refuse ``number`` of the commands' changes in all and those after, and run each again."""
    return _trials(root, number, say, only, _refuse)


def _trials(root: Path, number: int, say: Say, only: Sequence[str], trial: Callable[..., list[str]]) -> list[Tally]:
    with judge_server() as port:
        bench = Bench(root)
        chosen = [writer for writer in writers(port) if not only or writer.name in only]
        known = [_undisturbed(bench, writer) for writer in chosen]
        tallies = [Tally(writer.name, len(changes)) for writer, (changes, _) in zip(chosen, known, strict=True)]
        for writer, (changes, expected), tally, points in zip(
            chosen, known, tallies, _spread([len(changes) for changes, _ in known], number), strict=True
        ):
            began = time.monotonic()
            for point in points:
                wrong = trial(bench, writer, point, expected)
                tally.num_trials += 1
                tally.wrong += [f"{writer.name}, change {point} ({changes[point]}): {one}" for one in wrong]
            tally.seconds = time.monotonic() - began
            say(f"{writer.name}: {tally.num_trials} of {tally.num_changes} changes, {len(tally.wrong)} wrong, "
                f"{tally.seconds:.0f} s")  # fmt: skip
    return tallies


def _undisturbed(bench: Bench, writer: Writer) -> tuple[tuple[str, ...], dict[str, str]]:
    bench.begin(writer)
    ended = command(bench.work, writer.arguments)
    assert ended.code == 0, f"{writer.name}: {ended.said}"
    return ended.changes, bench.contents()


def _spread(sizes: Sequence[int], number: int) -> list[list[int]]:
    """Choose ``number`` of all changes, seeded, from each command its share and one at least."""
    rng, total = np.random.default_rng(12), sum(sizes)
    chosen = []
    for size in sizes:
        share = min(size, max(1, round(number * size / total)))
        chosen.append(sorted(int(point) for point in rng.choice(size, share, replace=False)))
    return chosen


def _kill(bench: Bench, writer: Writer, point: int, expected: dict[str, str]) -> list[str]:
    bench.begin(writer)
    ended = command(bench.work, writer.arguments, at=point)
    if ended.code != KILLED:
        return [f"it was to be killed, and ended with {ended.code}: {ended.said[-300:]}"]
    return _again(bench, writer, expected)


def _refuse(bench: Bench, writer: Writer, point: int, expected: dict[str, str]) -> list[str]:
    number = NUMBERS[point % len(NUMBERS)]
    bench.begin(writer)
    ended = command(bench.work, writer.arguments, at=point, number=number)
    wrong = []
    if ended.code == 2 and len(ended.errors) != 1:
        wrong.append(f"{os.strerror(number)}: {len(ended.errors)} lines")
    elif ended.code not in (0, 2):
        wrong.append(f"{os.strerror(number)}: code {ended.code}: {' | '.join(ended.said.splitlines()[-3:])}")
    return wrong + _again(bench, writer, expected)


def _again(bench: Bench, writer: Writer, expected: dict[str, str]) -> list[str]:
    """Run the command once more, unless all is there and it says so."""
    ended = command(bench.work, writer.arguments)
    changed, left = differences(expected, bench.contents())
    wrong = [f"{len(changed)} differ: {', '.join(changed[:3])}"] if changed else []
    wrong += [f"left over: {', '.join(left[:3])}"] if left else []
    if ended.code != 0 and (wrong or ended.code != 2):
        wrong.append(f"again: code {ended.code}: {' | '.join(ended.said.splitlines()[-2:])}")
    return wrong
