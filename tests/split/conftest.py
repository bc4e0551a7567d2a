"""A split run on a tiny model, set up as a test needs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from split.split_cases import PLAN, SGD, SetUp, random_rows, wrapped

from fedloom.data.tokens import TokenSet
from fedloom.federation.server import ServerRules
from fedloom.lora.layer import LoRAModel
from fedloom.methods.server_steps import PlainStep
from fedloom.methods.strategy import Weighting
from fedloom.methods.zero_padding import fedit
from fedloom.split.local_parties import local_parties
from fedloom.split.parties import SplitParties


@pytest.fixture
def set_up() -> SetUp:
    """Return a function that sets up a run on a tiny Llama, the shared plan changed as told."""

    def build(
        make_strategy: Any = None, make_optimiser: Any = SGD, case: str = "llama", **changes: Any
    ) -> tuple[LoRAModel, SplitParties, list[TokenSet]]:
        every, rounds = changes.get("aggregate_every", PLAN.aggregate_every), changes.pop("num_rounds", 2)
        plan = replace(PLAN, **{"num_steps": every * rounds, **changes})
        lora = wrapped(case)
        rows = [random_rows(n, seed) for seed, n in enumerate(plan.num_rows)]
        strategy = make_strategy or (lambda cohort: fedit(cohort, Weighting.TOKENS))
        return lora, local_parties(lora, plan, rows, strategy, ServerRules(PlainStep()), make_optimiser), rows

    return build
