"""The files of suites: where they are, and what is in them, read before a model is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedloom.data.sources import Rows, Split, load_rows
from fedloom.errors import EvaluationError
from fedloom.evaluation.choice.questions import Question, read_mmlu, read_questions
from fedloom.evaluation.e2e.e2e_files import References, read_references

Paths = Mapping[str, str]


def check_suite(suite: str, paths: Paths, *, holds_out: bool) -> None:
    """Read what a suite of a recipe asks; ``holds_out`` says whether the recipe holds rows out.

    Raises:
        EvaluationError: the suite's files are absent or hold something else.
        DataError: its rows cannot be read.
    """
    match suite:
        case "e2e":
            e2e_references(paths)
        case "mmlu":
            mmlu_questions(paths)
        case "multiple-choice":
            choice_questions(paths)
        case _ if suite in paths or not holds_out:
            suite_rows(suite, paths, None)


def e2e_references(paths: Paths) -> References:
    """Return the references of ``e2e``, which name their meaning representations.

    Raises:
        EvaluationError: there are none.
    """
    references = read_references(suite_path("e2e", paths, "the references, e.g. testset_w_refs.csv"))
    if not references.mrs:
        raise EvaluationError(
            "e2e: expected references that name their meaning representation, got texts alone; give a CSV with the "
            "columns mr and ref, or lines mr||ref"
        )
    return references


def mmlu_questions(paths: Paths) -> tuple[list[Question], list[Question]]:
    """Return the questions of ``mmlu``, and those that are shown before them.

    Raises:
        EvaluationError: there are none.
    """
    folder = suite_path("mmlu", paths, "the folder with test/*.csv and dev/*.csv")
    return read_mmlu(folder), read_mmlu(folder, "dev")


def choice_questions(paths: Paths) -> list[Question]:
    """Return the questions of ``multiple-choice``.

    Raises:
        EvaluationError: there are none.
    """
    return read_questions(suite_path("multiple-choice", paths, "a JSONL file of question, choices, answer"))


def suite_rows(suite: str, paths: Paths, held_out: Rows | None) -> Rows:
    """Return the rows that a suite asks: those of its path, else the held-out ones.

    Raises:
        EvaluationError: there are none.
        DataError: they cannot be read.
    """
    if suite in paths:
        return load_rows(paths[suite], Split.TEST)
    if held_out is None:
        raise EvaluationError(
            f"{suite}: expected rows, got none, not even held-out ones; name some with --data or "
            f"evaluation.paths.{suite}, or hold some out with data.eval_rows or data.eval_path"
        )
    return held_out


def suite_path(suite: str, paths: Paths, wanted: str) -> Path:
    """Return where a suite's files are.

    Raises:
        EvaluationError: no path is given, or nothing is there.
    """
    if suite not in paths:
        raise EvaluationError(
            f"{suite}: expected {wanted}, got none; name the path with --data or evaluation.paths.{suite}"
        )
    path = Path(paths[suite]).expanduser()
    if not path.exists():
        raise EvaluationError(
            f"{suite}: expected {wanted} at {path}, found nothing; check --data or evaluation.paths.{suite}"
        )
    return path
