"""Who takes part in a study, version by version: signed at the coordinator's, checked by the server and by each site.

The key of the project's root signs, which is not at the server: whoever breaks into the server can stop a study and
cannot let a site in. Every kit holds the root's certificate, so nothing else is needed to check a signature.

A version goes on from the one before: sites join at the end of ``names``, so that client numbers stay, and withdraw by
being listed in ``withdrawn``. A site keeps the last version that it has seen of a run, and takes no older one.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from fedloom.errors import MissingExtraError, RunError
from fedloom.run_folder import durable
from fedloom.sites.frame_parts import Members, Refusal

_PURPOSE = b"fedloom: members of a study\n"
"""Begins everything that is signed here, so that no signature is one of a certificate."""
ROOT_KEY = "rootCA.key"
_FILE = "members.json"
_RETRY = "free space or mend the disk; the site takes part again from where it is"


def with_signature(members: Members, authority: Path) -> Members:
    """Return members signed with the key of a project's root.

    Raises:
        RunError: the folder has no such key.
        MissingExtraError: the library that signs is absent.
    """
    path, signatures = authority / ROOT_KEY, _signatures()
    try:
        found: bytes = signatures.sign(path.read_bytes(), _statement(members))
    except (OSError, ValueError, TypeError) as error:
        reason = (error.strerror or "").lower() if isinstance(error, OSError) else "no such key, or an encrypted one"
        raise RunError(
            f"{path}: expected the key of the project's root, got: {reason}; name the certificate authority by --ca"
        ) from error
    return members.model_copy(update={"signature": found.hex()})


def is_signed(members: Members, root: bytes) -> bool:
    """Tell whether the key of a root certificate (PEM) has signed these members.

    Raises:
        MissingExtraError: the library that checks signatures is absent.
    """
    try:
        signature = bytes.fromhex(members.signature)
    except ValueError:
        return False
    return bool(_signatures().verifies(root, _statement(members), signature))


def refusal_of(
    asked: Members | None, known: Members | None, name: str, client: int, root: Callable[[], bytes]
) -> Refusal | None:
    """Return why a site does not take a version of a study; ``known`` is the last that it has seen of the run."""
    seen = 0 if known is None else known.version
    if asked is None:
        return Refusal(code="members-older", numbers={"seen": seen, "asked": 1}) if known is not None else None
    numbers: dict[str, int | float] = {"asked": asked.version}
    if client >= len(asked.names) or asked.names[client] != name or name in asked.withdrawn:
        return Refusal(code="members-number", numbers={"client": client})
    if asked.version < seen:
        return Refusal(code="members-older", numbers={"seen": seen, **numbers})
    if known is not None and not _goes_on(asked, known):
        return Refusal(code="members-other", numbers=numbers)
    if asked.version > 1 and not is_signed(asked, root()):
        return Refusal(code="members-unsigned", numbers=numbers)
    return None


def joined(asked: Members | None, known: Members | None) -> tuple[str, ...]:
    """Return who takes part that did not by the version before; nobody by the first one."""
    return () if asked is None or known is None else tuple(name for name in asked.present if name not in known.present)


def shown(members: Members) -> str:
    """Say in a line who takes part."""
    away = f"; withdrawn: {', '.join(members.withdrawn)}" if members.withdrawn else ""
    return f"version {members.version} of the study: {', '.join(members.present)}{away}"


def read_members(folder: Path, run: str) -> Members | None:
    """Return the last version that a site has seen of a run; None before the first, and where the file is damaged."""
    try:
        return Members.model_validate_json((folder / "runs" / run / _FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def keep_members(folder: Path, run: str, members: Members) -> None:
    """Keep the version that a site has seen of a run.

    Raises:
        RunError: the disk refused.
    """
    path = folder / "runs" / run / _FILE
    with durable.explained(str(path), _RETRY):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.write_bytes(path, members.model_dump_json().encode())


def settings_hash(unchanging: Any) -> str:
    """Return the hash of what no version of a study changes."""
    return sha256(durable.encode_json(unchanging).encode()).hexdigest()


def _goes_on(asked: Members, known: Members) -> bool:
    if asked.settings_sha256 != known.settings_sha256 or asked.names[: len(known.names)] != known.names:
        return False
    same = (asked.names, set(asked.withdrawn)) == (known.names, set(known.withdrawn))
    return same or asked.version > known.version


def _statement(members: Members) -> bytes:
    unsigned = members.model_dump(mode="json", exclude={"signature"})
    return _PURPOSE + durable.encode_json(unsigned).encode()


def _signatures() -> ModuleType:
    try:
        from fedloom.sites import signatures
    except ImportError as error:
        raise MissingExtraError("sites", "signing and checking versions of a study") from error
    return signatures
