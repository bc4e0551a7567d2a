"""Behind the last block only the targets' hidden states are read: the block computes the others no further than needed.

Keys and values are needed of every token; queries, the attention's output and all that follows of the targets alone.
The family's own code runs: the block gets the targets' rows as its input, its first norm all rows in their place, and
the projection behind the attention the targets' rows of what it would have got. Whether a model's block is made so is
found by trying: a probe has to give the same hidden states, else every row is computed.

Letters: T tokens, S targets, K rows that are computed, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.lora.linear import LoRALinear, is_transposed
from fedloom.lora.route import FEWEST_ROWS
from fedloom.models.families import decoder_blocks
from fedloom.training.rotation import replaced_forward

_QUERIES = "q_proj"
"""The projection in front of the attention that is needed of the targets alone, where it is one of its own."""


@dataclass(frozen=True)
class LastBlock:
    """The names of a model's last block and of the attention in it."""

    block: str
    attention: str


_FOUND: WeakKeyDictionary[nn.Module, LastBlock] = WeakKeyDictionary()


def needed_rows(target_index_S: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the rows (K,) of a pass that its last block has to compute: the targets' places, ascending.

    A sample of very few gets its last rows too, of which nothing is read: who else is in the pass then changes no bit.
    """
    needed_T = torch.zeros(sum(lengths), dtype=torch.bool, device=target_index_S.device)
    needed_T[target_index_S] = True
    ends_N = np.cumsum(lengths)
    counts_N = np.bincount(np.searchsorted(ends_N, target_index_S.cpu().numpy(), "right"), minlength=len(lengths))
    for i in np.flatnonzero(counts_N < FEWEST_ROWS).tolist():
        needed_T[ends_N[i] - min(lengths[i], FEWEST_ROWS) : ends_N[i]] = True
    return needed_T.nonzero()[:, 0]


def targets_alone(model: nn.Module, rows_K: Tensor) -> AbstractContextManager[None]:
    """Let the last block compute these rows of the next pass alone, where it can; the others come out as zeros."""
    found = _FOUND.get(model)
    return nullcontext() if found is None else _narrowed(model, found, rows_K)


def try_targets_alone(
    model: nn.Module, attended: Collection[nn.Module], states: Callable[[], Tensor], tolerance: float
) -> None:
    """Find out whether a model's last block can compute the targets' rows alone, and use it from now on if so.

    ``states`` runs a probe and returns the targets' hidden states, ``attended`` are the modules that attend in it.
    """
    forget_targets_alone(model)
    expected_SD = states()
    assume_targets_alone(model, attended)
    if model not in _FOUND:
        return
    try:
        error = (states() - expected_SD).norm() / expected_SD.norm()
    except ModelError:  # its block is made in another way
        error = torch.tensor(torch.inf)
    if not error <= tolerance:
        del _FOUND[model]


def assume_targets_alone(model: nn.Module, attended: Collection[nn.Module]) -> None:
    """Use the targets' rows alone untried, where the last block has one module that attends: for a base of shapes."""
    try:
        blocks = decoder_blocks(model).blocks
    except ModelError:
        return
    block = f"{blocks}.{len(model.get_submodule(blocks)) - 1}"  # type: ignore[arg-type]
    names = [name for name, module in model.named_modules() if module in attended and name.startswith(f"{block}.")]
    if len(names) == 1:
        _FOUND[model] = LastBlock(block, names[0])


def forget_targets_alone(model: nn.Module) -> None:
    """Let the last block compute every row again."""
    _FOUND.pop(model, None)


class _Mine(threading.local):
    """What the block's modules do in a thread's pass; None where they do as they always do."""

    forwards: _Forwards | None = None


@dataclass(eq=False)
class _Replaced:
    """A model's replaced modules: in place while any thread's pass needs them."""

    mine: _Mine = field(default_factory=_Mine)
    count: int = 0
    stack: ExitStack = field(default_factory=ExitStack)


_LOCK = threading.Lock()
_REPLACED: WeakKeyDictionary[nn.Module, _Replaced] = WeakKeyDictionary()


@contextmanager
def _narrowed(model: nn.Module, found: LastBlock, rows_K: Tensor) -> Iterator[None]:
    with _LOCK:
        replaced = _REPLACED.setdefault(model, _Replaced())
        if replaced.count == 0:
            _replace(model, found, replaced)
        replaced.count += 1
    replaced.mine.forwards = _Forwards(rows_K)
    try:
        yield
    finally:
        replaced.mine.forwards = None
        with _LOCK:
            replaced.count -= 1
            if replaced.count == 0:
                replaced.stack.close()


def _replace(model: nn.Module, found: LastBlock, replaced: _Replaced) -> None:
    block, attention = model.get_submodule(found.block), model.get_submodule(found.attention)

    def dispatched(name: str) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            mine = replaced.mine.forwards
            return original(*args, **kwargs) if mine is None else getattr(mine, name)(original, *args, **kwargs)

        return forward

    enter = replaced.stack.enter_context
    enter(replaced_forward(block, dispatched("block")))
    for child in block.children():
        if child is not attention:
            enter(replaced_forward(child, dispatched("child")))
    for name, child in attention.named_children():
        if isinstance(child, nn.Linear | LoRALinear) or is_transposed(child):
            enter(replaced_forward(child, dispatched("queries" if name == _QUERIES else "projection")))


class _Forwards:
    """What the block's modules do in one pass in place of their own forwards, which come as ``original``."""

    def __init__(self, rows_K: Tensor) -> None:
        self._rows_K = rows_K
        self._all: Tensor | None = None
        self._chosen: Tensor | None = None
        self._normed: Tensor | None = None

    def block(self, original: Callable[..., Any], hidden_1TD: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the rows that count, and put zeros in the places of the others."""
        self._all, self._chosen = hidden_1TD, hidden_1TD.index_select(1, self._rows_K)
        outputs = original(self._chosen, *args, **kwargs)
        first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        if first.shape != self._chosen.shape:
            raise ModelError(
                f"expected {tuple(self._chosen.shape)} behind the last block, got {tuple(first.shape)}; set "
                "model.attention = padded"
            )
        whole_1TD = first.new_zeros(hidden_1TD.shape).index_copy(1, self._rows_K, first)
        return (whole_1TD, *others) if isinstance(outputs, tuple) else whole_1TD

    def child(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Give all rows to the first module that asks for the block's input: the norm in front of the attention."""
        if self._normed is None and self._all is not None and args and args[0] is self._chosen:
            self._normed = original(self._all, *args[1:], **kwargs)
            return self._normed
        return original(*args, **kwargs)

    def queries(self, original: Callable[..., Any], x_1TD: Tensor) -> Tensor:
        """Project the rows that count."""
        y_1KD: Tensor = original(x_1TD.index_select(1, self._rows_K))
        whole_1TD = y_1KD.new_zeros(*x_1TD.shape[:2], y_1KD.shape[2])
        return whole_1TD.index_copy(1, self._rows_K, y_1KD)

    def projection(self, original: Callable[..., Any], x_1TD: Tensor) -> Any:
        """Project all rows in front of the attention, and behind it those that count."""
        return original(x_1TD if x_1TD is self._normed else x_1TD.index_select(1, self._rows_K))
