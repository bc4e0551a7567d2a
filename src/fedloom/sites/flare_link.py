"""The link over NVIDIA FLARE: FLARE's own process, started from a kit and ended with fedloom, carries the frames.

FLARE checks certificates, registers sites, and dials again after a break. No job exists: the kit names fedloom's one
component and nothing that could start another (see ``kit_check``).
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fedloom.errors import MissingExtraError, RunError
from fedloom.federation.blob import Checked
from fedloom.sites import link
from fedloom.sites.flare_pipe import (
    CONNECTED,
    DESCRIPTOR,
    DONE,
    GONE,
    NAMES,
    PIECE,
    PIECES_WAITING,
    REFUSED,
    REQUEST_SECONDS,
    STARTED,
    Event,
    Joiner,
    Pipe,
    pieces,
)
from fedloom.sites.grpc_link import check_free, unreachable
from fedloom.sites.kit import read_kit
from fedloom.sites.kit_check import FlareKit
from fedloom.sites.link import SERVER, Frame

FRAMES_WAITING = 8
_START_SECONDS = 120.0
_CLOSE_SECONDS = 3.0
_EXPLAIN_SECONDS = 10.0
_LONGEST_WAIT = 5.0
CONSOLE = "console.log"
"""What FLARE's process prints, in the kit's folder."""
_TURNED_AWAY = "error:client_registration "


class FlareLink:
    """One end: the process of FLARE, and an outbox per receiver."""

    def __init__(
        self,
        kit: FlareKit,
        receivers: tuple[str, ...],
        largest_frame: int,
        note: Callable[[str], None],
        refused: Callable[[str], None],
        inbox_size: int = 0,
    ) -> None:
        """Start FLARE.

        Raises:
            MissingExtraError: FLARE is not installed.
        """
        required_flare()
        self.inbox: queue.Queue[tuple[str, Frame | Checked]] = queue.Queue(maxsize=inbox_size)
        self.is_started = threading.Event()
        self.connected: set[str] = set()
        self.connections: Counter[str] = Counter()
        self._kit, self._receivers, self._largest = kit, receivers, largest_frame
        self._note, self._refused = note, refused
        self._session = uuid.uuid4().hex
        self._is_closed = threading.Event()
        self._pipe: Pipe | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._out: dict[str, queue.Queue[Frame | None]] = {
            name: queue.Queue(maxsize=FRAMES_WAITING) for name in receivers
        }
        self._credits = {name: threading.Semaphore(PIECES_WAITING) for name in receivers}
        self._pumps = [threading.Thread(target=self._pump, args=(name,), daemon=True) for name in receivers]
        self._runner = threading.Thread(target=self._run, name="link", daemon=True)
        for thread in (*self._pumps, self._runner):
            thread.start()

    def send(self, to: str, frame: Frame) -> bool:
        """Put a frame into the receiver's outbox; False where it cannot be reached now."""
        out = self._out.get(to)
        if out is None or to not in self.connected or self._is_closed.is_set():
            return False
        return link.offered(out, frame)

    def close(self) -> None:
        """Let what waits go out, and end FLARE's process."""
        until = time.monotonic() + _CLOSE_SECONDS
        for out in self._out.values():
            while True:  # whoever takes nothing in loses what waits for it
                try:
                    out.put(None, timeout=max(0.0, until - time.monotonic()))
                    break
                except queue.Full:
                    out.get_nowait()
        for name, pump in zip(self._receivers, self._pumps, strict=True):
            pump.join(max(0.0, until - time.monotonic()))
            for _ in range(PIECES_WAITING):
                self._credits[name].acquire(timeout=max(0.0, until - time.monotonic()))
        self._is_closed.set()
        if self._pipe is not None:
            self._pipe.close()
        self._end_process()
        self._runner.join(_CLOSE_SECONDS)

    def reason(self) -> str:
        """Return what FLARE said last that explains an end, for a person."""
        path = self._kit.folder / CONSOLE
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        for mark in (_TURNED_AWAY, "Error: ", "ERROR - "):
            for line in reversed(lines):
                if mark in line:
                    return line.partition(mark)[2].strip() if mark == _TURNED_AWAY else line.strip()
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")

    def _run(self) -> None:
        wait = 0.5
        while not self._is_closed.is_set():
            begun = time.monotonic()
            self._carry()
            for name in tuple(self.connected):
                self.connected.discard(name)
            if self._is_closed.is_set():
                return
            code = self._end_process()
            self._ended(code)
            wait = 0.5 if time.monotonic() - begun > 60 else min(wait * 2, _LONGEST_WAIT)
            self._is_closed.wait(wait)

    def _ended(self, code: int) -> None:
        self._note(f"FLARE's process ended (exit code {code}: {self.reason()}); starting it again")

    def _carry(self) -> None:
        """Start FLARE's process and take what it says, to its end."""
        ours, theirs = multiprocessing.Pipe()
        environment = {**os.environ, DESCRIPTOR: str(theirs.fileno()), NAMES: json.dumps(self._receivers)}
        with (self._kit.folder / CONSOLE).open("wb") as console:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", *_command(self._kit)],
                pass_fds=(theirs.fileno(),),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # ctrl-c is for fedloom, which ends FLARE when it is done
            )
        theirs.close()
        joiners: dict[str, Joiner] = {}
        self._pipe = Pipe(ours)
        if self._is_closed.is_set():
            self._pipe.close()
        for event in self._pipe.events():
            self._take(event, joiners)

    def _take(self, event: Event, joiners: dict[str, Joiner]) -> None:
        if event.kind == STARTED:
            for name in self._receivers:
                self._credits[name] = threading.Semaphore(PIECES_WAITING)
            self.is_started.set()
        elif event.kind == PIECE and event.place is not None:
            joiner = joiners.setdefault(event.name, Joiner(self._largest))
            frame = joiner.take(event.place, event.data)
            if frame is not None:
                self.inbox.put((event.name, frame))
        elif event.kind == DONE:
            self._credits[event.name].release()
        elif event.kind == CONNECTED:
            self.connected.add(event.name)
            self.connections[event.name] += 1
            if event.name == SERVER:
                self.inbox.put((SERVER, link.CONNECTED))
        elif event.kind == GONE:
            self.connected.discard(event.name)
        elif event.kind == REFUSED:
            self._refused(f"{self._kit.address}: the server turned this site away: not a site of this study")

    def _pump(self, name: str) -> None:
        number = 0
        while (frame := self._out[name].get()) is not None:
            number += 1
            for place, data in pieces(frame, self._session, number):
                pipe, credit = self._pipe, self._credits[name]
                if not credit.acquire(timeout=REQUEST_SECONDS):
                    break
                if pipe is None or name not in self.connected:
                    credit.release()  # the piece stays here, so no DONE will give it back
                    break
                pipe.put(Event(PIECE, name, place, data))
            del frame  # nothing is held while there is nothing to send

    def _end_process(self) -> int:
        process = self.process
        if process is None:
            return 0
        try:
            return process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class FlareServerLink(FlareLink):
    """The server's end."""

    def __init__(self, kit: FlareKit, names: tuple[str, ...], largest_frame: int, note: Callable[[str], None]) -> None:
        """Start FLARE's server, and wait until it listens.

        Raises:
            RunError: the port is taken, or FLARE does not start.
            MissingExtraError: FLARE is not installed.
        """
        check_free(kit.address)
        self._failure: str | None = None
        super().__init__(kit, names, largest_frame, note, note, inbox_size=64 * len(names))
        until = time.monotonic() + _START_SECONDS
        while not self.is_started.wait(0.1):
            if self._failure is not None or time.monotonic() > until:
                reason = self._failure or f"no answer for {_START_SECONDS:.0f} s"
                self.close()
                raise RunError(
                    f"{kit.folder}: expected FLARE's server to start, got: {reason}; see {kit.folder / CONSOLE}"
                )

    def _ended(self, code: int) -> None:
        if self.is_started.is_set():
            super()._ended(code)
        else:
            self._failure = f"exit code {code}, {self.reason()}"


