"""Combining adapters in one call: what cannot be combined is refused in one line, whatever the method."""

from __future__ import annotations

import math

import pytest
import torch

from fedloom.aggregation.combining import RULES, Rule, aggregate
from fedloom.errors import AdapterError
from fedloom.lora.pair import Adapter, Pair


def adapter(num_out: int = 7, num_in: int = 5, value: float = 1.0, module: str = "layer") -> Adapter:
    return Adapter({module: Pair(torch.full((num_out, 2), value), torch.ones(2, num_in))})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", RULES)
def test_an_adapter_that_is_not_finite_is_refused_even_where_it_weighs_nothing(method: Rule, value: float) -> None:
    with pytest.raises(AdapterError, match=r"adapters\[1\]: expected finite numbers, got NaN or infinity at layer"):
        aggregate([adapter(), adapter(value=value)], [1.0, 0.0], method)
