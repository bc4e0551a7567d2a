"""The share of rows that a model answers rightly: word for word, or with the number that the answer ends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloom.config.conduct import SuiteName
from fedloom.data.answer_frame import AnswerFrame, answer_frame
from fedloom.data.encoding import resolve_template
from fedloom.data.groups import grouping_of
from fedloom.data.records import Dialogue, Prompt, Record, Records, read_records
from fedloom.data.sources import Rows
from fedloom.data.token_rows import PromptTokens, content_encodings, record_prompts
from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import GREEDY, Decoded, DecodingSettings, OnProgress, decode
from fedloom.evaluation.exact_match import METRIC, Part, has_part, score_matches
from fedloom.evaluation.intervals import wilson
from fedloom.evaluation.outputs_file import OutputsFile, outputs_path
from fedloom.lora.layer import LoRAModel
from fedloom.models.causal import end_ids
from fedloom.results.suites import SuiteChoice, SuiteScores

SUITE: SuiteName = "exact-match"
NUMBER_SUITE: SuiteName = "last-number"
COMPARED = {
    Part.WHOLE: "runs of white space are one blank, outer ones are cut; case counts",
    Part.LAST_NUMBER: "the first number after ####, without that mark the last one; by value",
}
NOTHING_FOUND = {Part.WHOLE: "num_empty_outputs", Part.LAST_NUMBER: "num_outputs_without_number"}
PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class AskedRow:
    """A row as the model is asked it, the answer that counts, and its place among the rows and for people."""

    worded: PromptTokens
    answer: str
    row: Mapping[str, Any]
    index: int = 0
    where: str = ""
    frame: AnswerFrame | None = None

    @property
    def prompt(self) -> str:
        """The prompt as a person reads it."""
        return self.worded.text


def exact_match(
    model: LoRAModel,
    tokenizer: Any,
    rows: Rows,
    choice: SuiteChoice,
    *,
    outputs: Path | None = None,
    model_id: str = "",
    on_progress: OnProgress | None = None,
) -> SuiteScores:
    """Score what ``model`` is routed to: the share of rows whose greedy answer is the row's, with Wilson's interval.

    ``choice.limit`` rows at most, evenly spaced. Whatever beams the choice has, decoding is greedy, and it ends one
    token after the longest of the expected answers, for what is longer matches none of them. What is decoded is kept
    beside ``outputs`` and resumed.

    Raises:
        EvaluationError: no row has an answer, or a prompt leaves no room for one.
    """
    rows = rows.distinct()
    asked = asked_rows(rows, tokenizer, choice, end_ids(model))
    settings = answer_settings(tokenizer, asked, choice.decoding.max_new_tokens)
    decoded = _decode(model, tokenizer, asked, settings, outputs, model_id, on_progress)
    return _scores(SUITE, Part.WHOLE, asked, decoded, rows, choice)


def last_number(
    model: LoRAModel,
    tokenizer: Any,
    rows: Rows,
    choice: SuiteChoice,
    *,
    outputs: Path | None = None,
    model_id: str = "",
    on_progress: OnProgress | None = None,
) -> SuiteScores:
    """Score what ``model`` is routed to: the share of rows whose greedy answer ends on the row's number, as in GSM8K.

    The reasoning before the number may be of any length, so up to ``choice.decoding.max_new_tokens`` are decoded;
    outputs cut off there, and outputs without a number, are counted. What is decoded is kept beside ``outputs`` and
    resumed.

    Raises:
        EvaluationError: an answer has no number, no row has an answer, or a prompt leaves no room for one.
    """
    rows = rows.distinct()
    asked = asked_rows(rows, tokenizer, choice, end_ids(model))
    for one in asked:
        if not has_part(one.answer, Part.LAST_NUMBER):
            raise EvaluationError(
                f"{NUMBER_SUITE}: {one.where}: expected an answer that ends on a number, got {one.answer[-60:]!r}; "
                f"remove the row, or score by {SUITE}"
            )
    settings = replace(GREEDY, max_new_tokens=choice.decoding.max_new_tokens)
    decoded = _decode(model, tokenizer, asked, settings, outputs, model_id, on_progress)
    return _scores(NUMBER_SUITE, Part.LAST_NUMBER, asked, decoded, rows, choice)


def asked_rows(rows: Rows, tokenizer: Any, choice: SuiteChoice, ends: Sequence[int] = ()) -> list[AskedRow]:
    """Return the rows that ``choice`` asks, worded as in training; ``ends`` are those that the base's files name.

    Raises:
        EvaluationError: no row has an answer.
        DataError: the rows have no known shape, or there is no such template.
    """
    records = read_records(rows, choice.shape, choice.columns)
    template = resolve_template(choice.template, records.shape, tokenizer, choice.date)
    answered = _answered(records)
    if not answered:
        raise EvaluationError(f"expected rows with an answer, got none in {len(rows)}; check the rows and their shape")
    chosen = _spread(answered, choice.limit)
    prompts = record_prompts([records.items[index] for index in chosen], template, tokenizer)
    frame = answer_frame(records.items[chosen[0]], template, tokenizer, ends)
    return [_asked(records, index, prompt, frame) for index, prompt in zip(chosen, prompts, strict=True)]


def answer_settings(tokenizer: Any, asked: Sequence[AskedRow], max_new_tokens: int) -> DecodingSettings:
    """Return greedy decoding with room for the longest expected answer and at most ``max_new_tokens``."""
    lengths = [len(encoding.ids) for encoding in content_encodings([one.answer for one in asked], tokenizer)]
    around = 1 if (frame := asked[0].frame) is None else frame.num_tokens
    return replace(GREEDY, max_new_tokens=min(max_new_tokens, max(lengths) + around))


def kept_outputs(outputs: Path, tokenizer: Any, asked: Sequence[AskedRow], choice: SuiteChoice) -> tuple[str, ...]:
    """Return what :func:`exact_match` kept beside ``outputs``, one a row that was asked.

    Raises:
        EvaluationError: an output is missing.
    """
    settings = answer_settings(tokenizer, asked, choice.decoding.max_new_tokens)
    tag = _tag(asked)
    file = outputs_path(outputs, settings, tag)
    kept = OutputsFile.open(file, settings, "", tag).outputs if file.exists() else {}
    if missing := sum(one.prompt not in kept for one in asked):
        raise EvaluationError(
            f"{file}: expected the outputs of {len(asked)} rows, {missing} are missing; run it again with --fresh"
        )
    return tuple(kept[one.prompt][0] for one in asked)


def last_answer(record: Record) -> str:
    """Return the answer that a model has to find: of a dialogue, the last one."""
    match record:
        case Prompt():
            return record.answer
        case Dialogue():
            return "" if record.last_answer is None else record.turns[record.last_answer].content


def _decode(
    model: LoRAModel,
    tokenizer: Any,
    asked: Sequence[AskedRow],
    settings: DecodingSettings,
    outputs: Path | None,
    model_id: str,
    on_progress: OnProgress | None,
) -> Decoded:
    return decode(
        model,
        tokenizer,
        [one.worded for one in asked],
        settings,
        frame=asked[0].frame,
        batch_size=PROMPTS_AT_ONCE,
        file=outputs and outputs_path(outputs, settings, _tag(asked)),
        model_id=model_id,
        on_progress=on_progress,
    )


def _scores(
    suite: str, part: Part, asked: Sequence[AskedRow], decoded: Decoded, rows: Rows, choice: SuiteChoice
) -> SuiteScores:
    found = score_matches(decoded.outputs, [one.answer for one in asked], part)
    grouping = grouping_of(rows.select([one.index for one in asked]), choice.group_by)
    members = {} if grouping is None else dict(grouping.members())
    groups = {name: wilson(int(found.correct_N[which].sum()), len(which)) for name, which in members.items()}
    notes = {
        "compared": COMPARED[part],
        "num_available": len(rows),
        "num_rows_without_answer": len(rows) - len(_answered(read_records(rows, choice.shape, choice.columns))),
        NOTHING_FOUND[part]: found.num_without_answer,
        "num_cut_off": decoded.num_cut_off,
        "max_new_tokens": decoded.settings.max_new_tokens,
    }
    return SuiteScores(suite, {METRIC: found.accuracy}, notes, groups, found.items)


def _answered(records: Records) -> list[int]:
    return [index for index, record in enumerate(records.items) if last_answer(record).strip()]


def _asked(records: Records, index: int, prompt: PromptTokens, frame: AnswerFrame) -> AskedRow:
    rows = records.rows
    return AskedRow(prompt, last_answer(records.items[index]), rows.rows[index], index, rows.where(index), frame)


def _tag(asked: Sequence[AskedRow]) -> str:
    return "" if (frame := asked[0].frame) is None else frame.tag


def _spread(indices: Sequence[int], limit: int | None) -> list[int]:
    """Return at most ``limit`` of the indices, evenly spaced."""
    wanted = len(indices) if limit is None else min(limit, len(indices))
    return [indices[k * len(indices) // wanted] for k in range(wanted)]
