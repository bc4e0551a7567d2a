"""demo and report: where they write, what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedloom.cli.app import exit_code
from fedloom.errors import RunError
from fedloom.experiment import demo
from fedloom.run_folder.writer import RunFolder


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Ran:
        code = exit_code(list(arguments))
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Write the files of a run of one round."""
    folder = tmp_path / "runs" / "mine"
    record = {"eval": {"loss_nats": 1.0}, "upload_bytes": 1, "download_bytes": 1, "seconds": {"train": 1.0}}
    with RunFolder.open(folder, {"method": {"name": "flora"}, "run": {"seed": 1}}, {}) as run:
        run.write_round(1, record)
    return folder


def test_a_report_goes_into_the_folder_it_is_about(invoke: Any, run_folder: Path) -> None:
    assert invoke("report", str(run_folder)) == Ran(0, f"{run_folder / 'report.html'}\n", "")
    assert (run_folder / "report.html").is_file()
    assert invoke("report", str(run_folder.parent)).out == f"{run_folder.parent / 'report.html'}\n"


def test_a_report_can_be_written_elsewhere_and_again(invoke: Any, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    for _ in range(2):
        ran = invoke("report", str(run_folder), "--out", str(out), "--json")
        assert json.loads(ran.out) == {"report": str(out), "files": [], "runs": [str(run_folder)]}


def test_a_report_of_several_goes_into_this_folder(
    invoke: Any, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("report", str(run_folder), str(run_folder.parent)).out == "report.html\n"
    assert (tmp_path / "report.html").is_file()


def test_another_file_is_not_overwritten(invoke: Any, run_folder: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.html"
    thesis.write_text("years of work on <title>fedloom report</title>", encoding="utf-8")
    ran = invoke("report", str(run_folder), "--out", str(thesis))
    assert ran.code == 2
    assert "found another file; choose another --out" in ran.err
    assert thesis.read_text(encoding="utf-8").startswith("years of work")


def test_nothing_a_folder_without_runs_and_a_run_without_rounds_are_refused(
    invoke: Any, run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.rmtree(run_folder / "rounds")
    for path, said in (
        (tmp_path / "nowhere", "found no folder; check the path"),
        (tmp_path / "empty", "found no run in it"),
        (run_folder, "expected a completed round, got none"),
    ):
        ran = invoke("report", str(path))
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
        assert said in ran.err
        assert not (path / "report.html").exists()


def test_the_demo_hands_over_its_folder_and_prints_the_result(invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shown:
        def __init__(self, out: Path, fresh: bool) -> None:
            self.values = {"out": str(out), "fresh": fresh}

        def as_dict(self) -> dict[str, Any]:
            return self.values

        def lines(self) -> list[str]:
            return [f"in {self.values['out']}"]

    monkeypatch.setattr(demo, "demonstrate", lambda out, *, fresh, progress: Shown(out, fresh))
    assert invoke("demo").out == f"in {Path('runs/demo')}\n"
    assert json.loads(invoke("demo", "--out", "x", "--fresh", "--json").out) == {"out": "x", "fresh": True}


def test_a_demo_over_something_else_is_one_line_with_code_2(invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RunError("x holds files of something else; choose another --out")

    monkeypatch.setattr(demo, "demonstrate", refuse)
    ran = invoke("demo")
    assert (ran.code, ran.out, ran.err) == (2, "", "error: x holds files of something else; choose another --out\n")
