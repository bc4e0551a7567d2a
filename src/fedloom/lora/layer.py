"""LoRA with a client axis: many adapters of different ranks over one frozen base, trained in the same pass.

Letters: T tokens, I in, O out, R sum of the open slots' ranks. Per module the slots' factors lie one under the other
in ``a_RI`` and ``bt_RO`` (``b`` transposed); slot k owns a block of rows in both, as views, and a segment of token
rows of the packed batch. The two tensors are FLoRA's stack as they stand.

A slot holds raw factors and a scale s; outside, only the effective pair ``(s·b, a)`` is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.errors import AdapterError, ModelError
from fedloom.lora.initial import check_rank
from fedloom.lora.pair import Adapter, Pair

FOLD_WHEN_SIDE_COSTS = 1 / 8
"""Fold the side adapter into a working copy of an fp32 weight once it costs this share of the base's product."""


@dataclass(frozen=True)
class Slot:
    """Room for one client's adapter: its rank, its scale s (``alpha / r``) and its dropout with its own stream."""

    rank: int
    scale: float
    dropout: float = 0.0
    generator: torch.Generator | None = None


@dataclass
class Route:
    """Which token rows belong to which slot in the passes that follow; shared by all modules of a model."""

    slots: list[Slot] = field(default_factory=list)
    segments: list[tuple[int, int]] = field(default_factory=list)
    everything_to: int | None = None

    @property
    def total_rank(self) -> int:
        return sum(slot.rank for slot in self.slots)

    def rows_of(self, slot: int) -> slice:
        """Rows of ``a_RI`` and ``bt_RO`` that belong to a slot."""
        start = sum(s.rank for s in self.slots[:slot])
        return slice(start, start + self.slots[slot].rank)

    def blocks(self, num_tokens: int) -> list[tuple[int, slice, slice]]:
        """Return (slot, token rows, factor rows) of every segment.

        Raises:
            ModelError: if the segments do not add up to the tokens that arrived.
        """
        segments = self.segments
        if not segments:
            return (
                []
                if self.everything_to is None
                else [(self.everything_to, slice(0, num_tokens), self.rows_of(self.everything_to))]
            )
        blocks, start = [], 0
        for slot, count in segments:
            blocks.append((slot, slice(start, start + count), self.rows_of(slot)))
            start += count
        if start != num_tokens:
            raise ModelError(f"expected {start} token rows as routed to the slots, got {num_tokens}")
        return blocks


