"""What carries frames between the server and the sites, and proves who sent them.

A link is one end: the server's, which sends to sites by name, or a site's, which sends to :data:`SERVER` alone. It
knows nothing of what it carries. Frames to one receiver arrive in the order of sending, or not at all: whoever needs an
answer asks again (see ``sites_engine`` and ``site_worker``), so a link need not keep what a broken connection lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from queue import Full, Queue
from typing import Protocol

from fedloom.federation.blob import Checked
from fedloom.federation.buffers import Buffer, Buffers, num_bytes

SERVER = "server"
"""Name of the server, as a site's link sends to it and names it as the sender."""

CONNECTED = b""
"""What a site's link puts into its inbox, as of :data:`SERVER`, after every new connection: the site greets at once.

A site greets every few seconds besides, so a link that cannot tell loses seconds, no more.
"""

SEND_SECONDS = 20.0
"""The longest that a call of :meth:`Link.send` may take."""

Frame = Buffer | Buffers
"""A frame to be sent: in one place, or in several, so that a large body need not be copied behind its head."""


def size_of(frame: Frame) -> int:
    """Return how many bytes a frame has."""
    return num_bytes(frame) if isinstance(frame, list) else len(frame)


class Link(Protocol):
    """One end of the connections between the server and the sites."""

    inbox: Queue[tuple[str, Frame | Checked]]
    """(proven name of the sender, frame); at a site the sender is :data:`SERVER`. Checked: its hashes fit."""

    connections: Counter[str]
    """How often each other end has connected; one that does so again and again may be two processes of one name."""

    def send(self, to: str, frame: Frame) -> bool:
        """Send a frame, or return False where the receiver cannot be reached now.

        It never raises, and never waits longer than :data:`SEND_SECONDS`. True says that the frame is on its way, not
        that it arrived.
        """
        ...

    def close(self) -> None:
        """End every connection of this end."""
        ...


def offered(outbox: Queue[Frame | None], frame: Frame) -> bool:
    """Put a frame into an outbox; False where what waits in it is not taken out in time."""
    try:
        outbox.put(frame, timeout=SEND_SECONDS / 2)
    except Full:
        return False
    return True


def cut(frame: Frame, size: int) -> Iterator[tuple[Buffers, bool]]:
    """Yield a frame's pieces of at most so many bytes, each in buffers, and whether it is the last one."""
    parts = [memoryview(part) for part in (frame if isinstance(frame, list) else [frame]) if len(part) > 0]
    left, piece, room = sum(map(len, parts)), Buffers(), size
    for part in parts:
        while part:
            taken, part = part[:room], part[room:]
            piece.append(taken)
            room, left = room - len(taken), left - len(taken)
            if room == 0 and left > 0:
                yield piece, False
                piece, room = Buffers(), size
    yield piece, True
