"""A kit of FLARE passes as it is installed, and with anything else in it that FLARE would read it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import RunError
from fedloom.sites.kit_check import Role, check_kit, close_kit, is_flare_kit
from fedloom.sites.throwaway_certificates import ThrowawayRoot

pytestmark = pytest.mark.extra("sites")

STARTUP: dict[Role, dict[str, Any]] = {
    "client": {
        "format_version": 2,
        "servers": [
            {"name": "study", "service": {"target": "localhost:8002", "scheme": "grpc"}, "identity": "localhost"}
        ],
        "client": {
            "ssl_private_key": "client.key",
            "ssl_cert": "client.crt",
            "ssl_root_cert": "rootCA.pem",
            "fqsn": "oslo",
            "is_leaf": True,
            "connection_security": "mtls",
        },
    },
    "server": {
        "format_version": 2,
        "servers": [
            {
                "name": "study",
                "service": {"target": "localhost:8002", "scheme": "grpc"},
                "admin_server": "localhost",
                "admin_port": 8002,
                "ssl_private_key": "server.key",
                "ssl_cert": "server.crt",
                "ssl_root_cert": "rootCA.pem",
                "connection_security": "mtls",
            }
        ],
    },
}


def kit(folder: Path, role: Role) -> Path:
    ThrowawayRoot().write(folder / "startup", role, "oslo")
    (folder / "startup" / f"fed_{role}.json").write_text(json.dumps(STARTUP[role]))
    (folder / "local").mkdir()
    (folder / "local" / "resources.json.default").write_text("{}")
    close_kit(folder, role)
    return folder


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_kit_as_it_is_installed_passes_and_says_where_the_server_is(tmp_path: Path, role: Role) -> None:
    folder = kit(tmp_path / "kit", role)
    assert is_flare_kit(folder, role)
    found = check_kit(folder, role)
    assert (found.name, found.project, found.address) == ("oslo", "study", "localhost:8002")
    assert not (folder / "local" / "resources.json.default").exists()


def test_a_servers_kit_that_was_moved_is_told_its_new_place(tmp_path: Path) -> None:
    moved = kit(tmp_path / "kit", "server").rename(tmp_path / "moved")
    check_kit(moved, "server")
    text = (moved / RESOURCES).read_text()
    assert f"{moved}/jobs" in text
    assert f"{moved}/snapshots" in text
    assert str(tmp_path / "kit") not in text


def edited(path: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        document = json.loads((folder / path).read_text())
        change(document)
        (folder / path).write_text(json.dumps(document))

    return edit


def written(path: str, text: str = "{}") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)

    return write


RESOURCES, RIGHTS, CONNECTIONS = "local/resources.json", "local/authorization.json", "local/comm_config.json"
LAUNCHER = {
    "id": "process_launcher",
    "path": "nvflare.app_common.job_launcher.client_process_launcher.ClientProcessJobLauncher",
    "args": {},
}
OPEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "launcher": (edited(RESOURCES, lambda r: r["components"].append(LAUNCHER)), "process_launcher"),
    "any component": (edited(RESOURCES, lambda r: r["components"].append({"id": "x", "path": "x.Y"})), "components"),
    "ours with another class": (
        edited(RESOURCES, lambda r: r["components"][-1].update(path="os.system")),
        "os.system",
    ),
    "ours with arguments": (edited(RESOURCES, lambda r: r["components"][-1].update(args={"a": 1})), "components"),
    "no component": (edited(RESOURCES, lambda r: r["components"].clear()), "got none such"),
    "classes": (edited(RESOURCES, lambda r: r["class_allow_list"].append("nvflare.X")), "class_allow_list"),
    "no list of classes": (edited(RESOURCES, lambda r: r.pop("class_allow_list")), "class_allow_list"),
    "classes not enforced": (edited(RESOURCES, lambda r: r.update(class_list_enforcement_mode="off")), "enforce"),
    "a validator": (edited(RESOURCES, lambda r: r.update(app_validator={"path": "x.Y"})), "app_validator"),
    "a relay": (edited(RESOURCES, lambda r: r.update(relay_config={"address": "x"})), "relay_config"),
    "logs to the server": (edited(RESOURCES, lambda r: r.update(allow_log_streaming=True)), "allow_log_streaming"),
    "one right": (
        edited(RIGHTS, lambda r: r["permissions"].update(lead={"submit_job": "any", "view": "none"})),
        "lead: submit_job",
    ),
    "a role": (edited(RIGHTS, lambda r: r["permissions"].update(project_admin="any")), "project_admin"),
    "all but": (edited(RIGHTS, lambda r: r["permissions"].update(member="not o:other")), "member"),
    "a list": (edited(RIGHTS, lambda r: r["permissions"].update(member=["none", "any"])), "member"),
    "no rights stated": (edited(RIGHTS, lambda r: r.update(permissions={})), "permissions"),
    "allow beside permissions": (edited(RIGHTS, lambda r: r.update(allow="any")), "allow"),
    "no file of rights": (lambda folder: (folder / RIGHTS).unlink(), "authorization.json"),
    "rights that are no JSON": (written(RIGHTS, "x"), "no JSON"),
    "more resources": (written("local/more__resources.json"), "more__resources"),
    "more resources in startup": (written("startup/a__p_resources.json"), "a__p_resources"),
    "own code": (written("local/custom/x.py", ""), "custom"),
    "a filter": (written("local/privacy.json"), "privacy.json"),
    "connections open": (edited(CONNECTIONS, lambda c: c.pop("internal")), "comm_config"),
    "other connections first": (written("startup/comm_config.json"), "comm_config"),
}
CLIENTS_OWN = {
    "no certificates": (
        edited("startup/fed_client.json", lambda s: s["client"].update(connection_security="clear")),
        "connection_security",
    ),
    "components at startup": (
        edited("startup/fed_client.json", lambda s: s.update(components=[LAUNCHER])),
        "components",
    ),
    "no server": (edited("startup/fed_client.json", lambda s: s.update(servers=[])), "servers"),
    "no target": (edited("startup/fed_client.json", lambda s: s["servers"][0].pop("service")), "target"),
    "no startup file that can be read": (written("startup/fed_client.json", "[]"), "fed_client.json"),
}


@pytest.mark.parametrize(("change", "told"), [*OPEN.values(), *CLIENTS_OWN.values()], ids=[*OPEN, *CLIENTS_OWN])
def test_a_site_whose_kit_is_open_is_refused_and_told_where(
    tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    folder = kit(tmp_path / "kit", "client")
    change(folder)
    with pytest.raises(RunError, match=told) as refused:
        check_kit(folder, "client")
    assert all("expected" in line and "install the kit again" in line for line in str(refused.value).split("\n"))


@pytest.mark.parametrize(("change", "told"), OPEN.values(), ids=OPEN)
def test_the_servers_kit_is_held_to_the_same(tmp_path: Path, change: Callable[[Path], None], told: str) -> None:
    if "allow_log_streaming" in told:
        pytest.skip("the server streams no log of its own")
    folder = kit(tmp_path / "kit", "server")
    change(folder)
    with pytest.raises(RunError, match=told):
        check_kit(folder, "server")


def test_plain_certificates_are_no_kit_of_flare(tmp_path: Path) -> None:
    assert not is_flare_kit(ThrowawayRoot().write(tmp_path, "client", "oslo"), "client")
