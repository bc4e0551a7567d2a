"""The laws of a split run: what it equals, what crosses, and what happens when a client fails."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from split.split_cases import PLAN, SGD, VOCABULARY, SetUp, wrapped

from fedloom.data.tokens import TokenSet
from fedloom.errors import CutError, ModelError, SettingsError, TooFewClientsError
from fedloom.lora.dropout import dropout_of, row_keys
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.lora.pair import Adapter
from fedloom.lora.peft_files import save_peft
from fedloom.methods.flora import FLoRA
from fedloom.methods.state import Failure
from fedloom.methods.strategy import Weighting
from fedloom.methods.zero_padding import ZeroPadding, fedit
from fedloom.split.codecs import Encoded
from fedloom.split.cut_messages import SplitMessage
from fedloom.split.lockstep import SplitRecord, run_split
from fedloom.split.parties import SplitParties
from fedloom.split.party import adamw, load_partly
from fedloom.split.plan import steps_for_epochs
from fedloom.split.server_half import SplitServer
from fedloom.split.split_state import SplitState
from fedloom.split.split_step import rows_of_step
from fedloom.training import cores as cores_module
from fedloom.training.loss import supervised_cross_entropy
from fedloom.training.packing import hidden_states, pack
from fedloom.training.row_losses import row_losses
from fedloom.training.verified_head import output_head


def run(parties: SplitParties, state: SplitState | None = None) -> list[SplitRecord]:
    return list(run_split(state or parties.initial(), parties, lambda _: {}))


def assert_same_adapter(found: Adapter, expected: Adapter, tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        torch.testing.assert_close(found[name].delta(), pair.delta(), rtol=0, atol=tolerance)


def assert_identical(found: Adapter, expected: Adapter) -> None:
    assert found.as_tensors().keys() == expected.as_tensors().keys()
    for name, tensor in expected.as_tensors().items():
        assert torch.equal(found.as_tensors()[name], tensor), name


def descend(
    lora: LoRAModel, slot: int, batch_rows: Sequence[Any], rate: float, keys: Sequence[Any] = (), dropout: float = 0.0
) -> None:
    """Take one step of plain gradient descent on the mean loss of the rows."""
    lora.zero_grad()
    batch = pack(batch_rows)
    lora.route_all(slot, dropout_of(dropout, keys, batch.lengths, "cpu"))
    weights_S = torch.full(batch.targets_S.shape, 1 / len(batch.targets_S), dtype=torch.float64)
    hidden_SD = hidden_states(lora.model, batch)[batch.target_index_S]
    supervised_cross_entropy(hidden_SD, output_head(lora.model), batch.targets_S, weights_S)[0].backward()
    for factor in lora.parameters(slot):
        factor.data -= rate * factor.grad


def centralised(start: Adapter, rows: list[TokenSet], steps: int, dropout: float = 0.0) -> Adapter:
    """Train the whole adapter on every client's batch together."""
    lora = wrapped("llama")
    output_head(lora.model)
    lora.open([Slot(3, 2.0)])
    lora.load(0, start)
    for step in range(steps):
        together = [
            own.row(int(i)) for k, own in enumerate(rows) for i in rows_of_step(PLAN.seed, k, len(own), 4, step)
        ]
        keys = [row_keys(PLAN.seed, step + 1, k, range(4 * step, 4 * step + 4)) for k in range(len(rows))]
        descend(lora, 0, together, PLAN.training.learning_rate, keys, dropout)
    return lora.adapter(0)


