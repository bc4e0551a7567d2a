"""Operations on low-rank products that form no out × in matrix where the ranks make that more expensive.

Letters: I in, O out, R rank. A weight always multiplies ``b``; ``a`` stays as it came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from fedloom.errors import AdapterError
from fedloom.lora.pair import Adapter, Pair, check_finite

EPS_64 = torch.finfo(torch.float64).eps


def stack_pairs(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Return the pair of ``Σ w_k b_k a_k``, exactly, at rank ``Σ r_k``. Source: FLoRA, eq. 5."""
    b_OR = torch.cat([pair.b_OR * weight for pair, weight in zip(pairs, weights, strict=True)], dim=1)
    return Pair(b_OR, torch.cat([pair.a_RI for pair in pairs], dim=0))


def pad_pair(pair: Pair, rank: int) -> Pair:
    """Append zero slots up to ``rank``; the product stays the same."""
    missing = rank - pair.rank
    if missing < 0:
        raise AdapterError(f"rank: expected at least {pair.rank} to pad to, got {rank}; pad to a larger rank")
    padded_b = torch.nn.functional.pad(pair.b_OR, (0, missing))
    padded_a = torch.nn.functional.pad(pair.a_RI, (0, 0, 0, missing))
    return Pair(padded_b, padded_a)


def truncate_pair(pair: Pair, rank: int) -> Pair:
    """Keep the first ``rank`` slots (all of them when there are fewer). Source: HetLoRA, section 3.2."""
    return Pair(pair.b_OR[:, :rank], pair.a_RI[:rank])


def inner_of_pairs(left: Pair, right: Pair) -> float:
    """Return ``⟨b a, b' a'⟩`` from two R × R' Gram matrices, in float64: ``tr((bᵀb')(a'aᵀ))``."""
    gram_b = left.b_OR.double().T @ right.b_OR.double()
    gram_a = left.a_RI.double() @ right.a_RI.double().T
    return float((gram_b * gram_a).sum())


def norm_of_pair(pair: Pair) -> float:
    """Return the Frobenius norm of the product from Gram matrices."""
    return math.sqrt(max(inner_of_pairs(pair, pair), 0.0))


def norm_of_difference(left: Pair, right: Pair) -> float:
    """Return ``‖b a − b' a'‖`` through the triangular factors, free of the cancellation that Grams suffer."""
    # The difference is itself a pair: both stacked, one with weight −1. ‖Q_b T_b T_aᵀ Q_aᵀ‖ = ‖T_b T_aᵀ‖, so only the
    # small triangles are multiplied, and equal parts cancel before anything is squared.
    pair = stack_pairs([left.to(torch.float64), right.to(torch.float64)], [1.0, -1.0])
    if pair.rank >= min(pair.shape):
        return float(torch.linalg.matrix_norm(pair.delta()))
    t_b = torch.linalg.qr(pair.b_OR, mode="r").R
    t_a = torch.linalg.qr(pair.a_RI.T, mode="r").R
    return float(torch.linalg.matrix_norm(t_b @ t_a.T))


@dataclass(frozen=True, eq=False)
class CompressedPair:
    """A pair in balanced SVD form, all its singular values before the cut (float64), and what the pair misses."""

    pair: Pair
    singular_values: Tensor
    error: float


def compress_pair(pair: Pair, *, rank: int | None = None, tolerance: float = 0.0) -> CompressedPair:
    """Return the best pair of lower rank, by two QRs and one R × R SVD, all in float64 and then cast back.

    ``tolerance`` is the share of the energy ``Σ σ²`` that may be dropped; 0 drops only what rounding can have made
    (lossless): the largest tail with ``‖tail‖ ≤ (eps + R · eps64) · √(Σ_j ‖b_j‖² ‖a_j‖²)``. The root bounds what
    rounding every slot j to its dtype changes; the second term is the rounding of this computation.
    ``rank`` caps the result. ``error`` is the Frobenius distance of the kept pair: ``√(Σ_{i>q} σ_i²)``, the least that
    any pair of that rank can have (Eckart–Young), and the rounding of its factors, below ``eps`` of the norm.
    Costs ``4(O+I)R² + O(R³)`` instead of the SVD of an O × I matrix.

    Raises:
        AdapterError: if the pair holds a number that is not finite, ``rank`` is not a whole number of 1 or more, or
            ``tolerance`` not at least 0 and below 1.
    """
    _check_cut(rank, tolerance)
    dtype = torch.float64 if pair.b_OR.dtype == torch.float64 else torch.float32
    device = pair.b_OR.device
    place = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    b, a = pair.b_OR.to(place, torch.float64), pair.a_RI.to(place, torch.float64)
    slot_norms = b.norm(dim=0) * a.norm(dim=1)
    if not torch.isfinite(slot_norms).all():
        raise AdapterError("expected finite factors to compress, got NaN or infinity; drop this adapter")
    u, sigma, vt = _svd_of_product(b, a)
    rounding = (torch.finfo(dtype).eps + pair.rank * EPS_64) * float(slot_norms.norm())
    kept = _rank_to_keep(sigma, rounding, rank, tolerance)
    # The sign goes into both factors, so the product does not change; it makes the SVD unique.
    root = _signs(u[:, :kept]) * sigma[:kept].sqrt()
    balanced = Pair(u[:, :kept] * root, root[:, None] * vt[:kept])
    error = math.hypot(float(sigma[kept:].norm()), _rounding_of(balanced, sigma[:kept], dtype))
    return CompressedPair(balanced.to(dtype).to(device), sigma, error)


