"""Stop Python code that runs too long, in whatever thread it runs, at a cost of a microsecond a call."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOOKS_EVERY_SECONDS = 0.2


class TookTooLong(BaseException):
    """Raised in the limited code; no ``except Exception`` in it can swallow this."""


class _Watch:
    """One thread that looks after the deadlines of all others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}
        self._raised: set[int] = set()
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        with self._lock:
            self._deadlines[threading.get_ident()] = time.monotonic() + seconds
            # A forked child has no such thread, and starts its own.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, name="time limits", daemon=True)
                self._thread.start()

    def end(self) -> None:
        with self._lock:
            self._deadlines.pop(threading.get_ident(), None)
            late = threading.get_ident() in self._raised
            self._raised.discard(threading.get_ident())
        if late:
            # Raised just now, it may still be on its way: it arrives here rather than in what comes after.
            time.sleep(2 * _LOOKS_EVERY_SECONDS)

    def _look(self) -> None:
        while True:
            time.sleep(_LOOKS_EVERY_SECONDS)
            with self._lock:
                now = time.monotonic()
                for thread in [one for one, deadline in self._deadlines.items() if now > deadline]:
                    del self._deadlines[thread]
                    self._raised.add(thread)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))


_WATCH = _Watch()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLong` in the block once it has run for ``seconds``; a call of C code ends first.

    Limits cannot be nested.
    """
    _WATCH.begin(seconds)
    try:
        yield
    finally:
        _WATCH.end()
