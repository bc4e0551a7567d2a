"""Every command of the page about clusters, and the README's, is executed, with fewer rounds and steps than it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from site_ends import free_port, wait

from fedloom import embedded

pytestmark = [pytest.mark.extra("cluster"), pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cluster.md"
FENCE = re.compile(r"^```(?:console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = ("federation.num_rounds=1", "training.local_steps=1", "evaluation.suites=", "evaluation.every=0")
ELSEWHERE = ["pip install 'fedloom[cluster]'"]  # what `make test-extras` does
START = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray start --head --node-ip-address=127.0.0.1 --include-dashboard=false"
"""How the page starts a cluster that only this machine reaches."""


def lines(page: Path) -> list[str]:
    return [line for block in FENCE.findall(page.read_text("utf-8")) for line in block.splitlines() if line]


def commands() -> list[str]:
    """Return the page's commands, and those of the README that name the engine."""
    return lines(PAGE) + [line.removeprefix("$ ") for line in lines(ROOT / "README.md") if "engine.name=ray" in line]


def typed(command: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command of the page, smaller; return what it told."""
    words = shlex.split(command, comments=True)[1:] + [part for setting in SMALLER for part in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Start the page's cluster of one machine, and yield the environment in which `auto` is this one and no other."""
    assert f"`{START}`" in PAGE.read_text("utf-8").replace("\n", " ")
    setting, *words = shlex.split(START)
    own = dict([setting.split("=")]) | {"RAY_USAGE_STATS_ENABLED": "0"}
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # its sockets want a short name
    program = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    places = [f"--port={port}", f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}", "--num-cpus=2"]
    with (folder / "console").open("wb") as console:
        head = subprocess.Popen(
            [*program, *places, "--block"], env=os.environ | own, stdout=console, stderr=console, start_new_session=True
        )
    started: list[psutil.Process] = []
    try:
        wait(lambda: b"Ray runtime started" in (folder / "console").read_bytes() or head.poll() is not None)
        started = psutil.Process(head.pid).children(recursive=True)
        assert {"gcs_server", "raylet"} <= {one.name() for one in started}, (folder / "console").read_text()
        yield own | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        assert not [place for one in started for place in beyond_loopback(one)]
    finally:
        head.terminate()
        head.wait()
        _, alive = psutil.wait_procs(started, timeout=30)
        for process in alive:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    assert not alive


def beyond_loopback(process: psutil.Process) -> list[str]:
    if not process.is_running():
        return []
    heard = [one.laddr.ip for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    return [ip for ip in heard if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]


@pytest.mark.parametrize("command", [command for command in commands() if command not in ELSEWHERE])
def test_every_command_of_the_page_runs(command: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not embedded.model_path().is_dir():
        pytest.skip("the embedded model is absent")
    environment = request.getfixturevalue("cluster") if "engine.address=auto" in command else None
    typed(command, tmp_path, environment)
    if " run " in command:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["engine"]["name"] == "ray"
    assert list(tmp_path.rglob("finished.json"))
