"""The head is the model's own or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.errors import ModelError
from fedloom.training.verified_head import output_head


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
