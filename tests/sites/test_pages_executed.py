"""Every command of the pages about sites is executed, in the order in which two people would type them.

Placeholders are substituted: the host, the port, the fingerprint, names of files that travel between the two.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from site_ends import free_port, wait, write_toml

from fedloom.cli.app import exit_code
from fedloom.data.sources import Split, load_rows
from fedloom.sites import site_run
from fedloom.sites.study import load_study

pytestmark = [pytest.mark.extra("sites"), pytest.mark.slow]
PAGES = Path(__file__).parents[2] / "docs" / "sites"
FENCE = re.compile(r"^```(?:text|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(fedloom sites? [a-z]+ [^`]*\s[^`]*)`")
ELSEWHERE = {
    "pip install 'fedloom[sites]'": "scripts/try_install.py, in an empty environment",
    "fedloom sites demo": "test_sites_demo.py",
    "sudo cp fedloom-site.service /etc/systemd/system/ && sudo systemctl enable --now fedloom-site": "needs systemd; "
    "test_service_files.py checks the unit",
}
PAGES_WITH_COMMANDS = ("coordinator.md", "site-owner.md", "index.md", "security.md")
HOST, PORT, NAME = "fl.example.org", "8002", "hospital-a"


def commands_of(page: str) -> list[str]:
    """Return the commands of a page, as they are written, without what they explain."""
    text = (PAGES / page).read_text("utf-8")
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]
    return found + [command for command in INLINE.findall(text) if " NAME" not in command]


def examples(page: str) -> list[dict[str, Any]]:
    blocks = re.findall(r"^```toml\n(.*?)^```$", (PAGES / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [tomllib.loads(block) for block in blocks]


class Reader:
    """Types what the pages say into one folder, and remembers what was typed."""

    def __init__(self, folder: Path, read: Callable[[], str]) -> None:
        self.folder, self._read = folder, read
        self.left = [command for page in PAGES_WITH_COMMANDS for command in commands_of(page)]
        self.started: list[subprocess.Popen[bytes]] = []
        self.port = str(free_port())
        self.changes = {HOST: "localhost", PORT: self.port}

    def words(self, beginning: str) -> tuple[list[str], str | None]:
        """Take the next command that begins so off the list; return its words, and the file its output goes to."""
        command = next(command for command in self.left if command.startswith(beginning))
        self.left.remove(command)
        for old, new in self.changes.items():
            command = command.replace(old, new)
        command, _, into = command.partition(" > ")
        return shlex.split(command)[1:], into.strip() or None

    def type(self, beginning: str) -> str:
        """Type a command as the page has it, and return what it prints."""
        words, into = self.words(beginning)
        self._read()
        assert exit_code(words) == 0, words
        printed = self._read()
        if into is not None:
            (self.folder / into).write_text(printed)
        return printed

    def begin(self, beginning: str) -> subprocess.Popen[bytes]:
        """Type a command that goes on."""
        words, _ = self.words(beginning)
        with (self.folder / f"{words[0]}.log").open("ab") as log:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            process = subprocess.Popen(
                [sys.executable, "-m", "fedloom", *words], stdout=log, stderr=log, env=environment, cwd=self.folder
            )
        self.started.append(process)
        return process


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # FLARE keeps its records of requests there
    monkeypatch.setattr(site_run, "_SECONDS_FOR_FLARE", 240.0)
    found = Reader(tmp_path, lambda: capsys.readouterr().out)
    yield found
    for process in found.started:
        process.kill()
        process.wait()


def write_study(folder: Path, second: dict[str, Any] | None = None) -> None:
    """Write the page's study, smaller: two rounds of one step, and one site is enough."""
    study = {**examples("coordinator.md")[0]}
    study["data"] = {**study["data"], "max_length": 128}  # the embedded base's context
    study["federation"] = {"num_rounds": 2, "min_clients": 1}
    study["training"] = {**study["training"], "local_steps": 1, "batch_size": 2}
    study["sites"] = {**study["sites"], "quorum": 1, "grace_s": 1.0, "deadline_s": 240.0, **(second or {})}
    if second is not None:
        study["method"] = {**study["method"], "ranks": {**study["method"]["ranks"], "hospital-d": 4}}
    write_toml(folder / "study.toml", study)


