"""No bytes raise in the server or at a client: what does not fit is refused, and its sender's failure."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedloom.errors import UpdateError
from fedloom.federation import blob as blobs
from fedloom.federation.blob import SEAL_BYTES, WireDtype, sealed, unsealed
from fedloom.federation.broadcasts import decode_broadcast, encode_broadcast
from fedloom.federation.intake import Arrival
from fedloom.federation.messages import decode_answer, encode_failure, encode_update, largest_answer
from fedloom.federation.rounds import RoundPlan, run_rounds
from fedloom.federation.server import ServerRules, broadcasts_for
from fedloom.federation.update_checks import Asked, check_update
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.client_half import Work
from fedloom.methods.server_steps import PlainStep
from fedloom.methods.state import Broadcast, Failure, News, ServerState, Update
from fedloom.methods.strategy import Cohort
from fedloom.methods.zero_padding import ZeroPadding
from fedloom.seeding import stream
from fedloom.training.stats import TrainingStats

NUMBER = int(os.environ.get("FEDLOOM_FUZZ", "3000"))
"""Mutated messages a test; ``FEDLOOM_FUZZ=100000`` tries more."""
SHAPES = {"layers.0.q": (6, 5), "layers.1.v": (4, 5)}
COHORT = Cohort(SHAPES, 2, lambda client: 2, seed=1)
ASKED = Asked(10, 4, 80)
ODD: list[Any] = [
    None, True, -1, 0, 1.5, 10**12, 2**53 + 1, 10**400, math.nan, math.inf, -math.inf, "", "20", "x" * 5000, "\x1b[2J",
    "\ud800", [], [1], {}, {"a": 1}, [[[[[[]]]]]], 1e308, -0.0, "F32", "F64", "I64", [2, 6], [6, -2], [6.0, 2], 2**64,
]  # fmt: skip
KEYS = ["admin", "kind", "", "layers.0.q", "layers.0.q.c", "__metadata__", "é", "a" * 3000, "../x", "num_rows", "held"]


def state() -> ServerState:
    return ZeroPadding(COHORT).initial()


def broadcast() -> Broadcast:
    return broadcasts_for(state(), [1], ZeroPadding(COHORT), {1: 2}, {1: 2.0})[0]


def update() -> Update:
    start = broadcast().start
    assert isinstance(start, Adapter)
    moved = {name: Pair(pair.b_OR + 0.1, pair.a_RI) for name, pair in start.items()}
    return Update(1, 1, Adapter(moved), TrainingStats(10, 70, 30, 4, 2.0, 1.5, 0.1))


def sent() -> bytes:
    return unsealed(encode_update(update(), update().adapter.as_tensors(), WireDtype.FP32))


def received(message: bytes) -> Update | Failure:
    return decode_answer(message, broadcast(), Work(), SHAPES, WireDtype.FP32, lambda draw: draw.adapter(SHAPES, 2, 1))


def answer(blob: bytes) -> Update | Failure:
    """Read a blob that its client sent as it is, with the right hash."""
    return received(sealed(blob))


def parts(blob: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def joined(header: str | bytes, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + body


def with_numbers(change: Callable[[dict[str, Any]], Any], blob: bytes | None = None) -> bytes:
    header, body = parts(sent() if blob is None else blob)
    numbers = json.loads(header["__metadata__"]["message"])
    text = change(numbers)
    header["__metadata__"]["message"] = text if isinstance(text, str) else json.dumps(numbers)
    return joined(json.dumps(header), body)


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> bytes:
    header, _ = parts(sent())
    tensors = load(sent())
    change(tensors)
    return bytes(save({key: t.contiguous() for key, t in tensors.items()}, metadata=header["__metadata__"]))


def doubled(text: str, key: str) -> str:
    """Write a key of a JSON object a second time, with another value."""
    return text.rstrip()[:-1] + f', "{key}": 5}}'


MISFITS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: b"1234567",
    "a length alone": lambda: (1 << 40).to_bytes(8, "little"),
    "cut short": lambda: sent()[:-1],
    "cut in the header": lambda: sent()[:100],
    "one byte more": lambda: sent() + b"\0",
    "not UTF-8": lambda: joined(b'{"\xff": 1}', b""),
    "UTF-16": lambda: joined(json.dumps(parts(sent())[0]).encode("utf-16"), parts(sent())[1]),
    "a list for a header": lambda: joined("[]", b""),
    "nested header": lambda: joined("[" * 60_000, b""),
    "nested object": lambda: joined('{"a":' * 10_000, b""),
    "a huge header": lambda: joined(" " * (1 << 20) + "{}", b""),
    "no numbers": lambda: with_tensors(lambda t: None).replace(b'"message"', b'"messagE"'),
    "an extra number": lambda: with_numbers(lambda n: n.update(admin=True)),
    "a missing number": lambda: with_numbers(lambda n: n.__delitem__("num_rows")),
    "nested numbers": lambda: with_numbers(lambda n: "[" * 10_000),
    "a number twice": lambda: with_numbers(lambda n: doubled(json.dumps(n), "num_rows")),
    "a tensor twice": lambda: joined(doubled(json.dumps(parts(sent())[0]), "layers.0.q.a"), parts(sent())[1]),
    "text for rows": lambda: with_numbers(lambda n: n.update(num_rows="20")),
    "text for a loss": lambda: with_numbers(lambda n: n.update(loss_nats="x")),
    "markup for seconds": lambda: with_numbers(lambda n: n.update(seconds="<script>")),
    "NaN rows": lambda: with_numbers(lambda n: n.update(num_rows=math.nan)),
    "infinite loss": lambda: with_numbers(lambda n: n.update(loss_nats=math.inf)),
    "negative rows": lambda: with_numbers(lambda n: n.update(num_rows=-1)),
    "true for rows": lambda: with_numbers(lambda n: n.update(num_rows=True)),
    "10**400 rows": lambda: with_numbers(lambda n: n.update(num_rows=10**400)),
    "another client": lambda: with_numbers(lambda n: n.update(client=0)),
    "another kind": lambda: with_numbers(lambda n: n.update(kind="broadcast")),
    "a foreign tensor": lambda: with_tensors(lambda t: t.update({"evil.b": torch.zeros(1)})),
    "a lacking tensor": lambda: with_tensors(lambda t: t.__delitem__("layers.0.q.a")),
    "a vector for a matrix": lambda: with_tensors(lambda t: t.update({"layers.0.q.a": torch.zeros(10)})),
    "another rank": lambda: with_tensors(lambda t: t.update({"layers.0.q.a": torch.zeros(3, 5)})),
    "float64": lambda: with_tensors(lambda t: t.update({"layers.0.q.a": torch.zeros(2, 5, dtype=torch.float64)})),
    "whole numbers": lambda: with_tensors(lambda t: t.update({"layers.0.q.a": torch.zeros(2, 5, dtype=torch.int32)})),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_message_that_does_not_fit_is_its_clients_failure(what: str) -> None:
    found = answer(MISFITS[what]())
    assert isinstance(found, Failure)
    assert found.client == 1
    assert found.reason.isprintable()
    assert len(found.reason) <= 2000


def test_a_message_that_is_too_long_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    long = with_tensors(lambda t: t.update({"evil.b": torch.zeros(1 << 22, dtype=torch.uint8)}))
    monkeypatch.setattr(blobs.json, "loads", lambda *args, **named: pytest.fail("it was parsed"))
    found = answer(long)
    assert isinstance(found, Failure)
    assert "bytes, got" in found.reason


def test_a_broadcasts_header_of_a_hundred_megabytes_is_refused_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = b'"news/0/layers.0.q.a":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]},'
    header = b"{" + entry * ((100 << 20) // len(entry)) + b"}"
    monkeypatch.setattr(blobs.json, "loads", lambda *args, **named: pytest.fail("it was parsed"))
    for blob in (len(header).to_bytes(8, "little") + header, (100 << 20).to_bytes(8, "little") + header[:1000]):
        with pytest.raises(UpdateError, match="do not parse"):
            decode_broadcast(sealed(blob), SHAPES)


def test_a_broadcast_of_many_small_parts_is_within_the_limit_of_its_header() -> None:
    parts = tuple(Adapter({key: Pair(torch.ones(o, 1), torch.ones(1, i)) for key, (o, i) in SHAPES.items()})
                  for _ in range(100))  # fmt: skip
    sent = replace(broadcast(), news=News(0, 100, parts, False, "ab" * 32))
    for dtype in WireDtype:
        assert len(decode_broadcast(encode_broadcast(sent, dtype), SHAPES).news.parts) == 100


def test_a_message_of_which_any_bit_was_changed_on_the_way_is_refused_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = sealed(sent())
    assert isinstance(received(message), Update)
    monkeypatch.setattr(blobs.json, "loads", lambda *args, **named: pytest.fail("it was parsed"))
    for position in [*range(0, len(message), 7), *range(len(message) - SEAL_BYTES, len(message))]:
        changed = bytearray(message)
        changed[position] ^= 1 << position % 8
        assert isinstance(received(bytes(changed)), Failure), position
    for length in range(0, len(message), 11):
        assert isinstance(received(message[:length]), Failure), length
        assert isinstance(received(message + message[:length] + b"x"), Failure), length


def test_an_honest_answer_is_shorter_than_the_limit_in_every_dtype_of_the_wire() -> None:
    for dtype in WireDtype:
        blob = encode_update(update(), update().adapter.as_tensors(), dtype)
        assert len(blob) <= largest_answer(broadcast(), Work(), SHAPES, dtype)


def mutated(blob: bytes, rng: np.random.Generator) -> bytes:
    """Change a message in one to three places: its bytes, its header, its numbers, or its length."""
    for _ in range(int(rng.integers(1, 4))):
        blob = MUTATIONS[int(rng.integers(len(MUTATIONS)))](blob, rng)
    return blob


def _odd(rng: np.random.Generator) -> Any:
    return ODD[int(rng.integers(len(ODD)))]


def _flip(blob: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(blob)
    for position in rng.integers(0, max(1, len(blob)), int(rng.integers(1, 9))):
        if changed:
            changed[int(position)] = int(rng.integers(256))
    return bytes(changed)


def _cut(blob: bytes, rng: np.random.Generator) -> bytes:
    return blob[: int(rng.integers(0, len(blob) + 1))]


def _grow(blob: bytes, rng: np.random.Generator) -> bytes:
    return blob + rng.bytes(int(rng.integers(1, 200)))


def _header(blob: bytes, rng: np.random.Generator) -> bytes:
    try:
        header, body = parts(blob)
        keys = list(header)
        key = keys[int(rng.integers(len(keys)))] if keys and rng.random() < 0.7 else KEYS[int(rng.integers(len(KEYS)))]
        entry = header.get(key)
        if isinstance(entry, dict) and rng.random() < 0.7:
            inner = list(entry)
            entry[inner[int(rng.integers(len(inner)))] if inner else "x"] = _odd(rng)
        elif rng.random() < 0.3:
            header.pop(key, None)
        else:
            header[key] = _odd(rng)
        return joined(json.dumps(header, ensure_ascii=rng.random() < 0.5), body)
    except (ValueError, TypeError, AttributeError, KeyError):
        return blob


def _numbers(blob: bytes, rng: np.random.Generator) -> bytes:
    def change(numbers: dict[str, Any]) -> Any:
        keys = list(numbers)
        key = keys[int(rng.integers(len(keys)))] if rng.random() < 0.8 else KEYS[int(rng.integers(len(KEYS)))]
        if rng.random() < 0.2:
            numbers.pop(key, None)
        else:
            numbers[key] = _odd(rng)
        text = json.dumps(numbers)
        return text if rng.random() < 0.9 else text * 2

    try:
        return with_numbers(change, blob)
    except (ValueError, TypeError, AttributeError, KeyError):
        return blob


MUTATIONS = [_flip, _cut, _grow, _header, _numbers]


def test_no_mutated_answer_raises_and_none_is_taken_for_more_than_it_is() -> None:
    messages = [sent(), unsealed(encode_failure(Failure(1, "out of memory", 0)))]
    taken = 0
    for number in range(NUMBER):
        rng = stream(12, "mutated answers", number)
        blob = mutated(messages[int(rng.random() < 0.1)], rng)
        found = answer(blob)
        assert found.client == 1
        if isinstance(found, Failure):
            assert found.reason.isprintable(), number
            continue
        taken += 1
        assert found.adapter.shapes == SHAPES
        assert set(found.adapter.ranks.values()) == {2}
        with suppress(UpdateError):
            assert math.isfinite(check_update(found, broadcast(), Work(), SHAPES, ASKED))
    assert 0 < taken < NUMBER / 2  # flipped bits of a number are another number


def test_no_mutated_broadcast_raises_anything_but_our_error_at_a_client() -> None:
    side = update().adapter
    ahead = replace(state(), round=1, side=side, chain=(side,))
    whole = encode_broadcast(broadcasts_for(ahead, [1], ZeroPadding(COHORT), {1: 2}, {1: 2.0})[0], WireDtype.FP32)
    assert decode_broadcast(whole, SHAPES).news.parts[0].shapes == SHAPES
    for number in range(NUMBER // 3):
        with suppress(UpdateError):
            decode_broadcast(sealed(mutated(unsealed(whole), stream(12, "mutated broadcasts", number))), SHAPES)


# ---- what an engine hands over -------------------------------------------------------------------------------------


COUNTLESS = ("loss_nats", "loss_last_nats", "seconds")


class Garbage:
    """Something that is neither an update nor a failure, in client 1's name."""

    client = 1


