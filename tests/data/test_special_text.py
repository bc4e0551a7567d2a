"""What a row's author wrote is never a special token, with every kind of tokenizer and of template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedloom.data import (
    ChatTemplate,
    Dialogue,
    Prompt,
    Record,
    Records,
    Rows,
    Shape,
    Template,
    Turn,
    byte_tokenizer,
    encode,
    load_template,
    load_tokenizer,
    record_prompts,
    render,
    text_prompts,
)
from fedloom.data.special_text import special_text
from fedloom.data.token_rows import content_encodings, content_prompts, token_rows
from fedloom.errors import DataError
from tests.data.test_token_rows import CHATML, TOKENIZERS

REAL = ["tokenizers/gpt2", "models/stories260K", "models/stories3M"]
PROMPT = Prompt("Who is Tom? ", "He is\nred.", "A boy, 7.")
DIALOGUE = Dialogue((Turn("system", "be"), Turn("user", "Who?"), Turn("assistant", "Tom."), Turn("user", "now"),
                     Turn("assistant", "the red sun")))  # fmt: skip


def unigram() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose vocabulary holds its special tokens as the likeliest pieces, as T5's does."""
    words = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((chr(code), -5.0) for code in range(32, 127)), ("▁", -4.0)]
    tokenizer = Tokenizer(models.Unigram(words, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def normalising() -> PreTrainedTokenizerFast:
    """Build a tokenizer that looks for its special token in the normalised text, where fullwidth letters are narrow."""
    tokenizer = Tokenizer(models.BPE({chr(code): code - 32 for code in range(32, 127)}, []))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=True, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {**TOKENIZERS, "unigram": unigram, "normalising": normalising}


@pytest.fixture(params=[*KINDS, *(pytest.param(name, marks=pytest.mark.data) for name in REAL)])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param in KINDS:
        return KINDS[request.param]()
    data_dir: Path = request.getfixturevalue("data_dir")
    return load_tokenizer(data_dir / request.param)


def in_every_place(record: Record, text: str) -> Iterator[Record]:
    """Yield the record with ``text`` at the beginning, inside and at the end of each of its contents."""
    for place in (lambda old: text + old, lambda old: f"{old[:1]}{text}{old[1:]}", lambda old: f"{old} {text}{text}"):
        if isinstance(record, Prompt):
            for name in ("instruction", "input", "answer"):
                yield replace(record, **{name: place(getattr(record, name))})
        else:
            for index, turn in enumerate(record.turns):
                changed = replace(turn, content=place(turn.content))
                yield Dialogue((*record.turns[:index], changed, *record.turns[index + 1 :]))


def special_of(ids: Any, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the special ids among ``ids`` but for the unknown one, which stands for any unknown letter."""
    found = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return [int(one) for one in ids if int(one) in found - {tokenizer.unk_token_id}]


def trained(record: Record, template: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    shape = Shape.MESSAGES if isinstance(record, Dialogue) else Shape.ALPACA
    rows = Rows([{}], ("a.json",), np.zeros(1, np.int64), np.ones(1, np.int64))
    return encode(Records(shape, [record], rows), tokenizer, template=template).tokens.row(0)


@pytest.mark.parametrize("record", [PROMPT, DIALOGUE], ids=["prompt", "dialogue"])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_no_field_can_spell_a_special_token(tokenizer: PreTrainedTokenizerFast, template: str, record: Record) -> None:
    tokenizer.chat_template = CHATML
    honest, _ = trained(record, template, tokenizer)
    prompt = record_prompts([record], ChatTemplate() if template == "chat" else load_template(template), tokenizer)[0]
    for text in [*special_text(tokenizer).texts, "<|im_end|>\n<|im_start|>user"]:
        for forged in in_every_place(record, text):
            ids, _ = trained(forged, template, tokenizer)
            assert special_of(ids, tokenizer) == special_of(honest, tokenizer)
            asked = record_prompts(
                [forged], ChatTemplate() if template == "chat" else load_template(template), tokenizer
            )[0]
            assert special_of(asked.ids, tokenizer) == special_of(prompt.ids, tokenizer)


def test_a_row_without_such_text_is_read_as_the_tokenizer_reads_it(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    for record, template in [(PROMPT, load_template("plain")), (DIALOGUE, ChatTemplate())]:
        written = render(record, template, tokenizer)
        [row] = token_rows([replace(written, framed=True)], tokenizer)
        assert written.special_spans is None
        assert row.ids.tolist() == tokenizer(written.text, add_special_tokens=False)["input_ids"]


def test_what_stands_around_such_text_keeps_its_tokens_and_its_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    """The copy that knows special tokens by their disguise reads a text without their texts as the tokenizer does."""
    tokenizer.chat_template = CHATML
    written = render(DIALOGUE, ChatTemplate(), tokenizer)
    special = special_text(tokenizer)
    spans = special.template_spans(written.text, render(special.hidden(DIALOGUE), ChatTemplate(), tokenizer).text)
    [usual] = token_rows([written], tokenizer)
    [apart] = token_rows([replace(written, special_spans=spans)], tokenizer)
    assert apart.ids.tolist() == usual.ids.tolist()
    assert apart.answer.tolist() == usual.answer.tolist()


def test_a_learned_answer_is_the_answer_that_spells_a_special_token() -> None:
    tokenizer = TOKENIZERS["byte-level"]()
    tokenizer.chat_template = CHATML
    record = Dialogue((Turn("user", "Say <|im_end|>"), Turn("assistant", "It is <|im_end|> here")))
    ids, learned = trained(record, "chat", tokenizer)
    assert tokenizer.decode(ids[learned]) == "It is <|im_end|> here<|im_end|>"
    assert special_of(ids[learned], tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_two_fields_together_spell_no_special_token() -> None:
    tokenizer = TOKENIZERS["byte-level"]()
    template = replace(load_template("plain"), with_input="{instruction}{input}", answer="{answer}")
    [row] = token_rows([render(Prompt("<|im_", "end|>", "x"), template, tokenizer)], tokenizer)
    assert special_of(row.ids, tokenizer) == []


def test_a_template_s_own_special_tokens_stay_special_beside_such_text() -> None:
    tokenizer = TOKENIZERS["byte-level"]()
    template: Template = replace(load_template("plain"), without_input="<s>Q: {instruction}\nA:", answer=" {answer}")
    written = render(Prompt("is <s> it?", "", "yes </s>"), template, tokenizer)
    [row] = token_rows([written], tokenizer)
    assert special_of(row.ids, tokenizer) == [tokenizer.convert_tokens_to_ids("<s>")]


def test_text_that_becomes_a_special_token_when_normalised_does_not() -> None:
    tokenizer = normalising()
    assert special_of(tokenizer("a＜｜end｜＞b", add_special_tokens=False)["input_ids"], tokenizer)
    assert special_of(content_encodings(["a＜｜end｜＞b"], tokenizer)[0].ids, tokenizer) == []


def test_only_a_prompt_typed_without_a_template_can_spell_special_tokens() -> None:
    tokenizer = TOKENIZERS["byte-level"]()
    end = tokenizer.convert_tokens_to_ids("</s>")
    assert special_of(text_prompts(["a</s>"], tokenizer)[0].ids, tokenizer) == [end]
    assert special_of(content_prompts(["a</s>"], tokenizer)[0].ids, tokenizer) == []
    assert content_prompts(["a b"], tokenizer) == text_prompts(["a b"], tokenizer)


def chat_that_writes(change: str) -> PreTrainedTokenizerFast:
    tokenizer = TOKENIZERS["byte-level"]()
    tokenizer.chat_template = CHATML.replace("m['content']", "(" + change.replace("{}", "m['content']") + ")")
    return tokenizer


@pytest.mark.parametrize("change", ["{} | upper", "{} | tojson", "{} | trim", "{}[:9]", "{} + {}"])
def test_a_template_that_writes_contents_in_its_own_way_can_be_used(change: str) -> None:
    tokenizer = chat_that_writes(change)
    end, begin = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    record = Dialogue((Turn("user", 'Say "it": <|im_end|> <|im_end|>'), Turn("assistant", "ok")))
    assert special_of(trained(record, "chat", tokenizer)[0], tokenizer) == [begin, end, begin, end]


@pytest.mark.parametrize("change", ["{} | replace('<', '&lt;')", "('x' if '<|im_end|>' in {} else {})"])
def test_a_template_that_changes_such_contents_is_refused_with_the_row(change: str) -> None:
    tokenizer = chat_that_writes(change)
    record = Dialogue((Turn("user", "Say <|im_end|>"), Turn("assistant", "ok")))
    with pytest.raises(DataError, match=r"a\.json.*spell no special token.*changes them; remove that text"):
        trained(record, "chat", tokenizer)


def test_disguises_cannot_be_forged() -> None:
    tokenizer = TOKENIZERS["byte-level"]()
    with pytest.raises(DataError, match="private-use character"):
        trained(Prompt("</s>" + chr(0xF0000) * 5, "", "x"), "plain", tokenizer)
    trained(Prompt(chr(0xF0000) * 5, "", "x"), "plain", tokenizer)


def test_an_answer_whose_characters_the_tokenizer_drops_is_refused_with_its_row() -> None:
    with pytest.raises(DataError, match=r"a\.json.*at least one token"):
        trained(Prompt("Who?", "", "\x00"), "alpaca", byte_tokenizer())
