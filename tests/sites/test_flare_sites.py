"""Sites over NVIDIA FLARE on loopback: provisioning by FLARE's commands, the link's contract, and a run of three."""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from memory_link import adapter_of
from site_ends import frames, free_port, wait, write_toml

from fedloom import config
from fedloom.cli.app import exit_code
from fedloom.data.sources import Split, load_rows
from fedloom.errors import RunError
from fedloom.experiment.session import run
from fedloom.run_folder.reader import read_run
from fedloom.sites import provisioning
from fedloom.sites.flare_link import CONSOLE, FlareLink, FlareServerLink, FlareSiteLink
from fedloom.sites.flare_pipe import PIECE_BYTES
from fedloom.sites.grpc_link import check_free
from fedloom.sites.kit_check import FlareKit, check_kit
from fedloom.sites.link import SERVER
from fedloom.sites.study import load_study

pytestmark = [pytest.mark.extra("sites"), pytest.mark.slow]
NAMES = ("berlin", "oslo", "rome")
LARGEST = 3 * PIECE_BYTES
FLORA: dict[str, dict[str, Any]] = {
    "method": {"name": "flora", "ranks": [16, 8, 4]},
    "federation": {"num_rounds": 6, "min_clients": 2},
    "training": {"local_steps": 6, "batch_size": 8, "learning_rate": 1e-3},
    "data": {"eval_path": "embedded", "template": "plain"},
}


class Project:
    """An authority, a server's kit and three sites' kits, all for loopback."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.study_file = folder, folder / "study.toml"
        folder.mkdir()
        tables: dict[str, dict[str, Any]] = {
            **FLORA,
            "sites": {
                "names": list(NAMES),
                "kit": str(folder / "server"),
                "address": f"localhost:{port}",
                "quorum": 2,
                "grace_s": 30.0,
                "deadline_s": 240.0,
            },
        }
        write_toml(self.study_file, tables)
        self.study = load_study(self.study_file)
        self.authority = folder / "ca"
        self.begun = provisioning.begin(self.study, "study", "localhost", port, self.authority)

    def signed(self, name: str) -> Path:
        asked = provisioning.request(name, "study", "charite", self.folder / name)
        return provisioning.approve(asked, self.study, self.authority)

    def add(self, name: str) -> Path:
        kit = self.folder / "kits" / name
        return provisioning.install(self.signed(name), self.begun.fingerprint, self.folder / name, kit)

    def kit(self, name: str) -> FlareKit:
        return check_kit(self.folder / "kits" / name, "client")

    @property
    def server_kit(self) -> FlareKit:
        return check_kit(self.folder / "server", "server")


def is_free(address: str) -> bool:
    try:
        check_free(address)
    except RunError:
        return False
    return True


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))  # FLARE keeps its records of requests there
        found = Project(folder / "here", free_port())
        for name in NAMES:
            found.add(name)
        yield found


class Ends:
    """The links that a test opened."""

    def __init__(self, project: Project) -> None:
        self.project, self.open = project, list[FlareLink]()
        self.notes: list[str] = []
        self.refused: list[str] = []

    def server(self, *names: str) -> FlareServerLink:
        link = FlareServerLink(self.project.server_kit, names or NAMES, LARGEST, self.notes.append)
        self.open.append(link)
        return link

    def site(self, name: str, kit: FlareKit | None = None) -> FlareSiteLink:
        link = FlareSiteLink(kit or self.project.kit(name), LARGEST, self.notes.append, self.refused.append)
        self.open.append(link)
        return link


@pytest.fixture
def ends(project: Project) -> Iterator[Ends]:
    found = Ends(project)
    yield found
    for link in reversed(found.open):
        link.close()
    assert all(link.process is None or link.process.poll() is not None for link in found.open)


def test_frames_of_every_size_and_a_thousand_small_ones_arrive_whole_and_in_order(ends: Ends) -> None:
    server, site = ends.server(), ends.site("oslo")
    wait(lambda: site.send(SERVER, b"hello"))
    assert frames(server, 1) == [("oslo", b"hello")]
    assert listening_beyond_loopback(ends.open) == []
    sizes = (0, 1, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 7)
    for number, size in enumerate(sizes):
        data = bytes([number]) * size
        assert site.send(SERVER, data)
        assert frames(server, 1) == [("oslo", data)]
        assert server.send("oslo", data)
        if data:  # an empty frame at a site says that it is connected
            assert frames(site, 1) == [(SERVER, data)]

    def send() -> None:
        for number in range(1000):
            assert site.send(SERVER, str(number).encode())

    sender = threading.Thread(target=send)
    sender.start()
    assert frames(server, 1000) == [("oslo", str(number).encode()) for number in range(1000)]
    sender.join()
    assert not server.send("rome", b"nobody")
    assert site.send(SERVER, bytes(LARGEST + 1))
    assert site.send(SERVER, b"after one that is too long")
    assert frames(server, 1) == [("oslo", b"after one that is too long")]


def listening_beyond_loopback(links: list[FlareLink]) -> list[str]:
    """Return the addresses at which FLARE's processes listen, and which are not 127.0.0.1."""
    own = set()
    for link in links:
        assert link.process is not None
        for entry in Path(f"/proc/{link.process.pid}/fd").iterdir():
            if (name := str(entry.readlink())).startswith("socket:["):
                own.add(name[8:-1])
    assert own
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [line[1] for line in lines if line[3] == "0A" and line[9] in own]
    assert listening
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:")
    return [address for address in listening if not address.startswith(loopback)]