def write_site(folder: Path, port: str) -> None:
    """Write the page's file of a site, for the kit that was installed."""
    site = examples("site-owner.md")[0]
    site["site"] = {**site["site"], "server": f"localhost:{port}", "kit": f"kit/{NAME}"}
    site["data"] = {"path": "notes.jsonl", "eval_fraction": site["data"]["eval_fraction"]}
    rows = list(load_rows("embedded", Split.TRAIN).rows)[: site["policy"]["min_rows"] + 100]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_toml(folder / "site.toml", site)


def approve(reader: Reader, name: str) -> None:
    """Let the request travel to the coordinator, and what comes of it back."""
    (reader.folder / f"{name}.request.zip").write_bytes((reader.folder / name / f"{name}.request.zip").read_bytes())
    reader.type(f"fedloom sites approve {name}")


def test_every_command_of_the_pages_runs_as_a_coordinator_and_a_sites_owner_type_it(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = reader.folder
    write_study(folder)
    begun = reader.type("fedloom sites init")
    (fingerprint,) = re.findall(r"^fingerprint: (.*)$", begun, re.MULTILINE)
    reader.changes["SHA256:9A:16:…"] = fingerprint
    reader.type(f"fedloom site request {NAME}")
    approve(reader, NAME)
    assert f"{NAME}  approved" in reader.type("fedloom sites list")
    reader.type("fedloom site install")
    write_site(folder, reader.port)
    reader.type("fedloom site service site.toml > fedloom-site.service")
    reader.type("fedloom site service site.toml --form container")
    reader.type("fedloom sites service study.toml")
    assert (folder / "fedloom-study.service").read_text().startswith("[Unit]")

    server = reader.begin("fedloom serve")
    assert "rows are usable; the site would take part" in reader.type("fedloom site check")
    site = reader.begin("fedloom site run")
    wait(lambda: "has not agreed" in (folder / "site.log").read_text() or server.poll() is not None, 240)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: True)
    assert "agreed" in reader.type("fedloom site confirm")
    assert server.wait(400) == 0, (folder / "serve.log").read_text()
    assert "complete" in reader.type("fedloom site log")
    site.terminate()
    assert site.wait(120) == 0

    write_study(folder, examples("coordinator.md")[1]["sites"])
    assert exit_code(["site", "request", "hospital-d", "--project", "study", "--org", "charite"]) == 0
    approve(reader, "hospital-d")
    assert "study.signed.json" in reader.type("fedloom sites sign")
    assert load_study("study.toml").members.present == (NAME, "hospital-c", "hospital-d")
    reader.type("fedloom serve")
    write_recipe(folder)
    reader.type("fedloom run recipe.toml")
    reader.type("fedloom sites revoke")
    assert NAME in (folder / "server-kit" / "disabled_clients.json").read_text()
    assert set(reader.left) == set(ELSEWHERE), "a command that nothing runs"


def write_recipe(folder: Path) -> None:
    """Write the study as a recipe with rows; the sites that never were there need some too."""
    study = load_study("study.toml").written.as_dict()
    (folder / "rows").mkdir()
    lines = (folder / "notes.jsonl").read_text().splitlines()[:50]
    for client in range(4):
        (folder / "rows" / f"local_training_{client}.json").write_text("[" + ",".join(lines) + "]")
    names = [*study["method"]["ranks"]]
    write_toml(
        folder / "recipe.toml",
        {
            "method": {"name": study["method"]["name"], "ranks": list(study["method"]["ranks"].values())},
            "data": {"path": "rows", "template": "plain", "max_length": 128, "overlong": "truncate"},
            "partition": {"scheme": "natural"},
            "federation": {"num_rounds": 2, "num_clients": len(names)},
            "training": {"local_steps": 1, "batch_size": 2},
        },
    )
