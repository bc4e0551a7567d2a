"""``make faults``: everything that is tried, with a line for each stage; ``FAULTS=0.1`` tries a seeded tenth."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from faults import disk_trials, hostile_clients, mutated_inputs, site_soak, site_trials
from installed_extras import absent

NUM_KILLS, NUM_FAILURES, NUM_INPUTS = 300, 300, 12_000
NUM_MOMENTS, NUM_ROUNDS = 10, 200
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


def input_stage(title: str, number: int) -> list[str]:
    """Give every reader its share of mutated inputs, print a table, and return what was wrong."""
    say(f"{title}: {number}")
    with tempfile.TemporaryDirectory() as folder:
        every = mutated_inputs.readers(Path(folder))
        found = []
        for reader in every:
            found.append(mutated_inputs.tried(reader, -(-number // len(every))))
            say(f"{reader.name}: {found[-1].total} inputs, {len(found[-1].wrong)} wrong")
    print("| reader | inputs | refused | taken | wrong | most memory | most time |\n|---|---|---|---|---|---|---|")
    for one in found:
        memory, seconds = f"{one.most_bytes / 1e6:.1f} MB", f"{one.most_seconds:.2f} s"
        print(f"| {one.name} | {one.total} | {one.refused} | {one.taken} | {len(one.wrong)} | {memory} | {seconds} |")
    total, refused, taken = (sum(getattr(one, name) for one in found) for name in ("total", "refused", "taken"))
    print(f"| all | {total} | {refused} | {taken} | {sum(len(one.wrong) for one in found)} | | |")
    return [line for one in found for line in one.wrong]


def client_stage() -> list[str]:
    """Let one client in ten be hostile, print the worst of each way over all methods, and return what is wrong."""
    say(f"hostile clients: {len(hostile_clients.EVERY_METHOD)} methods, {len(hostile_clients.WAYS)} ways")
    every = []
    for method in hostile_clients.EVERY_METHOD:
        every += list(hostile_clients.powers(method, PART))
        say(f"{method}: {sum(not one.is_within for one in every if one.method == method)} beyond the bound")
    rules = list(dict.fromkeys(one.rule for one in every))
    print(f"| one of ten | {' | '.join(rules)} |\n|---|{'---|' * len(rules)}")
    for way in hostile_clients.WAYS:
        worst = [max((p.moved for p in every if (p.way, p.rule) == (way, rule)), default=0.0) for rule in rules]
        print(f"| {way} | {' | '.join(f'{moved:.2f}' for moved in worst)} |")
    return [f"{p.method}, {p.way}, {p.rule}: {p.moved:.3f} > {p.bound}" for p in every if not p.is_within]


def site_stage() -> list[str]:
    """Let go wrong among a server and its sites what can, print tables, and return what was wrong."""
    number, rounds = max(1, round(NUM_MOMENTS * PART)), max(10, round(NUM_ROUNDS * PART))
    if packages := absent("sites"):
        say(f"sites: skipped, for it needs the extra sites ({', '.join(packages)} not installed)")
        return []
    say(f"sites: {number} moments for each of {len(site_trials.FAULTS)} faults, then {rounds} rounds with drop-outs")
    with tempfile.TemporaryDirectory() as folder:
        tallies = site_trials.trials(Path(folder) / "bench", number, say)
        soak = site_soak.soaked(Path(folder) / "soak", rounds)
    print("| fault | moments | answers left out | wrong |\n|---|---|---|---|")
    for one in tallies:
        print(f"| {one.name} | {one.num_trials} | {one.num_left_out} | {len(one.wrong)} |")
    say(f"{rounds} rounds in {soak.seconds:.0f} s, {soak.num_left_out} of {3 * rounds} answers left out, "
        f"served again {soak.num_served_again} times")  # fmt: skip
    for name, began in soak.began.items():
        print(f"{name}: {began} after round {max(1, rounds // 10)}, then {soak.ended.get(name)}")
    return [line for one in tallies for line in one.wrong] + soak.wrong


STAGES = {
    "clients": client_stage,
    "inputs": lambda: input_stage("mutated inputs", round(NUM_INPUTS * PART)),
    "kills": lambda: disk_stage("kills", round(NUM_KILLS * PART), disk_trials.kills),
    "failures": lambda: disk_stage("failing disks", round(NUM_FAILURES * PART), disk_trials.failures),
    "sites": site_stage,
}
BEGAN = time.monotonic()

if __name__ == "__main__":
    wrong = [line for name, stage in STAGES.items() if not ONLY or name in ONLY for line in stage()]
    for line in wrong:
        print(f"WRONG  {line}")
    say(f"{len(wrong)} wrong")
    sys.exit(bool(wrong))
