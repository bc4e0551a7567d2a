"""Dropout masks that belong to a row: the same whichever rows share its pass, on every machine and device.

A mask is no draw from a stream but a function of where it is used, computed in integers:

    keep(row, t, module, i)  =  h(w_t, v_i) ≥ p,    w_t = h(row, t),    v_i = h(module, i)

A row is named by the run's seed, the round, the client and the row's place in the order in which the client reads its
rows in that round. One 64-bit word decides four neighbouring features, 16 bits each, so that p acts in steps of 2⁻¹⁶.

Letters: N rows, T tokens, I features, J words of four features.
Source: SplitMix64 (Steele, Lea and Flood, 2014) for the words' multipliers; counters in place of states as in Salmon et
al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.seeding import derive

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LANES, _LEVELS = 4, 1 << 16

_WORDS_AT_A_TIME = {"cpu": 1 << 15}
"""Words computed at a time: what stays in a CPU's cache; elsewhere all at once."""


@dataclass(frozen=True, eq=False)
class Dropout:
    """What the adapters' inputs lose in a pass: a rate, and the words (T,) of the pass's tokens."""

    rate: float
    words_T: Tensor

    def mask(self, feature_words_J: Tensor, num_tokens: int, num_features: int, dtype: torch.dtype) -> Tensor:
        """Return the mask (T, I) of one module for the first tokens: zeros, and one over the share that is kept."""
        dropped = min(round(self.rate * _LEVELS), _LEVELS - 1)
        mask_TI = torch.empty(num_tokens, num_features, dtype=dtype, device=self.words_T.device)
        step = max(1, _WORDS_AT_A_TIME.get(mask_TI.device.type, 1 << 62) // max(1, len(feature_words_J)))
        for start in range(0, num_tokens, step):
            part = slice(start, min(start + step, num_tokens))
            mask_TI[part] = _lanes(self.words_T[part], feature_words_J)[:, :num_features] >= dropped - _LEVELS // 2
        return mask_TI.mul_(_LEVELS / (_LEVELS - dropped))

    def at(self, rows_K: Tensor) -> Dropout:
        """Return the dropout of some of the pass's tokens."""
        return Dropout(self.rate, self.words_T.index_select(0, rows_K))


def dropout_of(
    rate: float, keys: Sequence[NDArray[np.uint64]], lengths: Sequence[int], device: torch.device | str
) -> Dropout | None:
    """Return the dropout of a pass over rows of these keys and lengths; none at a rate of zero."""
    return Dropout(rate, token_words(np.concatenate(keys), lengths).to(device)) if rate else None


def row_keys(seed: int, round: int, client: int, places: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the keys (N,) of rows by their places in the order in which a client reads them in a round."""
    return _words(derive(seed, "dropout", round, client), np.asarray(places))


def token_words(keys: NDArray[np.uint64], lengths: Sequence[int]) -> Tensor:
    """Return the words (T,) of the tokens of rows one behind the other."""
    starts = np.cumsum(lengths) - np.asarray(lengths)
    positions = np.arange(int(np.sum(lengths))) - np.repeat(starts, lengths)
    return _tensor(_words(np.repeat(keys, lengths), positions))


def feature_words(module: str, num_features: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the words (J,) of a module's features, four of them to a word."""
    return _tensor(_words(derive(0, "dropout", module), np.arange(-(-num_features // _LANES)))).to(device)


def _lanes(token_words_T: Tensor, feature_words_J: Tensor) -> Tensor:
    """Return 16 random bits (T, 4 J) for every feature of every token, as signed integers."""
    # The shift copies the sign, which costs one bit of 64 and does no harm, as a multiplication follows.
    word_TJ = token_words_T[:, None] ^ feature_words_J
    for multiplier in (_FIRST, _SECOND):
        word_TJ.mul_(_signed(multiplier))
        word_TJ.bitwise_xor_(word_TJ >> 32)
    return word_TJ.mul_(_signed(_STEP)).view(torch.int16)


def _words(key: int | NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the ``counters``-th outputs of SplitMix64 from a state."""
    word = np.asarray(key, dtype=np.uint64) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_STEP)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(_FIRST)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(_SECOND)
    mixed: NDArray[np.uint64] = word ^ (word >> np.uint64(31))
    return mixed


def _tensor(words: NDArray[np.uint64]) -> Tensor:
    return torch.from_numpy(words.view(np.int64))


def _signed(word: int) -> int:
    return word - (1 << 64)
