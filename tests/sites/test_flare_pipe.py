"""Pieces of frames: whole and in order, or not at all; and the pipe that carries them."""

from __future__ import annotations

import multiprocessing
from itertools import pairwise

import pytest

from fedloom.seeding import stream
from fedloom.sites import flare_pipe
from fedloom.sites.flare_pipe import PIECE, Event, Joiner, Pipe, Place, pieces


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flare_pipe, "PIECE_BYTES", 10)


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 95])
def test_a_frame_of_any_size_comes_back(size: int) -> None:
    joiner, frame = Joiner(100), bytes(range(size))
    found = [joiner.take(place, data) for place, data in pieces(frame, "s", 1)]
    assert found[-1] == frame
    assert found[:-1] == [None] * (len(found) - 1)


def test_whatever_is_lost_doubled_or_late_no_wrong_frame_and_no_order_but_the_senders() -> None:
    rng = stream(4, "pieces")
    for _ in range(200):
        frames = {number: bytes([number]) * int(rng.integers(40)) for number in range(1, 8)}
        sent = [piece for number, frame in frames.items() for piece in pieces(frame, "s", number)]
        for _ in range(int(rng.integers(6))):
            at, to = (int(number) for number in rng.integers(len(sent), size=2))
            match int(rng.integers(3)):
                case 0 if len(sent) > 1:
                    del sent[at]
                case 1:
                    sent.insert(to % (len(sent) + 1), sent[at])
                case _:
                    sent.insert(to, sent.pop(at))
        joiner = Joiner(100)
        found = [frame for place, data in sent if (frame := joiner.take(place, data)) is not None]
        numbers = [next(number for number, frame in frames.items() if frame == one) for one in found if one]
        assert all(first < second for first, second in pairwise(numbers))


def test_a_new_session_counts_from_its_own_beginning() -> None:
    joiner = Joiner(100)
    assert joiner.take(Place("a", 9, 0, True), b"x") == b"x"
    assert joiner.take(Place("a", 1, 0, True), b"late") is None
    assert joiner.take(Place("b", 1, 0, True), b"y") == b"y"


def test_a_frame_longer_than_was_asked_is_dropped_and_the_next_one_comes_in() -> None:
    joiner = Joiner(25)
    assert [joiner.take(place, data) for place, data in pieces(bytes(26), "s", 1)][-1] is None
    assert [joiner.take(place, data) for place, data in pieces(bytes(25), "s", 2)][-1] == bytes(25)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("session", 3),
        ("session", "x" * 65),
        ("frame", -1),
        ("frame", True),
        ("frame", 1.0),
        ("index", None),
        ("index", 1 << 60),
        ("last", 1),
    ],
)
def test_headers_that_a_stranger_wrote_are_no_place(name: str, value: object) -> None:
    headers = Place("s", 1, 0, True).as_headers()
    assert Place.of(headers.get) == Place("s", 1, 0, True)
    assert Place.of({**headers, f"fedloom_{name}": value}.get) is None


def test_the_pipe_carries_events_and_its_end_ends_the_other() -> None:
    first, second = (Pipe(end) for end in multiprocessing.Pipe())
    events = second.events()
    for event in (Event("started"), Event(PIECE, "oslo", Place("s", 1, 0, True), b"abc"), Event("done", "oslo")):
        assert first.put(event)
        assert next(events) == event
    first.close()
    assert list(events) == []
    assert not second.put(Event("started"))


def test_a_process_that_fedloom_did_not_start_has_no_pipe() -> None:
    assert Pipe.of_environment({}) is None
    assert Pipe.of_environment({flare_pipe.DESCRIPTOR: "x"}) is None
