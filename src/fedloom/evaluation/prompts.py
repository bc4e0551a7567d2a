"""Turn prompts into tokens exactly as training did: what the tokenizer puts first, then the text, nothing after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedloom.errors import EvaluationError


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt; a text that brings its own beginning-of-text keeps that one alone.

    Raises:
        EvaluationError: a prompt is no text: bytes of it are not UTF-8, or half a pair of surrogates stands there.
    """
    if not texts:
        return []
    for text in texts:
        _check_is_text(text)
    prefix = prefix_ids(tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [list(row) if prefix and row[: len(prefix)] == prefix else [*prefix, *row] for row in rows]


def _check_is_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        # What comes from the command line or the terminal holds a byte b that is no UTF-8 as U+DC00 + b (PEP 383).
        code = ord(text[cause.start])
        what = f"the byte 0x{code - 0xDC00:x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:X}, half of a character,"
        before = text[max(cause.start - 20, 0) : cause.start]
        raise EvaluationError(
            f"prompt: expected UTF-8 text, got {what} after {before!r}; correct the prompt or its encoding"
        ) from cause


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