def test_an_engines_garbage_is_left_out_and_the_round_goes_on() -> None:
    stats = TrainingStats(10, 70, 30, 4, 2.0, 1.5, 0.1)
    bad: list[Any] = [
        None,
        object(),
        Arrival(None, 0, 0),  # type: ignore[arg-type]
        Arrival(Failure([], "x"), 0, 0),  # type: ignore[arg-type]
        Arrival(Garbage(), 0, 0),  # type: ignore[arg-type]
    ]
    wrong: list[Update] = [
        replace(update(), adapter=None),
        replace(update(), stats=None),
        replace(update(), round="1"),
    ]
    for name in vars(stats):
        values: list[Any] = ["x", -2, math.nan, 10**5000 if name in COUNTLESS else None]
        wrong += [replace(update(), stats=replace(stats, **{name: value})) for value in values]
    for outcome in wrong:
        with pytest.raises(UpdateError):
            check_update(outcome, broadcast(), Work(), SHAPES, ASKED)
    records = round_of([*bad, Arrival(replace(update(), client=0), 0, 0)])
    assert [record.reason is None for record in records] == [True, False]
    assert "expected an update or a failure, got Garbage" in str(records[1].reason)


def test_a_message_error_of_the_engine_costs_the_clients_that_had_not_answered() -> None:
    def arrivals() -> Iterator[Arrival]:
        yield Arrival(replace(update(), client=0), 0, 0)
        raise UpdateError("expected a frame of client 1, got none; the connection was closed")

    records = round_of(arrivals())
    assert records[0].reason is None
    assert "the connection was closed" in str(records[1].reason)


def round_of(arrivals: Any) -> Sequence[Any]:
    """Return the records of a round of clients 0 and 1 in which these arrive."""

    class Engine:
        def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
            yield from arrivals

    strategy = ZeroPadding(COHORT)
    ranks, scales = {0: 2, 1: 2}, {0: 2.0, 1: 2.0}
    plan = RoundPlan(
        1, strategy, ServerRules(PlainStep()), lambda round: [0, 1], SHAPES, ranks, scales, lambda client: ASKED
    )
    return next(iter(run_rounds(strategy.initial(), plan, Engine(), lambda state: {}))).clients
