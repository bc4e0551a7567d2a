"""Operators that families spell out in several passes over a tensor, in fewer: GELU, the rotation, the RMS norm.

Results differ by the rounding of fp32 and fp64. In 16 bits a family's functions round after every pass and stay, so
that a base gives what it gives elsewhere; but for GELU on a GPU, where its many passes are a fifth of a step of GPT-2.
A family's function is taken for one of these where its code is, to the letter, that of the Llama of the installed
transformers (most families copy it); every other one stays as it is. Linear layers of 16 bits are multiplied in fp32
on a CPU that has no units for them (:mod:`fedloom.lora.products`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloom.lora.linear import is_transposed
from fedloom.lora.products import frozen_affine, has_units, product_type

_VECTORS = 64
"""A multiple of the numbers that torch takes at once: two vectors of AVX-512. It has another tanh for the rest."""
_ROTATE = "apply_rotary_pos_emb"
_WIDE = (torch.float32, torch.float64)


def fuse_operators(model: Any) -> Any:
    """Return the model, its own modules changed: those that spell out one of the three, and slow linear layers."""
    from transformers.activations import FastGELUActivation, NewGELUActivation
    from transformers.models.llama import modeling_llama as llama
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        if isinstance(module, TanhGELU):  # the model was here before
            continue
        for name, child in module.named_children():
            if type(child) in (FastGELUActivation, NewGELUActivation):
                setattr(module, name, TanhGELU(child))
            elif (
                type(child) in (nn.Linear, Conv1D)
                and "forward" not in vars(child)
                and not has_units(child.weight.dtype)
            ):
                child.forward = MethodType(_multiplied, child)
        if "forward" in vars(module):  # ours, or that of a library that placed the model
            continue
        forward = type(module).forward
        if _is_copy(forward, llama.LlamaRMSNorm.forward):
            module.forward = MethodType(_normed, module)
        elif _is_copy(_called(forward, _ROTATE), llama.apply_rotary_pos_emb):
            module.forward = MethodType(_with_rotation(forward), module)
    return model


def _multiplied(layer: Any, x: Tensor) -> Tensor:
    """Run a linear layer's forward in fp32 where the device multiplies its type slowly, and the layer is frozen."""
    if product_type(x) == x.dtype or layer.weight.requires_grad:
        found: Tensor = type(layer).forward(layer, x)
        return found
    return frozen_affine(x, layer.weight.T if is_transposed(layer) else layer.weight, layer.bias)


class TanhGELU(nn.Module):
    """``x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))``, which GPT-2 and Phi compute by eight operators, in one.

    Where rows do not fill whole vectors of a CPU it stays as the family has it: torch computes the last numbers of a
    tensor by other bits there, and who shares a pass would decide which these are.
    """

    def __init__(self, spelled_out: nn.Module) -> None:
        super().__init__()
        self.spelled_out = spelled_out

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of ``x``, of any shape."""
        if not x.is_cuda and (x.shape[-1] % _VECTORS or x.dtype not in _WIDE):
            spelled_out: Tensor = self.spelled_out(x)
            return spelled_out
        return functional.gelu(x, approximate="tanh")


class Rotation(torch.autograd.Function):
    """``x·cos + rotate_half(x)·sin`` in two passes over ``x`` (..., E) instead of five; cos and sin broadcast to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the rotated ``x``."""
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        rotated: Tensor = x * cos
        rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1.0)
        rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return rotated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradient back: a rotation whose sine has its halves swapped and its sign turned."""
        cos, sin = ctx.saved_tensors
        rotated: Tensor = Rotation.apply(grads[0], cos, -sin.roll(sin.shape[-1] // 2, -1))  # type: ignore[no-untyped-call]
        return rotated, None, None


class RMSNorm(torch.autograd.Function):
    """``w·x / √(mean(x²) + ε)`` of a frozen weight; with r the inverse root, dx = r·g·w − r³·x·(g·w·x) / D."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        """Return the normed rows."""
        inverse_N1 = _inverse_root(x_ND, epsilon)
        ctx.save_for_backward(x_ND, inverse_N1, weight_D)
        ctx.epsilon = epsilon
        y_ND: Tensor = (x_ND * inverse_N1).mul_(weight_D)
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the rows alone."""
        x_ND, inverse_N1, weight_D = ctx.saved_tensors
        grad_ND = grads[0] * weight_D
        if torch.is_grad_enabled():  # it is differentiated once more: by what the root was made of, and not in place
            inverse_N1 = _inverse_root(x_ND, ctx.epsilon)
            along_N1 = (grad_ND * x_ND).sum(-1, keepdim=True) * inverse_N1.pow(3) / -x_ND.shape[-1]
            return grad_ND * inverse_N1 + x_ND * along_N1, None, None
        along_N1 = (grad_ND * x_ND).sum(-1, keepdim=True).mul_(inverse_N1.pow(3)).div_(-x_ND.shape[-1])
        return grad_ND.mul_(inverse_N1).addcmul_(x_ND, along_N1), None, None


def _inverse_root(x_ND: Tensor, epsilon: float) -> Tensor:
    square_N1: Tensor = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square()
    return (square_N1 / x_ND.shape[-1] + epsilon).rsqrt()


def _normed(norm: Any, x: Tensor) -> Any:
    """Run a norm's forward in fp32, which is what families compute it in."""
    if x.dtype == norm.weight.dtype == torch.float32 and not norm.weight.requires_grad:
        return RMSNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return type(norm).forward(norm, x)


def _rotated(
    spelled_out: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> Any:
    """Rotate queries and keys, as ``apply_rotary_pos_emb`` does."""
    usual = all(x.shape[-1] == cos.shape[-1] and x.dtype == cos.dtype == sin.dtype for x in (q, k))
    usual &= q.dtype in _WIDE
    if not usual or cos.shape[-1] % 2 or cos.requires_grad or sin.requires_grad:
        return spelled_out(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    rotate: Callable[..., Tensor] = Rotation.apply
    return rotate(q, cos, sin), rotate(k, cos, sin)


@cache
def _with_rotation(forward: FunctionType) -> FunctionType:
    """Return an attention's forward that finds our rotation under the name of its family's.

    It gets a namespace of its own: in the family's module the name would change for everybody in this process.
    """
    names = {**forward.__globals__, _ROTATE: partial(_rotated, forward.__globals__[_ROTATE])}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _called(function: Any, name: str) -> Any:
    """Return the function of its own module that a function calls by this name; None where it calls none."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    called = function.__globals__.get(name) if name in names else None
    return called if isinstance(called, FunctionType) else None


def _is_copy(function: Any, original: Any) -> bool:
    """Tell whether a function does, operation by operation, what another does, and so what it calls."""
    code, other = (getattr(one, "__code__", None) for one in (function, original))
    if code is None or other is None:
        return False
    numbers, others = ([x for x in one.co_consts if not isinstance(x, str)] for one in (code, other))  # no docstrings
    if (code.co_code, code.co_names, numbers) != (other.co_code, other.co_names, others):
        return False
    called = [(_called(function, name), _called(original, name)) for name in code.co_names]
    return all(one is two or _is_copy(one, two) for one, two in called)
