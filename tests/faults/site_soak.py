"""Two hundred rounds in which every third answer is missing: the bits of one process, and nothing that grows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from faults.site_bench import NAMES, WITHOUT_MEMORY, Bench, Case, WrongError
from faults.site_nursery import DROP_OUT

from fedloom.sites.store import Ledger

SHARE = 0.3
NOBODY = "federation.min_clients"
MORE_FILES, MORE_THREADS, MORE_MEMORY_MB = 8, 8, 40.0
"""What a process may have more at the end than after a tenth of the rounds."""


@dataclass(frozen=True)
class Held:
    """What a process holds: open files, threads, and memory in MB.

    Memory is all that lies in no file of the disk, whoever shares it. What is not shared would grow by itself: a fork
    shares its parent's memory until it touches it, and one full garbage collection touches all of it.
    """

    files: int
    threads: int
    memory_mb: float

    @classmethod
    def by(cls, pid: int) -> Held:
        """Look at a process."""
        process = psutil.Process(pid)
        with process.oneshot():
            return cls(process.num_fds(), process.num_threads(), _memory_mb(pid))

    def __str__(self) -> str:
        return f"{self.files} files, {self.threads} threads, {self.memory_mb:.0f} MB"


def _memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) * 1024 / 1e6


@dataclass
class Soak:
    """What became of it."""

    rounds: int
    num_left_out: int = 0
    num_served_again: int = 0
    began: dict[str, Held] = field(default_factory=dict)
    ended: dict[str, Held] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def soaked(root: Path, rounds: int) -> Soak:
    """Serve so many rounds to three sites whose training is drawn to fail in three tenths of them, in three ways.

    No round is drawn in which all three fail. On a busy machine one may be late where the others fail; then the run
    ends, says so, and is run again as it advises.
    """
    bench, found, begun = Bench(root), Soak(rounds), time.monotonic()
    try:
        with bench.case(WITHOUT_MEMORY, rounds=rounds, environment={DROP_OUT: str(SHARE)}) as case:
            case.until = time.monotonic() + 60.0 + 20.0 * rounds
            _reach(case, max(1, rounds // 10), found)
            found.began = _held(case)
            _reach(case, rounds - 1, found)
            found.ended = _held(case)
            _reach(case, rounds, found)
            case.finish()
            found.num_left_out = len(case.left_out())
            _check(case, found)
    except WrongError as error:
        found.wrong.append(f"soak: {error}")
    finally:
        bench.close()
    found.seconds = time.monotonic() - begun
    return found


def _reach(case: Case, round: int, found: Soak) -> None:
    """Wait until so many rounds are complete, and serve again where a round had no answer at all."""
    while True:
        case.wait(lambda: case.num_rounds_done() >= round or case.started["server"].poll(), f"round {round}")
        code = case.started["server"].poll()
        if not code:
            return
        if code != 2 or NOBODY not in case.last_words("server"):
            raise WrongError(f"the server ended with {code}; {case.last_lines()}")
        found.num_served_again += 1
        found.began.pop("server", None)  # another process; what it holds at first is not known
        case.serve()


def _held(case: Case) -> dict[str, Held]:
    return {name: Held.by(process.pid) for name, process in case.started.items() if process.poll() is None}


def _check(case: Case, found: Soak) -> None:
    bounds = Held(MORE_FILES, MORE_THREADS, MORE_MEMORY_MB)
    for name, began in found.began.items():
        ended = found.ended.get(name, began)
        for what, most in vars(bounds).items():
            if getattr(ended, what) - getattr(began, what) > most:
                found.wrong.append(f"soak: {name} grew from {began} to {ended}")
    if found.num_served_again > 1 + found.rounds // 40:
        found.wrong.append(f"soak: served again {found.num_served_again} times")
    expected = SHARE * found.rounds * len(NAMES)
    if not 0.5 * expected <= found.num_left_out <= 2.0 * expected:
        found.wrong.append(f"soak: expected about {expected:.0f} answers left out, got {found.num_left_out}")
    left_out = {(round, name) for round, name, _ in case.left_out()}
    for name in NAMES:
        entries = Ledger(case.folder / "at" / name).entries()
        answered = {entry["round"] for entry in entries if entry["event"] == "task" and "code" not in entry}
        lacking = [n for n in range(1, found.rounds + 1) if (n, name) not in left_out and n not in answered]
        if lacking:
            found.wrong.append(f"soak: the ledger of {name} lacks its answers of rounds {lacking}")
