"""Attention over rows packed one behind the other, for any model that uses transformers' attention interface.

A packed pass is one row of T tokens without padding; attention stays inside each sample. The registered function gets
the samples' lengths through the forward's keyword arguments, so nothing is remembered between forwards. Outside
``packed_attention`` the model attends as it always did.

Letters: T tokens, N samples, L length of a sample, H query heads, G key/value heads, E head width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fedloom.errors import ModelError
from fedloom.lora.products import is_half_on_cpu, product_type
from fedloom.models.row_attention import USE_PADDED
from fedloom.training.flash import attend_at_once, runs_at_once
from fedloom.training.rotation import rotated_apart

PACKED = "fedloom_packed"
"""The name under which the packed attention is registered."""

LAYOUT = "packed_layout"
"""The keyword argument that carries the ``Layout`` through a model to its attention."""

_UNSUPPORTED = "which packed rows do not support"

BUCKET_RATIO, BUCKET_SLACK = 1.12, 8
"""A bucket holds samples up to this ratio, plus this many tokens, longer than its shortest."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Samples of similar length that share one attention call, right-padded to the longest of them.

    ``gather`` (n·L) are the token rows to read (a sample's last token repeated as padding), ``kept`` the places among
    them that are real.
    """

    num_samples: int
    length: int
    gather: Tensor
    kept: Tensor


class Buckets(NamedTuple):
    """All samples in buckets; ``restore`` (T) brings the kept rows of all back into the order of the pass."""

    buckets: list[Bucket]
    restore: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """How samples lie in a packed pass, and how their attention is called.

    Where samples do not share calls each is a call of its own on views of the pass: nothing is copied or padded, which
    is the faster way on a CPU. A GPU needs few calls: one for all where :mod:`fedloom.training.flash` runs, else one
    for each bucket. ``attended`` gathers the modules that were called with it.
    """

    lengths: tuple[int, ...]
    device: torch.device
    shares_calls: bool
    attended: set[nn.Module] = field(default_factory=set, repr=False)
    _masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths)

    @cached_property
    def bounds_N1(self) -> Tensor:
        """Where samples begin and end (N + 1, int32)."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(self.device)

    @cached_property
    def in_buckets(self) -> Buckets:
        """The samples in buckets of similar length, right-padded."""
        starts = torch.tensor([0, *accumulate(self.lengths)])
        buckets, kept_rows = [], []
        for members in _similar(self.lengths):
            length = self.lengths[members[-1]]
            steps = torch.arange(length)[None]
            own = torch.tensor([self.lengths[i] for i in members])[:, None]
            # Padding repeats a sample's last token: a real row, so no NaN can arise, and causal attention hides it.
            rows = starts[members][:, None] + torch.minimum(steps, own - 1)
            kept = (steps < own).flatten().nonzero()[:, 0]
            kept_rows.append(rows.flatten()[kept])
            buckets.append(Bucket(len(members), length, rows.flatten().to(self.device), kept.to(self.device)))
        return Buckets(buckets, torch.cat(kept_rows).argsort().to(self.device))

    def mask(self, like: Tensor, length: int, sliding_window: int | None) -> Tensor:
        """Return what to add to a sample's scores (L, L): 0 where a token (row) sees another, −inf elsewhere.

        Built once per pass for the longest sample; that of a shorter one is its corner.
        """
        key = (sliding_window, like.dtype)
        if key not in self._masks:
            unseen = torch.full((self.longest, self.longest), -math.inf, dtype=like.dtype, device=like.device)
            behind = 0.0 if sliding_window is None else unseen.tril(-sliding_window)
            self._masks[key] = unseen.triu(1) + behind
        return self._masks[key][:length, :length]


def layout(lengths: Sequence[int], device: torch.device | str = "cpu") -> Layout:
    """Return the layout of samples of these lengths: sample by sample on a CPU, in shared calls elsewhere."""
    place = torch.device(device)
    return Layout(tuple(lengths), place, shares_calls=place.type != "cpu")


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Group samples, shortest first, as long as each is near its group's shortest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[i] <= lengths[groups[-1][0]] * BUCKET_RATIO + BUCKET_SLACK:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


_LOCK = threading.Lock()
_UNDER_WAY: dict[int, tuple[int, str]] = {}
"""By a configuration's identity, which the parts of a cut model share: how many packed forwards are under way, and how
it attended before the first."""


@contextmanager
def packed_attention(model: Any, samples: Layout) -> Iterator[None]:
    """Let a model attend sample by sample, and rotate each by its own length; put back after what the model had.

    The forward gets the layout once more, as ``packed_layout``. Several threads may be in one at once, unless samples
    are rotated apart.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, attend)
    config = model.config
    with _LOCK:
        count, before = _UNDER_WAY.get(id(config), (0, config._attn_implementation))
        _UNDER_WAY[id(config)] = count + 1, before
        config._attn_implementation = PACKED
    try:
        with rotated_apart(model, samples.lengths):
            yield
    finally:
        with _LOCK:
            count, before = _UNDER_WAY.pop(id(config))
            if count > 1:
                _UNDER_WAY[id(config)] = count - 1, before
            else:
                config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention inside each sample of a packed pass: (1, H, T, E) in, (1, T, H, E) out.

    Key and value heads may be fewer than query heads; ``sliding_window`` counts the token itself, ``softcap`` is c in
    ``c·tanh(s / c)`` before the softmax. The base is frozen and in evaluation mode, so attention dropout is rejected.

    Raises:
        ModelError: for a feature that this attention does not have, by its name.
    """
    rows: Layout | None = kwargs.get(LAYOUT)
    if rows is None:
        raise ModelError(
            f"model.base: expected {LAYOUT!r} in the packed forward of {type(module).__name__}, got none: "
            f"its layers do not hand it on; {USE_PADDED}"
        )
    rows.attended.add(module)
    _check_supported(module, attention_mask, dropout, sliding_window, kwargs)
    dtype, scale = query.dtype, query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (t.to(product_type(t)) for t in (query, key, value))
    call = _Call(rows, scale, sliding_window, softcap)
    if not rows.shares_calls:
        parts = [torch.split(t, list(rows.lengths), dim=2) for t in (query, key, value)]
        attended = [call(*sample).transpose(1, 2) for sample in zip(*parts, strict=True)]
        return torch.cat(attended, dim=1).to(dtype), None
    if softcap is None and runs_at_once(query):
        window = None if sliding_window is None or sliding_window >= rows.longest else sliding_window
        ends = (rows.bounds_N1, rows.longest)
        return attend_at_once(query, key, value, *ends, scaling=scale, sliding_window=window), None
    return _attend_in_buckets(call, query, key, value, rows.in_buckets).to(dtype), None


def _check_supported(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> None:
    kind = type(module).__name__
    if kwargs.get("s_aux") is not None:
        raise ModelError(f"model.base: {kind} has attention sinks, {_UNSUPPORTED}; {USE_PADDED}")
    if kwargs.get("position_bias") is not None or attention_mask is not None:
        raise ModelError(f"model.base: {kind} adds a bias or mask of its own, {_UNSUPPORTED}; {USE_PADDED}")
    if not getattr(module, "is_causal", True):
        raise ModelError(f"model.base: {kind} has attention that is not causal; choose another base")
    if dropout:
        raise ModelError(f"model.base: expected no attention dropout, {kind} has {dropout}; call model.eval() first")
    if sliding_window is None and _layer_type(module) not in (None, "full_attention"):
        raise ModelError(f"model.base: {kind} has a {_layer_type(module)} layer, {_UNSUPPORTED}; {USE_PADDED}")


def _layer_type(module: nn.Module) -> str | None:
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return types[index] if types is not None and index is not None else None


def _attend_in_buckets(call: _Call, query: Tensor, key: Tensor, value: Tensor, rows: Buckets) -> Tensor:
    """Gather each bucket's samples, attend, and bring the real rows back in order."""
    by_token = [t[0].transpose(0, 1) for t in (query, key, value)]
    kept = []
    for bucket in rows.buckets:
        gathered = [t.index_select(0, bucket.gather) for t in by_token]
        shape = (bucket.num_samples, bucket.length)
        q, k, v = (t.view(*shape, *t.shape[1:]).transpose(1, 2) for t in gathered)
        attended = call(q, k, v).transpose(1, 2).flatten(0, 1)
        kept.append(attended.index_select(0, bucket.kept))
    return torch.cat(kept)[rows.restore][None]


@dataclass(frozen=True)
class _Call:
    """One attention product over samples of one (padded) length: (n, H, L, E) from (n, H, L, E), (n, G, L, E)."""

    rows: Layout
    scaling: float
    sliding_window: int | None
    softcap: float | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.softcap is not None or is_half_on_cpu(query):
            return self._two_products(query, key, value)
        length, shared = query.shape[2], query.shape[1] // key.shape[1]
        if self.sliding_window is None or length <= self.sliding_window:
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scaling, enable_gqa=shared > 1
            )
        key, value = (t.repeat_interleave(shared, 1) for t in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=self._mask(query), scale=self.scaling)

    def _two_products(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend by two products and a softmax: softcapping needs it, and in 16 bits a CPU with units is faster so."""
        n, heads, length, width = query.shape
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        # The query heads that share a key head are stacked as more rows of one product: no copies of keys are made.
        stacked = (query * self.scaling).reshape(key.shape[0], -1, width)
        scores = torch.bmm(stacked, key.transpose(1, 2)).view(n, heads, length, length)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        share = torch.softmax(scores.add_(self._mask(query)), -1)
        return torch.bmm(share.view(key.shape[0], -1, length), value).view(query.shape)

    def _mask(self, query: Tensor) -> Tensor:
        return self.rows.mask(query, query.shape[2], self.sliding_window)
