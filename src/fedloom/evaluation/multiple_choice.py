"""Answer multiple-choice questions by the likelihood of the answers, never by reading sampled text."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import NormalDist
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import OnProgress
from fedloom.evaluation.intervals import Difference, Estimate, bootstrap_difference, ratio, ratio_statistics, wilson
from fedloom.evaluation.prompts import context_length, prefix_ids, prompt_ids
from fedloom.evaluation.questions import LETTERS, Question
from fedloom.evaluation.shared_prefix import Query, continuation_nats


class Answering(StrEnum):
    """What the model is asked to continue with."""

    LETTER = "letter"
    """The choices stand in the prompt; the letter with the highest likelihood is the answer (MMLU's own protocol)."""
    TEXT = "text"
    """The choices do not; the choice with the highest log-likelihood per byte is the answer."""


@dataclass(frozen=True)
class MultipleChoice:
    """How many questions were answered right, and what was left out to fit the model's context.

    ``micro`` counts every question alike, ``macro`` every subject. ``num_with_fewer_shots`` questions had examples
    taken off, ``num_truncated`` had their beginning cut. ``correct_N`` and ``predictions_N`` keep the questions' order.
    """

    micro: Estimate
    macro: Estimate
    per_subject: dict[str, Estimate]
    chance: float
    answering: Answering
    shots: int
    mean_shots: float
    num_with_fewer_shots: int
    num_truncated: int
    seconds: float
    correct_N: NDArray[np.bool_] = field(repr=False, compare=False)
    predictions_N: NDArray[np.int64] = field(repr=False, compare=False)


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    examples: Sequence[Question] = (),
    *,
    shots: int = 5,
    answering: Answering | str = Answering.LETTER,
    token_budget: int = 8192,
    on_progress: OnProgress | None = None,
) -> MultipleChoice:
    """Answer ``questions`` after ``shots`` examples of the same subject.

    Where prompt and answer exceed the model's context, examples are taken off from the last on; a question that does
    not fit alone loses its beginning. Both are counted.

    Raises:
        EvaluationError: there is no question, or a subject has fewer examples than ``shots``.
    """
    begin = time.monotonic()
    answering = Answering(answering)
    fitted = _fit(model, tokenizer, questions, _examples_by_subject(questions, examples, shots), shots, answering)
    nats: list[NDArray[np.float64]] = [np.zeros(0)] * len(questions)
    groups = _groups(questions, fitted)
    done = 0
    for members in groups:
        found = continuation_nats(model, [fitted[index].query for index in members], token_budget=token_budget)
        for index, values in zip(members, found, strict=True):
            nats[index] = values
        done += len(members)
        if on_progress is not None:
            on_progress(done, len(questions), (time.monotonic() - begin) / done * (len(questions) - done))
    predictions_N = np.array([_choose(q, values, answering) for q, values in zip(questions, nats, strict=True)])
    return _result(questions, predictions_N, fitted, answering, shots, time.monotonic() - begin)


def compare_answers(first: MultipleChoice, second: MultipleChoice, *, seed: int, resamples: int = 1000) -> Difference:
    """Return how much more often the first model is right, paired over questions.

    Raises:
        EvaluationError: the two did not answer the same number of questions.
    """
    first_NS, second_NS = (ratio_statistics(side.correct_N) for side in (first, second))
    return bootstrap_difference(first_NS, second_NS, ratio, seed=seed, resamples=resamples)


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
class _Fitted:
    query: Query
    shots: int
    is_truncated: bool


def _listed(question: Question) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return f"{question.question}\n{choices}\nAnswer:"


def _asked(question: Question) -> str:
    return f"Question: {question.question}\nAnswer:"


def _examples_by_subject(
    questions: Sequence[Question], examples: Sequence[Question], shots: int
) -> Mapping[str, list[Question]]:
    if not questions:
        raise EvaluationError("there is no question to answer: check the file of questions")
    by_subject: dict[str, list[Question]] = defaultdict(list)
    for example in examples:
        by_subject[example.subject].append(example)
    for subject in dict.fromkeys(question.subject for question in questions):
        if len(by_subject[subject]) < shots:
            raise EvaluationError(
                f"{shots} shots need as many examples of {subject or 'the questions'}, got {len(by_subject[subject])}: "
                "give the dev split, or ask for fewer shots"
            )
    return {subject: found[:shots] for subject, found in by_subject.items()}


