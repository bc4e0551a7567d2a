"""Operators in fewer passes: the same functions and gradients as families spell out."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, GELUActivation, NewGELUActivation
from transformers.models.blt import modeling_blt
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from fedloom.models.fused import RMSNorm, Rotation, fuse_operators
from fedloom.seeding import torch_stream


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2.0 * torch.randn(shape, generator=torch_stream(1, "x"), dtype=torch.float64)).to(dtype)


def angles(length: int, width: int) -> tuple[Tensor, Tensor]:
    rotary = torch.outer(torch.arange(length), 0.1 ** torch.linspace(0, 3, width // 2)).to(torch.float64)
    both = torch.cat([rotary, rotary], -1)[None]
    return both.cos(), both.sin()


@pytest.mark.parametrize("family", [NewGELUActivation, FastGELUActivation])
@pytest.mark.parametrize("width", [64, 24])
def test_gelu_is_the_formula_and_its_gradient(family: type[nn.Module], width: int) -> None:
    spelled_out = family()
    fused = fuse_operators(nn.Sequential(spelled_out))
    assert type(fused[0]) is not family
    x, grad = drawn(9, width), drawn(9, width).flip(0)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    fused(one).backward(grad)
    spelled_out(other).backward(grad)
    # the fast form has ten digits of √(2/π)
    torch.testing.assert_close(fused(x), spelled_out(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_gradients_and_their_gradients_are_those_of_the_functions() -> None:
    cos, sin = angles(3, 4)
    x = drawn(2, 3, 4).requires_grad_()
    for function in (
        lambda x: Rotation.apply(x, cos, sin),  # type: ignore[no-untyped-call]
        lambda x: RMSNorm.apply(x, drawn(4), 1e-6),  # type: ignore[no-untyped-call]
    ):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_the_rotation_is_the_family_s(unsqueeze_dim: int) -> None:
    cos, sin = angles(5, 6)
    q, k = drawn(2, 3, 5, 6), drawn(2, 1, 5, 6)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    found = [
        Rotation.apply(x, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))  # type: ignore[no-untyped-call]
        for x in (q, k)
    ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_the_norm_is_the_family_s() -> None:
    norm = modeling_llama.LlamaRMSNorm(24, eps=1e-5).requires_grad_(False)
    norm.weight.copy_(drawn(24))
    x = drawn(2, 9, 24, dtype=torch.float32)
    expected = norm(x)
    fuse_operators(nn.Sequential(norm))
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)
    assert norm(x.requires_grad_()).grad_fn.name() == "RMSNormBackward"
    for left in (x.to(torch.bfloat16), x.double()):
        assert torch.equal(norm(left), modeling_llama.LlamaRMSNorm.forward(norm, left)), "these round on their way"


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3", "GPT2", "Phi", "Gemma2", "Phi3", "Granite"])
def test_a_model_s_logits_stay(family: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(vocab_size=50, pad_token_id=0, **sizes)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(7)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.eval().requires_grad_(False)
    ids = torch.arange(2, 20)[None]
    expected, in_16_bits = model(ids).logits, deepcopy(model).to(torch.bfloat16)
    torch.testing.assert_close(fuse_operators(model)(ids).logits, expected, rtol=1e-5, atol=1e-5)
    expected = in_16_bits(ids).logits
    assert torch.equal(fuse_operators(in_16_bits)(ids).logits, expected), "others compute these"


@pytest.mark.parametrize("width", [24, 48, 64, 192])
@pytest.mark.parametrize("what", ["gelu", "norm", "rotation"])
def test_rows_do_not_depend_on_how_many_there_are(what: str, width: int) -> None:
    cos, sin = (angle.float() for angle in angles(30, width))
    function: Callable[[Tensor, int], Tensor] = {
        "gelu": lambda x, n: fuse_operators(nn.Sequential(NewGELUActivation()))(x),
        "norm": lambda x, n: RMSNorm.apply(x, drawn(width, dtype=torch.float32), 1e-6),  # type: ignore[no-untyped-call]
        "rotation": lambda x, n: Rotation.apply(x, cos[:, :n], sin[:, :n]),  # type: ignore[no-untyped-call]
    }[what]
    x = drawn(1, 30, width, dtype=torch.float32)
    whole = x.clone().requires_grad_()
    function(whole, 30).backward(x)
    for n in (1, 2, 3, 5, 8, 13, 29):
        part = x[:, :n].clone().requires_grad_()
        y = function(part, n)
        y.backward(x[:, :n])
        assert torch.equal(y, function(x, 30)[:, :n])
        assert torch.equal(part.grad, whole.grad[:, :n])  # type: ignore[index]


def test_a_rotation_that_calls_another_function_stays() -> None:
    """BLT's is Llama's to the letter, and turns neighbours instead of halves."""
    config = modeling_blt.BltLocalEncoderConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    attention = modeling_blt.BltSelfAttention(config, 0)
    assert "forward" not in vars(fuse_operators(nn.Sequential(attention))[0])


def test_a_forward_that_another_library_put_in_place_stays() -> None:
    norm = modeling_llama.LlamaRMSNorm(8)
    norm.forward = lambda x: x
    x = drawn(2, 8)
    assert fuse_operators(nn.Sequential(norm))(x) is x


def test_once_more_changes_nothing() -> None:
    model = fuse_operators(nn.Sequential(NewGELUActivation(), modeling_llama.LlamaRMSNorm(8)))
    before = [model[0].spelled_out, model[1].forward]
    fuse_operators(model)
    assert [model[0].spelled_out, model[1].forward] == before


def test_what_is_made_in_another_way_stays() -> None:
    exact, other_norm = GELUActivation(), modeling_gemma.GemmaRMSNorm(8)
    model = fuse_operators(nn.Sequential(exact, nn.SiLU(), other_norm))
    assert model[0] is exact
    assert "forward" not in vars(model[2]), "its weight is one more than it says"
    before = modeling_llama.apply_rotary_pos_emb
    config = modeling_phi3.Phi3Config(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, pad_token_id=0)
    attention = modeling_phi3.Phi3Attention(config, 0)
    assert "forward" not in vars(fuse_operators(nn.Sequential(attention))[0]), "it rotates a part of each head"
    assert modeling_llama.apply_rotary_pos_emb is before
