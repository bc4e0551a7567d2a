"""Write base and result as one model in Hugging Face format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import AdapterError, ModelError
from fedloom.lora.algebra import norm
from fedloom.lora.linear import LoRALinear, is_transposed
from fedloom.models.load import Base, bars_on_terminals_only
from fedloom.results.card import merged_card
from fedloom.results.conversation import wording_of
from fedloom.results.exported import (
    CARD,
    Exported,
    at_rank,
    chosen_result,
    dtype_named,
    only_adapter,
    own_folder,
    publish,
    refuse_files,
)
from fedloom.results.opened_result import Found, OpenedResult, load_base_of, wrap
from fedloom.results.serving_files import generation_config, stop_ids


def export_merged(
    source: str | Path,
    to: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    client: int | None = None,
    round: int | str | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write base and result as one model in Hugging Face format, with tokenizer and model card.

    ``W + b a`` is formed in float32 and cast once, to ``dtype`` or else the type the base is stored in. What the cast
    loses is ``‖cast(W + b a) − cast(W) − b a‖``.

    Raises:
        RunError: as for :func:`~fedloom.results.export.export_adapter`.
        AdapterError: as for :func:`~fedloom.results.export.export_adapter`.
        ModelError: the base cannot be loaded, is quantized, ties a target's weights to another module's, or would be
            written as a kind that transformers does not load as a causal LM.
    """
    found, to = chosen_result(Path(source), client, round), Path(to)
    _refuse_quantized(found)
    adapter = only_adapter(found)
    kept, errors = at_rank(adapter, rank)
    refuse_files(to)
    loaded = load_base_of(found, base, None, "cpu", dtype="auto")
    _refuse_quantized_base(loaded)
    _refuse_part_of_a_kind(loaded)
    target = loaded.dtype if dtype is None else dtype_named(dtype)
    lora = wrap(found, loaded)
    layers = dict(lora.layers)
    _refuse_tied(lora.unwrap(), layers)
    merged = {name: _merged(layer.base, kept[name].delta(), target) for name, layer in layers.items()}
    cast_error = math.hypot(*(error for _, error in merged.values()))
    written = str(target).removeprefix("torch.")
    exported = Exported(
        to, "merged model", written, kept.ranks, norm(adapter), math.hypot(*errors.values()), cast_error
    )

    wording = wording_of(OpenedResult(found, loaded, lora))
    stops = stop_ids(loaded.model, loaded.tokenizer, wording, own_folder(found))

    def write(folder: Path) -> None:
        loaded.model.to(target)
        loaded.model.generation_config = generation_config(loaded.model, stops)
        for name, (weight, _) in merged.items():
            loaded.model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
        with bars_on_terminals_only():
            loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(merged_card(found, exported.lines(), exported.is_exact), encoding="utf-8")

    publish(to, write)
    return exported


def _merged(base: nn.Module, delta_OI: Tensor, target: torch.dtype) -> tuple[Tensor, float]:
    """Return the merged weight in the base's own orientation, and what the cast lost of the delta."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    delta = delta_OI.T if is_transposed(base) else delta_OI
    cast = (weight.float() + delta.float()).to(target)
    if not torch.isfinite(cast).all():
        raise AdapterError(
            f"the merged model: expected finite weights, got some beyond the range of {target}; "
            "choose --dtype bfloat16 or float32"
        )
    # What the cast of W alone loses is the target type's doing, not the merge's, and is not counted.
    lost = cast.double() - weight.to(target).double() - delta.double()
    return cast.contiguous(), float(lost.norm())


def _refuse_quantized(found: Found) -> None:
    if found.settings is not None and found.settings.model.quantization != "none":
        raise ModelError(
            f"{found.path}: its base is quantized to {found.settings.model.quantization}, too coarse to merge an "
            "update into; export the adapter instead (without --merge) and serve it beside the quantized base"
        )


def _refuse_quantized_base(base: Base) -> None:
    if getattr(base.model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{base.name} is stored quantized, too coarse to merge an update into; export the adapter "
            "instead (without --merge) and serve it beside the base"
        )


def _refuse_part_of_a_kind(base: Base) -> None:
    """Reject a model that is the text part of another kind and cannot be loaded without the rest of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = base.model.config
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "auto_map", None):
        raise ModelError(
            f"{base.name}: expected a base that is a causal LM of its own, got the text part of another kind "
            f"({config.model_type!r}), which transformers would not load again once merged; export the adapter instead "
            "(without --merge)"
        )


def _refuse_tied(model: Any, layers: Mapping[str, LoRALinear]) -> None:
    # Tied modules share one tensor object, so identity finds them; equal values would not mean that they are tied.
    targets = {id(layer.base.weight): name for name, layer in layers.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        target = targets.get(id(weight))
        if target is not None and name != target:
            raise ModelError(
                f"{target} shares its weights with {name}: merging would change both; export the adapter instead "
                "(without --merge)"
            )
