"""What the embedded base reads: nothing that is held out, and of the unseen categories prose alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedloom import embedded

SCRIPTS = Path(__file__).parents[2] / "scripts"
WRITE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from embedded import corpus, prose
held_out = corpus.shipped_rows(1)[1]
json.dump({
    "instructions": corpus.instruction_text(4000, 1, held_out),
    "prose": corpus.prose_text(20000, 1, held_out),
    "held_out": [corpus.prompt_and_answer(row)[0] for row in held_out],
    "contents": [(prose.content(row), row.response) for row in held_out if row.category in prose.RETOLD],
    "retold": corpus.retold(1, held_out),
}, sys.stdout)
"""

Text = dict[str, Any]


@pytest.fixture(scope="module")
def text() -> Text:
    written = subprocess.run(
        [sys.executable, "-c", WRITE, str(SCRIPTS)], check=True, capture_output=True, encoding="utf-8"
    )
    return json.loads(written.stdout)


def test_no_held_out_question_is_in_the_text(text: Text) -> None:
    assert len(text["held_out"]) == len(embedded.eval_path().read_text("utf-8").splitlines())
    assert not {prompt for prompt, _ in text["instructions"]} & set(text["held_out"])


def test_no_sentence_has_the_form_of_a_question_and_its_answer(text: Text) -> None:
    sentences = [given + told for given, told in text["prose"]]
    assert not [one for one in sentences if "Question" in one or "Answer" in one or "?" in one]


def test_no_sentence_tells_what_a_held_out_translation_reversal_or_sorting_asks(
    text: Text,
) -> None:
    barred: dict[str, list[str]] = {}
    for content, response in text["contents"]:
        barred.setdefault(f" {response}.", []).append(content)

    def tells_one(given: str, told: str) -> bool:
        return any(content in given for content in barred.get(told, []))

    measured = [pair for kind in ("translation", "reversal", "sorting") for pair in text["retold"][kind]]
    assert len(measured) == 3 * 40
    assert all(tells_one(given, told) for given, told in measured)
    assert not any(tells_one(given, told) for given, told in text["prose"])
