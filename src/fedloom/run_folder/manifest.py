"""What a run is: the software it ran on, the hashes of what went in and of its files, how two runs' settings differ.

``manifest.json`` carries a hash over itself. Of every other file it names the hashes that are accepted: one, or two
from before the file is replaced until the manifest is written again, so that a kill in between leaves a good folder.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import platform
import uuid
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from pydantic import BaseModel, ConfigDict, ValidationError

from fedloom.errors import RunError
from fedloom.file_formats import RUN_FOLDER
from fedloom.run_folder import durable
from fedloom.run_folder.durable import plain
from fedloom.wording import worded

FORMAT = "fedloom-run"
MANIFEST = "manifest.json"
SEAL = "sha256"
_PACKAGES = ("fedloom", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy")
_SHOWN_DIFFERENCES = 4


class _Session(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    started: str
    num_rounds_done: Annotated[int, Ge(0)]
    threads: Annotated[int, Ge(1)] | None
    versions: dict[str, str]


class _Manifest(BaseModel):
    """The shape of manifest.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: str
    format_version: int
    run: str
    identity: dict[str, Any]
    files: dict[str, Annotated[list[str], MinLen(1)]]
    sessions: Annotated[list[_Session], MinLen(1)]


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
        "run": uuid.uuid4().hex,
        "identity": plain(identity),
        "files": {},
        "sessions": [_session(config, 0)],
    }


def resumed_manifest(manifest: Mapping[str, Any], config: Mapping[str, Any], num_rounds_done: int) -> dict[str, Any]:
    """Return ``manifest`` with one more session: other versions or threads may continue a run, and that is recorded.

    What a later version adds is in its own format, so the folder has that from now on.
    """
    sessions = [*manifest["sessions"], _session(config, num_rounds_done)]
    return {**manifest, "format_version": RUN_FOLDER.number, "sessions": sessions}


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the run folder ``path``.

    Raises:
        RunError: it is damaged, of something else, or of a format that this version does not read.
    """
    return check_manifest(path / MANIFEST, durable.read_json(path / MANIFEST))


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of the run folder ``path``."""
    durable.write_json(path / MANIFEST, sealed(manifest))


def check_manifest(path: Path, manifest: Any) -> dict[str, Any]:
    """Return what the file ``path`` holds, where it is the manifest of a run that this version reads.

    Raises:
        RunError: it is something else's, of another format, or damaged.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(f"{path}: expected a manifest of fedloom, found another file: choose another folder")
    RUN_FOLDER.check(path, manifest.get("format_version"), RunError, _written_by(manifest))
    return unsealed(path, manifest, _Manifest, "restore it, or choose another folder")


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with the hash of its content."""
    return {**plain(document), SEAL: _seal_of(document)}


def unsealed(path: Path, document: Any, shape: type[BaseModel], remedy: str) -> dict[str, Any]:
    """Return what :func:`sealed` was given, after a check of shape and hash.

    Raises:
        RunError: the document read from ``path`` has another shape or is not what was written.
    """
    try:
        found = plain(document) if isinstance(document, dict) else {}
        seal, got = found.pop(SEAL, None), _seal_of(found)
        shape.model_validate(found)
    except RecursionError as error:
        raise RunError(f"{path}: expected what the run wrote, found lists nested too deep; {remedy}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or type(document).__name__
        raise RunError(
            f"{path}: expected what the run wrote, found a damaged file ({where}: {first['msg'].lower()}); {remedy}"
        ) from error
    if seal != got:
        raise RunError(
            f"{path}: expected what the run wrote (sha256 {str(seal)[:12]}), got something else (sha256 {got[:12]}); "
            f"{remedy}"
        )
    return dict(found)


def _seal_of(document: Mapping[str, Any]) -> str:
    in_order = dict(sorted(plain(document).items()))
    return hashlib.sha256(durable.encode_json(in_order).encode()).hexdigest()


def _written_by(manifest: Mapping[str, Any]) -> str | None:
    """Return the version of fedloom that a manifest of any format names."""
    sessions = manifest.get("sessions")
    last = sessions[-1] if isinstance(sessions, list) and sessions else None
    named = last.get("versions") if isinstance(last, dict) else None
    version = named.get("fedloom") if isinstance(named, dict) else None
    return version if isinstance(version, str) else None


def _session(config: Mapping[str, Any], num_rounds_done: int) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    threads = flatten(config).get("engine.threads")
    return {"started": now, "num_rounds_done": num_rounds_done, "threads": threads, "versions": dict(versions())}


def changed_threads(manifest: Mapping[str, Any]) -> str | None:
    """Say what another number of threads than the last session's changes; None where it is the same."""
    *before, now = manifest["sessions"]
    if not before or before[-1]["threads"] == now["threads"]:
        return None
    return (
        f"engine.threads is {now['threads']} now; for the rounds before it was {before[-1]['threads']}. Sums "
        "round otherwise, so the result can differ in its last bits from that of one number throughout"
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
            one, other = (
                worded(v) if v is None or isinstance(v, bool) else repr(v) for v in (old.get(name), new.get(name))
            )
            phrases.append(f"{name} is {one} there, {other} asked")
    return phrases


def summary(phrases: list[str]) -> str:
    """Return the first few phrases in one line, and how many more there are."""
    rest = len(phrases) - _SHOWN_DIFFERENCES
    return "; ".join(phrases[:_SHOWN_DIFFERENCES]) + (f"; and {rest} more" if rest > 0 else "")
