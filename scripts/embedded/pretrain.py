"""Pretrain the small Llama: rows of like length beside each other, loss on what follows and not on what is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from embedded.tokenizer import CONTEXT_TOKENS
from fedloom import seeding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerFast

IGNORED = -100


@dataclass(frozen=True)
class Pretraining:
    """How long and how fast the base is trained."""

    steps: int = 2200
    batch_size: int = 64
    learning_rate: float = 6e-3
    warmup_steps: int = 50
    batches_sorted_together: int = 16


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the architecture: Llama with grouped-query attention and a tied head."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def described(architecture: LlamaConfig) -> str:
    """Return the architecture's size in words."""
    return (
        f"{architecture.num_hidden_layers} layers × {architecture.hidden_size}, "
        f"{architecture.num_attention_heads} heads over {architecture.num_key_value_heads} key-value heads, "
        f"MLP {architecture.intermediate_size}, context {architecture.max_position_embeddings}, tied head"
    )


def fresh_model(architecture: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Return a model whose weights come from a named stream; norms stay at one.

    Matrices (O, I) are normal with deviation I^-1/2, so that attention is not flat at the start; what writes to the
    residual stream (o_proj, down_proj) and the embedding are smaller.
    """
    model = LlamaForCausalLM(architecture)
    generator = seeding.torch_stream(seed, "pretrain", "weights")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            quiet = any(part in name for part in ("o_proj", "down_proj", "embed_tokens"))
            std = 0.02 if quiet else parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def tokenized(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Return (ids, labels) of each (prompt, answer): BOS in front, EOS at the end, no loss on the prompt.

    The answer's tokens are those that begin behind the prompt's last character.
    """
    encoded = tokenizer([prompt + answer for prompt, answer in pairs], return_offsets_mapping=True)
    rows = []
    for (prompt, _), ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        labels = [
            token if start >= len(prompt) and end > start else IGNORED
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
        rows.append(([*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]))
    return rows


def padded(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids_BT and labels_BT of some rows, filled up on the right."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return ids_BT, labels_BT


def batches(num_rows: int, lengths: Sequence[int], settings: Pretraining, seed: int) -> Iterator[list[int]]:
    """Yield ``settings.steps`` batches of row numbers; within a group of batches, rows of like length go together."""
    rng = seeding.stream(seed, "pretrain", "batches")
    group = settings.batch_size * settings.batches_sorted_together
    done = 0
    while done < settings.steps:
        drawn = sorted((int(row) for row in rng.permutation(num_rows)[:group]), key=lengths.__getitem__)
        for start in rng.permutation(range(0, len(drawn), settings.batch_size)):
            if done < settings.steps:
                yield drawn[int(start) : int(start) + settings.batch_size]
                done += 1


def learning_rate(step: int, settings: Pretraining) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine to a twentieth."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))


def _optimisers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for the embedding and the norms; the schedule sets their rate."""
    named = dict(model.named_parameters())
    matrices = [name for name, parameter in named.items() if parameter.dim() == 2 and "embed_tokens" not in name]
    others = [parameter for name, parameter in named.items() if name not in matrices]
    return [
        torch.optim.Muon([named[name] for name in matrices], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM,
    rows: Sequence[tuple[list[int], list[int]]],
    pad_id: int,
    settings: Pretraining,
    seed: int,
) -> Iterator[float]:
    """Train ``model`` in place; yield each step's mean loss in nats per token."""
    optimisers = _optimisers(model)
    model.train()
    for step, chosen in enumerate(batches(len(rows), [len(ids) for ids, _ in rows], settings, seed)):
        ids_BT, labels_BT = padded([rows[index] for index in chosen], pad_id)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        loss = functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = learning_rate(step, settings)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        yield loss.item()
    model.eval()
