"""Frames: what is damaged, foreign or too long is refused before anything of it is used."""

from __future__ import annotations

import pytest

from fedloom.errors import UpdateError
from fedloom.federation.blob import Checked, sealed
from fedloom.seeding import stream
from fedloom.sites.dropped import Dropped
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.frames import (
    FORMAT,
    LARGE_BYTES,
    TO_SERVER,
    TO_SITE,
    End,
    Hello,
    Result,
    Scored,
    SheetSent,
    Task,
    compared,
    frame,
    framed,
    unframe,
    unframe_here,
)

RUN, SHA = "ab" * 16, "cd" * 32
HELLO = Hello(format=FORMAT, fedloom="0.1.0", torch="2.8.0+cpu", run=RUN, state="ready", task=SHA)
RESULT = Result(run=RUN, round=3, task=SHA, refusal=Refusal(code="rank", numbers={"asked": 8, "allowed": 4}))
UP = [(HELLO, b""), (RESULT, sealed(b"update")), (Scored(run=RUN, round=0, sum_nats=1.5, num_loss_tokens=3), b"")]
DOWN = [(SheetSent(run=RUN, format=FORMAT), b"{}"), (Task(run=RUN, round=1, task=SHA, counted=0), sealed(b"x" * 99))]


@pytest.mark.parametrize(("head", "body"), UP)
def test_a_frame_to_the_server_comes_back_as_it_was(head: Hello, body: bytes) -> None:
    found, theirs = unframe(frame(head, body), TO_SERVER, 200)
    assert (found, bytes(theirs)) == (head, body)


@pytest.mark.parametrize(("head", "body"), DOWN)
def test_a_frame_to_a_site_comes_back_as_it_was(head: Task, body: bytes) -> None:
    found, theirs = unframe(frame(head, body), TO_SITE, 200)
    assert (found, bytes(theirs)) == (head, body)


def test_a_receiver_takes_no_frame_of_the_other_direction() -> None:
    for head, body in UP:
        with pytest.raises(UpdateError):
            unframe(frame(head, body), TO_SITE, 100)
    for down, body in DOWN:
        with pytest.raises(UpdateError):
            unframe(frame(down, body), TO_SERVER, 100)


def test_a_body_where_none_belongs_or_a_longer_one_is_refused() -> None:
    with pytest.raises(UpdateError, match="no body in a frame of kind end"):
        unframe(frame(End(run=RUN), b"x"), TO_SITE, 100)
    with pytest.raises(UpdateError, match="at most 5 bytes"):
        unframe(frame(RESULT, sealed(b"update")), TO_SERVER, 5)


def test_a_length_that_moves_a_blank_of_the_body_into_the_head_is_refused() -> None:
    """A safetensors header of 32 bytes begins with a blank, which JSON ignores."""
    data = frame(RESULT, b" update")
    longer = int.from_bytes(data[:4], "little") + 1
    with pytest.raises(UpdateError, match="digest"):
        unframe(longer.to_bytes(4, "little") + data[4:], TO_SERVER, 100)


def test_a_head_with_an_unknown_entry_is_refused() -> None:
    text = HELLO.model_dump_json().replace("{", '{"path":"/etc/passwd",', 1)
    honest = frame(HELLO)
    forged = frame(Hello.model_construct(**HELLO.model_dump()))
    assert honest == forged
    import hashlib

    raw = text.encode()
    length = len(raw).to_bytes(4, "little")
    data = length + hashlib.sha256(length + raw).digest() + raw
    with pytest.raises(UpdateError, match="known kind"):
        unframe(data, TO_SERVER, 100)


@pytest.mark.parametrize("numbers", [(TO_SERVER, UP), (TO_SITE, DOWN)])
def test_a_thousand_mutated_frames_are_all_refused(numbers: tuple) -> None:
    kinds, messages = numbers
    rng = stream(7, "mutations")
    for turn in range(1000):
        head, body = messages[turn % len(messages)]
        data = bytearray(frame(head, body))
        match int(rng.integers(4)):
            case 0:
                place = int(rng.integers(len(data)))
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data = data[: int(rng.integers(len(data)))]
            case 2:
                data += rng.bytes(int(rng.integers(1, 50)))
            case 3:
                place = int(rng.integers(len(data)))
                data[place:place] = rng.bytes(int(rng.integers(1, 9)))
        with pytest.raises(UpdateError):
            unframe(bytes(data), kinds, 200)


def test_a_frame_in_several_buffers_is_the_same_bytes() -> None:
    for head, body in UP + DOWN:
        parts = framed(head, [memoryview(body)[:3], body[3:]]) if body else framed(head, [])
        assert b"".join(parts) == frame(head, body)


def test_a_body_that_ends_with_its_own_hash_is_hashed_once_and_says_that_it_was() -> None:
    data = bytearray(frame(RESULT, sealed(b"update")))
    assert isinstance(unframe(data, TO_SERVER, 100)[1], Checked)
    data[data.index(b"update")] ^= 1
    with pytest.raises(UpdateError, match="do not have the hash they end with"):
        unframe(data, TO_SERVER, 100)
    head, body = unframe_here(data, TO_SERVER, 100)  # from a process of this machine, which has looked
    assert (head, bytes(body)[:6]) == (RESULT, b"tpdate")
    with pytest.raises(UpdateError, match="fits its digest"):
        unframe_here(data[:-1] + bytes([data[-1] ^ 1]), TO_SERVER, 100)


def test_what_is_dropped_is_counted_by_sender_and_reason_without_growing_for_ever() -> None:
    dropped = Dropped()
    for turn in range(5000):
        dropped.add(f"name-{turn}", "foreign")
    dropped.add("name-0", "foreign")
    assert dropped.counts["name-0", "foreign"] == 2
    assert len(dropped.counts) <= 1 << 10


def test_a_large_frame_is_compared_where_it_comes_in_and_a_damaged_one_is_left_to_its_reader() -> None:
    body = sealed(bytes(LARGE_BYTES))
    whole = frame(RESULT, body)
    assert compared(whole) == Checked(whole)
    head, found = unframe(compared(whole), TO_SERVER, 2 * LARGE_BYTES)
    assert (head, bytes(found)) == (RESULT, body)
    for place in (2, 20, 40, LARGE_BYTES // 2, -1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        assert compared(damaged) is damaged
        with pytest.raises(UpdateError):
            unframe(compared(damaged), TO_SERVER, 2 * LARGE_BYTES)
    small, unsealed = frame(HELLO), frame(SheetSent(run=RUN, format=FORMAT), bytes(LARGE_BYTES))
    assert compared(small) is small
    assert compared(unsealed) is unsealed
    with pytest.raises(UpdateError, match="at most 5 bytes"):
        unframe(compared(whole), TO_SERVER, 5)


def test_a_frame_in_two_buffers_is_cut_where_its_head_ends() -> None:
    beginning, *rest = framed(RESULT, [sealed(b"update")])
    head, body = unframe_here([beginning, b"".join(rest)], TO_SERVER, 200)
    assert (head, bytes(body)) == (RESULT, sealed(b"update"))
    for first, second in ((bytes(beginning[:-1]), b"}" + b"".join(rest)), (bytes(beginning) + b"u", rest[0][1:])):
        with pytest.raises(UpdateError, match="a whole frame"):
            unframe_here([first, second], TO_SERVER, 200)
