from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.errors import DataError, EvaluationError
from fedloom.evaluation.choice.questions import read_questions
from fedloom.evaluation.e2e.e2e_files import Outputs, References, matched_texts, read_outputs, read_references
from fedloom.evaluation.judge.judge_prompts import read_prompts
from fedloom.evaluation.judge.judge_questions import read_judge_questions

GROUPED = (("One here.", "One, there."), ("Two here.",))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("refs.csv", 'mr,ref\nname[A],One here.\nname[B],Two here.\nname[A],"One, there."\n'),
        ("refs.txt", "name : A||One here.\nname : A||One, there.\nname : B||Two here.\n"),
        ("refs.txt", "One here.\nOne, there.\n\nTwo here.\n"),
        ("refs.txt", "\ufeffOne here.\r\nOne, there.\r\n\r\nTwo here.\r\n"),
    ],
)
def test_every_reference_format_groups_texts_by_meaning(tmp_path: Path, name: str, text: str) -> None:
    references = read_references(write(tmp_path, name, text))
    assert references.texts == GROUPED
    assert references.num_texts == 3


def test_outputs_named_by_their_meaning_are_put_in_order(tmp_path: Path) -> None:
    references = References(("name[A]", "name[B]"), GROUPED)
    path = write(tmp_path, "out.tsv", 'MR\toutput\nname[B]\ttwo\n"name[A]"\tone\n')
    assert matched_texts(references, read_outputs(path)) == ("one", "two")


def test_single_quotes_around_every_cell_come_off(tmp_path: Path) -> None:
    path = write(tmp_path, "out.tsv", "MR\toutput\n'name[A]'\t'it's one'\n")
    assert read_outputs(path) == Outputs(("name[A]",), ("it's one",))


def test_plain_outputs_keep_their_empty_lines(tmp_path: Path) -> None:
    assert read_outputs(write(tmp_path, "out.txt", "one\n\nthree\n")).texts == ("one", "", "three")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (Outputs((), ("one",)), "each of 2 meaning representations, got 1"),
        (Outputs(("name[A]", "name[A]"), ("one", "two")), "got two for one"),
        (Outputs(("name[A]", "name[C]"), ("one", "two")), r"1 have none, .*name\[B\]"),
    ],
)
def test_outputs_that_do_not_match_are_refused(outputs: Outputs, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        matched_texts(References(("name[A]", "name[B]"), GROUPED), outputs)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("refs.csv", "meaning,text\na,b\n", "expected the columns 'mr' and 'ref', found"),
        ("refs.csv", "mr,ref\nname[A],\n", r"expected a human text for name\[A\]"),
        ("refs.txt", "a||b\nno bar\n", "line 2: expected 'mr||ref'"),
        ("refs.txt", " \n", "expected references, found an empty file"),
        ("refs.csv", "mr,ref,ref\na,b,c\n", "expected every column once"),
    ],
)
def test_a_broken_reference_file_is_refused_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message.replace("||", r"\|\|")):
        read_references(write(tmp_path, name, text))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected a file of outputs, found none"):
        read_outputs(tmp_path / "none.tsv")


@pytest.mark.parametrize("read", [read_references, read_outputs, read_questions, read_judge_questions, read_prompts])
def test_a_file_in_another_encoding_is_refused_by_name(tmp_path: Path, read: Callable[[Path], object]) -> None:
    file = tmp_path / "latin.jsonl"
    file.write_bytes("name[A]||café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl: expected UTF-8 text, got .* convert the file"):
        read(file)
