from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data import byte_tokenizer, load_tokenizer
from fedloom.errors import ModelError

TOKENIZER = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_ids_of_the_byte_tokenizer_are_the_bytes(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_byte_tokenizer_has_256_ids_and_ends_with_zero() -> None:
    assert (len(TOKENIZER), TOKENIZER.eos_token_id, TOKENIZER.bos_token_id) == (256, 0, None)


def test_every_byte_of_a_character_stands_for_that_character() -> None:
    assert TOKENIZER("aé€", return_offsets_mapping=True)["offset_mapping"] == [(0, 1)] + [(1, 2)] * 2 + [(2, 3)] * 3


def test_a_name_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_config_alone_is_no_tokenizer(tmp_path: Path) -> None:
    """transformers makes an empty one of it for some families."""
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"got one without a vocabulary; set model.tokenizer"):
        load_tokenizer(tmp_path)


def test_an_end_of_text_that_no_file_names_is_found_in_the_vocabulary_or_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    for folder, word in (("usual", "<|endoftext|>"), ("unusual", "stop")):
        (tmp_path / folder).mkdir()
        Tokenizer(models.WordLevel({"a": 0, word: 1}, unk_token="a")).save(str(tmp_path / folder / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "usual").eos_token_id == 1
    with pytest.raises(ModelError, match="end-of-text"):
        load_tokenizer(tmp_path / "unusual")


def test_of_several_ends_that_config_names_the_first_is_the_end_of_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 1]}', encoding="utf-8")
    assert load_tokenizer(tmp_path).eos_token_id == 2


@pytest.mark.data
def test_plain_gpt2_files_get_their_end_of_text(data_dir: Path) -> None:
    assert load_tokenizer(data_dir / "tokenizers" / "gpt2").eos_token_id == 50_256


@pytest.mark.extra("sentencepiece")
@pytest.mark.filterwarnings("ignore")
def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path: Path, data_dir: Path) -> None:
    import sentencepiece

    model = tmp_path / "tokenizer.model"
    model.write_bytes((data_dir / "tokenizers" / "llama" / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    text = "The weaver\u2019s loom, 42 threads: na\u00efve caf\u00e9."
    ours = load_tokenizer(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert ours == sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)
