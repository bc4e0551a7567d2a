"""Write a result for other tools: a PEFT adapter at the rank they accept, or a merged model, each with its card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from fedloom.errors import AdapterError, ModelError, RunError
from fedloom.lora.algebra import compress, distance, norm, pad
from fedloom.lora.linear import LoRALinear
from fedloom.lora.pair import Adapter
from fedloom.lora.peft_files import parameters_of, save_peft
from fedloom.models.load import Base
from fedloom.results.card import adapter_card, merged_card
from fedloom.results.conversation import wording_of
from fedloom.results.opened_result import (
    RESULT,
    Found,
    OpenedResult,
    find_result,
    load_base_of,
    of_client,
    unfinished_note,
    wrap,
)
from fedloom.results.peft_check import check_with_peft
from fedloom.results.serving_files import copy_serving_files, generation_config, stop_ids
from fedloom.run_folder import durable
from fedloom.run_folder.contents import ADAPTER, read_object
from fedloom.run_folder.manifest import read_manifest

CARD = "README.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORTH_A_NOTE = 0.01
"""The share lost to rounding above which --dtype float32 is suggested."""
ROUNDING = 1e-6
"""The share below which a difference is float32's rounding."""


@dataclass(frozen=True)
class Exported:
    """What was written, and what it lost.

    Attributes:
        form: ``adapter`` or ``merged model``.
        ranks: rank of each module that is adapted.
        norm: Frobenius norm of all that training added.
        rank_error: Frobenius distance of what is written, before the cast, from what training added: 0 without a
            rank, and only rounding (below 1e-6 of the norm) if the rank is large enough for all of it.
        cast_error: Frobenius norm of what rounding to ``dtype`` loses of it.
        unread: which modules stock peft does not load on the base; None where it loads all, or was not asked.
        unchecked: why stock peft was not asked; None where it was.
    """

    folder: Path
    form: str
    dtype: str
    ranks: Mapping[str, int]
    norm: float
    rank_error: float
    cast_error: float
    unread: str | None = None
    unchecked: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, relative errors included."""
        relative = {f"relative_{name}": self.share(getattr(self, name)) for name in ("rank_error", "cast_error")}
        return {**self.__dict__, "folder": str(self.folder), "ranks": dict(self.ranks), **relative}

    @property
    def is_exact(self) -> bool:
        """Whether the file holds the whole update, as exactly as float32 can."""
        return self.share(self.rank_error) <= ROUNDING and self.cast_error == 0.0

    def share(self, error: float) -> float:
        """Return an error as a share of all that training added."""
        return error / self.norm if self.norm > 0.0 else 0.0

    def lines(self) -> list[str]:
        """Return what was written and what it lost."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        lines = [f"{self.folder}: {self.form}, {len(self.ranks)} modules of {ranks}, {self.dtype}", self.rank_line()]
        lines += [self.cast_line()] if self.cast_error > 0.0 else []
        return [*lines, *(line for line in (self.unread, self.unchecked) if line is not None)]

    def rank_line(self) -> str:
        """Return what the rank costs."""
        if self.rank_error == 0.0:
            return "lossless in rank: nothing is dropped"
        if (share := self.share(self.rank_error)) <= ROUNDING:
            return f"lossless in rank: nothing is dropped but rounding ({share:.1e} of the update)"
        return f"the rank drops {self.share(self.rank_error):.3%} of the update (‖error‖ {self.rank_error:.4g})"

    def cast_line(self) -> str:
        """Return what rounding costs."""
        share = self.share(self.cast_error)
        advice = "; --dtype float32 keeps it" if share > WORTH_A_NOTE else ""
        return f"rounding to {self.dtype} loses {share:.3%} of it (‖error‖ {self.cast_error:.4g}){advice}"


def export_adapter(
    source: str | Path,
    to: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    client: int | None = None,
    dtype: str = "float32",
) -> Exported:
    """Write a run's result as one PEFT adapter on the untouched base, with a model card.

    With ``rank`` every module gets exactly that rank: compressed by the best approximation there is (Eckart–Young), or
    padded with zeros, so the file needs no rank pattern and any server takes it. What is written is loaded with stock
    peft on the base's configuration, which is looked for where the result says, or at ``base``.

    Raises:
        RunError: the run has not finished, has an adapter per client and none is chosen, or ``to`` holds files.
        AdapterError: there is nothing to export, or ``rank`` is not a whole number from 1 to the largest rank.
        ModelError: ``base`` is given and its configuration is not there.
    """
    found, to = _chosen(Path(source), client), Path(to)
    adapter = _only_adapter(found)
    kept, rank_error = _at_rank(adapter, rank)
    cast = kept.to(_dtype(dtype))
    cast_error = 0.0 if dtype == "float32" else distance(kept, cast.to(torch.float32))
    exported = Exported(to, "adapter", dtype, cast.ranks, norm(adapter), rank_error, cast_error)

    own = _own_folder(found)

    def write(folder: Path) -> None:
        nonlocal exported
        base_name, parameters = found.reference or "", parameters_of(own)
        save_peft(cast, folder, base_name=base_name, conv1d=_is_conv1d(own), dropout=0.0, parameters=parameters)
        unread, unchecked = check_with_peft(found, folder, base)
        exported = replace(exported, unread=unread)
        copy_serving_files(own, folder)
        (folder / CARD).write_text(adapter_card(found, exported.lines(), exported.is_exact), encoding="utf-8")
        exported = replace(exported, unchecked=unchecked)  # of no use to whoever reads the card

    _publish(to, write)
    return exported


