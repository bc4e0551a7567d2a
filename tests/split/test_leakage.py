"""The leakage meter: recovers what is plainly there, never sees private text, and says when it cannot be trusted."""

from __future__ import annotations

import pytest
import torch
from split.split_cases import random_rows, wrapped

from fedloom.data.tokens import TokenSet
from fedloom.errors import EvaluationError
from fedloom.models.cut import part_of
from fedloom.split.leakage import AttackSettings, LeakageReport, measure_leakage, nearest_tokens

PUBLIC, PRIVATE = random_rows(80, seed=1), random_rows(12, seed=2)


def measure(seed: int = 0, private: TokenSet = PRIVATE, steps: int = 60) -> LeakageReport:
    lora = wrapped("llama")
    lora.open([])
    embeddings = lora.model.get_input_embeddings().weight
    return measure_leakage(
        part_of(lora.model, 0, 1),
        embeddings,
        PUBLIC,
        private,
        wire_dtype="bf16",
        seed=seed,
        settings=AttackSettings(steps=steps),
    )


def test_an_embedding_gives_all_its_tokens_away() -> None:
    weight = wrapped("llama").model.get_input_embeddings().weight
    ids = torch.arange(3, 60)
    assert torch.equal(nearest_tokens(weight[ids], weight), ids)


def test_the_inverter_reads_a_shallow_cut() -> None:
    report = measure()
    assert report.recovered > 0.9
    assert report.commonest_token < 0.2
    assert (report.cut_layer, report.num_private_tokens) == (1, PRIVATE.num_tokens)


def test_the_inverter_learns_what_no_embedding_gives_away() -> None:
    lora = wrapped("llama")
    part = part_of(lora.model, 0, 1)
    turn = torch.nn.Linear(32, 32, bias=False)
    torch.nn.init.orthogonal_(turn.weight, generator=torch.Generator().manual_seed(0))
    part.decoder.norm = turn
    embeddings = lora.model.get_input_embeddings().weight
    reports = [
        measure_leakage(
            part, embeddings, PUBLIC, PRIVATE, wire_dtype="int8", seed=0, settings=AttackSettings(steps=steps)
        )
        for steps in (0, 150)
    ]
    assert max(reports[0].recovered, reports[1].nearest_embedding) < 0.15
    assert reports[1].recovered > 0.8


def test_the_attack_repeats_bit_for_bit_and_depends_on_its_seed() -> None:
    assert measure(steps=5) == measure(steps=5)
    assert measure(steps=5) != measure(seed=1, steps=5)


def test_text_of_the_clients_is_no_public_text() -> None:
    with pytest.raises(EvaluationError, match="12 rows in both"):
        measure(private=PUBLIC.select(range(12)))
    with pytest.raises(EvaluationError, match="expected public and private rows"):
        measure(private=PUBLIC.select([]))
