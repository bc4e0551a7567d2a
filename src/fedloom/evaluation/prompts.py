"""Turn prompts into tokens exactly as training did: what the tokenizer puts first, then the text, nothing after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt; a text that brings its own beginning-of-text keeps that one alone."""
    if not texts:
        return []
    prefix = prefix_ids(tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [list(row) if prefix and row[: len(prefix)] == prefix else [*prefix, *row] for row in rows]


def prefix_ids(tokenizer: Any) -> list[int]:
    """Return the special ids the tokenizer puts before any text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    return list(encoded["input_ids"][: encoded["special_tokens_mask"].index(0)])


def causal_lm(model: Any) -> Any:
    """Return the Hugging Face model itself, out of whatever holds it (a ``LoRAModel``, a ``Base``)."""
    return model if hasattr(model, "generate") else model.model


def context_length(model: Any) -> int | None:
    """Return how many positions the model was made for, or None where its config does not say."""
    config = causal_lm(model).config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(length) if length else None
