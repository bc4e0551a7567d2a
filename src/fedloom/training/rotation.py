"""Rotary embeddings that look at the longest position of a pass: each sample is rotated as if it were alone.

Phi-3's longrope takes other frequencies beyond a length, dynamic NTK others for every length beyond one. In a packed
pass the longest sample would decide for all. Which embeddings do so is found by asking them: the first positions come
out differently once a far one follows. Where a model has one, it is called once per length instead of once per pass.

Letters: T tokens of a pass, E width of the rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.models.causal import context_of

NEVER = 1 << 40
"""The switch of a model without one."""
_NEAR = 4
_USUAL_CONTEXT = 1 << 15
_BEYOND = 4
"""How far beyond the context an embedding is asked: dynamic NTK begins to change there."""

_SWITCHES: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def switching_rotaries(model: Any) -> dict[str, int]:
    """Return a model's rotary embeddings that look at the longest position, and the length up to which none does."""
    if model not in _SWITCHES:
        farthest = _BEYOND * (context_of(model.config) or _USUAL_CONTEXT)
        found = {name: _switch_of(module, farthest) for name, module in model.named_modules() if _is_rotary(module)}
        _SWITCHES[model] = {name: switch for name, switch in found.items() if switch < farthest}
    return _SWITCHES[model]


def shortest_switch(model: Any) -> int:
    """Return the number of tokens up to which a row may share a padded pass with any other."""
    return min(switching_rotaries(model).values(), default=NEVER)


@contextmanager
def rotated_apart(model: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Let every sample of a packed pass be rotated as its own length says."""
    with ExitStack() as stack:
        for name, switch in switching_rotaries(model).items():
            rotary = model.get_submodule(name)
            stack.enter_context(replaced_forward(rotary, partial(_by_length, rotary, switch, lengths)))
        yield


def check_rotated_apart(model: Any) -> None:
    """Compare the rotation of a short sample beside a long one with that of the short one alone.

    Raises:
        ModelError: if they differ, naming the embedding.
    """
    for name, switch in switching_rotaries(model).items():
        rotary, lengths = model.get_submodule(name), (_NEAR, switch + 1)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(_device(rotary))
        for kind in _kinds(rotary):
            alone = _asked(rotary, positions_T[:_NEAR], kind)
            with rotated_apart(model, lengths):
                packed = _asked(rotary, positions_T, kind)
            if not all(torch.equal(a, b[..., :_NEAR, :]) for a, b in zip(alone, packed, strict=True)):
                raise ModelError(
                    f"model.base: expected {name} to rotate a row by its own length, got another rotation beside a "
                    f"row of {switch + 1} tokens; choose another base"
                )


def _by_length(
    rotary: Any, switch: int, lengths: Sequence[int], original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Call an embedding once for all samples up to the switch and once for every length beyond."""
    positions, *others = (kwargs.pop("position_ids"), *args) if "position_ids" in kwargs else args
    if max(lengths) <= switch or positions.shape[-1] != sum(lengths):
        _forget(rotary)
        return original(x, positions, *others, **kwargs)
    group_of_token_T = torch.tensor([max(length, switch) for length in lengths]).repeat_interleave(
        torch.tensor(lengths)
    )
    whole: list[Tensor] = []
    for group in sorted(set(group_of_token_T.tolist())):
        tokens = (group_of_token_T == group).nonzero()[:, 0].to(positions.device)
        _forget(rotary)
        found = original(x, positions[..., tokens], *others, **kwargs)
        parts = found if isinstance(found, tuple) else (found,)
        if not whole:
            whole = [part.new_empty(*part.shape[:-2], positions.shape[-1], part.shape[-1]) for part in parts]
        for all_TE, part in zip(whole, parts, strict=True):
            all_TE.index_copy_(-2, tokens, part)
    return tuple(whole) if isinstance(found, tuple) else whole[0]


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward(original, ...)`` run in place of a module's own."""
    before, original = module.__dict__.get("forward"), module.forward
    module.forward = partial(forward, original)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _forget(rotary: Any) -> None:
    """Take back what dynamic NTK keeps of the longest row so far, by which it would rotate a shorter one."""
    original_length = getattr(rotary, "original_max_seq_len", None)
    for name in [name for name in vars(rotary) if name.endswith("max_seq_len_cached")]:
        prefix = name.removesuffix("max_seq_len_cached")
        if original_length is not None and getattr(rotary, name) > original_length:
            # A copy: some embeddings write new frequencies into the buffer.
            frequencies = getattr(rotary, f"{prefix}original_inv_freq").to(_device(rotary)).clone()
            rotary.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
            setattr(rotary, name, original_length)


def _is_rotary(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name in module._buffers)


def _device(rotary: nn.Module) -> torch.device:
    return next(rotary.buffers()).device


def _kinds(rotary: Any) -> list[str | None]:
    """Return the kinds of layers that an embedding distinguishes; None alone where it does not."""
    types = getattr(rotary, "rope_type", None)
    return list(types) if isinstance(types, dict) else [None]


def _asked(rotary: Any, positions_T: Tensor, kind: str | None) -> tuple[Tensor, ...]:
    _forget(rotary)
    x = torch.zeros(1, 1, 1, device=positions_T.device)
    found = rotary(x, positions_T[None], **({} if kind is None else {"layer_type": kind}))
    return found if isinstance(found, tuple) else (found,)


def _switch_of(rotary: Any, farthest: int) -> int:
    """Return the most tokens of a row that leave the rotation of the first positions as it is, at most ``farthest``."""
    with torch.no_grad():
        try:
            return min(_switch_of_kind(rotary, kind, farthest) for kind in _kinds(rotary))
        except Exception:  # it wants other inputs, or has no numbers: what it does shows in the model's own probe
            return farthest


def _switch_of_kind(rotary: Any, kind: str | None, farthest: int) -> int:
    near_T = torch.arange(_NEAR, device=_device(rotary))
    alone = _asked(rotary, near_T, kind)

    def changes(length: int) -> bool:
        beside = _asked(rotary, torch.cat([near_T, near_T.new_tensor([length - 1])]), kind)
        return not all(torch.equal(a, b[..., :_NEAR, :]) for a, b in zip(alone, beside, strict=True))

    low, high = _NEAR, farthest
    if changes(high):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if changes(middle) else (middle, high)
        high = low
    _asked(rotary, near_T, kind)
    return high
