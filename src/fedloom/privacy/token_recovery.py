"""Which tokens a client's update was made from: those whose inputs lie in the span of the factors' change.

A linear layer's gradient at A is a sum over the tokens of its inputs, ``∇A = Σ_t (Bᵀ g_t) x_tᵀ``, so its rows lie in
the span of the x_t. In the first block the input is a function of the token alone, which anybody who has the base can
compute for the whole vocabulary. With no more tokens than the rows together have rank, the tokens of a batch are
exactly those whose input lies in the span. Otherwise, and after steps of AdamW, which bend the span, each token has
the share of its input that does, and the tokens of the batch have more of it than others: a ranking, not a proof.

While B is zero A does not move, and what moves is B: ``∇B = Σ_t g_t (A x_t)ᵀ`` shows inputs through R numbers only,
far fewer than tokens. Its energy along each token's ``A x`` is then the score.

Inputs are whitened first: what all tokens have in common says nothing of one.

Letters: V vocabulary, I inputs, R rank, M rows of all modules together.
Source: the span check of DAGER (Petrov et al., 2024), which is exact for full gradients and for LoRA of a rank above
the number of tokens; deviation: a score in place of its threshold, whitening, and no second layer for the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.lora.pair import Adapter
from fedloom.privacy.membership import chance_above

RIDGE = 0.1
"""Whitening does not divide by less than this share of the mean energy of a direction."""
_NONE = 1e-6
"""A direction of less than this share of the largest singular value is rounding."""


class TokenInputs:
    """The inputs of all tokens in one layer, whitened; ``inputs_VI`` is of float64."""

    def __init__(self, inputs_VI: Tensor) -> None:
        energy_I, directions_II = torch.linalg.eigh(inputs_VI.T @ inputs_VI / len(inputs_VI))
        scale_I = (energy_I.clamp(min=0.0) + RIDGE * energy_I.mean()) ** -0.5
        self._whiten_II = directions_II * scale_I @ directions_II.T
        self._tokens_VI = torch.nn.functional.normalize(inputs_VI @ self._whiten_II, dim=1)

    def in_span(self, rows_MI: Tensor) -> Tensor:
        """Return of each token (V,) the share of its input's energy that lies in the span of the rows.

        Of a span of more than half of the layer's width, the stronger half counts: all inputs lie in the whole.
        """
        _, strengths, directions = torch.linalg.svd(rows_MI @ self._whiten_II, full_matrices=False)
        rank = int((strengths > _NONE * strengths[0]).sum())
        chosen = directions[: min(rank, rows_MI.shape[1] // 2)]
        share_V: Tensor = (self._tokens_VI @ chosen.T).square().sum(1)
        return share_V

    def energy(self, rows_MI: Tensor) -> Tensor:
        """Return of each token (V,) the energy of the rows along its input, 1 on average."""
        found_V: Tensor = (self._tokens_VI @ (rows_MI @ self._whiten_II).T).square().sum(1)
        return found_V / found_V.mean()


def token_scores(start: Adapter | None, seen: Adapter, inputs: Mapping[str, Tensor]) -> NDArray[np.float64] | None:
    """Return a score per token (V,), higher for what the client more probably read; None where nothing moved.

    ``start`` is what the client trained from; None where ``seen`` is a gradient. ``inputs`` (V, I) are by module, of
    those whose input is known; modules that share them are taken together.
    """
    changes = {module: _changed(start, seen, module) for module in inputs if module in seen}
    a_of = {module: a_RI for module, (a_RI, _) in changes.items() if bool(a_RI.any())}
    if a_of:
        return _summed([TokenInputs(known).in_span(rows) for known, rows in _together(a_of, inputs)])
    if start is None:
        return None
    b_of = {module: b_OR for module, (_, b_OR) in changes.items() if bool(b_OR.any())}
    return _summed(
        [
            TokenInputs(inputs[module].double() @ start[module].a_RI.double().T).energy(b_OR)
            for module, b_OR in b_of.items()
        ]
    )


def _together(rows_of: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Join the rows of modules that have the same inputs."""
    groups: list[tuple[Tensor, list[Tensor]]] = []
    for module, rows in rows_of.items():
        known = inputs[module].double()
        same = next((found for other, found in groups if torch.equal(other, known)), None)
        if same is None:
            groups.append((known, [rows]))
        else:
            same.append(rows)
    return [(known, torch.cat(rows)) for known, rows in groups]


def _changed(start: Adapter | None, seen: Adapter, module: str) -> tuple[Tensor, Tensor]:
    a_RI, b_OR = seen[module].a_RI.double(), seen[module].b_OR.double()
    if start is None:
        return a_RI, b_OR
    return a_RI - start[module].a_RI.double(), b_OR - start[module].b_OR.double()


def _summed(scores: Sequence[Tensor]) -> NDArray[np.float64] | None:
    return torch.stack(list(scores)).sum(0).numpy() if scores else None


@dataclass(frozen=True)
class Recovery:
    """What a ranking of tokens gives away of one client's rows, or on average of several.

    As many tokens are named as the rows have different ones, so that precision and recall are one number.

    Attributes:
        named: share of the tokens named that the client read.
        named_of_control: share of them that another client's rows hold: what is common to all text.
        commonest: share of the commonest public tokens that the client read: a guess without an attack; None without
            public text.
        auc: chance that a token that only the client read is above one that only the other did; 0.5 is a guess, since
            which of two clients sent the update is all that decides.
        num_tokens: different tokens of the rows.
    """

    named: float
    named_of_control: float
    commonest: float | None
    auc: float | None
    num_tokens: float


def recovery(
    scores: NDArray[np.float64],
    own: NDArray[np.int64],
    control: NDArray[np.int64],
    public: NDArray[np.int64] | None = None,
) -> Recovery:
    """Judge scores by the tokens (each once) that a client read and those that another did.

    ``public`` are counts (V,) of tokens in public text.
    """
    named = _first(scores, len(own))
    only_own, only_control = np.setdiff1d(own, control), np.setdiff1d(control, own)
    is_told = len(only_own) and len(only_control)
    return Recovery(
        named=float(np.isin(named, own).mean()),
        named_of_control=float(np.isin(named, control).mean()),
        commonest=None if public is None else float(np.isin(_first(public, len(own)), own).mean()),
        auc=chance_above(scores[only_own], scores[only_control]) if is_told else None,
        num_tokens=len(own),
    )


def mean_recovery(found: Sequence[Recovery]) -> Recovery:
    """Return the means over clients."""

    def mean(name: str) -> float | None:
        values = [value for one in found if (value := getattr(one, name)) is not None]
        return float(np.mean(values)) if values else None

    named, control, tokens = mean("named"), mean("named_of_control"), mean("num_tokens")
    assert named is not None
    assert control is not None
    assert tokens is not None
    return Recovery(named, control, mean("commonest"), mean("auc"), tokens)


def _first(scores: NDArray[np.float64] | NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.argsort(-scores, kind="stable")[:count]
