"""Rules by which few hostile updates cannot decide an aggregate, whatever the method and the ranks.

Every rule first clips: a client's change of the product, and of each factor, is scaled down to the median of its round.
Then, from the Gram matrix ``G_ij = ⟨D_i, D_j⟩`` of the clipped changes of the products alone, which small matrices
give without forming one product:

    cosine   leave out k where ⟨D_k, Σ_{j≠k} D_j / ‖D_j‖⟩ < 0
    krum     leave out the f updates that are farthest from their K − f − 2 nearest ones
    median   p_k ∝ w_k / ‖D_k − Z‖ with Z = Σ p_k D_k, the geometric median

Sources: norm clipping (arXiv 1911.07963); multi-Krum (arXiv 1703.02757); the geometric median by Weiszfeld's iteration
(RFA, arXiv 1912.13445). Deviations: distances are those of products, so that no client gains by factoring its own
otherwise; clipping comes first everywhere; the cosine filter's direction is that of the others, each of norm one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median_low

import torch
from torch import Tensor

from fedloom.lora.algebra import norm
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.client_half import Work
from fedloom.methods.state import Broadcast, Update

_ITERATIONS, _CLOSE = 200, 1e-6


class Robust(StrEnum):
    """Which rule."""

    NONE = "none"
    CLIP = "clip"
    COSINE = "cosine"
    KRUM = "krum"
    MEDIAN = "median"


@dataclass(frozen=True)
class RobustRule:
    """A rule, and the share of a round's updates that may be hostile, rounded up to ``f`` of them (multi-Krum)."""

    kind: Robust = Robust.NONE
    hostile_fraction: float = 0.1

    def num_hostile(self, num_updates: int) -> int:
        """Return f; fewer where the updates are too few for the rule, which needs 2 f + 3 of them."""
        return max(0, min(math.ceil(self.hostile_fraction * num_updates), (num_updates - 3) // 2))


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a rule makes of a round: the updates as they are used, their weights, and why others are left out."""

    updates: Mapping[int, Update]
    weights: Mapping[int, float]
    left_out: Mapping[int, str]


def judge(
    rule: RobustRule,
    updates: Sequence[Update],
    broadcasts: Mapping[int, Broadcast],
    work: Work,
    weigh: Callable[[Update], float],
    trusted: Collection[int] = (),
) -> Verdict:
    """Return a round's updates as a rule lets them count; those of ``trusted`` ones are used as they are."""
    if not updates:
        return Verdict({}, {}, {})
    used = _clipped(updates, broadcasts, work, trusted)
    weights = {update.client: weigh(update) for update in used}
    gram_KK = gram([change_of(update, broadcasts[update.client], work) for update in used])
    out: dict[int, str] = {}
    match rule.kind:
        case Robust.COSINE:
            cosines = _cosines(gram_KK)
            reason = "expected a change along the others', got one at cosine {:.2f} to them (server.robust); check it"
            out = {used[k].client: reason.format(cosine) for k, cosine in enumerate(cosines) if cosine < 0.0}
        case Robust.KRUM:
            reason = "expected a change near others', got one of the {} farthest away (server.robust); check it"
            far = _farthest(gram_KK, rule.num_hostile(len(used)))
            out = {used[k].client: reason.format(len(far)) for k in far}
        case Robust.MEDIAN:
            weights = dict(zip(weights, _median_weights(gram_KK, list(weights.values())), strict=True))
        case Robust.NONE | Robust.CLIP:
            pass
    out = {client: reason for client, reason in out.items() if client not in trusted}
    kept = {update.client: update for update in used if update.client not in out}
    return Verdict(kept, {client: weights[client] for client in kept}, out)


def change_of(update: Update, broadcast: Broadcast, work: Work) -> Adapter:
    """Return the change of a client's product as pairs, exact where factors moved little; float64.

        B A − B_s A_s = (B − B_s) A + B_s (A − A_s)

    Of a gradient it is the gradient itself, each factor beside an identity, cut or filled up to one rank.
    """
    if work.is_gradient:
        return _gradient(update.adapter, work)
    began = broadcast.trained
    if isinstance(began, Draw):
        return update.adapter.to(torch.float64)
    moved = {}
    for name, pair in update.adapter.items():
        start, ended = began[name].to(torch.float64), pair.to(torch.float64)
        b_OR = torch.cat([ended.b_OR - start.b_OR, start.b_OR], dim=1)
        moved[name] = Pair(b_OR, torch.cat([ended.a_RI, ended.a_RI - start.a_RI], dim=0))
    return Adapter(moved)


def gram(changes: Sequence[Adapter]) -> Tensor:
    """Return the inner products (K, K) of changes, from two small matrices a module."""
    found_KK = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for name in changes[0] if changes else ():
        pairs = [change[name].to(torch.float64) for change in changes]
        owner_R = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([pair.rank for pair in pairs]))
        chosen_RK = torch.nn.functional.one_hot(owner_R, len(pairs)).double()
        b_OR, a_RI = torch.cat([pair.b_OR for pair in pairs], dim=1), torch.cat([pair.a_RI for pair in pairs], dim=0)
        found_KK += chosen_RK.T @ ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)) @ chosen_RK
    return found_KK


def _clipped(
    updates: Sequence[Update], broadcasts: Mapping[int, Broadcast], work: Work, trusted: Collection[int]
) -> list[Update]:
    """Scale down what is above the round's median: each factor's change, then that of the product."""
    if not updates:
        return []
    moves = {update.client: _moved(update, broadcasts[update.client], work) for update in updates}
    limits = {factor: median_low([move[factor] for move in moves.values()]) for factor in ("a", "b", "product")}
    return [
        update
        if update.client in trusted or all(moves[update.client][part] <= limits[part] for part in limits)
        else _scaled_down(update, broadcasts[update.client], work, limits)
        for update in updates
    ]


