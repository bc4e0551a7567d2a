"""Let a model judge answers: FedIT's pair of scores in both orders, and MT-bench's single grades over two turns.

A verdict that cannot be parsed is asked for again and then counted as missing; no score is ever guessed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedloom.errors import EvaluationError
from fedloom.evaluation.intervals import (
    Difference,
    Estimate,
    bootstrap,
    bootstrap_difference,
    bootstrap_mean,
    ratio,
    ratio_statistics,
)
from fedloom.evaluation.judge.asking import Judging, OnEstimate, OnVerdict, Usage, ask_all
from fedloom.evaluation.judge.endpoint import Endpoint, Message
from fedloom.evaluation.judge.judge_prompts import (
    OWN_PROMPTS,
    PAIR,
    SINGLE,
    SINGLE_REFERENCE,
    SINGLE_REFERENCE_TWO_TURNS,
    SINGLE_TWO_TURNS,
    JudgePrompt,
)
from fedloom.evaluation.judge.judge_questions import REFERENCE_CATEGORIES, Answers, JudgeQuestion, check_answers


@dataclass(frozen=True)
class PairVerdicts:
    """FedIT's comparison: per question the mean of both orders, 1 to 10.

    ``relative`` is Σ second / Σ first: with the baseline first, above 1 the second is better. ``num_inconsistent``
    questions were won by one side in one order and by the other in the other. ``num_missing`` had no verdict in at
    least one order and are in no figure.
    """

    first_sum: float
    second_sum: float
    relative: Estimate
    difference: Difference
    num_second_wins: int
    num_ties: int
    num_first_wins: int
    num_inconsistent: int
    num_missing: int
    scores: dict[str, tuple[float, float]]
    usage: Usage


@dataclass(frozen=True)
class Grades:
    """MT-bench's single grades, 1 to 10; a turn without a verdict is skipped and counted in ``num_missing``."""

    overall: Estimate
    per_turn: tuple[Estimate, ...]
    per_category: dict[str, float]
    num_missing: int
    scores: dict[str, tuple[float | None, ...]]
    usage: Usage


def judge_pairs(
    endpoint: Endpoint,
    questions: Sequence[JudgeQuestion],
    first: Answers,
    second: Answers,
    *,
    seed: int,
    cache: Path | None = None,
    prompts: Mapping[str, JudgePrompt] = OWN_PROMPTS,
    judging: Judging | None = None,
    on_estimate: OnEstimate | None = None,
    on_progress: OnVerdict | None = None,
) -> PairVerdicts:
    """Compare two models' answers to the first turn of each question, in both orders.

    Raises:
        EvaluationError: an answer is missing, or no question got a verdict in both orders.
        EndpointError: the endpoint fails; verdicts so far are in the cache.

    Source: FedIT (arXiv 2305.05644), section 4; both orders are our addition.
    """
    check_answers(questions, first, "the first model")
    check_answers(questions, second, "the second model")
    asked = []
    for question in questions:
        one, other = first[question.id][0], second[question.id][0]
        for answer_a, answer_b in ((one, other), (other, one)):
            fields = {"question": question.turns[0], "answer_a": answer_a, "answer_b": answer_b}
            asked.append(prompts[PAIR].messages(**fields))
    verdicts, usage = ask_all(endpoint, asked, 2, cache, judging or Judging(), on_estimate, on_progress)
    orders = {question.id: (verdicts[2 * i], verdicts[2 * i + 1]) for i, question in enumerate(questions)}
    return _pair_verdicts(orders, usage, seed)


def grade_answers(
    endpoint: Endpoint,
    questions: Sequence[JudgeQuestion],
    answers: Answers,
    references: Answers | None = None,
    *,
    seed: int,
    cache: Path | None = None,
    prompts: Mapping[str, JudgePrompt] = OWN_PROMPTS,
    judging: Judging | None = None,
    on_estimate: OnEstimate | None = None,
    on_progress: OnVerdict | None = None,
) -> Grades:
    """Grade each turn of each answer; math, reasoning and coding against the reference.

    Raises:
        EvaluationError: an answer or a needed reference is missing, or no verdict was parsed.
        EndpointError: the endpoint fails; verdicts so far are in the cache.

    Source: MT-bench (arXiv 2306.05685), single-answer grading.
    """
    check_answers(questions, answers, "the model")
    judged = [(question, turn) for question in questions for turn in range(min(2, len(question.turns)))]
    asked = [_single_messages(prompts, *one, answers, references or {}) for one in judged]
    verdicts, usage = ask_all(endpoint, asked, 1, cache, judging or Judging(), on_estimate, on_progress)
    scores: dict[str, list[float | None]] = defaultdict(list)
    for (question, _), verdict in zip(judged, verdicts, strict=True):
        scores[question.id].append(verdict[0] if verdict else None)
    return _grades(questions, scores, usage, seed)


