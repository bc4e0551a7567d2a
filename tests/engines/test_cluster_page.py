"""Every command of the page about clusters is executed, with fewer rounds and steps than it says, but for one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedloom import embedded

pytestmark = [pytest.mark.extra("cluster"), pytest.mark.slow]
PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
FENCE = re.compile(r"^```(?:console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = ("federation.num_rounds=1", "training.local_steps=1", "evaluation.suites=", "evaluation.every=0")
ELSEWHERE = [
    "pip install 'fedloom[cluster]'",  # what `make test-extras` does
    # The server of `ray start` listens on every address, whatever its options say, and a test's may not.
    "fedloom run demo --set method.name=fedit --set engine.name=ray --set engine.address=auto",
]


def commands() -> list[str]:
    return [line for block in FENCE.findall(PAGE.read_text("utf-8")) for line in block.splitlines() if line]


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
def test_every_command_of_the_page_runs(command: str, tmp_path: Path) -> None:
    if not embedded.model_path().is_dir():
        pytest.skip("the embedded model is absent")
    typed(command, tmp_path)
    if " run " in command:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["engine"]["name"] == "ray"
    assert list(tmp_path.rglob("finished.json"))
