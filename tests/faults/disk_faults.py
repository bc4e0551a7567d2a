"""Die, or be refused, at the n-th change of the disk: what a killed process and a full disk do to a command.

A change is a file opened to be written, a write, a sync, a rename, a removal, a new folder, a link, a cut or a change
of mode, inside one folder and by the main thread. Python tells of most by its audit hooks, which a fork can set
without a trace in its parent; writes, syncs, safetensors and SQLite are wrapped. A write that meets its fault is half
done.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sqlite3
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

KILLED = 137
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
_REMOVALS = ("os.remove", "os.rmdir", "os.chmod", "os.truncate")
"""What a full disk, or one that takes no more, still allows."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class DiskFault:
    """What happens to the change number ``at`` (from 0) inside ``root``: the end, or the error ``number``.

    From then on every change but a removal meets the same error, as on a disk that is full. ``at`` None only counts.
    """

    root: str
    at: int | None = None
    number: int | None = None
    changes: list[str] = field(default_factory=list)

    def meet(self, kind: str, path: Any, half: Callable[[], object] = lambda: None) -> None:
        """Count a change, and let it meet the fault where it is its turn; ``half`` does a part of it first."""
        name = os.path.join(os.getcwd(), os.fsdecode(path))  # noqa: PTH109, PTH118 - a Path would be told to the hook
        if not name.startswith(self.root) or threading.current_thread() is not threading.main_thread():
            return
        self.changes.append(f"{kind} {name[len(self.root) + 1 :]}")
        turn = len(self.changes) - 1
        if self.at is None or turn < self.at or (turn > self.at and kind in _REMOVALS):
            return
        if turn == self.at:
            half()
        if self.number is None:
            os._exit(KILLED)
        raise _refusal(kind, self.number, name)

    def install(self) -> None:
        """Watch this process from here to its end."""
        sys.addaudithook(self._audit)
        real_open, real_connect, real_serialise = io.open, sqlite3.connect, safetensors.torch.serialize_file

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set("wax+") & set(mode) or isinstance(file, int) or options.get("opener"):
                return real_open(file, mode, *arguments, **options)
            return self._opened(file, mode, *arguments, **options)

        def serialised(tensors: Any, filename: Any, metadata: Any = None) -> None:
            def half() -> None:
                real_serialise(tensors, filename, metadata=metadata)
                os.truncate(filename, os.stat(filename).st_size // 2)  # noqa: PTH116

            self.meet("safetensors", filename, half)
            real_serialise(tensors, filename, metadata=metadata)

        io.open = builtins.open = opened  # type: ignore[assignment]
        safetensors.torch.serialize_file = serialised
        sqlite3.connect = lambda path, **named: real_connect(path, factory=self._connection(path), **named)  # type: ignore
        # A killed process loses nothing that the kernel holds: what a sync is for is a power failure.
        os.fsync = lambda descriptor: self.meet("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))  # type: ignore  # noqa: PTH115

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and flags & _WRITING:
                self.meet(event, path)
        elif event in _EVENTS:
            path, descriptor = arguments[0], arguments[-1]
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")  # noqa: PTH115
            elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod") and descriptor not in (-1, None):
                path = f"{os.readlink(f'/proc/self/fd/{descriptor}')}/{os.fsdecode(path)}"  # noqa: PTH115
            self.meet(event, path)

    def _opened(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        fault, path = self, os.fspath(file)

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                fault.meet("write", path, lambda: super(Raw, self).write(memoryview(data)[: len(data) // 2]))
                return super().write(data)

        raw = Raw(path, mode.replace("b", "").replace("t", ""))
        whole: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return whole if "b" in mode else io.TextIOWrapper(whole, encoding, errors, newline)

    def _connection(self, path: Any) -> type[sqlite3.Connection]:
        fault = self

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
                if not statement.startswith(("SELECT", "PRAGMA table_info", "PRAGMA user_version;")):
                    fault.meet("sqlite", path)
                return super().execute(statement, *arguments)

            def __exit__(self, *arguments: Any) -> Any:
                if self.in_transaction:
                    fault.meet("sqlite commit", path)
                return super().__exit__(*arguments)

        return Connection


def _refusal(kind: str, number: int, name: str) -> Exception:
    if kind == "safetensors":
        return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    if kind.startswith("sqlite"):
        full = number in (errno.ENOSPC, errno.EDQUOT)
        return sqlite3.OperationalError("database or disk is full" if full else "disk I/O error")
    return OSError(number, os.strerror(number), name)
