"""What a split message is held against at either side, before a number of it is used.

Of a bad index a GPU kills the process, and of a length that is none the samples shift against their labels: so lengths,
indices, targets and counts are checked, not only shapes. Letters: N samples, T tokens, D width, S targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.lora.pair import is_finite
from fedloom.split.codecs import DTYPES, Encoded, WireDtype
from fedloom.split.cut_messages import MessageKind, SplitMessage

_MAX_NATS = 1e6
"""Nats of one token: a loss of no model."""


@dataclass(frozen=True)
class Expected:
    """The one message that fits: whose, of which step, and what it can hold.

    Attributes:
        dtype: what its numbers are on the wire.
        num_tokens: T where it is known before.
        num_rows: N where lengths come with the message.
        max_length: tokens of the longest sample.
        vocabulary: where the labels come with the message, what they are below.
        max_loss_tokens: the most supervised tokens that its client's step can have; 0 where none are told.
        loss_tokens: how many they are, where that is known.
        is_whole_step: whether the message holds all of its client's step.
    """

    kind: MessageKind
    client: int
    step: int
    micro_batch: int
    width: int
    dtype: WireDtype
    num_tokens: int | None = None
    num_rows: int | None = None
    max_length: int = 0
    vocabulary: int | None = None
    max_loss_tokens: int = 0
    loss_tokens: int | None = None
    is_whole_step: bool = True

    @property
    def where(self) -> str:
        """Whose message, at which step, for people."""
        return f"client {self.client}, step {self.step}"


def check_message(message: SplitMessage, expected: Expected) -> None:
    """Refuse a message that is not the one asked for, or holds what cannot be.

    Raises:
        UpdateError: naming client, step and the part that does not fit.
    """
    if not isinstance(message, SplitMessage) or not isinstance(message.matrix, Encoded):
        _refuse(expected, "message", expected.kind, type(message).__name__)
    _check_numbers(message, expected)
    _check_matrix(message, expected)
    has_lengths, has_labels = expected.num_rows is not None, expected.vocabulary is not None
    for name, wanted in (("lengths_N", has_lengths), ("target_index_S", has_labels), ("targets_S", has_labels)):
        tensor = getattr(message, name)
        if (tensor is not None) is not wanted:
            _refuse(expected, name, "to be there" if wanted else "none", "none" if wanted else "one")
        if wanted and (not isinstance(tensor, Tensor) or tensor.dtype != torch.int32 or tensor.ndim != 1):
            _refuse(expected, name, "a list of int32", _told(tensor))
    if has_lengths:
        _check_lengths(message, expected)
    if has_labels:
        _check_labels(message, expected)
    _check_count(message, expected)


def fitting(
    messages: Iterable[SplitMessage], expected: Mapping[int, Expected]
) -> tuple[dict[int, SplitMessage], dict[int, str]]:
    """Return the messages that fit, and why others do not, by client; what names no client expected is nobody's."""
    found: dict[int, SplitMessage] = {}
    refused: dict[int, str] = {}
    for message in messages:
        client = getattr(message, "client", None)
        if type(client) is not int or client not in expected or client in found:
            continue
        try:
            check_message(message, expected[client])
            found[client] = message
            refused.pop(client, None)
        except UpdateError as error:
            refused[client] = str(error)
    return found, refused


def _check_numbers(message: SplitMessage, expected: Expected) -> None:
    for name in ("kind", "client", "step", "micro_batch"):
        got, wanted = getattr(message, name), getattr(expected, name)
        if type(got) is not type(wanted) or got != wanted:
            _refuse(expected, name, wanted, repr(got)[:40])
    loss = message.loss_nats
    most = _MAX_NATS * max(1, expected.max_loss_tokens)
    if type(loss) is not float or not -1.0 <= loss <= most:
        _refuse(expected, "loss_nats", f"a number from 0 to {most:.0e}", repr(loss)[:40])


