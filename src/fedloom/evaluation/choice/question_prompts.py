"""Write multiple-choice questions as prompts, with as many solved examples before each as the model's context holds."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from fedloom.data.token_rows import content_prompts, prefix_ids
from fedloom.errors import EvaluationError
from fedloom.evaluation.choice.questions import LETTERS, Question
from fedloom.evaluation.choice.shared_prefix import Query
from fedloom.models.causal import context_length


class Answering(StrEnum):
    """What the model is asked to continue with."""

    LETTER = "letter"
    """The choices stand in the prompt; the letter with the highest likelihood is the answer (MMLU's own protocol)."""
    TEXT = "text"
    """The choices do not; the choice with the highest log-likelihood per byte is the answer."""


def prompt_text(question: Question, examples: Sequence[Question], answering: Answering) -> str:
    """Return the prompt up to where the answer is to follow (a space comes before it)."""
    solved = "".join(f"{_solved(example, answering)}\n\n" for example in examples)
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    match answering:
        case Answering.LETTER:
            head = f"The following are multiple choice questions (with answers){about}.\n\n"
            return head + solved + _listed(question)
        case Answering.TEXT:
            return solved + _asked(question)
        case _:
            assert_never(answering)


def _solved(question: Question, answering: Answering) -> str:
    match answering:
        case Answering.LETTER:
            return f"{_listed(question)} {LETTERS[question.answer]}"
        case Answering.TEXT:
            return f"{_asked(question)} {question.choices[question.answer]}"
        case _:
            assert_never(answering)


@dataclass(frozen=True)
class Fitted:
    """A question's tokens, how many examples stand before it, and whether its beginning was cut."""

    query: Query
    shots: int
    is_truncated: bool


def _listed(question: Question) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return f"{question.question}\n{choices}\nAnswer:"


def _asked(question: Question) -> str:
    return f"Question: {question.question}\nAnswer:"


def examples_by_subject(
    questions: Sequence[Question], examples: Sequence[Question], shots: int
) -> Mapping[str, list[Question]]:
    """Return the first ``shots`` examples of each subject asked about.

    Raises:
        EvaluationError: there is no question, or a subject has fewer examples.
    """
    if not questions:
        raise EvaluationError("expected at least one question to answer, got none: check the file of questions")
    by_subject: dict[str, list[Question]] = defaultdict(list)
    for example in examples:
        by_subject[example.subject].append(example)
    for subject in dict.fromkeys(question.subject for question in questions):
        if len(by_subject[subject]) < shots:
            raise EvaluationError(
                f"expected {shots} examples of {subject or 'the questions'} for {shots} shots, got "
                f"{len(by_subject[subject])}: give the dev split, or ask for fewer shots"
            )
    return {subject: found[:shots] for subject, found in by_subject.items()}


def fit_prompts(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    examples: Mapping[str, list[Question]],
    shots: int,
    answering: Answering,
) -> list[Fitted]:
    """Tokenise each question with as many examples as the context holds."""
    context = context_length(model)
    answers = _continuations(tokenizer, questions, answering)
    rooms = [context - max(map(len, choices)) if context else sys.maxsize for choices in answers]
    kept = _shots_that_fit(tokenizer, questions, examples, shots, answering, rooms)
    fitted: dict[int, Fitted] = {}
    waiting = list(range(len(questions)))
    while waiting:
        texts = [prompt_text(questions[i], examples[questions[i].subject][: kept[i]], answering) for i in waiting]
        overlong = []
        for index, prompt in zip(waiting, content_prompts(texts, tokenizer), strict=True):
            ids = list(prompt.ids)
            if len(ids) > rooms[index] and kept[index] > 0:
                kept[index] -= 1
                overlong.append(index)
                continue
            query = Query(_cut(tokenizer, ids, rooms[index]), answers[index])
            fitted[index] = Fitted(query, kept[index], len(ids) > rooms[index])
        waiting = overlong
    return [fitted[index] for index in range(len(questions))]


def _shots_that_fit(
    tokenizer: Any,
    questions: Sequence[Question],
    examples: Mapping[str, list[Question]],
    shots: int,
    answering: Answering,
    rooms: Sequence[int],
) -> list[int]:
    """Say how many examples go before each question, by the tokens of each taken alone (joined, a few may be saved)."""
    sizes: dict[str, NDArray[np.int64]] = {}
    for subject in dict.fromkeys(question.subject for question in questions):
        texts = [f"{_solved(example, answering)}\n\n" for example in examples[subject]]
        sizes[subject] = np.cumsum([len(prompt.ids) for prompt in content_prompts(texts, tokenizer)])
    alone = content_prompts([prompt_text(question, (), answering) for question in questions], tokenizer)
    return [
        int(np.searchsorted(sizes[question.subject], room - len(prompt.ids), side="right")) if shots else 0
        for question, prompt, room in zip(questions, alone, rooms, strict=True)
    ]


def _cut(tokenizer: Any, ids: list[int], room: int) -> list[int]:
    """Take tokens off the beginning, but not what the tokenizer puts first."""
    prefix = prefix_ids(tokenizer)
    return ids if len(ids) <= room else [*prefix, *ids[len(ids) - room + len(prefix) :]]


def _continuations(tokenizer: Any, questions: Sequence[Question], answering: Answering) -> list[list[list[int]]]:
    """Return the tokens each choice adds after ``Answer:``."""
    lead = "Answer:"
    match answering:
        case Answering.LETTER:
            texts = [LETTERS[i] for question in questions for i in range(len(question.choices))]
        case Answering.TEXT:
            texts = [choice for question in questions for choice in question.choices]
        case _:
            assert_never(answering)
    unique = list(dict.fromkeys(texts))
    [lead_prompt] = content_prompts([lead], tokenizer)
    added = {
        text: list(prompt.ids[len(lead_prompt.ids) :])
        for text, prompt in zip(unique, content_prompts([f"{lead} {text}" for text in unique], tokenizer), strict=True)
    }
    following = iter(texts)
    return [[added[next(following)] for _ in question.choices] for question in questions]


def group_by_prefix(questions: Sequence[Question], fitted: Sequence[Fitted]) -> list[list[int]]:
    """Group questions that share a prefix: the same subject and number of examples."""
    groups: dict[tuple[str, int, bool], list[int]] = defaultdict(list)
    for index, (question, fit) in enumerate(zip(questions, fitted, strict=True)):
        groups[question.subject, fit.shots, fit.is_truncated].append(index)
    return list(groups.values())
