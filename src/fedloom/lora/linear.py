"""The linear layer with slots: one frozen weight, many adapters of different ranks, one frozen side pair.

Letters: T tokens, I in, O out, R sum of the open slots' ranks. The slots' factors lie one under the other in ``a_RI``
and ``bt_RO`` (``b`` transposed); slot k owns a block of rows in both, as views, and segments of token rows of the
packed batch. The two tensors are FLoRA's stack as they stand.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.lora.dropout import feature_words
from fedloom.lora.grouped import add_backward, add_forward
from fedloom.lora.pair import Pair
from fedloom.lora.products import product_type
from fedloom.lora.route import Route

FOLD_WHEN_SIDE_COSTS = 1 / 8
"""Fold the side adapter into a working copy of an fp32 weight once it costs this share of the base's product."""


class _LowRankLinear(torch.autograd.Function):
    """``y = x Wᵀ + bias + side(x) + s_k b_k a_k dropout(x)`` per segment; saves only x and the R-wide middle."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, bt: Tensor, layer: LoRALinear, blocks: list[Any], mask_TI: Tensor | None
    ) -> Tensor:
        dtype, narrow = product_type(x), x
        x, bias = x.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
        y = nn.functional.linear(x, layer.weight_OI(dtype), bias)
        if (side := layer.side_in(dtype)) is not None:
            y.addmm_(x @ side.a_RI.T, side.b_OR.T)
        a_x, bt_x, middles = a.to(dtype), bt.to(dtype), []
        buckets = layer.route.buckets(blocks, x)
        if buckets:
            middles = add_forward(y, x if mask_TI is None else x * mask_TI, a_x, bt_x, buckets)
        else:
            for slot, tokens, rows, _ in blocks:
                seen = x[tokens] if mask_TI is None else x[tokens] * mask_TI[tokens]
                middle = (seen @ a_x[rows].T).mul_(layer.route.slots[slot].scale)
                y[tokens].addmm_(middle, bt_x[rows])
                middles.append(middle)
        ctx.save_for_backward(narrow, a_x, bt_x, mask_TI, *middles)
        ctx.layer, ctx.blocks, ctx.buckets = layer, blocks, buckets
        ctx.turn = layer.route.here.turn
        if ctx.turn is not None:
            ctx.turn.expect(id(layer))
        return y.to(narrow.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A dropped x is masked again here instead of being kept: the mask is drawn once, the product is cheap.
        x, a, bt, mask_TI, *middles = ctx.saved_tensors
        layer, dtype = ctx.layer, product_type(x)
        x, grad, grad_x = x.to(dtype), grads[0].contiguous().to(dtype), None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ layer.weight_OI(grad.dtype)
            if (side := layer.side_in(grad.dtype)) is not None:
                grad_x.addmm_(grad @ side.b_OR, side.a_RI)
        # On a CPU samples are added one by one to the gradients themselves: a batch that is cut into more passes, or
        # shares one with other clients, then has the same sums in the same order, so the same bits wherever a row of a
        # matrix product does not depend on how many there are. Elsewhere many small products cost more than that gives.
        in_place = all(block.samples for block in ctx.blocks) and (grad.device.type == "cpu" or bool(ctx.buckets))
        grad_a, grad_bt = layer.a_RI.grad, layer.bt_RO.grad
        if not in_place or grad_a is None or grad_bt is None:
            grad_a, grad_bt = torch.zeros_like(layer.a_RI), torch.zeros_like(layer.bt_RO)
        given = (None, None) if grad_a is layer.a_RI.grad else (grad_a, grad_bt)
        if ctx.buckets:
            seen_TI = x if mask_TI is None else x * mask_TI
            add_backward((grad_x, grad_a, grad_bt), grad, seen_TI, (a, bt), middles, ctx.buckets, mask_TI)
            return _in_type_of(grads[0], grad_x), *given, None, None, None
        mine, grad_middles = nullcontext() if ctx.turn is None else ctx.turn.adding(id(layer)), []
        for (slot, tokens, rows, _), _ in zip(ctx.blocks, middles, strict=True):
            grad_middle = (grad[tokens] @ bt[rows].T).mul_(layer.route.slots[slot].scale)
            grad_middles.append(grad_middle)
            if grad_x is not None and mask_TI is None:
                grad_x[tokens].addmm_(grad_middle, a[rows])
            elif grad_x is not None:
                grad_x[tokens].add_((grad_middle @ a[rows]).mul_(mask_TI[tokens]))
        with mine:
            for (_, tokens, rows, samples), middle, grad_middle in zip(ctx.blocks, middles, grad_middles, strict=True):
                seen = x[tokens] if mask_TI is None else x[tokens] * mask_TI[tokens]
                for own in samples if in_place else [slice(None)]:
                    _add_product(grad_a[rows], grad_middle[own], seen[own])
                    _add_product(grad_bt[rows], middle[own], grad[tokens][own])
        return _in_type_of(grads[0], grad_x), *given, None, None, None


def _in_type_of(grad: Tensor, grad_x: Tensor | None) -> Tensor | None:
    return None if grad_x is None else grad_x.to(grad.dtype)


def _add_product(sum_RX: Tensor, left_TR: Tensor, right_TX: Tensor) -> None:
    """Add ``leftᵀ right`` in place; where the activations are narrower than the sum, the product is rounded first."""
    if left_TR.dtype == sum_RX.dtype:
        sum_RX.addmm_(left_TR.T, right_TX)
    else:
        sum_RX += left_TR.T @ right_TX


class LoRALinear(nn.Module):
    """Replace one frozen ``nn.Linear``, ``Conv1D`` or quantised linear, with slots and a side adapter."""

    def __init__(self, base: nn.Module, route: Route, name: str) -> None:
        super().__init__()
        self.base, self.route, self.name = base, route, name
        self.out_features, self.in_features = _shape_of(base)
        self.side: Pair | None = None
        self._folded_OI: Tensor | None = None
        self._feature_words_J: Tensor | None = None
        self.allocate()

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, if it has one."""
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def weight(self) -> Tensor:
        """The base's own weight, for code that asks a linear layer for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def most_rank(self) -> int:
        """The rank that a slot has here at most: a layer narrower than a slot's rank takes what it can."""
        return min(self.out_features, self.in_features)

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the weight to multiply with, (O, I): folded, transposed or dequantised as the base needs."""
        if self._folded_OI is not None:
            return self._folded_OI
        return _dense_weight(self.base).to(dtype)

    def allocate(self) -> None:
        """Make zeroed factors and gradients for the open slots."""
        self.a_RI = self._trainable(self.in_features)
        self.bt_RO = self._trainable(self.out_features)

    def _trainable(self, width: int) -> nn.Parameter:
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        factors = nn.Parameter(
            torch.zeros(self.route.total_rank(self.most_rank), width, device=self.weight.device, dtype=dtype)
        )
        # Allocated now, so that the optimisers' parameters can be views of it: see LoRAModel.parameters.
        factors.grad = torch.zeros_like(factors)
        return factors

    def set_side(self, pair: Pair | None) -> None:
        """Add a frozen pair to the base: as factors, or folded into a working copy of an fp32 weight."""
        self.side = self._folded_OI = None
        if pair is None or pair.rank == 0:
            return
        pair = pair.to(self.weight.device)
        worth = is_worth_folding(pair.num_parameters, (self.out_features, self.in_features))
        if _holds_full_precision(self.base) and worth:
            # A new tensor from the base's own weight each time: folding on top of a fold would gather rounding.
            weight = _dense_weight(self.base)
            self._folded_OI = torch.addmm(weight, pair.b_OR.to(weight.dtype), pair.a_RI.to(weight.dtype))
        else:
            self.side = pair.to(self.weight.dtype) if self.weight.dtype.is_floating_point else pair

    def side_in(self, dtype: torch.dtype) -> Pair | None:
        """Return the side in the activations' dtype, which a quantised base does not tell before a pass."""
        if self.side is not None and self.side.a_RI.dtype != dtype:
            self.side = self.side.to(dtype)
        return self.side

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        blocks = self.route.blocks(flat.shape[0], self.most_rank)
        mask_TI = self._mask(flat) if blocks else None
        y: Tensor = _LowRankLinear.apply(flat, self.a_RI, self.bt_RO, self, blocks, mask_TI)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)

    def _mask(self, x_TI: Tensor) -> Tensor | None:
        """Return the dropout mask of a pass; none without gradients."""
        dropout = self.route.owners(len(x_TI)).dropout
        if dropout is None or not torch.is_grad_enabled():
            return None
        if self._feature_words_J is None or self._feature_words_J.device != x_TI.device:
            self._feature_words_J = feature_words(self.name, self.in_features, x_TI.device)
        return dropout.mask(self._feature_words_J, len(x_TI), self.in_features, x_TI.dtype)


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a layer is GPT-2's ``Conv1D``, whose weight is (in, out).

    It is known by its name: its class comes with all of transformers' modelling code, which a command that only reads
    adapters has no use for.
    """
    place = "transformers.pytorch_utils", "Conv1D"
    kinds: tuple[type, ...] = type(module).__mro__
    return any((kind.__module__, kind.__name__) == place for kind in kinds)


def is_worth_folding(num_parameters: int, shape: tuple[int, int]) -> bool:
    """Tell whether a side of so many numbers is folded into a working copy of a weight (out, in) in full precision."""
    return num_parameters / (shape[0] * shape[1]) > FOLD_WHEN_SIDE_COSTS


def _shape_of(base: nn.Module) -> tuple[int, int]:
    if is_transposed(base):
        num_in, num_out = base.weight.shape  # type: ignore[misc]
        return num_out, num_in
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    raise ModelError(f"model.target_modules: expected linear layers, got a {type(base).__name__}; choose others")


def _holds_full_precision(base: nn.Module) -> bool:
    return base.weight.dtype in (torch.float32, torch.float64)


def _dense_weight(base: nn.Module) -> Tensor:
    """Return the base's (O, I) weight; a quantised one is dequantised here and never kept."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    if is_transposed(base):
        return weight.T
    if weight.dtype.is_floating_point:
        return weight
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, state=getattr(base, "state", None))  # type: ignore[no-any-return]
