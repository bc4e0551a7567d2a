"""A model's own code: whatever it raises becomes one line that names the model, with the cause kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedloom.errors import FedloomError, ModelError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_ADVICE = "choose another base, or other model.target_modules"


@contextmanager
def foreign_forward(model: Any, advice: str = _ADVICE) -> Iterator[None]:
    """Say in one line which model's forward raised what, and what to do.

    Raises:
        ModelError: in place of any error but our own and those of a full memory.
    """
    try:
        yield
    except (FedloomError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), "no detail")
        if any(text in told.lower() for text in _OUT_OF_MEMORY):
            raise
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ModelError(
            f"model.base: the forward of {kind!r} raised {type(error).__name__}: {told}; {advice}"
        ) from error
