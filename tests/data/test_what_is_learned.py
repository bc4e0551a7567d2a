"""What a row says beside its answer and changes what is learned: system prompts, history, weights, tools, parts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fedloom.data import (
    ChatTemplate,
    Division,
    Prompt,
    Rows,
    Scheme,
    answer_frame,
    byte_tokenizer,
    divide,
    encode,
    load_template,
    read_records,
    record_prompts,
    render,
)
from fedloom.data.holdout import HoldOut, with_units
from fedloom.errors import DataError
from tests.chat_families import FAMILIES, QWEN3, ChatFamily

TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}
CALLED = [
    {"role": "user", "content": "Sun?"},
    CALL,
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "content": "Yes."},
]


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows(rows, ("a.json",), np.zeros(len(rows), np.int64), np.arange(1, len(rows) + 1))


def read(*rows: dict[str, Any], template: Any = "auto", tokenizer: Any = None) -> tuple[str, list[str]]:
    """Return what the model reads of all rows, and the stretches that it learns."""
    tokenizer = tokenizer or byte_tokenizer()
    tokens = encode(read_records(rows_of(*rows)), tokenizer, template=template).tokens
    texts, stretches = [], []
    for ids, learned in (tokens.row(index) for index in range(len(tokens))):
        texts.append(tokenizer.decode(ids.tolist()))
        edges = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(int), [0]])))
        stretches += [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return "".join(texts), stretches


@pytest.mark.parametrize(
    ("asked", "answer"),
    [("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("question", "answer")],
)
def test_a_system_prompt_and_history_in_columns_are_read_before_what_is_asked(asked: str, answer: str) -> None:
    row = {asked: "And the second?", answer: "Two.", "system": "One word.", "history": [["The first?", "One."]]}
    text, learned = read(row)
    places = [text.index(part) for part in ("One word.", "The first?", "One.", "And the second?", "Two.")]
    assert places == sorted(places)
    assert [one.strip("\x00 ") for one in learned] == ["One.", "Two."]
    renamed = {**{key: row[key] for key in (asked, answer, "history")}, "rules": "One word."}
    shape = str(read_records(rows_of(row)).shape)
    assert read_records(rows_of(renamed), shape, {"system": "rules"}).items == read_records(rows_of(row)).items


def test_empty_columns_leave_a_prompt_as_it_was() -> None:
    bare = {"instruction": "Who?", "input": "", "output": "Tom."}
    for nothing in ({"system": "", "history": []}, {"system": None, "history": None}, {"history": float("nan")}):
        assert read_records(rows_of({**bare, **nothing})).items == [Prompt("Who?", "", "Tom.")]
    taken = {"question": "Who?", "answer": "Tom.", "system": "sys"}
    columns = {"question": "system"}
    assert read_records(rows_of(taken), "question-answer", columns).items == [Prompt("sys", "", "Tom.")]


def test_a_history_or_system_that_cannot_be_read_is_refused_by_name() -> None:
    for wrong in ("earlier", [["one"]], [["a", "b", "c"]], 3):
        with pytest.raises(
            DataError, match=r"a\.json row 1: column 'history': expected a list of \[question, answer\]"
        ):
            read_records(rows_of({"instruction": "x", "output": "y", "history": wrong}))
    twice = {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "q"}], "system": "b"}
    with pytest.raises(DataError, match="expected one system prompt, got one in the column 'system' and another"):
        read_records(rows_of(twice))


def test_the_system_column_of_sharegpt_is_the_first_turn() -> None:
    turns = [{"from": "human", "value": "Gold?"}, {"from": "gpt", "value": "Arr!"}]
    text, _ = read({"conversations": turns, "system": "You are a pirate."})
    assert text.startswith("You are a pirate.")
    assert read({"conversations": [{"from": "system", "value": "You are a pirate."}, *turns]})[0] == text


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_turn_of_weight_0_is_shown_and_not_learned(template: str) -> None:
    turns = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "right", "weight": 1},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "late", "weight": 0},
    ]
    tokenizer = FAMILIES["chatml on a base"].tokenizer()
    text, learned = read({"messages": turns}, template=template, tokenizer=tokenizer)
    assert "wrong" in text
    assert "late" not in text
    assert len(learned) == 1
    assert "right" in learned[0]
    records = read_records(rows_of({"messages": turns}))
    [prompt] = record_prompts(
        records.items, ChatTemplate() if template == "chat" else load_template(template), tokenizer
    )
    assert "two?" in prompt.text
    assert "right" not in prompt.text
    with pytest.raises(DataError, match="expected an answer, found none"):
        read({"messages": turns[:2]})
    with pytest.raises(DataError, match=r"turn 1: 'weight': expected 0 \(not learned\) or 1, got 0.5"):
        read({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]})


def test_content_in_parts_is_their_text_and_a_picture_is_refused() -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]
    whole = {"messages": [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "Tom."}]}
    split = {"messages": [{"role": "user", "content": parts}, whole["messages"][1]]}
    assert read(split) == read(whole)
    parts[1] = {"type": "image_url", "image_url": "x"}
    with pytest.raises(DataError, match="turn 1: 'content': expected parts of text, got image_url"):
        read(split)


def test_tools_calls_and_their_answers_are_written_as_the_chat_template_writes_them() -> None:
    tokenizer = ChatFamily(TOOLS, MARKS).tokenizer()
    text, learned = read({"messages": CALLED, "tools": [WEATHER]}, tokenizer=tokenizer)
    assert '"name": "weather"' in text
    assert learned == ['<call>weather {"city": "Rome"}</call><|im_end|>', "Yes.<|im_end|>"]
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Sun?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "yes"},
            {"from": "gpt", "value": "Yes."},
        ],
        "tools": json.dumps([WEATHER]),
    }
    assert read(sharegpt, tokenizer=tokenizer) == (text, learned)


def test_reasoning_is_learned_where_the_template_writes_it() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Sun?"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "It shines."},
        ]
    }
    assert read(row, tokenizer=ChatFamily(TOOLS, MARKS).tokenizer())[1] == ["<think>It shines.</think>Yes.<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"messages": CALLED}, "tool_calls of turn 2"),
        ({"messages": [CALLED[0], CALLED[3]], "tools": [WEATHER]}, "tools"),
        ({"messages": [CALLED[0], {**CALLED[3], "reasoning_content": "hm"}]}, "reasoning_content of turn 2"),
    ],
)
def test_what_a_template_leaves_out_is_refused_and_so_is_what_a_file_has_no_words_for(
    row: dict[str, Any], lost: str
) -> None:
    tokenizer = FAMILIES["chatml on a base"].tokenizer()
    with pytest.raises(DataError, match=rf"a\.json row 1: expected a chat template that writes the row's {lost}"):
        read(row, tokenizer=tokenizer)
    with pytest.raises(DataError, match=rf"template plain, which has no words for {lost.partition(' ')[0]}"):
        read(row, template="plain")


def test_no_tool_and_no_call_can_spell_a_special_token() -> None:
    tokenizer = ChatFamily(TOOLS, MARKS).tokenizer()
    forged = {"type": "function", "function": {"name": "x", "description": "<|im_end|>"}}
    with pytest.raises(DataError, match=r"tools and calls that spell no special token, got '<\|im_end\|>'"):
        read({"messages": CALLED, "tools": [forged]}, tokenizer=tokenizer)


@pytest.mark.parametrize("wrong", ["not json", [3], {"function": {}}])
def test_calls_that_are_none_are_refused_by_turn(wrong: Any) -> None:
    calls = (
        wrong
        if isinstance(wrong, list)
        else [{"function": {"name": "x", "arguments": wrong}}]
        if isinstance(wrong, str)
        else [wrong]
    )
    with pytest.raises(DataError, match=r"turn 1: '(tool_calls|arguments' of a call)"):
        read_records(rows_of({"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]}))


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_dialogues_are_learned_answer_by_answer_where_the_template_treats_the_last_one_differently(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    turns = [
        {"role": role, "content": content}
        for role, content in (("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two"))
    ]
    both = rows_of({"messages": turns})
    encoded = encode(read_records(both), tokenizer)
    assert encoded.kept.tolist() == [0, 0]
    for index, position in enumerate((1, 3)):
        ids, learned = encoded.tokens.row(index)
        alone = render(read_records(both).items[0].up_to(position), ChatTemplate(), tokenizer)
        assert tokenizer.decode(ids.tolist()).startswith(alone.text.rstrip("\n"))
        said = tokenizer.decode(ids[learned].tolist(), skip_special_tokens=True)
        assert said.removeprefix("<think>\n\n</think>\n\n").strip() == turns[position]["content"]
    [prompt] = record_prompts(read_records(both).items, ChatTemplate(), tokenizer)
    last, learned = encoded.tokens.row(1)
    assert list(prompt.ids) == last[: int(learned.argmax())].tolist()
    assert (family == "qwen3") == (
        "think" in answer_frame(read_records(both).items[0], ChatTemplate(), tokenizer).before
    )


def test_the_rows_of_a_dialogue_stay_together() -> None:
    tokenizer = ChatFamily(QWEN3, MARKS).tokenizer()
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = rows_of(*({"messages": turns * (1 + k % 3)} for k in range(9)))
    encoded = encode(read_records(rows), tokenizer)
    parts = rows.select(encoded.kept)
    assert len(parts) == 18
    assert len(parts.distinct()) == 9
    assert rows.distinct() is rows
    partition = divide(Division(Scheme.IID, 3), parts, encoded.tokens, seed=1)
    owner = partition.owner_of_row()
    for unit in range(9):
        assert len(set(owner[parts.units == unit])) == 1
    assert partition.num_rows == 18
    split = with_units(HoldOut(np.arange(1, 9), np.array([0, 2])), parts.units)
    assert split.held.tolist() == [0, 3, 4, 5]
