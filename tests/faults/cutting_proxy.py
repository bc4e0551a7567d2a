"""Carries connections on loopback to a port, and can cut them all, or carry nothing for a while."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading

_CHUNK = 1 << 16


class CuttingProxy:
    """Listens at ``port`` of loopback, for connections to another port."""

    def __init__(self, to: int) -> None:
        self._to, self._open, self._lock = to, set[socket.socket](), threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self._heard = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._heard.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection as a router does that forgets them: with a reset."""
        with self._lock:
            ending = list(self._open)
        for end in ending:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Carry nothing, and keep every connection open, until :meth:`go_on`."""
        self._flows.clear()

    def go_on(self) -> None:
        """Carry again."""
        self._flows.set()

    def close(self) -> None:
        """End it."""
        self._flows.set()
        with contextlib.suppress(OSError):
            self._heard.shutdown(socket.SHUT_RDWR)
        self._heard.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._heard.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as far:
            with self._lock:
                self._open |= {near, far}
            try:
                while True:
                    for end in select.select([near, far], [], [])[0]:
                        self._flows.wait()
                        data = end.recv(_CHUNK)
                        if not data:
                            return
                        (far if end is near else near).sendall(data)
            finally:
                with self._lock:
                    self._open -= {near, far}
