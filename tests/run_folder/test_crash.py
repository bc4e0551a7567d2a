"""A kill at any moment leaves a folder that goes on to the same end."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedloom.run_folder.writer import RunFolder

NUM_ROUNDS = 6

# A run whose state is a hash chain: any round lost, repeated or torn changes the end.
CHAIN = """
import hashlib, sys
from pathlib import Path
from fedloom.run_folder.writer import RunFolder

def run(path, num_rounds, size):
    with RunFolder.open(Path(path), {"a": {"b": 1}}, {"base": "x"}) as folder:
        done = folder.last_round() or 0
        state = folder.round_files(done).read("state/chain") if done else b"start"
        for n in range(done + 1, num_rounds + 1):
            state = hashlib.sha256(state[:32] + bytes([n])).digest() * size
            writers = {"global": lambda p: p.write_bytes(b"g")}
            folder.write_round(n, {"loss_nats": n / 3}, {"state/chain": state}, writers)
            folder.prune(keep=2)
            folder.write_folder("adapter", lambda p: (p / "weights").write_bytes(state))
        folder.prune(keep=2)
        folder.write_folder("adapter", lambda p: (p / "weights").write_bytes(state))
        folder.finish({})
"""

LOOP = CHAIN + f"run(sys.argv[1], {NUM_ROUNDS}, 20000)\n"

# Forks one child per system call that changes the disk; the child dies just before that call.
EVERY_POINT = (
    CHAIN
    + """
import os, shutil

os.fsync = lambda descriptor: None  # a killed process loses nothing that the kernel holds, and this is much faster

def dying_after(calls):
    left = [calls]
    def patch(owner, name):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*args, **kwargs)
        setattr(owner, name, call)
    for owner, name in [(os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "mkdir"), (Path, "unlink"),
                        (Path, "write_bytes"), (shutil, "rmtree")]:
        patch(owner, name)

calls = 0
while True:
    folder = Path(sys.argv[1]) / str(calls)
    child = os.fork()
    if child == 0:
        dying_after(calls)
        run(folder, 3, 1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    calls += 1
print(calls)
"""
)


def chain_end(num_rounds: int) -> bytes:
    state = b"start"
    for n in range(1, num_rounds + 1):
        state = hashlib.sha256(state[:32] + bytes([n])).digest()
    return state


def assert_complete(path: Path, num_rounds: int) -> None:
    assert (path / "adapter/weights").read_bytes()[:32] == chain_end(num_rounds)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"round": n, "loss_nats": n / 3} for n in range(1, num_rounds + 1)]
    assert (path / "finished.json").exists()
    states = sorted(folder.parent.name for folder in path.glob("rounds/*/state"))
    assert states == [str(num_rounds - 1), str(num_rounds)]
    assert not [entry.name for entry in path.iterdir() if entry.name.startswith((".tmp-", ".ready-"))]


def execute(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)


def test_a_kill_before_any_single_change_of_the_disk_resumes_to_the_same_end(tmp_path: Path) -> None:
    done = execute(EVERY_POINT, tmp_path)
    assert done.returncode == 0, done.stderr
    num_points = int(done.stdout)
    assert num_points > 50
    every = f"for calls in range({num_points}): run(Path(sys.argv[1]) / str(calls), 3, 1)\n"
    resume = f"{CHAIN}import os\nos.fsync = lambda _: None\n{every}"
    done = execute(resume, tmp_path)
    assert done.returncode == 0, done.stderr
    for calls in range(num_points):
        assert_complete(tmp_path / str(calls), 3)


@pytest.mark.slow
def test_kills_at_random_moments_resume_to_the_same_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    num_kills = 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path / "x")])
        deadline = time.monotonic() + 30
        while not (tmp_path / "x").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.02)))
        os.kill(process.pid, signal.SIGKILL)
        num_kills += process.wait() == -signal.SIGKILL
    assert num_kills > 0
    done = execute(LOOP, tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "x", NUM_ROUNDS)


def test_a_killed_fresh_start_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def killed(*_: object) -> None:
        raise KilledError

    RunFolder.open(tmp_path, {"a": 1}, {}).close()
    (tmp_path / "notes.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr("fedloom.run_folder.claim.start", killed)
        with pytest.raises(KilledError):
            RunFolder.open(tmp_path, {"a": 2}, {}, fresh=True)
    with RunFolder.open(tmp_path, {"a": 2}, {}, fresh=True) as folder:
        assert folder.config == {"a": 2}