def _check_matrix(message: SplitMessage, expected: Expected) -> None:
    values, scales = message.matrix.values_TD, message.matrix.scales_T
    kind = f"{expected.kind} of {expected.dtype} and shape ({expected.num_tokens or 'T'}, {expected.width})"
    if not isinstance(values, Tensor) or values.dtype != DTYPES[expected.dtype] or values.ndim != 2:
        _refuse(expected, "values_TD", kind, _told(values))
    num_tokens = values.shape[0] if expected.num_tokens is None else expected.num_tokens
    if tuple(values.shape) != (num_tokens, expected.width):
        _refuse(expected, "values_TD", kind, _told(values))
    if (scales is not None) is not (expected.dtype == "int8"):
        _refuse(expected, "scales_T", "scales with int8 and no other", "none" if scales is None else "some")
    if scales is not None:
        if not isinstance(scales, Tensor) or scales.dtype != torch.float32 or scales.shape != values.shape[:1]:
            _refuse(expected, "scales_T", f"{len(values)} of float32", _told(scales))
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            _refuse(expected, "scales_T", "finite numbers of 0 or more", "others")
    if values.is_floating_point() and not is_finite(values):
        raise UpdateError(
            f"{expected.where}: expected finite {expected.kind}, got NaN or infinity; lower training.learning_rate"
        )


def _check_lengths(message: SplitMessage, expected: Expected) -> None:
    lengths_N, num_tokens = message.lengths_N, message.matrix.values_TD.shape[0]
    assert lengths_N is not None
    if len(lengths_N) != expected.num_rows:
        _refuse(expected, "lengths_N", f"{expected.num_rows} rows, as asked for", len(lengths_N))
    if not bool(((lengths_N >= 1) & (lengths_N <= expected.max_length)).all()):
        _refuse(expected, "lengths_N", f"lengths from 1 to {expected.max_length}", "others")
    if int(lengths_N.sum()) != num_tokens:
        wanted = f"a sum of {num_tokens}, the rows of its {expected.kind} of shape ({num_tokens}, {expected.width})"
        _refuse(expected, "lengths_N", wanted, int(lengths_N.sum()))


def _check_labels(message: SplitMessage, expected: Expected) -> None:
    index_S, targets_S, num_tokens = message.target_index_S, message.targets_S, message.matrix.values_TD.shape[0]
    assert index_S is not None
    assert targets_S is not None
    assert expected.vocabulary is not None
    if len(index_S) != len(targets_S):
        _refuse(expected, "targets_S", f"{len(index_S)}, one for each index", len(targets_S))
    if len(index_S) and not (index_S[0] >= 0 and index_S[-1] < num_tokens and bool((index_S.diff() > 0).all())):
        _refuse(expected, "target_index_S", f"rising indices from 0 to {num_tokens - 1}", "others")
    if not bool(((targets_S >= 0) & (targets_S < expected.vocabulary)).all()):
        _refuse(expected, "targets_S", f"tokens below {expected.vocabulary}, the vocabulary's size", "others")


def _check_count(message: SplitMessage, expected: Expected) -> None:
    told = message.num_loss_tokens
    if type(told) is not int or not 0 <= told <= expected.max_loss_tokens:
        _refuse(expected, "num_loss_tokens", f"0 to {expected.max_loss_tokens}", repr(told)[:40])
    if expected.loss_tokens is not None and told != expected.loss_tokens:
        _refuse(expected, "num_loss_tokens", f"{expected.loss_tokens}, as told before", told)
    sent = 0 if message.targets_S is None else len(message.targets_S)
    if told < sent or (expected.is_whole_step and expected.vocabulary is not None and told != sent):
        _refuse(expected, "num_loss_tokens", f"the {sent} targets that were sent", told)


def _told(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _refuse(expected: Expected, part: str, wanted: object, got: object) -> None:
    raise UpdateError(
        f"{expected.where}: {part}: expected {wanted}, got {got}; run this run's base, cut and rows there"
    )
