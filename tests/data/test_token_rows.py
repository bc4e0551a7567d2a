"""A prompt is read as training reads it: for every kind of template, with every kind of tokenizer."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedloom.data import (
    ChatTemplate,
    Dialogue,
    Prompt,
    Record,
    Records,
    Rows,
    Shape,
    Turn,
    byte_tokenizer,
    encode,
    load_template,
    load_tokenizer,
    record_prompts,
    resolve_template,
    shipped_templates,
    text_prompts,
)
from fedloom.data.token_rows import prefix_ids
from fedloom.errors import DataError

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = {
    "writes no beginning": CHATML,
    "writes the beginning": "{{ bos_token }}" + CHATML,
    "no cue": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
    ),
    "a cue that ends in a blank": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}
FILES = {
    "plain words": ("Q: {instruction} {input}\nA:", " {answer}", "A:"),
    "ends in a blank": ("Q: {instruction} {input}\nA: ", "{answer}", "A: "),
    "spells the beginning": ("<s>Q: {instruction} {input}\nA:", " {answer}", "A:"),
}
RECORDS: list[Record] = [
    Prompt("Who is Tom?", "", "A boy."),
    Prompt("Who is it?", "Tom is red.", "It is 7 o'clock."),
    Dialogue((Turn("user", "hi"), Turn("assistant", "Yes, Tom."))),
    Dialogue(
        (Turn("user", "hi"), Turn("assistant", "Yes, Tom."), Turn("user", "Who?"), Turn("assistant", "the red sun"))
    ),
]


def byte_level(beginning: bool, end: bool = False) -> PreTrainedTokenizerFast:
    """Build a tokenizer like GPT-2's: a blank belongs to the word after it."""
    tokenizer = letters_after("Ġ", sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, beginning, end)


def metaspace(beginning: bool) -> PreTrainedTokenizerFast:
    """Build a tokenizer like Llama 2's: a mark for the blank, put before the first word too."""
    tokenizer = letters_after("▁", ["▁", *string.printable])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer, beginning)


def letters_after(blank: str, alphabet: list[str]) -> Tokenizer:
    """Build a tokenizer of single characters that joins a blank with the letter or digit after it."""
    joined = [(blank, letter) for letter in string.ascii_letters + string.digits]
    words = [*SPECIAL, *alphabet, *map("".join, joined)]
    return Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, joined, unk_token="<unk>"))


def wrapped(tokenizer: Tokenizer, beginning: bool, end: bool = False) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    if beginning or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if beginning else ''}$A{' </s>' if end else ''}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[3:]
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": byte_tokenizer,
    "byte-level": lambda: byte_level(beginning=False),
    "byte-level, beginning": lambda: byte_level(beginning=True),
    "byte-level, beginning and end": lambda: byte_level(beginning=True, end=True),
    "metaspace": lambda: metaspace(beginning=False),
    "metaspace, beginning": lambda: metaspace(beginning=True),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def trained_prompt(record: Record, template: str | Path, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that training reads before the last answer's first token."""
    rows = Rows([{}], ("a.json",), np.zeros(1, np.int64), np.ones(1, np.int64))
    shape = Shape.MESSAGES if isinstance(record, Dialogue) else Shape.ALPACA
    ids, learned = encode(Records(shape, [record], rows), tokenizer, template=template).tokens.row(0)
    unlearned = np.flatnonzero(~learned)
    return [int(i) for i in ids[: unlearned[-1] + 1]]


def check(record: Record, template: str | Path, tokenizer: PreTrainedTokenizerFast) -> None:
    shape = Shape.MESSAGES if isinstance(record, Dialogue) else Shape.ALPACA
    chosen = resolve_template(template, shape, tokenizer)
    [found] = record_prompts([record], chosen, tokenizer)
    assert list(found.ids) == trained_prompt(record, template, tokenizer)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("template", shipped_templates())
def test_a_shipped_template_asks_as_it_trains(
    record: Record, template: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    check(record, template, tokenizer)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("kind", FILES)
def test_a_template_file_asks_as_it_trains(
    record: Record, kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    check(record, template_file(tmp_path, kind), tokenizer)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_template_asks_as_it_trains(record: Record, kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATS[kind]
    check(record, "chat", tokenizer)


def template_file(folder: Path, kind: str) -> Path:
    asked, answer, cue = FILES[kind]
    file = folder / "own.toml"
    file.write_text(
        f"with_input = {asked!r}\nwithout_input = {asked.replace('{input}', '')!r}\nanswer = {answer!r}\n".replace(
            "'", '"'
        )
        + "[dialogue]\nsystem = '{content}'\nuser = 'Q: {content} '\ntool = '{content}'\n"
        + f"assistant = '{cue}'\nanswer = '{answer}'\nseparator = ' '\n"
    )
    return file


def test_a_beginning_that_the_text_spells_is_not_put_there_again(tmp_path: Path) -> None:
    tokenizer = byte_level(beginning=True)
    template = template_file(tmp_path, "spells the beginning")
    for ids in (
        trained_prompt(RECORDS[0], template, tokenizer),
        list(record_prompts([RECORDS[0]], load_template(template), tokenizer)[0].ids),
        list(text_prompts(["<s>Q"], tokenizer)[0].ids),
    ):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_chat_template_brings_its_beginning_or_has_none() -> None:
    tokenizer = byte_level(beginning=True)
    begins = {}
    for kind in ("writes no beginning", "writes the beginning"):
        tokenizer.chat_template = CHATS[kind]
        [prompt] = record_prompts([RECORDS[0]], ChatTemplate(), tokenizer)
        begins[kind] = prompt.ids.count(tokenizer.bos_token_id)
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Who is Tom?"}], add_generation_prompt=True, return_dict=False
        )
        assert list(prompt.ids) == list(asked)
    assert begins == {"writes no beginning": 0, "writes the beginning": 1}


def test_a_text_as_typed_begins_with_what_the_tokenizer_puts_first() -> None:
    with_beginning, without = byte_level(beginning=True), byte_level(beginning=False)
    assert text_prompts(["hi"], with_beginning)[0].ids == (1, *text_prompts(["hi"], without)[0].ids)
    assert text_prompts(["hi"], byte_level(beginning=True, end=True))[0].ids[-1] != 2
    assert text_prompts([], without) == []


def test_what_a_record_answers_does_not_reach_its_prompt() -> None:
    tokenizer, plain = byte_level(beginning=False), load_template("plain")
    texts = {record_prompts([Prompt("Who?", "", answer)], plain, tokenizer)[0] for answer in ("", "Tom", "?!", "\n\n")}
    assert len(texts) == 1


def test_a_chat_template_that_asks_in_other_words_than_it_answers_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]:{% endif %}"
    )
    wanted = r"asks for an answer with '\[assistant\]:', but writes one as '\[assistant\] a"
    with pytest.raises(DataError, match=wanted):
        record_prompts([RECORDS[2]], ChatTemplate(), tokenizer)


@pytest.mark.data
@pytest.mark.parametrize("name", ["tokenizers/gpt2", "models/stories260K"])
@pytest.mark.parametrize("template", [*shipped_templates(), *list(CHATS)[:3]])  # 512 tokens join few blanks
def test_real_tokenizers_ask_as_they_train(data_dir: Path, name: str, template: str) -> None:
    tokenizer = load_tokenizer(data_dir / name)
    if template in CHATS:
        tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
        tokenizer.chat_template, template = CHATS[template], "chat"
    for record in RECORDS:
        check(record, template, tokenizer)
    assert prefix_ids(tokenizer) == ([] if "gpt2" in name else [1])
