"""A step's samples in pieces: every token once, in order, and pieces of like sizes."""

from __future__ import annotations

import threading

import pytest
import torch

from fedloom.split.pieces import Spread, joined

LENGTHS = {4: [5, 9, 3], 2: [7], 7: [2, 2, 8, 30]}


@pytest.mark.parametrize("most", [1, 10, 16, 25, 1000])
def test_every_token_is_in_one_piece_and_in_order(most: int) -> None:
    pieces = Spread(most, 1).pieces(LENGTHS)
    assert [client for piece in pieces for client in piece.tokens] == sorted(
        (client for piece in pieces for client in piece.tokens), key=[*LENGTHS].index
    )
    for client, lengths in LENGTHS.items():
        own = [piece for piece in pieces if client in piece.samples]
        samples = [lengths[piece.samples[client]] for piece in own]
        assert [length for part in samples for length in part] == lengths
        tokens = [range(sum(lengths))[piece.tokens[client]] for piece in own]
        assert [len(part) for part in tokens] == [sum(part) for part in samples]
        assert [token for part in tokens for token in part] == list(range(sum(lengths)))
    for piece in pieces:
        places = [row for own in piece.rows.values() for row in range(own.start, own.stop)]
        assert places == list(range(len(places)))
        assert piece.rows.keys() == piece.samples.keys() == piece.tokens.keys()
        assert len(places) <= most or [own.stop - own.start for own in piece.samples.values()] == [1]


def test_pieces_are_as_few_as_can_be_and_of_like_sizes() -> None:
    pieces = Spread(1024, 1).pieces({0: [260] * 5, 1: [10, 240]})
    assert [sum(own.stop - own.start for own in piece.tokens.values()) for piece in pieces] == [780, 770]
    assert Spread(1024, 1).pieces({0: [1024]}) == Spread(1 << 62, 1).pieces({0: [1024]})
    assert Spread(10, 1).pieces({}) == []


def test_work_comes_back_in_its_order_from_as_many_threads_as_there_are_cores() -> None:
    both = threading.Barrier(2)

    def work(item: int) -> tuple[int, str]:
        both.wait(10)
        return item, threading.current_thread().name

    found = Spread(10, 2).run(work, range(6))
    assert [item for item, _ in found] == list(range(6))
    assert len({name for _, name in found}) == 2
    here = threading.current_thread().name
    assert Spread(10, 1).run(lambda item: (item, threading.current_thread().name), range(2)) == [(0, here), (1, here)]


def test_parts_are_joined_client_by_client() -> None:
    whole = joined([(3, torch.ones(2, 4)), (1, torch.zeros(1, 4)), (3, torch.zeros(1, 4))])
    assert list(whole) == [3, 1]
    assert whole[3][:, 0].tolist() == [1.0, 1.0, 0.0]
