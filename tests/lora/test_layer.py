"""The layer with a client axis against the plain definition, one client at a time."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TARGETS, tiny_model

from fedloom.errors import AdapterError, ModelError
from fedloom.lora import algebra, route
from fedloom.lora.dropout import dropout_of, row_keys
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.lora.pair import Adapter, Pair
from fedloom.seeding import torch_stream

TOKENS = torch.arange(24).view(1, 24) % 50


def random_adapter(lora: LoRAModel, rank: int, seed: int) -> Adapter:
    fresh = fresh_adapter(lora.shapes, rank, seed).to(torch.float64)
    generator = torch_stream(seed, "b")
    return Adapter(
        {
            name: Pair(torch.randn(pair.b_OR.shape, generator=generator, dtype=torch.float64), pair.a_RI)
            for name, pair in fresh.items()
        }
    )


def logits_with_merged(family: str, adapter: Adapter, device: str = "cpu") -> torch.Tensor:
    model = tiny_model(family).to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, pair in adapter.to(device).items():
            weight = model.get_submodule(name).weight
            weight += pair.delta().T if family == "gpt2" else pair.delta()
        return model(TOKENS.to(device)).logits


def test_a_slot_adds_its_scaled_product_to_the_base(family: str, device: str) -> None:
    lora = LoRAModel(tiny_model(family).to(device), TARGETS[family])  # type: ignore[arg-type]
    adapter = random_adapter(lora, 3, 1)
    lora.open([Slot(rank=3, scale=4.0)])
    lora.load(0, adapter)
    lora.route_all(0)
    found = lora.model(TOKENS.to(device)).logits
    assert torch.allclose(found, logits_with_merged(family, adapter, device), atol=1e-12)
    assert algebra.distance(lora.adapter(0), adapter) < 1e-12


@pytest.mark.parametrize("rank", [1, 8])
def test_a_side_adapter_folded_or_factored_equals_merging(family: str, rank: int, device: str) -> None:
    lora = LoRAModel(tiny_model(family).to(device), TARGETS[family])  # type: ignore[arg-type]
    side, tokens = random_adapter(lora, rank, 2), TOKENS.to(device)
    before = lora.model(tokens).logits
    lora.set_side(side)
    assert torch.allclose(lora.model(tokens).logits, logits_with_merged(family, side, device), atol=1e-12)
    lora.set_side(None)
    assert torch.equal(lora.model(tokens).logits, before)


@pytest.fixture(params=["one by one", "in buckets"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take clients' products one by one, as on a CPU, or in buckets, as on a GPU."""
    monkeypatch.setattr(route, "ONE_BY_ONE", {"cpu", "cuda"} if request.param == "one by one" else set())
    return str(request.param)


def test_slots_together_give_each_client_its_own_outputs_and_gradients(family: str, products: str, device: str) -> None:
    lora = LoRAModel(tiny_model(family).to(device), TARGETS[family])  # type: ignore[arg-type]
    layer = lora.layers[next(iter(lora.layers))]
    x = torch.randn(24, layer.in_features, generator=torch_stream(1, "x"), dtype=torch.float64).to(device)
    ranks, scales = (2, 5, 1, 3), (2.0, 0.5, 1.0, 0.3)
    lora.open([Slot(rank, scale) for rank, scale in zip(ranks, scales, strict=True)])
    for k, rank in enumerate(ranks):
        lora.load(k, random_adapter(lora, rank, rank))
    segments = {1: slice(0, 10), 0: slice(10, 11), 3: slice(11, 24)}  # the third client is not in this pass
    lora.route([(k, rows.stop - rows.start) for k, rows in segments.items()])
    assert bool(lora._route.buckets(lora._route.blocks(24, 99), x)) == (products == "in buckets")
    outputs = layer(x)
    (outputs**2).sum().backward()
    together = [[view.grad.clone() for view in lora.parameters(k)[:2]] for k in range(4)]
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in together[2])
    for k, rows in segments.items():
        lora.zero_grad()
        lora.route([(k, rows.stop - rows.start)])
        alone = layer(x[rows])
        (alone**2).sum().backward()
        assert torch.allclose(alone, outputs[rows], atol=1e-12)
        grads = [view.grad for view in lora.parameters(k)[:2]]
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(grads, together[k], strict=True))


