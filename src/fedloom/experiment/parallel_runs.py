"""Run several experiments at once, each in a process of its own, by the ordinary command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.config import Settings
from fedloom.errors import RunError, SettingsError
from fedloom.experiment.run_summary import RunSummary
from fedloom.methods import table
from fedloom.reporting.progress import Progress
from fedloom.run_folder.run_date import begin_on
from fedloom.training.cores import share_cores

_ERROR = "error: "
_CHILD = (
    "import runpy, sys; from fedloom.experiment.parallel_runs import begin; "
    "begin(int(sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))); "
    "runpy.run_module('fedloom', run_name='__main__', alter_sys=True)"
)
"""The ordinary command, in a process that ends with the one that started it."""
_ENDING_SECONDS = 60.0
"""How long an interrupted run may take to end."""


def check_parallel(variants: Sequence[Settings], parallel: int) -> None:
    """Check that runs can have processes of their own.

    Raises:
        SettingsError: they cannot.
    """
    if parallel < 1:
        raise SettingsError(f"--parallel: expected an integer ≥ 1, got {parallel}; give the number of processes")
    if parallel == 1:
        return
    if any(one.engine.name != "local" for one in variants):
        raise SettingsError(
            "--parallel: expected engine.name = local, got ray, whose workers one run uses after the other; drop "
            "--parallel, or set engine.name = local"
        )
    for one in variants:
        if table.get(one.method.name).is_local:
            raise SettingsError(
                f"--parallel: expected methods of installed packages, got {one.method.name}, which only this process "
                "knows; install it, or drop --parallel"
            )


def begin(parent: int, date: str, parallel: int) -> None:
    """Begin as one of several runs: on their day, on a part of the cores, to end with their parent."""
    begin_on(date)
    share_cores(parallel)
    end_with(parent)


def end_with(parent: int) -> None:
    """Interrupt this process, as ctrl-c does, once its parent is gone: nobody would read what it says."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def run_in_processes(
    runs: Sequence[tuple[Settings, Path]], parallel: int, date: str, *, fresh: bool, progress: Progress
) -> list[RunSummary]:
    """Run all, ``parallel`` at a time, and return their summaries in the order given; all begin on ``date``.

    The first run that fails, or an interruption, ends the others; each goes on by the same command.

    Raises:
        RunError: a run failed; the message is its own.
    """
    return [one.result() for one in _ended(runs, _Starting(date, parallel, fresh, progress), FIRST_EXCEPTION)]


def attempt_in_processes(
    runs: Sequence[tuple[Settings, Path]], parallel: int, date: str, *, fresh: bool, progress: Progress
) -> list[RunSummary | RunError]:
    """Run all as :func:`run_in_processes` does, where one that fails ends no other: its error stands for it."""
    ended = _ended(runs, _Starting(date, parallel, fresh, progress), ALL_COMPLETED)
    return [error if isinstance(error := one.exception(), RunError) else one.result() for one in ended]


@dataclass(frozen=True)
class _Starting:
    """How every process starts, and how many at a time."""

    date: str
    parallel: int
    fresh: bool
    progress: Progress


def _ended(runs: Sequence[tuple[Settings, Path]], starting: _Starting, until: str) -> list[Future[RunSummary]]:
    place = Path(os.path.commonpath([out.absolute().parent for _, out in runs]))
    with tempfile.TemporaryDirectory() as folder:
        processes = _Processes(Path(folder), place, starting)
        with ThreadPoolExecutor(starting.parallel) as threads:
            waiting = [threads.submit(processes.run, settings, out) for settings, out in runs]
            try:
                done, _ = wait(waiting, return_when=until)
                if until == FIRST_EXCEPTION:
                    _raise_first(done)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                processes.end()
                raise
    return waiting


def _raise_first(done: set[Future[RunSummary]]) -> None:
    for one in done:
        one.result()


@dataclass
class _Processes:
    """The processes that are running; each is called after its folder in ``place``."""

    folder: Path
    place: Path
    starting: _Starting
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: list[subprocess.Popen[str]] = field(default_factory=list)
    _is_ended: bool = False

    def run(self, settings: Settings, out: Path) -> RunSummary:
        """Run one, pass its lines on with its name before each, and return its summary."""
        name = str(out.absolute().relative_to(self.place))
        own = Path(tempfile.mkdtemp(dir=self.folder))
        recipe, printed = own / "recipe.json", own / "printed"
        recipe.write_text(json.dumps(settings.as_dict()), encoding="utf-8")
        beginning = [str(os.getpid()), self.starting.date, str(self.starting.parallel)]
        command = [sys.executable, "-c", _CHILD, *beginning]
        command += ["run", str(recipe), "--out", str(out), "--json"]
        errors: list[str] = []
        with printed.open("w", encoding="utf-8") as output, self._started(command, output) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(_ERROR):
                    errors.append(line.removeprefix(_ERROR).strip())
                else:
                    self.starting.progress.note(f"{name}: {line.rstrip()}")
        if process.returncode != 0:
            reason = "; ".join(errors) or f"its process ended with {process.returncode}; see the lines before"
            raise RunError(f"{name}: {reason}")
        found = json.loads(printed.read_text(encoding="utf-8"))
        return RunSummary(**{**found, "folder": Path(found["folder"])})

    def end(self) -> None:
        """Interrupt what runs, as ctrl-c does, and wait for it; what does not end is killed."""
        with self._lock:
            self._is_ended = True
            running = [process for process in self._running if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(_ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def _started(self, command: list[str], output: object) -> subprocess.Popen[str]:
        with self._lock:
            if self._is_ended:
                raise RunError("another run failed: this one was not started; run the same command again")
            # A session of its own: ctrl-c reaches this process alone, which then ends the others once.
            process: subprocess.Popen[str] = subprocess.Popen(
                command + ["--fresh"] * self.starting.fresh,
                stdout=output,  # type: ignore[call-overload]
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running.append(process)
        return process
