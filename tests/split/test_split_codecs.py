"""What crosses is small, no more wrong than promised, and counted to the byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import UpdateError
from fedloom.split.codecs import ErrorFeedback, WireDtype, bytes_per_token, encode
from fedloom.split.cut_messages import SplitMessage

WIRES: list[WireDtype] = ["fp32", "fp16", "bf16", "int8"]


def random_matrix(num_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, width, generator=generator) * torch.rand(num_tokens, 1, generator=generator) * 10


@pytest.mark.parametrize(("wire", "bound"), [("fp32", 0.0), ("fp16", 2**-11), ("bf16", 2**-8), ("int8", 1 / 254)])
def test_a_number_is_off_by_no_more_than_its_type_allows(wire: WireDtype, bound: float) -> None:
    matrix = random_matrix(50, 40)
    error = (encode(matrix, wire).decode(torch.float32) - matrix).abs()
    assert bool((error <= bound * matrix.abs().amax(1, keepdim=True) * (1 + 1e-5)).all())


def test_a_token_of_zeros_stays_zero_in_int8() -> None:
    assert not encode(torch.zeros(3, 4), "int8").decode(torch.float32).any()


@pytest.mark.parametrize("wire", WIRES)
def test_bytes_per_token_are_those_of_the_tensors(wire: WireDtype) -> None:
    encoded = encode(random_matrix(7, 12), wire)
    scales = encoded.scales_T.nbytes if encoded.scales_T is not None else 0
    assert bytes_per_token(12, wire) * 7 == encoded.values_TD.nbytes + scales


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_what_was_sent_and_what_is_owed_sum_to_the_truth(wire: WireDtype) -> None:
    feedback, true, sent = ErrorFeedback(), torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    for step in range(20):
        gradient = random_matrix(3 + step % 5, 16, seed=step).double()
        true += gradient.sum(0)
        sent += feedback.encode(0, gradient, wire).decode(torch.float64).sum(0)
    assert not torch.allclose(sent, true, atol=1e-9)
    torch.testing.assert_close(sent + feedback.residuals_D[0], true, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WIRES), st.integers(1, 40), st.integers(1, 20), st.booleans(), st.integers(0, 999), st.floats(0, 9)
)
def test_bytes_counted_are_bytes_written(
    wire: WireDtype, num_tokens: int, width: int, with_labels: bool, step: int, loss_nats: float
) -> None:
    labels = torch.arange(num_tokens, dtype=torch.int32) if with_labels else None
    lengths = torch.tensor([num_tokens], dtype=torch.int32)
    matrix = encode(random_matrix(num_tokens, width), wire)
    places = None if labels is None else labels.clone()
    message = SplitMessage("activations", 3, step, 1, matrix, 9, loss_nats, lengths, places, labels)
    blob = message.to_bytes()
    assert message.num_bytes == len(blob)
    read = SplitMessage.from_bytes(blob)
    assert (read.kind, read.client, read.step, read.micro_batch) == ("activations", 3, step, 1)
    assert (read.num_loss_tokens, read.loss_nats) == (9, loss_nats)
    assert torch.equal(read.matrix.values_TD, message.matrix.values_TD)
    assert (read.targets_S is None) != with_labels


@pytest.mark.parametrize("blob", [b"", b"nonsense that is long enough", b"\xff" * 64])
def test_bytes_that_are_no_message_are_refused(blob: bytes) -> None:
    with pytest.raises(UpdateError, match="expected a whole message"):
        SplitMessage.from_bytes(blob)
