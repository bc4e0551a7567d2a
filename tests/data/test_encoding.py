from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedloom.data import Rows, byte_tokenizer, encode, load_rows, load_tokenizer, read_records, render, resolve_template
from fedloom.errors import DataError

TOKENIZER = byte_tokenizer()
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # writes only the last answer in full, as templates that hide earlier reasoning do
    "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last or m['role'] == 'user' else '') + ';' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows(rows, ("a.json",), np.zeros(len(rows), np.int64), np.arange(1, len(rows) + 1))


def qa(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


def dialogue(*turns: str) -> dict[str, list[dict[str, str]]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": names[turn[0]], "content": turn[2:]} for turn in turns]}


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def learned(rows: Rows, tokenizer: PreTrainedTokenizerFast = TOKENIZER, **settings: Any) -> list[str]:
    tokens = encode(read_records(rows), tokenizer, **settings).tokens
    return [tokenizer.decode(ids[mask]) for ids, mask in map(tokens.row, range(len(tokens)))]


def test_the_answer_and_its_end_are_learned() -> None:
    assert learned(rows_of(qa("a?", "b"), qa("é?", "é€"))) == [" b\x00", " é€\x00"]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip))
def test_an_answer_that_repeats_the_wording_of_the_prompt_is_learned_whole(text: str) -> None:
    answer = f"Answer: {text} Question:"
    assert learned(rows_of(qa(f"Answer: {text}", answer))) == [f" {answer}\x00"]


def test_on_everything_all_but_the_first_token_is_learned() -> None:
    tokens = encode(read_records(rows_of(qa("a?", "b"))), TOKENIZER, loss_on="all").tokens
    assert tokens.supervised.tolist() == [False] + [True] * (tokens.num_tokens - 1)


def test_every_answer_of_a_dialogue_is_learned_with_its_end() -> None:
    rows = rows_of(dialogue("s:S", "u:hi", "a:one", "u:more", "a:two"))
    assert learned(rows) == [" one\x00 two\x00"]


def test_a_chat_template_closes_its_own_turns() -> None:
    rows = rows_of(dialogue("s:S", "u:hi", "a:one", "u:more", "a:two"))
    tokenizer = chat_tokenizer(CHATML)
    assert learned(rows, tokenizer) == ["one<|im_end|>two<|im_end|>"]
    ids, _ = encode(read_records(rows), tokenizer).tokens.row(0)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n")


def test_a_prompt_can_be_written_with_the_chat_template() -> None:
    assert learned(rows_of(qa("a?", "b")), chat_tokenizer(CHATML), template="chat") == ["b<|im_end|>"]


def test_turns_after_the_last_answer_are_left_out_and_counted() -> None:
    encoded = encode(read_records(rows_of(dialogue("u:hi", "a:one", "u:more"))), TOKENIZER)
    assert encoded.counts.num_turns_after_last_answer == 1
    assert "more" not in TOKENIZER.decode(encoded.tokens.input_ids)


def test_answers_whose_earlier_turns_a_chat_template_rewrites_are_learned_each_as_the_last_of_its_own() -> None:
    rows = rows_of(dialogue("u:hi", "a:one", "u:more", "a:two"))
    tokenizer = chat_tokenizer(FORGETFUL)
    encoded = encode(read_records(rows), tokenizer)
    assert encoded.kept.tolist() == [0, 0]
    assert encoded.counts.num_rows == encoded.counts.num_answers_apart == 2
    assert "2 answers learned each in a row of its own" in encoded.counts.told
    first = encode(read_records(rows_of(dialogue("u:hi", "a:one"))), tokenizer).tokens.row(0)
    assert encoded.tokens.row(0)[0].tolist() == first[0].tolist()
    assert encoded.tokens.row(0)[1].tolist() == first[1].tolist()


@pytest.mark.parametrize(
    "program",
    [
        "1 + messages",
        "messages / 0",
        "messages.x.y",
        "1 / 0",
        "messages[0]['content'] % messages",
        "range(999999) | list",
    ],
)
def test_whatever_a_chat_template_raises_is_one_line_that_names_the_row(program: str) -> None:
    tokenizer = chat_tokenizer("{{ " + program + " }}")
    with pytest.raises(DataError, match=r"a.json row 1: expected turns that the tokenizer's chat template accepts"):
        encode(read_records(rows_of(dialogue("u:%d", "a:b"))), tokenizer)


def test_a_chat_template_that_writes_no_answer_is_one_line() -> None:
    with pytest.raises(DataError, match=r"a.json row 1: turn 2: expected a chat template that writes the answer"):
        encode(read_records(rows_of(dialogue("u:q", "a:b"))), chat_tokenizer("constant"))


def test_a_chat_template_that_refuses_the_turns_is_named() -> None:
    refusing = chat_tokenizer("{{ raise_exception('no system turn') }}")
    with pytest.raises(DataError, match=r"a.json row 1: .*no system turn"):
        encode(read_records(rows_of(dialogue("s:S", "a:b"))), refusing)


def test_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(DataError, match="expected a tokenizer with a chat template for 'chat'"):
        encode(read_records(rows_of(qa("a", "b"))), TOKENIZER, template="chat")


