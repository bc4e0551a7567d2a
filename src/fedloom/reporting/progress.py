"""What a person sees during a run: a live view in a terminal, plain lines in a file, nothing in a test."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from fedloom.reporting.metrics import was_left_out
from fedloom.wording import counted, printable, written_bytes

SECONDS_BETWEEN_NOTES = 10.0


class Progress(Protocol):
    """Receives the events of a run; a context manager, so that a terminal is left in order."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop showing."""

    def run_started(self, title: str, num_rounds: int, num_rounds_done: int = 0) -> None:
        """Say what runs and how many rounds of it are done already."""

    def round_started(self, round: int, num_clients: int) -> None:
        """Say that ``num_clients`` clients begin round ``round``."""

    def step_done(self, client: int, step: int, num_steps: int, loss_nats: float) -> None:
        """Say that one client finished its optimiser step ``step`` of ``num_steps`` (from 1)."""

    def client_done(self, client: int, loss_nats: float | None) -> None:
        """Say that one client finished, without telling a loss (NaN), or failed (None)."""

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Say what came of the round: the record of metrics.jsonl."""

    def scored(self, what: str, done: int, total: int, seconds_left: float) -> None:
        """Say that ``done`` of ``total`` items of a suite are scored."""

    def note(self, message: str) -> None:
        """Say one sentence."""


def progress_for(stream: TextIO | None = None) -> Progress:
    """Return the live view where ``stream`` (standard error by default) is a terminal, plain lines otherwise."""
    stream = stream or sys.stderr
    return LiveProgress(Console(file=stream)) if stream.isatty() else PlainProgress(stream)


def progress_in_notebook() -> Progress:
    """Return a line per round where this is a notebook's kernel, silence elsewhere: what calls from Python show."""
    return PlainProgress(sys.stdout) if "ipykernel" in sys.modules else SilentProgress()


class SilentProgress:
    """Show nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def run_started(self, title: str, num_rounds: int, num_rounds_done: int = 0) -> None:
        """Show nothing."""

    def round_started(self, round: int, num_clients: int) -> None:
        """Show nothing."""

    def step_done(self, client: int, step: int, num_steps: int, loss_nats: float) -> None:
        """Show nothing."""

    def client_done(self, client: int, loss_nats: float | None) -> None:
        """Show nothing."""

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Show nothing."""

    def scored(self, what: str, done: int, total: int, seconds_left: float) -> None:
        """Show nothing."""

    def note(self, message: str) -> None:
        """Show nothing."""


class PlainProgress(SilentProgress):
    """Print one line per round, with the time that is left, and now and then one while items are scored."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._num_rounds = self._done_before = self._done = 0
        self._started = self._last_note = clock()

    def run_started(self, title: str, num_rounds: int, num_rounds_done: int = 0) -> None:
        """Print the title and where the run stands."""
        self._num_rounds, self._done_before, self._done = num_rounds, num_rounds_done, num_rounds_done
        self._started = self._clock()
        resumed = f", resuming after round {num_rounds_done}" if num_rounds_done else ""
        self.note(f"{title}: {counted(num_rounds, 'round')}{resumed}")

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Print the round's figures."""
        self._done += 1
        elapsed = self._clock() - self._started
        left = elapsed / (self._done - self._done_before) * (self._num_rounds - self._done)
        self.note(f"round {record['round']}/{self._num_rounds}  {figures(record)}  {clock_time(left)} left")

    def scored(self, what: str, done: int, total: int, seconds_left: float) -> None:
        """Print how far it is where nothing was printed for a while."""
        if self._clock() - self._last_note >= SECONDS_BETWEEN_NOTES:
            self.note(f"{what}: {done:,} of {total:,}  {clock_time(seconds_left)} left")

    def note(self, message: str) -> None:
        """Print one line."""
        self._last_note = self._clock()
        with contextlib.suppress(OSError):  # a full or closed log ends no run
            print(printable(message), file=self._stream, flush=True)


