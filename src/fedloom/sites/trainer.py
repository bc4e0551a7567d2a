"""The process that holds a site's base, and its parent's handle on it.

The parent keeps the connection; a crash in here (of a driver, or for lack of memory) costs a task and not the
membership. Frames go through two pipes, each behind its length; the first one holds the site's settings. Standard
output is the log's, so nothing a library prints can be taken for a frame.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from typing import IO, Any, Protocol

from fedloom.errors import UpdateError
from fedloom.federation.buffers import Buffer, num_bytes, room_for
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.frames import TO_SITE, Body, Ready, Score, SheetSent, Task, frame, framed, unframe_here
from fedloom.sites.link import Frame
from fedloom.sites.site_settings import SiteSettings, resolve_site
from fedloom.sites.split_frames import SplitToSite, Updates

_LENGTH_BYTES, _PIPE_BYTES = 8, 1 << 20


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

    def send(self, data: Buffer) -> None:
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

    def hear(self, data: Buffer) -> Heard:
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
                self._reply(framed(result, answer) if answer else frame(result))
            elif isinstance(head, Score):
                self._reply(frame(self._run.score(head, heard.take)))
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


class TrainerProcess:
    """A trainer in a process of its own."""

    def __init__(self, site: SiteSettings, reply: Callable[[Buffer], None], ended: Callable[[int], None]) -> None:
        read_end, write_end = os.pipe()
        _widen(write_end)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedloom.sites.trainer", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=2,
            pass_fds=(write_end,),
            start_new_session=True,  # ctrl-c is the parent's to answer
        )
        os.close(write_end)
        assert self._process.stdin is not None
        _widen(self._process.stdin.fileno())
        self._to, self._from = self._process.stdin, os.fdopen(read_end, "rb")
        self._reply, self._ended, self._is_closed = reply, ended, False
        threading.Thread(target=self._listen, name="trainer", daemon=True).start()
        self.send(json.dumps(site.model_dump(mode="json")).encode())

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def send(self, data: Buffer) -> None:
        """Give it a frame; one that its end makes impossible is told as its end."""
        try:
            _write(self._to, data)
        except (OSError, ValueError):
            return

    def close(self) -> None:
        """End it."""
        self._is_closed = True
        self._process.kill()
        self._process.wait()
        self._close_pipe()

    def _listen(self) -> None:
        with self._from:
            while (data := _read(self._from)) is not None:
                self._reply(data)
                del data  # while the next one is waited for, this one is not held
        code = self._process.wait()
        self._close_pipe()
        if not self._is_closed:
            self._ended(code)

    def _close_pipe(self) -> None:
        with contextlib.suppress(OSError):  # what is left in its buffer has no reader any more
            self._to.close()


def _widen(pipe: int) -> None:
    """Let a pipe hold as much as any process may ask for: a large frame changes hands less often."""
    with contextlib.suppress(OSError, AttributeError):  # not every system can, nor lets everybody
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _write(stream: IO[bytes], data: Buffer | Frame) -> None:
    parts = data if isinstance(data, list) else [data]
    stream.write(num_bytes(parts).to_bytes(_LENGTH_BYTES, "little"))
    for part in parts:
        stream.write(part)
    stream.flush()


def _read(stream: Any) -> Buffer | None:
    """Return the next frame; None at the end, within a frame too."""
    length = stream.read(_LENGTH_BYTES)
    if len(length) < _LENGTH_BYTES:
        return None
    data = room_for(int.from_bytes(length, "little"))
    return data if stream.readinto(data) == len(data) else None


def main(write_end: int) -> None:
    """Train until the parent ends or says so."""
    source, replies = sys.stdin.buffer, os.fdopen(write_end, "wb")
    given = _read(source)
    if given is None:
        return
    site = resolve_site(json.loads(bytes(given)), "the site's settings")
    from fedloom.models.threads import compute_with

    compute_with(site.site.threads)
    trainer = Trainer(site, lambda data: _write(replies, data), _log)
    waiting: queue.Queue[Heard] = queue.Queue()

    def listen() -> None:
        while (data := _read(source)) is not None:
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
    main(int(sys.argv[1]))
