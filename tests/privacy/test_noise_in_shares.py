"""Noise that clients add in shares: those who stay carry all of it at least, and no sum without it is ever seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_link import adapter_of, records_of

from fedloom.config import Settings
from fedloom.errors import SettingsError, UpdateError
from fedloom.experiment import describe, run
from fedloom.federation.sum_terms import SumTerms, numbers_added
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.masked_sums import MaskedSums
from fedloom.methods.options import ClientPrivacy, MethodOptions
from fedloom.methods.private_clients import PrivateClients, SharedA
from fedloom.methods.strategy import Cohort
from fedloom.methods.table import make
from fedloom.privacy.accountant import PrivateStep, epsilon
from fedloom.privacy.ledger import LEDGER
from fedloom.privacy.secure_sum.fixed_point import from_ring, to_ring
from fedloom.privacy.secure_sum.steps import Member, Step

Make = Callable[..., Settings]
SHAPES = {"wide": (400, 7), "narrow": (200, 2)}
CLIP, NOISE, CLIENTS, STAY = 0.7, 1.5, 7, 5
HIDDEN: dict[str, Any] = {
    "method__name": "ffa-lora",
    "method__ranks": 2,
    "method__weighting": "uniform",
    "privacy__unit": "client",
    "privacy__sum": "masked",
    "privacy__noise": "clients",
    "federation__num_clients": 4,
}
IID: dict[str, Any] = {"partition__scheme": "iid", "partition__column": None}


def strategy(shares: int | None = STAY, seed: int = 1, **changes: Any) -> tuple[MaskedSums, PrivateClients]:
    hidden = replace(ClientPrivacy(CLIP, NOISE, float(CLIENTS), shares=shares), **changes)
    made = make(
        "ffa-lora", Cohort(SHAPES, 4, lambda _: 4, seed), MethodOptions("uniform", client_privacy=hidden, masked=True)
    )
    assert isinstance(made, MaskedSums)
    assert isinstance(made.rule, PrivateClients)
    return made, made.rule


def moved(start: Adapter, client: int, size: float) -> Adapter:
    rng = torch.Generator().manual_seed(client)
    factors = {name: pair.b_OR + size * torch.randn(pair.b_OR.shape, generator=rng) for name, pair in start.items()}
    return Adapter({name: Pair(factors[name], pair.a_RI) for name, pair in start.items()})


def on_the_product(strategy: MaskedSums, start: Adapter, numbers: Any) -> torch.Tensor:
    """Return numbers of a sum in the coordinates in which a change has the norm of its product."""
    shared, found, rest = SharedA.of(start), [], torch.from_numpy(np.asarray(numbers))
    for key, (num_out, rank) in strategy.sizes().items():
        found.append((rest[: num_out * rank].view(num_out, rank) @ shared.roots[key[:-2]]).flatten())
        rest = rest[num_out * rank :]
    return torch.cat(found)


@pytest.mark.parametrize("stay", range(STAY, CLIENTS + 1))
def test_the_noise_of_those_who_stay_is_all_of_it_and_their_share_of_the_rest(stay: int) -> None:
    method, rule = strategy()
    start = method.start_for(method.initial(), 0)
    assert isinstance(start, Adapter)
    found = []
    for round in range(1, 5):
        whole = [
            to_ring(
                numbers_added(method, 1, start, moved(start, k, 3.0), 1.0, rule.noise_share(start, round, k)), CLIENTS
            )
            for k in range(stay)
        ]
        quiet = [numbers_added(method, 1, start, moved(start, k, 3.0), 1.0, {}) for k in range(stay)]
        noise = from_ring(np.sum(whole, axis=0, dtype=np.uint64)) - np.sum(quiet, axis=0)
        found.append(on_the_product(method, start, noise))
    numbers = torch.stack(found)
    numbers = numbers[:, numbers.abs().max(0).values > 1e-6]  # where a module's A is flat nothing is released
    assert numbers.numel() == 4 * (400 * 4 + 200 * 2)
    expected = (NOISE * CLIP) ** 2 * stay / STAY
    assert float(numbers.var()) == pytest.approx(expected, rel=0.06)
    assert abs(float(torch.corrcoef(numbers)[0, 1])) < 0.08, "every round's is new"


def test_a_client_adds_at_most_the_clip_beside_its_noise_and_nothing_that_the_product_does_not_show() -> None:
    method, rule = strategy()
    start = method.start_for(method.initial(), 0)
    assert isinstance(start, Adapter)
    assert SharedA.of(start).roots["narrow"].shape == (2, 2)
    flat = Adapter({name: Pair(pair.b_OR, torch.cat([pair.a_RI[:1]] * pair.rank)) for name, pair in start.items()})
    for one in (start, flat):
        added = numbers_added(method, 1, one, moved(one, 3, 50.0), 1.0, {})
        assert float(on_the_product(method, one, added).norm()) == pytest.approx(CLIP)
        assert float(np.linalg.norm(added)) < 1e3
    shared, (key, *_) = SharedA.of(flat), method.sizes()
    alone = rule.summand(1, flat, moved(flat, 3, 50.0), 1.0)[key]
    torch.testing.assert_close(alone @ shared.roots[key[:-2]] @ shared.inverses[key[:-2]], alone)


def test_what_the_server_makes_of_the_sum_has_no_noise_but_the_clients() -> None:
    (method, rule), (_, by_server) = strategy(), strategy(None)
    state = method.initial()
    start = method.start_for(state, 0)
    assert isinstance(start, Adapter)
    assert not by_server.noise_share(start, 1, 0)
    numbers = rule.summand(1, start, moved(start, 1, 0.1), 1.0)
    shares = dict.fromkeys(range(STAY), 1.0)
    found, other = (one.of_sum(state, numbers, shares).start for one in (rule, by_server))
    assert found is not None
    assert other is not None
    for name, pair in start.items():
        wanted = pair.b_OR.double() + numbers[f"{name}.b"] / CLIENTS
        torch.testing.assert_close(found[name].b_OR.double(), wanted, rtol=1e-5, atol=1e-6)
        assert float((other[name].b_OR.double() - wanted).norm()) > 0.01


def test_clients_that_were_told_other_noise_are_in_no_sum_together() -> None:
    terms = SumTerms("a run", 1, "t", (0, 1, 2, 3), 3, 1.0, 1.0)
    contexts = {
        terms.session(strategy(**changes)[0]).context
        for changes in ({}, {"noise_multiplier": 0.1}, {"clip": 9.0}, {"shares": None})
    }
    assert len(contexts) == 4


def test_it_is_refused_where_it_would_hide_less_or_nothing(settings_for: Make) -> None:
    with pytest.raises(SettingsError, match=r"privacy.noise: expected clients only with one method.ranks for all"):
        settings_for(**IID, **{**HIDDEN, "method__ranks": [4, 2, 1, 3]})
    with pytest.raises(SettingsError, match=r"privacy.noise only with .*privacy.sum = masked"):
        settings_for(**IID, **{**HIDDEN, "privacy__sum": "plain"})


@pytest.mark.slow
@pytest.mark.extra("privacy")
@pytest.mark.parametrize("lost", [None, Step.MASKED, Step.TOLD])
def test_masks_change_no_bit_and_the_ledger_is_the_accountants_composition(
    lost: Step | None, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Member.answer

    def leaving(member: Member, step: Step, message: bytes) -> bytes:
        if member.number == 1 and step is lost:
            raise UpdateError("its battery was empty")
        return answer(member, step, message)

    monkeypatch.setattr(Member, "answer", leaving)
    settings = settings_for(**IID, **HIDDEN, privacy__noise_multiplier=2.0)
    summary = run(settings, tmp_path / "masked")
    with monkeypatch.context() as patched:
        for home in ("member", "server"):
            patched.setattr(f"fedloom.privacy.secure_sum.{home}.mask", lambda _, length: np.zeros(length, np.uint64))
        run(settings, tmp_path / "unmasked")
    assert adapter_of(tmp_path / "masked") == adapter_of(tmp_path / "unmasked")
    spent = epsilon({PrivateStep(1.0, 2.0): 2}, 1e-5)
    last = records_of(tmp_path / "masked")[-1]
    assert last["privacy"] == {
        "unit": "client",
        "epsilon": spent,
        "delta": 1e-5,
        "draws": "seed",
        "amplified": False,
        "noise": "clients",
    }
    booked = [json.loads(line) for line in (tmp_path / "masked" / LEDGER).read_text().splitlines()]
    assert [(one["client"], one["round"], one["noise_multiplier"]) for one in booked] == [
        (client, round, 2.0) for round in (1, 2) for client in range(4)
    ]
    planned = describe(settings).privacy
    assert planned is not None
    assert math.isclose(planned.epsilon, spent, rel_tol=1e-2)  # type: ignore[union-attr]
    assert any("added by the clients in shares; where all stay it is 15 % larger" in line for line in planned.lines())
    assert "every client hidden with at most" in summary.lines()[-1]
