"""What an NVIDIA FLARE kit may start: fedloom's one component, and nothing that anybody sends.

A kit passes where the files that FLARE reads at its start say what :func:`close_kit` writes: no launcher of jobs, no
class that a job may name, no right for any role, no component but fedloom's and those without which FLARE does not
start. Whatever else they say is refused, known to fedloom or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedloom.errors import RunError
from fedloom.run_folder import durable

Role = Literal["server", "client"]

ROLES = ("project_admin", "org_admin", "lead", "member")
_CONNECTIONS = {
    "allow_adhoc_conns": False,
    # FLARE listens on loopback for processes of jobs; there are none, and without a certificate none gets in.
    "internal": {"scheme": "tcp", "resources": {"host": "localhost", "connection_security": "mtls"}},
}
REMEDY = "install the kit again (fedloom site install), or restore that file"
_COMPONENT = {"server": "fedloom.sites.flare_server.FedloomServer", "client": "fedloom.sites.flare_site.FedloomSite"}
_HEART_BEAT_SECONDS = 60
_STARTUP_KEYS = {
    "server": {"format_version", "servers"},
    "client": {"format_version", "servers", "client"},
}
_SERVER_ENTRY = {
    "name",
    "service",
    "admin_server",
    "admin_port",
    "ssl_private_key",
    "ssl_cert",
    "ssl_root_cert",
    "connection_security",
    "identity",
}
_CLIENT_ENTRY = {"ssl_private_key", "ssl_cert", "ssl_root_cert", "fqsn", "is_leaf", "connection_security"}


@dataclass(frozen=True)
class FlareKit:
    """An installed kit of FLARE: its folder, the project, the name in it and where the server is."""

    folder: Path
    role: Role
    project: str
    name: str
    organisation: str
    address: str


def is_flare_kit(folder: Path | str, role: Role) -> bool:
    """Say whether a folder is a startup kit of FLARE, and not plain certificates."""
    return _startup(Path(folder), role).is_file()


def close_kit(folder: Path, role: Role) -> None:
    """Write the local files of a new kit so that nobody can start anything in it."""
    local = folder / "local"
    durable.write_json(local / "resources.json", _resources(folder, role))
    rights = {"format_version": "1.0", "permissions": dict.fromkeys(ROLES, "none")}
    durable.write_json(local / "authorization.json", rights)
    durable.write_json(local / "comm_config.json", _CONNECTIONS)
    for path in (*local.glob("*.default"), *local.glob("*.sample")):
        if path.name != "log_config.json.default":
            path.unlink()


def check_kit(folder: Path | str, role: Role) -> FlareKit:
    """Read a kit of FLARE, and refuse one in which anybody could start a job or a command.

    A server's kit that was moved is told its new place: FLARE wants whole paths.

    Raises:
        RunError: one line per thing that is open.
    """
    folder = Path(folder).absolute()
    lines = [f"{line}; {REMEDY}" for line in _open_doors(folder, role)]
    if lines:
        raise RunError("\n".join(lines))
    path = folder / "local" / "resources.json"
    if role == "server" and _place(_json(path), folder) != folder:
        durable.write_json(path, _resources(folder, role))
    startup = _json(_startup(folder, role))
    server = startup["servers"][0]
    name, organisation = _subject(folder, role)
    return FlareKit(folder, role, server["name"], name, organisation, server["service"]["target"])


def _open_doors(folder: Path, role: Role) -> Iterator[str]:
    yield from _foreign_files(folder)
    yield from _startup_doors(_startup(folder, role), role)
    path = folder / "local" / "comm_config.json"
    if (found := _json(path)) != _CONNECTIONS:
        yield f"{path}: expected {json.dumps(_CONNECTIONS)}, got {_shown(found)}"
    path = folder / "local" / "resources.json"
    resources = _json(path)
    wanted = _resources(_place(resources, folder), role)
    for key in sorted({*resources, *wanted}):
        if key == "components" and isinstance(resources.get(key), list):
            yield from _component_doors(path, resources[key], wanted[key])
        elif resources.get(key) != wanted.get(key):
            yield (
                f"{path}: {key}: expected {_shown(wanted.get(key))}, got {_shown(resources.get(key))}: a job or a "
                "command could be started through it"
            )
    yield from _rights_doors(folder / "local" / "authorization.json")


def _component_doors(path: Path, found: list[Any], wanted: list[Any]) -> Iterator[str]:
    for component in found:
        if component not in wanted:
            yield f"{path}: components: expected none but fedloom's, got {_shown(component)}"
    for component in wanted:
        if component not in found:
            yield f"{path}: components: expected {_shown(component)}, got none such"


def _rights_doors(path: Path) -> Iterator[str]:
    rights = _json(path)
    permissions = rights.get("permissions")
    if set(rights) != {"format_version", "permissions"} or not isinstance(permissions, dict) or not permissions:
        yield f"{path}: expected format_version and permissions, got {_shown(sorted(rights))}"
        return
    for role, right in permissions.items():
        given = right if isinstance(right, dict) else {"every right": right}
        for name, value in given.items():
            if value != "none":
                yield f"{path}: {role}: {name}: expected none, got {_shown(value)}: somebody could use it here"


def _startup_doors(path: Path, role: Role) -> Iterator[str]:
    """FLARE merges this file with resources.json, so it must not add anything."""
    startup = _json(path)
    servers = startup.get("servers")
    if not (isinstance(servers, list) and len(servers) == 1 and isinstance(servers[0], dict)):
        yield f"{path}: servers: expected one server, got {_shown(servers)}"
        return
    server, service = servers[0], servers[0].get("service")
    if not (isinstance(service, dict) and isinstance(service.get("target"), str) and ":" in service["target"]):
        yield f"{path}: service: expected a target host:port, got {_shown(service)}"
    tables = [(server, _SERVER_ENTRY, "servers"), (startup, _STARTUP_KEYS[role], "the file")]
    if role == "client":
        tables.append((startup.get("client") or {}, _CLIENT_ENTRY, "client"))
    for table, known, where in tables:
        for key in sorted(set(table) - known):
            yield f"{path}: {where}: expected {', '.join(sorted(known))}, got {key}"
    secured = server if role == "server" else startup.get("client") or {}
    if secured.get("connection_security") != "mtls":
        yield (
            f"{path}: connection_security: expected mtls (both ends show a certificate), got "
            f"{_shown(secured.get('connection_security'))}"
        )


def _foreign_files(folder: Path) -> Iterator[str]:
    """Other files that FLARE reads: more resources, filters, and Python beside the kit."""
    for place in (folder / "startup", folder / "local"):
        for path in sorted(place.glob("*_resources.json")):
            yield f"{path}: expected no further resources, got a file that FLARE reads at its start"
    for path in sorted(folder.rglob("comm_config*")):  # FLARE takes the first that it finds, wherever that is
        if path != folder / "local" / "comm_config.json":
            yield f"{path}: expected one file of connections, in local/, got another"
    local = folder / "local"
    for name in ("custom", "privacy.json", "study_runtime.yaml"):
        if (local / name).exists():
            yield f"{local / name}: expected nothing of this name, got a file or folder that FLARE would use"


def _place(resources: Mapping[str, Any], folder: Path) -> Path:
    """Return the folder that a server's resources were written for; of others, ``folder``."""
    try:
        storage = resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"]
        return Path(storage).parent if Path(storage).is_absolute() else folder
    except (KeyError, TypeError):
        return folder


