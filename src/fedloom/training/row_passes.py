"""How rows go through a model: one interface for packed passes and for padded ones.

Who trains or scores asks :func:`row_passes` for the model's own and does not know which they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

import numpy as np
import torch
from torch import Tensor

from fedloom.models.causal import causal_lm
from fedloom.models.row_attention import USE_PADDED, attention_of
from fedloom.training.last_block import try_targets_alone
from fedloom.training.packing import PackedBatch, Row, hidden_states, pack, split_by_tokens, target_states
from fedloom.training.padding import PaddedBatch, pad, padded_hidden_states, split_by_padded_tokens
from fedloom.training.rotation import check_rotated_apart, shortest_switch

_PROBE_LENGTHS = (8, 5)
"""Tokens of the rows with which is tried what can be left out."""


class Batch(Protocol):
    """Rows of one pass: what each takes of its N tokens, and where the S supervised targets are among them."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row takes in the pass, any padding included."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass, any padding included."""

    @property
    def needed_index_K(self) -> Tensor | None:
        """Places of the pass that its last block may compute alone; None: all."""

    @property
    def target_index_S(self) -> Tensor:
        """Places of the pass whose hidden states predict the targets."""

    @property
    def targets_S(self) -> Tensor:
        """The targets."""

    @property
    def row_of_target_S(self) -> Tensor:
        """The targets' rows."""


class RowPasses(Protocol):
    """How rows are put into passes, and what becomes of them there.

    ``attends_by_mask`` says whether all of the model's layers attend by a mask, so that it takes one of ours and does
    not see padding that is masked; ``advice`` what to do where a model does not pass the check.
    """

    @property
    def name(self) -> str:
        """``packed`` or ``padded``."""

    @property
    def attends_by_mask(self) -> bool:
        """Whether all layers attend by a mask."""

    @property
    def advice(self) -> str:
        """What to do where a model's rows cannot pass so."""

    def split(self, groups: Sequence[Sequence[int]], token_budget: int, most: int | None = None) -> list[list[int]]:
        """Cut groups of rows, given by their lengths, into parts of ``token_budget`` tokens and ``most`` groups."""

    def batch(self, rows: Sequence[Row], device: torch.device | str = "cpu") -> Any:
        """Return rows as one ``Batch``."""

    def hidden_states(self, model: Any, batch: Any) -> Tensor:
        """Return the last hidden states (N, D) of all tokens of a batch."""

    def target_states(self, model: Any, batch: Any) -> Tensor:
        """Return the last hidden states (S, D) from which the targets are predicted."""

    def by_row(self, batch: Any, values_N: Tensor) -> list[Tensor]:
        """Return values at the tokens of a batch row by row, without those of the padding."""

    def check(self, model: Any) -> None:
        """Reject a model by what can be seen without a pass.

        Raises:
            ModelError: naming what it has.
        """

    def prepare(self, model: Any, tolerance: float) -> None:
        """Find out what work the targets' hidden states do not need; no adapter may be routed."""


@dataclass(frozen=True)
class PackedPasses:
    """Rows one behind the other, kept apart by our own attention."""

    name: str = "packed"
    attends_by_mask: bool = True
    advice: str = USE_PADDED

    def split(self, groups: Sequence[Sequence[int]], token_budget: int, most: int | None = None) -> list[list[int]]:
        """Count the tokens of the rows."""
        return split_by_tokens(map(sum, groups), token_budget, most)

    def batch(self, rows: Sequence[Row], device: torch.device | str = "cpu") -> PackedBatch:
        """Pack the rows."""
        return pack(rows, device)

    def hidden_states(self, model: Any, batch: PackedBatch) -> Tensor:
        """Run the model with our attention in place of its own."""
        return hidden_states(model, batch)

    def target_states(self, model: Any, batch: PackedBatch) -> Tensor:
        """Let the last block compute the targets alone, where it can."""
        return target_states(model, batch)

    def by_row(self, batch: PackedBatch, values_N: Tensor) -> list[Tensor]:
        """Cut at the rows' ends."""
        return list(torch.split(values_N, list(batch.lengths)))

    def check(self, model: Any) -> None:
        """Compare the rotation of a row beside a long one with its own."""
        check_rotated_apart(model)

    def prepare(self, model: Any, tolerance: float) -> None:
        """Try the last block."""
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = [np.arange(1, n + 1, dtype=np.int32) % vocabulary for n in _PROBE_LENGTHS]
        batch = pack([(row, np.arange(len(row)) > len(row) // 2) for row in ids], model.device)
        hidden_states(model, batch)
        try_targets_alone(model, batch.layout.attended, lambda: target_states(model, batch), tolerance)


@dataclass(frozen=True)
class PaddedPasses:
    """Rows beside each other, padded to the longest, through the model's own attention.

    Rows of more than ``switch`` tokens share a pass with those of their length only.
    """

    switch: int
    name: str = "padded"
    attends_by_mask: bool = False
    advice: str = "choose another base"

    def split(self, groups: Sequence[Sequence[int]], token_budget: int, most: int | None = None) -> list[list[int]]:
        """Count padding too."""
        return split_by_padded_tokens(groups, token_budget, most, switch=self.switch)

    def batch(self, rows: Sequence[Row], device: torch.device | str = "cpu") -> PaddedBatch:
        """Pad the rows."""
        return pad(rows, device)

    def hidden_states(self, model: Any, batch: PaddedBatch) -> Tensor:
        """Run the model as it is."""
        return padded_hidden_states(model, batch)

    def target_states(self, model: Any, batch: PaddedBatch) -> Tensor:
        """Take them from those of all tokens."""
        return padded_hidden_states(model, batch).index_select(0, batch.target_index_S)

    def by_row(self, batch: PaddedBatch, values_N: Tensor) -> list[Tensor]:
        """Drop the padding."""
        whole = torch.split(values_N, list(batch.lengths))
        return [row[:length] for row, length in zip(whole, batch.own_lengths, strict=True)]

    def check(self, model: Any) -> None:
        """Nothing is to be seen without a pass: the model is used as it is."""

    def prepare(self, model: Any, tolerance: float) -> None:
        """Nothing is left out."""


def row_passes(model: Any) -> RowPasses:
    """Return how the rows of a causal LM pass: as its base was loaded for (``model.attention``)."""
    match attention_of(model):
        case "packed":
            return PackedPasses()
        case "padded":
            return PaddedPasses(shortest_switch(causal_lm(model)))
        case attention:
            assert_never(attention)
