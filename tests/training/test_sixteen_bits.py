"""A base of 16 bits on a CPU without units for them: every product of its passes is taken in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.data.tokens import TokenSet
from fedloom.lora import products
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.models import fused
from fedloom.models.families import resolve_targets
from fedloom.models.fused import fuse_operators
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort
from fedloom.training.row_losses import row_losses
from fedloom.training.verified_head import output_head

LENGTHS = [9, 3, 17, 10]
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "_softmax")}
"""And what stands for attention by two of them."""


class Watch(TorchDispatchMode):
    """Notes the types in which products are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS or "attention" in str(func):
            self.seen.update(value.dtype for value in args if isinstance(value, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    for module in (products, fused):
        monkeypatch.setattr(module, "has_units", lambda dtype: False)
    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("adapted", ["all", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_no_product_is_taken_in_16_bits_and_the_losses_are_those_of_fp32(
    kind: str,
    dtype: torch.dtype,
    adapted: str,
    tiny: Callable[..., Any],
    rows_of_lengths: Callable[..., TokenSet],
    watch: Watch,
) -> None:
    """Of scoring, and of steps with their gradients, through layers with an adapter and without."""
    rows, found = rows_of_lengths(LENGTHS), {}
    training = LocalTraining(learning_rate=0.01, batch_size=4, steps=3, cores=1)
    for type_of_base in (torch.float32, dtype):
        model = fuse_operators(tiny(kind, torch.float32).to(type_of_base))
        lora = LoRAModel(model, resolve_targets(model)[: None if adapted == "all" else 1])
        output_head(lora.model)  # compares passes with the model's own attention, once
        watch.seen.clear()
        scores = row_losses(lora, rows, token_budget=30, cores=1).sum_nats
        task = ClientTask(0, rows, 2, 1.0, fresh_adapter(lora.shapes, 2, 0))
        (result,) = train_cohort(lora, [task], training, seed=1, round=1)
        found[type_of_base] = [*scores, result.stats.loss_nats]
        assert watch.seen == {torch.float32}
    assert found[dtype] == pytest.approx(found[torch.float32], rel=0.02)
