"""A run folder in which one file changed gives the same results or is refused in one line that names the file.

By default a seeded share is tried; the whole is marked slow.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.experiment import run
from fedloom.seeding import stream

METHODS = ("flora", "fedit", "splitlora", "standalone")
NOT_READ = ("report.html", "README.md", ".fedloom.lock", "events.out")
"""Files for people and other tools: nothing in them is read back."""
WRONG = (b"null", b"[]", b"{}", b'"x"', b"5", b"", b"{", b"[" * 100_000, b"\xff")
Make = Callable[..., Settings]


def other_contents(path: Path, rng: np.random.Generator) -> Iterator[bytes]:
    """Yield what else the file could hold: a bit flipped, half of it, a value of another type, a key less."""
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    yield bytes(flipped)
    yield data[: len(data) // 2]
    yield from WRONG
    if path.suffix == ".json" and isinstance(document := json.loads(data), dict):
        key = str(rng.choice(sorted(document)))
        yield json.dumps({name: value for name, value in document.items() if name != key}).encode()
        yield json.dumps(document | {key: 7 if isinstance(document[key], str) else "x"}).encode()


def ended(*arguments: object) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it said on standard error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = exit_code([str(argument) for argument in arguments])
    return code, said.getvalue()


def results_of(folder: Path) -> dict[str, bytes]:
    """Return what a run came to: adapters, records and settings."""
    names = [*folder.glob("adapter/**/*.safetensors"), folder / "config.json"]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in names}
    for record in folder.glob("rounds/*/record.json"):
        kept = json.loads(record.read_text())
        found[str(record.relative_to(folder))] = json.dumps([kept["train_loss_nats"], kept["eval"]]).encode()
    return found


def unlike(whole: Path, there: Path, name: Path, content: bytes) -> None:
    """Make ``there`` the run ``whole`` with one file changed."""
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(whole, there)
    (there / name).write_bytes(content)


def interrupt(folder: Path) -> None:
    """Make a finished run look as if it had been killed after its first round."""
    (folder / "finished.json").unlink()
    for later in ("adapter", "rounds/2"):
        shutil.rmtree(folder / later)


@pytest.mark.parametrize("share", [0.03, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_changed_file_changes_no_result_or_is_refused_by_name(
    method: str, is_finished: bool, share: float, settings_for: Make, tmp_path: Path
) -> None:
    options = {"split__aggregate_every": 2} if method == "splitlora" else {}
    settings = settings_for(method__name=method, method__ranks=4, **options)
    whole, there, rng = tmp_path / "whole", tmp_path / "x", stream(7, "files", method, str(is_finished))
    run(settings, whole)
    wanted = results_of(whole)
    if not is_finished:
        interrupt(whole)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(settings.as_dict()))
    commands = [("run", recipe, "--out", there), ("report", there)]
    commands.append(("export", there, "--to", tmp_path / "to") if is_finished else ("evaluate", there))
    if method == "standalone":
        commands = commands[:2]
    for file in sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size):
        if any(name in file.name for name in NOT_READ):
            continue
        name = file.relative_to(whole)
        for content in other_contents(file, rng):
            if rng.random() > share:
                continue
            command = commands[int(rng.integers(len(commands)))]
            unlike(whole, there, name, content)
            shutil.rmtree(tmp_path / "to", ignore_errors=True)
            code, said = ended(*command)
            what = f"{command[0]} with {name} = {content[:30]!r}: {said}"
            if code == 0:
                assert command[0] != "run" or results_of(there) == wanted, what
                continue
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert (code, len(errors)) == (2, 1), what
            is_told = name.name in errors[0] or "there is no round to use yet" in errors[0]
            assert is_told, what