def _fit(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    examples: Mapping[str, list[Question]],
    shots: int,
    answering: Answering,
) -> list[_Fitted]:
    """Tokenise each question with as many examples as the context holds."""
    context = context_length(model)
    answers = _continuations(tokenizer, questions, answering)
    rooms = [context - max(map(len, choices)) if context else sys.maxsize for choices in answers]
    kept = _shots_that_fit(tokenizer, questions, examples, shots, answering, rooms)
    fitted: dict[int, _Fitted] = {}
    waiting = list(range(len(questions)))
    while waiting:
        texts = [prompt_text(questions[i], examples[questions[i].subject][: kept[i]], answering) for i in waiting]
        overlong = []
        for index, ids in zip(waiting, prompt_ids(tokenizer, texts), strict=True):
            if len(ids) > rooms[index] and kept[index] > 0:
                kept[index] -= 1
                overlong.append(index)
                continue
            query = Query(_cut(tokenizer, ids, rooms[index]), answers[index])
            fitted[index] = _Fitted(query, kept[index], len(ids) > rooms[index])
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
        sizes[subject] = np.cumsum([len(ids) for ids in prompt_ids(tokenizer, texts)])
    alone = prompt_ids(tokenizer, [prompt_text(question, (), answering) for question in questions])
    return [
        int(np.searchsorted(sizes[question.subject], room - len(ids), side="right")) if shots else 0
        for question, ids, room in zip(questions, alone, rooms, strict=True)
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
    [lead_ids] = prompt_ids(tokenizer, [lead])
    added = {
        text: ids[len(lead_ids) :]
        for text, ids in zip(unique, prompt_ids(tokenizer, [f"{lead} {text}" for text in unique]), strict=True)
    }
    following = iter(texts)
    return [[added[next(following)] for _ in question.choices] for question in questions]


def _groups(questions: Sequence[Question], fitted: Sequence[_Fitted]) -> list[list[int]]:
    """Group questions that share a prefix: the same subject and number of examples."""
    groups: dict[tuple[str, int, bool], list[int]] = defaultdict(list)
    for index, (question, fit) in enumerate(zip(questions, fitted, strict=True)):
        groups[question.subject, fit.shots, fit.is_truncated].append(index)
    return list(groups.values())


def _choose(question: Question, nats: NDArray[np.float64], answering: Answering) -> int:
    """Return the most likely choice; of equally likely ones the first."""
    match answering:
        case Answering.LETTER:
            return int(np.argmin(nats))
        case Answering.TEXT:
            return int(np.argmin(nats / [max(1, len(choice.encode())) for choice in question.choices]))
        case _:
            assert_never(answering)


def _result(
    questions: Sequence[Question],
    predictions_N: NDArray[np.int64],
    fitted: Sequence[_Fitted],
    answering: Answering,
    shots: int,
    seconds: float,
) -> MultipleChoice:
    correct_N = predictions_N == np.array([question.answer for question in questions])
    by_subject: dict[str, list[bool]] = defaultdict(list)
    for question, is_correct in zip(questions, correct_N.tolist(), strict=True):
        by_subject[question.subject].append(is_correct)
    return MultipleChoice(
        micro=wilson(int(correct_N.sum()), len(questions)),
        macro=_macro(list(by_subject.values())),
        per_subject={subject: wilson(sum(found), len(found)) for subject, found in by_subject.items()},
        chance=float(np.mean([1 / len(question.choices) for question in questions])),
        answering=answering,
        shots=shots,
        mean_shots=float(np.mean([fit.shots for fit in fitted])),
        num_with_fewer_shots=sum(fit.shots < shots for fit in fitted),
        num_truncated=sum(fit.is_truncated for fit in fitted),
        seconds=seconds,
        correct_N=correct_N,
        predictions_N=predictions_N,
    )


def _macro(by_subject: Sequence[Sequence[bool]], level: float = 0.95) -> Estimate:
    """Return the mean of the subjects' shares; its variance is Σ p (1 − p) / n over subjects / subjects²."""
    shares = [sum(found) / len(found) for found in by_subject]
    variance = sum(p * (1 - p) / len(found) for p, found in zip(shares, by_subject, strict=True)) / len(shares) ** 2
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    value = float(np.mean(shares))
    n = sum(map(len, by_subject))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), n, level, "normal, by subject")
