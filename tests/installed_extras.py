"""The optional extras: which there are, and what of them is not installed."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NOT_OF_USERS = {"dev", "docs"}
"""What developers install: `make setup` and `make docs` run these."""


@cache
def stated() -> dict[str, list[str]]:
    """Return the extras that users may install, with their requirements."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: lines for name, lines in project["optional-dependencies"].items() if name not in NOT_OF_USERS}


def absent(extra: str) -> tuple[str, ...]:
    """Return the packages of an extra that are not installed."""
    names = [re.split(r"[<>=!~\[ ]", line)[0] for line in stated()[extra]]
    return tuple(name for name in names if not _is_installed(name))


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
