"""Combining adapters in one call: what cannot be combined is refused in one line, whatever the method."""

from __future__ import annotations

import math

import pytest
import torch

from fedloom.errors import AdapterError
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.combination import RULES, Rule, aggregate


def adapter(num_out: int = 7, num_in: int = 5, value: float = 1.0, module: str = "layer") -> Adapter:
    return Adapter({module: Pair(torch.full((num_out, 2), value), torch.ones(2, num_in))})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", RULES)
def test_an_adapter_that_is_not_finite_is_refused_even_where_it_weighs_nothing(method: Rule, value: float) -> None:
    with pytest.raises(AdapterError, match=r"adapters\[1\]: expected finite numbers, got NaN or infinity at layer"):
        aggregate([adapter(), adapter(value=value)], [1.0, 0.0], method)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("shape", [(8, 5), (7, 6), (1, 1)])
def test_adapters_of_two_shapes_are_refused(method: Rule, shape: tuple[int, int]) -> None:
    with pytest.raises(AdapterError, match=r"layer: expected one shape .*, got \(7, 5\) and "):
        aggregate([adapter(), adapter(*shape)], method=method)


@pytest.mark.parametrize("method", RULES)
def test_adapters_of_other_modules_or_of_none_are_refused(method: Rule) -> None:
    with pytest.raises(AdapterError, match="expected adapters of the same modules, layer is in one"):
        aggregate([adapter(), adapter(module="other")], method=method)
    with pytest.raises(AdapterError, match=r"adapters\[0\]: expected at least one module, got an empty adapter"):
        aggregate([Adapter(), Adapter()], method=method)


@pytest.mark.parametrize("weights", [[1e308] * 3, [math.nan, 1, 1], [2, -1, 1], [0, 0, 0], [1, 1], ["1", "1", "1"]])
def test_weights_that_give_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(AdapterError, match="weights ≥ 0 with a finite sum above 0, one for each; got 3 adapters"):
        aggregate([adapter()] * 3, weights)
