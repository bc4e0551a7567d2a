"""Tokens of an update: exact from a gradient of few tokens, at chance from noise, judged against another client."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedloom.lora.pair import Adapter, Pair
from fedloom.privacy.token_recovery import mean_recovery, recovery, token_scores

WIDTH, VOCABULARY, RANK, OUT = 24, 60, 6, 16
TOKENS = np.array([4, 17, 33, 50])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


INPUTS = {"q": torch.randn(VOCABULARY, WIDTH, generator=generator(0), dtype=torch.float64)}


def gradient(b_of_what: float = 1.0) -> Adapter:
    """Return the exact gradient of a layer that read the tokens, as ``∇A = Σ (Bᵀ g) xᵀ`` and ``∇B = Σ g (A x)ᵀ``."""
    b = torch.randn(OUT, RANK, generator=generator(1), dtype=torch.float64) * b_of_what
    g, x = torch.randn(len(TOKENS), OUT, generator=generator(2), dtype=torch.float64), INPUTS["q"][TOKENS]
    return Adapter({"q": Pair(g.T @ x @ start(0.0)["q"].a_RI.T, (g @ b).T @ x)})


def start(b: float) -> Adapter:
    a_RI = torch.randn(RANK, WIDTH, generator=generator(3), dtype=torch.float64)
    return Adapter({"q": Pair(torch.full((OUT, RANK), b, dtype=torch.float64), a_RI)})


def test_a_gradient_of_no_more_tokens_than_its_rank_gives_exactly_them() -> None:
    scores = token_scores(None, gradient(), INPUTS)
    assert scores is not None
    assert scores[TOKENS] == pytest.approx(1.0, abs=1e-6)
    assert np.delete(scores, TOKENS).max() < 0.9
    assert recovery(scores, TOKENS, np.array([1, 2, 3, 4])).named == 1.0


def test_a_step_is_the_change_from_the_start_whatever_it_was() -> None:
    began, step = start(0.3), gradient()
    seen = Adapter({"q": Pair(began["q"].b_OR - step["q"].b_OR, began["q"].a_RI - 0.1 * step["q"].a_RI)})
    scores, exact = token_scores(began, seen, INPUTS), token_scores(None, step, INPUTS)
    assert scores is not None
    assert exact is not None
    np.testing.assert_allclose(scores, exact, atol=1e-9)


def test_while_b_is_zero_b_alone_tells_and_less_than_a_would() -> None:
    began, step = start(0.0), gradient(0.0)
    seen = Adapter({"q": Pair(-step["q"].b_OR, began["q"].a_RI)})
    scores = token_scores(began, seen, INPUTS)
    assert scores is not None
    assert scores[TOKENS].mean() > 2 * np.delete(scores, TOKENS).mean()
    assert token_scores(began, began, INPUTS) is None


def test_noise_tells_nothing() -> None:
    noise = Adapter({"q": Pair(torch.zeros(OUT, RANK), torch.randn(RANK, WIDTH, generator=generator(9)))})
    scores = token_scores(None, noise, INPUTS)
    assert scores is not None
    assert abs(float(scores[:30].mean() - scores[30:].mean())) < 0.1


def test_what_is_common_to_two_clients_decides_nothing() -> None:
    scores = np.array([9.0, 8.0, 7.0, 1.0, 0.0])
    found = recovery(scores, np.array([0, 1, 3]), np.array([0, 2, 4]), np.array([5, 1, 4, 0, 3]))
    assert found.named == found.named_of_control == pytest.approx(2 / 3)
    assert found.auc == pytest.approx(3 / 4)  # of 1 and 3 against 2 and 4
    assert found.commonest == pytest.approx(1 / 3)
    assert recovery(scores, np.array([0]), np.array([0])).auc is None
    both = mean_recovery([found, recovery(scores, np.array([0]), np.array([0]))])
    assert (both.auc, both.num_tokens) == (found.auc, 2.0)
