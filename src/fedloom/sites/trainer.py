"""The process that holds a site's base, and its parent's handle on it.

The parent keeps the connection; a crash in here (of a driver, or for lack of memory) costs a task and not the
membership. Frames go through two pipes, and large ones in shared memory (see ``handover``); the first one holds the
site's settings. Standard output is the log's, so nothing a library prints can be taken for a frame.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Protocol

from fedloom.errors import UpdateError
from fedloom.federation.buffers import Buffers
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.frames import TO_SITE, Body, Ready, Result, Score, SheetSent, Task, frame, framed, unframe_here
from fedloom.sites.handover import Channel, SharedRoom, Stored
from fedloom.sites.link import Frame
from fedloom.sites.site_settings import SiteSettings, resolve_site
from fedloom.sites.split_frames import SplitToSite, Updates
from fedloom.sites.sum_frames import SumAsked

_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""A trainer asks the system for large pages: tensors in memory that is new are filled in a third of the time."""


class Heard:
    """A frame of the parent, which has checked it: its head, and its body until somebody takes it."""

    def __init__(self, head: Any, body: Body) -> None:
        self.head, self._body = head, body

    def take(self) -> Body:
        """Return the body, and let go of it: it is large, and training needs the memory."""
        body, self._body = self._body, memoryview(b"")
        return body


class TrainerHandle(Protocol):
    """What a site's worker knows of the process that trains."""

    def send(self, data: Frame) -> None:
        """Give it a frame; what becomes of it comes back as a frame, or as the end of the process."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class Trainer:
    """Answers frames: a sheet by whether the site is ready, a task by a result, an adapter to score by two sums."""

    def __init__(self, site: SiteSettings, reply: Callable[[Frame], None], note: Callable[[str], None]) -> None:
        self._site, self._reply, self._note = site, reply, note
        self._newest = 0
        self._max_body = site.policy.max_message_mib << 20
        self._run: object | None = None

    def hear(self, data: Frame) -> Heard:
        """Read a frame that is to wait, from another thread: a newer round stops an older one between two steps."""
        head, body = unframe_here(data, TO_SITE, self._max_body)
        if isinstance(head, Task):
            self._newest = max(self._newest, head.round)
        return Heard(head, body)

    def handle(self, heard: Heard) -> None:
        """Answer one frame."""
        head = heard.head
        from fedloom.sites.site_training import SiteTraining
        from fedloom.sites.split_training import SplitTraining

        if isinstance(head, SheetSent):
            self._run = None
            self._reply(frame(self._opened(head, bytes(heard.take()))))
        elif isinstance(self._run, SiteTraining) and head.run == self._run.sheet.run:
            if isinstance(head, Task):
                result, answer = self._run.answer(head, heard.take)
                self._reply(frame(self._run.ready()))  # what it holds now, for whoever asks next
                self._reply(_answer(result, answer, self._run.stored()) if answer else frame(result))
            elif isinstance(head, Score):
                self._reply(frame(self._run.score(head, heard.take)))
            elif isinstance(head, SumAsked):
                self._reply(frame(*self._run.summed(head, heard.take)))
        elif isinstance(self._run, SplitTraining) and isinstance(head, SplitToSite):
            found = self._run.answer(head, heard.take())
            if found is not None and isinstance(found[0], Updates):
                self._reply(frame(self._run.ready()))
            if found is not None:
                self._reply(frame(*found))

    def _opened(self, head: SheetSent, body: bytes) -> Ready:
        from fedloom.sites.sheet import read_sheet
        from fedloom.sites.split_training import opened_run

        found = sha256(body).hexdigest()
        try:
            sheet = read_sheet(body, head.run)
        except UpdateError as error:
            self._note(str(error))
            return Ready(run=head.run, sheet=found, refusal=Refusal(code="sheet"))
        self._newest = 0
        self._run = opened = opened_run(self._site, sheet, found, lambda: self._newest, self._note)
        return opened.ready()


def _answer(result: Result, answer: Buffers, place: tuple[int, int] | None) -> Frame:
    """Return an answer as a frame, with the place in a file where it lies too."""
    found = framed(result, answer)
    return found if place is None else Stored(found, *place)


class TrainerProcess:
    """A trainer in a process of its own."""

    def __init__(
        self,
        site: SiteSettings,
        reply: Callable[[Frame], None],
        ended: Callable[[int], None],
        room: SharedRoom | None = None,
    ) -> None:
        """Start it; what the link has put into ``room`` is handed over as it lies there."""
        read_end, write_end = os.pipe()
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedloom.sites.trainer", str(write_end), str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=2,
            pass_fds=(write_end, theirs.fileno()),
            env={**_LARGE_PAGES, **os.environ},
            start_new_session=True,  # ctrl-c is the parent's to answer
        )
        os.close(write_end)
        theirs.close()
        assert self._process.stdin is not None
        self._from = os.fdopen(read_end, "rb")
        self._channel, self._room = Channel(self._from, self._process.stdin, ours), room
        self._reply, self._ended, self._is_closed = reply, ended, False
        if room is not None:
            room.forget()  # another trainer may have ended while a frame in it was its own
        threading.Thread(target=self._listen, name="trainer", daemon=True).start()
        self.send(json.dumps(site.model_dump(mode="json")).encode())

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def send(self, data: Frame) -> None:
        """Give it a frame; one that its end makes impossible is told as its end."""
        try:
            self._channel.put(data, self._room)
        except (OSError, ValueError):
            return

    def close(self) -> None:
        """End it."""
        self._is_closed = True
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def _listen(self) -> None:
        with self._from:
            while (data := self._channel.get()) is not None:
                self._reply(data)
                del data  # while the next one is waited for, this one is not held
        code = self._process.wait()
        self._channel.close()
        if not self._is_closed:
            self._ended(code)


def main(write_end: int, descriptors: int) -> None:
    """Train until the parent ends or says so."""
    channel = Channel(sys.stdin.buffer, os.fdopen(write_end, "wb"), socket.socket(fileno=descriptors))
    given = channel.get()
    if given is None:
        return
    assert not isinstance(given, list)
    site = resolve_site(json.loads(bytes(given)), "the site's settings")
    from fedloom.models.threads import compute_with

    compute_with(site.site.threads)
    trainer = Trainer(site, channel.put, _log)
    waiting: queue.Queue[Heard] = queue.Queue()

    def listen() -> None:
        while (data := channel.get()) is not None:
            waiting.put(trainer.hear(data))
            del data
        os._exit(0)  # the parent is gone: nobody would be told what a step in progress comes to

    threading.Thread(target=listen, daemon=True).start()
    while True:
        trainer.handle(waiting.get())


def _log(text: str) -> None:
    with contextlib.suppress(OSError):  # a full log ends no training
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
