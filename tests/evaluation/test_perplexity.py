from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.data.tokens import TokenSet
from fedloom.errors import EvaluationError
from fedloom.evaluation.perplexity import compare_perplexity, measure_perplexity, plain_text_rows

TEXTS = ["The café is here.", "A second, longer text about nothing in particular.", "ok"]


def test_nats_are_the_models_own_and_units_are_counted(model: Any, tokenizer: Any) -> None:
    rows, spelled = plain_text_rows(model, tokenizer, TEXTS)
    measured = measure_perplexity(model, rows, spelled, seed=0, resamples=50)
    expected = 0.0
    for text in TEXTS:
        ids = torch.tensor([[0, *text.encode()]])
        log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
        expected -= float(log_probabilities.gather(1, ids[0, 1:, None]).sum())
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert measured.num_bytes == num_bytes
    assert measured.num_words == sum(len(text.split()) for text in TEXTS)
    assert measured.nats_per_byte.value * num_bytes == pytest.approx(expected, rel=1e-9)
    assert measured.nats_per_word.value * measured.num_words == pytest.approx(expected, rel=1e-9)
    assert measured.per_token == pytest.approx(math.exp(expected / measured.num_loss_tokens))


def test_a_long_text_is_cut_without_losing_a_byte(model: Any, tokenizer: Any) -> None:
    text = "word é " * 120
    rows, spelled = plain_text_rows(model, tokenizer, [text, ""])
    assert rows.lengths.max() <= 256
    assert "".join(spelled).encode() == text.encode()
    assert rows.num_loss_tokens == len(text.encode())


def test_a_model_against_itself_differs_by_nothing(model: Any, tokenizer: Any) -> None:
    rows, spelled = plain_text_rows(model, tokenizer, TEXTS)
    measured = measure_perplexity(model, rows, spelled, seed=0, resamples=20)
    difference = compare_perplexity(measured, measured, seed=0, resamples=20)
    assert difference.value == 0.0
    assert not difference.exceeds_noise


def test_models_measured_on_different_texts_do_not_compare(model: Any, tokenizer: Any) -> None:
    sides = [
        measure_perplexity(model, *plain_text_rows(model, tokenizer, texts), seed=0, resamples=5)
        for texts in (TEXTS, TEXTS[::-1])
    ]
    with pytest.raises(EvaluationError, match="the same texts"):
        compare_perplexity(*sides, seed=0)


def test_rows_without_their_texts_are_refused(model: Any) -> None:
    rows = TokenSet.from_rows([(np.array([1, 2]), np.array([False, True]))])
    with pytest.raises(EvaluationError, match="each of 1 rows, got 0"):
        measure_perplexity(model, rows, [], seed=0)
    with pytest.raises(EvaluationError, match="expected a row with text to predict"):
        measure_perplexity(model, rows, [" "], seed=0)