def _check_cut(rank: int | None, tolerance: float) -> None:
    if rank is not None and not (isinstance(rank, Integral) and rank >= 1):
        raise AdapterError(
            f"rank: expected a whole number of 1 or more to compress to, got {rank!r}; choose another rank"
        )
    if not (isinstance(tolerance, Real) and 0.0 <= tolerance < 1.0):
        raise AdapterError(
            f"tolerance: expected a share of the energy to drop, at least 0 and below 1, got {tolerance!r}; "
            "choose another tolerance"
        )


def _svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # From this rank on the dense product is smaller than its factors, and one SVD of it is cheaper.
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        u, sigma, vt = torch.linalg.svd(b @ a, full_matrices=False)
        return u, sigma, vt
    q_b, t_b = torch.linalg.qr(b)
    q_a, t_a = torch.linalg.qr(a.T)
    u, sigma, vt = torch.linalg.svd(t_b @ t_a.T)
    return q_b @ u, sigma, vt @ q_a.T


def _rank_to_keep(sigma: Tensor, rounding: float, rank: int | None, tolerance: float) -> int:
    energy = sigma.square()
    dropped = energy.flip(0).cumsum(0).flip(0)  # dropped[i]: the energy of σ_i and all smaller ones
    needed = int((dropped > max(tolerance * float(energy.sum()), rounding**2)).sum())
    return needed if rank is None else min(needed, rank)


def right_space(matrix_NI: Tensor, rank: int) -> Tensor:
    """Return the right singular vectors of the ``rank`` largest singular values as rows, fewer where fewer are not 0.

    Zero is what rounding the matrix to fp32 can have made. Computed in float64; the sign of each row makes it unique.
    """
    _, sigma, vt = torch.linalg.svd(matrix_NI.to("cpu", torch.float64), full_matrices=False)
    rounding = torch.finfo(torch.float32).eps * float(sigma[:1].sum())
    kept = vt[: min(rank, int((sigma > rounding).sum()))]
    signed: Tensor = _signs(kept.T)[:, None] * kept
    return signed


def _rounding_of(exact: Pair, sigma: Tensor, dtype: torch.dtype) -> float:
    """Return how far rounding its factors moves a balanced product, whose slots are orthogonal and of norm √σ."""
    moved_b = exact.b_OR - exact.b_OR.to(dtype)
    moved_a = exact.a_RI - exact.a_RI.to(dtype)
    moved = torch.cat([moved_b.norm(dim=0), moved_a.norm(dim=1)])
    norms_of_other_factor = sigma.sqrt().repeat(2)
    return float(moved.mul_(norms_of_other_factor).norm())


def _signs(u: Tensor) -> Tensor:
    """Return ±1 per column so that its largest entry becomes positive: an SVD made unique."""
    if u.shape[1] == 0:
        return u.new_ones(0)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(u.dtype)


# ---- the same on whole adapters ----------------------------------------------------------------------------------


