"""Products of 16-bit numbers: in fp32 where a CPU is slow at them, rounded once, with nothing wide kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedloom.lora import products
from fedloom.lora.products import added_product, affine, frozen_affine, meta_is, product, product_type
from fedloom.models import fused
from fedloom.models.fused import fuse_operators
from fedloom.seeding import torch_stream

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without units for 16 bits, whatever this one has."""
    for module in (products, fused):
        monkeypatch.setattr(module, "has_units", lambda dtype: False)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch_stream(1, str(shape))).to(dtype)


def test_a_processor_is_asked_once_and_a_torch_that_does_not_know_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    asked = [products.has_units.__wrapped__(dtype) for dtype in HALVES]
    assert asked == [products.has_units(dtype) for dtype in HALVES]
    monkeypatch.setattr(products, "_UNITS", {torch.bfloat16: "_nobody_knows_this"})
    assert products.has_units.__wrapped__(torch.bfloat16) is False


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    x, weight, bias = drawn(5, 300, dtype=dtype), drawn(7, 300, dtype=dtype), drawn(7, dtype=dtype)
    exact = x.double() @ weight.double().T
    assert product_type(x) == (dtype if dtype.itemsize > 2 else torch.float32)
    for found, expected in (
        (product(x, weight.T), exact),
        (affine(x, weight), exact),
        (affine(x, weight, bias), exact + bias.double()),
        (added_product(drawn(5, 7, dtype=dtype), x, weight.T), exact + drawn(5, 7, dtype=dtype).double()),
    ):
        assert found.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 50 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            found.double(), expected, rtol=1.01 * rounding, atol=1e-4 if dtype.itemsize < 8 else 0
        )


def test_only_the_weight_is_kept_for_backward_and_the_gradient_is_a_product() -> None:
    x, weight, bias, grad = drawn(5, 30).requires_grad_(), drawn(7, 30), drawn(7), drawn(5, 7)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = frozen_affine(x, weight, bias)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]
    torch.testing.assert_close(y, affine(x.detach(), weight, bias), rtol=0, atol=0)
    y.backward(grad)
    torch.testing.assert_close(x.grad, product(grad, weight), rtol=0, atol=0)


def test_its_gradient_has_a_gradient() -> None:
    weight = drawn(4, 3, dtype=torch.float64)
    x = drawn(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frozen_affine(x, weight).tanh(), (x,))
    assert torch.autograd.gradgradcheck(lambda x: frozen_affine(x, weight).tanh(), (x,))


def test_a_layer_that_somebody_trains_stays_as_it_is() -> None:
    layer = fuse_operators(torch.nn.Sequential(torch.nn.Linear(4, 3).bfloat16()))
    layer(drawn(2, 4)).sum().backward()
    assert layer[0].weight.grad is not None


def test_shapes_without_numbers_are_multiplied_as_on_the_device_that_is_planned() -> None:
    x = torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
    assert product_type(x) == torch.bfloat16
    with meta_is("cpu"):
        assert product_type(x) == torch.float32
    with meta_is("cuda"):
        assert product_type(x) == torch.bfloat16
