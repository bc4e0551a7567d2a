"""What tests of links and of sites' commands share: waits, frames that came, free ports, files of settings."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedloom.sites.link import CONNECTED, SERVER, Link


def wait(condition: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait until a condition holds, and fail where it does not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def frames(link: Link, number: int) -> list[tuple[str, Any]]:
    """Return the next frames at an end of a link, without those that only say that it is connected."""
    found: list[tuple[str, Any]] = []
    while len(found) < number:
        sender, data = link.inbox.get(timeout=90)
        if (sender, data) != (SERVER, CONNECTED):
            found.append((sender, data))
    return found


def free_port() -> int:
    """Return a port of loopback at which nobody listens.

    It is none that the system hands out by itself (from 32768 on Linux, 49152 elsewhere): a server that is killed and
    started again finds its port as it left it, whatever else dials out in between.
    """
    while True:
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", secrets.randbelow(12_000) + 20_000))
            return int(free.getsockname()[1])


def write_toml(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write tables of plain values, and of tables of them on a line."""

    def shown(value: Any) -> str:
        if not isinstance(value, dict):
            return json.dumps(value)
        return "{" + ", ".join(f"{key} = {json.dumps(one)}" for key, one in value.items()) + "}"

    lines = (f"[{n}]\n" + "".join(f"{key} = {shown(v)}\n" for key, v in table.items()) for n, table in tables.items())
    path.write_text("".join(lines), encoding="utf-8")
    return path
