"""What goes wrong among a server and its sites, each at seeded moments of a run that must end as if it had not.

The adapter at the end is that of one process in which those take part who counted, and every site is still there.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from faults.site_bench import (
    NAMES,
    ROUNDS,
    WITH_MEMORY,
    WITHOUT_MEMORY,
    Bench,
    Case,
    WrongError,
    listening_beyond_loopback,
)

from fedloom.seeding import stream

LONGER_THAN_GRACE = 1.5
Act = Callable[[Case, np.random.Generator], None]
Say = Callable[[str], None]


@dataclass
class SiteTally:
    """What became of one fault: how often it was tried, how many answers it cost, and what was wrong."""

    name: str
    num_trials: int = 0
    num_left_out: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def one_of(rng: np.random.Generator, *more: str) -> str:
    """Choose a site, or one of ``more``."""
    return str(rng.choice([*NAMES, *more]))


def kill_site(case: Case, rng: np.random.Generator) -> None:
    """A site ends in whatever it does, and is started again; its trainer does not outlive it."""
    name = one_of(rng)
    trainer = case.trainer_of(name)
    case.started[name].kill()
    case.started[name].wait()
    case.start_site(name)
    case.wait(lambda: not psutil.pid_exists(trainer), f"end of {name}'s trainer")


def kill_trainer(case: Case, rng: np.random.Generator) -> None:
    """The process that trains ends; the site starts another."""
    os.kill(case.trainer_of(one_of(rng)), signal.SIGKILL)


def kill_server(case: Case, _rng: np.random.Generator) -> None:
    """The server ends, and the same command goes on."""
    case.started["server"].kill()
    case.started["server"].wait()
    case.serve()


def cut_stream(case: Case, rng: np.random.Generator) -> None:
    """A site's connection, or everybody's, is cut, or carries nothing for a while, or both."""
    names = NAMES if rng.random() < 0.5 else [one_of(rng)]
    seconds = float(rng.choice([0.0, LONGER_THAN_GRACE]))
    for name in names:
        case.proxies[name].stop()
    time.sleep(seconds)
    for name in names:
        case.proxies[name].go_on()
        if seconds == 0.0 or rng.random() < 0.5:
            case.proxies[name].cut()


def freeze_process(case: Case, rng: np.random.Generator) -> None:
    """The server, or a site, does nothing for longer than the others are waited for."""
    process = case.started[one_of(rng, "server")]
    process.signal(signal.SIGSTOP)
    time.sleep(LONGER_THAN_GRACE)
    process.signal(signal.SIGCONT)


def slow_site(case: Case, rng: np.random.Generator) -> None:
    """A site greets, and its training takes longer than it is waited for."""
    trainer = case.trainer_of(one_of(rng))
    os.kill(trainer, signal.SIGSTOP)
    time.sleep(LONGER_THAN_GRACE)
    with suppress(ProcessLookupError):  # its site may have given it up
        os.kill(trainer, signal.SIGCONT)


def full_disk(case: Case, rng: np.random.Generator) -> None:
    """A site and its trainer can write no byte to any file for a while."""
    name = one_of(rng)
    pids = [case.started[name].pid, case.trainer_of(name)]
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    time.sleep(LONGER_THAN_GRACE)
    for pid in filter(psutil.pid_exists, pids):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def lose_folder(case: Case, rng: np.random.Generator) -> None:
    """A site's folder is gone: while it runs, or while it is away."""
    name = one_of(rng)
    folder = case.folder / "at" / name
    if rng.random() < 0.5:
        case.started[name].kill()
        case.started[name].wait()
        shutil.rmtree(folder, ignore_errors=True)
        case.start_site(name)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def start_twin(case: Case, rng: np.random.Generator) -> None:
    """Somebody starts a second site of the same name and certificate, with a folder of its own."""
    name = one_of(rng)
    case.write_site(name, "twin", "twin")
    case.start_site(name, "twin")


def serve_another(case: Case, rng: np.random.Generator) -> None:
    """The server is started with other settings: refused where a round is done, and with --fresh another run."""
    case.started["server"].kill()
    case.started["server"].wait()
    case.settings = {**case.settings, "run": {"seed": int(rng.integers(1, 1000))}}
    case.write_study(case.folder / "other.toml")
    is_begun = case.num_rounds_done() > 0
    refused = case.serve("other")
    if (code := refused.wait()) != 2 and is_begun:
        raise WrongError(f"a study that changed under its run ended with {code}, not 2; {case.last_lines()}")
    case.serve("other", "--fresh")


FAULTS: Mapping[str, tuple[Act, Mapping[str, Any] | None]] = {
    "a site is killed": (kill_site, None),
    "a trainer is killed": (kill_trainer, None),
    "the server is killed": (kill_server, None),
    "a stream is cut": (cut_stream, None),
    "a process is frozen": (freeze_process, None),
    "a site is slow beyond grace": (slow_site, None),
    "a site's disk is full": (full_disk, None),
    "a site's folder is lost": (lose_folder, WITHOUT_MEMORY),
    "two sites of one name": (start_twin, WITHOUT_MEMORY),
    "the server has other settings": (serve_another, None),
}
"""With a method where it must be one: whose clients keep nothing that a replay would have to know was lost."""


def trials(root: Path, number: int, say: Say, only: str = "") -> list[SiteTally]:
    """Let every fault happen at ``number`` seeded moments, each of a study of its own."""
    bench = Bench(root)
    try:
        return [_tried(bench, name, number, say) for name in FAULTS if only in name]
    finally:
        bench.close()


def _tried(bench: Bench, name: str, number: int, say: Say) -> SiteTally:
    act, settings = FAULTS[name]
    tally, begun = SiteTally(name), time.monotonic()
    for turn in range(number):
        rng = stream(13, name, turn)
        at, seconds = int(rng.integers(ROUNDS - 2)), float(rng.uniform(0, 0.5))
        chosen = settings or (WITHOUT_MEMORY, WITH_MEMORY)[turn % 2]
        try:
            with bench.case(chosen) as case:
                tally.num_left_out += _happened(case, act, at, seconds, rng)
        except WrongError as error:
            tally.wrong.append(f"{name}, {seconds:.2f} s after round {at} (trial {turn}): {error}")
            say(f"WRONG  {tally.wrong[-1]}")
        tally.num_trials += 1
    tally.seconds = time.monotonic() - begun
    say(f"{name}: {tally.num_trials} moments, {tally.num_left_out} answers left out, {len(tally.wrong)} wrong, "
        f"{tally.seconds:.0f} s")  # fmt: skip
    return tally


def _happened(case: Case, act: Act, at: int, seconds: float, rng: np.random.Generator) -> int:
    """Let the fault happen in a case, and return how many answers were left out of its rounds."""
    case.reach(at, seconds)
    alive = [process.pid for process in case.started.values() if process.poll() is None]
    if beyond := listening_beyond_loopback(alive):
        raise WrongError(f"listening at {', '.join(beyond)}")
    if case.started["server"].poll() is None:
        act(case, rng)
    case.finish()
    return len(case.left_out())