def _moved(update: Update, broadcast: Broadcast, work: Work) -> dict[str, float]:
    """Return the norms of a client's changes: of each factor where a mean may be taken of it, and of the product."""
    moved = {"a": 0.0, "b": 0.0, "product": norm(change_of(update, broadcast, work))}
    began = broadcast.trained
    if not work.is_gradient and not isinstance(began, Draw):
        for factor in "ab":
            before, after = (one.as_tensors(frozenset(factor)) for one in (began, update.adapter))
            moved[factor] = math.hypot(*(float((after[key].double() - before[key].double()).norm()) for key in before))
    return moved


def _scaled_down(update: Update, broadcast: Broadcast, work: Work, limits: Mapping[str, float]) -> Update:
    moved = _moved(update, broadcast, work)
    if work.is_gradient or isinstance(broadcast.trained, Draw):
        share = min(1.0, limits["product"] / moved["product"])
        if not work.is_gradient:
            return replace(update, adapter=update.adapter.scaled(share))
        tensors = {key: tensor * share for key, tensor in update.adapter.as_tensors().items()}
        return replace(update, adapter=Adapter.from_tensors(tensors))
    shares = {factor: min(1.0, limits[factor] / moved[factor]) if moved[factor] else 1.0 for factor in "ab"}
    start = broadcast.trained
    nearer = _towards(update.adapter, start, shares)
    if norm(change_of(replace(update, adapter=nearer), broadcast, work)) > limits["product"]:
        shares = dict.fromkeys("ab", limits["product"] / _reach(nearer, start))
        nearer = _towards(nearer, start, shares)
    return replace(update, adapter=nearer)


def _towards(adapter: Adapter, start: Adapter, shares: Mapping[str, float]) -> Adapter:
    """Return the adapter of which a share of each factor's change from the start is left."""
    before, after = start.as_tensors(), adapter.as_tensors()
    nearer = {}
    for key, tensor in after.items():
        left = before[key].double() + shares[key[-1]] * (tensor.double() - before[key].double())
        nearer[key] = left.to(tensor.dtype)
    return adapter.with_factors(nearer)


def _reach(adapter: Adapter, start: Adapter) -> float:
    """Return what bounds the change of the product: with a share c ≤ 1 of the factors' changes it is below c of this.

    ‖c ΔB A_s + c B_s ΔA + c² ΔB ΔA‖ ≤ c (‖ΔB A_s + B_s ΔA‖ + ‖ΔB ΔA‖)
    """
    linear, square = {}, {}
    for name, pair in adapter.items():
        ended, began = pair.to(torch.float64), start[name].to(torch.float64)
        b_OR, a_RI = ended.b_OR - began.b_OR, ended.a_RI - began.a_RI
        linear[name] = Pair(torch.cat([b_OR, began.b_OR], dim=1), torch.cat([began.a_RI, a_RI], dim=0))
        square[name] = Pair(b_OR, a_RI)
    return norm(Adapter(linear)) + norm(Adapter(square))


def _gradient(adapter: Adapter, work: Work) -> Adapter:
    parts: dict[str, Pair] = {}
    for name, pair in adapter.to(torch.float64).items():
        rank = min(pair.shape)
        eye = torch.eye(pair.rank, rank, dtype=torch.float64)
        parts |= {f"{name}.b": Pair(pair.b_OR, eye)} if "b" in work.sends else {}
        parts |= {f"{name}.a": Pair(eye.T, pair.a_RI)} if "a" in work.sends else {}
    return Adapter(parts)


def _cosines(gram_KK: Tensor) -> list[float]:
    """Return each update's cosine to the sum of the others, all of norm one; 1 where there are no others."""
    norms_K = gram_KK.diagonal().clamp_min(0.0).sqrt().clamp_min(1e-300)
    cosines_KK = gram_KK / norms_K[:, None] / norms_K[None, :]
    found = []
    for k in range(len(norms_K)):
        others = [j for j in range(len(norms_K)) if j != k]
        length = math.sqrt(max(0.0, float(cosines_KK[others][:, others].sum())))
        found.append(float(cosines_KK[k, others].sum()) / length if length > 0.0 else 1.0)
    return found


def _farthest(gram_KK: Tensor, num_hostile: int) -> list[int]:
    """Return the updates whose distances to their nearest ones sum to most."""
    diagonal_K, count = gram_KK.diagonal(), len(gram_KK)
    squares_KK = (diagonal_K[:, None] + diagonal_K[None, :] - 2.0 * gram_KK).clamp_min(0.0)
    nearest = count - num_hostile - 2
    scores = [float(squares_KK[k][torch.arange(count) != k].sort().values[:nearest].sum()) for k in range(count)]
    return sorted(range(count), key=lambda k: (scores[k], k))[count - num_hostile :] if num_hostile else []


def _median_weights(gram_KK: Tensor, weights: Sequence[float]) -> list[float]:
    """Return the weights of which the weighted mean is the geometric median."""
    given_K = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    least = _CLOSE * float(gram_KK.diagonal().clamp_min(0.0).sqrt().median())
    shares_K = given_K.clone()
    for _ in range(_ITERATIONS):
        squares_K = gram_KK.diagonal() - 2.0 * gram_KK @ shares_K + shares_K @ gram_KK @ shares_K
        closer_K = given_K / squares_K.clamp_min(0.0).sqrt().clamp_min(max(least, 1e-300))
        closer_K = closer_K / closer_K.sum()
        if float((closer_K - shares_K).abs().max()) < 1e-12:
            break
        shares_K = closer_K
    return [float(share) for share in shares_K]
