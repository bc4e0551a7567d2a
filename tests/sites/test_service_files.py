"""The systemd unit and the container file of each role are what their programs read, and start what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom import __version__
from fedloom.cli.app import exit_code

STUDY = """
[federation]
num_rounds = 1
[training]
local_steps = 1
[sites]
names = ["a"]
address = "0.0.0.0:8123"
kit = "kit"
"""
SITE = """
[site]
name = "a"
server = "localhost:8123"
kit = "kit"
folder = "state"
[data]
path = "embedded"
"""
INSTRUCTIONS = ("FROM", "ARG", "RUN", "USER", "WORKDIR", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT")
ROLES = {"site": ("site", "service", "site.toml"), "server": ("sites", "service", "study.toml")}
every_role = pytest.mark.parametrize("role", ROLES)


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that prints a role's file, from a folder whose name has what systemd would read."""
    folder = tmp_path / "a b %h $HOME"
    folder.mkdir()
    (folder / "study.toml").write_text(STUDY)
    (folder / "site.toml").write_text(SITE)
    monkeypatch.chdir(folder)

    def command(role: str, form: str) -> str:
        capsys.readouterr()
        assert exit_code([*ROLES[role], "--form", form]) == 0
        return capsys.readouterr().out

    return command


def entries(unit: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    table: dict[str, str] = {}
    for line in filter(None, unit.splitlines()):
        if (section := re.fullmatch(r"\[(\w+)\]", line)) is not None:
            table = found.setdefault(section[1], {})
        else:
            key, equals, value = line.partition("=")
            assert equals
            assert key not in table
            table[key] = value
    return found


def started(unit: str) -> list[str]:
    """Return the words that systemd would start."""
    words = shlex.split(entries(unit)["Service"]["ExecStart"])
    return [word.replace("$$", "$").replace("%%", "%") for word in words]


@every_role
def test_a_unit_starts_the_role_in_its_folder_and_has_nothing_that_systemd_does_not_know(
    role: str, printed: Callable[..., str], tmp_path: Path
) -> None:
    unit = printed(role, "systemd")
    found = entries(unit)
    assert set(found) == {"Unit", "Service", "Install"}
    folder = Path.cwd()
    assert found["Service"]["WorkingDirectory"].replace("%%", "%") == str(folder)
    arguments = ["site", "run"] if role == "site" else ["serve"]
    assert started(unit)[1 : len(arguments) + 2] == [*arguments, str(folder / ROLES[role][-1])]
    assert found["Service"]["KillSignal"] == "SIGINT", "a site leaves after the task in progress"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed; the unit was parsed alone")
    program = started(unit)[0]
    there = unit if os.access(program, os.X_OK) else unit.replace(f"ExecStart={program}", "ExecStart=/bin/true")
    (tmp_path / f"fedloom-{role}.service").write_text(there)
    verified = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / f"fedloom-{role}.service"], capture_output=True, text=True, check=False
    )
    assert f"fedloom-{role}.service" not in verified.stderr
    assert verified.returncode == 0, verified.stderr


@every_role
def test_a_container_file_has_known_instructions_and_starts_a_command_that_exists(
    role: str, printed: Callable[..., str]
) -> None:
    lines = [line for line in printed(role, "container").splitlines() if not line.startswith("#")]
    parts = [line.split(" ", 1) for line in lines]
    assert [name for name, _ in parts if name not in INSTRUCTIONS] == []
    assert parts[0][0] == "FROM"
    values = dict(parts)
    assert values["ARG"] == f'FEDLOOM="fedloom[sites]=={__version__}"'
    assert parts.index(["USER", "fedloom"]) > max(i for i, part in enumerate(parts) if part[0] == "RUN")
    assert json.loads(values["VOLUME"]) == [values["WORKDIR"]]
    assert values.get("EXPOSE") == (None if role == "site" else "8123")
    program, *words = json.loads(values["ENTRYPOINT"])
    assert program == "/opt/fedloom/bin/fedloom"
    for name, value in parts:
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", value], check=True)
    assert words == (["site", "run", "site.toml"] if role == "site" else ["serve", "study.toml", "--out", "runs/study"])