@pytest.mark.parametrize("cut_layers", [(1, 1, 1), (3, 3, 3), (1, 2, 3)])
@pytest.mark.parametrize("tail_blocks", [None, 0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_aggregating_every_step_with_sgd_is_centralised_training(
    set_up: SetUp, cut_layers: tuple[int, ...], tail_blocks: int | None, dropout: float
) -> None:
    changes = {"cut_layers": cut_layers, "tail_blocks": tail_blocks, "training": with_dropout(dropout)}
    _, parties, rows = set_up(aggregate_every=1, num_rounds=4, **changes)
    start = parties.initial()
    assert_same_adapter(run(parties)[-1].state.global_adapter(), centralised(start.global_adapter(), rows, 4, dropout))


def with_dropout(dropout: float) -> Any:
    return replace(PLAN.training, dropout=dropout)


def test_a_tail_on_the_clients_is_centralised_training_too(set_up: SetUp) -> None:
    _, parties, rows = set_up(aggregate_every=1, num_rounds=3, tail_blocks=1)
    start = parties.initial()
    assert len(parties.segments) == 1
    assert any(".3." in name for name in parties.segments[0].shapes)
    assert_same_adapter(run(parties)[-1].state.global_adapter(), centralised(start.global_adapter(), rows, 3))


def test_sequential_steps_are_one_server_step_per_client_in_turn(set_up: SetUp) -> None:
    _, parties, rows = set_up(server_update="sequential", num_rounds=1, aggregate_every=3)
    start = parties.initial()
    lora = wrapped("llama")
    output_head(lora.model)
    lora.open([Slot(3, 2.0)] * 4)
    lora.load(3, start.global_adapter())
    halves = [start.global_adapter() for _ in rows]
    for step in range(3):
        for k, own in enumerate(rows):
            joined = Adapter({**halves[k], **{n: lora.adapter(3)[n] for n in parties.server_shapes}})
            lora.load(k, joined)
            descend(lora, k, [own.row(int(i)) for i in rows_of_step(5, k, len(own), 4, step)], 0.05)
            halves[k] = lora.adapter(k)
            lora.load(3, halves[k])
    state = run(parties)[-1].state
    assert_same_adapter(state.server, Adapter({n: lora.adapter(3)[n] for n in parties.server_shapes}))


def test_joint_and_sequential_are_different_algorithms(set_up: SetUp) -> None:
    joint, sequential = (run(set_up(server_update=mode)[1])[-1].state for mode in ("joint", "sequential"))
    differences = [(joint.server[n].delta() - sequential.server[n].delta()).norm() for n in joint.server]
    assert max(differences) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{}, {"tail_blocks": 1}, {"cut_layers": (1, 2, 3)}, {"server_update": "sequential"}, {"client_half": "frozen"}],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_micro_batches_change_nothing(set_up: SetUp, changes: dict[str, Any], dropout: float) -> None:
    changes = changes | {"training": with_dropout(dropout)}
    whole = run(set_up(**changes)[1])
    for micro_batches in (2, 4):
        parts = run(set_up(micro_batches=micro_batches, **changes)[1])
        assert_same_adapter(parts[-1].state.global_adapter(), whole[-1].state.global_adapter())
        assert parts[-1].loss_nats == pytest.approx(whole[-1].loss_nats, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cut_layers": (1, 2, 3), "micro_batches": 2},
        {"tail_blocks": 1},
        {"server_update": "sequential"},
        {"client_half": "frozen"},
        {"client_half": "frozen", "tail_blocks": 1},
    ],
)
def test_any_number_of_cores_gives_the_same_bits(
    set_up: SetUp, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = with_dropout(0.3)
    whole = run(set_up(training=training, **changes)[1])[-1]
    monkeypatch.setattr(cores_module, "PART_TOKENS", 20)
    one, *others = [run(set_up(training=replace(training, cores=n), **changes)[1])[-1] for n in (1, 2, 4)]
    for other in others:
        assert_identical(other.state.global_adapter(), one.state.global_adapter())
        assert [client.stats.loss_nats for client in other.clients] == [c.stats.loss_nats for c in one.clients]
    assert_same_adapter(one.state.global_adapter(), whole.state.global_adapter())
    assert one.loss_nats == pytest.approx(whole.loss_nats, abs=1e-6)


def test_what_goes_wrong_in_a_piece_on_one_core_is_told(set_up: SetUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores_module, "PART_TOKENS", 20)
    lora, parties, _ = set_up(training=replace(PLAN.training, cores=2))

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"no luck with {hidden.ndim} axes")

    lora.model.model.norm.forward = broken
    with pytest.raises(ModelError, match="no luck"):
        run(parties)


