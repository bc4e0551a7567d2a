"""Between fedloom's process and the process of NVIDIA FLARE that it starts: a pipe that only these two hold.

FLARE's process carries messages and proves who sent them; it knows nothing of frames. Frames cross in pieces, so that
FLARE never holds a large one: a piece says of which frame it is and where it belongs, and whoever joins them drops a
frame of which one is missing, late or double.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from fedloom.federation.buffers import Buffer
from fedloom.sites.link import Frame, cut

PIECE_BYTES = 16 << 20
PIECES_WAITING = 4
"""Pieces for one receiver that FLARE's process holds at most."""
DESCRIPTOR, NAMES = "FEDLOOM_FLARE_PIPE", "FEDLOOM_FLARE_NAMES"
"""Environment of FLARE's process: its end of the pipe, and at the server the names that may take part."""
CHANNEL, UP, DOWN = "fedloom", "up", "down"
REQUEST_SECONDS = 60.0
"""The longest that a piece may take; a small one is given up sooner, see :func:`seconds_for`."""
_ANSWER_SECONDS, _WATCH_MILLISECONDS = 5.0, 1000

PIECE, DONE, CONNECTED, GONE, REFUSED, STARTED = "piece", "done", "connected", "gone", "refused", "started"
STRANGER = b"stranger"
"""What the server's end answers to a site that the study does not name."""
_LARGEST_HEAD = 4096
_SLACK = 1 << 16


@dataclass(frozen=True)
class Place:
    """Where a piece belongs: the sender's session, the number of the frame in it, its index, and whether it ends it."""

    session: str
    frame: int
    index: int
    last: bool

    def as_headers(self) -> dict[str, Any]:
        """Return it as headers of a message of FLARE."""
        return {f"fedloom_{key}": value for key, value in self.__dict__.items()}

    @classmethod
    def of(cls, read: Callable[[str], Any]) -> Place | None:
        """Read it from headers that a stranger may have written; None where they are no place."""
        session, frame, index, last = (read(f"fedloom_{key}") for key in ("session", "frame", "index", "last"))
        if not (isinstance(session, str) and len(session) <= 64 and isinstance(last, bool)):
            return None
        if not all(type(number) is int and 0 <= number < 1 << 53 for number in (frame, index)):
            return None
        return cls(session, frame, index, last)


@dataclass(frozen=True)
class Event:
    """What crosses the pipe: its kind, whose it is, and for a piece where it belongs and its bytes."""

    kind: str
    name: str = ""
    place: Place | None = None
    data: bytes = b""


class Pipe:
    """One end; any thread may put, one gets."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Pipe | None:
        """Take the end that this process was started with; None where it was started by something else."""
        descriptor = environment.get(DESCRIPTOR, "")
        if not descriptor.isdecimal():
            return None
        os.set_inheritable(int(descriptor), False)
        return cls(Connection(int(descriptor)))

    def put(self, event: Event) -> bool:
        """Send an event; False where the other end is gone."""
        head: dict[str, Any] = {"kind": event.kind, "name": event.name}
        if event.place is not None:
            head |= event.place.as_headers()
        try:
            with self._lock:
                self._connection.send_bytes(json.dumps(head).encode())
                self._connection.send_bytes(event.data)
        except (OSError, ValueError):
            return False
        return True

    def events(self) -> Iterator[Event]:
        """Yield what comes until the other end is gone."""
        while True:
            try:
                head = json.loads(self._connection.recv_bytes(_LARGEST_HEAD))
                data = self._connection.recv_bytes(PIECE_BYTES + _SLACK)
            except (EOFError, OSError, ValueError):
                self._connection.close()
                return
            yield Event(head["kind"], head["name"], Place.of(head.get), data)

    def close(self) -> None:
        """End it, at both ends; a thread that waits for events here ends too, which closing alone would not do."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as both:
            both.shutdown(socket.SHUT_RDWR)


