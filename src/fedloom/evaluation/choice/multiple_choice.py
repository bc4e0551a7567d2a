"""Answer multiple-choice questions by the likelihood of the answers, never by reading sampled text."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from fedloom.evaluation.choice.question_prompts import (
    Answering,
    Fitted,
    examples_by_subject,
    fit_prompts,
    group_by_prefix,
)
from fedloom.evaluation.choice.questions import Question
from fedloom.evaluation.choice.shared_prefix import Query, continuation_nats
from fedloom.evaluation.decoding import OnProgress
from fedloom.evaluation.intervals import Estimate, ItemStatistics, ratio, ratio_statistics, wilson


@dataclass(frozen=True)
class MultipleChoice:
    """How many questions were answered right, and what was dropped to fit the model's context.

    ``micro`` counts every question alike, ``macro`` every subject. ``num_with_fewer_shots`` questions had examples
    taken off, ``num_truncated`` had their beginning cut. ``chance`` is that of answers drawn evenly; ``shuffled`` what
    these same predictions score on average when shuffled within their subject: a model that prefers a letter knows
    nothing if it only reaches that. ``correct_N``, ``predictions_N`` and ``items``, what each question adds to
    ``micro`` and ``macro``, keep the questions' order.
    """

    micro: Estimate
    macro: Estimate
    per_subject: dict[str, Estimate]
    chance: float
    shuffled: float
    answering: Answering
    shots: int
    mean_shots: float
    num_with_fewer_shots: int
    num_truncated: int
    seconds: float
    correct_N: NDArray[np.bool_] = field(repr=False, compare=False)
    predictions_N: NDArray[np.int64] = field(repr=False, compare=False)
    items: Mapping[str, ItemStatistics] = field(repr=False, compare=False)


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
    fitted = fit_prompts(model, tokenizer, questions, examples_by_subject(questions, examples, shots), shots, answering)
    nats: list[NDArray[np.float64]] = [np.zeros(0)] * len(questions)
    groups = group_by_prefix(questions, fitted)
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


def tokenised_groups(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    examples: Sequence[Question] = (),
    *,
    shots: int = 5,
    answering: Answering | str = Answering.LETTER,
) -> list[list[Query]]:
    """Return what :func:`answer_questions` gives the model: questions of one subject and number of examples together.

    Raises:
        EvaluationError: there is no question, or a subject has fewer examples than ``shots``.
    """
    chosen = examples_by_subject(questions, examples, shots)
    fitted = fit_prompts(model, tokenizer, questions, chosen, shots, Answering(answering))
    return [[fitted[index].query for index in members] for members in group_by_prefix(questions, fitted)]


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
    fitted: Sequence[Fitted],
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
        shuffled=_shuffled(questions, predictions_N),
        answering=answering,
        shots=shots,
        mean_shots=float(np.mean([fit.shots for fit in fitted])),
        num_with_fewer_shots=sum(fit.shots < shots for fit in fitted),
        num_truncated=sum(fit.is_truncated for fit in fitted),
        seconds=seconds,
        correct_N=correct_N,
        predictions_N=predictions_N,
        items=_items(questions, correct_N),
    )


def _items(questions: Sequence[Question], correct_N: NDArray[np.bool_]) -> dict[str, ItemStatistics]:
    """Return each question's part of both averages; in ``macro`` it weighs 1 / questions of its subject.

    The weights stay with the questions when these are resampled, so that no subject has to be drawn.
    """
    sizes = Counter(question.subject for question in questions)
    weight_N = np.array([1 / sizes[question.subject] for question in questions])
    return {
        "micro": ItemStatistics(ratio_statistics(correct_N), ratio),
        "macro": ItemStatistics(ratio_statistics(correct_N * weight_N, weight_N), ratio),
    }


def _shuffled(questions: Sequence[Question], predictions_N: NDArray[np.int64]) -> float:
    """Return Σ over subjects and choices of (times predicted) · (times right) / questions of the subject, over N."""
    predicted: Counter[tuple[str, int]] = Counter()
    right: Counter[tuple[str, int]] = Counter()
    for question, prediction in zip(questions, predictions_N.tolist(), strict=True):
        predicted[question.subject, prediction] += 1
        right[question.subject, question.answer] += 1
    sizes = Counter(question.subject for question in questions)
    return sum(predicted[key] * right[key] / sizes[key[0]] for key in predicted) / len(questions)


def _macro(by_subject: Sequence[Sequence[bool]], level: float = 0.95) -> Estimate:
    """Return the mean of the subjects' shares; its variance is Σ p (1 − p) / n over subjects / subjects².

    Where every share is 0 or 1 that variance is 0 and says nothing: the bounds are unknown.
    """
    shares = [sum(found) / len(found) for found in by_subject]
    variance = sum(p * (1 - p) / len(found) for p, found in zip(shares, by_subject, strict=True)) / len(shares) ** 2
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    value = float(np.mean(shares))
    n = sum(map(len, by_subject))
    low, high = (max(0.0, value - half), min(1.0, value + half)) if half > 0 else (math.nan, math.nan)
    return Estimate(value, low, high, n, level, "normal, by subject")
