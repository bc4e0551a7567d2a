"""Certificates and kits of a project, made by NVIDIA FLARE's own commands.

The coordinator keeps the certificate authority in a folder of its own, and signs requests of the sites that the study
names. A site makes its key itself and keeps it; what crosses is a request and a signed certificate.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedloom.errors import FedloomError, MissingExtraError, RunError
from fedloom.run_folder import durable
from fedloom.sites.kit import read_kit
from fedloom.sites.kit_check import Role, check_kit, close_kit, is_flare_kit
from fedloom.sites.study import Study

APPROVED = "approved.json"
REVOKED = "disabled_clients.json"
"""FLARE's file of names that its server turns away, in the server's kit."""
_PROFILE, _AUTHORITY = "profile.yaml", "ca.json"
_LARGEST_MEMBER = 1 << 20
_EXISTS, _FOREIGN = "CERT_ALREADY_EXISTS", "ROOTCA_FINGERPRINT_MISMATCH"


@dataclass(frozen=True)
class Begun:
    """A new project: its name, the fingerprint to tell the sites, and where things lie."""

    project: str
    fingerprint: str
    authority: Path
    kit: Path

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {key: str(value) for key, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """Return it for people."""
        return [
            f"project {self.project}",
            f"certificate authority: {self.authority} (its key signs sites; keep it off the server, and a copy of it)",
            f"the server's kit: {self.kit}",
            f"fingerprint: {self.fingerprint}",
            "tell the fingerprint to each site by another way than the one the files take",
        ]


@dataclass(frozen=True)
class Member:
    """A site of the study, and what the coordinator knows about it."""

    name: str
    state: str
    organisation: str = ""
    valid_until: str = ""


def begin(study: Study, project: str, host: str, port: int, authority: Path) -> Begun:
    """Make a certificate authority and the server's kit.

    Raises:
        RunError: one of the folders is in use, or FLARE refuses a name.
    """
    kit = Path(study.sites.kit).absolute()
    for path, name in ((authority, "--ca"), (kit, "sites.kit")):
        if path.exists() and any(path.iterdir()):
            raise RunError(f"{path} ({name}): expected a new folder, got one with files; choose another, or remove it")
    authority.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fingerprint = _begin(project, host, port, authority, kit)
    except BaseException:  # half an authority would stand in the way of the next try
        shutil.rmtree(authority, ignore_errors=True)
        raise
    return Begun(project, fingerprint, authority, kit)


def _begin(project: str, host: str, port: int, authority: Path, kit: Path) -> str:
    server = {"host": host, "fed_learn_port": port, "admin_port": port}
    profile = {"name": project, "scheme": "grpc", "connection_security": "mtls", "server": server}
    _write_yaml(authority / _PROFILE, profile)
    # Without --org: the root's subject would have one and its issuer not, and no certificate would verify.
    made = _flare("cert", "init", "--profile", authority / _PROFILE, "-o", authority)
    fingerprint = str(made["rootca_fingerprint_sha256"])
    with _workplace(kit.parent) as place:
        asked, signed = place / "request", place / f"{host}.signed.zip"
        _participant(place / "server.yaml", project, host, "server", "coordinator")
        _flare("cert", "request", "-p", place / "server.yaml", "--out", asked)
        _sign(authority, asked / f"{host}.request.zip", signed)
        _package(place, signed, asked, fingerprint, kit, "server")
    return fingerprint


def request(name: str, project: str, organisation: str, folder: Path) -> Path:
    """Make a site's key and its request; return the request, which is what goes to the coordinator.

    Raises:
        RunError: there is one already, or FLARE refuses a name.
    """
    with _workplace(folder.parent) as place:
        _participant(place / "site.yaml", project, name, "client", organisation)
        made = _flare("cert", "request", "-p", place / "site.yaml", "--out", folder)
    return Path(made["request_zip"])


def approve(asked: Path, study: Study, authority: Path) -> Path:
    """Sign the request of a site that the study names; return what goes back to the site.

    Raises:
        RunError: the request is damaged, of another project, of a name that the study does not list, or signed already.
    """
    found = _member(asked, "request.json", "a request of `fedloom site request`")
    name = str(found.get("name"))
    if name not in study.sites.names:
        raise RunError(
            f"{asked}: expected a site of the study ({', '.join(study.sites.names)}), got {name}; add it to "
            "sites.names, or keep it unsigned"
        )
    if found.get("cert_type") != "client":
        raise RunError(f"{asked}: expected a request of a site, got one of a {found.get('cert_type')}; keep it")
    signed = asked.with_name(f"{name}.signed.zip")
    made = _sign(authority, asked, signed)
    certificate = _member(signed, "signed.json", "a signed request")["certificate"]
    known = [entry for entry in _approved(authority) if entry["name"] != name]
    entry = {"name": name, "organisation": made["org"], "valid_until": certificate["valid_until"]}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    durable.write_json(authority / APPROVED, [*known, {**entry, "serial": certificate["serial"], "approved": now}])
    return signed


def install(signed: Path, fingerprint: str, asked: Path | None, kit: Path | None) -> Path:
    """Make a site's kit of its key and the signed certificate, closed to jobs and commands; return its folder.

    Raises:
        RunError: the fingerprint is another, the key is absent, the certificate is expired, or the folder is in use.
    """
    name = str(_member(signed, "signed.json", "a signed request of the coordinator").get("name"))
    if not name or Path(name).name != name:
        raise RunError(f"{signed}: expected the name of a site, got {name!r}; ask the coordinator for the file again")
    folder = (kit or Path("kit") / name).absolute()
    if folder.exists():
        raise RunError(f"{folder}: expected a new folder for the kit, got one that exists; choose another with --kit")
    with _workplace(folder.parent) as place:
        _package(place, signed, asked or Path(name), fingerprint, folder, "client")
    return folder


def members(study: Study, authority: Path) -> list[Member]:
    """Return the study's sites in its order, and whoever else was approved."""
    known = {entry["name"]: entry for entry in _approved(authority)}
    away = revoked(study)
    found = []
    for name in (*study.sites.names, *(name for name in known if name not in study.sites.names)):
        entry = known.get(name)
        state = "revoked" if name in away else "not approved" if entry is None else "approved"
        if entry is not None and datetime.fromisoformat(entry["valid_until"]) < datetime.now(UTC):
            state = "expired"
        if name in study.sites.withdrawn:
            state += ", withdrawn"
        if name not in study.sites.names:
            state += ", not in the study"
        entry = entry or {}
        found.append(Member(name, state, entry.get("organisation", ""), entry.get("valid_until", "")))
    return found


