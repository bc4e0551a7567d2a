"""What a site must not lose, in its folder: the side, its memory before and after the last answer, and the ledger.

    runs/<run>/state.safetensors   side, both memories, the answer; one file, replaced in one step
    asked/<sheet>.json             every sheet that was sent
    confirmed/<sheet>              a person has agreed to the sheet of that hash
    ledger.jsonl                   every task and what came of it

The memory after an answer counts only once the server says that the answer did; see :meth:`Recall.settled`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloom.clients.memory import Memory, decode_memories, encode_memories
from fedloom.errors import AdapterError, RunError
from fedloom.federation.buffers import Buffers, num_bytes
from fedloom.lora.pair import Adapter
from fedloom.run_folder import durable

_STATE = "state.safetensors"
_DAMAGE = (OSError, SafetensorError, AdapterError, ValueError, KeyError, TypeError)
_RETRY = "free space or mend the disk; the site takes part again from where it is"


@dataclass(frozen=True, eq=False)
class Recall:
    """What a site remembers of a run.

    Attributes:
        version, side: the side it holds, of the last task it answered.
        kept: its memory before its last answer; ``last`` the one after.
        round, task: of that answer, which itself lies on disk alone; round 0 is none.
    """

    version: int = 0
    side: Adapter = field(default_factory=Adapter)
    kept: Memory = field(default_factory=Memory)
    last: Memory = field(default_factory=Memory)
    round: int = 0
    task: str = ""

    def settled(self, counted: int) -> Recall:
        """Return this once it is known whether the last answer counted: its memory is kept, or never was."""
        if self.round == 0:
            return self
        return replace(self, kept=self.last if counted >= self.round else self.kept)


class Store:
    """One run's part of a site's folder."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._answer_at = folder / "runs" / run, 0
        with durable.explained(str(self._folder), _RETRY):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @classmethod
    def has_room(cls, folder: Path, run: str) -> bool:
        """Tell whether a run's part can be made, or is there."""
        try:
            cls(folder, run)
        except RunError:
            return False
        return True

    def read(self) -> Recall:
        """Return what is remembered; nothing where there is no file, or one that is damaged.

        A site that has lost its memory is sent the whole side and goes on.
        """
        path = self._folder / _STATE
        try:
            return _decode(path.read_bytes())[0]
        except _DAMAGE:
            return Recall()

    def answer(self, task: str) -> bytes | None:
        """Return the answer to a task, where it is the last one and undamaged."""
        try:
            recall, answer = _decode((self._folder / _STATE).read_bytes())
        except _DAMAGE:
            return None
        return answer if recall.task == task else None

    def write(self, recall: Recall, answer: Buffers) -> None:
        """Replace what is remembered, and the answer, in one step.

        Raises:
            RunError: the disk refused.
        """
        parts = _encode(recall, answer)
        _keep(self._folder / _STATE, lambda path: durable.write_bytes(path, *parts))
        self._answer_at = num_bytes(parts) - num_bytes(answer)

    def opened(self) -> tuple[int, int] | None:
        """Return the file that was written last, open, and where the answer begins in it; None where it was removed."""
        try:
            return os.open(self._folder / _STATE, os.O_RDONLY), self._answer_at
        except OSError:
            return None


def _keep(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file into a folder that is made for it, and that its owner may remove at any moment.

    Raises:
        RunError: the disk refused, or the folder was removed twice while the file was written.
    """
    with durable.explained(str(path), _RETRY):
        for _ in range(2):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                return write(path)
            except FileNotFoundError:
                continue
    raise RunError(f"cannot write {path}: its folder is removed while the site runs; leave it in place")


def _encode(recall: Recall, answer: Buffers) -> Buffers:
    numbers = {
        "version": recall.version,
        "kept": recall.kept.version,
        "last": recall.last.version,
        "round": recall.round,
        "task": recall.task,
    }
    tensors: dict[str, Tensor] = {f"side/{key}": t.contiguous() for key, t in recall.side.as_tensors().items()}
    memories = encode_memories({0: recall.kept, 1: recall.last}) or b""
    head = save(tensors, metadata={"numbers": json.dumps(numbers)})
    found = Buffers()
    for part in (Buffers([head]), Buffers([memories]), answer):
        found += [num_bytes(part).to_bytes(8, "little"), *part]
    return found


def _decode(data: bytes) -> tuple[Recall, bytes]:
    parts: list[bytes] = []
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 8], "little")
        parts.append(data[start + 8 : start + 8 + size])
        if len(parts[-1]) != size:
            raise ValueError("cut short")
        start += 8 + size
    head, memories, answer = parts
    length = int.from_bytes(head[:8], "little")
    numbers = json.loads(json.loads(head[8 : 8 + length])["__metadata__"]["numbers"])
    side = Adapter.from_tensors({key.removeprefix("side/"): tensor for key, tensor in load(head).items()})
    found = decode_memories(memories) if memories else {}
    kept, last = (
        replace(found.get(place, Memory()), version=numbers[key]) for place, key in ((0, "kept"), (1, "last"))
    )
    return Recall(numbers["version"], side, kept, last, numbers["round"], numbers["task"]), answer


class Ledger:
    """A site's own record of every task: what was asked, what was done, what was refused and why."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.jsonl"

    def add(self, **entry: Any) -> None:
        """Append one line, with the time.

        Raises:
            RunError: the disk refused.
        """
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entry}
        _keep(self.path, lambda path: durable.append_line(path, line))

    def entries(self) -> list[Mapping[str, Any]]:
        """Return every line, without one that was cut off.

        Raises:
            RunError: the file cannot be read.
        """
        if not self.path.exists():
            return []
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise RunError(f"{self.path}: expected the ledger, got {error.strerror}; check its rights") from error
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


def confirmation(folder: Path, sheet_sha256: str) -> Path:
    """Return the file whose presence says that a person agreed to the run of a sheet, as it says it is."""
    return folder / "confirmed" / sheet_sha256


def keep_asked(folder: Path, sheet_sha256: str, body: bytes) -> None:
    """Keep a sheet for the site's owner to read and agree to.

    Raises:
        RunError: the disk refused.
    """
    _keep(folder / "asked" / f"{sheet_sha256}.json", lambda path: durable.write_bytes(path, body))


def unconfirmed(folder: Path) -> list[tuple[str, bytes]]:
    """Return the sheets, with their hashes, that nobody has agreed to yet, the latest last."""
    found = sorted((folder / "asked").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return [(path.stem, path.read_bytes()) for path in found if not confirmation(folder, path.stem).exists()]


def confirm(folder: Path, sheet_sha256: str) -> None:
    """Agree to a sheet.

    Raises:
        RunError: the disk refused.
    """
    _keep(confirmation(folder, sheet_sha256), lambda path: durable.write_bytes(path, b""))


def unconfirm(folder: Path, sheet_sha256: str) -> None:
    """Ask a person anew about a sheet.

    Raises:
        RunError: the disk refused.
    """
    path = confirmation(folder, sheet_sha256)
    with durable.explained(str(path), _RETRY):
        path.unlink(missing_ok=True)
