"""Attention of all samples of a pass in one call against the plain definition, on a device that has it."""

from __future__ import annotations

import math

import pytest
import torch

from fedloom.seeding import torch_stream
from fedloom.training.attention import attend, layout
from fedloom.training.flash import runs_at_once

LENGTHS, HEADS, KEY_HEADS, WIDTH = (5, 130, 1, 64, 33), 4, 2, 64


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Attend sample by sample in float64, by the definition."""
    shared, found = HEADS // KEY_HEADS, []
    parts = [t.double().split(list(LENGTHS), 2) for t in (query, key, value)]
    for q, k, v in zip(*parts, strict=True):
        scores = q @ k.repeat_interleave(shared, 1).mT / math.sqrt(WIDTH)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        share = scores.masked_fill(~seen, -math.inf).softmax(-1)
        found.append((share @ v.repeat_interleave(shared, 1)).transpose(1, 2))
    return torch.cat(found, 1)


@pytest.mark.parametrize("window", [None, 16])
def test_attention_of_a_pass_in_half_precision_equals_the_definition(device: str, window: int | None) -> None:
    def drawn(name: str, heads: int) -> torch.Tensor:
        whole = torch.randn(1, heads, sum(LENGTHS), WIDTH, generator=torch_stream(1, name)).to(device, torch.bfloat16)
        return whole.requires_grad_()

    inputs = drawn("q", HEADS), drawn("k", KEY_HEADS), drawn("v", KEY_HEADS)
    weights = torch.randn(1, sum(LENGTHS), HEADS, WIDTH, generator=torch_stream(1, "w")).to(device)
    module, samples = torch.nn.Linear(1, 1), layout(LENGTHS, device)
    found, _ = attend(module, *inputs, None, scaling=None, sliding_window=window, packed_layout=samples)
    (found * weights).sum().backward()
    expected = plain(*inputs, window)
    grads = torch.autograd.grad((expected * weights).sum(), inputs)
    assert (found - expected).norm() < 1e-2 * expected.norm()
    for one, grad in zip(inputs, grads, strict=True):
        assert (one.grad - grad).norm() < 2e-2 * grad.norm()


def test_a_processor_and_full_precision_have_no_such_call(device: str) -> None:
    assert not runs_at_once(torch.zeros(1, 2, 3, 64, device=device))
    assert not runs_at_once(torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16))
    assert not runs_at_once(torch.zeros(1, 2, 3, 62, dtype=torch.bfloat16, device=device))
