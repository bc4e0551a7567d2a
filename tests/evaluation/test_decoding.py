from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import GREEDY, DecodingSettings, NoRepeatedNgrams, decode
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.models.families import resolve_targets

PROMPTS = ["name : A ||", "name : Blue Spice | food : fast ||", "x", "name : A ||"]
SHORT = DecodingSettings(num_beams=3, max_new_tokens=8)


def greedy_by_hand(model: Any, tokenizer: Any, prompt: str, num_tokens: int) -> str:
    ids = list(prompt.encode())
    start = len(ids)
    for _ in range(num_tokens):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def test_greedy_batches_equal_taking_the_likeliest_token_one_prompt_at_a_time(model: Any, tokenizer: Any) -> None:
    settings = DecodingSettings(num_beams=1, no_repeat_ngram_size=0, max_new_tokens=6)
    expected = tuple(greedy_by_hand(model, tokenizer, prompt, 6) for prompt in PROMPTS)
    assert decode(model, tokenizer, PROMPTS, settings, batch_size=3).outputs == expected


def test_beam_search_does_not_depend_on_the_batch(model: Any, tokenizer: Any) -> None:
    together = decode(model, tokenizer, PROMPTS, SHORT, batch_size=4)
    alone = decode(model, tokenizer, PROMPTS, SHORT, batch_size=1)
    assert together.outputs == alone.outputs


def test_every_distinct_prompt_is_decoded_once_and_progress_counts_them(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    decoded = decode(
        model, tokenizer, PROMPTS, SHORT, batch_size=2, on_progress=lambda done, total, _: seen.append((done, total))
    )
    assert decoded.num_unique == 3
    assert decoded.outputs[0] == decoded.outputs[3]
    assert seen == [(2, 3), (3, 3)]


def test_no_ngram_is_decoded_twice_but_the_prompts_may_be_repeated() -> None:
    forbid = NoRepeatedNgrams(2, width=3)
    ids = torch.tensor([[7, 8, 7, 1, 2, 3, 1], [7, 8, 7, 1, 1, 1, 4]])
    scores = forbid(ids, torch.zeros(2, 10))
    assert scores[0].isinf().nonzero().flatten().tolist() == [2]  # 1 2 was decoded; 7 8 stands in the prompt only
    assert not scores[1].isinf().any()
    assert not forbid(ids[:1, :5], torch.zeros(1, 10)).isinf().any()
    assert forbid(torch.tensor([[7, 8, 7, 8, 7]]), torch.zeros(1, 10)).isinf().sum() == 0


def test_an_interrupted_run_goes_on_where_it_stopped(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "outputs.jsonl"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(model, tokenizer, PROMPTS, SHORT, batch_size=2, file=file, on_progress=stop)
    with file.open("a") as handle:
        handle.write('{"key": "cut sho')
    resumed = decode(model, tokenizer, PROMPTS, SHORT, batch_size=2, file=file)
    assert resumed.num_resumed == 2
    assert resumed.outputs == decode(model, tokenizer, PROMPTS, SHORT, batch_size=1).outputs
    again = decode(model, tokenizer, PROMPTS, SHORT, file=file)
    assert again.num_resumed == 3
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["settings"] == {
        "num_beams": 3,
        "length_penalty": 0.8,
        "no_repeat_ngram_size": 4,
        "max_new_tokens": 8,
    }
    assert len(lines) == 4


def test_outputs_of_other_settings_or_another_model_are_not_mixed(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "outputs.jsonl"
    settings = DecodingSettings(num_beams=1, max_new_tokens=2)
    decode(model, tokenizer, ["a"], settings, file=file, model_id="one")
    with pytest.raises(EvaluationError, match="choose another file"):
        decode(model, tokenizer, ["a"], settings, file=file, model_id="two")
    with pytest.raises(EvaluationError, match="choose another file"):
        decode(model, tokenizer, ["a"], GREEDY, file=file, model_id="one")


def test_the_adapter_a_model_is_routed_to_changes_what_it_says(model: Any, tokenizer: Any) -> None:
    settings = DecodingSettings(num_beams=2, max_new_tokens=6)
    plain = decode(model, tokenizer, PROMPTS, settings).outputs
    lora = LoRAModel(model, resolve_targets(model, None))
    lora.open([Slot(rank=2, scale=1.0)])
    for parameter in lora.parameters(0):
        parameter.data.fill_(0.5)
    lora.route_all(0)
    adapted = decode(lora, tokenizer, PROMPTS, settings).outputs
    lora.route_all(None)
    assert decode(lora, tokenizer, PROMPTS, settings).outputs == plain
    assert adapted != plain


def test_a_prompt_that_leaves_no_room_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match=r"prompts of at most 248 tokens .*got 1 longer"):
        decode(model, tokenizer, ["x" * 249, "y"], SHORT)


@pytest.mark.data
@pytest.mark.slow
def test_stories260k_decodes_its_published_golden_text(data_dir: Path) -> None:
    from fedloom.models.load import load_base

    base = load_base(data_dir / "models" / "stories260K", device="cpu")
    golden = (data_dir / "models" / "golden_stories260K.txt").read_text(encoding="utf-8").strip()
    settings = DecodingSettings(num_beams=1, no_repeat_ngram_size=0, max_new_tokens=199)
    [text] = decode(base.model, base.tokenizer, ["<s>"], settings).outputs
    assert golden.startswith(text[:400])
