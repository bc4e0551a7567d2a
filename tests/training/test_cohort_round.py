"""Clients trained together are clients trained one by one; what is fresh, what persists, what stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.data.tokens import TokenSet
from fedloom.errors import ModelError
from fedloom.lora.algebra import distance
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.lora.pair import Adapter, Pair
from fedloom.models.families import resolve_targets
from fedloom.seeding import torch_stream
from fedloom.training import cores as cores_module
from fedloom.training.cohort_round import ClientResult, ClientTask, LocalTraining, StepReport, train_cohort
from fedloom.training.private_rows import RowPrivacy

SETTINGS = LocalTraining(learning_rate=1e-2, batch_size=3, steps=20)
LENGTHS = ([9, 3, 17, 5, 2, 8, 11, 4], [21, 2, 6], [7, 7, 30, 12, 3])
RANKS = (4, 2, 7)


@pytest.fixture
def tasks(llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]) -> list[ClientTask]:
    return [
        ClientTask(10 + k, rows_of_lengths(lengths, k), rank, 2.0, fresh_adapter(llama_lora.shapes, rank, 0, k))
        for k, (lengths, rank) in enumerate(zip(LENGTHS, RANKS, strict=True))
    ]


def train(
    lora: LoRAModel, tasks: list[ClientTask], settings: LocalTraining = SETTINGS, **changes: Any
) -> list[ClientResult]:
    return train_cohort(lora, tasks, settings, **({"seed": 1, "round": 1} | changes))


def assert_same(one: Adapter, other: Adapter, tolerance: float) -> None:
    for name, pair in one.items():
        torch.testing.assert_close(pair.a_RI, other[name].a_RI, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(pair.b_OR, other[name].b_OR, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2, "max_grad_norm": 0.5, "label_smoothing": 0.1, "schedule": "cosine", "warmup_steps": 3},
        {"micro_batch_size": 1, "dropout": 0.2},
        {"token_budget": 25, "weight_decay": 0.1},
        {"steps": None, "epochs": 2.5},
    ],
    ids=["plain", "everything", "micro-batches", "small budget", "epochs"],
)
def test_training_clients_together_equals_one_by_one(
    placed_lora: LoRAModel, tasks: list[ClientTask], changes: dict[str, Any]
) -> None:
    settings = replace(SETTINGS, **changes)
    together = train(placed_lora, tasks, settings)
    alone = [train(placed_lora, [task], settings)[0] for task in tasks]
    for one, other in zip(together, alone, strict=True):
        assert_same(one.adapter, other.adapter, 1e-12)
        assert one.stats.loss_nats == pytest.approx(other.stats.loss_nats, rel=1e-12)
        assert (one.client, one.stats.num_steps, one.stats.num_tokens) == (
            other.client,
            other.stats.num_steps,
            other.stats.num_tokens,
        )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"token_budget": 12}])
def test_k_micro_batches_equal_one_batch(
    placed_lora: LoRAModel, tasks: list[ClientTask], changes: dict[str, Any], dropout: float
) -> None:
    settings = replace(SETTINGS, dropout=dropout)
    whole, cut = train(placed_lora, tasks, settings), train(placed_lora, tasks, replace(settings, **changes))
    for one, other in zip(whole, cut, strict=True):
        assert_same(one.adapter, other.adapter, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_on_a_cpu_passes_and_their_members_change_no_bit(
    kind: str, dtype: torch.dtype, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    """Where rows of torch's own results do not depend on their number, which a library need not promise."""
    model = tiny(kind, dtype)
    lora = LoRAModel(model, resolve_targets(model))
    probe, weight, pair = (torch.randn(n, 32, generator=torch_stream(1, "x")).to(dtype) for n in (60, 64, 2))
    for what in (lambda x: x @ weight.T, lambda x: x @ pair.T, torch.nn.functional.silu):
        if any(not torch.equal(what(probe[:n]), what(probe)[:n]) for n in (4, 7, 9, 30)):
            pytest.skip("on this machine torch's own results depend on the number of rows")
    tasks = [
        ClientTask(k, rows_of_lengths(lengths, k), rank, 2.0, fresh_adapter(lora.shapes, rank, 0, k))
        for k, (lengths, rank) in enumerate(zip(([9, 4, 17, 5, 8, 11], [21, 5, 6], [7, 30, 12]), RANKS, strict=True))
    ]
    settings = replace(SETTINGS, dropout=0.2, steps=4)
    whole = train(lora, tasks, settings)
    for changes in (
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"token_budget": 1},
        {"token_budget": 25},
    ):
        cut = train(lora, tasks, replace(settings, **changes))
        alone = [train(lora, [task], replace(settings, **changes))[0] for task in tasks]
        for one, *others in zip(whole, cut, alone, strict=True):
            for name, pair in one.adapter.items():
                assert all(torch.equal(pair.a_RI, other.adapter[name].a_RI) for other in others), changes
                assert all(torch.equal(pair.b_OR, other.adapter[name].b_OR) for other in others), changes


