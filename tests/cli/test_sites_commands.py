"""serve and site: what is wrong is one line and exit code 2, and what is asked is shown."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from site_ends import free_port, write_toml

from fedloom.cli.app import exit_code
from fedloom.methods.table import BASELINE
from fedloom.sites.sheet import sheet_of
from fedloom.sites.store import Ledger, confirmation, keep_asked
from fedloom.sites.study import resolve_study
from fedloom.sites.throwaway_certificates import ThrowawayRoot

pytestmark = pytest.mark.extra("sites")

NAMES = ["a", "b"]


@pytest.fixture
def root() -> ThrowawayRoot:
    return ThrowawayRoot()


@pytest.fixture
def study(tmp_path: Path, base_folder: Path, root: ThrowawayRoot) -> Path:
    root.write(tmp_path / "kit", "server", "server")
    address = f"127.0.0.1:{free_port()}"
    tables = {
        "model": {"base": str(base_folder), "tokenizer": "bytes"},
        "method": {"name": BASELINE, "ranks": 2},
        "federation": {"num_rounds": 1},
        "training": {"local_steps": 1},
        "sites": {"names": NAMES, "address": address, "kit": str(tmp_path / "kit"), "deadline_s": 0.5},
    }
    return write_toml(tmp_path / "study.toml", tables)


@pytest.fixture
def site(tmp_path: Path, base_folder: Path, rows_file: Path, root: ThrowawayRoot) -> Path:
    root.write(tmp_path / "site-kit", "client", "a")
    own = {"name": "a", "server": "127.0.0.1:9", "kit": str(tmp_path / "site-kit"), "folder": str(tmp_path / "state")}
    model = {"base": str(base_folder), "tokenizer": "bytes"}
    return write_toml(tmp_path / "site.toml", {"site": own, "data": {"path": str(rows_file)}, "model": model})


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that is refused, and return its one line."""
    capsys.readouterr()
    assert exit_code(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_study_without_its_sites_is_one_line(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "serve", str(study), "--out", str(tmp_path / "run"))
    assert "expected 1 sites (sites.quorum) within 0.5 s" in told


def test_a_taken_port_is_one_line(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"sites.address=127.0.0.1:{other.getsockname()[1]}"
        told = refusal(capsys, "serve", str(study), "--out", str(tmp_path / "run"), "--set", address)
    assert "address already in use" in told


def test_a_server_without_a_kit_is_one_line(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "serve", str(study), "--out", str(tmp_path / "r"), "--set", f"sites.kit={tmp_path / 'none'}")
    assert "expected a file of the kit" in told


def test_a_certificate_of_another_name_is_one_line(
    site: Path, tmp_path: Path, root: ThrowawayRoot, capsys: pytest.CaptureFixture[str]
) -> None:
    root.write(tmp_path / "site-kit", "client", "b")
    assert "expected a certificate of a (site.name), got one of b" in refusal(capsys, "site", "run", str(site))


def test_a_second_process_of_a_site_is_one_line(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedloom.run_folder import claim

    (tmp_path / "state").mkdir()
    held = claim.lock(tmp_path / "state")
    try:
        assert "no other process uses" in refusal(capsys, "site", "run", str(site))
    finally:
        import os

        os.close(held)


def test_a_site_shows_what_waits_for_a_yes_and_what_it_did(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"sites": {"names": NAMES}, "training": {"local_steps": 1}, "method": {"name": BASELINE}}
    settings = resolve_study(document, "study.toml").settings
    sheet = sheet_of(settings, 0, "0" * 32, "ab" * 32, "cd" * 32, scores=False)
    keep_asked(tmp_path / "state", "ef" * 32, sheet.model_dump_json().encode())
    assert exit_code(["site", "confirm", str(site), "--yes"]) == 0
    assert "rounds of 1 steps, base abababababab" in capsys.readouterr().out
    assert confirmation(tmp_path / "state", "ef" * 32).exists()
    assert exit_code(["site", "confirm", str(site)]) == 0
    assert "no study waits" in capsys.readouterr().out
    Ledger(tmp_path / "state").add(event="task", run="0" * 32, round=3, why="its policy says no")
    assert exit_code(["site", "log", str(site)]) == 0
    assert 'round 3  why "its policy says no"' in capsys.readouterr().out
    assert exit_code(["site", "log", str(site), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["round"] == 3
