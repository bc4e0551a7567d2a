"""Where a text begins and an answer ends, for tokenizers and templates of several families."""

from __future__ import annotations

import numpy as np
import pytest

from fedloom.data import (
    ChatTemplate,
    Dialogue,
    Prompt,
    Records,
    Rows,
    Shape,
    Turn,
    answer_frame,
    byte_tokenizer,
    encode,
    load_template,
    plain_frame,
    record_prompts,
)
from fedloom.data.answer_frame import special_ids
from tests.chat_families import FAMILIES, ChatFamily

ASKED = Dialogue((Turn("user", "Who?"), Turn("assistant", "A boy.")))
CHAT = ChatTemplate()
STOP = {
    "gemma": "<end_of_turn>",
    "phi3": "\x00",
    "chatml on a base": "<|im_end|>",
    "chatml that ends the text": "<|im_end|>",
    "llama 3": "<|eot_id|>",
    "llama 2": "</s>",
    "qwen3": "<|im_end|>",
    "chatml whose marks are not special": "\x00",
    "chatml in letters": "\x00",
}


def trained_row(tokenizer: object, template: object = CHAT) -> tuple[list[int], list[bool]]:
    rows = Rows([{}], ("rows",), np.zeros(1, np.int64), np.ones(1, np.int64))
    encoded = encode(Records(Shape.MESSAGES, [ASKED], rows), tokenizer, template=template)
    ids, learned = encoded.tokens.row(0)
    return ids.tolist(), learned.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_closes_the_trained_row_stops_decoding_and_the_answer_is_what_was_asked_for(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    frame = answer_frame(ASKED, CHAT, tokenizer)
    ids, learned = trained_row(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == STOP[family]
    assert ids[-1] in frame.stop_ids
    assert family != "phi3" or tokenizer.convert_tokens_to_ids("<|end|>") in frame.stop_ids
    answer = [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]
    ran_on = [*answer, *tokenizer("and on", add_special_tokens=False)["input_ids"]]
    assert frame.answer(ran_on, tokenizer) == ("A boy.", False)
    assert frame.answer(answer[:3], tokenizer)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_around_an_answer_are_counted(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    _, learned = trained_row(tokenizer)
    around = sum(learned) - len(tokenizer("A boy.", add_special_tokens=False)["input_ids"])
    # A blank before the answer is no word of the template's: it belongs to the answer's first word.
    assert answer_frame(ASKED, CHAT, tokenizer).num_tokens == around - (family == "llama 2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_begins_once_in_training_and_when_asked(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    ids, learned = trained_row(tokenizer)
    [prompt] = record_prompts([ASKED], CHAT, tokenizer)
    assert list(prompt.ids) == ids[: learned.index(True)]
    begins = tokenizer.bos_token_id
    assert begins is None or (prompt.ids[0] == begins and prompt.ids.count(begins) == 1)


def test_the_tokens_that_the_base_names_stop_too_where_they_are_of_this_tokenizer() -> None:
    tokenizer = FAMILIES["phi3"].tokenizer()
    user, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|end|>"))
    assert plain_frame(tokenizer, [user, 65]).stop_ids == (0, user)
    assert set(answer_frame(ASKED, CHAT, tokenizer, [user, 9999]).stop_ids) == {0, user, end}


def test_words_that_a_template_file_writes_after_an_answer_are_none_of_it() -> None:
    tokenizer, plain = byte_tokenizer(), load_template("plain")
    framed = plain.__class__(plain.name, plain.with_input, plain.without_input, " {answer} ###", plain.dialogue)
    asked = Prompt("Who?", "", "A boy.")
    frame = answer_frame(asked, framed, tokenizer)
    assert frame.answer([*b" A boy. ###", 0, 65], tokenizer) == ("A boy.", False)
    assert frame.num_tokens == len(" ###") + 1
    assert answer_frame(asked, plain, tokenizer) == plain_frame(tokenizer)
    assert plain_frame(tokenizer).tag == "" != frame.tag


def test_a_row_that_ends_in_an_unknown_character_is_closed_by_the_end_of_text() -> None:
    tokenizer = ChatFamily("", ("<unk>",)).tokenizer()
    tokenizer.unk_token = "<unk>"
    template = load_template("plain")
    shown = Records(Shape.MESSAGES, [ASKED], Rows([{}], ("rows",), np.zeros(1, np.int64), np.ones(1, np.int64)))
    row = encode(shown, tokenizer, template=template).tokens.row(0)[0]
    assert tokenizer.unk_token_id in special_ids(tokenizer)
    assert int(row[-1]) == tokenizer.eos_token_id
