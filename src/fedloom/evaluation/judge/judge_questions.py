"""Read the questions, reference answers and models' answers of the judge protocols (FastChat's JSON lines)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from fedloom.data.answer_frame import AnswerFrame
from fedloom.data.json_rows import read_json_lines
from fedloom.data.token_rows import PromptTokens
from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import DecodingSettings, OnProgress, decode

Answers = Mapping[str, Sequence[str]]  # question id -> answer of each turn
REFERENCE_CATEGORIES = frozenset({"math", "reasoning", "coding"})


@dataclass(frozen=True)
class JudgeQuestion:
    """A conversation's user turns."""

    id: str
    turns: tuple[str, ...]
    category: str = ""


def read_judge_questions(file: Path) -> list[JudgeQuestion]:
    """Read ``question_id``, ``turns`` (or ``text``) and ``category`` from JSON lines.

    Raises:
        EvaluationError: the file is missing or empty, a line is not a question, or an id comes twice.
    """
    rows = _rows(file, "questions", {"question_id"}, ({"turns"}, {"text"}))
    questions = [_question(f"{file} line {number}", row) for number, row in rows]
    if len({question.id for question in questions}) < len(questions):
        raise EvaluationError(f"{file}: expected every question_id once, one comes twice; rename one")
    return questions


def read_answers(file: Path) -> dict[str, tuple[str, ...]]:
    """Read ``question_id`` and ``choices[0].turns`` (or ``text``) from JSON lines: answers, or references.

    Raises:
        EvaluationError: the file is missing or empty, or a line is not an answer.
    """
    rows = _rows(file, "answers", {"question_id"}, ({"choices"}, {"text"}))
    return {_id(f"{file} line {number}", row): _answers(f"{file} line {number}", row) for number, row in rows}


def write_answers(file: Path, answers: Answers, model_id: str) -> None:
    """Write answers as FastChat's judge reads them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as handle:
        for question_id, turns in answers.items():
            row = {"question_id": question_id, "model_id": model_id, "choices": [{"index": 0, "turns": list(turns)}]}
            handle.write(json.dumps(row) + "\n")


def answer_turns(
    model: Any,
    tokenizer: Any,
    questions: Sequence[JudgeQuestion],
    render: Callable[[Sequence[str]], str | PromptTokens],
    settings: DecodingSettings,
    *,
    frame: AnswerFrame | None = None,
    batch_size: int = 8,
    file: Path | None = None,
    model_id: str = "",
    on_progress: OnProgress | None = None,
) -> dict[str, tuple[str, ...]]:
    """Let a model answer every turn, each with the conversation before it.

    ``render`` turns a conversation (user, assistant, user, ...) into a prompt. ``file`` keeps what is decoded, as
    :func:`fedloom.evaluation.decoding.decode` does.

    Raises:
        EvaluationError: a conversation leaves no room for the answer.
    """
    conversations: dict[str, list[str]] = {question.id: [] for question in questions}
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [question for question in questions if turn < len(question.turns)]
        for question in asked:
            conversations[question.id].append(question.turns[turn])
        prompts = [render(conversations[question.id]) for question in asked]
        decoded = decode(
            model,
            tokenizer,
            prompts,
            settings,
            frame=frame,
            batch_size=batch_size,
            file=file,
            model_id=model_id,
            on_progress=on_progress,
        )
        for question, output in zip(asked, decoded.outputs, strict=True):
            conversations[question.id].append(output)
    return {question_id: tuple(turns[1::2]) for question_id, turns in conversations.items()}


def check_answers(questions: Sequence[JudgeQuestion], answers: Answers, whose: str) -> None:
    """Raise unless every question has an answer for each of its turns."""
    if not questions:
        raise EvaluationError("expected at least one question to judge, got none: check the file of questions")
    for question in questions:
        found = len(answers.get(question.id, ()))
        if found < len(question.turns):
            raise EvaluationError(
                f"question {question.id}: expected {len(question.turns)} answers of {whose}, got {found}: "
                "answer the same file of questions that is judged"
            )


def _rows(file: Path, what: str, required: set[str], one_of: Sequence[set[str]]) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects of a file of JSON lines, each with the number of its line."""
    if not file.is_file():
        raise EvaluationError(f"{file}: expected a file of {what}, found none; check the path")
    rows = []
    for number, row in read_json_lines(file):
        if not required <= row.keys() or not any(names <= row.keys() for names in one_of):
            alternatives = " or ".join(name for names in one_of for name in sorted(names))
            raise EvaluationError(
                f"{file} line {number}: expected the keys {', '.join(sorted(required))} and {alternatives}, "
                f"got {', '.join(row)}; add what is missing"
            )
        rows.append((number, row))
    if not rows:
        raise EvaluationError(f"{file}: expected at least one of the {what}, found none; fill the file or name another")
    return rows


def _question(where: str, row: Mapping[str, Any]) -> JudgeQuestion:
    turns = row["turns"] if row.get("turns") is not None or "text" not in row else [row["text"]]
    category = "" if row.get("category") is None else row["category"]
    if not _are_texts(turns) or not all(turn.strip() for turn in turns):
        raise EvaluationError(f"{where}: expected turns, a list of one or more texts that are not empty; correct them")
    if not isinstance(category, str):
        raise EvaluationError(f"{where}: expected text for category, got {type(category).__name__}; correct it")
    return JudgeQuestion(_id(where, row), tuple(turns), category)


def _answers(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        turns = row["choices"][0]["turns"] if "choices" in row else [row["text"]]
    except (KeyError, IndexError, TypeError):
        turns = None
    if not _are_texts(turns):
        raise EvaluationError(f"{where}: expected choices[0].turns, a list of one or more texts, or text; correct it")
    return tuple(turns)


def _id(where: str, row: Mapping[str, Any]) -> str:
    found = row["question_id"]
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise EvaluationError(
            f"{where}: expected a number or text for question_id, got {type(found).__name__}; correct it"
        )
    return str(found)


def _are_texts(turns: Any) -> TypeGuard[list[str]]:
    return isinstance(turns, list) and bool(turns) and all(isinstance(turn, str) for turn in turns)
