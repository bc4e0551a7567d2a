from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.data import Dialogue, Prompt, Turn, load_template, shipped_templates
from fedloom.errors import DataError

PROMPT = Prompt("Do {this}", "with that", "an answer {x}")
DIALOGUE = Dialogue(
    (Turn("system", "S"), Turn("user", "U"), Turn("assistant", "A"), Turn("user", "V"), Turn("assistant", "B"))
)


def test_alpaca_has_the_published_wording() -> None:
    rendered = load_template("alpaca").render(PROMPT)
    assert rendered.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo {this}\n\n### Input:\nwith that\n\n### Response:\nan answer {x}"
    )
    assert load_template("alpaca").render(Prompt("i", "", "o")).prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\ni\n\n### Response:\n"
    )


@pytest.mark.parametrize("name", shipped_templates())
def test_the_span_of_a_prompt_is_its_answer(name: str) -> None:
    rendered = load_template(name).render(PROMPT)
    (start, stop), prompt = rendered.spans[0], rendered.prompt
    assert rendered.text[start:stop].strip() == PROMPT.answer
    assert prompt + rendered.text[start:stop] == rendered.text


@pytest.mark.parametrize("name", shipped_templates())
def test_the_spans_of_a_dialogue_are_its_answers_with_their_ends(name: str) -> None:
    rendered = load_template(name).render(DIALOGUE, "<end>")
    answers = [rendered.text[start:stop].strip() for start, stop in rendered.spans]
    assert answers == ["A<end>", "B"]
    assert rendered.text.index("S") < rendered.text.index("U") < rendered.spans[0][0]


OWN = """
with_input = "{instruction}/{input}="
without_input = "{instruction}="
answer = "{answer}"
[dialogue]
system = "{content}"
user = "{content}"
tool = "{content}"
assistant = "="
answer = "{answer}"
separator = ";"
"""


def test_an_own_template_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN, encoding="utf-8")
    assert load_template(tmp_path / "own.toml").render(Prompt("i", "x", "o")).text == "i/x=o"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('separator = ";"', "", r"\[dialogue\]: expected the entries .*; add separator"),
        ('"{instruction}="', '"{question}="', r"entry without_input: expected {instruction}, got {question}"),
        ('"{instruction}="', '"{instruction="', "entry without_input: .* plain braces"),
        ('separator = ";"', "separator = 3", "entry separator: expected text, got int"),
        ('separator = ";"', "separator", "expected TOML"),
    ],
)
def test_a_malformed_template_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "own.toml").write_text(OWN.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_template(tmp_path / "own.toml")


def test_an_unknown_template_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="expected one of auto, chat, alpaca, e2e, plain, or a TOML file, got 'vicuna'"):
        load_template("vicuna")
