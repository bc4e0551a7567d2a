"""A mask belongs to a row: to its client, its place and its module, and to nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedloom.lora.dropout import dropout_of, feature_words, row_keys

FEATURES = 30


def masks(keys: list[tuple[int, int, int, int]], lengths: list[int], rate: float = 0.5, module: str = "q") -> Tensor:
    """Return the mask of rows of (seed, round, client, place)."""
    words = [row_keys(seed, number, client, [place]) for seed, number, client, place in keys]
    dropout = dropout_of(rate, words, lengths, "cpu")
    assert dropout is not None
    return dropout.mask(feature_words(module, FEATURES), sum(lengths), FEATURES, torch.float32)


def test_a_rows_mask_does_not_depend_on_its_company_nor_on_what_follows_in_it() -> None:
    alone = masks([(1, 1, 0, 4)], [5])
    assert torch.equal(masks([(1, 1, 2, 0), (1, 1, 0, 4), (1, 1, 0, 5)], [7, 5, 2])[7:12], alone)
    assert torch.equal(masks([(1, 1, 0, 4)], [9])[:5], alone)


@pytest.mark.parametrize("other", [(2, 1, 0, 4), (1, 2, 0, 4), (1, 1, 1, 4), (1, 1, 0, 5)])
def test_seed_round_client_and_place_each_change_a_mask(other: tuple[int, int, int, int]) -> None:
    assert not torch.equal(masks([(1, 1, 0, 4)], [5]), masks([other], [5]))


def test_modules_tokens_and_features_have_masks_of_their_own() -> None:
    mask = masks([(1, 1, 0, 4)], [64])
    assert not torch.equal(mask, masks([(1, 1, 0, 4)], [64], module="v"))
    assert len({tuple(row) for row in mask.tolist()}) == 64
    assert len({tuple(column) for column in mask.T.tolist()}) == FEATURES


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_share_that_is_kept_is_the_rates_and_the_mean_stays(rate: float) -> None:
    mask = masks([(1, 1, 0, 4)], [4000], rate)
    kept = (mask > 0).double()
    spread = (rate * (1 - rate)) ** 0.5
    assert float(kept.mean()) == pytest.approx(1 - rate, abs=5 * spread / mask.numel() ** 0.5)
    assert (kept.mean(0) - (1 - rate)).abs().max() < 5 * spread / 4000**0.5
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / (1 - rate), rel=1e-3)]


def test_neighbours_are_independent() -> None:
    """Four features share a word, and tokens share their features' words: neither shows as a correlation."""
    kept = (masks([(1, 1, 0, 4)], [20000]) > 0).double()
    of_features = torch.corrcoef(kept.T).fill_diagonal_(0)
    assert of_features.abs().max() < 5.5 / 20000**0.5
    signs = kept * 2 - 1
    rectangles = signs[:-1, :-4] * signs[1:, :-4] * signs[:-1, 4:] * signs[1:, 4:]
    assert abs(float(rectangles.mean())) < 5 / rectangles.numel() ** 0.5


def test_the_mask_is_these_bits_on_every_machine() -> None:
    """Computed once by the words' definition in Python's integers; another machine must find the same."""
    expected = [[_kept(token, feature) for feature in range(FEATURES)] for token in range(3)]
    assert (masks([(1, 1, 0, 4)], [3]) > 0).tolist() == expected


def _kept(token: int, feature: int) -> bool:
    from fedloom.seeding import derive

    def split_mix(state: int, counter: int) -> int:
        word = (state + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    row = split_mix(derive(1, "dropout", 1, 0), 4)
    word = split_mix(row, token) ^ split_mix(derive(0, "dropout", "q"), feature // 4)
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        word = word * multiplier % 2**64
        word ^= (word >> 32) | ((2**32 - 1) << 32 if word >> 63 else 0)
    word = word * 0x9E3779B97F4A7C15 % 2**64
    lane = (word >> 16 * (feature % 4)) % 2**16
    return (lane - 2**16 if lane >= 2**15 else lane) >= 0


def test_a_rate_of_zero_is_no_dropout() -> None:
    assert dropout_of(0.0, [row_keys(1, 1, 0, [0])], [4], "cpu") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_mask() -> None:
    dropout = dropout_of(0.1, [row_keys(1, 1, 0, [0, 1])], [40, 24], "cuda")
    assert dropout is not None
    found = dropout.mask(feature_words("q", FEATURES, "cuda"), 64, FEATURES, torch.float32)
    assert torch.equal(found.cpu(), masks([(1, 1, 0, 0), (1, 1, 0, 1)], [40, 24], 0.1))