class _LowRankLinear(torch.autograd.Function):
    """``y = x Wᵀ + bias + side(x) + s_k b_k a_k dropout(x)`` per segment; saves only x and the R-wide middle."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, bt: Tensor, layer: LoRALinear, blocks: list[Any], masks: list[Any]
    ) -> Tensor:
        y = nn.functional.linear(x, layer.weight_OI(x.dtype), layer.bias)
        if layer.side is not None:
            y.addmm_(x @ layer.side.a_RI.T, layer.side.b_OR.T)
        a_x, bt_x, middles = a.to(x.dtype), bt.to(x.dtype), []
        for (slot, tokens, rows), mask in zip(blocks, masks, strict=True):
            seen = x[tokens] if mask is None else x[tokens] * mask
            middle = (seen @ a_x[rows].T).mul_(layer.route.slots[slot].scale)
            y[tokens].addmm_(middle, bt_x[rows])
            middles.append(middle)
        ctx.save_for_backward(x, a_x, bt_x, *middles)
        ctx.layer, ctx.blocks, ctx.masks = layer, blocks, masks
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, bt, *middles = ctx.saved_tensors
        layer, grad = ctx.layer, grads[0].contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ layer.weight_OI(grad.dtype)
            if layer.side is not None:
                grad_x.addmm_(grad @ layer.side.b_OR, layer.side.a_RI)
        grad_a, grad_bt = torch.zeros_like(a, dtype=layer.a_RI.dtype), torch.zeros_like(bt, dtype=layer.bt_RO.dtype)
        for (slot, tokens, rows), mask, middle in zip(ctx.blocks, ctx.masks, middles, strict=True):
            seen = x[tokens] if mask is None else x[tokens] * mask
            grad_middle = (grad[tokens] @ bt[rows].T).mul_(layer.route.slots[slot].scale)
            grad_bt[rows] += middle.T @ grad[tokens]
            grad_a[rows] += grad_middle.T @ seen
            if grad_x is not None and mask is None:
                grad_x[tokens].addmm_(grad_middle, a[rows])
            elif grad_x is not None:
                grad_x[tokens].add_((grad_middle @ a[rows]).mul_(mask))
        return grad_x, grad_a, grad_bt, None, None, None


class LoRALinear(nn.Module):
    """Stand in for one frozen ``nn.Linear``, ``Conv1D`` or quantised linear, with slots and a side adapter."""

    def __init__(self, base: nn.Module, route: Route) -> None:
        super().__init__()
        self.base, self.route = base, route
        self.out_features, self.in_features = _shape_of(base)
        self.side: Pair | None = None
        self._folded_OI: Tensor | None = None
        self.allocate()

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def weight(self) -> Tensor:
        """The base's own weight, for code that asks a linear layer for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the weight to multiply with, (O, I): folded, transposed or dequantised as the base demands."""
        return self._folded_OI if self._folded_OI is not None else _dense_weight(self.base).to(dtype)

    def allocate(self) -> None:
        """Make zeroed factors and gradients for the open slots."""
        self.a_RI = self._trainable(self.in_features)
        self.bt_RO = self._trainable(self.out_features)

    def _trainable(self, width: int) -> nn.Parameter:
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        factors = nn.Parameter(torch.zeros(self.route.total_rank, width, device=self.weight.device, dtype=dtype))
        factors.grad = torch.zeros_like(factors)
        return factors

    def set_side(self, pair: Pair | None) -> None:
        """Add a frozen pair to the base: beside it as factors, or folded into a working copy of an fp32 weight."""
        self.side = self._folded_OI = None
        if pair is None or pair.rank == 0:
            return
        pair = pair.to(self.weight.device)
        share = pair.num_parameters / (self.out_features * self.in_features)
        if _holds_full_precision(self.base) and share > FOLD_WHEN_SIDE_COSTS:
            weight = _dense_weight(self.base)
            self._folded_OI = torch.addmm(weight, pair.b_OR.to(weight.dtype), pair.a_RI.to(weight.dtype))
        else:
            compute = self.weight.dtype if self.weight.dtype.is_floating_point else torch.bfloat16
            self.side = pair.to(compute)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        blocks = self.route.blocks(flat.shape[0])
        masks = [self._mask(slot, flat[tokens]) for slot, tokens, _ in blocks]
        y: Tensor = _LowRankLinear.apply(flat, self.a_RI, self.bt_RO, self, blocks, masks)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)

    def _mask(self, index: int, x: Tensor) -> Tensor | None:
        """Draw a slot's dropout mask from its own stream; none without gradients."""
        slot = self.route.slots[index]
        if slot.dropout == 0.0 or not torch.is_grad_enabled():
            return None
        keep = torch.empty_like(x).bernoulli_(1.0 - slot.dropout, generator=slot.generator)
        return keep.div_(1.0 - slot.dropout)