def test_a_device_trains_what_the_cpu_trains(
    placed_lora: LoRAModel, llama_lora: LoRAModel, tasks: list[ClientTask]
) -> None:
    settings = replace(SETTINGS, dropout=0.2, label_smoothing=0.1, proximal=0.1, max_grad_norm=0.5, steps=4)
    kept = [replace(task, keeps_moments=True) for task in tasks]
    # On CUDA torch's fused AdamW takes the powers of its betas in fp32, whatever the parameters are.
    tolerance = 1e-9 if placed_lora.base_weight.device.type == "cpu" else 1e-6
    for here, there in zip(train(llama_lora, kept, settings), train(placed_lora, kept, settings), strict=True):
        assert_same(here.adapter, there.adapter, tolerance)
        assert there.stats.loss_nats == pytest.approx(here.stats.loss_nats, rel=tolerance)
        assert there.optimiser_state is not None
        assert {tensor.device.type for tensor in there.optimiser_state.values()} == {"cpu"}


@pytest.mark.parametrize("changes", [{}, {"cores": 2}, {"token_budget": 20}, {"privacy": RowPrivacy(1.0, 0.5)}])
def test_activations_kept_at_borders_only_change_no_bit(
    placed_lora: LoRAModel, tasks: list[ClientTask], changes: dict[str, Any]
) -> None:
    settings = replace(SETTINGS, dropout=0.2, steps=3, **changes)
    kept = train(placed_lora, tasks, settings)
    layer = next(iter(placed_lora.layers.values()))
    calls: list[bool] = []
    forward = layer.forward
    layer.forward = lambda x: (calls.append(torch.is_grad_enabled()), forward(x))[1]  # type: ignore[method-assign]
    once = train(placed_lora, tasks, settings), len(calls)
    twice = train(placed_lora, tasks, replace(settings, checkpoint_activations=True)), len(calls) - once[1]
    assert twice[1] > 1.5 * once[1]
    for one, other in zip(kept, twice[0], strict=True):
        assert other.stats.loss_nats == one.stats.loss_nats
        for name, pair in one.adapter.items():
            assert torch.equal(pair.a_RI, other.adapter[name].a_RI)
            assert torch.equal(pair.b_OR, other.adapter[name].b_OR)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
def test_any_number_of_cores_gives_the_same_bits(
    kind: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores_module, "PART_TOKENS", 20)
    model = tiny(kind, torch.float32)
    lora = LoRAModel(model, resolve_targets(model))
    tasks = [
        ClientTask(k, rows_of_lengths(lengths, k), rank, 2.0, fresh_adapter(lora.shapes, rank, 0, k))
        for k, (lengths, rank) in enumerate(zip(LENGTHS, RANKS, strict=True))
    ]
    settings = replace(SETTINGS, batch_size=6, dropout=0.2, steps=3)
    found = {cores: train(lora, [tasks[0]], replace(settings, cores=cores))[0] for cores in (1, 2, 3, 4)}
    for other in found.values():
        assert other.stats.loss_nats == found[1].stats.loss_nats
        for name, pair in found[1].adapter.items():
            assert torch.equal(pair.a_RI, other.adapter[name].a_RI)
            assert torch.equal(pair.b_OR, other.adapter[name].b_OR)
    together = [train(lora, tasks, replace(settings, cores=cores)) for cores in (1, 3)]
    for one, other in zip(*together, strict=True):
        assert all(torch.equal(pair.a_RI, other.adapter[name].a_RI) for name, pair in one.adapter.items())


