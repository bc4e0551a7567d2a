"""The chunked loss is torch's cross-entropy; the head is the model's own or refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedloom.lora.pair import Pair
from fedloom.training import loss as loss_module
from fedloom.training import output_head as output_head_module
from fedloom.training.loss import Tile, supervised_cross_entropy, target_nats, tile_of
from fedloom.training.output_head import OutputHead

NUM_TARGETS, WIDTH, VOCABULARY = 41, 6, 11


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["plain", "bias", "softcap", "scale", "side", "all"])
def head(request: pytest.FixtureRequest) -> OutputHead:
    has = {request.param} if request.param != "all" else {"bias", "softcap", "scale", "side"}
    return OutputHead(
        draw(VOCABULARY, WIDTH, seed=1),
        draw(VOCABULARY, seed=2) if "bias" in has else None,
        scale=0.7 if "scale" in has else 1.0,
        softcap=1.5 if "softcap" in has else None,
        side=Pair(draw(VOCABULARY, 2, seed=6), draw(2, WIDTH, seed=5)) if "side" in has else None,
    )


@pytest.mark.parametrize("tile", [Tile(384, 2048), Tile(16, 4)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_equal_torchs_cross_entropy(
    head: OutputHead, smoothing: float, tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a vocabulary at once, and of parts of it, whose softmax is put together."""
    monkeypatch.setattr(loss_module, "tile_of", lambda device, vocabulary: tile)
    hidden_SD = draw(NUM_TARGETS, WIDTH, seed=3).requires_grad_()
    targets_S = torch.arange(NUM_TARGETS) % VOCABULARY
    weights_S = draw(NUM_TARGETS, seed=4).abs()
    ours, nats_S = supervised_cross_entropy(hidden_SD, head, targets_S, weights_S, label_smoothing=smoothing)
    logits_SV = head.logits(hidden_SD)
    theirs = weights_S @ cross_entropy(logits_SV, targets_S, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours * 3, hidden_SD)[0],
        torch.autograd.grad(theirs * 3, hidden_SD)[0],
        rtol=1e-11,
        atol=1e-13,
    )
    torch.testing.assert_close(nats_S, cross_entropy(logits_SV, targets_S, reduction="none").detach())
    assert not nats_S.requires_grad


