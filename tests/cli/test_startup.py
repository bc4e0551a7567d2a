"""Help and validation answer without loading torch or its company."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "datasets", "peft", "numpy"}
PROGRAM = """
import sys
from fedloom.cli.app import exit_code
code = exit_code(sys.argv[1:])
print("loaded:", *sorted(set(name.partition(".")[0] for name in sys.modules) & {heavy!r}))
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["validate", "flora-hetero-dolly"], ["recipes"], ["run", "--help"], ["settings", "--schema"]],
    ids=" ".join,
)
def test_no_heavy_library_is_imported(arguments: list[str]) -> None:
    program = PROGRAM.replace("{heavy!r}", repr(HEAVY))
    ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1].strip() == "loaded:"


def test_reading_adapters_loads_no_modelling_code(tmp_path: Path) -> None:
    program = PROGRAM.replace("{heavy!r}", repr({"transformers", "peft", "datasets"}))
    command = [sys.executable, "-c", program, "aggregate", str(tmp_path), "--to", str(tmp_path / "to")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "expected two adapters or more" in ran.stderr
    assert ran.stdout.splitlines()[-1].strip() == "loaded:"
