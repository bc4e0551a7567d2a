"""Locks on open files, as Linux and macOS have them. Elsewhere a run is refused in one line, and imports work."""

from __future__ import annotations

import sys

from fedloom.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check_locks() -> None:
    """Refuse a system without such locks, before anything is written.

    Raises:
        RunError: it has none.
    """
    if fcntl is None:
        raise RunError(
            f"expected a system whose files can be locked (Linux or macOS), this is {sys.platform}; run fedloom in a "
            "container or in WSL"
        )


def lock_file(descriptor: int, *, shared: bool = False, waits: bool = False) -> None:
    """Hold a lock until the descriptor is closed.

    Raises:
        BlockingIOError: another process holds it, and ``waits`` is false.
        RunError: the system has no such locks.
    """
    check_locks()
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(descriptor, kind if waits else kind | fcntl.LOCK_NB)
