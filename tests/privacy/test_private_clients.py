"""Whole clients hidden: no client moves the sum by more than the clip, and the noise is what was booked."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.assembly.private_rounds import most_steps, rounds_within_budget
from fedloom.assembly.round_plan import strategy_of
from fedloom.config import Settings, with_method
from fedloom.errors import MethodError, PrivacyError, SettingsError
from fedloom.experiment import describe, run
from fedloom.federation.sampling import sample_poisson
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.makers import zero_padding
from fedloom.methods.options import ClientPrivacy, MethodOptions
from fedloom.methods.private_clients import PrivateClients
from fedloom.methods.state import ServerState, Update
from fedloom.methods.strategy import Cohort
from fedloom.methods.table import make
from fedloom.privacy.ledger import LEDGER
from fedloom.reporting.report import write_report
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

Make = Callable[..., Settings]
SHAPES = {"wide": (5, 7), "narrow": (3, 2)}
RANKS = (4, 2, 1, 4)
CLIP, NOISE, EXPECTED = 0.7, 1.5, 2.5
HIDDEN: dict[str, Any] = {
    "method__name": "ffa-lora",
    "method__weighting": "uniform",
    "privacy__unit": "client",
}
POISSON: dict[str, Any] = {**HIDDEN, "federation__sampling": "poisson", "federation__clients_per_round": 0.5}


def strategy(noise: float = NOISE, seed: int = 1) -> PrivateClients:
    cohort = Cohort(SHAPES, 4, RANKS.__getitem__, seed)
    made = make("ffa-lora", cohort, MethodOptions("uniform", client_privacy=ClientPrivacy(CLIP, noise, EXPECTED)))
    assert isinstance(made, PrivateClients)
    return made


def update(state: ServerState, client: int, size: float) -> Update:
    """Return an update whose B has moved in random directions, at the client's own rank."""
    start, rng = strategy().start_for(state, client), torch_stream(client + 1, "moved")
    assert isinstance(start, Adapter)
    pairs = {
        name: Pair(pair.b_OR + size * torch.randn(pair.b_OR.shape, generator=rng), pair.a_RI)
        for name, pair in start.items()
    }
    return Update(1, client, Adapter(pairs), TrainingStats(1))


def product(adapter: Adapter) -> Tensor:
    return torch.cat([pair.to(torch.float64).delta().flatten() for pair in adapter.values()])


SIZES = (0.01, 3.0, 40.0, 0.2)


def test_adding_or_removing_any_client_moves_the_product_by_at_most_the_clip_and_a_small_one_as_it_is() -> None:
    quiet = strategy(noise=0.0)
    state = quiet.initial()
    updates = [update(state, client, SIZES[client]) for client in range(4)]
    assert state.start is not None
    moved = []
    for cohort in itertools.chain.from_iterable(itertools.combinations(updates, n) for n in range(1, 5)):
        whole = product(quiet.aggregate(state, cohort).applied)
        for one in cohort:
            others = product(quiet.aggregate(state, [other for other in cohort if other is not one]).applied)
            moved.append(float((whole - others).norm()) * EXPECTED)
            alone = float((product(one.adapter) - product(state.start)).norm())
            assert moved[-1] == pytest.approx(min(alone, CLIP), abs=2e-6)
    assert len(moved) == 32
    assert min(moved) < CLIP / 3 < max(moved) <= CLIP + 2e-6


def test_the_noise_on_the_product_is_what_is_booked_in_every_direction_and_is_there_without_any_client() -> None:
    num_seeds, directions = 1000, sum(num_out * min(4, num_in) for num_out, num_in in SHAPES.values())
    quiet = strategy(noise=0.0)
    state = replace(quiet.initial(), round=4)
    draws = [product(strategy(seed=seed).aggregate(state, []).applied) for seed in range(num_seeds)]
    seen = torch.stack(draws) * EXPECTED
    assert seen.mean(0).abs().max() < 0.2
    values = torch.linalg.eigvalsh(seen.T @ seen / num_seeds).flip(0)
    assert values[directions:].abs().max() < 1e-9
    deviations = values[:directions].sqrt() / (NOISE * CLIP)
    assert deviations.square().mean().sqrt() == pytest.approx(1.0, abs=0.02)
    assert 0.8 < float(deviations.min()) < float(deviations.max()) < 1.2