def stack(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Return the adapter whose every delta is ``Σ w_k delta_k``, exactly.

    Raises:
        AdapterError: if the adapters do not cover the same modules in the same shapes.
    """
    check_alike(adapters)
    return Adapter({name: stack_pairs([adapter[name] for adapter in adapters], weights) for name in adapters[0]})


def covering(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters over the modules of all of them; one that lacked a module holds a pair of rank 0 there."""
    nothing: dict[str, Pair] = {}
    for adapter in adapters:
        nothing |= {name: _nothing_like(pair) for name, pair in adapter.items() if name not in nothing}
    return [Adapter({name: adapter.get(name, nothing[name]) for name in sorted(nothing)}) for adapter in adapters]


def _nothing_like(pair: Pair) -> Pair:
    """Return a pair of rank 0 of the same shape, on the same device."""
    (num_out, num_in), device = pair.shape, pair.b_OR.device
    return Pair(torch.zeros(num_out, 0, device=device), torch.zeros(0, num_in, device=device))


def united(adapters: Iterable[Adapter]) -> Adapter:
    """Return the sum of adapters whose modules may differ: nothing of nothing, one alone as it is."""
    present = [adapter for adapter in adapters if adapter]
    return total(covering(present) if len(present) > 1 else present)


def total(adapters: Iterable[Adapter]) -> Adapter:
    """Return the sum of what is there: nothing of nothing, one alone as it is, several stacked."""
    present = [adapter for adapter in adapters if adapter]
    if not present:
        return Adapter()
    return present[0] if len(present) == 1 else stack(present, [1.0] * len(present))


def check_alike(adapters: Sequence[Adapter]) -> None:
    """Check that all adapters cover the same modules in the same shapes.

    Raises:
        AdapterError: they do not.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if other.keys() != first.keys():
            differing = sorted(other.keys() ^ first.keys())[0]
            raise AdapterError(
                f"expected adapters of the same modules, {differing} is in one and not in the other; use adapters of "
                "one model.target_modules"
            )
        for name, shape in first.shapes.items():
            if other[name].shape != shape:
                raise AdapterError(
                    f"{name}: expected one shape (out, in) in all adapters, got {shape} and {other[name].shape}; "
                    "use adapters of one base"
                )


def pad(adapter: Adapter, rank: int) -> Adapter:
    """Append zero slots to every pair up to ``rank``."""
    return Adapter({name: pad_pair(pair, rank) for name, pair in adapter.items()})


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """Keep the first ``rank`` slots of every pair."""
    return Adapter({name: truncate_pair(pair, rank) for name, pair in adapter.items()})


def slots_after(adapter: Adapter, rank: int) -> Adapter:
    """Return the slots that :func:`truncate` leaves out, of the pairs that have any."""
    left = {name: Pair(pair.b_OR[:, rank:], pair.a_RI[rank:]) for name, pair in adapter.items() if pair.rank > rank}
    return Adapter(left)


def inners(left: Adapter, right: Adapter) -> dict[str, float]:
    """Return the inner product of the deltas of every module."""
    return {name: inner_of_pairs(left[name], right[name]) for name in left}


def inner(left: Adapter, right: Adapter) -> float:
    """Return the sum over modules of the inner products of the deltas."""
    return sum(inners(left, right).values())


def norm(adapter: Adapter) -> float:
    """Return the Frobenius norm of all deltas together."""
    return math.sqrt(max(inner(adapter, adapter), 0.0))


def distances(left: Adapter, right: Adapter) -> dict[str, float]:
    """Return the Frobenius norm of the difference of the deltas of every module."""
    return {name: norm_of_difference(left[name], right[name]) for name in left}


def distance(left: Adapter, right: Adapter) -> float:
    """Return the Frobenius norm of the difference of all deltas together."""
    return math.hypot(*distances(left, right).values())


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed adapter, every module's spectrum before the cut, and its distance from what was given."""

    adapter: Adapter
    spectrum: dict[str, Tensor]
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """The distance over all modules together."""
        return math.hypot(*self.errors.values())

    def within(self, tolerance: float) -> Adapter:
        """Return the first directions of every module: those that :func:`compress` at this tolerance would keep."""
        ranks = {name: _rank_to_keep(sigma, 0.0, None, tolerance) for name, sigma in self.spectrum.items()}
        return Adapter({name: truncate_pair(pair, ranks[name]) for name, pair in self.adapter.items()})


def compress(adapter: Adapter, *, rank: int | None = None, tolerance: float = 0.0) -> Compressed:
    """Compress every pair; see :func:`compress_pair`. ``errors`` is by module, ``error`` over all together.

    Raises:
        AdapterError: as for :func:`compress_pair`, naming the module that is not finite.
    """
    check_finite(adapter, "the adapter to compress", "drop it")
    parts = {name: compress_pair(pair, rank=rank, tolerance=tolerance) for name, pair in adapter.items()}
    return Compressed(
        Adapter({name: part.pair for name, part in parts.items()}),
        {name: part.singular_values for name, part in parts.items()},
        {name: part.error for name, part in parts.items()},
    )