def test_every_participant_is_updated_exactly_once_a_step_and_sent_as_it_is_after(set_up: SetUp) -> None:
    steps: list[str] = []

    class Counting(SGD):
        def __init__(self, factors: Any, *rest: Any) -> None:
            super().__init__(factors, *rest)
            self.first = next(iter(factors))

        def step(self) -> float:
            steps.append(self.first)
            return super().step()

    _, parties, _ = set_up(make_optimiser=Counting, num_rounds=1, aggregate_every=3, micro_batches=2)
    sent: list[Adapter] = []
    held: list[Adapter] = []
    collect = parties.clients.end

    def end(clients: Sequence[int]) -> Iterator[Any]:
        held.extend(parties.clients._parties[client].adapter() for client in clients)
        for outcome in collect(clients):
            sent.append(outcome[1][0].adapter)
            yield outcome

    parties.clients.end = end
    record = run(parties)[-1]
    assert len(steps) == 3 * (3 + 1)
    assert [client.stats.num_steps for client in record.clients] == [3, 3, 3]
    for after, update in zip(held, sent, strict=True):
        assert_identical(update, after)


def test_every_clients_rows_matter(set_up: SetUp) -> None:
    _, parties, rows = set_up()
    expected = run(parties)[-1].state.global_adapter()
    for client in range(3):
        _, other, _ = set_up()
        own = [rows[client].row(row) for row in range(len(rows[client]))]
        moved = TokenSet.from_rows([((ids + 7) % VOCABULARY, mask) for ids, mask in own])
        other.clients._rows[client] = moved
        found = run(other)[-1].state.global_adapter()
        assert any(not torch.equal(found[n].b_OR, expected[n].b_OR) for n in found)


class Tapped:
    """Clients behind a tap that keeps every message, serialised, and may spoil some."""

    def __init__(self, clients: Any, spoil: Any = lambda message: message) -> None:
        self._clients, self._spoil = clients, spoil
        self.up: list[bytes] = []
        self.down: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clients, name)

    def activations(self, step: int, micro_batch: int) -> Iterator[Any]:
        return self._tap(self._clients.activations(step, micro_batch))

    def tails(self, hidden: Sequence[SplitMessage]) -> Iterator[Any]:
        self.down += [message.to_bytes() for message in hidden]
        return self._tap(self._clients.tails([SplitMessage.from_bytes(message.to_bytes()) for message in hidden]))

    def gradients(self, messages: Sequence[SplitMessage]) -> None:
        self.down += [message.to_bytes() for message in messages]
        self._clients.gradients([SplitMessage.from_bytes(message.to_bytes()) for message in messages])

    def _tap(self, messages: Iterable[Any]) -> Iterator[Any]:
        for message in messages:
            spoilt = self._spoil(message)
            if isinstance(spoilt, SplitMessage):
                self.up.append(spoilt.to_bytes())
                yield SplitMessage.from_bytes(self.up[-1])
            elif spoilt is not None:
                yield spoilt


def tapped(parties: SplitParties, spoil: Any = lambda message: message) -> tuple[SplitParties, Tapped]:
    tap = Tapped(parties.clients, spoil)
    return replace(parties, clients=tap), tap


@pytest.mark.parametrize("changes", [{}, {"tail_blocks": 1}, {"wire_dtype": "int8"}, {"client_half": "frozen"}])
def test_bytes_reported_are_bytes_serialised_and_the_wire_changes_nothing(
    set_up: SetUp, changes: dict[str, Any]
) -> None:
    plain = run(set_up(**changes)[1])
    parties, tap = tapped(set_up(**changes)[1])
    records = run(parties)
    clients = [client for record in records for client in record.clients]
    assert sum(client.activation_upload_bytes for client in clients) == sum(map(len, tap.up))
    assert sum(client.activation_download_bytes for client in clients) == sum(map(len, tap.down))
    assert_identical(records[-1].state.global_adapter(), plain[-1].state.global_adapter())


@pytest.mark.parametrize("client_half", ["trained", "frozen"])
def test_labels_are_never_on_the_wire_of_a_u_shape(set_up: SetUp, client_half: str) -> None:
    parties, tap = tapped(set_up(tail_blocks=1, client_half=client_half)[1])
    run(parties)
    messages = [SplitMessage.from_bytes(blob) for blob in tap.up + tap.down]
    assert messages
    assert all(message.targets_S is None and message.target_index_S is None for message in messages)
    assert not any(b"target" in blob[: 8 + int.from_bytes(blob[:8], "little")] for blob in tap.up + tap.down)