def test_sums_merge_and_their_order_and_a_client_that_is_not_finite_do_not_show() -> None:
    hidden = strategy()
    state = hidden.initial()
    updates = [update(state, client, SIZES[client]) for client in range(4)]
    whole = hidden.aggregate(state, updates)
    first, second = hidden.empty(state), hidden.empty(state)
    for one in updates[2:]:
        first.add(one)
    for one in updates[:2]:
        second.add(one)
    first.merge(second)
    merged = hidden.finish(state, first)
    assert torch.equal(product(merged.applied), product(whole.applied))
    assert merged.weights == whole.weights == dict.fromkeys(range(4), 1 / EXPECTED)
    broken = update(state, 3, math.inf)
    assert torch.equal(
        product(hidden.aggregate(state, [*updates[:3], broken]).applied),
        product(hidden.aggregate(state, updates[:3]).applied),
    )
    assert float((product(whole.applied) - product(whole.ideal)).norm()) > 0.0
    assert (
        hidden.aggregate(replace(state, round=1), updates).applied["wide"].b_OR[0, 0]
        != whole.applied["wide"].b_OR[0, 0]
    )


def test_system_noise_never_repeats() -> None:
    seeded = strategy()
    system = replace(seeded, privacy=replace(seeded.privacy, draws="system"))
    state = seeded.initial()
    once, again = (product(system.aggregate(state, []).applied) for _ in range(2))
    assert not torch.equal(once, again)
    assert 0.2 < float(once.norm() / product(seeded.aggregate(state, []).applied).norm()) < 5.0


def test_a_method_that_sends_a_too_is_refused() -> None:
    cohort = Cohort(SHAPES, 4, RANKS.__getitem__, 1)
    with pytest.raises(MethodError, match="expected clients that train and send B alone"):
        PrivateClients(zero_padding(cohort, MethodOptions()), ClientPrivacy(CLIP, NOISE, EXPECTED))


def test_poisson_draws_each_client_by_itself() -> None:
    cohorts = [sample_poisson(3, round, 40, 0.05) for round in range(1, 401)]
    sizes = [len(cohort) for cohort in cohorts]
    assert sum(sizes) / 400 == pytest.approx(2.0, abs=0.2)
    assert 0 in sizes
    assert max(sizes) >= 5
    assert cohorts[0] == sample_poisson(3, 1, 40, 0.05)
    together = sum({0, 1} <= set(cohort) for cohort in [sample_poisson(3, round, 2, 0.5) for round in range(1, 401)])
    assert together / 400 == pytest.approx(0.25, abs=0.06)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.extra("privacy")
def test_a_resumed_run_has_the_same_bits_and_its_ledger_is_one_composition_by_dp_accounting(
    settings_for: Make, tmp_path: Path
) -> None:
    import dp_accounting
    from dp_accounting import pld

    own = {**POISSON, "privacy__noise_multiplier": 1.3, "wire__dtype": "int4", "training__moments": "own"}
    run(settings_for(**own, federation__num_rounds=3), tmp_path / "one")
    for rounds in (1, 3):
        run(settings_for(**own, federation__num_rounds=rounds), tmp_path / "many")
    assert adapter(tmp_path / "many") == adapter(tmp_path / "one")
    assert (tmp_path / "many" / LEDGER).read_bytes() == (tmp_path / "one" / LEDGER).read_bytes()
    sizes = [len(record["clients"]) for record in records(tmp_path / "one")]
    assert len(set(sizes)) > 1, "a Poisson cohort has no fixed size"
    independent = pld.PLDAccountant()
    independent.compose(dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(1.3)), 3)
    last = records(tmp_path / "one")[-1]
    assert last["privacy"]["epsilon"] == pytest.approx(independent.get_epsilon(1e-5), abs=1e-6)
    assert all(client["epsilon"] == last["privacy"]["epsilon"] for client in last["clients"])


