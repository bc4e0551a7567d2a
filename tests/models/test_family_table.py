"""The page of the families is what the command finds: it lists every kind, and a seeded twenty are tried again."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"


@pytest.fixture
def page() -> str:
    """Return the page, if it is of the versions that are installed."""
    text = PAGE.read_text(encoding="utf-8")
    for package, stated in re.findall(r"(transformers|peft) (\d[\w.]*\w)", text):
        if version(package) != stated:
            pytest.skip(f"the page is of {package} {stated}, installed is {version(package)}; make families writes it")
    return text


def checked(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "families"), "--check", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_the_page_lists_every_kind_that_is_installed(page: str) -> None:
    listed = set(re.findall(r"^\| `([\w-]+)` \|", page, flags=re.MULTILINE))
    assert listed == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert f"Of {len(listed)} kinds" in page


@pytest.mark.slow
@pytest.mark.usefixtures("page")
def test_a_seeded_twenty_of_the_kinds_are_as_the_page_says() -> None:
    done = checked("--sample", "20")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_wrong_line_on_the_page_is_found(page: str, tmp_path: Path) -> None:
    wrong = tmp_path / "families.md"
    wrong.write_text(page.replace("| `gpt2` | packed |", "| `gpt2` | padded |"), encoding="utf-8")
    done = checked("--only", "gpt2", "--page", str(wrong))
    assert done.returncode == 1
    assert done.stdout.startswith("gpt2: the page says ['| `gpt2` | padded |")