class LiveProgress(SilentProgress):
    """Show rounds, clients and steps as bars that redraw in place; each finished round leaves a line above them."""

    def __init__(self, console: Console) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            TimeElapsedColumn(),
            TimeLeftColumn(),
            console=console,
            transient=True,
        )
        self._rounds = self._bars.add_task("rounds", total=None, detail="", visible=False)
        self._clients = self._bars.add_task("clients", total=None, detail="", visible=False)
        self._steps = self._bars.add_task("steps", total=None, detail="", visible=False)
        self._items = self._bars.add_task("items", total=None, detail="", visible=False)
        self._step_of: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def run_started(self, title: str, num_rounds: int, num_rounds_done: int = 0) -> None:
        """Show the bar of rounds."""
        self.note(f"{title}: {counted(num_rounds, 'round')}" + (f", {num_rounds_done} done" if num_rounds_done else ""))
        self._bars.reset(self._rounds, total=num_rounds, completed=num_rounds_done, visible=True)

    def round_started(self, round: int, num_clients: int) -> None:
        """Show the bars of clients and steps, empty."""
        self._step_of.clear()
        self._bars.update(self._rounds, detail=f"round {round}")
        self._bars.reset(self._clients, total=num_clients, visible=True, detail="")
        self._bars.reset(self._steps, total=None, visible=False, detail="")

    def step_done(self, client: int, step: int, num_steps: int, loss_nats: float) -> None:
        """Advance the bar of steps, which counts every client seen so far in this round."""
        self._step_of[client] = (step, num_steps)
        done = sum(step for step, _ in self._step_of.values())
        total = sum(num_steps for _, num_steps in self._step_of.values())
        detail = f"client {client}  loss {loss_nats:.3f}"
        self._bars.update(self._steps, completed=done, total=total, detail=detail, visible=True)

    def client_done(self, client: int, loss_nats: float | None) -> None:
        """Advance the bar of clients."""
        told = " dropped" if loss_nats is None else "" if math.isnan(loss_nats) else f"  loss {loss_nats:.3f}"
        outcome = f"client {client}{told}"
        self._bars.update(self._clients, advance=1, detail=outcome)

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Advance the bar of rounds and leave the round's figures above the bars."""
        self._bars.update(self._rounds, advance=1)
        self.note(f"round {record['round']}  {figures(record)}")

    def scored(self, what: str, done: int, total: int, seconds_left: float) -> None:
        """Show the bar of items while some are left."""
        self._bars.update(self._items, completed=done, total=total, detail=printable(what), visible=done < total)

    def note(self, message: str) -> None:
        """Print one line above the bars."""
        self._bars.console.print(printable(message), markup=False, highlight=False)


class TimeLeftColumn(ProgressColumn):
    """Time left at the pace so far; nothing while there is no pace."""

    def render(self, task: Task) -> Text:
        """Return the text for one bar."""
        left = task.time_remaining
        return Text("" if left is None else f"{clock_time(left)} left", style="cyan")


def figures(record: Mapping[str, Any]) -> str:
    """Return a round's main figures in one line; what is missing from the record is skipped."""
    evaluation = record.get("eval") or {}
    clients = record.get("clients") or []
    dropped = sum(was_left_out(client) for client in clients)
    sent = (record.get("upload_bytes") or 0) + (record.get("download_bytes") or 0)
    parts = [
        _number("train loss", record.get("train_loss_nats")),
        _number("held-out loss", evaluation.get("loss_nats")),
        counted(len(clients) - dropped, "client") + (f" ({dropped} dropped)" if dropped else "") if clients else "",
        written_bytes(sent) if sent else "",
        f"{sum((record.get('seconds') or {}).values()):.1f} s",
    ]
    return "  ".join(part for part in parts if part)


def clock_time(seconds: float) -> str:
    """Return a duration as 0:07, 12:05 or 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:.4f}"