@pytest.mark.extra("privacy")
def test_without_a_secret_draw_each_client_pays_in_full_for_its_own_rounds(settings_for: Make, tmp_path: Path) -> None:
    import dp_accounting
    from dp_accounting import pld

    settings = settings_for(
        **HIDDEN, federation__clients_per_round=2, federation__num_rounds=2, server__step="momentum"
    )
    summary = run(settings, tmp_path / "run")
    costs = []
    for times in (1, 2):
        independent = pld.PLDAccountant()
        independent.compose(dp_accounting.GaussianDpEvent(1.0), times)
        costs.append(pytest.approx(independent.get_epsilon(1e-5), abs=1e-6))
    asked: dict[int, int] = {}
    for record in records(tmp_path / "run"):
        for client in record["clients"]:
            asked[client["client"]] = asked.get(client["client"], 0) + 1
            assert client["epsilon"] == costs[asked[client["client"]] - 1]
    assert set(asked.values()) == {1, 2}
    said = "every client hidden with at most ε = "
    assert said in summary.lines()[-1]
    assert "counted without amplification by sampling; a simulation" in summary.lines()[-1]
    write_report([tmp_path / "run"], tmp_path / "report.html")
    assert said in (tmp_path / "report.html").read_text()
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"| privacy | {said}" in card
    assert "bytes up" not in card
    assert "aggregation noise" not in card
    planned = describe(settings).privacy
    assert planned is not None
    (first, second) = planned.lines()
    assert summary.privacy is not None
    assert float(first.split("ε = ")[1].split()[0]) == pytest.approx(summary.privacy["epsilon"], rel=2e-3)
    assert "counted without amplification by sampling" in first
    assert "times as large as a mean change" in second


