"""Both kinds of linear layer for every law."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
