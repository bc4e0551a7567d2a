"""The whole of it on this machine: a root, a server and three sites in processes of their own, one killed and back."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedloom import config
from fedloom.data.sources import Split, load_rows
from fedloom.errors import RunError
from fedloom.experiment.session import run
from fedloom.methods import table
from fedloom.run_folder import durable
from fedloom.run_folder.reader import read_run
from fedloom.sites.throwaway_certificates import ThrowawayRoot

NAMES = ("berlin", "oslo", "rome")
RANKS = (16, 8, 4)
_MARK = "fedloom-sites-demo.json"
_KILLED, _KILLED_AFTER, _BACK_AFTER, _SECONDS = "oslo", 2, 4, 1800.0
_RECIPE: Mapping[str, Mapping[str, Any]] = {
    "method": {"name": next(iter(table.shipped("starts_fresh"))), "ranks": list(RANKS)},
    "federation": {"num_rounds": 8},
    "training": {"local_steps": 6, "batch_size": 8, "learning_rate": 3e-3},
    "evaluation": {"every": 0},
}
_WORDING = {"template": "plain"}
_EVAL_ROWS = 100


@dataclass(frozen=True)
class SitesDemo:
    """What the demo came to."""

    folder: Path
    left_out: Mapping[str, list[int]]
    loss_before: float
    loss_after: float
    is_equal: bool
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**self.__dict__, "folder": str(self.folder)}

    def lines(self) -> list[str]:
        """Return it for people."""
        away = [f"{name} in {', '.join(map(str, rounds))}" for name, rounds in self.left_out.items() if rounds]
        equal = "equal to" if self.is_equal else "NOT equal to"
        return [
            f"three sites, {_RECIPE['federation']['num_rounds']} rounds in {self.seconds:.0f} s",
            f"left out of rounds: {'; '.join(away) or 'nobody'}",
            f"held-out loss {self.loss_after:.4f} nats per token (base {self.loss_before:.4f})",
            f"adapter {equal} that of one process in which those take part who counted",
            f"run folder: {self.folder / 'run'}",
        ]


def run_demo(out: Path, say: Callable[[str], None]) -> SitesDemo:
    """Run the demo into ``out``, over what an earlier demo left there.

    Raises:
        RunError: the folder holds something else, or a process of the demo ended with an error.
    """
    begun = time.monotonic()
    _prepare(out)
    study = _write_files(out)
    say(f"made a root certificate, kits and rows for {', '.join(NAMES)} in {out}")
    _train(out, study, say)
    found = read_run(out / "run")
    if found.finished is None:
        raise RunError(f"{out / 'run'}: expected a finished run, got {len(found.records)} rounds; see {out / 'logs'}")
    say("replaying who counted in one process")
    recipe = {
        **{name: dict(values) for name, values in _RECIPE.items()},
        "data": {"path": str(out / "rows"), "eval_path": str(out / "eval.json"), **_WORDING},
        "partition": {"scheme": "natural"},
    }
    recipe["federation"] |= {"num_clients": len(NAMES), "participation": str(out / "run")}
    alone = run(config.resolve(recipe, "the demo"), out / "alone")
    left_out = {
        name: [record["round"] for record in found.records if record["clients"][client]["reason"] is not None]
        for client, name in enumerate(NAMES)
    }
    return SitesDemo(
        folder=out,
        left_out=left_out,
        loss_before=found.finished["base_eval"]["loss_nats"],
        loss_after=found.finished["eval"]["loss_nats"],
        is_equal=_adapter(out / "run") == _adapter(alone.folder),
        seconds=time.monotonic() - begun,
    )


def _train(out: Path, study: Path, say: Callable[[str], None]) -> None:
    """Run server and sites; kill a site, start it again two rounds later, then kill the server and serve again."""
    started: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, *command: str) -> None:
        with (out / "logs" / f"{name}.log").open("ab") as log:
            started[name] = _process(log, *command)

    def kill(name: str) -> None:
        started[name].kill()
        started[name].wait()

    serve, away = ("serve", str(study), "--out", str(out / "run")), [_KILLED]
    try:
        start("server", *serve)
        for name in NAMES:
            start(name, "site", "run", str(out / name / "site.toml"))
        say("started the server and three sites, each in a process of its own")
        until, shown = time.monotonic() + _SECONDS, 0
        while started["server"].poll() is None and time.monotonic() < until:
            time.sleep(0.2)
            done = len(list((out / "run" / "rounds").glob("*"))) if (out / "run" / "rounds").is_dir() else 0
            if done == shown:
                continue
            shown = done
            say(f"round {done} is complete")
            if done >= _KILLED_AFTER and started[_KILLED].returncode is None and away:
                kill(_KILLED)
                say(f"killed {_KILLED}; the others go on")
            elif done >= _BACK_AFTER and away:
                kill("server")
                start(away.pop(), "site", "run", str(out / _KILLED / "site.toml"))
                start("server", *serve, "--set", f"sites.quorum={len(NAMES)}")
                say(f"killed the server; started {_KILLED} and the same command again, which waits for all three")
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    if started["server"].returncode != 0:
        last = (out / "logs" / "server.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RunError(f"expected the demo's server to finish, got: {' '.join(last)}; see {out / 'logs'}")


def _process(log: IO[bytes], *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "fedloom", *command], stdout=log, stderr=log)


def _prepare(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise RunError(f"{out}: expected a new folder or an earlier demo's, it holds other files; choose another")
    with durable.explained(str(out), "choose another folder"):
        if out.exists():
            shutil.rmtree(out)
        for name in ("rows", "logs"):
            (out / name).mkdir(parents=True)
        durable.write_json(out / _MARK, {"sites": list(NAMES)})


def _write_files(out: Path) -> Path:
    """Write rows, kits and files of the sites and of the study; return the study's."""
    root, rows = ThrowawayRoot(), list(load_rows("embedded", Split.TRAIN).rows)
    root.write(out / "kit", "server", "server")
    address = f"127.0.0.1:{_free_port()}"
    for number, name in enumerate(NAMES):
        path = out / "rows" / f"local_training_{number}.json"
        durable.write_json(path, rows[number :: len(NAMES)])
        root.write(out / name / "kit", "client", name)
        site = {
            "site": {
                "name": name,
                "server": address,
                "kit": str(out / name / "kit"),
                "folder": str(out / name / "state"),
            },
            "data": {"path": str(path)},
            "policy": {"confirm": "never"},
        }
        _write_toml(out / name / "site.toml", site)
    sites = {"names": list(NAMES), "address": address, "kit": str(out / "kit"), "quorum": 2, "grace_s": 5.0}
    durable.write_json(out / "eval.json", list(load_rows("embedded", Split.EVAL).rows)[:_EVAL_ROWS])
    study = {
        **_RECIPE,
        "data": {"eval_path": str(out / "eval.json"), **_WORDING},
        "sites": {**sites, "deadline_s": 300.0},
    }
    _write_toml(out / "study.toml", study)
    return out / "study.toml"


def _write_toml(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    lines = [
        line
        for name, table in tables.items()
        for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), "")
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()
