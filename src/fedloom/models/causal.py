"""Find the causal language model in what holds it, and how many positions it was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedloom.errors import DataError


def causal_lm(model: Any) -> Any:
    """Return the Hugging Face model itself, out of whatever holds it (a ``LoRAModel``, a ``Base``)."""
    return model if hasattr(model, "generate") else model.model


def context_length(model: Any) -> int | None:
    """Return how many positions the model was made for, or None where its config does not say."""
    return context_of(causal_lm(model).config)


def end_ids(model: Any) -> tuple[int, ...]:
    """Return the tokens that end a text by the base's ``generation_config``, which names one, several or none."""
    named = getattr(getattr(causal_lm(model), "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, list | tuple) else [named]
    return tuple(one for one in several if isinstance(one, int))


def context_of(config: Any) -> int | None:
    """Return the number of positions that a model's config states; None where it states none."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(length) if length else None


def longest_row(max_length: int | None, config: Any, named: Callable[[str], str] = "data.{}".format) -> int | None:
    """Return the tokens that a row may have: ``max_length``, by default the model's positions.

    Raises:
        DataError: it is more than those; ``named`` gives the name by which the user set it.
    """
    context = context_of(config)
    if max_length is not None and context is not None and max_length > context:
        raise DataError(
            f"{named('max_length')}: expected at most the base's context of {context} tokens, got {max_length}; lower "
            "it, or drop it"
        )
    return max_length or context