def revoke(name: str, study: Study, authority: Path) -> None:
    """Turn a site away from now on: FLARE's server reads the file at its start, and fedloom's part of it while it runs.

    Raises:
        RunError: there is no such site, or the server's kit is not one of FLARE.
    """
    names = {*study.sites.names, *(entry["name"] for entry in _approved(authority))}
    if name not in names:
        raise RunError(f"{name}: expected one of {', '.join(sorted(names))}; see `fedloom sites list`")
    kit = Path(study.sites.kit)
    if not is_flare_kit(kit, "server"):
        raise RunError(
            f"{kit}: expected the kit of `fedloom sites init`, got plain certificates or nothing; take the name out "
            "of sites.names instead"
        )
    durable.write_json(kit / REVOKED, {"disabled_clients": sorted({*revoked(study), name})})


def revoked(study: Study) -> tuple[str, ...]:
    """Return the names that the server's kit turns away."""
    path = Path(study.sites.kit) / REVOKED
    return tuple(durable.read_json(path)["disabled_clients"]) if path.exists() else ()


def _package(place: Path, signed: Path, asked: Path, fingerprint: str, kit: Path, role: Role) -> None:
    made = _flare(
        "package", signed, "--request-dir", asked, "--fingerprint", fingerprint, "-w", place / "made", what=signed
    )
    built = Path(made["output_dir"])
    read_kit(built, role)
    kit.parent.mkdir(parents=True, exist_ok=True)
    if kit.is_dir():
        kit.rmdir()
    built.chmod(0o700)
    shutil.move(built, kit)
    close_kit(kit, role)
    check_kit(kit, role)


def _sign(authority: Path, asked: Path, signed: Path) -> Mapping[str, Any]:
    if not (authority / _AUTHORITY).is_file():
        raise RunError(
            f"{authority}: expected the certificate authority of `fedloom sites init`, got none; name it by --ca"
        )
    return _flare(
        "cert", "approve", "-c", authority, "--profile", authority / _PROFILE, "--out", signed, asked, what=asked
    )


def _approved(authority: Path) -> list[dict[str, Any]]:
    path = authority / APPROVED
    return list(durable.read_json(path)) if path.exists() else []


def _member(path: Path, name: str, wanted: str) -> dict[str, Any]:
    """Return a JSON file inside a zip file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            found = json.loads(file.read(_LARGEST_MEMBER))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "another or a damaged file"
        raise RunError(f"{path}: expected {wanted}, got: {reason.lower()}; ask for the file again") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: expected {wanted}, got {name} of another kind; ask for the file again")
    return found


def _participant(path: Path, project: str, name: str, kind: str, organisation: str) -> None:
    _write_yaml(path, {"name": project, "participants": [{"name": name, "type": kind, "org": organisation}]})


def _write_yaml(path: Path, value: Any) -> None:
    durable.write_json(path, value)  # JSON is YAML


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """Yield a folder beside the result, so that moving there is one step, and remove it."""
    with durable.explained(str(parent), "choose another folder"):
        parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=durable.TEMPORARY, dir=parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _flare(*arguments: object, what: Path | None = None) -> Mapping[str, Any]:
    """Run a command of FLARE and return what it says.

    Raises:
        RunError: it refuses.
        MissingExtraError: FLARE is not installed.
    """
    if importlib.util.find_spec("nvflare") is None:
        raise MissingExtraError("sites", "making certificates of sites")
    command = [sys.executable, "-m", "nvflare.cli", "--format", "json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=_environment())
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RunError(f"nvflare {arguments[0]}: expected an answer, got: {last[0]}; install nvflare again") from error
    if answer.get("status") == "ok":
        return dict(answer["data"])
    raise _refusal(answer, what)


def _refusal(answer: Mapping[str, Any], what: Path | None) -> FedloomError:
    message, hint = (" ".join(str(answer.get(key, "")).split()).rstrip(".") for key in ("message", "hint"))
    if answer.get("error_code") == _EXISTS:
        path = message.rpartition(" ")[2]
        return RunError(f"{path}: expected no such file yet, got one; remove it, or choose another folder")
    head = "" if what is None else f"{what}: "
    if answer.get("error_code") == _FOREIGN:
        wanted, _, found = hint.removeprefix("Expected ").partition("; actual ")
        return RunError(
            f"{head}expected the root {wanted} (--fingerprint), got {found.partition('.')[0]}: another project's, or "
            "somebody between; ask the coordinator for the fingerprint by telephone"
        )
    return RunError(f"{head}expected what FLARE takes, got: {message}; {hint[:1].lower() + hint[1:] or 'correct it'}")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "ignore"}