def test_only_activations_lengths_labels_and_gradients_cross(set_up: SetUp) -> None:
    parties, tap = tapped(set_up(wire_dtype="int8")[1])
    run(parties)
    names = {key for blob in tap.up + tap.down for key in json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])}
    assert names == {"__metadata__", "values_TD", "scales_T", "lengths_N", "target_index_S", "targets_S"}


@pytest.mark.parametrize("tail_blocks", [None, 1])
@pytest.mark.parametrize("wire_dtype", ["fp32", "int8"])
def test_a_cached_frozen_client_equals_an_uncached_one_bit_for_bit(
    set_up: SetUp, monkeypatch: pytest.MonkeyPatch, tail_blocks: int | None, wire_dtype: str
) -> None:
    changes = {"client_half": "frozen", "num_rounds": 3, "tail_blocks": tail_blocks, "wire_dtype": wire_dtype}
    cached = run(set_up(**changes)[1])
    monkeypatch.setattr(SplitServer, "missing_rows", lambda self, client, rows: list(dict.fromkeys(rows)))
    uncached = run(set_up(**changes)[1])
    assert [record.loss_nats for record in cached] == [record.loss_nats for record in uncached]
    assert_identical(cached[-1].state.global_adapter(), uncached[-1].state.global_adapter())
    up = [sum(client.activation_upload_bytes for client in records[-1].clients) for records in (cached, uncached)]
    assert up[0] < up[1]


def test_a_frozen_clients_uplink_is_zero_once_every_row_has_crossed(set_up: SetUp) -> None:
    records = run(set_up(client_half="frozen", num_rounds=3)[1])
    assert [sum(client.upload_bytes for client in record.clients) for record in records][1:] == [0, 0]
    assert all(client.download_bytes == 0 for record in records for client in record.clients)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cut_layers": (1, 2, 3), "error_feedback": "on", "gradient_wire_dtype": "int8"},
        {"tail_blocks": 1, "wire_dtype": "bf16", "error_feedback": "on", "gradient_wire_dtype": "int8"},
        {"clients_per_round": 2},
    ],
)
@pytest.mark.parametrize("method", ["fedit", "flora"])
def test_stopping_after_any_round_and_going_on_is_never_stopping(
    set_up: SetUp, tmp_path: Path, changes: dict[str, Any], method: str
) -> None:
    strategy = FLoRA if method == "flora" else None
    training = replace(PLAN.training, schedule="linear", schedule_span="run", dropout=0.1)
    options = {"make_optimiser": adamw, "num_rounds": 4, "training": training, "make_strategy": strategy, **changes}
    uninterrupted = run(set_up(**options)[1])
    tensors, numbers = uninterrupted[1].state.to_tensors()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "state.safetensors")
    read = SplitState.from_tensors(load_file(tmp_path / "state.safetensors"), json.loads(json.dumps(numbers)))
    resumed = run(set_up(**options)[1], read)
    assert [record.round for record in resumed] == [3, 4]
    assert [record.loss_nats for record in resumed] == [record.loss_nats for record in uninterrupted[2:]]
    assert_identical(resumed[-1].state.global_adapter(), uninterrupted[-1].state.global_adapter())


@pytest.mark.parametrize("changes", [{"cut_layers": (1, 2, 3)}, {"tail_blocks": 1}, {"client_half": "frozen"}])
def test_the_reassembled_adapter_gives_the_runs_own_loss_under_stock_peft(
    set_up: SetUp, tmp_path: Path, changes: dict[str, Any]
) -> None:
    from peft import PeftModel

    lora, parties, rows = set_up(num_rounds=1, **changes)
    adapter = run(parties)[-1].state.global_adapter()
    following = set_up(num_rounds=1, aggregate_every=1, **changes)[1]
    expected = next(run_split(holding(adapter, following), following, lambda _: {})).loss_nats
    save_peft(adapter, tmp_path, base_name="tiny")
    stock = PeftModel.from_pretrained(lora.unwrap(), tmp_path)
    batch_rows = TokenSet.concatenate([own.select(rows_of_step(5, k, len(own), 4, 0)) for k, own in enumerate(rows)])
    loss = row_losses(stock.get_base_model(), batch_rows, token_budget=512).mean_nats
    assert loss == pytest.approx(expected, abs=1e-5)


