"""How many threads a step is spread over: the settings', or those that have a core and fit the token budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedloom.assembly.cores import cores_here
from fedloom.config import Settings
from fedloom.training import cores
from fedloom.training.cores import share_cores

Make = Callable[..., Settings]


@pytest.mark.parametrize(
    ("changes", "sharers", "expected"),
    [
        ({}, 1, 6),
        ({"engine__cores": 11}, 1, 11),
        ({"engine__threads": 2}, 1, 3),
        ({"training__token_budget": 3000}, 1, 2),
        ({"training__token_budget": 100}, 1, 1),
        ({}, 2, 3),
        ({}, 9, 1),
        ({"engine__name": "ray", "engine__cpus_per_worker": 4.0}, 1, 4),
        ({"engine__name": "ray", "engine__cpus_per_worker": 0.5}, 1, 1),
    ],
)
def test_a_step_has_as_many_threads_as_have_a_core(
    settings_for: Make, changes: dict[str, Any], sharers: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_usable", lambda: 6)
    monkeypatch.setattr(cores, "_sharers", 1)
    share_cores(sharers)
    assert cores_here(settings_for(**changes)) == expected
