"""The chunked loss is torch's cross-entropy; the head is the model's own or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedloom.errors import ModelError
from fedloom.training import loss as loss_module
from fedloom.training import output_head as output_head_module
from fedloom.training.loss import output_head, supervised_cross_entropy, target_nats
from fedloom.training.output_head import OutputHead

NUM_TARGETS, WIDTH, VOCABULARY = 41, 6, 11


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["plain", "bias", "softcap", "scale", "all"])
def head(request: pytest.FixtureRequest) -> OutputHead:
    has = {request.param} if request.param != "all" else {"bias", "softcap", "scale"}
    return OutputHead(
        draw(VOCABULARY, WIDTH, seed=1),
        draw(VOCABULARY, seed=2) if "bias" in has else None,
        scale=0.7 if "scale" in has else 1.0,
        softcap=1.5 if "softcap" in has else None,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_equal_torchs_cross_entropy(
    head: OutputHead, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", {"cpu": 16 * VOCABULARY})
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 0)
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


@pytest.mark.parametrize(("vocabulary", "num_rows"), [(1_000, 1048), (50_257, 192), (256_000, 65)])
def test_a_chunk_is_large_enough_for_the_product_and_small_enough_for_memory(vocabulary: int, num_rows: int) -> None:
    first = next(iter(loss_module._chunks(torch.empty(3_000, 1), OutputHead(torch.empty(vocabulary, 1)))))
    assert first == slice(0, num_rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_passes_over_padded_logits_give_the_same_loss_and_gradient(
    smoothing: float, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, here in fp64 on a CPU."""
    plain = OutputHead(draw(VOCABULARY, WIDTH, seed=1), draw(VOCABULARY, seed=2) if has_bias else None)
    monkeypatch.setattr(output_head_module, "_multiple_for", lambda weight: 8)
    padded = plain.aligned()
    assert (padded.vocabulary, padded.weight_VD.shape[0]) == (VOCABULARY, 16)
    targets_S, weights_S = torch.arange(NUM_TARGETS) % VOCABULARY, draw(NUM_TARGETS, seed=4).abs()
    found = []
    for head, few in ((plain, False), (padded, True)):
        monkeypatch.setattr(loss_module, "_counts_passes", lambda hidden_SD, few=few: few)
        hidden_SD = draw(NUM_TARGETS, WIDTH, seed=3).requires_grad_()
        loss, nats_S = supervised_cross_entropy(hidden_SD, head, targets_S, weights_S, label_smoothing=smoothing)
        found.append((loss.detach(), nats_S, *torch.autograd.grad(loss, hidden_SD)))
        torch.testing.assert_close(target_nats(hidden_SD, head, targets_S), nats_S)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("few", [False, True])
def test_16_bits_on_a_device_give_the_loss_of_fp64(device: str, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough for the device's own products and passes; both ways on every device."""
    monkeypatch.setattr(output_head_module, "_multiple_for", lambda weight: 64 if few and weight.itemsize == 2 else 1)
    weight_VD, hidden = 0.1 * draw(1_003, 64, seed=1), draw(300, 64, seed=3)
    targets_S, weights_S = torch.arange(300) * 3 % 1_003, draw(300, seed=4).abs()
    found = []
    for where, dtype in (("cpu", torch.float64), (device, torch.bfloat16)):
        head = OutputHead(weight_VD.bfloat16().to(where, dtype)).aligned()
        monkeypatch.setattr(loss_module, "_counts_passes", lambda hidden_SD: few and hidden_SD.itemsize == 2)
        hidden_SD = hidden.bfloat16().to(where, dtype).requires_grad_()
        loss, _ = supervised_cross_entropy(hidden_SD, head, targets_S.to(where), weights_S.to(where))
        (grad_SD,) = torch.autograd.grad(loss, hidden_SD)
        found.append((float(loss.detach()), grad_SD.cpu().double()))
    (exact, grad_SD), (ours, ours_SD) = found
    assert ours == pytest.approx(exact, rel=1e-3)
    assert (ours_SD - grad_SD).norm() <= 0.02 * grad_SD.norm()


def test_scoring_gives_the_losses_of_training(head: OutputHead) -> None:
    hidden_SD, targets_S = draw(NUM_TARGETS, WIDTH, seed=3), torch.arange(NUM_TARGETS) % VOCABULARY
    _, nats_S = supervised_cross_entropy(hidden_SD, head, targets_S, torch.ones(NUM_TARGETS))
    torch.testing.assert_close(target_nats(hidden_SD, head, targets_S), nats_S, rtol=1e-12, atol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    head = OutputHead(torch.eye(3) * 1e4)
    _, nats_S = supervised_cross_entropy(torch.eye(3), head, torch.tensor([0, 1, 1]), torch.ones(3))
    torch.testing.assert_close(nats_S, torch.tensor([0.0, 0.0, 1e4]))


def test_every_familys_head_is_verified(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    assert output_head(model) is output_head(model)


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logits_scaling"])
def test_an_unknown_change_of_the_logits_is_refused_by_name(setting: str, tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    setattr(model.config, setting, 2.0)  # announced, but this family's forward does not do it
    with pytest.raises(ModelError, match="'llama' differs from the model's own"):
        output_head(model)


def test_layers_that_mix_samples_are_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda *parts: parts[2].cumsum(1))
    with pytest.raises(ModelError, match="differs from the model's own"):
        output_head(model)


@pytest.mark.parametrize(
    ("dtype", "advice"), [(torch.float16, "set model.dtype = float32"), (torch.float32, "check the")]
)
def test_a_base_whose_own_logits_overflow_is_called_that(
    dtype: torch.dtype, advice: str, tiny: Callable[..., Any]
) -> None:
    model = tiny("llama").to(dtype)
    model.get_output_embeddings().weight.data.fill_(torch.finfo(dtype).max)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=rf"finite logits of 'llama', got infinity or NaN in {kind}.*{advice}"):
        output_head(model)
