"""The passes of a split step: on a CPU its samples go through a part in pieces, spread over threads on one base.

How samples are cut into pieces does not depend on how many threads there are, and a layer gets the gradients of the
pieces in their order, so any number of threads gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fedloom.lora.layer import LoRAModel
from fedloom.lora.turns import Turn, Turns
from fedloom.training.cores import in_threads, spread_passes
from fedloom.training.packing import split_by_tokens

_WITHOUT_LIMIT = 1 << 62
"""Tokens of a pass where pieces gain nothing: all activations of a step are held until its gradients come."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Piece:
    """Samples of one pass: of every client that has any there, which of its samples, and which of its tokens."""

    samples: dict[int, slice]
    tokens: dict[int, slice]

    @property
    def rows(self) -> dict[int, slice]:
        """Token rows of each client in the pass."""
        found, start = {}, 0
        for client, own in self.tokens.items():
            found[client] = slice(start, start + own.stop - own.start)
            start = found[client].stop
        return found


@dataclass(frozen=True)
class Spread:
    """How a party's passes are spread: tokens of a piece at most, and how many pieces are under way at once."""

    tokens: int
    cores: int

    @classmethod
    def of(cls, lora: LoRAModel, cores: int) -> Spread:
        """Return how passes through a model are spread over so many cores of its device."""
        return cls(*spread_passes(lora.model, lora.base_weight.device.type, _WITHOUT_LIMIT, cores))

    def pieces(self, lengths: Mapping[int, Sequence[int]]) -> list[Piece]:
        """Cut samples, given by their lengths client by client, into as few pieces as there must be, of like sizes."""
        owners = [(client, index) for client, own in lengths.items() for index in range(len(own))]
        return [
            _piece([owners[place] for place in places], lengths)
            for places in _even([n for own in lengths.values() for n in own], self.tokens)
        ]

    def run(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return what ``work``, in which gradients are enabled, returns of each item, in their order."""
        return list(in_threads(work, items, self.cores))

    def begin(self, work: Callable[[T, Turn], R], items: Sequence[T]) -> list[R]:
        """Run ``work`` of each item in its turn, which may end (:meth:`Turn.ending`) in another call than this."""
        turns = Turns()
        return self.run(lambda one: work(*one), [(item, Turn(turns, number)) for number, item in enumerate(items)])


def joined(parts: Iterable[tuple[int, Tensor]]) -> dict[int, Tensor]:
    """Return each client's tensors one behind the other, in the order in which they come."""
    found: dict[int, list[Tensor]] = {}
    for client, part in parts:
        found.setdefault(client, []).append(part)
    return {client: own[0] if len(own) == 1 else torch.cat(own) for client, own in found.items()}


def _even(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Cut samples into as few consecutive parts of at most ``most`` tokens as there can be, the largest the smallest.

    Threads that share a step are then busy for the same time. A sample that is longer is a part of its own.
    """
    parts = split_by_tokens(lengths, most)
    low, high = max(lengths, default=0) - 1, min(most, sum(lengths))
    while high - low > 1:
        middle = (low + high) // 2
        tried = split_by_tokens(lengths, middle)
        if len(tried) > len(parts):
            low = middle
        else:
            high, parts = middle, tried
    return parts


def _piece(owners: Iterable[tuple[int, int]], lengths: Mapping[int, Sequence[int]]) -> Piece:
    samples: dict[int, slice] = {}
    for client, index in owners:
        samples[client] = slice(samples.get(client, slice(index, index)).start, index + 1)
    tokens = {c: slice(sum(lengths[c][: own.start]), sum(lengths[c][: own.stop])) for c, own in samples.items()}
    return Piece(samples, tokens)
