"""Batches with padding, for a model that only its own attention (or state) can run: each row as the model reads it.

Rows are right-padded to the longest of their pass and go through the model's own forward, without a mask: in a causal
model nothing that follows a row changes it. :func:`fedloom.training.verified_head.output_head` compares a padded row
with the same row alone before the model is used. No mask also means that no token of the padding is left without
anything to attend to, so no NaN arises in it.

Letters: B rows, T tokens of the longest, S supervised targets, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedloom.models.families import body_of
from fedloom.models.foreign_forward import foreign_forward
from fedloom.training.packing import Row, consecutive, learned
from fedloom.training.rotation import rotated_apart


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Rows of one pass, each of T tokens: its own, then its last token repeated.

    Target s is token ``targets_S[s]``, predicted from the hidden state at ``target_index_S[s]`` of all B · T, in row
    ``row_of_target_S[s]``. No token of the padding is a target.
    """

    input_ids_BT: Tensor
    target_index_S: Tensor
    targets_S: Tensor
    row_of_target_S: Tensor
    own_lengths: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row takes in the pass, its padding included."""
        num_rows, longest = self.input_ids_BT.shape
        return (longest,) * num_rows

    @property
    def needed_index_K(self) -> None:
        """The last block computes all places."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return self.input_ids_BT.numel()


def pad(rows: Sequence[Row], device: torch.device | str = "cpu") -> PaddedBatch:
    """Pad rows to the longest of them, for one pass on ``device``."""
    longest = max(len(ids) for ids, _ in rows)
    padded = [
        (np.pad(ids, (0, longest - len(ids)), mode="edge"), np.pad(supervised, (0, longest - len(ids))))
        for ids, supervised in rows
    ]
    found = learned(padded)
    return PaddedBatch(
        input_ids_BT=found.ids_T.to(device).view(len(rows), longest),
        target_index_S=found.target_index_S.to(device),
        targets_S=found.targets_S.to(device),
        row_of_target_S=found.row_of_target_S.to(device),
        own_lengths=tuple(len(ids) for ids, _ in rows),
    )


def padded_hidden_states(model: Any, batch: PaddedBatch) -> Tensor:
    """Return the last hidden states (B · T, D) of a padded batch: after the final norm, before the output head.

    Raises:
        ModelError: if the model's own code raises.
    """
    with rotated_apart(model, batch.lengths[:1]), foreign_forward(model):
        outputs = body_of(model)(input_ids=batch.input_ids_BT, use_cache=False)
        hidden_BTD: Tensor = outputs.last_hidden_state
    return hidden_BTD.flatten(0, 1)


class _Extent(NamedTuple):
    """How many rows a pass has, and the tokens of its shortest and its longest."""

    num_rows: int
    shortest: int
    longest: int


def split_by_padded_tokens(
    groups: Iterable[Sequence[int]], token_budget: int, most: int | None = None, *, switch: int
) -> list[list[int]]:
    """Cut a sequence of groups of rows, given by their lengths, into consecutive parts for one pass each.

    A part has at most ``token_budget`` tokens, padding included, and ``most`` groups; a group beyond the budget is a
    part of its own. Rows of more than ``switch`` tokens share a pass with those of their own length only: the rotation
    of such a row goes by the longest position of the pass.
    """

    def joined(first: _Extent, second: _Extent) -> _Extent:
        shortest, longest = min(first.shortest, second.shortest), max(first.longest, second.longest)
        return _Extent(first.num_rows + second.num_rows, shortest, longest)

    def fits(part: _Extent) -> bool:
        alike = part.longest <= switch or part.longest == part.shortest
        return alike and part.num_rows * part.longest <= token_budget

    extents = (_Extent(len(lengths), min(lengths), max(lengths)) for lengths in groups)
    return consecutive(extents, joined, fits, most)
