"""What a run is: the software it ran on, the hashes of what went in, and how two runs' settings differ."""

from __future__ import annotations

import datetime
import functools
import platform
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.file_formats import RUN_FOLDER
from fedloom.run_folder.durable import plain

FORMAT = "fedloom-run"
_PACKAGES = ("fedloom", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy")
_SHOWN_DIFFERENCES = 4


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on; imports none of them."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def new_manifest(config: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a run of the settings ``config`` that starts now; ``identity`` holds seeds and hashes."""
    return {
        "format": FORMAT,
        "format_version": RUN_FOLDER.number,
        "identity": plain(identity),
        "sessions": [_session(config, 0)],
    }


def resumed_manifest(manifest: Mapping[str, Any], config: Mapping[str, Any], num_rounds_done: int) -> dict[str, Any]:
    """Return ``manifest`` with one more session: other versions or threads may continue a run, and that is recorded.

    What a later version adds is in its own format, so the folder has that from now on.
    """
    sessions = [*manifest["sessions"], _session(config, num_rounds_done)]
    return {**manifest, "format_version": RUN_FOLDER.number, "sessions": sessions}


def check_manifest(path: Path, manifest: Any) -> dict[str, Any]:
    """Return what the file ``path`` holds, where it is the manifest of a run that this version reads.

    Raises:
        RunError: it is something else's, of another format, or damaged.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(f"{path}: expected a manifest of fedloom, found another file: choose another folder")
    sessions = _sessions(manifest)
    written_by = sessions[-1]["versions"].get("fedloom") if sessions else None
    RUN_FOLDER.check(path, manifest.get("format_version"), RunError, written_by)
    if not sessions or not isinstance(manifest.get("identity"), dict):
        raise RunError(
            f"{path}: expected the run's identity and sessions, found a damaged file; restore it, or start over with "
            "--fresh"
        )
    return manifest


def _sessions(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sessions that say what they ran on."""
    found = manifest.get("sessions")
    sessions = found if isinstance(found, list) else []
    return [one for one in sessions if isinstance(one, dict) and isinstance(one.get("versions"), dict)]


def _session(config: Mapping[str, Any], num_rounds_done: int) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    threads = flatten(config).get("engine.threads")
    return {"started": now, "num_rounds_done": num_rounds_done, "threads": threads, "versions": dict(versions())}


def changed_threads(manifest: Mapping[str, Any]) -> str | None:
    """Say what it changes that this session computes with another number of threads than the last; None if it has not.

    Runs of earlier versions did not record theirs.
    """
    *before, now = manifest["sessions"]
    if not before or before[-1].get("threads") == now["threads"]:
        return None
    was = before[-1].get("threads") or "not recorded"
    return (
        f"engine.threads is {now['threads']} now; for the rounds before it was {was}. Sums round otherwise, so the "
        "result can differ in its last bits from that of one number throughout"
    )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name, in JSON's types: ``{"run": {"seed": 1}}`` -> ``{"run.seed": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = plain(value)
    return flat


def differences(there: Mapping[str, Any], asked: Mapping[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """Return one phrase per setting that differs, naming both values; ``may_change`` names settings or tables."""
    old, new = flatten(there), flatten(asked)
    phrases = []
    for name in sorted(old.keys() | new.keys()):
        allowed = any(name == free or name.startswith(f"{free}.") for free in may_change)
        if not allowed and old.get(name) != new.get(name):
            phrases.append(f"{name} is {old.get(name)!r} there, {new.get(name)!r} asked")
    return phrases


def summary(phrases: list[str]) -> str:
    """Return the first few phrases in one line, and how many more there are."""
    rest = len(phrases) - _SHOWN_DIFFERENCES
    return "; ".join(phrases[:_SHOWN_DIFFERENCES]) + (f"; and {rest} more" if rest > 0 else "")