def end_with_starter(environment: Mapping[str, str]) -> threading.Event:
    """End this process where whoever started it is gone before the event is set that is returned.

    Set it when something here reads from the pipe, and so sees its end.

    FLARE begins its components when it is registered, and asks for that for ever where no server is there. So a site
    that was killed meanwhile would leave a process behind that takes the site's name once the server is back.
    """
    descriptor, is_read = environment.get(DESCRIPTOR, ""), threading.Event()
    if not descriptor.isdecimal():
        return is_read
    other_end = select.poll()
    other_end.register(int(descriptor), 0)  # that it is gone is told without being asked for

    def watch() -> None:
        while not is_read.is_set():
            if any(what & select.POLLHUP for _, what in other_end.poll(_WATCH_MILLISECONDS)):
                os._exit(0)

    threading.Thread(target=watch, name="fedloom starter", daemon=True).start()
    return is_read


@dataclass
class Joiner:
    """Puts the pieces of one sender together; what does not continue is dropped with its frame."""

    largest: int
    _session: str = ""
    _frame: int = -1
    _count: int = 0
    _joined: bytearray = field(default_factory=bytearray)

    def take(self, place: Place, data: Buffer) -> Buffer | None:
        """Take a piece; return the frame that it completes, if it does."""
        if place.session != self._session:
            self._session, self._frame = place.session, -1
            self._begin()
        if place.index == 0 and place.frame > self._frame:
            self._frame = place.frame
            self._begin()
        elif place.frame != self._frame or self._count == 0 or place.index != self._count:
            return None
        if len(self._joined) + len(data) > self.largest:
            self._begin()
            return None
        self._joined += data  # it grows in place: pieces joined at the end would lie in memory twice
        self._count += 1
        if not place.last:
            return None
        found = self._joined
        self._begin()
        return found

    def _begin(self) -> None:
        self._joined, self._count = bytearray(), 0


def pieces(frame: Frame, session: str, number: int) -> Iterator[tuple[Place, bytes]]:
    """Cut a frame."""
    for index, (piece, is_last) in enumerate(cut(frame, PIECE_BYTES)):
        yield Place(session, number, index, is_last), b"".join(piece)


def seconds_for(data: bytes) -> float:
    """Return how long a piece may take: a while for the answer, and the rest of a minute by its share of a whole one.

    FLARE notices no earlier that the receiver is gone, and what is behind it waits so long.
    """
    return _ANSWER_SECONDS + (REQUEST_SECONDS - _ANSWER_SECONDS) * len(data) / PIECE_BYTES


class Lanes:
    """In FLARE's process: a thread per receiver, so that a slow one keeps no other waiting, and order is kept."""

    def __init__(self, pipe: Pipe, post: Callable[[str, Place, bytes], bool]) -> None:
        """``post`` sends a piece to a receiver and says whether it arrived."""
        self._pipe, self._post = pipe, post
        self._lanes: dict[str, queue.Queue[Event]] = {}

    def run(self, receivers: Collection[str]) -> None:
        """Carry what fedloom hands over for these receivers until it ends, and end this process too."""
        for event in self._pipe.events():
            if event.kind == PIECE and event.name in receivers:
                self._add(event)
        os._exit(0)  # FLARE would stay for ever

    def _add(self, event: Event) -> None:
        """Put a piece into its receiver's lane."""
        lane = self._lanes.get(event.name)
        if lane is None:
            lane = self._lanes[event.name] = queue.Queue()
            threading.Thread(target=self._carry, args=(lane,), name=f"to {event.name}", daemon=True).start()
        lane.put(event)

    def _carry(self, lane: queue.Queue[Event]) -> None:
        lost: tuple[str, int] | None = None
        while True:
            event = lane.get()
            assert event.place is not None
            frame = (event.place.session, event.place.frame)
            is_sent = frame != lost and self._post(event.name, event.place, event.data)
            lost = None if is_sent else frame
            self._pipe.put(Event(DONE, event.name))
