"""Every command of the page about clusters is executed, with fewer rounds and steps than it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom import embedded

pytestmark = [pytest.mark.extra("cluster"), pytest.mark.slow]
PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
FENCE = re.compile(r"^```(?:console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = ("federation.num_rounds=1", "training.local_steps=1", "evaluation.suites=", "evaluation.every=0")
ELSEWHERE = ["pip install 'fedloom[cluster]'"]
"""What `make test-extras` does: it installs every extra."""


def commands() -> list[str]:
    return [line for block in FENCE.findall(PAGE.read_text("utf-8")) for line in block.splitlines() if line]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start Ray as its manual says, on loopback, for `engine.address=auto` to find; end it, and no other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # names of sockets are short
        options = [f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
        options += ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block"]
        ray = Path(sys.executable).with_name("ray")
        with (Path(folder) / "log").open("wb") as log:
            started = subprocess.Popen([ray, "start", "--head", *options], stdout=log, stderr=log)
        try:
            until = time.monotonic() + 240
            while not answers(address):
                assert time.monotonic() < until
                assert started.poll() is None, (Path(folder) / "log").read_text()
                time.sleep(0.5)
            monkeypatch.setenv("RAY_ADDRESS", address)
            yield address
        finally:
            started.terminate()
            started.wait(60)


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1.0).close()
    except OSError:
        return False
    return True


def typed(command: str, folder: Path) -> str:
    """Run a command of the page, smaller; return what it told."""
    words = shlex.split(command)[1:] + [part for setting in SMALLER for part in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "fedloom", *words, "--out", "out"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "trains in this process" not in done.stderr, "the page shows a method that Ray deals out"
    return done.stderr


@pytest.mark.parametrize("command", [command for command in commands() if command not in ELSEWHERE])
def test_every_command_of_the_page_runs(command: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if not embedded.model_path().is_dir():
        pytest.skip("the embedded model is absent")
    if "engine.address" in command:
        request.getfixturevalue("cluster")
    typed(command, tmp_path)
    if " run " in command:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["engine"]["name"] == "ray"
    assert list(tmp_path.rglob("finished.json"))
