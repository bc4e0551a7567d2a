"""What a judge is asked: our wording, or any file in the format of FastChat's ``judge_prompts.jsonl``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from fedloom.data.json_rows import read_json_lines
from fedloom.errors import EvaluationError
from fedloom.evaluation.judge.endpoint import Message


@dataclass(frozen=True)
class JudgePrompt:
    """A system message and a template whose ``{fields}`` are filled in."""

    system: str
    template: str

    def messages(self, **fields: str) -> list[Message]:
        """Return the conversation to send; braces in the fields stay as they are.

        Raises:
            EvaluationError: the template asks for a field there is no value for, or for more than a field's text.
        """
        try:
            parts = list(Formatter().parse(self.template))
        except ValueError as error:
            raise EvaluationError(
                f"the judge's template: expected names in braces, got {error}; write {{{{ and }}}} for plain braces"
            ) from error
        content = ""
        for text, name, specification, conversion in parts:
            if name is not None and (name not in fields or specification or conversion):
                asked = name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
                known = ", ".join(sorted(fields))
                raise EvaluationError(f"the judge's template: expected fields from {known}, got {asked!r}; correct it")
            content += text + (fields[name] if name is not None else "")
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": content}]


PAIR = "pair-scores"
SINGLE, SINGLE_REFERENCE = "single-v1", "single-math-v1"
SINGLE_TWO_TURNS, SINGLE_REFERENCE_TWO_TURNS = "single-v1-multi-turn", "single-math-v1-multi-turn"

_GRADER = (
    "You grade answers of an AI assistant. Weigh how helpful, relevant, accurate, thorough and clear an answer is, "
    "and how closely it does what was asked. Length alone is no merit. Explain your view in a few sentences, then "
    "close with the grade from 1 (useless) to 10 (excellent), written exactly like this: Rating: [[5]]"
)
_CHECKER = f"{_GRADER} A reference answer is given; where the assistant contradicts it, say what is wrong first."
_LAST_TURN = " You see a conversation of two turns; grade the assistant's answer to the second question only."

OWN_PROMPTS: Mapping[str, JudgePrompt] = {
    PAIR: JudgePrompt(
        "You compare the answers of two AI assistants to one request. Weigh how helpful, relevant, accurate and "
        "detailed each is. The order in which they are shown and their length must not matter. Explain your view in a "
        "few sentences, then close with one score from 1 to 10 for each, the first assistant's first, written exactly "
        "like this: Scores: [[5]] [[5]]",
        "Request:\n{question}\n\n<first assistant>\n{answer_a}\n</first assistant>\n\n"
        "<second assistant>\n{answer_b}\n</second assistant>",
    ),
    SINGLE: JudgePrompt(_GRADER, "Question:\n{question}\n\n<answer>\n{answer}\n</answer>"),
    SINGLE_REFERENCE: JudgePrompt(
        _CHECKER,
        "Question:\n{question}\n\n<reference>\n{ref_answer_1}\n</reference>\n\n<answer>\n{answer}\n</answer>",
    ),
    SINGLE_TWO_TURNS: JudgePrompt(
        _GRADER + _LAST_TURN,
        "First question:\n{question_1}\n\n<answer>\n{answer_1}\n</answer>\n\n"
        "Second question:\n{question_2}\n\n<answer>\n{answer_2}\n</answer>",
    ),
    SINGLE_REFERENCE_TWO_TURNS: JudgePrompt(
        _CHECKER + _LAST_TURN,
        "First question:\n{question_1}\n\n<reference>\n{ref_answer_1}\n</reference>\n\n"
        "<answer>\n{answer_1}\n</answer>\n\n"
        "Second question:\n{question_2}\n\n<reference>\n{ref_answer_2}\n</reference>\n\n"
        "<answer>\n{answer_2}\n</answer>",
    ),
}
_NUMBER = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")


def read_prompts(file: Path) -> Mapping[str, JudgePrompt]:
    """Return our prompts with those of ``file`` in their place, by name.

    Raises:
        EvaluationError: the file is missing or a line lacks ``name`` or ``prompt_template``.
    """
    if not file.is_file():
        raise EvaluationError(
            f"{file}: expected a file of JSON lines with name and prompt_template, found none; check the path"
        )
    prompts = dict(OWN_PROMPTS)
    for number, row in read_json_lines(file):
        name, template, system = row.get("name"), row.get("prompt_template"), row.get("system_prompt") or ""
        if not isinstance(name, str) or not isinstance(template, str) or not isinstance(system, str):
            raise EvaluationError(
                f"{file} line {number}: expected the keys name and prompt_template as texts, got {', '.join(row)}; "
                "add or correct them"
            )
        prompts[name] = JudgePrompt(system, template)
    return prompts


def parse_scores(reply: str, expected: int) -> tuple[float, ...] | None:
    """Return the last ``expected`` scores written ``[[7]]``, or None where there are too few or one is not 1 to 10."""
    scores = tuple(float(number) for number in _NUMBER.findall(reply)[-expected:])
    if len(scores) < expected or not all(1 <= score <= 10 for score in scores):
        return None
    return scores


def reminder(expected: int) -> Message:
    """Return the reminder to a judge whose reply held no scores."""
    example = " ".join(["[[5]]"] * expected)
    return {"role": "user", "content": f"Your reply holds no verdict in the format asked for. Write only: {example}"}