def test_what_goes_wrong_on_one_core_is_told(llama_lora: LoRAModel, tasks: list[ClientTask]) -> None:
    def broken(hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"no luck with {hidden.ndim} axes")

    llama_lora.model.model.norm.forward = broken  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="no luck"):
        train(llama_lora, tasks, replace(SETTINGS, cores=2))


def test_a_step_equals_a_plain_loop_over_padded_logits(llama_lora: LoRAModel, tasks: list[ClientTask]) -> None:
    """One step of plain AdamW on the mean over the batch's supervised tokens, by the model's own loss."""
    task = tasks[1]  # three rows: one batch is all of them
    (result,) = train(llama_lora, [task], replace(SETTINGS, steps=1))
    lora = llama_lora
    lora.open([Slot(task.rank, task.scale)])
    lora.load(0, task.start)
    lora.route_all(0)
    losses = [_own_losses(lora.model, task.rows, i) for i in range(len(task.rows))]
    loss = torch.cat(losses).mean()
    parameters = lora.parameters(0)
    loss.backward()
    torch.optim.AdamW(parameters, lr=SETTINGS.learning_rate, weight_decay=0.0).step()
    assert result.stats.loss_nats == pytest.approx(loss.item(), rel=1e-12)
    assert_same(result.adapter, lora.adapter(0), 1e-10)
    assert result.stats.num_loss_tokens == sum(len(part) for part in losses)


def _own_losses(model: Any, rows: TokenSet, index: int) -> torch.Tensor:
    ids, supervised = (torch.from_numpy(part.copy()) for part in rows.row(index))
    logits_TV = model(input_ids=ids.long()[None], use_cache=False).logits[0]
    nats = torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:].long(), reduction="none")
    return nats[supervised[1:]]


def test_a_client_with_fewer_steps_is_not_touched_afterwards(llama_lora: LoRAModel, tasks: list[ClientTask]) -> None:
    settings = replace(SETTINGS, steps=None, epochs=1.0, token_budget=1)  # a row per pass: no client shares one
    together = train(llama_lora, tasks, settings)
    assert len({result.stats.num_steps for result in together}) > 1
    (alone,) = train(llama_lora, [tasks[1]], settings)
    assert all(torch.equal(alone.adapter[n].a_RI, together[1].adapter[n].a_RI) for n in alone.adapter)
    assert all(torch.equal(alone.adapter[n].b_OR, together[1].adapter[n].b_OR) for n in alone.adapter)


def test_training_lowers_the_loss_and_moves_the_weights(llama_lora: LoRAModel, tasks: list[ClientTask]) -> None:
    for task, result in zip(tasks, train(llama_lora, tasks, replace(SETTINGS, steps=40)), strict=True):
        assert result.stats.loss_last_nats < result.stats.loss_nats
        assert distance(result.adapter, task.start) > 0


def test_a_rate_of_nothing_moves_nothing(llama_lora: LoRAModel, tasks: list[ClientTask]) -> None:
    (result,) = train(llama_lora, tasks[:1], replace(SETTINGS, learning_rate=0.0))
    assert distance(result.adapter, tasks[0].start) == 0.0


def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(llama_lora: LoRAModel, tasks: list[ClientTask]) -> None:
    settings = replace(SETTINGS, dropout=0.1)
    first, again, other = (train(llama_lora, tasks[:1], settings, seed=s)[0].adapter for s in (1, 1, 2))
    name = next(iter(first))
    assert torch.equal(first[name].b_OR, again[name].b_OR)
    assert not torch.equal(first[name].b_OR, other[name].b_OR)


def test_neither_tasks_nor_base_are_changed(llama_lora: LoRAModel, tasks: list[ClientTask]) -> None:
    before = {name: tensor.clone() for name, tensor in llama_lora.model.state_dict().items() if ".base." in name}
    start = tasks[0].start
    copies = {name: Pair(pair.b_OR.clone(), pair.a_RI.clone()) for name, pair in start.items()}
    train(llama_lora, tasks)
    after = llama_lora.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(torch.equal(start[name].a_RI, pair.a_RI) for name, pair in copies.items())


