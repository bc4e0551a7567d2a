"""What a person can get wrong on the command line around sites: one line, exit code 2, and what to do about it."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from memory_link import NAMES, Hub, SiteThread, served, site_of, study_of
from site_ends import free_port, wait, write_toml

from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.data.tokenizer import byte_tokenizer, fingerprint
from fedloom.errors import RunError
from fedloom.models.load import load_base
from fedloom.sites.grpc_link import GrpcServerLink, unreachable
from fedloom.sites.kit import read_kit
from fedloom.sites.throwaway_certificates import ThrowawayRoot

pytestmark = pytest.mark.extra("sites")
DAYS = timedelta(days=1)
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, base_folder: Path, site_rows: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Work in a folder with a study, a site's file, and kits that fit and that do not."""
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, base_folder, site_rows)


class Place:
    """The folder, and how its files are written."""

    def __init__(self, folder: Path, base: Path, rows: Path) -> None:
        root, now = ThrowawayRoot(), datetime.now(UTC)
        self.port = free_port()
        root.write(folder / "server", "server", "server")
        root.write(folder / "old-server", "server", "server", now - 3 * DAYS)
        for kit, first in (("berlin", None), ("expired", now - 3 * DAYS), ("early", now + 3 * DAYS)):
            root.write(folder / kit, "client", "berlin", first)
        root.write(folder / "oslo", "client", "oslo")
        ThrowawayRoot().write(folder / "foreign", "client", "berlin")
        shutil.copytree(folder / "foreign", folder / "mixed")
        shutil.copy(folder / "berlin" / "rootCA.pem", folder / "mixed")
        address = f"127.0.0.1:{self.port}"
        model = {"base": str(base), "tokenizer": "bytes"}
        self._study: dict[str, dict[str, Any]] = {
            "model": model,
            "data": {"shape": "dolly", "template": "plain"},
            "method": {"name": "fedit", "ranks": 2},
            "federation": {"num_rounds": 1},
            "training": {"local_steps": 1, "batch_size": 2},
            "sites": {"names": NAMES, "address": address, "kit": "server", "deadline_s": 1.0},
        }
        self._site: dict[str, dict[str, Any]] = {
            "site": {"name": "berlin", "server": address, "kit": "berlin", "folder": "state"},
            "data": {"path": str(rows / "training" / "local_training_0.json")},
            "model": model,
        }
        self.study()
        self.site()

    def study(self, **changes: Any) -> None:
        write_toml(Path("study.toml"), changed(self._study, changes))

    def site(self, **changes: Any) -> None:
        write_toml(Path("site.toml"), changed(self._site, changes))


def changed(document: dict[str, dict[str, Any]], changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {name: dict(values) for name, values in document.items()}
    for name, value in changes.items():
        table, _, key = name.partition("__")
        found.setdefault(table, {})[key] = value
    return found


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs a command, which is refused in one line, and returns that line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert exit_code(list(arguments)) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in errors if line.startswith("error: ")]
        assert len(lines) == 1
        assert errors[-1] == lines[0]
        return lines[0]

    return run


SERVE, RUN, CHECK = (
    ("serve", "study.toml", "--out", "run"),
    ("site", "run", "site.toml"),
    ("site", "check", "site.toml"),
)
REQUEST = ("site", "request", "a", "--project", "p", "--org", "o")


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("grpc", SERVE),
        ("grpc", RUN),
        ("cryptography", SERVE),
        ("cryptography", RUN),
        ("cryptography", ("sites", "demo", "--out", "demo")),
        ("nvflare", ("sites", "init", "study.toml", "--host", "localhost")),
        ("nvflare", REQUEST),
        ("fedloom.sites.signatures", ("sites", "sign", "study.toml")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_what_is_not_installed_is_named_before_anything_is_loaded(
    package: str, command: tuple[str, ...], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    if "." in package:  # a module that another test has loaded is an attribute of its package as well
        parent, _, name = package.rpartition(".")
        monkeypatch.delattr(importlib.import_module(parent), name, raising=False)
    if command[:2] == ("sites", "init"):
        shutil.rmtree("server")
    monkeypatch.setattr("fedloom.sites.site_inputs.load_base", pytest.fail)
    monkeypatch.setattr("fedloom.assembly.inputs.load_base", pytest.fail)
    assert "needs the extra 'sites'; install it: pip install 'fedloom[sites]'" in refused(*command)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("kit", "told"),
    [
        ("expired", r"expired/client.crt: expected a certificate that is valid now, got one valid from"),
        ("early", "and the clock says"),
        ("mixed", "got one of another project; install the kit of this project"),
        ("oslo", "expected a certificate of berlin (site.name), got one of oslo; correct site.name"),
        ("nowhere", "nowhere/client.key: expected a file of the kit, got no such file or directory; install the kit"),
    ],
)
def test_a_kit_that_does_not_fit_ends_a_site_in_one_line(kit: str, told: str, place: Place, refused: Refused) -> None:
    place.site(site__kit=kit)
    for command in (RUN, CHECK):
        assert told in refused(*command)


def test_a_server_that_cannot_listen_says_so_before_it_loads_a_base(
    place: Place, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.assembly.inputs.load_base", pytest.fail)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", place.port))
        taken.listen()
        assert "(address already in use); end what listens there, or set another" in refused(*SERVE)
    place.study(sites__kit="old-server")
    assert "old-server/server.crt: expected a certificate that is valid now" in refused(*SERVE)
    place.study(sites__kit="nowhere")
    assert "nowhere/server.key: expected a file of the kit" in refused(*SERVE)
    place.study(sites__address="203.0.113.1:8002")
    assert "sites.address: expected an address of this machine" in refused(*SERVE)
    place.study(sites__version=2)
    assert "run `fedloom sites sign`" in refused(*SERVE)