@pytest.mark.usefixtures("products")
def test_a_client_that_is_not_finite_changes_no_other(family: str, device: str) -> None:
    lora = LoRAModel(tiny_model(family).to(device), TARGETS[family])  # type: ignore[arg-type]
    layer = lora.layers[next(iter(lora.layers))]
    x = torch.randn(12, layer.in_features, generator=torch_stream(1, "x"), dtype=torch.float64).to(device)
    lora.open([Slot(2, 1.0), Slot(4, 1.0)])
    for k, rank in enumerate((2, 4)):
        lora.load(k, random_adapter(lora, rank, rank))
    found = []
    for spoiled in (False, True):
        lora.zero_grad()
        if spoiled:
            x[:5] = torch.nan
            layer.a_RI.detach()[:2], layer.bt_RO.detach()[:2] = torch.nan, torch.inf
        rows = x.clone().requires_grad_()
        lora.route([(0, 5), (1, 7)])
        outputs = layer(rows)
        outputs.square().sum().backward()
        found.append([outputs[5:].detach(), rows.grad[5:], *(view.grad.clone() for view in lora.parameters(1)[:2])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("products")
def test_the_backward_formula_equals_numerical_differentiation(family: str, device: str) -> None:
    lora = LoRAModel(tiny_model(family).to(device), TARGETS[family])  # type: ignore[arg-type]
    layer = next(iter(lora.layers.values()))
    lora.set_side(random_adapter(lora, 1, 8))
    lora.open([Slot(2, 2.0), Slot(3, 0.5)])
    for k, rank in enumerate((2, 3)):
        lora.load(k, random_adapter(lora, rank, rank))
    lora.route([(0, 2), (1, 3)], dropout_of(0.3, [row_keys(3, 1, 0, [0, 1])], [2, 3], device))
    x = torch.randn(5, layer.in_features, dtype=torch.float64, generator=torch_stream(1, "x"))
    x = x.to(device).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    lora.route([(0, 2), (1, 3)])
    start = layer.a_RI.detach().clone().requires_grad_()

    def of_a(a: torch.Tensor) -> torch.Tensor:
        from fedloom.lora.linear import _LowRankLinear

        return _LowRankLinear.apply(x.detach(), a, layer.bt_RO, layer, lora._route.blocks(5, 99), None)

    assert torch.autograd.gradcheck(of_a, (start,))


def test_dropout_comes_from_the_rows_and_not_without_gradients(family: str) -> None:
    lora = LoRAModel(tiny_model(family), TARGETS[family])
    lora.open([Slot(4, 1.0)])
    lora.load(0, random_adapter(lora, 4, 1))

    def outputs(client: int = 0) -> torch.Tensor:
        lora.route([(0, 24)], dropout_of(0.5, [row_keys(3, 1, client, [0, 1])], [12, 12], "cpu"))
        return lora.model(TOKENS).logits.detach()

    dropped = outputs()
    assert torch.equal(dropped, outputs())
    assert not torch.allclose(dropped, outputs(client=1))
    with torch.no_grad():
        assert not torch.allclose(dropped, outputs())


def test_optimiser_views_move_the_slot_and_nothing_else(family: str) -> None:
    lora = LoRAModel(tiny_model(family), TARGETS[family])
    lora.open([Slot(2, 1.0), Slot(2, 1.0)])
    for k in (0, 1):
        lora.load(k, random_adapter(lora, 2, k))
    still = lora.adapter(1)
    lora.route([(0, 24)])
    lora.model(TOKENS).logits.square().mean().backward()
    torch.optim.SGD(lora.parameters(0), lr=1.0).step()
    assert algebra.distance(lora.adapter(0), random_adapter(lora, 2, 0)) > 1e-6
    assert all(
        torch.equal(now, then)
        for now, then in zip(lora.adapter(1).as_tensors().values(), still.as_tensors().values(), strict=True)
    )


def test_misrouted_tokens_are_refused(family: str) -> None:
    lora = LoRAModel(tiny_model(family), TARGETS[family])
    lora.open([Slot(2, 1.0)])
    lora.route([(0, 23)])
    with pytest.raises(ModelError, match="expected 23 token rows"):
        lora.model(TOKENS)


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_that_does_not_fit_is_refused(family: str, rank: int) -> None:
    lora = LoRAModel(tiny_model(family), TARGETS[family])
    with pytest.raises(AdapterError, match="expected 1 to"):
        lora.open([Slot(rank, 1.0)])


def test_an_adapter_of_another_base_is_refused_by_module(family: str) -> None:
    lora = LoRAModel(tiny_model(family), TARGETS[family])
    lora.open([Slot(2, 1.0)])
    with pytest.raises(AdapterError, match="another base"):
        lora.load(0, Adapter({name: Pair(torch.zeros(3, 2), torch.zeros(2, 3)) for name in lora.shapes}))
    with pytest.raises(AdapterError, match="foreign module elsewhere"):
        lora.set_side(
            Adapter(dict(random_adapter(lora, 2, 1)) | {"elsewhere": Pair(torch.zeros(3, 2), torch.zeros(2, 3))})
        )


def test_unwrapping_gives_the_model_back_as_it_was(family: str) -> None:
    model = tiny_model(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lora = LoRAModel(model, TARGETS[family])
    lora.set_side(random_adapter(lora, 8, 2))
    after = lora.unwrap().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
