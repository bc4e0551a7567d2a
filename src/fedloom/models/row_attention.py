"""How the rows of a pass attend in a loaded model: packed without padding, or padded, by the model's own attention."""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from fedloom.models.causal import causal_lm

Attention = Literal["packed", "padded"]

USE_PADDED = "set model.attention = padded (slower; not for a model that is cut), or choose another base"
"""What to do where a model cannot run packed."""

_CHOSEN: WeakKeyDictionary[nn.Module, Attention] = WeakKeyDictionary()


def choose_attention(model: Any, attention: Attention) -> None:
    """Let the rows of a model's further passes be packed or padded, in training and in scoring alike."""
    _CHOSEN[causal_lm(model)] = attention


def attention_of(model: Any) -> Attention:
    """Return what was chosen for a model; packed where nothing was."""
    return _CHOSEN.get(causal_lm(model), "packed")