def export_merged(
    source: str | Path,
    to: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    client: int | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write base and result as one model in Hugging Face format, with tokenizer and model card.

    ``W + b a`` is formed in float32 and cast once, to ``dtype`` or else the type the base is stored in. What the cast
    loses is ``‖cast(W + b a) − cast(W) − b a‖``.

    Raises:
        RunError: as for :func:`export_adapter`.
        AdapterError: as for :func:`export_adapter`.
        ModelError: the base cannot be loaded, is quantized, ties a target's weights to another module's, or would be
            written as a kind that transformers does not load as a causal LM.
    """
    found, to = _chosen(Path(source), client), Path(to)
    _refuse_quantized(found)
    adapter = _only_adapter(found)
    kept, rank_error = _at_rank(adapter, rank)
    _refuse_files(to)
    loaded = load_base_of(found, base, None, "cpu", dtype="auto")
    _refuse_quantized_base(loaded)
    _refuse_part_of_a_kind(loaded)
    target = loaded.dtype if dtype is None else _dtype(dtype)
    lora = wrap(found, loaded)
    layers = dict(lora.layers)
    _refuse_tied(lora.unwrap(), layers)
    merged = {name: _merged(layer.base, kept[name].delta(), target) for name, layer in layers.items()}
    errors = torch.tensor([error for _, error in merged.values()], dtype=torch.float64)
    cast_error = float(errors.norm())
    written = str(target).removeprefix("torch.")
    exported = Exported(to, "merged model", written, kept.ranks, norm(adapter), rank_error, cast_error)

    wording = wording_of(OpenedResult(found, loaded, lora))
    stops = stop_ids(loaded.model, loaded.tokenizer, wording, _own_folder(found))

    def write(folder: Path) -> None:
        loaded.model.to(target)
        loaded.model.generation_config = generation_config(loaded.model, stops)
        for name, (weight, _) in merged.items():
            loaded.model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(merged_card(found, exported.lines(), exported.is_exact), encoding="utf-8")

    _publish(to, write)
    return exported


def write_cards(run: Path) -> None:
    """Put a model card beside every adapter of a finished run that has none yet."""
    names = read_object(run, read_manifest(run), "finished.json").get("adapters", ())
    if all((run / name / CARD).exists() for name in names):
        return
    found = find_result(run)
    for name, adapter in found.adapters.items():
        folder = _adapter_folder(run, name)
        written = Exported(folder, "adapter", "float32", adapter.ranks, norm(adapter), 0.0, 0.0)
        alone = replace(found, adapters={name: adapter})
        card = adapter_card(alone, written.lines(), written.is_exact)
        with durable.explained(str(folder / CARD), "free space, then run the same command again"):
            durable.write_bytes(folder / CARD, card.encode())


def _chosen(source: Path, client: int | None) -> Found:
    found = find_result(source)
    if found.run is not None and found.run.finished is None:
        raise RunError(f"{unfinished_note(found.run)}; then export it")
    return of_client(found, client)


def _only_adapter(found: Found) -> Adapter:
    """Return the adapter to export, at the rank it truly has."""
    if not found.adapters:
        raise AdapterError(
            f"{found.path}: expected a result that changes the base, this run adds nothing to it; "
            "choose a run that trains"
        )
    if len(found.adapters) > 1:
        raise RunError(
            f"{found.path}: each of its {len(found.adapters)} clients has its own adapter; choose one with --client K"
        )
    return next(iter(found.adapters.values()))


def _at_rank(adapter: Adapter, rank: int | None) -> tuple[Adapter, float]:
    """Return the adapter with that rank everywhere, and its Frobenius distance from the given one."""
    if rank is None:
        return adapter, 0.0
    kept = compress(adapter, rank=rank)
    largest = max(kept.adapter.ranks.values())
    if rank > largest:
        raise AdapterError(
            f"--rank: expected 1 to {largest}, the largest rank of the adapter, got {rank}; choose one of these"
        )
    return pad(kept.adapter, rank), kept.error


def _merged(base: nn.Module, delta_OI: Tensor, target: torch.dtype) -> tuple[Tensor, float]:
    """Return the merged weight in the base's own orientation, and what the cast lost of the delta."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    delta = delta_OI.T if isinstance(base, Conv1D) else delta_OI
    cast = (weight.float() + delta.float()).to(target)
    if not torch.isfinite(cast).all():
        raise AdapterError(
            f"the merged model: expected finite weights, got some beyond the range of {target}; "
            "choose --dtype bfloat16 or float32"
        )
    # What the cast of W alone loses is the target type's doing, not the merge's, and is not counted.
    lost = cast.double() - weight.to(target).double() - delta.double()
    return cast.contiguous(), float(lost.norm())


def _adapter_folder(run: Path, name: str) -> Path:
    return run / ADAPTER if name == RESULT else run / ADAPTER / name


def _own_folder(found: Found) -> Path:
    """Return the folder of the adapter that is to be exported."""
    return found.path if found.run is None else _adapter_folder(found.path, next(iter(found.adapters)))


def _is_conv1d(folder: Path) -> bool:
    """Tell whether the adapter's own files say that its base holds transposed weights."""
    return bool(durable.read_json(folder / "adapter_config.json").get("fan_in_fan_out"))


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}; choose one of these")
    return DTYPES[name]


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


def _refuse_files(to: Path) -> None:
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise RunError(f"--to {to}: expected a new or an empty folder, found files; choose another folder")


def _publish(to: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder next to ``to`` and rename it: ``to`` exists complete or not at all."""
    _refuse_files(to)
    with durable.explained(str(to), "free space or choose another folder"):
        to.parent.mkdir(parents=True, exist_ok=True)
        with durable.temporary_folder(to.parent, to.name) as temporary:
            write(temporary)
            durable.publish(temporary, to)
