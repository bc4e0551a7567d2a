"""An answer ends where training closed it: in suites, generation, a cut model, and what is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fedloom import config
from fedloom.data import encode, load_rows, plain_frame, read_records, record_prompts, resolve_template
from fedloom.evaluation.decoding import GREEDY, decode
from fedloom.experiment import run
from fedloom.results.chosen_round import RESULT
from fedloom.results.conversation import Sampling, generate
from fedloom.results.exact_answers import exact_match
from fedloom.results.export import export_adapter
from fedloom.results.merged_export import export_merged
from fedloom.results.opened_result import open_result
from fedloom.results.split_conversation import generate_cut
from fedloom.results.suites import SuiteChoice
from tests.chat_families import FAMILIES, memorising_model, reciting_model

SAMPLING = Sampling(max_new_tokens=60)
PAIRS = [("What is red?", "A color."), ("Who is Tom?", "A boy.")]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in PAIRS
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_knows_by_heart_is_an_exact_match(family: str, rows_file: Path) -> None:
    tokenizer, rows = FAMILIES[family].tokenizer(), load_rows(rows_file)
    model = reciting_model(encode(read_records(rows), tokenizer, template="chat").tokens, tokenizer)
    found = exact_match(model, tokenizer, rows, SuiteChoice(template="chat"))
    assert found.estimates["exact_match"].value == 1.0
    assert found.notes["num_cut_off"] == 0 or family == "llama 2"  # which writes a blank before its end
    records = read_records(rows)
    prompts = record_prompts(records.items, resolve_template("chat", records.shape, tokenizer), tokenizer)
    alone = decode(model, tokenizer, prompts, GREEDY, frame=plain_frame(tokenizer)).outputs
    if family in ("gemma", "llama 3", "chatml on a base", "qwen3", "chatml in letters"):
        assert [pair[1] for pair in PAIRS] != list(alone)


@pytest.fixture(scope="module")
def gemma_run(rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run one step so small that a base that knows its answers by heart still does."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("out") / "run"
    tokenizer = FAMILIES["gemma"].tokenizer()
    model = memorising_model(encode(read_records(load_rows(rows_file)), tokenizer, template="chat").tokens, tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = config.resolve(
        {
            "model": {"base": str(base)},
            "data": {"path": str(rows_file)},
            "federation": {"num_clients": 1, "num_rounds": 1},
            "training": {"local_steps": 1, "learning_rate": 1e-6},
            "method": {"name": "fedit", "ranks": 1},
        },
        "a test",
    )
    run(settings, out)
    return out


def test_generation_and_a_cut_model_end_where_suites_do(gemma_run: Path) -> None:
    opened = open_result(gemma_run)
    asked, answer = PAIRS[0]
    assert generate(opened, asked, sampling=SAMPLING).answers == {RESULT: answer, "base": answer}
    assert dict(generate_cut(opened, asked, 1, SAMPLING).answers) == {RESULT: answer}


def stock_answer(model: object, tokenizer: object, settings: GenerationConfig) -> str:
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": PAIRS[0][0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**asked, max_new_tokens=60, do_sample=False, generation_config=settings)
    return str(tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))


def test_what_is_exported_tells_stock_transformers_where_answers_end(gemma_run: Path, tmp_path: Path) -> None:
    base = config.load(gemma_run / "config.json").model.base
    export_adapter(gemma_run, tmp_path / "adapter")
    export_merged(gemma_run, tmp_path / "merged")
    export_merged(tmp_path / "adapter", tmp_path / "merged of the adapter", base=base)
    for folder in (gemma_run / "adapter", tmp_path / "adapter"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        assert stock_answer(model, tokenizer, GenerationConfig.from_pretrained(folder)) == PAIRS[0][1]
    for folder in (tmp_path / "merged", tmp_path / "merged of the adapter"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert stock_answer(model, tokenizer, model.generation_config) == PAIRS[0][1]
        assert tokenizer.chat_template == FAMILIES["gemma"].template
