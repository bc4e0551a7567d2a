"""A base folder is what its configuration and weights say: whatever else would act by itself is refused by name."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from fedloom.config import Settings
from fedloom.data.encoding import encode
from fedloom.data.records import read_records
from fedloom.data.sources import load_rows
from fedloom.data.templates import load_template
from fedloom.data.token_rows import text_prompts
from fedloom.data.tokenizer import byte_tokenizer, load_tokenizer, pad_id
from fedloom.errors import DataError, ModelError
from fedloom.models.load import load_base
from fedloom.models.partial_load import load_bottom
from fedloom.preview.description import describe
from fedloom.preview.diagnosis import diagnose
from fedloom.preview.rehearsal import Verdict

Make = Callable[..., Settings]


def tiny_llama(vocab_size: int = 256) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a tiny Llama of bytes, with a tokenizer."""
    path = tmp_path / "base"
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("names", [("adapter_config.json", "adapter_model.safetensors"), ("adapter_config.json",)])
def test_an_adapter_next_to_the_weights_is_refused_by_name(
    folder: Path, names: tuple[str, ...], settings_for: Make
) -> None:
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "apart")
    for name in names:
        (folder / "apart" / name).rename(folder / name)
    told = rf"also holds an adapter \({', '.join(names)}\), .*; take these files"
    settings = settings_for(model__base=str(folder))
    for load in (lambda: load_base(folder), lambda: load_bottom(folder, 1), lambda: describe(settings)):
        with pytest.raises(ModelError, match=told):
            load()
    assert not diagnose("mine", settings).would_run


def test_an_adapter_alone_is_no_base(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds an adapter .*; name the base that it was trained on"):
        load_base(tmp_path)


OWN_CODE = {
    "config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}},
    "tokenizer_config.json": {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.T", None]}},
}


@pytest.mark.parametrize("file", sorted(OWN_CODE))
def test_code_in_the_folder_never_runs_and_nothing_is_asked(
    folder: Path, file: str, monkeypatch: pytest.MonkeyPatch, settings_for: Make
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr(builtins, "input", asked)
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    edit(folder / file, **OWN_CODE[file])
    settings = settings_for(model__base=str(folder), model__tokenizer=None)
    for load in (lambda: load_base(folder), lambda: load_tokenizer(folder), lambda: describe(settings)):
        try:
            load()
        except ModelError as refusal:
            assert "Python code of its own" in str(refusal)  # noqa: PT017
    assert not diagnose("mine", settings).would_run
    with pytest.raises(ModelError, match=r"Python code of its own .*model\.trust_remote_code"):
        load_base(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_of_the_hub_in_the_configuration_is_code(folder: Path, key: str) -> None:
    edit(folder / "config.json", **{key: "someone/kernel"})
    with pytest.raises(ModelError, match=r"the kernel someone/kernel in its config\.json, which was not run"):
        load_base(folder)


def longer(folder: Path) -> Any:
    """Give the folder's tokenizer one token more than the model has rows."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    return load_base(folder, device="cpu").tokenizer


def encoded(tmp_path: Path, tokenizer: Any, **wording: str) -> Any:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    rows = read_records(load_rows(str(tmp_path / "rows.jsonl")), "auto", None)
    return encode(rows, tokenizer, template=replace(load_template("plain"), **wording))


def test_a_longer_tokenizer_is_accepted_until_a_row_uses_a_token_the_base_has_not(folder: Path, tmp_path: Path) -> None:
    tokenizer = longer(folder)
    assert len(tokenizer) == 257
    assert len(encoded(tmp_path, tokenizer).tokens) == 2
    told = r"rows.jsonl.*1: expected tokens of the base's vocabulary \(ids below 256\), got '<pad>' \(id 256\)"
    with pytest.raises(DataError, match=told):
        encoded(tmp_path, tokenizer, without_input="<pad> ")


def test_a_prompt_of_such_a_token_is_refused_and_padding_takes_another(folder: Path) -> None:
    tokenizer = longer(folder)
    with pytest.raises(DataError, match="prompt '<pad>': expected tokens of the base's vocabulary"):
        text_prompts(["<pad>"], tokenizer)
    assert pad_id(tokenizer) == tokenizer.eos_token_id != tokenizer.pad_token_id


BLOOM = {"vocab_size": 256, "hidden_size": 16, "n_layer": 2, "n_head": 2}


def test_a_base_that_cannot_run_packed_is_refused_by_the_preview_as_by_the_run(
    tmp_path: Path, settings_for: Make
) -> None:
    import fedloom

    transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    settings = settings_for(model__base=str(tmp_path / "base"), model__target_modules=["query_key_value"])
    verdicts = [one.verdict for one in diagnose("mine", settings).findings if "'bloom'" in one.why]
    assert verdicts == [Verdict.NO]
    with pytest.raises(ModelError, match="'bloom'"):
        fedloom.run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_forward_that_raises_is_one_line_with_its_cause(folder: Path) -> None:
    from fedloom.training.verified_head import output_head

    base = load_base(folder, device="cpu")

    def broken(*_: object, **__: object) -> torch.Tensor:
        raise AttributeError("'NoneType' object has no attribute 'to'\nand more")

    base.model.model.layers[0].mlp.forward = broken
    with pytest.raises(
        ModelError, match=r"forward of 'llama' raised AttributeError: 'NoneType' object .* 'to';"
    ) as told:
        output_head(base.model)
    assert isinstance(told.value.__cause__, AttributeError)
