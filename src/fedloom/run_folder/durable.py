"""Files that survive a crash: written beside their place, synced, then moved there in one step.

A reader sees the old file or the new one, never half of either; the same holds after a power failure, because data
reaches the disk before the name does. What is half-written is locked by its process; what a killed one left is not, and
is removed by the next that writes the same file.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedloom.errors import FedloomError, RunError
from fedloom.run_folder.locks import lock_file

TEMPORARY = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST}
_REFUSED |= {errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ESTALE}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def temporary_name(parent: Path, name: str = "") -> Path:
    """Return an unused name inside ``parent`` for what becomes ``name``; a later start recognises it as left over."""
    return parent / f"{_beginning(name)}{uuid.uuid4().hex}"


def _beginning(name: str) -> str:
    short = name.encode(errors="replace")[:100].decode(errors="ignore")
    return f"{TEMPORARY}{short}-" if name else TEMPORARY


def write_bytes(path: Path, *data: bytes | bytearray | memoryview) -> None:
    """Replace the file ``path`` by ``data``, one part after another, in one step."""
    remove_leftovers(path.parent, path.name)
    temporary = temporary_name(path.parent, path.name)
    try:
        with _held_file(temporary) as file:
            for part in data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:  # an interruption too: whatever happens, no half-written file stays behind
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_line(path: Path, value: Any) -> None:
    """Append ``value`` as a line of JSON, and sync it; a reader may find a line cut off, and never the one after it."""
    with path.open("ab+") as file:
        is_cut_off = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write((b"\n" if is_cut_off else b"") + encode_json(value).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Replace the file ``path`` by ``value`` as indented JSON, in one step."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return ``value`` as the content of an indented JSON file."""
    return (encode_json(value, indent=2) + "\n").encode()


@contextmanager
def temporary_folder(parent: Path, name: str = "") -> Iterator[Path]:
    """Yield a new folder in ``parent`` for what becomes ``name``, and remove it unless it was renamed."""
    if name:
        remove_leftovers(parent, name)
    folder = temporary_name(parent, name)
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _hold(descriptor)
        yield folder
    finally:
        os.close(descriptor)
        discard(folder)


def remove_leftovers(parent: Path, name: str = "") -> None:
    """Remove what killed processes left half-written in ``parent``: of ``name``, or of every file."""
    with suppress(OSError):  # a folder that cannot be listed, an entry of somebody else's: nothing depends on it
        for entry in sorted(parent.iterdir()):
            if entry.name.startswith(_beginning(name)):
                _discard_unheld(entry)


def _discard_unheld(entry: Path) -> None:
    """Remove a half-written entry unless its process lives."""
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # a link, or gone
        discard(entry)
        return
    try:
        lock_file(descriptor)
        discard(entry)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)


@contextmanager
def _held_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, locked for as long as it is open."""
    while True:
        with path.open("wb") as file:
            _hold(file.fileno())
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return
        # Another process took it for left over, in the moment before it was locked.


def _hold(descriptor: int) -> None:
    with suppress(OSError):  # not every file system has locks
        lock_file(descriptor, waits=True)


def file_sha256(path: Path) -> str:
    """Return the hash of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_file(path: Path, beginning: str, kind: str, remedy: str) -> None:
    """Reject a place that holds anything but an earlier file of a kind, which begins so.

    Raises:
        RunError: it does; the file would be lost.
    """
    mark = beginning.encode()
    if path.is_dir():
        found = "a folder"
    elif path.exists() and not (path.is_file() and _beginning_of(path, len(mark)) == mark):
        found = "another file"
    else:
        return
    raise RunError(f"{path}: expected a new file or an earlier {kind}, found {found}; {remedy}")


def _beginning_of(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(num_bytes)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        RunError: the file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(
            f"{path}: expected a JSON file of a run, found none; restore the file, or start over with --fresh"
        ) from error
    except OSError as error:
        raise RunError(
            f"{path}: expected a file that can be read, got {error.strerror or error}; restore it or start over"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: expected JSON, got {error}; restore the file, or start over with --fresh") from error


def encode_json(value: Any, indent: int | None = None) -> str:
    """Return ``value`` as strict JSON: numbers that are not finite become null, NumPy values plain ones."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """Return ``value`` in JSON's own types: tuples as lists, keys as text, numbers that are not finite as None."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case Path():
            return str(value)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        case _:
            raise TypeError(f"expected a value that JSON can hold, got {type(value).__name__}")


def publish(temporary: Path, final: Path) -> None:
    """Sync every file of the folder ``temporary``, then rename it to ``final``, which must not exist.

    Files get the mode that any new file has: safetensors writes its own for the owner alone.
    """
    mode = 0o666 & ~_umask()
    for parent, _, names in os.walk(temporary, topdown=False):
        for name in names:
            (Path(parent) / name).chmod(mode)
            with (Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))
    temporary.rename(final)
    sync_folder(final.parent)


def _umask() -> int:
    # There is no call that only reads the mask. The value set for a moment is the strict one, so that a file another
    # thread makes meanwhile is private at worst, never open.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make the names inside ``folder`` durable.

    Syncing a file saves its content, not its name: until the folder is synced too, a power failure may undo the rename.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a folder; do nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Turn the error of a full or read-only disk into one line: what was being written and what to do.

    Raises:
        RunError: the block met an operating-system error while writing.
    """
    try:
        yield
    except FedloomError:
        raise
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise RunError(f"cannot write {what}: {reason}; {remedy}") from error


def _disk_reason(error: Exception) -> str | None:
    """Return what is wrong with the disk, or None for any other error.

    The writer of safetensors is Rust and raises its own type, with the cause as text only.
    """
    in_text = _RUST_ERROR.search(str(error))
    number = int(in_text[1]) if in_text else error.errno if isinstance(error, OSError) else None
    if number in _FULL:
        return "the disk is full"
    return os.strerror(number).lower() if number in _REFUSED and number is not None else None
