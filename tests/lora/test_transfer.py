"""Tensors that are moved together arrive as they were."""

from __future__ import annotations

import torch

from fedloom.lora.transfer import moved_together


def test_tensors_arrive_with_their_shapes_and_numbers(device: str) -> None:
    here = [torch.arange(6.0).view(2, 3).T, torch.zeros(0, 4), torch.tensor(7.0)]
    there = moved_together(here, torch.device(device))
    back = moved_together(there, torch.device("cpu"))
    assert all(tensor.device.type == device for tensor in there)
    assert all(torch.equal(one, other) for one, other in zip(here, back, strict=True))


def test_tensors_that_are_there_are_not_copied() -> None:
    here = [torch.zeros(2), torch.ones(3)]
    assert all(one is other for one, other in zip(here, moved_together(here, torch.device("cpu")), strict=True))
    assert moved_together([], torch.device("cpu")) == []