def test_the_optimiser_is_fresh_in_each_round_unless_its_state_is_given(
    llama_lora: LoRAModel, tasks: list[ClientTask]
) -> None:
    keeping = replace(tasks[0], keeps_moments=True)
    assert train(llama_lora, tasks[:1])[0].optimiser_state is None
    (first,) = train(llama_lora, [keeping])
    assert first.optimiser_state is not None
    next_task = replace(keeping, start=first.adapter)
    (fresh,) = train(llama_lora, [next_task], round=2)
    (kept,) = train(llama_lora, [replace(next_task, optimiser_state=first.optimiser_state)], round=2)
    step = next(name for name in first.optimiser_state if name.endswith(".step"))
    assert (fresh.optimiser_state[step], kept.optimiser_state[step]) == (20, 40)
    name = next(iter(fresh.adapter))
    assert not torch.equal(fresh.adapter[name].b_OR, kept.adapter[name].b_OR)


def test_a_schedule_over_the_run_goes_on_and_one_over_the_round_does_not(
    llama_lora: LoRAModel, tasks: list[ClientTask]
) -> None:
    rates: dict[str, list[float]] = {}
    for span in ("round", "run"):
        settings = replace(SETTINGS, steps=2, schedule="linear", schedule_span=span, total_rounds=2)
        rates[span] = []
        for number in (1, 2):
            train(
                llama_lora,
                tasks[:1],
                settings,
                round=number,
                on_step=lambda r, s=span: rates[s].append(r.learning_rate),
            )
    assert rates["round"] == pytest.approx([1e-2, 5e-3, 1e-2, 5e-3])
    assert rates["run"] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_progress_reports_every_step_of_every_client(llama_lora: LoRAModel, tasks: list[ClientTask]) -> None:
    reports: list[StepReport] = []
    results = train(llama_lora, tasks, replace(SETTINGS, steps=3), on_step=reports.append)
    assert [(r.client, r.step, r.num_steps) for r in reports] == [(c, s, 3) for s in (1, 2, 3) for c in (10, 11, 12)]
    assert sum(r.num_tokens for r in reports) == sum(result.stats.num_tokens for result in results)
    assert reports[-1].loss_nats == results[-1].stats.loss_last_nats


def test_a_client_that_diverges_stops_and_the_others_do_not_notice(
    llama_lora: LoRAModel, tasks: list[ClientTask]
) -> None:
    sick = Adapter({n: Pair(p.b_OR, torch.full_like(p.a_RI, math.nan)) for n, p in tasks[0].start.items()})
    results = train(llama_lora, [replace(tasks[0], start=sick), *tasks[1:]])
    healthy = [train(llama_lora, [task])[0] for task in tasks[1:]]
    assert results[0].stats.num_steps == 1
    assert not math.isfinite(results[0].stats.loss_nats)
    assert not results[0].adapter.is_finite()
    for one, other in zip(results[1:], healthy, strict=True):
        assert_same(one.adapter, other.adapter, 1e-12)


def test_slots_are_freed_after_an_error(llama_lora: LoRAModel, tasks: list[ClientTask]) -> None:
    def interrupt(_: StepReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(llama_lora, tasks, on_step=interrupt)
    assert llama_lora.slots == []


@pytest.mark.parametrize("family_name", ["gpt2", "gemma2", "phi3", "opt", "gpt_neox"])
def test_other_families_train_together_as_alone(
    family_name: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    from fedloom.models.families import resolve_targets

    model = tiny(family_name)
    lora = LoRAModel(model, resolve_targets(model))
    tasks = [
        ClientTask(k, rows_of_lengths(lengths, k), rank, 1.0, fresh_adapter(lora.shapes, rank, 0, k))
        for k, (lengths, rank) in enumerate(zip(LENGTHS, RANKS, strict=True))
    ]
    settings = replace(SETTINGS, steps=4)
    for one, task in zip(train(lora, tasks, settings), tasks, strict=True):
        assert distance(one.adapter, task.start) > 0
        assert_same(one.adapter, train(lora, [task], settings)[0].adapter, 1e-11)


def test_adapters_that_no_gradient_reaches_are_refused_in_one_line(
    llama_lora: LoRAModel, tasks: list[ClientTask]
) -> None:
    body: Any = llama_lora.model.model
    body.norm.register_forward_hook(lambda *parts: parts[2].detach())
    with pytest.raises(ModelError, match="expected adapted modules whose gradient reaches the loss of 'llama', none"):
        train(llama_lora, tasks)
