"""How a site and the process that trains there hand each other frames: through pipes, or in memory that both map.

A small frame goes through a pipe, behind its length. What is large lies in a file already, on disk or in memory alone:
the file's descriptor is handed over, and the other end maps it. So an answer is sent from where it was stored, and a
task is read where the link has put it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import weakref
from typing import IO, Any

import numpy as np

from fedloom.federation.buffers import Buffer, Buffers, num_bytes, room_for
from fedloom.sites.frames import LARGE_BYTES
from fedloom.sites.link import Frame

_PIPE_BYTES = 1 << 20
_LENGTH, _PLACE = struct.Struct("<Q"), struct.Struct("<QQB")
_ELSEWHERE = 1 << 63
"""Marks the length of a frame whose end lies in a file."""
_OF_A_FILE, _OF_NEW_ROOM, _OF_THE_ROOM = range(3)
_FREE, _TAKEN = 0, 1
_BEFORE = mmap.PAGESIZE
"""In shared memory the first page's first byte says whether a frame lies behind it."""


class Stored(list[Buffer]):
    """A frame's buffers, of which all but the first lie in a file as well, from an offset on."""

    def __init__(self, frame: Buffers, descriptor: int, offset: int) -> None:
        """Take over the descriptor; it is closed with this frame."""
        super().__init__(frame)
        self.descriptor, self.offset = descriptor, offset
        weakref.finalize(self, os.close, descriptor)


class _Memory:
    """Memory that two processes map."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.mapped = mmap.mmap(descriptor, 0)

    def frame(self, size: int) -> memoryview:
        """Return the frame in it; once nobody here uses that any more, the memory is free, unless it was let go."""
        whole = np.frombuffer(self.mapped, np.uint8, size, _BEFORE)
        self.end = weakref.finalize(whole, _set, self.mapped, _FREE)
        self.end.atexit = False
        return whole.data


def _set(mapped: mmap.mmap, value: int) -> None:
    mapped[0] = value


class SharedRoom:
    """Room for one large frame at a time, which a link fills and the process that trains reads.

    It is kept for the next one: memory that is new takes longer to fill than to copy from.
    """

    def __init__(self) -> None:
        self._memory: _Memory | None = None
        self._frame: weakref.ref[Any] | None = None
        self._is_known = False

    def __call__(self, size: int) -> memoryview:
        """Return memory for so many bytes: shared where that pays and is not in use."""
        if size < LARGE_BYTES or not hasattr(os, "memfd_create"):
            return room_for(size)
        memory = self._memory
        if memory is not None and memory.mapped[0] == _TAKEN:
            return room_for(size)
        if memory is None or len(memory.mapped) < _BEFORE + size:
            try:
                memory = self._new(_BEFORE + size)
            except OSError:  # no more files, or no such memory here
                return room_for(size)
        _set(memory.mapped, _TAKEN)
        frame = memory.frame(size)
        self._frame = weakref.ref(frame.obj)
        return frame

    def let_go(self, frame: Frame) -> tuple[_Memory, bool] | None:
        """Return the memory that a frame fills, and whether it is new to the other end, whose the frame is from now on.

        None where it lies elsewhere.
        """
        whole = frame.obj if isinstance(frame, memoryview) else None
        if whole is None or self._frame is None or whole is not self._frame() or self._memory is None:
            return None
        self._memory.end.detach()
        is_new, self._is_known = not self._is_known, True
        return self._memory, is_new

    def forget(self) -> None:
        """Take new memory for the next frame: the process that used this one has ended."""
        self._memory, self._frame = None, None

    def _new(self, size: int) -> _Memory:
        descriptor = os.memfd_create("frame")
        os.ftruncate(descriptor, size)
        self._memory, self._is_known = _Memory(descriptor), False
        return self._memory


class Channel:
    """One end: a pipe to read from, one to write to, and a socket for descriptors."""

    def __init__(self, source: IO[bytes], sink: IO[bytes], descriptors: socket.socket) -> None:
        self._source, self._sink, self._descriptors = source, sink, descriptors
        self._memory: _Memory | None = None
        with contextlib.suppress(ImportError, OSError, AttributeError):  # not every system can, nor lets everybody
            import fcntl

            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # a large frame changes hands less often

    def put(self, frame: Frame, room: SharedRoom | None = None) -> None:
        """Hand a frame over.

        Raises:
            OSError, ValueError: the other end is gone.
        """
        if isinstance(frame, Stored) and num_bytes(frame) >= LARGE_BYTES:
            self._send(frame.descriptor)
            self._put_place(frame[0], frame.offset, num_bytes(frame[1:]), _OF_A_FILE)
        elif room is not None and (found := room.let_go(frame)) is not None:
            memory, is_new = found
            if is_new:
                self._send(memory.descriptor)
            self._put_place(b"", _BEFORE, len(frame), _OF_NEW_ROOM if is_new else _OF_THE_ROOM)
        else:
            parts = frame if isinstance(frame, list) else [frame]
            self._sink.write(_LENGTH.pack(num_bytes(parts)))
            for part in parts:
                self._sink.write(part)
            self._sink.flush()

    def get(self) -> Frame | None:
        """Return the next frame; None at the end, within a frame too."""
        try:
            return self._next()
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Close what leads to the other end."""
        with contextlib.suppress(OSError):  # what is left in its buffer has no reader any more
            self._sink.close()
        self._descriptors.close()

    def _next(self) -> Frame | None:
        length = self._source.read(_LENGTH.size)
        if len(length) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack(length)
        if size & _ELSEWHERE:
            return self._mapped(size & ~_ELSEWHERE)
        data = room_for(size)
        return data if self._source.readinto(data) == len(data) else None  # type: ignore[attr-defined]

    def _put_place(self, beginning: Buffer, offset: int, size: int, kind: int) -> None:
        self._sink.write(_LENGTH.pack(len(beginning) | _ELSEWHERE) + _PLACE.pack(offset, size, kind) + beginning)
        self._sink.flush()

    def _mapped(self, num_before: int) -> Frame | None:
        place, beginning = self._source.read(_PLACE.size), self._source.read(num_before)
        if len(place) < _PLACE.size or len(beginning) < num_before:
            return None
        offset, size, kind = _PLACE.unpack(place)
        if kind == _OF_NEW_ROOM:
            self._memory = _Memory(self._received())
        if kind in (_OF_NEW_ROOM, _OF_THE_ROOM):
            assert self._memory is not None
            return self._memory.frame(size)
        descriptor = self._received()
        try:
            mapped = mmap.mmap(descriptor, offset + size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        return [beginning, memoryview(mapped)[offset:]]

    def _send(self, descriptor: int) -> None:
        socket.send_fds(self._descriptors, [b"."], [descriptor])

    def _received(self) -> int:
        _, (descriptor,), _, _ = socket.recv_fds(self._descriptors, 1, 1)
        return descriptor