def test_a_server_that_comes_back_is_reached_again_and_a_revoked_site_is_turned_away_while_it_runs(
    ends: Ends, project: Project
) -> None:
    server, site = ends.server(), ends.site("rome")
    wait(lambda: site.send(SERVER, b"one"))
    assert frames(server, 1) == [("rome", b"one")]
    server.close()
    wait(lambda: not site.send(SERVER, b"lost"))
    again = ends.server()
    wait(lambda: site.send(SERVER, b"two"))
    wait(lambda: ("rome", b"two") in list(again.inbox.queue))
    wait(lambda: again.send("rome", b"three"))
    assert frames(site, 1) == [(SERVER, b"three")]
    provisioning.revoke("rome", project.study, project.authority)
    try:
        wait(lambda: not again.send("rome", b"x"), 20)
        wait(lambda: not site.send(SERVER, b"x"), 20)
        assert {member.name: member.state for member in provisioning.members(project.study, project.authority)}[
            "rome"
        ] == "revoked"
        site.close()
        ends.site("rome")
        wait(lambda: ends.refused)
        assert "rome is revoked" in ends.refused[0]
    finally:
        (project.folder / "server" / provisioning.REVOKED).unlink()


def test_a_site_that_the_study_does_not_name_gets_nothing_through_and_is_told(ends: Ends) -> None:
    server, site = ends.server("berlin", "oslo"), ends.site("rome")
    wait(lambda: ends.refused)
    assert "not a site of this study" in ends.refused[0]
    assert not site.send(SERVER, b"x")
    assert not server.send("rome", b"x")
    assert server.inbox.empty()


def test_a_certificate_of_another_project_gets_nothing_through(ends: Ends, project: Project, tmp_path: Path) -> None:
    other = Project(tmp_path / "other", int(project.server_kit.address.rpartition(":")[2]))
    other.add("oslo")
    server = ends.server()
    site = ends.site("oslo", other.kit("oslo"))
    wait(lambda: "certificate does not fit" in " ".join(ends.notes))
    assert not site.send(SERVER, b"x")
    with pytest.raises(queue.Empty):
        server.inbox.get(timeout=1)