class FlareSiteLink(FlareLink):
    """A site's end."""

    def __init__(
        self, kit: FlareKit, largest_frame: int, note: Callable[[str], None], refused: Callable[[str], None]
    ) -> None:
        """Start FLARE's process, which dials.

        Raises:
            MissingExtraError: FLARE is not installed.
        """
        super().__init__(kit, (SERVER,), largest_frame, note, refused)
        threading.Thread(target=self._explain, daemon=True).start()

    def _ended(self, code: int) -> None:
        reason = self.reason()
        if reason.endswith("is disabled"):
            self._refused(f"{self._kit.address}: the server turned this site away: {self._kit.name} is revoked")
            return
        super()._ended(code)

    def _explain(self) -> None:
        """Say why there is no server, where FLARE only tries again."""
        kit, told = read_kit(self._kit.folder, "client"), ""
        while not self._is_closed.wait(_EXPLAIN_SECONDS):
            if self.connected:
                told = ""
                continue
            why = unreachable(self._kit.address, kit)
            why = why or "the server answers, but does not take this site in (a revoked one, or not yet)"
            if why != told:
                self._note(f"{self._kit.address}: {why}; trying again")
            told = why


def required_flare() -> None:
    """Check that FLARE is installed, without loading it.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("nvflare") is None:
        raise MissingExtraError("sites", "training across sites over NVIDIA FLARE")


def _command(kit: FlareKit) -> list[str]:
    """Return the module that a kit's own start.sh runs, with its arguments."""
    place = ["-m", str(Path(kit.folder)), "-s", f"fed_{kit.role}.json", "--set", "secure_train=true"]
    if kit.role == "server":
        return [
            "nvflare.private.fed.app.server.server_train",
            *place,
            f"org={kit.organisation}",
            "config_folder=",
        ]
    own = [f"uid={kit.name}", f"org={kit.organisation}", "config_folder="]
    return ["nvflare.private.fed.app.client.client_train", *place, *own]
