"""Generation with the model cut equals generation with it whole."""

from __future__ import annotations

import pytest
import torch
from split.split_cases import FAMILIES, random_adapter, wrapped

from fedloom.errors import EvaluationError
from fedloom.lora.layer import Slot
from fedloom.models.cut import cut
from fedloom.split.split_generation import generate
from fedloom.training.verified_head import output_head

PROMPT = [5, 9, 3, 44, 7, 21]


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("boundaries", [(1,), (3,), (1, 3), (2, 4)])
def test_the_tokens_are_those_of_the_uncut_model(case: str, boundaries: tuple[int, ...]) -> None:
    lora = wrapped(case)
    head = output_head(lora.model)
    lora.open([Slot(3, 2.0)])
    lora.load(0, random_adapter(lora, 3, seed=1))
    lora.route_all(0)
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(lora.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    found = generate(cut(lora.model, *boundaries), head, PROMPT, max_new_tokens=12, wire_dtype="fp32")
    assert list(found.new_ids) == ids[len(PROMPT) :]


def test_one_tokens_activations_cross_per_new_token() -> None:
    lora = wrapped("llama")
    head = output_head(lora.model)
    few, many = (generate(cut(lora.model, 2), head, PROMPT, max_new_tokens=n) for n in (4, 8))
    per_token = (many.upload_bytes - few.upload_bytes) / 4
    assert 64 <= per_token < 64 + 250
    assert many.download_bytes == 4 * 9


def test_in_a_u_shape_activations_come_back_and_no_token_does() -> None:
    lora = wrapped("llama")
    found = generate(cut(lora.model, 1, 3), output_head(lora.model), PROMPT, max_new_tokens=3)
    assert abs(found.download_bytes - found.upload_bytes) <= 3 * 8


def test_decoding_ends_at_a_stop_token_and_reports_tokens_as_they_come() -> None:
    lora = wrapped("llama")
    parts, head = cut(lora.model, 2), output_head(lora.model)
    seen: list[int] = []
    free = generate(parts, head, PROMPT, max_new_tokens=6, on_token=seen.append)
    assert tuple(seen) == free.new_ids
    place = free.new_ids.index(free.new_ids[2])
    assert generate(parts, head, PROMPT, max_new_tokens=6, stop_ids=[free.new_ids[2]]).new_ids == free.new_ids[:place]


@pytest.mark.parametrize("prompt", [[], [5] * 60])
def test_a_prompt_that_does_not_fit_is_refused(prompt: list[int]) -> None:
    lora = wrapped("llama")
    with pytest.raises(EvaluationError, match="expected a prompt of 1 to 54 tokens"):
        generate(cut(lora.model, 2), output_head(lora.model), prompt, max_new_tokens=10)