def _resources(folder: Path, role: Role) -> dict[str, Any]:
    own = {"id": "fedloom", "path": _COMPONENT[role], "args": {}}
    closed: dict[str, Any] = {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [],
    }
    if role == "client":
        closed |= {"allow_log_streaming": False, "client": {"retry_timeout": 30, "compression": "Gzip"}}
        return {**closed, "components": [own]}
    # FLARE's server does not start without a place for jobs; without a launcher and a scheduler none ever runs.
    place = str(folder.absolute())
    storage = {
        "path": "nvflare.app_common.storages.filesystem_storage.FilesystemStorage",
        "args": {"root_dir": f"{place}/snapshots", "uri_root": "/"},
    }
    persistor = "nvflare.app_common.state_persistors.storage_state_persistor.StorageStatePersistor"
    jobs = {"uri_root": f"{place}/jobs", "job_store_id": "job_store"}
    server = {
        "admin_storage": "transfer",
        "max_num_clients": 10000,
        "heart_beat_timeout": _HEART_BEAT_SECONDS,
        "admin_timeout": 10.0,
    }
    return {
        **closed,
        "servers": [server],
        "snapshot_persistor": {"path": persistor, "args": {"uri_root": "/", "storage": storage}},
        "components": [
            {"id": "job_manager", "path": "nvflare.apis.impl.job_def_manager.SimpleJobDefManager", "args": jobs},
            {"id": "job_store", "path": "nvflare.app_common.storages.filesystem_storage.FilesystemStorage"},
            own,
        ],
    }


def _startup(folder: Path, role: Role) -> Path:
    return folder / "startup" / f"fed_{role}.json"


def _subject(folder: Path, role: Role) -> tuple[str, str]:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    subject = x509.load_pem_x509_certificate((folder / "startup" / f"{role}.crt").read_bytes()).subject

    def first(oid: x509.ObjectIdentifier) -> str:
        found = subject.get_attributes_for_oid(oid)
        return str(found[0].value) if found else ""

    return first(NameOID.COMMON_NAME), first(NameOID.ORGANIZATION_NAME)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or "").lower() if isinstance(error, OSError) else ""
        raise RunError(f"{path}: expected a kit's file, got {reason or 'no JSON'}; {REMEDY}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: expected a JSON object, got {type(found).__name__}; {REMEDY}")
    return found


def _shown(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
