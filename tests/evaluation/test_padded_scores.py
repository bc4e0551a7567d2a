"""Suites of a base with padded rows give what the model gives for one prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from padded_families import build

from fedloom.evaluation.choice.shared_prefix import Query, continuation_nats
from fedloom.evaluation.decoding import DecodingSettings, decode
from fedloom.evaluation.prompt_batches import Sharing, sharing_of
from fedloom.lora.layer import LoRAModel
from fedloom.models.families import resolve_targets

PROMPTS = ["name : A ||", "name : Blue Spice | food : fast ||", "x", "y", "name : B ||"]
GREEDY = DecodingSettings(num_beams=1, no_repeat_ngram_size=0, max_new_tokens=6)
SHARING = {
    "bloom": Sharing.ANY,
    "falcon": Sharing.ANY,
    "jamba": Sharing.ANY,
    "mamba2": Sharing.ANY,
    "gpt_oss": Sharing.ANY,
    "recurrent_gemma": Sharing.ONE_LENGTH,
    "rwkv": Sharing.NONE,
}
"""Which prompts a family decodes together as it does alone."""


@pytest.mark.parametrize("kind", sorted(SHARING))
def test_greedy_answers_in_batches_are_those_of_generate_for_one_prompt(kind: str, tokenizer: Any) -> None:
    model = build(kind)
    expected = []
    for prompt in PROMPTS:
        ids_BT = torch.tensor([list(prompt.encode())])
        options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [0, 2], "pad_token_id": 0}
        fresh = build(kind)  # RecurrentGemma keeps a part of its state from one call to the next
        whole = fresh.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
        expected.append(str(tokenizer.decode(whole[0, ids_BT.shape[1] :], skip_special_tokens=True)).strip())
    lora = LoRAModel(model, resolve_targets(model, ["all-linear"])[:1])
    assert decode(lora, tokenizer, PROMPTS, GREEDY, batch_size=3).outputs == tuple(expected)
    assert sharing_of(model) is SHARING[kind]


def test_what_a_model_keeps_of_one_prompt_does_not_reach_the_next(tokenizer: Any) -> None:
    prompts = [chr(code) for code in range(65, 75)]  # of one token: the last convolution is not written over
    fresh = [decode(build("recurrent_gemma"), tokenizer, [prompt], GREEDY).outputs for prompt in prompts]
    model = build("recurrent_gemma")
    assert [decode(model, tokenizer, [prompt], GREEDY).outputs for prompt in prompts] == fresh


@pytest.mark.parametrize("kind", ["bloom", "gpt_oss", "jamba"])
@pytest.mark.parametrize("token_budget", [10, 1000])
def test_choices_are_scored_as_the_model_scores_each_alone(kind: str, token_budget: int) -> None:
    model, prompts = build(kind), ([5, 9, 13, 4, 7], [5, 9, 200])
    queries = [Query(prompt, [[1, 2], [4], [4, 8, 15]]) for prompt in prompts]
    found = continuation_nats(model, queries, token_budget=token_budget)
    for query, nats in zip(queries, found, strict=True):
        for words, ours in zip(query.continuations, nats, strict=True):
            ids = torch.tensor([[*query.prompt, *words]])
            with torch.no_grad():
                shares_TV = model(input_ids=ids, use_cache=False).logits[0].log_softmax(1)
            targets = range(len(query.prompt), ids.shape[1])
            expected = -sum(float(shares_TV[place - 1, ids[0, place]]) for place in targets)
            assert ours == pytest.approx(expected, rel=1e-4)
