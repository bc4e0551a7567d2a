"""The sum of products of any ranks, from one sum to which each product adds numbers of a size that tells no rank.

    Y = Σ B_k (A_k Ω),   Z = Σ (Ψ B_k) A_k,   Q = an orthonormal basis of Y's columns,   Σ B_k A_k ≈ Q (Ψ Q)⁺ Z

Ω and Ψ are drawn by whoever knows the seed. Both sums are linear in the products, and go together: of the sum they hold
nothing that the sum itself does not. The result is exact, up to rounding, for a sum of rank ``size.rank`` or less. Of
another one, with K columns and L rows, its squared error is on average at most ``(1 + K / (L − K − 1)) · (1 + r / (K −
r − 1))`` times that of the best of rank r, for every r below K − 1, before it is cut to ``size.rank``.

Letters: O out, I in, R rank, K columns of a sketch, L rows. Source: Tropp, Yurtsever, Udell and Cevher, Practical
sketching algorithms for low-rank matrix approximation (2017), algorithm 4 and theorem 4.3, which is of Gaussian draws.
Deviations: entries are whole multiples of 2⁻⁷, so that they are the same bits on every machine; a pseudo-inverse that
leaves out what Ψ does not see, so that no numbers that a client sends are made larger without bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedloom.lora.algebra import compress_pair
from fedloom.lora.pair import Pair
from fedloom.seeding import stream

SPARE = 8
"""Columns beyond the rank, and rows beyond the columns: with none, a draw may see a direction hardly at all."""
_UNSEEN = 1e-3
"""A direction of Q that Ψ makes this short or shorter is left out; of honest sums none is, at any size in use."""


@dataclass(frozen=True)
class SketchSize:
    """How large sketches are.

    Attributes:
        rank: of a sum that is exact.
        is_whole: whether no sum has a higher rank; where one may, more rows make the error small.
    """

    rank: int
    is_whole: bool = True

    @property
    def columns(self) -> int:
        """Columns of Y."""
        return self.rank + SPARE

    @property
    def rows(self) -> int:
        """Rows of Z: with a higher rank, those that the source advises."""
        return self.columns + SPARE if self.is_whole else 2 * self.columns + 1


@dataclass(frozen=True)
class PairSketch:
    """The sketch of one module's pairs.

    Attributes:
        shape: (out, in) of the module.
        size: how large it is.
        seed, name: of the random streams of Ω and Ψ.
    """

    shape: tuple[int, int]
    size: SketchSize
    seed: int
    name: tuple[str | int, ...]

    @property
    def is_dense(self) -> bool:
        """Whether the product itself takes no more numbers: then it is what is added up."""
        num_out, num_in = self.shape
        return self.size.columns * num_out + self.size.rows * num_in >= num_out * num_in

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of what a pair adds, by name."""
        num_out, num_in = self.shape
        if self.is_dense:
            return {"product": self.shape}
        return {"y": (num_out, self.size.columns), "z": (self.size.rows, num_in)}

    def of(self, pair: Pair, weight: float = 1.0) -> dict[str, Tensor]:
        """Return what ``weight`` times the pair's product adds, float64; no (out, in) matrix but where that is sent."""
        b_OR, a_RI = pair.b_OR.double() * weight, pair.a_RI.double()
        if self.is_dense:
            return {"product": b_OR @ a_RI}
        return {"y": b_OR @ (a_RI @ self._omega()), "z": (self._psi() @ b_OR) @ a_RI}

    def pair(self, numbers: Mapping[str, Tensor], rank: int) -> Pair:
        """Return the pair, float64, of this rank at most, of the sum whose products' sketches add up to ``numbers``."""
        if self.is_dense:
            whole_OI = numbers["product"]
            eye = torch.eye(min(self.shape), dtype=torch.float64)
            exact = Pair(whole_OI, eye) if self.shape[1] <= self.shape[0] else Pair(eye, whole_OI)
        else:
            q_OK = torch.linalg.qr(numbers["y"]).Q
            exact = Pair(q_OK, torch.linalg.pinv(self._psi() @ q_OK, atol=_UNSEEN, rtol=0.0) @ numbers["z"])
        return compress_pair(exact, rank=rank).pair

    def _omega(self) -> Tensor:
        return _drawn((self.shape[1], self.size.columns), self.seed, *self.name, "columns")

    def _psi(self) -> Tensor:
        return _drawn((self.size.rows, self.shape[0]), self.seed, *self.name, "rows")


def _drawn(shape: tuple[int, int], seed: int, *name: str | int) -> Tensor:
    """Return independent entries, uniform on the odd multiples of 1/128 in (−2, 2), float64.

    They are made of a generator's bits alone, whose stream is fixed; a normal draw may differ in its last bits by
    processor, and then clients would not sketch alike.
    """
    count = shape[0] * shape[1]
    words = stream(seed, "sketch", *name).bit_generator.random_raw(-(-count // 8))
    levels = words.astype("<u8").view(np.uint8)[:count].astype(np.float64)
    return torch.from_numpy((2.0 * levels - 255.0) / 128.0).view(shape)
