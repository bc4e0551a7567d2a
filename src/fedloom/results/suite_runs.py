"""Run a suite of a recipe: ask what its files or rows ask, and score the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from fedloom.config.conduct import SuiteName
from fedloom.data.answer_frame import answer_frame
from fedloom.data.encoding import resolve_template
from fedloom.data.records import Prompt, Shape
from fedloom.data.sources import Rows
from fedloom.data.token_rows import record_prompts
from fedloom.evaluation.choice.multiple_choice import answer_questions
from fedloom.evaluation.choice.questions import Question
from fedloom.evaluation.decoding import OnProgress, decode
from fedloom.evaluation.e2e.e2e_files import References
from fedloom.evaluation.e2e.scorer import score_e2e
from fedloom.evaluation.outputs_file import outputs_path
from fedloom.evaluation.suite_files import choice_questions, e2e_references, mmlu_questions, suite_rows
from fedloom.lora.layer import LoRAModel
from fedloom.models.causal import end_ids
from fedloom.results.exact_answers import exact_match, last_number
from fedloom.results.suites import SuiteChoice, SuiteScores


def run_suite(
    suite: SuiteName,
    model: LoRAModel,
    tokenizer: Any,
    choice: SuiteChoice,
    *,
    rows: Rows | None = None,
    outputs: Path | None = None,
    model_id: str = "",
    on_progress: OnProgress | None = None,
) -> SuiteScores:
    """Score what ``model`` is routed to; what is decoded is kept in ``outputs`` plus how it was decoded, and resumed.

    ``rows`` are held-out ones, for the suites that ask rows and for which the choice has no path.

    Raises:
        EvaluationError: if the suite's files are absent or hold something else.
        DataError: if there are no such rows.
    """
    match suite:
        case "e2e":
            return _e2e(model, tokenizer, choice, outputs, model_id, on_progress)
        case "mmlu":
            return _multiple_choice(suite, model, tokenizer, choice, *mmlu_questions(choice.paths), on_progress)
        case "multiple-choice":
            none_shot, questions = replace(choice, shots=0), choice_questions(choice.paths)
            return _multiple_choice(suite, model, tokenizer, none_shot, questions, (), on_progress)
        case "exact-match":
            asked = suite_rows(suite, choice.paths, rows)
            return exact_match(
                model, tokenizer, asked, choice, outputs=outputs, model_id=model_id, on_progress=on_progress
            )
        case "last-number":
            asked = suite_rows(suite, choice.paths, rows)
            return last_number(
                model, tokenizer, asked, choice, outputs=outputs, model_id=model_id, on_progress=on_progress
            )
    assert_never(suite)


def _e2e(
    model: LoRAModel,
    tokenizer: Any,
    choice: SuiteChoice,
    outputs: Path | None,
    model_id: str,
    on_progress: OnProgress | None,
) -> SuiteScores:
    references = e2e_references(choice.paths)
    chosen = References(references.mrs[: choice.limit], references.texts[: choice.limit])
    template = resolve_template(choice.template, Shape.E2E, tokenizer, choice.date)
    records = [Prompt(mr, "", "") for mr in chosen.mrs]
    prompts = record_prompts(records, template, tokenizer)
    decoded = decode(
        model,
        tokenizer,
        prompts,
        choice.decoding,
        frame=(frame := answer_frame(records[0], template, tokenizer, end_ids(model))),
        file=outputs and outputs_path(outputs, choice.decoding, frame.tag),
        model_id=model_id,
        on_progress=on_progress,
    )
    texts = [" ".join(text.split()) for text in decoded.outputs]
    scores = score_e2e(chosen.texts, texts, seed=choice.seed)
    notes = {
        "num_references": scores.num_references,
        "num_empty_outputs": scores.num_empty_outputs,
        "num_cut_off": decoded.num_cut_off,
        "absent": scores.absent,
        "decoding": decoded.settings.__dict__,
    }
    return SuiteScores("e2e", scores.estimates, notes, items=scores.items)


def _multiple_choice(
    suite: str,
    model: LoRAModel,
    tokenizer: Any,
    choice: SuiteChoice,
    questions: Sequence[Question],
    examples: Sequence[Question],
    on_progress: OnProgress | None,
) -> SuiteScores:
    found = answer_questions(
        model,
        tokenizer,
        spread(questions, choice.limit),
        examples,
        shots=choice.shots,
        answering=choice.answering,
        token_budget=choice.token_budget,
        on_progress=on_progress,
    )
    notes = {
        "chance": found.chance,
        "shuffled": found.shuffled,
        "answering": found.answering.value,
        "shots": found.shots,
        "mean_shots": found.mean_shots,
        "num_with_fewer_shots": found.num_with_fewer_shots,
        "num_truncated": found.num_truncated,
    }
    estimates = {"accuracy": found.micro, "macro_accuracy": found.macro}
    items = {"accuracy": found.items["micro"], "macro_accuracy": found.items["macro"]}
    return SuiteScores(suite, estimates, notes, found.per_subject, items)


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return at most ``limit`` questions, evenly spaced, so that every subject keeps its share."""
    if limit is None or limit >= len(questions):
        return list(questions)
    return [questions[k * len(questions) // limit] for k in range(limit)]