@pytest.mark.parametrize("row", [qa("a", " "), qa("a", "")])
def test_a_row_without_answer_is_refused_by_name(row: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"a.json row 2: expected an answer, found none"):
        encode(read_records(rows_of(qa("a", "b"), row)), TOKENIZER)


@pytest.mark.parametrize("row", [dialogue("u:a"), dialogue("u:a", "a: ", "u:b", "a:c")])
def test_a_dialogue_without_answer_is_refused_by_name(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"a.json row 1: expected an answer"):
        encode(read_records(rows_of(row)), TOKENIZER)


def test_rows_without_answer_can_be_dropped_and_are_counted() -> None:
    encoded = encode(read_records(rows_of(qa("a", ""), qa("a", "b"))), TOKENIZER, unanswered="drop")
    assert (encoded.counts.num_unanswered, encoded.kept.tolist()) == (1, [1])


def test_the_tokenizer_s_beginning_of_text_comes_first_and_is_not_learned() -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="\x00 $A \x00", special_tokens=[("\x00", 0)]
    )
    ids, mask = encode(read_records(rows_of(qa("a?", "b"))), tokenizer).tokens.row(0)
    assert bytes(ids.tolist()) == b"\x00Question: a?\nAnswer: b\x00"
    assert mask.tolist() == [False] * (len(ids) - 3) + [True] * 3


def test_a_token_across_either_border_of_an_answer_is_learned() -> None:
    from tokenizers import Tokenizer, models

    letters = {letter: number for number, letter in enumerate("U:Assitanrebxy \n")}
    vocabulary = {**letters, ": ": 50, "b\n": 51, "<end>": 52}
    bpe = models.BPE(vocab=vocabulary, merges=[(":", " "), ("b", "\n")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'User: x' if m['role'] == 'user' else 'Assistant:' + ' b\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    rows = read_records(rows_of(dialogue("u:x", "a:b", "u:x", "a:b")))
    ids, mask = encode(rows, tokenizer).tokens.row(0)
    assert tokenizer.convert_ids_to_tokens(ids[mask].tolist()) == [": ", "b\n", ": ", "b\n", "<end>"]


# "Question: q\nAnswer:" is 19 bytes, " b" and the end make 22.
LENGTHS = rows_of(qa("q", "b"), qa("q", "long answer"), qa("question that is very long", "b"))


def test_an_overlong_row_is_refused_with_its_length_and_the_setting() -> None:
    with pytest.raises(DataError, match=r"a.json row 2: 32 tokens, data.max_length is 22 \(2 of 3 rows .* up to 47\)"):
        encode(read_records(LENGTHS), TOKENIZER, max_length=22)


def test_overlong_rows_can_be_dropped_and_are_counted() -> None:
    encoded = encode(read_records(LENGTHS), TOKENIZER, max_length=22, overlong="drop")
    assert (encoded.kept.tolist(), encoded.counts.num_overlong_dropped) == ([0], 2)


def test_overlong_rows_can_be_cut_and_those_without_answer_left_are_dropped() -> None:
    encoded = encode(read_records(LENGTHS), TOKENIZER, max_length=22, overlong="truncate")
    counts = encoded.counts
    assert (encoded.kept.tolist(), encoded.tokens.lengths.tolist()) == ([0, 1], [22, 22])
    assert (counts.num_truncated, counts.num_answer_cut_off, counts.num_overlong_dropped) == (1, 1, 0)
    ids, mask = encoded.tokens.row(1)
    assert TOKENIZER.decode(ids[mask]) == " lo"
    assert counts.num_rows == counts.num_kept + counts.num_answer_cut_off


def test_no_row_left_is_refused() -> None:
    with pytest.raises(DataError, match="expected at least one usable row"):
        encode(read_records(LENGTHS), TOKENIZER, max_length=5, overlong="drop")


@pytest.mark.data
@pytest.mark.parametrize("name", ["models/stories3M", "tokenizers/gpt2", "bytes"])
def test_the_mask_is_what_a_slow_count_over_offsets_gives(data_dir: Path, name: str) -> None:
    tokenizer = load_tokenizer(name if name == "bytes" else data_dir / name)
    rows = load_rows(data_dir / "e2e" / "devset.csv").select(range(300))
    records = read_records(rows)
    encoded = encode(records, tokenizer)
    template = resolve_template("auto", records.shape, tokenizer)
    for index, record in enumerate(records.items):
        written = render(record, template, tokenizer)
        offsets = tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ids, mask = encoded.tokens.row(index)
        prefix = [False] * (len(ids) - len(offsets) - 1)
        assert mask.tolist() == [*prefix, *(stop > written.spans[0][0] for _, stop in offsets), True]
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.data
@pytest.mark.slow
def test_dolly_with_the_small_real_tokenizer_has_the_known_counts(data_dir: Path) -> None:
    tokenizer = load_tokenizer(data_dir / "models" / "stories3M")
    records = read_records(load_rows(data_dir / "instruct" / "dolly15k_10clients"))
    encoded = encode(records, tokenizer, max_length=512, overlong="drop")
    assert (encoded.counts.num_kept, encoded.counts.num_overlong_dropped) == (11_978, 2_953)
    assert encoded.tokens.input_ids[0] == tokenizer.bos_token_id
