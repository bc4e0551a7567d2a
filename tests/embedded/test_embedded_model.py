"""The embedded base loads like any Hugging Face folder and reaches what its card says."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from fedloom import embedded

MAX_ROW_TOKENS = 64
SEEN = ("creatures", "addition", "extraction", "sequence", "mood")
LOSS_TOLERANCE_NATS = 0.02
MATCH_TOLERANCE = 0.03


@dataclass(frozen=True)
class Row:
    """One held-out row as tokens; the answer's begin at ``answer_start``."""

    category: str
    ids: list[int]
    answer_start: int


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(embedded.model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(embedded.model_path(), dtype=torch.float32, local_files_only=True)


def tokenised(tokenizer: PreTrainedTokenizerFast, row: dict[str, str]) -> Row:
    asked = f"{row['instruction']}\n{row['context']}" if row["context"] else row["instruction"]
    prompt = tokenizer(f"Question: {asked}\nAnswer:")["input_ids"]
    answer = tokenizer(f" {row['response']}", add_special_tokens=False)["input_ids"]
    return Row(row["category"], [*prompt, *answer, tokenizer.eos_token_id], len(prompt))


@pytest.fixture(scope="module")
def held_out(tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    return [tokenised(tokenizer, json.loads(line)) for line in embedded.eval_path().read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def figures(model: LlamaForCausalLM, held_out: list[Row]) -> dict[str, tuple[float, float]]:
    """Loss in nats per answer token and share of exact matches per category, one row at a time."""
    nats: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    matches: defaultdict[str, list[bool]] = defaultdict(list)
    with torch.inference_mode():
        for row in held_out:
            logits_TV = model(torch.tensor([row.ids])).logits[0, row.answer_start - 1 : -1]
            targets_S = torch.tensor(row.ids[row.answer_start :])
            nats[row.category].append(functional.cross_entropy(logits_TV, targets_S, reduction="none"))
            matches[row.category].append(bool((logits_TV.argmax(-1) == targets_S).all()))
    return {
        category: (torch.cat(nats[category]).mean().item(), sum(matches[category]) / len(matches[category]))
        for category in nats
    }


def stated(category: str) -> tuple[float, float]:
    card = embedded.card_path().read_text(encoding="utf-8")
    line = re.search(rf"^\| {category} \| \w+ \| ([\d.]+) \| ([\d.]+)% \|$", card, re.MULTILINE)
    assert line is not None
    return float(line[1]), float(line[2]) / 100


def test_weights_load_as_fp32_with_a_tied_head(model: LlamaForCausalLM) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_tokenizer_has_bos_eos_and_pad_and_fits_the_model(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM
) -> None:
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(special)) == 3
    assert special == (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("lamp")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("text", ["Question: 3 + 4 =\nAnswer: 7", " Ünïcode, tabs\tand  spaces ", "The tarvel sleeps."])
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("path", [embedded.data_path(), embedded.eval_path()], ids=lambda path: path.stem)
def test_no_row_is_long(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    rows = [tokenised(tokenizer, json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    assert max(len(row.ids) for row in rows) <= MAX_ROW_TOKENS


@pytest.mark.parametrize("category", SEEN)
def test_the_base_reaches_the_figures_of_its_card(figures: dict[str, tuple[float, float]], category: str) -> None:
    loss_nats, match = stated(category)
    assert figures[category][0] == pytest.approx(loss_nats, abs=LOSS_TOLERANCE_NATS)
    assert figures[category][1] == pytest.approx(match, abs=MATCH_TOLERANCE)


def test_the_base_answers_the_categories_it_has_seen_and_not_the_others(
    figures: dict[str, tuple[float, float]],
) -> None:
    seen = [match for category, (_, match) in figures.items() if category in SEEN]
    unseen = [match for category, (_, match) in figures.items() if category not in SEEN]
    assert min(seen) >= 0.9
    assert sum(unseen) / len(unseen) < 0.2


def test_greedy_generation_answers_and_stops(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer("Question: What comes next: 2 4 6 8\nAnswer:", return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**prompt, do_sample=False, max_new_tokens=8)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == f" 10{tokenizer.eos_token}"