@pytest.mark.extra("privacy")
def test_a_round_is_booked_before_anybody_is_asked(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedloom.clients.shared_base.train_cohort", killed)
        with pytest.raises(KeyboardInterrupt):
            run(settings_for(**HIDDEN), tmp_path / "run")
    booked = [json.loads(line) for line in (tmp_path / "run" / LEDGER).read_text().splitlines()]
    assert [(one["client"], one["round"], one["rate"]) for one in booked] == [(c, 1, 1.0) for c in (0, 1, 2)]


@pytest.mark.slow
@pytest.mark.extra("privacy")
def test_the_budget_ends_the_run_before_the_round_that_would_pass_it_and_again_when_it_is_run_again(
    settings_for: Make, tmp_path: Path
) -> None:
    plain = {**POISSON, "federation__num_rounds": 4, "evaluation__every": 0}
    planned = describe(settings_for(**plain, privacy__max_epsilon=4.0)).privacy
    assert planned is not None
    told = planned.as_dict()
    assert 0 < told["allowed_rounds"] < 4
    assert told["rate"] == 0.5
    assert told["expected_clients"] == 1.5
    assert f"ends the run after {told['allowed_rounds']} round" in planned.lines()[-1]
    for _ in range(2):
        summary = run(settings_for(**plain, privacy__max_epsilon=4.0), tmp_path / "run")
        assert summary.num_rounds == told["allowed_rounds"]
        assert summary.eval["loss_nats"] > 0.0
        assert summary.privacy is not None
        assert summary.privacy["epsilon"] <= 4.0
    enough = told["enough_noise"]
    longer = run(settings_for(**plain, privacy__max_epsilon=4.0, privacy__noise_multiplier=enough), tmp_path / "longer")
    assert longer.num_rounds == 4
    with pytest.raises(PrivacyError, match=r"got 4\.\d+ with the first round; set privacy\.noise_multiplier = \d"):
        run(settings_for(**HIDDEN, privacy__max_epsilon=1.0), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"method__name": "fedit"}, r"client only with method.name = ffa-lora, .* noise on A and B both"),
        ({"method__name": "rolora"}, "client only with method.name = ffa-lora"),
        ({"method__name": "fedsa-lora", "method__ranks": 2}, "client only with method.name = ffa-lora"),
        ({"method__name": "standalone"}, "client only with method.name = ffa-lora"),
        ({"method__weighting": "rows"}, r"method.weighting: expected uniform with privacy.unit = client"),
        ({"method__weighting": "work"}, "rows, tokens and norms are counts"),
        ({"method__initialisation": "gradient"}, "sketch of gradients is neither clipped nor noised"),
        ({"server__step": "fedexp"}, "fedexp reads the norm of each client's change"),
        ({"server__step": "adamw", "training__local_steps": 1}, "adamw gradients that nobody clips"),
        ({"server__robust": "median"}, "by such a rule one client decides how others count"),
        ({"federation__sampling": "rows", "federation__clients_per_round": 2}, "may not depend on a client's rows"),
        ({"federation__participation": "runs/other"}, "the number that is expected in a round must be known"),
        ({"federation__max_norm_ratio": 5.0}, "what is far off is clipped"),
        ({"federation__max_weight": 0.5}, "since all weigh the same"),
        ({"federation__min_clients": 2}, "a round goes on whoever came"),
        ({"training__moments": "shared"}, "the mean of second moments is neither clipped nor noised"),
        ({"training__control_variates": True}, "the share of clients that came would tell of each"),
        ({"run__keep_updates": True}, "every client's update as it was"),
        ({"data__validation_fraction": 0.2, "evaluation__patience": 2}, "validation rows by which it chooses"),
        ({"federation__sampling": "poisson"}, "poisson only with fewer clients per round"),
        ({"privacy__unit": "none", "federation__sampling": "poisson"}, "poisson only with privacy.unit = client"),
    ],
)
def test_what_would_show_a_client_is_refused_with_the_reason(
    overrides: dict[str, Any], words: str, settings_for: Make
) -> None:
    with pytest.raises(SettingsError, match=words):
        settings_for(**{**HIDDEN, **overrides})


@pytest.mark.parametrize(
    "overrides",
    [
        *({"server__step": step} for step in ("momentum", "fedadam", "fedyogi", "fedadagrad")),
        {"wire__dtype": "int4"},
        {"wire__dtype": "bf16"},
        {"training__moments": "own", "training__proximal": 0.1, "training__dropout": 0.1},
        {"engine__name": "ray"},
    ],
)
def test_what_is_done_with_a_noised_sum_or_by_one_client_alone_is_allowed(
    overrides: dict[str, Any], settings_for: Make
) -> None:
    assert settings_for(**{**HIDDEN, **overrides}).privacy.unit == "client"


@pytest.mark.parametrize("setting", ["clip", "noise_multiplier"])
def test_settings_of_hidden_clients_act(setting: str, settings_for: Make) -> None:
    cohort = Cohort(SHAPES, 4, RANKS.__getitem__, 1)
    plain, other = settings_for(**HIDDEN), settings_for(**{**HIDDEN, f"privacy__{setting}": 0.3})
    assert strategy_of(plain, cohort) != strategy_of(other, cohort)


def test_another_method_of_a_comparison_hides_no_clients(settings_for: Make) -> None:
    for method in ("fedit", "flora", "standalone", "base"):
        other = with_method(settings_for(**POISSON), method)
        assert other.privacy.unit == "none"
        assert other.federation.sampling == "uniform"


@pytest.mark.extra("privacy")
def test_rounds_within_a_budget_are_as_many_as_an_open_count_finds(settings_for: Make) -> None:
    from types import SimpleNamespace

    plan: Any = SimpleNamespace(num_rounds=9, sample=lambda round: [round % 3])
    settings = settings_for(**HIDDEN, federation__num_rounds=9, privacy__max_epsilon=7.0)
    assert most_steps(settings, plan) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rounds_within_budget(settings, plan) == 6
