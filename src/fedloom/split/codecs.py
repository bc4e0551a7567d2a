"""How activations and their gradients are written for the wire: a smaller type, and what that type loses carried over.

Letters: T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

WireDtype = Literal["fp32", "fp16", "bf16", "int8"]
"""What a number is on the wire; ``int8`` comes with one fp32 scale per token."""

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES = {**_FLOATS, "int8": torch.int8}
"""The torch dtype of each."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A matrix (T, D) as it crosses: ``values_TD`` in the wire's type and, for int8, ``scales_T`` in fp32."""

    values_TD: Tensor
    scales_T: Tensor | None = None

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in the receiver's type."""
        if self.scales_T is None:
            return self.values_TD.to(dtype)
        return self.values_TD.to(dtype) * self.scales_T.to(dtype)[:, None]


def encode(matrix_TD: Tensor, wire: WireDtype) -> Encoded:
    """Write a matrix for the wire.

    int8 rounds each token to 255 steps of its own largest magnitude m, so no number is off by more than ``m / 254``.
    A number that fp16 cannot hold becomes infinite, which the receiver notices.
    """
    match wire:
        case "fp32" | "fp16" | "bf16":
            return Encoded(matrix_TD.detach().to(_FLOATS[wire]))
        case "int8":
            matrix_TD = matrix_TD.detach().float()
            scales_T = matrix_TD.abs().amax(dim=1) / 127.0
            steps = torch.where(scales_T > 0, scales_T, torch.ones_like(scales_T))
            return Encoded((matrix_TD / steps[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales_T)
        case _:
            assert_never(wire)


def bytes_per_token(width: int, wire: WireDtype) -> int:
    """Return what one token's activations weigh on the wire."""
    return width + 4 if wire == "int8" else width * _FLOATS[wire].itemsize


class ErrorFeedback:
    """Carry the rounding error of what was sent to a client into what it is sent next.

    Tokens differ from step to step, so the residual kept is the error summed over tokens, one row of D numbers per
    client, spread evenly over the next message's tokens. Law: ``Σ sent + residual = Σ true``, over tokens and steps,
    which is what a bias would see.

    Source: error feedback (Seide et al., 2014; Karimireddy et al., 2019), pooled over tokens, which is ours.
    """

    def __init__(self) -> None:
        self.residuals_D: dict[int, Tensor] = {}

    def encode(self, client: int, matrix_TD: Tensor, wire: WireDtype) -> Encoded:
        """Encode a matrix for a client with its residual added, and keep the new residual."""
        residual_D = self.residuals_D.get(client)
        wanted_TD = matrix_TD.detach()
        if residual_D is not None:
            wanted_TD = wanted_TD + residual_D.to(wanted_TD.dtype) / wanted_TD.shape[0]
        sent = encode(wanted_TD, wire)
        self.residuals_D[client] = (wanted_TD - sent.decode(wanted_TD.dtype)).sum(0)
        return sent