def holding(adapter: Adapter, parties: SplitParties) -> SplitState:
    """Return a first state that holds an adapter."""
    segments = tuple(
        replace(state, start=Adapter({name: adapter[name] for name in segment.shapes}))
        for state, segment in zip(parties.initial().segments, parties.segments, strict=True)
    )
    return SplitState(0, segments, Adapter({name: adapter[name] for name in parties.server_shapes}))


@pytest.mark.parametrize("weighting", [Weighting.TOKENS, Weighting.ROWS, Weighting.WORK])
def test_deeper_clients_and_the_server_share_a_module_by_what_they_stand_for(
    set_up: SetUp, weighting: Weighting
) -> None:
    _, parties, _ = set_up(partial(fedit, weighting=weighting), cut_layers=(1, 1, 3), num_rounds=1)
    kept: dict[int, Adapter] = {}
    collect = parties.clients.end

    def end(clients: Sequence[int]) -> Iterator[Any]:
        kept[-1] = parties.server.party.adapter()
        kept.update({client: parties.clients._parties[client].adapter() for client in clients})
        yield from collect(clients)

    parties.clients.end = end
    record = run(parties)[-1]
    tokens = [client.stats.num_loss_tokens for client in record.clients]
    counts = {Weighting.TOKENS: tokens, Weighting.ROWS: list(PLAN.num_rows), Weighting.WORK: [1, 1, 1]}[weighting]
    merged = record.state.global_adapter()
    module = "model.layers.1.self_attn.q_proj"
    parts = [(-1, counts[0] + counts[1]), (2, counts[2])]
    for factor in ("b_OR", "a_RI"):
        expected = sum(weight * getattr(kept[owner][module], factor) for owner, weight in parts) / sum(counts)
        torch.testing.assert_close(getattr(merged[module], factor), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("strategy", [FLoRA, ZeroPadding])
def test_clients_of_different_ranks_and_cuts_train_together(set_up: SetUp, strategy: Any) -> None:
    _, parties, _ = set_up(strategy, adamw, ranks=(2, 4, 6), server_rank=5, cut_layers=(1, 2, 3), num_rounds=4)
    records = run(parties)
    assert records[-1].loss_nats < records[0].loss_nats
    if strategy is FLoRA:
        assert all(record.aggregation_noise < 1e-5 for record in records)


def spoil_from(client: int, step: int, how: Any, kind: str = "activations") -> Any:
    def spoil(message: Any) -> Any:
        concerned = isinstance(message, SplitMessage) and (message.client, message.kind) == (client, kind)
        return how(message) if concerned and message.step >= step else message

    return spoil


def with_nan(message: SplitMessage) -> SplitMessage:
    values = message.matrix.values_TD.clone()
    values[0, 0] = float("nan")
    return replace(message, matrix=Encoded(values))


CASES = {
    "vanishes": (lambda message: None, "vanished"),
    "fails": (lambda message: Failure(message.client, "out of memory"), "out of memory"),
    "sends NaN": (with_nan, "got NaN or infinity"),
    "sends another shape": (lambda m: replace(m, matrix=Encoded(m.matrix.values_TD[:, :8])), "expected"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_client_that_fails_is_left_out_until_the_next_aggregation_and_recorded(
    set_up: SetUp, case: str, micro_batches: int
) -> None:
    how, reason = CASES[case]

    def only_in_round_one(message: SplitMessage) -> Any:
        return how(message) if message.step < 3 else message

    _, whole, _ = set_up(num_rounds=2, aggregate_every=3, micro_batches=micro_batches)
    parties, _ = tapped(whole, spoil_from(1, 1, only_in_round_one))
    first, second = run(parties)
    assert reason in first.clients[1].reason
    assert first.clients[1].weight == 0.0
    assert [client.reason for client in (first.clients[0], first.clients[2], *second.clients)] == [None] * 5
    assert sum(client.weight for client in first.clients) == pytest.approx(1.0)
    assert first.state.global_adapter().is_finite()
    assert all(client.weight > 0 for client in second.clients)


@pytest.mark.parametrize("case", ["vanishes", "sends NaN", "sends another shape"])
def test_a_tail_that_fails_is_left_out_and_the_others_go_on(set_up: SetUp, case: str) -> None:
    how, reason = CASES[case]
    parties, _ = tapped(set_up(tail_blocks=1, num_rounds=1)[1], spoil_from(2, 0, how, "tail gradients"))
    (record,) = run(parties)
    assert reason in record.clients[2].reason
    assert record.state.global_adapter().is_finite()


def test_gradients_that_are_not_finite_stop_their_client_alone(set_up: SetUp) -> None:
    _, parties, _ = set_up(num_rounds=1)
    send = parties.clients.gradients
    parties.clients.gradients = lambda messages: send([with_nan(m) if m.client == 0 else m for m in messages])
    (record,) = run(parties)
    assert "expected finite gradients, got NaN" in record.clients[0].reason
    assert record.state.global_adapter().is_finite()


def test_too_few_clients_end_the_run_and_say_why(set_up: SetUp) -> None:
    parties, _ = tapped(set_up(min_clients=3)[1], spoil_from(0, 0, lambda message: None))
    with pytest.raises(TooFewClientsError, match=r"expected at least 3 clients.*client 0: vanished"):
        run(parties)


def test_an_update_far_above_its_periods_is_left_out(set_up: SetUp) -> None:
    """Every change is above a millionth of the median."""
    parties = set_up(max_norm_ratio=1e-6)[1]
    with pytest.raises(TooFewClientsError, match=r"round 1: .*norm"):
        run(parties)


def test_a_cohort_is_drawn_for_each_period(set_up: SetUp) -> None:
    records = run(set_up(clients_per_round=2, num_rounds=6)[1])
    cohorts = [tuple(client.client for client in record.clients) for record in records]
    assert all(len(cohort) == 2 for cohort in cohorts)
    assert len(set(cohorts)) > 1


def test_evaluating_more_often_on_the_same_model_changes_nothing(set_up: SetUp) -> None:
    def score(state: SplitState) -> dict[str, Any]:
        seen.append(state.round)
        lora.set_side(state.global_adapter())
        lora.close()
        return {"parameters": state.global_adapter().num_parameters}

    results = []
    for every, expected in ((1, [1, 2, 3]), (2, [2, 3]), (0, [3])):
        seen: list[int] = []
        lora, parties, _ = set_up(num_rounds=3)
        results.append(list(run_split(parties.initial(), parties, score, evaluate_every=every))[-1])
        assert seen == expected
    for other in results[1:]:
        assert_identical(other.state.global_adapter(), results[0].state.global_adapter())


def test_the_last_period_holds_what_is_left_and_the_schedule_ends_with_it(set_up: SetUp) -> None:
    rates: list[float] = []

    class Noting(SGD):
        def step(self) -> float:
            rates.append(0.0)
            return super().step()

    _, parties, _ = set_up(make_optimiser=Noting, num_steps=5, aggregate_every=2)
    assert [record.num_steps for record in run(parties)] == [2, 2, 1]
    assert len(rates) == 5 * 4


@pytest.mark.parametrize(("epochs", "expected"), [(1, 3), (2, 5), (0.5, 2)])
def test_epochs_are_steps_in_which_all_rows_together_are_read_as_often(epochs: float, expected: int) -> None:
    assert steps_for_epochs((10, 20), 6, epochs) == expected


def test_clients_with_other_rows_than_planned_are_refused(set_up: SetUp) -> None:
    with pytest.raises(CutError, match="expected 1 to 3"):
        set_up(cut_layers=(4, 1, 1))
    with pytest.raises(SettingsError, match=r"split\.micro_batches: expected at most"):
        set_up(micro_batches=5)


def test_a_server_without_a_module_to_train_is_refused() -> None:
    lora = LoRAModel(wrapped("llama").unwrap(), ["model.layers.0.self_attn.q_proj"])
    with pytest.raises(SettingsError, match="server's blocks"):
        PLAN.check(lora.model, lora.shapes)


def test_modules_that_a_party_does_not_own_add_nothing() -> None:
    lora = wrapped("llama")
    lora.open([Slot(2, 1.0)])
    load_partly(lora, 0, Adapter())
    assert all(not pair.delta().any() for pair in lora.adapter(0).values())