def test_fewer_sites_than_the_quorum_name_each_site_and_where_it_stands(place: Place, refused: Refused) -> None:
    place.study(sites__quorum=2)
    line = refused(*SERVE)
    assert "expected 2 sites (sites.quorum) within 1 s (sites.deadline_s), got 0 (berlin: never seen" in line
    assert line.endswith("start the sites, then run the same command again")


def test_a_site_that_the_study_does_not_name_is_told_by_the_server(place: Place, refused: Refused) -> None:
    kit = read_kit("server", "server")
    link = GrpcServerLink(f"127.0.0.1:{place.port}", kit, ("oslo",), 1 << 20)
    try:
        assert "berlin is not a site of this study; ask the coordinator to add the site" in refused(*RUN)
    finally:
        link.close()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"privacy__clip": 0.5}, "privacy: expected one of the tables site, data, model, policy"),
        ({"policy__privacy": 1}, "policy.privacy: expected a setting of [policy]"),
        ({"policy__confirm": "sometimes"}, 'policy.confirm: expected one of "first", "always", "never", got'),
    ],
)
def test_a_line_that_a_sites_file_does_not_know_is_refused(
    changes: dict[str, Any], told: str, place: Place, refused: Refused
) -> None:
    place.site(**changes)
    assert told in refused(*RUN)


@pytest.fixture
def other_base(base_folder: Path, tmp_path: Path) -> Path:
    """Return a base like the study's in another folder, but for one weight."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other-base"
    shutil.copytree(base_folder, folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1.0}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_a_tokenizer_that_differs_is_told_by_both_hashes_at_the_site_and_at_the_server(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    other = byte_tokenizer()
    other.add_tokens(["<longer>", "<than the base's vocabulary>"])
    other.save_pretrained("other")
    told = f"expected tokenizer {fingerprint(byte_tokenizer())[:12]}, it has {fingerprint(other)[:12]}"
    place.study(sites__quorum=1, sites__deadline_s=600.0)
    place.site(model__tokenizer="other", policy__confirm="never")
    environment, log = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, Path("server.log")
    with log.open("wb") as file:
        command = [sys.executable, "-m", "fedloom", *SERVE]
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def end_the_site() -> None:
        wait(lambda: b"it refuses" in log.read_bytes() or server.poll() is not None, 240)
        os.kill(os.getpid(), signal.SIGTERM)  # as a service is stopped

    try:
        wait(lambda: unreachable(f"127.0.0.1:{place.port}", read_kit("berlin", "client")) is None, 240)
        assert exit_code(list(CHECK)) == 0
        assert f"the site refuses this study: {told}" in capsys.readouterr().out
        ender = threading.Thread(target=end_the_site)
        ender.start()
        assert exit_code(list(RUN)) == 0
        ender.join()
    finally:
        server.kill()
        server.wait()
    lines = [line for line in capsys.readouterr().err.splitlines() if "is refused" in line]
    assert [line.partition(": ")[2] for line in lines] == [told]
    (line,) = [line for line in log.read_text().splitlines() if "it refuses" in line]
    assert line.endswith(f"berlin is ready: 0 rows, holds version 0, but it refuses: {told}")


def test_a_base_that_differs_and_a_policy_that_refuses_are_in_the_servers_line(
    recipe: Callable[..., Settings], site_rows: Path, base_folder: Path, other_base: Path, tmp_path: Path
) -> None:
    hub, rows = Hub(), site_rows / "training" / "local_training_0.json"
    sites = [
        SiteThread(site_of("berlin", rows, tmp_path / "state", other_base), hub),
        SiteThread(site_of("oslo", rows, tmp_path / "state", base_folder, max_rank=1), hub),
    ]
    study = study_of(recipe(), NAMES, quorum=2, deadline_s=10.0)
    try:
        with pytest.raises(RunError) as refusal:
            served(study, tmp_path / "served", hub)
    finally:
        for site in sites:
            site.end()
    (line,) = str(refusal.value).splitlines()
    ours, theirs = (load_base(folder, tokenizer="bytes").revision_hash[:12] for folder in (base_folder, other_base))
    assert ours != theirs
    assert f"left out: expected base {ours}, it has {theirs}" in line
    assert "left out: its policy (policy.max_rank) allows ranks up to 1, the study asks for 2" in line
    assert "rome: never seen" in line
