"""A system without POSIX's locks and limits, such as Windows: imports work, and a run is refused in one line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fedloom

ABSENT = ("fcntl", "resource", "pwd", "grp", "termios")
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))
import fedloom
from fedloom.cli.app import exit_code
from fedloom.reporting import peak_memory
from fedloom.run_folder import claim, durable
assert exit_code(["validate", "demo"]) == 0
try:
    claim.lock(sys.argv[1])
except fedloom.FedloomError as error:
    print(error)
"""


def test_where_files_cannot_be_locked_imports_work_and_a_folder_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "expected a system whose files can be locked (Linux or macOS)" in told
    assert not list(tmp_path.iterdir())


def test_no_module_needs_posix_to_be_imported() -> None:
    """What only POSIX has is imported in a try, or where it is used."""
    for file in sorted(Path(fedloom.__file__).parent.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & set(ABSENT), f"{file}: {names}"