def test_a_server_whose_port_is_taken_is_one_line(ends: Ends, project: Project) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of an earlier test's connections
        taken.bind(("127.0.0.1", int(project.server_kit.address.rpartition(":")[2])))
        taken.listen()
        with pytest.raises(RunError, match=r"expected .* free port"):
            ends.server()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert exit_code([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def test_each_way_in_which_provisioning_fails_is_one_line_with_a_remedy(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study, zipped = project.study_file, project.folder / "oslo" / "oslo.signed.zip"
    assert "expected a new folder" in refused(capsys, "sites", "init", study, "--host", "localhost")
    options = ("--project", "study", "--org", "charite")
    again = ("site", "request", "oslo", *options, "--out", project.folder / "oslo")
    assert "expected no such file yet" in refused(capsys, *again)
    assert "Invalid name" in refused(capsys, "site", "request", "os lo", *options)
    assert exit_code(["site", "request", "paris", *options]) == 0
    approve = ("sites", "approve", "paris/paris.request.zip", "--study", study)
    assert "expected a site of the study (berlin, oslo, rome), got paris" in refused(capsys, *approve)
    assert exit_code(["site", "request", "oslo", "--project", "other", "--org", "charite"]) == 0
    assert "other" in refused(capsys, "sites", "approve", "oslo/oslo.request.zip", "--study", study)
    Path("x.zip").write_bytes(b"no zip")
    assert "expected a request" in refused(capsys, "sites", "approve", "x.zip", "--study", study)
    approve = ("sites", "approve", project.folder / "oslo" / "oslo.request.zip", "--study", study)
    assert "expected no such file yet" in refused(capsys, *approve)
    assert "sites init" in refused(capsys, *approve, "--ca", tmp_path)
    other = "SHA256:" + ":".join(["AA"] * 32)
    install = ("site", "install", zipped, "--request", project.folder / "oslo", "--kit", "kit")
    assert "telephone" in refused(capsys, *install, "--fingerprint", other)
    assert "fingerprint" in refused(capsys, *install, "--fingerprint", "SHA256:AA")
    assert not Path("kit").exists()
    true = project.begun.fingerprint
    assert "oslo.key" in refused(capsys, *install[:3], "--kit", "kit", "--request", "paris", "--fingerprint", true)
    Path("kit").mkdir()
    assert "expected a new folder for the kit" in refused(capsys, *install, "--fingerprint", true)
    assert "expected one of berlin, oslo, rome" in refused(capsys, "sites", "revoke", "paris", "--study", study)
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_key_never_leaves_the_site_and_the_kit_is_its_owners_alone(project: Project) -> None:
    import zipfile

    key = (project.folder / "oslo" / "oslo.key").read_bytes()
    for name in ("oslo.request.zip", "oslo.signed.zip"):
        with zipfile.ZipFile(project.folder / "oslo" / name) as archive:
            assert not [member for member in archive.namelist() if b"PRIVATE" in archive.read(member)]
    kit = project.folder / "kits" / "oslo"
    assert (kit / "startup" / "client.key").read_bytes() == key
    assert (kit / "startup" / "client.key").stat().st_mode & 0o077 == 0
    assert kit.stat().st_mode & 0o077 == 0


def lead_kit(project: Project, folder: Path) -> Path:
    """Make a kit of a person whom FLARE's own defaults would let submit jobs and run commands."""
    name, flare = LEAD, provisioning._flare
    folder.mkdir()
    person = {"name": name, "type": "admin", "org": "charite", "role": "lead"}
    (folder / "lead.yaml").write_text(json.dumps({"name": "study", "participants": [person]}))
    flare("cert", "request", "-p", folder / "lead.yaml", "--out", folder / "asked")
    asked, signed = folder / "asked" / f"{name}.request.zip", folder / f"{name}.signed.zip"
    with pytest.raises(RunError, match="expected a site of the study"):
        provisioning.approve(asked, project.study, project.authority)
    profile = project.authority / "profile.yaml"
    flare("cert", "approve", "-c", project.authority, "--profile", profile, "--out", signed, asked)
    proof = ("--fingerprint", project.begun.fingerprint)
    made = flare("package", signed, "--request-dir", folder / "asked", *proof, "-w", folder / "made")
    return Path(made["output_dir"])


LEAD = "lead@charite.org"
IN_A_PROCESS_OF_ITS_OWN = """
import json, os, sys, time
from nvflare.fuel.flare_api.flare_api import new_secure_session
session = new_secure_session(sys.argv[1], sys.argv[2])
answers = {}
try:
    job = session.submit_job(sys.argv[3])
    time.sleep(15)
    answers["job"] = session.get_job_meta(job)
except Exception as error:
    answers["job"] = f"{type(error).__name__}: {error}"
for command in ("ls oslo", "cat oslo log.txt", "shutdown client oslo"):
    answers[command] = str(session.do_command(command))
print("ANSWERS" + json.dumps(answers, default=str), flush=True)
os._exit(0)  # FLARE's session leaves threads behind
"""


def asked_by_the_lead(kit: Path, job: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, LEAD, str(kit), str(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    answers: dict[str, Any] = json.loads(done.stdout.rpartition("ANSWERS")[2])
    return answers


def test_a_submitted_job_and_commands_are_refused_by_the_server_and_where_it_lets_them_by_the_site(
    ends: Ends, project: Project, tmp_path: Path
) -> None:
    kit, job = lead_kit(project, tmp_path / "lead"), tmp_path / "job"
    (job / "app" / "config").mkdir(parents=True)
    (job / "meta.json").write_text(
        json.dumps({"name": "evil", "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["@ALL"]}})
    )
    for role, parts in (("server", {"workflows": []}), ("client", {"executors": []})):
        text = json.dumps({"format_version": 2, "components": [], **parts})
        (job / "app" / "config" / f"config_fed_{role}.json").write_text(text)
    server, site = ends.server(), ends.site("oslo")
    wait(lambda: site.send(SERVER, b"one"))
    answers = asked_by_the_lead(kit, job)
    assert "not authorized" in answers["job"]
    server.close()
    local, closed = project.folder / "server" / "local", project.server_kit
    before = {path: path.read_bytes() for path in local.glob("*.json")}
    try:  # a coordinator who wants to
        resources = json.loads((local / "resources.json").read_text())
        scheduler = "nvflare.app_common.job_schedulers.job_scheduler.DefaultJobScheduler"
        launcher = "nvflare.app_common.job_launcher.server_process_launcher.ServerProcessJobLauncher"
        resources["components"] += [
            {"id": "job_scheduler", "path": scheduler, "args": {"max_jobs": 4}},
            {"id": "process_launcher", "path": launcher, "args": {}},
        ]
        resources["class_list_enforcement_mode"] = "off"
        (local / "resources.json").write_text(json.dumps(resources))
        rights = {"format_version": "1.0", "permissions": {"lead": "any"}}
        (local / "authorization.json").write_text(json.dumps(rights))
        ends.open.append(again := FlareServerLink(closed, NAMES, LARGEST, ends.notes.append))
        wait(lambda: site.send(SERVER, b"two"))
        answers = asked_by_the_lead(kit, job)
        assert answers["job"]["status"] == "SUBMITTED"
        assert "not enough sites" in str(answers["job"])
        assert all("is not authorized" in answers[name] for name in answers if name != "job")
        wait(lambda: site.send(SERVER, b"three"))
        wait(lambda: ("oslo", b"three") in list(again.inbox.queue))
    finally:
        for path, data in before.items():
            path.write_bytes(data)


class Commands:
    """A study's server and its sites, in processes of their own, with what they print in files."""

    def __init__(self, project: Project, folder: Path, study: dict[str, dict[str, Any]], **policy: object) -> None:
        self.project, self.folder, self.started = project, folder, dict[str, subprocess.Popen[bytes]]()
        rows = list(load_rows("embedded", Split.TRAIN).rows)
        (folder / "rows").mkdir()
        sites = {**project.study.sites.model_dump(mode="json", exclude_unset=True), **study.pop("sites", {})}
        write_toml(folder / "study.toml", {**study, "sites": sites})
        for number, name in enumerate(NAMES):
            path = folder / "rows" / f"local_training_{number}.json"
            path.write_text(json.dumps(rows[number :: len(NAMES)]))
            site = {
                "name": name,
                "server": project.kit(name).address,
                "kit": str(project.folder / "kits" / name),
                "folder": str(folder / name),
            }
            tables = {"site": site, "data": {"path": str(path)}, "policy": {"confirm": "never", **policy}}
            write_toml(folder / f"{name}.toml", tables)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def serve(self) -> None:
        self._start("server", "serve", str(self.folder / "study.toml"), "--out", str(self.run))

    def take_part(self, name: str) -> None:
        self._start(name, "site", "run", str(self.folder / f"{name}.toml"))

    def wait_for_round(self, number: int) -> None:
        until = self.run / "rounds" / str(number)
        wait(lambda: until.is_dir() or self.started["server"].poll() is not None, 480)
        assert until.is_dir(), self.told("server")

    def kill(self, name: str) -> None:
        self.started[name].kill()
        self.started[name].wait()

    def told(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def _start(self, name: str, *command: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with (self.folder / f"{name}.log").open("ab") as log:
            line = [sys.executable, "-m", "fedloom", *command]
            self.started[name] = subprocess.Popen(line, stdout=log, stderr=log, env=environment)

    def end(self) -> None:
        for name in self.started:
            self.kill(name)
        shutil.rmtree(self.folder / "rows")

    def begin_with_one_killed(self, name: str) -> None:
        """Serve to all sites; one of them is killed after the first round, and comes back."""
        self.serve()
        for one in NAMES:
            self.take_part(one)
        self.wait_for_round(1)
        self.kill(name)
        self.take_part(name)

    def replayed(self, recipe: dict[str, dict[str, Any]]) -> bytes:
        """Return the adapter of one process in which those take part who counted, and no longer."""
        federation = {**recipe["federation"], "num_clients": len(NAMES), "participation": str(self.run)}
        data = {**recipe["data"], "path": str(self.folder / "rows")}
        changes = {"federation": federation, "data": data, "partition": {"scheme": "natural"}}
        return adapter_of(run(config.resolve({**recipe, **changes}, "a test"), self.folder / "alone").folder)


def test_three_sites_with_one_killed_and_the_server_killed_in_a_round_train_the_adapter_of_one_process(
    project: Project, tmp_path: Path
) -> None:
    commands = Commands(project, tmp_path, dict(FLORA))
    try:
        commands.begin_with_one_killed("oslo")
        commands.wait_for_round(3)
        time.sleep(0.3)  # in round 4
        commands.kill("server")
        wait(lambda: is_free(project.server_kit.address))  # FLARE's process ends with the one that started it
        commands.serve()
        assert commands.started["server"].wait(480) == 0, commands.told("server")
        assert len(read_run(commands.run).records) == 6
        assert adapter_of(commands.run) == commands.replayed(FLORA)
    finally:
        commands.end()


def test_a_site_that_is_killed_while_no_server_is_there_leaves_no_process_of_flare_behind(
    project: Project, tmp_path: Path
) -> None:
    """FLARE is not registered then, and would ask for it for ever."""
    commands = Commands(project, tmp_path, dict(FLORA))
    try:
        commands.take_part("oslo")
        console, site = project.kit("oslo").folder / CONSOLE, psutil.Process(commands.started["oslo"].pid)
        wait(lambda: len(site.children()) == 1 and "CH0000" in console.read_text(), 60)
        (flare,) = site.children()
        assert "nvflare" in " ".join(flare.cmdline())
        commands.kill("oslo")
        wait(lambda: not flare.is_running() or flare.status() == psutil.STATUS_ZOMBIE, 30)
    finally:
        commands.end()


CUT: dict[str, dict[str, Any]] = {
    "method": {"name": "splitlora", "ranks": 4},
    "federation": {"num_rounds": 4, "min_clients": 2},
    "training": {"local_steps": 4, "batch_size": 8, "learning_rate": 1e-3},
    "split": {"cut_layer": 1, "aggregate_every": 4},
    "data": {"template": "plain"},
}


def test_a_cut_model_over_flare_with_a_site_killed_trains_the_adapter_of_one_process(
    project: Project, tmp_path: Path
) -> None:
    commands = Commands(project, tmp_path, {**CUT, "sites": {"step_deadline_s": 60.0}}, split="yes")
    try:
        commands.begin_with_one_killed("oslo")
        assert commands.started["server"].wait(480) == 0, commands.told("server")
        records = read_run(commands.run).records
        assert len(records) == 4
        left = [
            (record["round"], client["name"], client["left_at"]) for record in records for client in record["clients"]
        ]
        assert [one for one in left if one[1] != "oslo" and one[2] is not None] == [], commands.told("server")
        assert adapter_of(commands.run) == commands.replayed(CUT)
    finally:
        commands.end()
