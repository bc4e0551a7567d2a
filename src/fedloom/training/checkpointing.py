"""Activations are kept at the borders of blocks only: backward runs each block once more (activation checkpointing).

What is computed is computed in the same way twice, so no bit of a result changes. The last block is not among them: it
is the first that backward needs, and computes the targets' rows alone (:mod:`fedloom.training.last_block`).

Source: Chen, Xu, Zhang and Guestrin, Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fedloom.lora.layer import LoRAModel
from fedloom.models.families import decoder_blocks
from fedloom.training.attention import LAYOUT, Layout, packed_attention
from fedloom.training.rotation import replaced_forward


@contextmanager
def checkpointed_blocks(lora: LoRAModel) -> Iterator[None]:
    """Let passes with gradients keep what enters each block but the last, and nothing in between.

    Raises:
        ModelError: the model has no one list of blocks.
    """
    blocks = list(lora.model.get_submodule(decoder_blocks(lora.model).blocks).children())
    with ExitStack() as stack:
        for block in blocks[:-1]:
            stack.enter_context(replaced_forward(block, partial(_at_its_border, lora)))
        yield


def _at_its_border(lora: LoRAModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)
    routed, layout = lora.routed_again(), kwargs.get(LAYOUT)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _once_more(lora.model, routed, layout)

    # No draws happen in a block: dropout masks are functions of their places.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
    return checkpoint(original, *args, **settings, **kwargs)


@contextmanager
def _once_more(model: Any, routed: Callable[[], AbstractContextManager[None]], layout: Layout | None) -> Iterator[None]:
    """Route and attend as in the pass itself: a device runs backward in a thread of its own, when the pass is over."""
    with routed(), nullcontext() if layout is None else packed_attention(model, layout):
        yield
