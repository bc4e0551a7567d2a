"""Batches without padding: samples one behind the other, positions restarting, targets where there is a label.

The rows of an instruction set differ in length by a factor of ten and more, so a padded batch is mostly padding; a
packed one computes on tokens of samples only. Attention keeps the samples apart (:mod:`fedloom.training.attention`), so
a sample's loss does not depend on the others in its pass, and a batch may be cut anywhere between samples.

Letters: T tokens of all samples, S supervised targets, D width.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.models.families import body_of
from fedloom.models.foreign_forward import foreign_forward
from fedloom.models.row_attention import USE_PADDED
from fedloom.training.attention import LAYOUT, Layout, layout, packed_attention
from fedloom.training.last_block import needed_rows, targets_alone

Row = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""A sample's token ids and which of them are supervised."""

Size = TypeVar("Size")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Samples concatenated into one pass.

    Position t predicts token t + 1 of the same sample, so the targets are the supervised tokens at index 1 and
    beyond: target s is token ``targets_S[s]``, predicted from the hidden state at ``target_index_S[s]`` of the pass,
    in sample ``row_of_target_S[s]``.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    target_index_S: Tensor
    targets_S: Tensor
    row_of_target_S: Tensor
    layout: Layout

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample, in order."""
        return self.layout.lengths

    @cached_property
    def needed_index_K(self) -> Tensor:
        """Places of the pass that its last block computes."""
        return needed_rows(self.target_index_S, self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass."""
        return self.input_ids_T.shape[0]


def num_targets(supervised: NDArray[np.bool_]) -> int:
    """Return how many tokens of a sample are learnt: the supervised ones that have a token before them."""
    return int(np.count_nonzero(supervised[1:]))


class Learned(NamedTuple):
    """Tokens of rows one behind the other, and the targets among them, as tensors on the CPU."""

    ids_T: Tensor
    target_index_S: Tensor
    targets_S: Tensor
    row_of_target_S: Tensor
    position_ids_T: Tensor


def learned(rows: Sequence[Row]) -> Learned:
    """Concatenate rows and list their targets."""
    lengths = [len(ids) for ids, _ in rows]
    ids_T = np.concatenate([ids for ids, _ in rows])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    supervised_T = np.concatenate([supervised for _, supervised in rows])
    supervised_T[starts] = False  # a sample's first token has none before it: predicting it would read the last sample
    row_of_token_T = np.repeat(np.arange(len(rows)), lengths)
    # Targets are listed by position instead of masked with -100: the output head, the largest matrix of a small model,
    # then runs on the supervised tokens alone.
    (target_at_S,) = np.nonzero(supervised_T)
    positions_T = np.arange(len(ids_T)) - starts[row_of_token_T]
    arrays = (ids_T, target_at_S - 1, ids_T[target_at_S], row_of_token_T[target_at_S], positions_T)
    return Learned(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))


def pack(rows: Sequence[Row], device: torch.device | str = "cpu") -> PackedBatch:
    """Concatenate samples into one pass on ``device``."""
    found = learned(rows)
    return PackedBatch(
        input_ids_T=found.ids_T.to(device),
        position_ids_T=found.position_ids_T.to(device),
        target_index_S=found.target_index_S.to(device),
        targets_S=found.targets_S.to(device),
        row_of_target_S=found.row_of_target_S.to(device),
        layout=layout([len(ids) for ids, _ in rows], device),
    )


def hidden_states(model: Any, batch: PackedBatch) -> Tensor:
    """Return the last hidden states (T, D) of a packed batch: after the final norm, before the output head.

    Raises:
        ModelError: if the model cannot attend sample by sample, naming what it has, or its own code raises.
    """
    with packed_attention(model, batch.layout), foreign_forward(model, f"{USE_PADDED} or other model.target_modules"):
        outputs = body_of(model)(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            **{LAYOUT: batch.layout},
        )
        hidden_TD: Tensor = outputs.last_hidden_state[0]
    return hidden_TD


def target_states(model: Any, batch: PackedBatch) -> Tensor:
    """Return the last hidden states (S, D) from which the targets are predicted, with no more work than they need.

    Raises:
        ModelError: as for :func:`hidden_states`.
    """
    with targets_alone(model, batch.needed_index_K):
        return hidden_states(model, batch).index_select(0, batch.target_index_S)


def split_by_tokens(lengths: Iterable[int], token_budget: int, most: int | None = None) -> list[list[int]]:
    """Cut a sequence of samples into consecutive parts of at most ``token_budget`` tokens and ``most`` samples.

    A sample longer than the budget is a part of its own.
    """
    return consecutive(lengths, operator.add, lambda tokens: tokens <= token_budget, most)


def consecutive(
    sizes: Iterable[Size], joined: Callable[[Size, Size], Size], fits: Callable[[Size], bool], most: int | None
) -> list[list[int]]:
    """Cut a sequence into consecutive parts of at most ``most`` items whose joined size fits, or of one item."""
    parts: list[list[int]] = []
    whole: Size | None = None
    for index, size in enumerate(sizes):
        together = size if whole is None else joined(whole, size)
        if not parts or not fits(together) or len(parts[-1]) == most:
            parts.append([])
            together = size
        parts[-1].append(index)
        whole = together
    return parts
