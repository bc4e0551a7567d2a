"""A study of three sites on loopback over gRPC, each part a process of its own, and what must be true at its end."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from faults.cutting_proxy import CuttingProxy
from faults.site_nursery import Forked, Nursery
from site_ends import free_port

NAMES = ("berlin", "oslo", "rome")
ROUNDS, GRACE_SECONDS, LIMIT_SECONDS = 8, 0.6, 240.0
Tables = dict[str, dict[str, Any]]
WITHOUT_MEMORY: Mapping[str, Mapping[str, Any]] = {"method": {"name": "flora", "ranks": [4, 2, 1]}}
"""A method whose clients keep nothing but the side, so that a site which has lost its folder loses nothing else."""
WITH_MEMORY: Mapping[str, Mapping[str, Any]] = {"method": {"name": "rolora", "ranks": 4}, "wire": {"dtype": "bf16"}}
"""One whose clients also keep their start, and owe what the wire rounds off."""


class WrongError(Exception):
    """Something that must not be."""


class Bench:
    """A folder for trials: base, rows and kits made once, and the process that forks all others."""

    def __init__(self, root: Path) -> None:
        from tiny_models import seeded_model

        from fedloom.seeding import stream
        from fedloom.sites.throwaway_certificates import ThrowawayRoot

        self.root, self.num_cases = root.resolve(), 0
        (self.root / "rows").mkdir(parents=True)
        seeded_model("llama", vocab_size=256).float().save_pretrained(self.root / "base")
        rng, words = stream(5, "site trials"), ["red", "blue", "one", "two", "cat", "dog"]
        sizes = {"local_training_0": 20, "local_training_1": 12, "local_training_2": 16, "../eval": 6}
        for name, size in sizes.items():
            rows = [
                {"instruction": " ".join(rng.choice(words, size=2)), "context": "", "response": str(rng.choice(words))}
                for _ in range(size)
            ]
            (self.root / "rows" / f"{name}.json").write_text(json.dumps(rows))
        authority = ThrowawayRoot()
        authority.write(self.root / "kits" / "server", "server", "server")
        for name in NAMES:
            authority.write(self.root / "kits" / name, "client", name)
        self.nursery = Nursery(self.root)

    @contextmanager
    def case(
        self,
        settings: Mapping[str, Mapping[str, Any]],
        *,
        rounds: int = ROUNDS,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Case]:
        """Start a server and three sites, and end them."""
        self.num_cases += 1
        case = Case(self, self.root / f"case-{self.num_cases}", settings, rounds, environment or {})
        try:
            case.begin()
            yield case
        finally:
            case.close()
            shutil.rmtree(case.folder)

    def close(self) -> None:
        """End every process."""
        self.nursery.close()


@dataclass
class Case:
    """One study, from its start to its end."""

    bench: Bench
    folder: Path
    settings: Mapping[str, Mapping[str, Any]]
    rounds: int
    environment: Mapping[str, str]
    started: dict[str, Forked] = field(default_factory=dict)

    def begin(self) -> None:
        """Write the files, and start server and sites."""
        (self.folder / "logs").mkdir(parents=True)
        self.port, self.until = free_port(), time.monotonic() + LIMIT_SECONDS
        self.proxies = {name: CuttingProxy(self.port) for name in NAMES}
        self.write_study(self.folder / "study.toml")
        self.serve()
        for name in NAMES:
            self.write_site(name)
            self.start_site(name)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def recipe(self) -> Tables:
        """Return what study and replay have in common."""
        tables: Tables = {
            "model": {"base": str(self.bench.root / "base"), "tokenizer": "bytes"},
            "data": {"shape": "dolly", "template": "plain", "eval_path": str(self.bench.root / "eval.json")},
            "federation": {"num_rounds": self.rounds},
            "training": {"local_steps": 8, "batch_size": 4, "learning_rate": 1e-2, "dropout": 0.1},
            "evaluation": {"every": 4},
        }
        for name, values in self.settings.items():
            tables[name] = {**tables.get(name, {}), **values}
        return tables

    def write_study(self, path: Path, **changes: Mapping[str, Any]) -> None:
        """Write the study, with changed tables."""
        sites = {
            "names": list(NAMES),
            "address": f"127.0.0.1:{self.port}",
            "kit": str(self.bench.root / "kits" / "server"),
            "quorum": 2,
            "grace_s": GRACE_SECONDS,
            "deadline_s": 60.0,
        }
        tables = {**self.recipe(), "sites": sites}
        write_toml(path, {name: {**values, **changes.get(name, {})} for name, values in tables.items()})

    def write_site(self, name: str, file: str = "", folder: str = "") -> None:
        """Write a site's file."""
        own = {
            "name": name,
            "server": f"127.0.0.1:{self.proxies[name].port}",
            "kit": str(self.bench.root / "kits" / name),
            "folder": str(self.folder / "at" / (folder or name)),
        }
        rows = self.bench.root / "rows" / f"local_training_{NAMES.index(name)}.json"
        tables = {
            "site": own,
            "data": {"path": str(rows)},
            "model": {"base": str(self.bench.root / "base"), "tokenizer": "bytes"},
            "policy": {"confirm": "never"},
        }
        write_toml(self.folder / f"{file or name}.toml", tables)

    def start(self, name: str, *command: str) -> Forked:
        """Start a command."""
        log = self.folder / "logs" / f"{name}.log"
        self.started[name] = self.bench.nursery.command(log, *command, **self.environment)
        return self.started[name]

    def serve(self, study: str = "study", *more: str) -> Forked:
        """Start the server."""
        return self.start("server", "serve", str(self.folder / f"{study}.toml"), "--out", str(self.run), *more)

    def start_site(self, name: str, file: str = "") -> Forked:
        """Start a site."""
        return self.start(file or name, "site", "run", str(self.folder / f"{file or name}.toml"))

    def trainer_of(self, name: str) -> int:
        """Return the pid of a site's trainer: the process at the other end of the pipe that the site writes to.

        A case that has only begun has none yet, and on a busy machine for long.
        """
        found: list[int] = []

        def is_found() -> bool:
            site = self.started[name].pid
            pipes, others = _pipes(site), psutil.Process(self.bench.nursery.pid).children()
            found.extend(one.pid for one in others if one.pid != site and _stdin(one.pid) in pipes)
            return bool(found)

        self.wait(is_found, f"trainer of {name}")
        return found[0]

    def num_rounds_done(self) -> int:
        """Return how many rounds are complete."""
        rounds = self.run / "rounds"
        return sum(entry.name.isdecimal() for entry in rounds.iterdir()) if rounds.is_dir() else 0

    def reach(self, round: int, seconds: float) -> None:
        """Wait until so many rounds are complete, and a moment longer."""
        self.wait(lambda: self.num_rounds_done() >= round or self.started["server"].poll(), f"round {round}")
        if code := self.started["server"].poll():
            raise WrongError(f"the server ended with {code}; {self.last_lines()}")
        time.sleep(seconds)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something to become true, within the time that a case has."""
        while not condition():
            if time.monotonic() > self.until:
                raise WrongError(f"no {what} within {LIMIT_SECONDS:g} s; {self.last_lines()}")
            time.sleep(0.005)

    def finish(self) -> None:
        """Wait for the server's end, and check what must be true then."""
        self.wait(lambda: self.started["server"].poll() is not None, "end of the server")
        if (code := self.started["server"].wait()) != 0:
            raise WrongError(f"the server ended with {code}; {self.last_lines()}")
        for name, process in self.started.items():
            if name != "server" and (ended := process.poll()) is not None:
                raise WrongError(f"{name} ended with {ended}; {self.last_lines()}")
        self._leave()
        if (traces := [path.stem for path in self.logs() if "Traceback" in path.read_text(errors="replace")]) != []:
            raise WrongError(f"tracebacks of {', '.join(traces)}; {self.last_lines(20)}")
        if self.num_rounds_done() != self.rounds:
            raise WrongError(f"expected {self.rounds} rounds, got {self.num_rounds_done()}")
        self._compare()

    def _leave(self) -> None:
        """End the sites as a service does; each must do so at once, and its trainer with it."""
        sites = [process for name, process in self.started.items() if name != "server"]
        for site in sites:
            site.signal(signal.SIGTERM)
        for site in sites:
            if (code := site.poll(30.0)) != 0:
                raise WrongError(f"a site that was asked to leave ended with {code}; {self.last_lines()}")

    def _compare(self) -> None:
        """Replay who counted in one process, and compare the adapters."""
        recipe = self.recipe()
        recipe["data"]["path"] = str(self.bench.root / "rows")
        recipe["partition"] = {"scheme": "natural"}
        recipe["federation"] |= {"num_clients": len(NAMES), "participation": str(self.run)}
        write_toml(self.folder / "recipe.toml", recipe)
        alone = self.start("alone", "run", str(self.folder / "recipe.toml"), "--out", str(self.folder / "alone"))
        if (code := alone.wait()) != 0:
            raise WrongError(f"the replay ended with {code}; {self.last_lines()}")
        adapter = Path("adapter", "adapter_model.safetensors")
        found, expected = ((folder / adapter).read_bytes() for folder in (self.run, self.folder / "alone"))
        if found != expected:
            raise WrongError(f"the adapter differs from that of one process; left out: {self.left_out()}")

    def left_out(self) -> list[tuple[int, str, str]]:
        """Return round, site and reason of every answer that did not count."""
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [
            (record["round"], client["name"], client["reason"])
            for record in records
            for client in record["clients"]
            if client["reason"] is not None
        ]

    def logs(self) -> list[Path]:
        """Return what the processes said."""
        return sorted((self.folder / "logs").iterdir())

    def last_lines(self, number: int = 3) -> str:
        """Return the last that every process said."""
        said = {path.stem: path.read_text(errors="replace").splitlines()[-number:] for path in self.logs()}
        return "; ".join(f"{name}: {' | '.join(lines)}" for name, lines in said.items())

    def last_words(self, name: str) -> str:
        """Return the last line that a process said."""
        return ((self.folder / "logs" / f"{name}.log").read_text(errors="replace").splitlines() or [""])[-1]

    def close(self) -> None:
        """End every process of the case."""
        for process in self.started.values():
            process.signal(signal.SIGCONT)
            process.kill()
        for process in self.started.values():
            process.wait()
        for proxy in self.proxies.values():
            proxy.close()


def listening_beyond_loopback(pids: list[int]) -> list[str]:
    """Return the addresses other than 127.0.0.1 and ::1 at which processes listen."""
    return [
        f"{one.laddr.ip}:{one.laddr.port}"
        for pid in pids
        for one in psutil.Process(pid).net_connections("inet")
        if one.status == psutil.CONN_LISTEN and one.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]


def write_toml(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Write tables of plain values."""
    lines = [
        line
        for name, table in tables.items()
        for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()))
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _pipes(pid: int) -> set[str]:
    try:
        links = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return set()
    return {link for link in links if link.startswith("pipe:")}


def _stdin(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/fd/0").readlink())
    except OSError:
        return ""
