"""Generate with the model still cut: every part keeps the keys and values of its own blocks, activations cross.

Per new token one token's activations go up and, where the server has the head, one token id comes back; in a U-shape
activations come back instead and the text never leaves the client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.errors import EvaluationError
from fedloom.models.cut import Part
from fedloom.split.codecs import WireDtype, encode
from fedloom.split.cut_messages import SplitMessage
from fedloom.training.output_head import OutputHead


@dataclass(frozen=True)
class SplitGeneration:
    """New tokens of one prompt, and the bytes that crossed each way for them."""

    new_ids: tuple[int, ...]
    upload_bytes: int
    download_bytes: int


class SplitDecoder:
    """A model in parts that decodes one sequence; each part has a cache of its own.

    ``parts`` are client and server, or client, server and the client's tail. What a step returns are the logits of
    the next token, on the side that has the head.
    """

    def __init__(self, parts: Sequence[Part], head: OutputHead, wire_dtype: WireDtype) -> None:
        self._parts, self._head, self._wire = list(parts), head, wire_dtype
        self._caches = [part.new_cache() if part.stop > part.start else None for part in parts]
        self._seen = 0
        self.upload_bytes = self.download_bytes = 0

    @torch.no_grad()
    def step(self, ids_T: Tensor) -> Tensor:
        """Take new tokens (T,) in and return the logits (V,) behind the last of them."""
        positions = torch.arange(self._seen, self._seen + len(ids_T), device=ids_T.device)[None]
        hidden = ids_T[None]
        for index, (part, cache) in enumerate(zip(self._parts, self._caches, strict=True)):
            if index:
                hidden = self._cross(hidden, index)
            hidden = part(hidden, position_ids=positions, past_key_values=cache, use_cache=cache is not None)
        self._seen += len(ids_T)
        return self._head.logits(hidden[0, -1:])[0]

    def _cross(self, hidden_BTD: Tensor, index: int) -> Tensor:
        """Send activations over the cut before part ``index``; odd cuts lead up, even ones down."""
        matrix = encode(hidden_BTD[0], self._wire)
        message = SplitMessage("activations" if index == 1 else "hidden", 0, self._seen, 0, matrix)
        if index == 1:
            self.upload_bytes += message.num_bytes
        else:
            self.download_bytes += message.num_bytes
        return matrix.decode(hidden_BTD.dtype)[None]


def generate(
    parts: Sequence[Part],
    head: OutputHead,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    wire_dtype: WireDtype = "bf16",
    on_token: Callable[[int], None] = lambda token: None,
) -> SplitGeneration:
    """Decode greedily until ``stop_ids`` or the limit, calling ``on_token`` as tokens come.

    Law: with the fp32 wire, the tokens are those of the uncut model.

    Raises:
        EvaluationError: if the prompt is empty, or it and the new tokens exceed the model's context.
    """
    context = getattr(parts[0].decoder.config, "max_position_embeddings", None)
    if not prompt_ids or (context is not None and len(prompt_ids) + max_new_tokens > context):
        raise EvaluationError(
            f"generate: expected a prompt of 1 to {(context or 0) - max_new_tokens} tokens "
            f"(context {context}, {max_new_tokens} new), got {len(prompt_ids)}; shorten it or ask for fewer"
        )
    device = next(parts[0].decoder.parameters()).device
    decoder, new_ids = SplitDecoder(parts, head, wire_dtype), []
    logits_V = decoder.step(torch.tensor(list(prompt_ids), device=device))
    while True:
        token = int(logits_V.argmax())
        if token in stop_ids:
            break
        new_ids.append(token)
        on_token(token)
        if len(new_ids) == max_new_tokens:
            break
        logits_V = decoder.step(torch.tensor([token], device=device))
    returned = 0 if len(parts) > 2 else 4 * (len(new_ids) + 1)
    return SplitGeneration(tuple(new_ids), decoder.upload_bytes, decoder.download_bytes + returned)
