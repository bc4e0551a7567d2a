"""A site and its trainer: frames through a pipe, from a file, and in memory that both map, until nobody uses it."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.sites.frames import LARGE_BYTES
from fedloom.sites.handover import Channel, SharedRoom, Stored

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The site's end and the trainer's."""
    (there, to_there), (here, to_here) = os.pipe(), os.pipe()
    ours, theirs = socket.socketpair()
    with os.fdopen(here, "rb") as source, os.fdopen(there, "rb") as other:
        site = Channel(source, os.fdopen(to_there, "wb"), ours)
        trainer = Channel(other, os.fdopen(to_here, "wb"), theirs)
        yield site, trainer
        site.close()
        trainer.close()


def filled(room: SharedRoom, byte: int, size: int = LARGE_BYTES) -> memoryview:
    frame = room(size)
    frame[:] = bytes([byte]) * size
    return frame


def test_small_frames_go_through_the_pipe_in_order(ends: Ends) -> None:
    site, trainer = ends
    for frame in (b"", b"one", [b"tw", memoryview(b"o")]):
        site.put(frame, SharedRoom())
    assert [bytes(trainer.get() or b"none") for _ in range(3)] == [b"none", b"one", b"two"]


def test_the_end_of_a_pipe_is_no_frame_within_one_too(ends: Ends) -> None:
    site, trainer = ends
    site._sink.write((5).to_bytes(8, "little") + b"cut")
    site.close()
    assert trainer.get() is None


def test_an_answer_is_read_from_its_file_though_that_is_replaced_and_removed(ends: Ends, tmp_path: Path) -> None:
    site, trainer = ends
    body, path = os.urandom(LARGE_BYTES), tmp_path / "state"
    path.write_bytes(b"memory" + body)
    trainer.put(Stored([b"head", body], os.open(path, os.O_RDONLY), 6))
    (tmp_path / "next").write_bytes(bytes(len(body) + 6))
    (tmp_path / "next").replace(path)
    path.unlink()
    found = site.get()
    assert isinstance(found, list)
    assert [bytes(part) for part in found] == [b"head", body]


def test_a_large_frame_lies_in_one_memory_and_the_next_one_waits_for_it_to_be_free(ends: Ends) -> None:
    site, trainer = ends
    room = SharedRoom()
    first = filled(room, 1)
    site.put(first, room)
    taken = trainer.get()
    assert isinstance(taken, memoryview)
    first[0] = 9
    assert taken[0] == 9  # it was not copied
    del first
    second = filled(room, 2)  # beside the first, which is in use
    assert room.let_go(second) is None
    assert (taken[1], second[1], len(second)) == (1, 2, LARGE_BYTES)
    del taken, second
    gc.collect()
    third = filled(room, 3)
    site.put(third, room)
    again = trainer.get()
    third[0] = 9
    assert isinstance(again, memoryview)
    assert again[0] == 9  # the memory was free again
    larger = filled(room, 4, 2 * LARGE_BYTES)
    assert again[1] == 3
    assert len(larger) == 2 * LARGE_BYTES


def test_a_part_of_a_frame_keeps_the_memory_from_being_used_again(ends: Ends) -> None:
    site, trainer = ends
    room = SharedRoom()
    site.put(filled(room, 1), room)
    whole = trainer.get()
    assert isinstance(whole, memoryview)
    part = whole[100:200]
    del whole
    filled(room, 2)
    assert set(part) == {1}


def test_a_frame_that_was_dropped_gives_the_memory_back() -> None:
    room = SharedRoom()
    for byte in (1, 2):
        dropped = filled(room, byte)
        assert room.let_go(bytes(dropped)) is None
        memory = room._memory
        del dropped
    assert room._memory is memory
    kept = filled(room, 3)
    assert room.let_go(kept) is not None


def test_memory_that_an_ended_trainer_held_is_not_waited_for(ends: Ends) -> None:
    site, _ = ends
    room = SharedRoom()
    site.put(filled(room, 1), room)
    room.forget()
    assert room.let_go(filled(room, 2)) is not None
