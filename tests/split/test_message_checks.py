"""A split message is the one asked for, to its last index, or its sender sits out; no bytes of it raise."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from split.split_cases import SetUp

from fedloom.errors import UpdateError
from fedloom.federation.blob import sealed, unsealed
from fedloom.methods.state import Failure
from fedloom.seeding import stream
from fedloom.split.codecs import Encoded, WireDtype, encode
from fedloom.split.cut_messages import SplitMessage
from fedloom.split.lockstep import run_split
from fedloom.split.message_checks import Expected, check_message

NUMBER = int(os.environ.get("FEDLOOM_FUZZ", "3000")) // 3
Change = Callable[[SplitMessage], SplitMessage]
EXPECTED = Expected(
    "activations", 1, 4, 0, 8, "fp32", num_rows=2, max_length=10, vocabulary=61, max_loss_tokens=40, is_whole_step=True
)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def message(wire: WireDtype = "fp32") -> SplitMessage:
    matrix = encode(torch.ones(6, 8), wire)
    return SplitMessage("activations", 1, 4, 0, matrix, 3, 0.0, ints(2, 4), ints(0, 3, 4), ints(5, 60, 0))


def changed(**parts: Any) -> Change:
    return lambda m: replace(m, **parts)


def poisoned(value: float) -> Encoded:
    values = torch.ones(6, 8)
    values[2, 3] = value
    return Encoded(values)


BAD: dict[str, Change] = {
    "another kind": changed(kind="gradients"),
    "another client": changed(client=2),
    "another step": changed(step=77),
    "another micro-batch": changed(micro_batch=5),
    "text for a step": changed(step="4"),
    "true for a client": changed(client=True),
    "NaN loss": changed(loss_nats=math.nan),
    "a loss of no model": changed(loss_nats=1e300),
    "NaN": changed(matrix=poisoned(math.nan)),
    "infinity": changed(matrix=poisoned(math.inf)),
    "another width": changed(matrix=Encoded(torch.ones(6, 9))),
    "a vector": changed(matrix=Encoded(torch.ones(48))),
    "bf16 for fp32": changed(matrix=encode(torch.ones(6, 8), "bf16")),
    "int8 for fp32": changed(matrix=encode(torch.ones(6, 8), "int8")),
    "scales for fp32": changed(matrix=Encoded(torch.ones(6, 8), torch.ones(6))),
    "no matrix": changed(matrix=None),
    "more tokens than lengths": changed(matrix=Encoded(torch.ones(7, 8))),
    "a negative length": changed(lengths_N=ints(100_002, -99_996)),
    "a length of zero": changed(lengths_N=ints(0, 6)),
    "too long a row": changed(lengths_N=ints(11, -5)),
    "another number of rows": changed(lengths_N=ints(2, 2, 2)),
    "no lengths": changed(lengths_N=None),
    "lengths of int64": changed(lengths_N=torch.tensor([2, 4])),
    "lengths as a matrix": changed(lengths_N=ints(2, 4)[None]),
    "no targets": changed(targets_S=None),
    "no indices": changed(target_index_S=None),
    "fewer targets than indices": changed(targets_S=ints(5, 60)),
    "indices that fall": changed(target_index_S=ints(3, 0, 4)),
    "an index twice": changed(target_index_S=ints(0, 3, 3)),
    "a negative index": changed(target_index_S=ints(-1, 3, 4)),
    "an index beyond": changed(target_index_S=ints(0, 3, 6)),
    "a target out of the vocabulary": changed(targets_S=ints(5, 61, 0)),
    "a target of 10**6": changed(targets_S=ints(5, 10**6, 0)),
    "a negative target": changed(targets_S=ints(5, -1, 0)),
    "10**12 tokens": changed(num_loss_tokens=10**12),
    "negative tokens": changed(num_loss_tokens=-(10**6)),
    "a token more than sent": changed(num_loss_tokens=4),
    "a token fewer than sent": changed(num_loss_tokens=2),
    "text for tokens": changed(num_loss_tokens="3"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_message_that_is_not_the_one_asked_for_is_refused(what: str) -> None:
    check_message(message(), EXPECTED)
    with pytest.raises(UpdateError, match="client 1, step 4: "):
        check_message(BAD[what](message()), EXPECTED)


@pytest.mark.parametrize("scales", [None, torch.ones(5), torch.ones(6).double(), -torch.ones(6), torch.ones(6) / 0])
def test_scales_of_int8_are_one_for_each_token_finite_and_not_negative(scales: torch.Tensor | None) -> None:
    expected, good = replace(EXPECTED, dtype="int8"), message("int8")
    check_message(good, expected)
    with pytest.raises(UpdateError, match="scales_T"):
        check_message(replace(good, matrix=Encoded(good.matrix.values_TD, scales)), expected)


def test_tokens_told_before_and_sizes_known_before_are_held_to() -> None:
    with pytest.raises(UpdateError, match="as told before"):
        check_message(message(), replace(EXPECTED, loss_tokens=2))
    with pytest.raises(UpdateError, match=r"shape \(5, 8\)"):
        check_message(message(), replace(EXPECTED, num_tokens=5))


# ---- bytes ---------------------------------------------------------------------------------------------------------


def test_no_mutated_split_message_raises_anything_but_our_error() -> None:
    blobs = [unsealed(message().to_bytes()), unsealed(message("int8").to_bytes())]
    assert SplitMessage.from_bytes(sealed(blobs[0])).num_loss_tokens == 3
    odd = [None, True, -1, 1.5, "x", 10**400, [], {}, "gradients", [[1]], "F64", 2**60]
    for number in range(NUMBER):
        rng = stream(12, "mutated split messages", number)
        blob = bytearray(blobs[number % 2])
        length = int.from_bytes(blob[:8], "little")
        if rng.random() < 0.5:
            for position in rng.integers(0, len(blob), 4):
                blob[int(position)] = int(rng.integers(256))
        else:
            header = json.loads(blob[8 : 8 + length])
            fields = json.loads(header["__metadata__"]["split"])
            key = [*fields, "admin"][int(rng.integers(len(fields) + 1))]
            value = odd[int(rng.integers(len(odd)))]
            if rng.random() < 0.6:
                fields[key] = value
            else:
                name = list(header)[int(rng.integers(len(header)))]
                header[name if rng.random() < 0.5 else "evil"] = value
            if isinstance(header.get("__metadata__"), dict):
                header["__metadata__"]["split"] = json.dumps(fields)
            text = json.dumps(header).encode()
            blob = bytearray(len(text).to_bytes(8, "little") + text + blob[8 + length :])
        cut = int(rng.integers(0, len(blob))) if rng.random() < 0.1 else len(blob)
        with suppress(UpdateError):
            check_message(SplitMessage.from_bytes(sealed(bytes(blob[:cut]))), EXPECTED)


def test_a_split_message_of_which_any_bit_was_changed_on_the_way_is_refused() -> None:
    blob = message().to_bytes()
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1 << position % 8
        with pytest.raises(UpdateError, match="the hash they end with"):
            SplitMessage.from_bytes(bytes(changed))


def test_a_field_twice_too_many_or_too_few_is_refused() -> None:
    tensors = load(unsealed(message().to_bytes()))
    fields = json.loads(message()._metadata())
    texts = [
        json.dumps(fields)[:-1] + ', "step": 5}',
        json.dumps(fields | {"admin": True}),
        json.dumps({name: value for name, value in fields.items() if name != "step"}),
        "[" * 10_000,
    ]
    for text in texts:
        with pytest.raises(UpdateError):
            SplitMessage.from_bytes(sealed(save(tensors, metadata={"split": text})))


# ---- a run ---------------------------------------------------------------------------------------------------------


LABELS = ("target", "indices", "index", "token")
"""Words of the cases that are about labels, which do not cross where they stay with the clients."""
NAMING = ("another client", "true for a client")
"""Cases in which it is the sender that is wrong, which only a transport can tell."""


@pytest.mark.parametrize("tail_blocks", [None, 1])
@pytest.mark.parametrize("what", [what for what in BAD if what not in NAMING])
def test_a_bad_message_costs_its_client_the_period_and_nobody_else(
    what: str, tail_blocks: int | None, set_up: SetUp
) -> None:
    """One client sends it with its second step; the run goes on, without it until the aggregation."""
    if tail_blocks is not None and any(word in what for word in LABELS):
        pytest.skip("labels stay with the client")
    _, parties, _ = set_up(tail_blocks=tail_blocks)
    original, before, after = parties.clients.activations, vars(message()), vars(BAD[what](message()))
    bad = {name: after[name] for name in before if not same(before[name], after[name])}

    def activations(step: int, micro_batch: int) -> Iterator[Any]:
        for sent in original(step, micro_batch):
            yield replace(sent, **bad) if sent.client == 1 and step == 1 else sent

    parties.clients.activations = activations  # type: ignore[method-assign]
    records = list(run_split(parties.initial(), parties, lambda state: {}))
    reasons = [[client.reason is None for client in record.clients] for record in records]
    assert reasons == [[True, False, True], [True, True, True]]
    assert all(math.isfinite(record.loss_nats) for record in records)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Encoded) and isinstance(right, Encoded):
        return left.scales_T is right.scales_T and same(left.values_TD, right.values_TD)
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)


def test_gradients_that_do_not_fit_are_the_clients_failure_and_no_exception(set_up: SetUp) -> None:
    _, parties, _ = set_up()
    original = parties.server.gradients

    def gradients(step: int, *rest: Any) -> list[SplitMessage]:
        sent = original(step, *rest)
        return [replace(m, matrix=Encoded(torch.ones(3, 3))) if m.client == 1 and step == 1 else m for m in sent]

    parties.server.gradients = gradients  # type: ignore[method-assign]
    first, second = run_split(parties.initial(), parties, lambda state: {})
    assert [client.reason is None for client in first.clients] == [True, False, True]
    assert "values_TD: expected gradients" in str(first.clients[1].reason)
    assert all(client.reason is None for client in second.clients)


@pytest.mark.parametrize("what", ["garbage", "nobody", "twice", "failure of a stranger"])
def test_what_no_client_sent_changes_nothing(what: str, set_up: SetUp) -> None:
    losses = []
    for is_hostile in (False, True):
        _, parties, _ = set_up()
        original = parties.clients.activations

        def activations(step: int, part: int, original: Any = original, is_hostile: bool = is_hostile) -> Iterator[Any]:
            for sent in original(step, part):
                yield sent
                if is_hostile:
                    yield {
                        "garbage": object(),
                        "nobody": replace(sent, client=99),
                        "twice": sent,
                        "failure of a stranger": Failure(99, "x"),
                    }[what]

        parties.clients.activations = activations  # type: ignore[method-assign]
        losses.append([record.loss_nats for record in run_split(parties.initial(), parties, lambda state: {})])
    assert losses[0] == losses[1]


def test_huge_activations_cost_their_client_the_period_and_the_server_no_number(set_up: SetUp) -> None:
    _, parties, _ = set_up()
    original = parties.clients.activations

    def activations(step: int, micro_batch: int) -> Iterator[Any]:
        for sent in original(step, micro_batch):
            huge = Encoded(torch.full_like(sent.matrix.values_TD, 3e38))
            yield replace(sent, matrix=huge) if sent.client == 1 else sent

    parties.clients.activations = activations  # type: ignore[method-assign]
    records = list(run_split(parties.initial(), parties, lambda state: {}))
    assert all(record.state.server.is_finite() and record.state.global_adapter().is_finite() for record in records)
    assert all(client.reason is None for record in records for client in record.clients if client.client != 1)
