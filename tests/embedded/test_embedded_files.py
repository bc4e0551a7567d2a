"""The embedded model and data: they load offline, hold what the card says, and come again from the script."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedloom import embedded

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "make_embedded.py"
UNSEEN = {"towns", "translation", "reversal", "sorting", "units"}
CATEGORIES = {"creatures", "addition", "extraction", "sequence", "mood"} | UNSEEN
COLUMNS = ["instruction", "context", "response", "category"]
MAX_DATA_BYTES = 1_000_000
MAX_FOLDER_BYTES = 3_000_000
MAX_ROW_TOKENS = 64


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shipped_files() -> list[Path]:
    return [*sorted(embedded.model_path().iterdir()), embedded.data_path(), embedded.eval_path()]


def test_the_paths_name_files_that_exist() -> None:
    assert embedded.model_path().is_dir()
    assert embedded.data_path().is_file()
    assert embedded.eval_path().is_file()
    assert embedded.card_path().is_file()


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, fedloom.embedded; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("path", "per_category"), [(embedded.data_path(), 400), (embedded.eval_path(), 40)])
def test_every_category_has_its_number_of_rows_in_dolly_columns(path: Path, per_category: int) -> None:
    rows = rows_of(path)
    assert all(list(row) == COLUMNS for row in rows)
    assert all(row["instruction"] and row["response"] for row in rows)
    assert Counter(row["category"] for row in rows) == dict.fromkeys(CATEGORIES, per_category)


def test_no_question_is_asked_twice_or_held_out_and_trained_on() -> None:
    asked = [
        (row["instruction"], row["context"])
        for path in (embedded.data_path(), embedded.eval_path())
        for row in rows_of(path)
    ]
    assert len(set(asked)) == len(asked)


def test_sizes_stay_within_what_a_package_may_weigh() -> None:
    data_bytes = sum(path.stat().st_size for path in (embedded.data_path(), embedded.eval_path()))
    assert data_bytes <= MAX_DATA_BYTES
    assert sum(path.stat().st_size for path in shipped_files()) <= MAX_FOLDER_BYTES


def test_the_script_makes_the_data_files_again_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--only", "data", "--out", str(tmp_path)], check=True)
    for path in (embedded.data_path(), embedded.eval_path()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_another_seed_makes_other_data(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--only", "data", "--seed", "2", "--out", str(tmp_path)], check=True)
    assert (tmp_path / "train.jsonl").read_bytes() != embedded.data_path().read_bytes()


@pytest.mark.parametrize("path", shipped_files(), ids=lambda path: path.name)
def test_the_card_states_the_hash_of_every_file(path: Path) -> None:
    name = path.relative_to(embedded.card_path().parent).as_posix()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"| {name} | {path.stat().st_size} | {digest} |" in embedded.card_path().read_text(encoding="utf-8")


def test_the_documentation_page_states_the_figures_of_the_card() -> None:
    figures = re.findall(r"^\| .* % \|$|^\| .*%.* \|$", embedded.card_path().read_text(encoding="utf-8"), re.MULTILINE)
    page = (REPOSITORY / "docs" / "embedded.md").read_text(encoding="utf-8")
    assert len(figures) == len(CATEGORIES) + 2 + len(UNSEEN)
    assert all(line in page for line in figures)
