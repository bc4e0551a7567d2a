"""Frames in pieces: every byte once, in order, whatever the buffers; and joined without a second copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fedloom.seeding import stream
from fedloom.sites import grpc_link
from fedloom.sites.link import cut


@pytest.mark.parametrize("sizes", [[], [0], [1], [10], [11], [3, 7], [3, 8], [0, 10, 0], [25, 0, 5], [9, 1, 1, 30]])
def test_pieces_are_full_but_the_last_one_and_hold_every_byte_once(sizes: list[int]) -> None:
    rng = stream(5, "cut")
    buffers = [rng.bytes(size) for size in sizes]
    found = [(b"".join(piece), is_last) for piece, is_last in cut(buffers, 10)]  # type: ignore[arg-type]
    whole = b"".join(buffers)
    assert b"".join(piece for piece, _ in found) == whole
    assert [is_last for _, is_last in found] == [False] * (len(found) - 1) + [True]
    assert all(len(piece) == 10 for piece, is_last in found if not is_last)
    assert len(found) == max(1, -(-len(whole) // 10))
    assert [(b"".join(piece), is_last) for piece, is_last in cut(whole, 10)] == found


def first(size: int, part: bytes) -> bytes:
    return b"\x02" + size.to_bytes(8, "little") + part


@pytest.mark.parametrize(
    "pieces",
    [
        [first(11, b"ab")],
        [first(3, b"ab"), b"\x01cd"],
        [first(3, b"ab"), b"\x00cd"],
        [first(4, b"ab"), b"\x01c"],
        [first(3, b"ab"), first(3, b"ab")],
        [b"\x00ab", b"\x01c"],
        [b"\x01" + bytes(11)],
        [first(3, b"abcd")],
    ],
    ids=["beyond", "more at the end", "more within", "less", "twice", "unsaid", "one piece beyond", "all at once"],
)
def test_a_frame_that_is_not_as_long_as_its_first_piece_says_ends_the_stream(pieces: list[bytes]) -> None:
    with pytest.raises(ValueError, match="a frame is too"):
        next(grpc_link._frames(iter(pieces), 10))


def test_a_frame_that_was_taken_in_is_not_held_while_the_next_one_is_waited_for() -> None:
    """Otherwise a link would hold the last message, however large, for as long as nothing else comes."""
    held: list[object] = []

    def stream() -> Iterator[bytes]:
        yield b"\x02" + (3).to_bytes(8, "little") + b"ab"
        yield b"\x01c"
        held.extend(frames.gi_frame.f_locals.values())
        yield b"\x01d"

    frames: Any = grpc_link._frames(stream(), 10)
    assert next(frames) == b"abc"
    assert next(frames) == b"d"
    assert held
    assert b"abc" not in held
