"""Processes of a server, of sites and of their trainers, forked from one that has imported everything.

To import all of it takes seconds, to fork none, and a trial starts eight processes. What is forked is a process like
any other: it has its own connections and threads, and can be killed or stopped. Waits of seconds are shorter in it.
"""

from __future__ import annotations

import array
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

HELLO_SECONDS, ASK_AGAIN_SECONDS, AWAY_SECONDS, LONGEST_WAIT, WAIT_FOR_TWIN = 0.3, 0.6, 3.0, 0.5, 2.0
"""In place of 5, 5, 20, 5 and 30 s."""
DROP_OUT = "FAULTS_DROP_OUT"
"""In a site's environment: its training fails in this share of the rounds."""
SLOW_SECONDS = 1.0
LARGE_BYTES = 256
"""From here on a message is handed over like a large one."""
_MESSAGE = 1 << 16
_CRASHED = 70


class Forked:
    """A process that the nursery made: its pid, and its exit code once it has one."""

    def __init__(
        self, nursery: Path, act: str, arguments: Sequence[str], files: Sequence[int], environment: Mapping[str, str]
    ) -> None:
        """Ask for one that does ``act`` with ``files`` as its descriptors 0, 1, 2 and more."""
        self._told = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._told.connect(str(nursery))
        asked = json.dumps({"act": act, "arguments": list(arguments), "environment": dict(environment)}).encode()
        rights = array.array("i", files)
        self._told.sendmsg([asked], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        self.pid = int(self._told.recv(_MESSAGE))
        self._lock, self._code = threading.Lock(), None

    _code: int | None

    def poll(self, seconds: float = 0.0) -> int | None:
        """Return the exit code, or None where there is none within so many seconds."""
        if self._code is None and select.select([self._told], [], [], seconds)[0]:
            with self._lock:
                if self._code is None:
                    self._code = int(self._told.recv(_MESSAGE) or -signal.SIGKILL)
        return self._code

    def wait(self) -> int:
        """Return the exit code when there is one."""
        while (code := self.poll(60.0)) is None:
            pass
        return code

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.signal(signal.SIGKILL)


class Nursery:
    """The process that forks the others, as its starter sees it; its end is theirs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "nursery"
        given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.site_nursery", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=given,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def command(self, log: Path, *arguments: str, **environment: str) -> Forked:
        """Start a command of the command line; what it says goes to ``log``."""
        with log.open("ab") as said, Path(os.devnull).open("rb") as nothing:
            files = [nothing.fileno(), said.fileno(), said.fileno()]
            return Forked(self.path, "command", arguments, files, environment)

    def close(self) -> None:
        """End it, and whatever it started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class _TrainersProcess:
    """What ``subprocess.Popen`` is to a site that starts its trainer, forked by the nursery in its place."""

    def __init__(self, nursery: Path, command: Sequence[str], **options: Any) -> None:
        reading, writing = os.pipe()
        given = {DROP_OUT: os.environ[DROP_OUT]} if DROP_OUT in os.environ else {}
        self._forked = Forked(nursery, "trainer", [], [reading, 2, 2, *options["pass_fds"]], given)
        os.close(reading)
        self.stdin, self.pid = os.fdopen(writing, "wb"), self._forked.pid
        self.kill, self.wait = self._forked.kill, self._forked.wait


def main(path: Path) -> None:
    """Fork what is asked for until whoever started this closes its standard input; then end all of it."""
    acts = _imported(path)
    alive: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as heard:
        heard.bind(str(path))
        heard.listen(64)
        print("ready", flush=True)
        while True:
            ready = select.select([heard, 0], [], [], 0.01)[0]
            _reap(alive)
            if 0 in ready:
                break
            if heard in ready:
                asking, _ = heard.accept()
                asked, files, *_ = socket.recv_fds(asking, _MESSAGE, 8)
                if (pid := os.fork()) == 0:
                    for other in [heard, asking, *alive.values()]:
                        other.close()
                    _child(acts, json.loads(asked), files)
                for file in files:
                    os.close(file)
                with contextlib.suppress(BrokenPipeError):  # a site that asked for a trainer may be killed meanwhile
                    asking.send(str(pid).encode())
                alive[pid] = asking
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _reap(alive: dict[int, socket.socket]) -> None:
    for pid in list(alive):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with alive.pop(pid) as told:
                try:
                    told.send(str(os.waitstatus_to_exitcode(status)).encode())
                except OSError:  # whoever asked has ended
                    continue


def _child(acts: dict[str, Callable[..., Any]], asked: dict[str, Any], files: list[int]) -> NoReturn:
    code = _CRASHED
    try:
        os.setsid()
        for number, file in enumerate(files[:3]):
            os.dup2(file, number)
            os.close(file)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(asked["environment"])
        code = acts[asked["act"]](asked["arguments"], files[3:]) or 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _imported(nursery: Path) -> dict[str, Callable[..., Any]]:
    """Import everything, shorten the waits, and return what can be asked for."""
    from fedloom.cli.app import exit_code
    from fedloom.sites import (
        frames,
        grpc_link,
        handover,
        serving,
        site_run,
        site_state,
        site_training,
        sites_engine,
        trainer,
    )
    from fedloom.sites.site_worker import SiteWorker

    assert serving
    assert site_training
    frames.LARGE_BYTES = handover.LARGE_BYTES = LARGE_BYTES  # the base is tiny
    sites_engine.ASK_AGAIN_SECONDS = ASK_AGAIN_SECONDS
    site_state.AWAY_SECONDS = AWAY_SECONDS
    grpc_link._LONGEST_WAIT, grpc_link._WAIT_FOR_TWIN = LONGEST_WAIT, WAIT_FOR_TWIN
    site_run.SiteWorker = functools.partial(SiteWorker, hello_seconds=HELLO_SECONDS)  # type: ignore[misc,assignment]
    trainer.subprocess = SimpleNamespace(  # type: ignore[assignment]
        PIPE=subprocess.PIPE, Popen=functools.partial(_TrainersProcess, nursery)
    )

    def trained(_: list[str], files: list[int]) -> None:
        if DROP_OUT in os.environ:
            site_training.SiteTraining._trained = _dropping_out(float(os.environ[DROP_OUT]))  # type: ignore[method-assign]
        trainer.main(*files)

    return {"command": lambda arguments, _: exit_code(arguments), "trainer": trained}


def _dropping_out(share: float) -> Callable[..., bytes]:
    """Return a training that fails in a share of the rounds: it ends the process, lacks memory, or takes too long.

    A round in which all three would fail is spared: it would end the run.
    """
    from fedloom.seeding import stream
    from fedloom.sites.site_training import SiteTraining

    train = SiteTraining._trained

    def trained(run: SiteTraining, task: Any, body: bytes) -> bytes:
        draws = [stream(17, "drop-outs", client, task.round).random() / share for client in range(3)]
        draw = draws[run.sheet.client] if max(draws) >= 1 else 1.0
        if draw < 1 / 3:
            os._exit(9)
        if draw < 2 / 3:
            raise MemoryError
        if draw < 1:
            time.sleep(SLOW_SECONDS)
        return train(run, task, body)

    return trained


if __name__ == "__main__":
    main(Path(sys.argv[1]))
