"""The share of held-out rows that a model answers word for word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedloom.data.encoding import render, resolve_template
from fedloom.data.records import Dialogue, Prompt, Record, Shape, read_records
from fedloom.data.sources import Rows
from fedloom.data.templates import Template
from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import GREEDY, Decoded, decode
from fedloom.evaluation.intervals import Estimate, wilson
from fedloom.experiment.suites import SuiteChoice, SuiteScores
from fedloom.lora.layer import LoRAModel

SUITE, METRIC = "exact-match", "exact_match"
COMPARED = "runs of white space are one blank, outer ones are cut; case counts"
PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class AskedRow:
    """A row as the model is asked it, and the answer that counts."""

    prompt: str
    answer: str
    row: Mapping[str, Any]


def exact_match(
    model: LoRAModel,
    tokenizer: Any,
    rows: Rows,
    choice: SuiteChoice,
    *,
    shape: Shape | str = Shape.AUTO,
    columns: Mapping[str, str] | None = None,
) -> SuiteScores:
    """Score what ``model`` is routed to: the share of rows whose greedy answer is the row's, with Wilson's interval.

    ``choice.limit`` rows at most, evenly spaced. Whatever beams the choice has, decoding is greedy, and it ends one
    token after the longest of the expected answers, for what is longer matches none of them.

    Raises:
        EvaluationError: no row has an answer, or a prompt leaves no room for one.
    """
    asked = asked_rows(rows, tokenizer, choice, shape, columns)
    decoded = answer_rows(model, tokenizer, asked, choice.decoding.max_new_tokens)
    matches = [is_match(output, one.answer) for output, one in zip(decoded.outputs, asked, strict=True)]
    notes = {
        "compared": COMPARED,
        "num_available": len(rows),
        "num_cut_off": decoded.num_cut_off,
        "max_new_tokens": decoded.settings.max_new_tokens,
    }
    return SuiteScores(SUITE, {METRIC: share(matches)}, notes)


def asked_rows(
    rows: Rows,
    tokenizer: Any,
    choice: SuiteChoice,
    shape: Shape | str = Shape.AUTO,
    columns: Mapping[str, str] | None = None,
) -> list[AskedRow]:
    """Return the rows that ``choice`` asks, worded as in training.

    Raises:
        EvaluationError: no row has an answer.
        DataError: the rows have no known shape, or there is no such template.
    """
    records = read_records(rows, shape, columns)
    template = resolve_template(choice.template, records.shape, tokenizer)
    answered = [index for index, record in enumerate(records.items) if last_answer(record).strip()]
    if not answered:
        raise EvaluationError(f"exact-match: expected rows with an answer, none of {len(rows)} has one; check the rows")
    return [_asked(records.items[i], template, tokenizer, rows.rows[i]) for i in _spread(answered, choice.limit)]


def answer_rows(model: LoRAModel, tokenizer: Any, asked: Sequence[AskedRow], max_new_tokens: int) -> Decoded:
    """Decode greedily, with room for the longest expected answer and at most ``max_new_tokens``."""
    lengths = [len(tokenizer(one.answer, add_special_tokens=False)["input_ids"]) for one in asked]
    settings = replace(GREEDY, max_new_tokens=min(max_new_tokens, max(lengths) + 1))
    return decode(model, tokenizer, [one.prompt for one in asked], settings, batch_size=PROMPTS_AT_ONCE)


def is_match(output: str, answer: str) -> bool:
    """Tell whether two texts are the same but for white space."""
    return output.split() == answer.split()


def share(matches: Sequence[bool]) -> Estimate:
    """Return the share of matches with Wilson's interval."""
    return wilson(sum(matches), len(matches))


def last_answer(record: Record) -> str:
    """Return the answer that a model has to find: of a dialogue, the last one."""
    match record:
        case Prompt():
            return record.answer
        case Dialogue():
            return next((turn.content for turn in reversed(record.turns) if turn.role == "assistant"), "")


def _asked(record: Record, template: Template | None, tokenizer: Any, row: Mapping[str, Any]) -> AskedRow:
    return AskedRow(render(record, template, tokenizer).prompt, last_answer(record), row)


def _spread(indices: Sequence[int], limit: int | None) -> list[int]:
    """Return at most ``limit`` of the indices, evenly spaced."""
    wanted = len(indices) if limit is None else min(limit, len(indices))
    return [indices[k * len(indices) // wanted] for k in range(wanted)]
