"""Every optional extra is run by a test; where all of them should be installed, all of them are."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from installed_extras import absent, stated

TESTS = Path(__file__).parent
EXTRAS = sorted(stated())


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_is_run_by_a_test(extra: str) -> None:
    marked = re.compile(rf'mark\.extra\("{re.escape(extra)}"\)')
    assert any(marked.search(file.read_text(encoding="utf-8")) for file in TESTS.rglob("test_*.py")), extra


def test_the_makefile_installs_every_extra() -> None:
    (line,) = re.findall(r"^EXTRAS := (.*)$", (TESTS.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line.split(",") == EXTRAS


@pytest.mark.skipif("FEDLOOM_EXTRAS" not in os.environ, reason="FEDLOOM_EXTRAS does not say that all are installed")
@pytest.mark.parametrize("extra", EXTRAS)
def test_where_all_extras_should_be_installed_each_is(extra: str) -> None:
    assert not absent(extra)
