"""The effective low-rank pair and the adapter: what every method in fedloom is arithmetic on.

Letters: I in, O out, R rank. Scale (``alpha / r``) is folded into ``b`` and orientation is always (out, in), so
between the files we read and the layer that trains, no code needs to know about either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fedloom.errors import AdapterError

Factors = frozenset[str]
"""A choice of a pair's two factors."""
BOTH: Factors = frozenset("ab")


def rank_in(shape: tuple[int, int], rank: int) -> int:
    """Return the rank of an adapter of ``rank`` in a module of this shape: no more than its smaller side can use."""
    return min(rank, *shape)


@dataclass(frozen=True, eq=False)
class Pair:
    """One module's update ``delta = b_OR @ a_RI``, held as its two factors and never formed.

    Raises:
        AdapterError: if the factors are not two matrices of one common rank.
    """

    b_OR: Tensor
    a_RI: Tensor

    def __post_init__(self) -> None:
        b, a = self.b_OR, self.a_RI
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise AdapterError(
                f"expected factors (out, r) and (r, in) of one rank, got {tuple(b.shape)} and {tuple(a.shape)}; "
                "check their order and shapes"
            )

    @property
    def rank(self) -> int:
        """Number of columns of ``b``, which the product's rank cannot exceed."""
        return self.a_RI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module that this pair adds to."""
        return self.b_OR.shape[0], self.a_RI.shape[1]

    @property
    def num_parameters(self) -> int:
        """Numbers in both factors: ``R · (O + I)``."""
        return self.b_OR.numel() + self.a_RI.numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors in their own dtype."""
        return self.b_OR.nbytes + self.a_RI.nbytes

    def scaled(self, weight: float) -> Pair:
        """Return the pair of ``weight · delta``; the weight goes on ``b``, so ``a`` can stay shared."""
        return Pair(self.b_OR * weight, self.a_RI)

    def to(self, target: torch.dtype | torch.device | str) -> Pair:
        """Return the pair in another dtype or on another device."""
        return Pair(self.b_OR.to(target), self.a_RI.to(target))

    def is_finite(self) -> bool:
        """Tell whether every number is finite."""
        return is_finite(self.b_OR) and is_finite(self.a_RI)

    def delta(self) -> Tensor:
        """Form the dense (O, I) product. For tests and export only."""
        return self.b_OR @ self.a_RI


def is_finite(numbers: Tensor) -> bool:
    """Tell whether every number is finite, by the smallest and the largest: NaN is both, and no mask is made."""
    if numbers.numel() == 0:
        return True
    smallest, largest = torch.aminmax(numbers)
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))


class Adapter(Mapping[str, Pair]):
    """An immutable map from module name (as in ``model.named_modules()``) to that module's pair."""

    __slots__ = ("__weakref__", "_pairs")

    def __init__(self, pairs: Mapping[str, Pair] | None = None) -> None:
        self._pairs: Mapping[str, Pair] = MappingProxyType(dict(pairs or {}))

    def __getitem__(self, module: str) -> Pair:
        return self._pairs[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        return f"Adapter({len(self)} modules, ranks {ranks}, {self.num_parameters:,} parameters)"

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each module's pair."""
        return {name: pair.rank for name, pair in self.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each module."""
        return {name: pair.shape for name, pair in self.items()}

    @property
    def num_parameters(self) -> int:
        """Numbers in all factors."""
        return sum(pair.num_parameters for pair in self.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors in their own dtype."""
        return sum(pair.num_bytes for pair in self.values())

    def scaled(self, weight: float) -> Adapter:
        """Return the adapter of ``weight`` times every module's delta."""
        return Adapter({name: pair.scaled(weight) for name, pair in self.items()})

    def to(self, target: torch.dtype | torch.device | str) -> Adapter:
        """Return the adapter in another dtype or on another device."""
        return Adapter({name: pair.to(target) for name, pair in self.items()})

    def is_finite(self) -> bool:
        """Tell whether every number is finite."""
        return all(pair.is_finite() for pair in self.values())

    def as_tensors(self, factors: Factors = BOTH) -> dict[str, Tensor]:
        """Return ``{"<module>.b": (O, R), "<module>.a": (R, I)}``, the form that is serialised; some factors only."""
        tensors = {}
        for name, pair in self.items():
            if "b" in factors:
                tensors[f"{name}.b"] = pair.b_OR.contiguous()
            if "a" in factors:
                tensors[f"{name}.a"] = pair.a_RI.contiguous()
        return tensors

    def with_factors(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter with some factors replaced by those given, named as in :meth:`as_tensors`."""
        if not tensors:
            return self
        return Adapter(
            {
                name: Pair(tensors.get(f"{name}.b", pair.b_OR), tensors.get(f"{name}.a", pair.a_RI))
                for name, pair in self.items()
            }
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Adapter:
        """Rebuild an adapter from :meth:`as_tensors`.

        Raises:
            AdapterError: if a factor has no partner.
        """
        modules = sorted({key.rsplit(".", 1)[0] for key in tensors})
        missing = [f"{m}.{f}" for m in modules for f in "ba" if f"{m}.{f}" not in tensors]
        if missing:
            raise AdapterError(
                f"expected both factors of every module, {missing[0]} is missing; fetch or write the file again"
            )
        return cls({name: Pair(tensors[f"{name}.b"], tensors[f"{name}.a"]) for name in modules})


def check_finite(adapter: Mapping[str, Pair], what: str, remedy: str) -> None:
    """Reject an adapter that holds a number that is not finite; ``what`` it is and the ``remedy`` are for people.

    Raises:
        AdapterError: naming the first such module.
    """
    broken = next((name for name, pair in adapter.items() if not pair.is_finite()), None)
    if broken is not None:
        raise AdapterError(f"{what}: expected finite numbers, got NaN or infinity at {broken}; {remedy}")
