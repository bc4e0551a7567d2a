"""How a run folder is claimed: reject what is not fedloom's, lock, clear up after a crash, start or resume."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fedloom.errors import RunError
from fedloom.run_folder import durable
from fedloom.run_folder.contents import ADAPTER, accepted_on_disk, read_object, rounds_done, sha256
from fedloom.run_folder.locks import check_locks, lock_file
from fedloom.run_folder.manifest import (
    differences,
    new_manifest,
    read_manifest,
    resumed_manifest,
    summary,
    write_manifest,
)

LOCK = ".fedloom.lock"
READY = ".ready-"
CHOOSE_ANOTHER = "choose another folder"
EVALUATION = "evaluation"
"""The folder, in a run's, of what was decoded to be scored."""
# In the order in which a fresh start removes them, up to the last two, which it replaces.
ENTRIES = (
    "finished.json",
    "rounds",
    "metrics.jsonl",
    "privacy.jsonl",
    "tensorboard",
    ADAPTER,
    EVALUATION,
    "report.html",
    "partition.json",
    "holdings.json",
    "canaries.json",
    "study.json",
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
        there = read_object(path, read_manifest(path), "config.json")
        refuse_other_settings(path, there, config, may_change)


def is_begun(path: Path) -> bool:
    """Tell whether ``path`` holds a run that has completed a round, or all that it has to do."""
    return (path / "manifest.json").exists() and (bool(rounds_done(path)) or (path / "finished.json").exists())


def refuse_unwritable(path: Path) -> None:
    """Check, before anything is loaded, that a folder ``path`` can be made or written to.

    Raises:
        RunError: what is above it is not a folder, or may not be written to.
    """
    with durable.explained(str(path), CHOOSE_ANOTHER):
        there = next(one for one in (path, *path.absolute().parents) if one.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def refuse_held(path: Path) -> None:
    """Check that no other process uses the folder ``path``; nothing in it is touched.

    Raises:
        RunError: one does.
    """
    _refuse_links(path)
    if not (path / LOCK).is_file():
        return
    descriptor = os.open(path / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _lock(path, descriptor, shared=True)
    finally:
        os.close(descriptor)


def lock(path: Path) -> int:
    """Hold the folder ``path`` for this process and return the descriptor; the lock ends with the process.

    Raises:
        RunError: another process holds it, or the lock or an entry of the run is a link to something else.
    """
    check_locks()
    _refuse_links(path)
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        _lock(path, descriptor)
    except RunError:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _lock(path: Path, descriptor: int, *, shared: bool = False) -> None:
    """Lock the open lock of the folder ``path``.

    Raises:
        RunError: another process holds it.
    """
    try:
        lock_file(descriptor, shared=shared)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        raise RunError(
            f"{path}: expected a folder that no other process uses, process {holder} does; wait for it or choose "
            "another"
        ) from error


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
    """Remove what killed processes left half-written, and complete a replacement that was ready."""
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(READY):
            roll_forward(entry)
    durable.remove_leftovers(path)
    for written_beside in (ADAPTER, EVALUATION):  # a card beside each adapter, what judges were shown
        for folder in [path / written_beside, *(path / written_beside).glob("**/")]:
            durable.remove_leftovers(folder)


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
    settings = durable.json_bytes(config)
    manifest = new_manifest(config, identity) | {"files": {"config.json": [sha256(settings)]}}
    durable.write_bytes(path / "config.json", settings)
    write_manifest(path, manifest)
    return manifest


def start_or_resume(
    path: Path, config: Mapping[str, Any], identity: Mapping[str, Any], may_change: Collection[str]
) -> dict[str, Any]:
    """Start a run where none has begun; otherwise check that the run there is this one, and note the new session.

    Raises:
        RunError: the run there has other settings, or another base, data or partition, or is damaged.
    """
    if not is_begun(path):
        clear(path)
        return start(path, config, identity)
    manifest = read_manifest(path)
    refuse_other_settings(path, read_object(path, manifest, "config.json"), config, may_change)
    refuse_other_identity(path, manifest["identity"], durable.plain(identity))
    manifest["identity"] |= durable.plain(identity)
    manifest = resumed_manifest(manifest, config, len(rounds_done(path)))
    settings = durable.json_bytes(config)
    hashes = {"config.json": sha256(settings)}
    announce(path, manifest, hashes)
    durable.write_bytes(path / "config.json", settings)
    settle(manifest, hashes)
    return manifest


def announce(path: Path, manifest: dict[str, Any], hashes: Mapping[str, str]) -> None:
    """Write the manifest with the hashes of files that are about to be replaced, beside those of what is there."""
    there = {name: accepted_on_disk(path, name, manifest["files"].get(name, [])) for name in hashes}
    both = {name: list(dict.fromkeys([*there[name], new])) for name, new in hashes.items()}
    manifest["files"] = {**manifest["files"], **both}
    write_manifest(path, manifest)


def settle(manifest: dict[str, Any], hashes: Mapping[str, str]) -> None:
    """Name the new hashes alone, now that the files are in place; on disk that is so from the next writing on."""
    manifest["files"] = {**manifest["files"], **{name: [new] for name, new in hashes.items()}}


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