class LoRAModel:
    """A frozen causal LM whose target modules carry slots for adapters and one side adapter for everybody.

    The model is wrapped in place, once; its own weights are never written. ``open`` makes room for a cohort,
    ``route`` says whose tokens the next passes hold, ``adapter`` reads a slot back as effective pairs.

    Raises:
        ModelError: if a target is absent or is not a linear layer.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str]) -> None:
        self.model = model.requires_grad_(False)
        self._route = Route()
        self.layers: dict[str, LoRALinear] = {}
        for name in targets:
            self._wrap(name)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every target module."""
        return {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}

    @property
    def uses_conv1d(self) -> bool:
        """Whether the targets are GPT-2's transposed ``Conv1D`` (PEFT's ``fan_in_fan_out``)."""
        return any(isinstance(layer.base, Conv1D) for layer in self.layers.values())

    @property
    def slots(self) -> list[Slot]:
        """The open slots."""
        return self._route.slots

    def open(self, slots: Sequence[Slot]) -> None:
        """Make room for a cohort, replacing any slots that were open.

        Raises:
            AdapterError: if a rank is below 1 or above a module's smaller side.
        """
        for slot in slots:
            check_rank(self.shapes, slot.rank)
        self._route.slots = list(slots)
        self._route.segments, self._route.everything_to = [], None
        for layer in self.layers.values():
            layer.allocate()

    def close(self) -> None:
        """Free all slots; the side adapter stays."""
        self.open([])

    def load(self, slot: int, adapter: Adapter) -> None:
        """Copy an adapter of the slot's rank into it.

        Raises:
            AdapterError: if modules, shapes or ranks do not fit.
        """
        check_fits(adapter, self.shapes)
        rows, scale = self._route.rows_of(slot), self.slots[slot].scale
        with torch.no_grad():
            for name, layer in self.layers.items():
                pair = adapter[name]
                if pair.rank != self.slots[slot].rank:
                    raise AdapterError(
                        f"expected rank {self.slots[slot].rank} in slot {slot}, got {pair.rank} for {name}"
                    )
                layer.a_RI[rows].copy_(pair.a_RI)
                layer.bt_RO[rows].copy_(pair.b_OR.T).div_(scale)

    def adapter(self, slot: int) -> Adapter:
        """Return a copy of a slot as effective pairs, fp32 (fp64 for an fp64 model), on the CPU."""
        rows, scale = self._route.rows_of(slot), self.slots[slot].scale
        return Adapter(
            {
                name: Pair(
                    (layer.bt_RO.detach()[rows].T * scale).contiguous().cpu(), layer.a_RI.detach()[rows].cpu().clone()
                )
                for name, layer in self.layers.items()
            }
        )

    def parameters(self, slot: int) -> list[nn.Parameter]:
        """Return a slot's factors as leaf views whose ``.grad`` are views too: any torch optimiser can own them."""
        rows, views = self._route.rows_of(slot), []
        for layer in self.layers.values():
            for whole in (layer.a_RI, layer.bt_RO):
                view = nn.Parameter(whole.detach()[rows])
                view.grad = whole.grad[rows]  # type: ignore[index]
                views.append(view)
        return views

    def zero_grad(self) -> None:
        """Zero all slots' gradients in place."""
        for layer in self.layers.values():
            for whole in (layer.a_RI, layer.bt_RO):
                whole.grad.zero_()  # type: ignore[union-attr]

    def set_side(self, side: Adapter | None) -> None:
        """Put a frozen adapter of any ranks beside the base, replacing the previous one."""
        if side:
            check_fits(side, self.shapes)
        for name, layer in self.layers.items():
            layer.set_side(side[name] if side else None)

    def route(self, segments: Sequence[tuple[int, int]]) -> None:
        """Say which slot the token rows of the next passes belong to: ``[(slot, num_tokens), ...]`` in order."""
        self._route.segments, self._route.everything_to = list(segments), None

    def route_all(self, slot: int | None) -> None:
        """Send every token of the next passes to one slot, or to none (base and side only)."""
        self._route.segments, self._route.everything_to = [], slot

    def unwrap(self) -> nn.Module:
        """Put the original modules back and return the model."""
        for name, layer in self.layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, layer.base)
        self.layers = {}
        return self.model

    def _wrap(self, name: str) -> None:
        try:
            base = self.model.get_submodule(name)
        except AttributeError:
            raise ModelError(
                f"model.target_modules: expected a module of {type(self.model).__name__}, got {name!r}"
            ) from None
        layer = LoRALinear(base, self._route)
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, layer)
        self.layers[name] = layer


def check_fits(adapter: Adapter, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse an adapter whose modules or shapes are not those given.

    Raises:
        AdapterError: naming the first module that differs.
    """
    if adapter.keys() != shapes.keys():
        name = sorted(adapter.keys() ^ shapes.keys())[0]
        where = "lacks" if name in shapes else "has the foreign"
        raise AdapterError(f"expected an adapter of {len(shapes)} modules of this base, it {where} module {name}")
    for name, pair in adapter.items():
        if pair.shape != shapes[name]:
            raise AdapterError(
                f"{name}: expected an adapter of shape {shapes[name]}, got {pair.shape}; it is for another base"
            )


def _shape_of(base: nn.Module) -> tuple[int, int]:
    if isinstance(base, Conv1D):
        num_in, num_out = base.weight.shape
        return num_out, num_in
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    raise ModelError(f"model.target_modules: expected linear layers, got a {type(base).__name__}")


def _holds_full_precision(base: nn.Module) -> bool:
    return base.weight.dtype in (torch.float32, torch.float64)


def _dense_weight(base: nn.Module) -> Tensor:
    """Return the base's (O, I) weight; a quantised one is dequantised here and never kept."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    if isinstance(base, Conv1D):
        return weight.T
    if weight.dtype.is_floating_point:
        return weight
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, state=getattr(base, "state", None))  # type: ignore[no-any-return]
