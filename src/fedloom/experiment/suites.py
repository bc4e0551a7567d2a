"""The papers' scores of a model as it stands: E2E metrics, multiple choice, exact matches, named as in a recipe.

A suite takes the base with an adapter beside it and gives named estimates, each with its interval and its n, so that
a run, a comparison and the command line show the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, assert_never

from fedloom.config import Settings
from fedloom.config.conduct import Evaluation, SuiteName
from fedloom.data.encoding import render, resolve_template
from fedloom.data.records import Prompt, Shape
from fedloom.data.sources import Rows, Split, load_rows
from fedloom.data.templates import AUTO
from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import DecodingSettings, decode
from fedloom.evaluation.e2e import score_e2e
from fedloom.evaluation.e2e_files import References, read_references
from fedloom.evaluation.intervals import Estimate, ItemStatistics
from fedloom.evaluation.multiple_choice import answer_questions
from fedloom.evaluation.outputs_file import outputs_path
from fedloom.evaluation.questions import Question, read_mmlu, read_questions
from fedloom.experiment.inputs import rows_path
from fedloom.lora.layer import LoRAModel
from fedloom.reporting.durable import plain

OnProgress = Callable[[int, int, float], None]
PER_GROUP = "per_group"
MOST_GROUPS_SHOWN = 20


@dataclass(frozen=True)
class SuiteChoice:
    """What a suite reads and how: ``paths`` by suite, few-shot examples, items at most, decoding, wording.

    ``shape`` and ``columns`` say how rows are read, those of a path and held-out ones; ``group_by`` is the column by
    which their scores are told, by default one that is called so.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    shots: int = 5
    limit: int | None = None
    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    template: str = AUTO
    token_budget: int = 8192
    seed: int = 0
    answering: str = "letter"
    shape: str = Shape.AUTO
    columns: Mapping[str, str] = field(default_factory=dict)
    group_by: str | None = None


@dataclass(frozen=True)
class SuiteScores:
    """A suite's estimates by metric, and what a reader must know of how they came about.

    ``groups`` are the first metric's estimates by group of items (category, subject). ``items`` holds by metric what
    each item adds to it, for a paired comparison; it is not written anywhere.
    """

    suite: str
    estimates: Mapping[str, Estimate]
    notes: Mapping[str, Any]
    groups: Mapping[str, Estimate] = field(default_factory=dict)
    items: Mapping[str, ItemStatistics] = field(default_factory=dict, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        groups = {PER_GROUP: plain(dict(self.groups))} if self.groups else {}
        return {"suite": self.suite, "metrics": plain(dict(self.estimates)), **plain(dict(self.notes)), **groups}

    def lines(self) -> list[str]:
        """Return the figures for people; those of groups, where they are many, are only in :meth:`as_dict`."""
        shown = dict(self.estimates)
        if len(self.groups) <= MOST_GROUPS_SHOWN:
            shown |= {f"  {name}": estimate for name, estimate in self.groups.items()}
        width = max(map(len, shown), default=0)
        lines = [f"{name:<{width}}  {estimate}" for name, estimate in shown.items()]
        told = {name: value for name, value in self.notes.items() if value not in (0, {})}
        return lines + [
            f"{name.replace('_', ' ')}: {f'{value:.4f}' if isinstance(value, float) else value}"
            for name, value in told.items()
        ]


def suite_choice_of(settings: Settings | None) -> SuiteChoice:
    """Return what a recipe says of its suites; without a recipe, what its settings would be when left out."""
    chosen = Evaluation() if settings is None else settings.evaluation
    choice = SuiteChoice(
        paths=chosen.paths,
        shots=chosen.shots,
        limit=chosen.limit,
        decoding=DecodingSettings(chosen.beams, chosen.length_penalty, chosen.no_repeat_ngram, chosen.max_new_tokens),
        token_budget=chosen.batch_tokens,
        answering=chosen.answering,
    )
    if settings is None:
        return choice
    data = settings.data
    return replace(
        choice,
        template=data.template or AUTO,
        seed=settings.run.seed,
        shape=data.shape,
        columns=data.columns,
        group_by=settings.partition.column,
    )


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
            folder = _path(choice, suite, "the folder with test/*.csv and dev/*.csv")
            return _multiple_choice(
                suite, model, tokenizer, choice, read_mmlu(folder), read_mmlu(folder, "dev"), on_progress
            )
        case "multiple-choice":
            file = _path(choice, suite, "a JSONL file of question, choices, answer")
            none_shot = replace(choice, shots=0)
            return _multiple_choice(suite, model, tokenizer, none_shot, read_questions(file), (), on_progress)
        case "exact-match":
            from fedloom.experiment.exact_match import exact_match

            asked = _rows(choice, suite, rows)
            return exact_match(
                model, tokenizer, asked, choice, outputs=outputs, model_id=model_id, on_progress=on_progress
            )
        case "last-number":
            from fedloom.experiment.exact_match import last_number

            asked = _rows(choice, suite, rows)
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
    references = read_references(_path(choice, "e2e", "the references, e.g. testset_w_refs.csv"))
    if not references.mrs:
        raise EvaluationError("e2e: expected references that name their meaning representation (a CSV, or mr||ref)")
    chosen = References(references.mrs[: choice.limit], references.texts[: choice.limit])
    template = resolve_template(choice.template, Shape.E2E, tokenizer)
    prompts = [render(Prompt(mr, "", "."), template, tokenizer).prompt for mr in chosen.mrs]
    file = outputs and outputs_path(outputs, choice.decoding)
    decoded = decode(model, tokenizer, prompts, choice.decoding, file=file, model_id=model_id, on_progress=on_progress)
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


def _rows(choice: SuiteChoice, suite: str, held_out: Rows | None) -> Rows:
    if suite in choice.paths:
        return load_rows(rows_path(choice.paths[suite], Split.TEST), Split.TEST)
    if held_out is None:
        raise EvaluationError(
            f"{suite}: expected rows, there are no held-out ones; name some with --data or evaluation.paths.{suite}, "
            "or hold some out with data.eval_rows or data.eval_path"
        )
    return held_out


def _path(choice: SuiteChoice, suite: str, wanted: str) -> Path:
    if suite not in choice.paths:
        raise EvaluationError(f"{suite}: expected {wanted}, named by --data or evaluation.paths.{suite}; got none")
    path = Path(choice.paths[suite]).expanduser()
    if not path.exists():
        raise EvaluationError(
            f"{suite}: expected {wanted} at {path}, nothing is there; check --data or evaluation.paths.{suite}"
        )
    return path
