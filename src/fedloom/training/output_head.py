"""What a causal LM does between its last hidden states and its logits.

Letters: S rows of hidden states, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.lora.linear import LoRALinear
from fedloom.lora.pair import Pair
from fedloom.lora.products import added_product, affine, product
from fedloom.lora.route import FEWEST_ROWS

ALIGNED = 64
"""Logits to whose multiples a GPU's 16-bit products are padded: rows of 8 are enough to be aligned, 64 fill a tile."""

_SCALES, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What families call a factor on their logits, a divisor, and a softcap."""


@dataclass(frozen=True, eq=False)
class OutputHead:
    """What a model does between last hidden state and logits: ``z = scale·(h Wᵀ + bias)``, then ``c·tanh(z / c)``.

    ``side`` is a frozen pair beside the weight: an adapter that someone trained on the head. The last ``padding`` rows
    of the weight are zero, with a bias of minus infinity, and nobody's: with them a GPU multiplies faster.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    side: Pair | None = None
    padding: int = 0

    @property
    def vocabulary(self) -> int:
        """How many logits a target has."""
        return self.weight_VD.shape[0] - self.padding

    @property
    def is_plain(self) -> bool:
        """Whether a logit is the product with a weight's row, and its bias, alone."""
        return self.scale == 1.0 and self.softcap is None and self.side is None

    def aligned(self, device: str) -> OutputHead:
        """Return the head with a copy of its weight whose rows a GPU's 16-bit matrix units take as they are.

        On another kind of device, and where nothing is to be padded, it is the head itself.
        """
        padding = -self.vocabulary % _multiple_for(device, self.weight_VD.dtype)
        if not padding or not self.is_plain:
            return self
        weight_VD = nn.functional.pad(self.weight_VD, (0, 0, 0, padding))
        bias_V = weight_VD.new_zeros(self.vocabulary) if self.bias_V is None else self.bias_V
        bias_V = nn.functional.pad(bias_V, (0, padding), value=-math.inf)
        return replace(self, weight_VD=weight_VD, bias_V=bias_V, padding=padding)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Return the logits (S, V), in fp32 at least."""
        logits_SV = self.products(hidden_SD)[:, : self.vocabulary]
        if self.side is not None:
            logits_SV = added_product(logits_SV, product(hidden_SD, self.side.a_RI.T), self.side.b_OR.T)
        logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_SV = logits_SV * self.scale
        if self.softcap is None:
            return logits_SV
        return self.softcap * torch.tanh(logits_SV / self.softcap)

    def products(self, hidden_SD: Tensor) -> Tensor:
        """Return the products (S, V + padding) with the weight's rows, and the bias, in the hidden states' type."""
        return linear(hidden_SD, self.weight_VD, self.bias_V)

    def parts(self, size: int) -> Iterator[tuple[int, OutputHead]]:
        """Yield heads of ``size`` tokens of the vocabulary each, behind the first token's place; all of it as it is."""
        if size >= self.vocabulary:
            yield 0, self
            return
        for start in range(0, self.vocabulary, size):
            own = slice(start, min(start + size, self.vocabulary))
            bias_V = None if self.bias_V is None else self.bias_V[own]
            side = None if self.side is None else Pair(b_OR=self.side.b_OR[own], a_RI=self.side.a_RI)
            yield start, replace(self, weight_VD=self.weight_VD[own], bias_V=bias_V, side=side, padding=0)

    def pull_back(self, grad_SV: Tensor, logits_SV: Tensor) -> Tensor:
        """Return the gradient (S, D) at the hidden states; changes ``grad_SV``. Only a softcap reads the logits."""
        grad_SV = self._at_products(grad_SV, logits_SV).to(self.weight_VD.dtype)
        grad_SD = linear(grad_SV, self.weight_VD.T)
        if self.side is None:
            return grad_SD
        return added_product(grad_SD, product(grad_SV, self.side.b_OR), self.side.a_RI)

    def pull_back_mean(self, logits_SV: Tensor) -> Tensor:
        """Return the gradient at the hidden states of each row's mean logit (S, D), or one for all rows (1, D)."""
        rows_SV = logits_SV if self.softcap is not None else logits_SV[:1]
        return self.pull_back(torch.full_like(rows_SV, 1.0 / self.vocabulary), rows_SV)

    def pull_back_one(self, token_S: Tensor, logit_S1: Tensor) -> Tensor:
        """Return the gradient (S, D) at the hidden states of one logit of each row, in the logit's type."""
        grad_S1 = self._at_products(torch.ones_like(logit_S1), logit_S1)
        grad_SD = self.weight_VD[token_S] * grad_S1
        if self.side is None:
            return grad_SD
        return grad_SD.addmm(self.side.b_OR[token_S] * grad_S1, self.side.a_RI.to(grad_S1.dtype))

    def _at_products(self, grad_SV: Tensor, logits_SV: Tensor) -> Tensor:
        """Change a gradient at logits into that at the products, in place."""
        if self.softcap is not None:
            grad_SV.mul_(1.0 - (logits_SV / self.softcap).square_())
        return grad_SV.mul_(self.scale) if self.scale != 1.0 else grad_SV


def linear(x_SX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """Return ``x Wᵀ + bias``, of few rows as of more: libraries sum one or two rows in another order."""
    num_rows = x_SX.shape[0]
    if num_rows < FEWEST_ROWS:
        x_SX = torch.cat([x_SX, x_SX.new_zeros(FEWEST_ROWS - num_rows, x_SX.shape[1])])
    return affine(x_SX, weight_YX, bias_Y)[:num_rows]


def _multiple_for(device: str, dtype: torch.dtype) -> int:
    """Return what the vocabulary of a head of this type is best a multiple of on a kind of device."""
    return ALIGNED if device == "cuda" and dtype.itemsize == 2 else 1


def read_output_head(model: Any) -> OutputHead:
    """Return a causal LM's output head unchecked, as for a part of a model, which has no forward of its own.

    Read are the scalings that the families configure: Gemma's softcap, Cohere's factor, Granite's divisor, and the
    like under other names.

    Raises:
        ModelError: if the head is not a linear layer.
    """
    layer, config = model.get_output_embeddings(), model.config
    layer = layer.base if isinstance(layer, LoRALinear) else layer
    if not isinstance(layer, nn.Linear) or not layer.weight.dtype.is_floating_point:
        raise ModelError(f"model.base: expected a linear output head, got {type(layer).__name__}; choose another base")
    scale = math.prod(_configured(config, _SCALES)) / math.prod(_configured(config, _DIVISORS))
    return OutputHead(layer.weight, layer.bias, scale, next(iter(_configured(config, _SOFTCAPS)), None))


def _configured(config: Any, names: Sequence[str]) -> list[float]:
    """Return the numbers other than zero that a config gives under these names."""
    found = (getattr(config, name, None) for name in names)
    return [value for value in found if isinstance(value, int | float) and value]