@pytest.mark.parametrize("ruled_out", [slice(0, 4), slice(4, 8), slice(6, 11)])
def test_tokens_that_a_bias_rules_out_have_no_share(ruled_out: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they fill a part of the vocabulary too, the first one or another."""
    monkeypatch.setattr(loss_module, "tile_of", lambda device, vocabulary: Tile(16, 4))
    bias_V = draw(VOCABULARY, seed=2)
    bias_V[ruled_out] = -math.inf
    head, hidden_SD = OutputHead(draw(VOCABULARY, WIDTH, seed=1), bias_V), draw(30, WIDTH, seed=3).requires_grad_()
    targets_S = torch.tensor([v for v in range(VOCABULARY) if bias_V[v].isfinite()])[torch.arange(30) % 6]
    ours, nats_S = supervised_cross_entropy(hidden_SD, head, targets_S, torch.ones(30, dtype=torch.float64))
    theirs = cross_entropy(head.logits(hidden_SD), targets_S, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden_SD)[0] for loss in (ours, theirs)))
    torch.testing.assert_close(target_nats(hidden_SD, head, targets_S), nats_S)


@pytest.mark.parametrize(("num_targets", "sizes"), [(0, [0]), (3, [3]), (385, [192, 193]), (1_000, [333, 333, 334])])
def test_targets_are_cut_into_chunks_of_about_one_size(num_targets: int, sizes: list[int]) -> None:
    chunks = loss_module._chunks(num_targets, tile_of("cpu", 50_257))
    assert [rows.stop - rows.start for rows in chunks] == sizes
    assert [row for rows in chunks for row in range(rows.start, rows.stop)] == list(range(num_targets))


def test_a_gpu_holds_logits_of_the_whole_vocabulary() -> None:
    assert tile_of("cuda", 50_257) == Tile(2670, 50_257)
    assert tile_of("cuda", 1 << 27) == Tile(16, 1 << 27)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_passes_over_padded_logits_give_the_same_loss_and_gradient(
    smoothing: float, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, here in fp64 on a CPU."""
    plain = OutputHead(draw(VOCABULARY, WIDTH, seed=1), draw(VOCABULARY, seed=2) if has_bias else None)
    monkeypatch.setattr(output_head_module, "_multiple_for", lambda device, dtype: 8)
    padded = plain.aligned("cuda")
    assert (padded.vocabulary, padded.weight_VD.shape[0]) == (VOCABULARY, 16)
    targets_S, weights_S = torch.arange(NUM_TARGETS) % VOCABULARY, draw(NUM_TARGETS, seed=4).abs()
    found = []
    for head, few in ((plain, False), (padded, True)):
        monkeypatch.setattr(loss_module, "_counts_passes", lambda device, few=few: few)
        hidden_SD = draw(NUM_TARGETS, WIDTH, seed=3).requires_grad_()
        loss, nats_S = supervised_cross_entropy(hidden_SD, head, targets_S, weights_S, label_smoothing=smoothing)
        found.append((loss.detach(), nats_S, *torch.autograd.grad(loss, hidden_SD)))
        torch.testing.assert_close(target_nats(hidden_SD, head, targets_S), nats_S)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("few", [False, True])
def test_16_bits_on_a_device_give_the_loss_of_fp64(device: str, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough for the device's own products and passes; both ways on every device."""
    monkeypatch.setattr(
        output_head_module, "_multiple_for", lambda device, dtype: 64 if few and dtype.itemsize == 2 else 1
    )
    weight_VD, hidden = 0.1 * draw(1_003, 64, seed=1), draw(300, 64, seed=3)
    targets_S, weights_S = torch.arange(300) * 3 % 1_003, draw(300, seed=4).abs()
    found = []
    for where, dtype in (("cpu", torch.float64), (device, torch.bfloat16)):
        head = OutputHead(weight_VD.bfloat16().to(where, dtype)).aligned(where)
        in_few = few and dtype.itemsize == 2
        monkeypatch.setattr(loss_module, "_counts_passes", lambda device, in_few=in_few: in_few)
        hidden_SD = hidden.bfloat16().to(where, dtype).requires_grad_()
        loss, _ = supervised_cross_entropy(hidden_SD, head, targets_S.to(where), weights_S.to(where))
        (grad_SD,) = torch.autograd.grad(loss, hidden_SD)
        found.append((float(loss.detach()), grad_SD.cpu().double()))
    (exact, grad_SD), (ours, ours_SD) = found
    assert ours == pytest.approx(exact, rel=1e-3)
    assert (ours_SD - grad_SD).norm() <= 0.02 * grad_SD.norm()


@pytest.mark.parametrize("size", [4, VOCABULARY])
def test_scoring_gives_the_losses_of_training(head: OutputHead, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "tile_of", lambda device, vocabulary: Tile(16, size))
    hidden_SD, targets_S = draw(NUM_TARGETS, WIDTH, seed=3), torch.arange(NUM_TARGETS) % VOCABULARY
    _, nats_S = supervised_cross_entropy(hidden_SD, head, targets_S, torch.ones(NUM_TARGETS))
    torch.testing.assert_close(target_nats(hidden_SD, head, targets_S), nats_S, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_large_logits_do_not_overflow(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "tile_of", lambda device, vocabulary: Tile(16, size))
    head, hidden_SD, targets_S = OutputHead(torch.eye(3) * 1e4), torch.eye(3), torch.tensor([0, 1, 1])
    loss, nats_S = supervised_cross_entropy(hidden_SD.requires_grad_(), head, targets_S, torch.ones(3))
    torch.testing.assert_close(nats_S, torch.tensor([0.0, 0.0, 1e4]))
    (grad_SD,) = torch.autograd.grad(loss, hidden_SD)
    torch.testing.assert_close(grad_SD, 1e4 * torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, -1, 1]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_a_part_of_the_vocabulary_overflows_nowhere(dtype: torch.dtype) -> None:
    """A sum of unweighed exponentials over 2,048 equal rows of 60 would be 122,880."""
    head = OutputHead(torch.full((3_000, 4), 60.0, dtype=dtype))
    hidden_SD = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    loss, nats_S = supervised_cross_entropy(hidden_SD, head, torch.tensor([0, 2_999]), torch.ones(2))
    torch.testing.assert_close(nats_S, torch.full((2,), math.log(3_000)))
    (grad_SD,) = torch.autograd.grad(loss, hidden_SD)
    assert grad_SD.abs().max() <= 0.5  # 60 - 60, to the sums' rounding