def compare_grades(first: Grades, second: Grades, *, seed: int) -> Difference:
    """Return how much higher the first model's mean grade is, paired over the questions both have grades for.

    Raises:
        EvaluationError: no question has grades on both sides.
    """
    shared = [key for key in first.scores if _mean(first.scores[key]) and _mean(second.scores.get(key, ()))]
    if not shared:
        raise EvaluationError(
            "expected questions that both models were graded on, found none: judge both on one file of questions"
        )
    sides = ([_mean(side.scores[key]) or 0.0 for key in shared] for side in (first, second))
    first_NS, second_NS = (ratio_statistics(values) for values in sides)
    return bootstrap_difference(first_NS, second_NS, ratio, seed=seed)


def _single_messages(
    prompts: Mapping[str, JudgePrompt], question: JudgeQuestion, turn: int, answers: Answers, references: Answers
) -> list[Message]:
    needs_reference = question.category in REFERENCE_CATEGORIES
    given = references.get(question.id, ())
    if needs_reference and len(given) <= turn:
        raise EvaluationError(
            f"question {question.id} ({question.category}): expected a reference answer for turn {turn + 1}, got none: "
            "give the file of references"
        )
    fields = {"question": question.turns[0], "answer": answers[question.id][0]}
    fields |= {f"question_{i}": text for i, text in enumerate(question.turns, start=1)}
    fields |= {f"answer_{i}": text for i, text in enumerate(answers[question.id], start=1)}
    fields |= {f"ref_answer_{i}": text for i, text in enumerate(given, start=1)}
    names = ((SINGLE, SINGLE_REFERENCE), (SINGLE_TWO_TURNS, SINGLE_REFERENCE_TWO_TURNS))[turn]
    return prompts[names[needs_reference]].messages(**fields)


def _pair_verdicts(
    orders: Mapping[str, tuple[tuple[float, ...] | None, tuple[float, ...] | None]], usage: Usage, seed: int
) -> PairVerdicts:
    scores: dict[str, tuple[float, float]] = {}
    num_inconsistent = 0
    for key, (straight, swapped) in orders.items():
        if straight is None or swapped is None:
            continue
        scores[key] = (straight[0] + swapped[1]) / 2, (straight[1] + swapped[0]) / 2
        num_inconsistent += (straight[1] - straight[0]) * (swapped[0] - swapped[1]) < 0
    if not scores:
        raise EvaluationError(
            f"expected verdicts in both orders, none of {len(orders)} questions has them: {usage.advice}"
        )
    first_N, second_N = np.array(list(scores.values())).T
    first_NS, second_NS = ratio_statistics(first_N), ratio_statistics(second_N)
    return PairVerdicts(
        first_sum=float(first_N.sum()),
        second_sum=float(second_N.sum()),
        relative=bootstrap(ratio_statistics(second_N, first_N), ratio, seed=seed),
        difference=bootstrap_difference(second_NS, first_NS, ratio, seed=seed),
        num_second_wins=int((second_N > first_N).sum()),
        num_ties=int((second_N == first_N).sum()),
        num_first_wins=int((second_N < first_N).sum()),
        num_inconsistent=num_inconsistent,
        num_missing=len(orders) - len(scores),
        scores=scores,
        usage=usage,
    )


def _grades(
    questions: Sequence[JudgeQuestion], scores: Mapping[str, Sequence[float | None]], usage: Usage, seed: int
) -> Grades:
    columns = zip(*([*found, None][:2] for found in scores.values()), strict=True)
    turns = [[score for score in column if score is not None] for column in columns]
    means = {key: mean for key, found in scores.items() if (mean := _mean(found)) is not None}
    if not means:
        raise EvaluationError(f"expected grades, none could be read from {usage.num_verdicts} verdicts: {usage.advice}")
    by_category: dict[str, list[float]] = defaultdict(list)
    for question in questions:
        if question.id in means:
            by_category[question.category].append(means[question.id])
    return Grades(
        overall=bootstrap_mean(list(means.values()), seed=seed),
        per_turn=tuple(bootstrap_mean(turn, seed=seed) for turn in turns if turn),
        per_category={category: float(np.mean(values)) for category, values in by_category.items()},
        num_missing=usage.num_unparseable,
        scores={key: tuple(found) for key, found in scores.items()},
        usage=usage,
    )


def _mean(scores: Sequence[float | None]) -> float | None:
    found = [score for score in scores if score is not None]
    return float(np.mean(found)) if found else None
