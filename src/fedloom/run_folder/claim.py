"""How a run folder is claimed: reject what is not fedloom's, lock, clear up after a crash, start or resume."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fedloom.errors import RunError
from fedloom.run_folder import durable
from fedloom.run_folder.manifest import (
    check_manifest,
    differences,
    new_manifest,
    resumed_manifest,
    summary,
)

LOCK = ".fedloom.lock"
READY = ".ready-"
RECORD = "record.json"
EVALUATION = "evaluation"
"""The folder, in a run's, of what was decoded to be scored."""
_ROUND = re.compile(r"[1-9][0-9]{0,17}")
"""The name of a round's folder, as it is written: ``²`` is a digit too, and no number."""
# In the order in which a fresh start removes them, up to the last two, which it replaces.
ENTRIES = (
    "finished.json",
    "rounds",
    "metrics.jsonl",
    "tensorboard",
    "adapter",
    EVALUATION,
    "report.html",
    "partition.json",
    "holdings.json",
    "config.json",
    "manifest.json",
)


def refuse_foreign(path: Path) -> None:
    """Check that ``path`` is absent, empty, a run, or a run whose creation was interrupted.

    Raises:
        RunError: anything else; nothing was changed.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path}: expected a folder for the run, got a file; choose another name")
    names = {entry.name for entry in path.iterdir()}
    if "manifest.json" in names:
        read_manifest(path)
        return
    foreign = {name for name in names if name not in {LOCK, "config.json"} and not name.startswith(durable.TEMPORARY)}
    if foreign or (names and LOCK not in names):
        shown = ", ".join(sorted(foreign or names)[:3])
        raise RunError(
            f"{path}: expected a new or empty folder or a run, it holds {shown}; choose another folder "
            "(nothing in this one was changed)"
        )


def refuse_another(path: Path, config: Mapping[str, Any], may_change: Collection[str]) -> None:
    """Check that ``path`` holds no run, or one of these settings, before anything dear is loaded.

    A run that has not completed a round has nothing to lose, and gives way to one of other settings.

    Raises:
        RunError: it holds a run of other settings, or something else; nothing was touched.
    """
    refuse_foreign(path)
    if is_begun(path):
        refuse_other_settings(path, durable.read_json(path / "config.json"), config, may_change)


def rounds_done(path: Path) -> list[int]:
    """Return the numbers of the rounds that the run in ``path`` has completed, in order."""
    folder = path / "rounds"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if _ROUND.fullmatch(name))


def is_begun(path: Path) -> bool:
    """Tell whether ``path`` holds a run that has completed a round, or all that it has to do."""
    return (path / "manifest.json").exists() and (bool(rounds_done(path)) or (path / "finished.json").exists())


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the run folder ``path``.

    Raises:
        RunError: it is damaged, of something else, or of a format that this version does not read.
    """
    return check_manifest(path / "manifest.json", durable.read_json(path / "manifest.json"))


def lock(path: Path) -> int:
    """Hold the folder ``path`` for this process and return the descriptor; the lock ends with the process.

    Raises:
        RunError: another process holds it, or the lock or an entry of the run is a link to something else.
    """
    _refuse_links(path)
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise RunError(
            f"{path}: expected a folder that no other process uses, process {holder} does; wait for it or choose "
            "another"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _refuse_links(path: Path) -> None:
    """Check that nothing of the run is a link: what is written there would change what the link leads to.

    Raises:
        RunError: an entry is one, or the lock is another name of some file, or no file at all.
    """
    for name in (LOCK, *ENTRIES):
        entry = path / name
        if entry.is_symlink():
            raise RunError(
                f"{entry} is a link: expected a run's own file or folder; remove it or choose another folder"
            )
    lock = path / LOCK
    if lock.exists() and (not lock.is_file() or lock.stat().st_nlink > 1):
        raise RunError(f"{lock} is no file of its own: expected a run's lock; remove it or choose another folder")


def recover(path: Path) -> None:
    """Remove what a killed process left half-written, and complete a replacement it had ready."""
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(durable.TEMPORARY):
            durable.discard(entry)
        elif entry.name.startswith(READY):
            roll_forward(entry)


def roll_forward(ready: Path) -> None:
    """Put the complete entry ``.ready-<name>`` in the place of ``<name>``; repeatable after a kill."""
    final = ready.with_name(ready.name.removeprefix(READY))
    remove(final.parent, final)
    ready.rename(final)
    durable.sync_folder(final.parent)


def remove(run: Path, path: Path) -> None:
    """Remove ``path``, which is in the folder ``run``: first its name, in one step, then its content."""
    if not path.exists() and not path.is_symlink():
        return
    doomed = durable.temporary_name(run)
    path.rename(doomed)
    durable.discard(doomed)


def clear(path: Path) -> None:
    """Remove an earlier run's results from the folder ``path``; what fedloom did not write stays.

    The settings and the manifest stay too, to be replaced: a kill in between leaves a run that can be started over.
    """
    for name in ENTRIES[:-2]:
        remove(path, path / name)


def start(path: Path, config: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Write the settings and the manifest of a new run; return the manifest."""
    manifest = new_manifest(config, identity)
    durable.write_json(path / "config.json", config)
    durable.write_json(path / "manifest.json", manifest)
    return manifest


def start_or_resume(
    path: Path, config: Mapping[str, Any], identity: Mapping[str, Any], may_change: Collection[str]
) -> dict[str, Any]:
    """Start a run where none has begun; otherwise check that the run there is this one, and note the new session.

    Raises:
        RunError: the run there has other settings, or another base, data or partition.
    """
    if not is_begun(path):
        clear(path)
        return start(path, config, identity)
    manifest = read_manifest(path)
    refuse_other_settings(path, durable.read_json(path / "config.json"), config, may_change)
    refuse_other_identity(path, manifest["identity"], durable.plain(identity))
    manifest["identity"] |= durable.plain(identity)
    manifest = resumed_manifest(manifest, config, len(list((path / "rounds").glob("*"))))
    durable.write_json(path / "config.json", config)
    durable.write_json(path / "manifest.json", manifest)
    return manifest


def refuse_other_settings(
    path: Path, there: Mapping[str, Any], asked: Mapping[str, Any], may_change: Collection[str]
) -> None:
    """Check that two runs' settings agree, but for those that may change.

    Raises:
        RunError: they differ; the message names each setting with both values.
    """
    if phrases := differences(there, asked, may_change):
        raise RunError(
            f"{path}: expected a run with the same settings, found one with others ({summary(phrases)}): "
            f"use the same settings, choose another folder, or start over with --fresh"
        )


def refuse_other_identity(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Check seeds and hashes that both sides know.

    Raises:
        RunError: one differs; the message names it with both values.
    """
    common = there.keys() & asked.keys()
    if phrases := differences({k: there[k] for k in common}, {k: asked[k] for k in common}):
        raise RunError(
            f"{path}: expected a run of the same base and data, found one of others ({summary(phrases)}): "
            f"use the same base and data, choose another folder, or start over with --fresh"
        )


def inside(name: str) -> PurePosixPath:
    """Return a relative name that cannot lead out of its folder.

    Raises:
        ValueError: it is absolute or climbs.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"expected a name inside the run folder, got {name!r}")
    return path


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file, leaving out a last line that was cut off; none where the file is absent.

    Raises:
        RunError: a line before the last is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: expected one JSON record per line, got {error}; restore the file") from error
