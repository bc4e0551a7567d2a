"""A paper's tables and figures from one file: all parts are written, or none where one is wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fedloom.errors import FedloomError, SettingsError
from fedloom.reporting.paper_set import read_parts, write_paper


def listed(folder: Path, text: str) -> Path:
    file = folder / "paper.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.extra("figures")
def test_every_part_has_tables_figures_and_their_numbers_and_is_written_again(comparison: Path, tmp_path: Path) -> None:
    file = listed(
        tmp_path, f"[first]\nruns = ['{comparison}']\n[second]\nruns = ['{comparison}']\nreference = 'fedit'\n"
    )
    for _ in range(2):
        written = list(write_paper(read_parts(file), tmp_path / "paper"))
    for part in ("first", "second"):
        folder = tmp_path / "paper" / part
        names = {path.name for path in written if path.parent == folder}
        assert {"table.tex", "table.md", "runs.csv", "final-loss.pdf", "final-loss.csv"} <= names
        assert {path.name for path in folder.iterdir()} == names
        with (folder / "final-loss.csv").open(newline="") as numbers:
            assert list(csv.reader(numbers))[1:]


def test_a_file_that_is_not_there_is_told_from_one_that_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml: expected a TOML file .* no such file .*; check the path"):
        read_parts(tmp_path / "absent.toml")
    (tmp_path / "wide.toml").write_text("[a]", encoding="utf-16")
    with pytest.raises(SettingsError, match=r"wide\.toml: expected UTF-8 text"):
        read_parts(tmp_path / "wide.toml")


@pytest.mark.extra("figures")
def test_a_reference_that_no_run_has_names_its_part(comparison: Path, tmp_path: Path) -> None:
    file = listed(tmp_path, f"[first]\nruns = ['{comparison}']\nreference = 'floar'\n")
    with pytest.raises(FedloomError, match=r"^\S+\.toml: first\.reference: expected one of .*, got 'floar'"):
        list(write_paper(read_parts(file), tmp_path / "paper"))


def test_runs_are_named_from_the_files_own_folder_on(tmp_path: Path) -> None:
    (part,) = read_parts(listed(tmp_path, "[a]\nruns = ['runs/x']\n"))
    assert part.runs == (tmp_path / "runs/x",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected a table for each part"),
        ("runs = ['x']", "runs: expected a table"),
        ("[a]\nruns = []", "a.runs: expected a list of folders"),
        ("[a]\nruns = ['x']\ncolour = 1", "a.colour: expected runs and reference"),
        ("[a]\nrun = ['x']", r"^\S+: a.run: expected runs and reference, got another key; did you mean runs\?$"),
        ("['../b']\nruns = ['x']", "which becomes a folder"),
        ("[a", "expected TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=told):
        read_parts(listed(tmp_path, text))


def test_nothing_is_written_where_one_part_has_no_runs(comparison: Path, tmp_path: Path) -> None:
    file = listed(tmp_path, f"[good]\nruns = ['{comparison}']\n[bad]\nruns = ['absent']\n")
    with pytest.raises(FedloomError, match="absent"):
        list(write_paper(read_parts(file), tmp_path / "paper"))
    assert not (tmp_path / "paper").exists()
