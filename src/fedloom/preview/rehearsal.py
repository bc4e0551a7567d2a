"""What a run would be refused for before its first round: its own steps, over the base without its weights.

Nothing is written or fetched. What only the weights show (that they are whole, finite, and computed packed as apart) is
left to the run, or to a workshop that loads bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom import embedded
from fedloom.assembly.inputs import Workshop, lora_of
from fedloom.assembly.preparation import Preparation
from fedloom.assembly.start_adapter import lay_start, targets_of
from fedloom.config import Settings
from fedloom.data.tokenizer import BYTES
from fedloom.errors import FedloomError, ModelError
from fedloom.lora.layer import LoRAModel
from fedloom.models.base_folder import weight_files
from fedloom.models.load import DTYPES, Base, find_base
from fedloom.names import looks_like_hub_name
from fedloom.preview.description import skeleton
from fedloom.run_folder.claim import is_begun
from fedloom.training.skeleton import check_passes
from fedloom.wording import counted

_FETCHED = "not on this machine; a run would fetch it from the hub"


class Verdict(StrEnum):
    """Whether something of a recipe would run here."""

    YES = "yes"
    UNKNOWN = "not known"
    NO = "no"


@dataclass(frozen=True)
class Finding:
    """One thing that a recipe needs, whether it is here, and why (not)."""

    need: str
    verdict: Verdict
    why: str


class SketchWorkshop(Workshop):
    """Opens a base that is on this machine with its shapes and its tokenizer, and without its numbers."""

    def base(self, settings: Settings) -> tuple[Base, LoRAModel]:
        """Return the base of the settings on the meta device, checked to be whole and of a kind that can be trained.

        Raises:
            ModelError: it is not; nothing says so of what only its numbers show.
        """
        if _is_of_hub(settings.model.base):
            cached = settings.model.model_copy(update={"base": str(base_on_this_machine(settings))})
            settings = settings.model_copy(update={"model": cached})
        model = settings.model
        found = find_base(
            model.base, tokenizer=model.tokenizer, device="cpu", trust_remote_code=model.trust_remote_code
        )
        shapes = skeleton(settings)
        check_passes(shapes, model.attention)
        if isinstance(dtype := DTYPES[model.dtype], torch.dtype):
            shapes = shapes.to(dtype)
        base = Base(shapes, found.tokenizer, found.name, "", shapes.dtype, found.device)
        lora = lora_of(shapes, targets_of(model))
        lay_start(model.model_copy(update={"train_adapter": True}), base, lora)  # checked only: there are no numbers
        return base, lora


def rehearse(prepared: Preparation, absent: frozenset[str]) -> Iterator[Finding]:
    """Yield one finding per step of a run; ``absent`` are settings whose files are known to be missing."""
    for need, look in _ALONE.items():
        yield _looked(need.format(prepared), look, prepared)
    if prepared.settings.privacy.unit != "none" or prepared.settings.privacy.sum != "plain":
        yield _looked("accountant of privacy", _installed("accountant"), prepared)
    yield from rehearse_rows(prepared, absent)


def rehearse_rows(prepared: Preparation, absent: frozenset[str] = frozenset()) -> Iterator[Finding]:
    """Yield one finding per step of a run that reads rows, or that needs them."""
    yield from _rows(prepared, absent)
    yield from _in_turn(prepared, absent)


def base_on_this_machine(settings: Settings) -> Path | None:
    """Return the folder of a base with its weights; None where a run would fetch it."""
    name = settings.model.base
    if not _is_of_hub(name):
        return Path(embedded.base_path(name)).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=settings.model.revision, local_files_only=True))
        weight_files(folder)
    except (ModelError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return folder


def _looked(need: str, look: Callable[[Preparation], str], prepared: Preparation) -> Finding:
    try:
        return Finding(need, Verdict.YES, look(prepared))
    except FedloomError as error:
        return Finding(need, Verdict.NO, str(error))


def _folder(prepared: Preparation) -> str:
    begun = bool(prepared.folder) and is_begun(prepared.out) and not prepared.fresh
    return "holds this run, which would be resumed" if begun else "nothing in the way"


def _device(prepared: Preparation) -> str:
    chosen = prepared.device
    return f"this would be {chosen}" if prepared.settings.model.device == "auto" else "present"


def _installed(step: str) -> Callable[[Preparation], str]:
    def look(prepared: Preparation) -> str:
        getattr(prepared, step)
        return "what it needs is installed"

    return look


def _suites(prepared: Preparation) -> str:
    prepared.suites  # noqa: B018
    return "what they ask is here" if prepared.settings.evaluation.suites else "none asked for"


_ALONE: dict[str, Callable[[Preparation], str]] = {
    "run folder {0.out}": _folder,
    "device {0.settings.model.device}": _device,
    "engine {0.settings.engine.name}": _installed("engine"),
    "trackers": _installed("trackers"),
    "quantization {0.settings.model.quantization}": _installed("quantization"),
    "suites": _suites,
}


def _rows(prepared: Preparation, absent: frozenset[str]) -> Iterator[Finding]:
    data = prepared.settings.data
    for setting, kind, name, look in (
        ("path", "data", data.path, _training),
        ("eval_path", "held-out data", data.eval_path, _held_out),
    ):
        if name is None or f"data.{setting}" in absent:
            continue
        if _is_of_hub(name):
            yield Finding(f"{kind} {name}", Verdict.UNKNOWN, "a data set of the hub, which a run reads there")
        else:
            yield _looked(f"{kind} {name}", look, prepared)


def _training(prepared: Preparation) -> str:
    return counted(prepared.rows, "row")


def _held_out(prepared: Preparation) -> str:
    return counted(prepared.held_out_rows or 0, "row")


def _in_turn(prepared: Preparation, absent: frozenset[str]) -> Iterator[Finding]:
    model, data = prepared.settings.model, prepared.settings.data
    base = Finding(f"base {model.base}", Verdict.UNKNOWN, _FETCHED)
    if absent & {"model.base", "model.tokenizer"}:
        base = Finding(base.need, Verdict.UNKNOWN, "a file that it needs is missing")
    elif base_on_this_machine(prepared.settings) is not None and not _is_fetched(model.tokenizer):
        base = _looked(base.need, _base, prepared)
    yield base
    elsewhere = any(_is_of_hub(name) for name in (data.path, data.eval_path) if name is not None)
    if base.verdict is not Verdict.YES or elsewhere or absent & {"data.path", "data.eval_path"}:
        yield Finding("rows as tokens", Verdict.UNKNOWN, "the base and all rows are needed to know")
        return
    yield (rows := _looked("rows as tokens", _inputs, prepared))
    if rows.verdict is Verdict.YES:
        yield _looked("clients and method", _clients, prepared)
        yield from _numbers(prepared)


def _base(prepared: Preparation) -> str:
    prepared.loaded  # noqa: B018
    name = prepared.settings.model.base
    if name == embedded.NAME:
        return "it comes with the package"
    return "a folder with its weights" if Path(name).expanduser().is_dir() else "in the hub's cache on this machine"


def _inputs(prepared: Preparation) -> str:
    inputs = prepared.inputs
    sizes = inputs.partition.sizes
    lengths = inputs.tokens.lengths
    told = [
        f"{counted(len(inputs.tokens), 'row')} of {_span(lengths, 'token')} to train on",
        f"{counted(len(sizes), 'client')} of {_span(sizes, 'row')}",
        _units(prepared),
        "" if inputs.own.tokens is None else f"{counted(len(inputs.own.tokens), 'row')} of their own to be scored on",
        inputs.counts.told,
        f"left out: client {', '.join(inputs.left_out)}" if inputs.left_out else "",
    ]
    return "; ".join(filter(None, told))


def _span(numbers: NDArray[np.int64], noun: str) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return counted(high, noun) if low == high else f"{low:,} to {counted(high, noun)}"


def _units(prepared: Preparation) -> str:
    """Say how many units a column tells apart, and how many rows the largest has."""
    column, units = prepared.settings.data.unit_column, prepared.inputs.tokens.units
    if column is None or units is None:
        return ""
    sizes = np.unique(units, return_counts=True)[1]
    return f"{counted(len(sizes), 'value')} of {column} of up to {counted(int(sizes.max()), 'row')}"


def _clients(prepared: Preparation) -> str:
    prepared.plan  # noqa: B018
    prepared.identity  # noqa: B018
    return "they fit the base and the rows"


def _numbers(prepared: Preparation) -> Iterator[Finding]:
    """Run the base where it is loaded; without its weights, say what only they show of a narrow type."""
    model, need = prepared.loaded[1].model, "numbers of the base"
    if next(model.parameters()).device.type != "meta":
        yield _looked(need, _finite, prepared)
    elif model.dtype == torch.float16:
        yield Finding(need, Verdict.UNKNOWN, "whether it overflows in float16 shows only once it is loaded: --load")


def _finite(prepared: Preparation) -> str:
    prepared.numbers  # noqa: B018
    return "finite on the longest row and the first ones"


def _is_of_hub(name: str) -> bool:
    return name != embedded.NAME and not Path(name).exists() and looks_like_hub_name(name)


def _is_fetched(tokenizer: str | None) -> bool:
    """Tell whether a tokenizer would be fetched from the hub."""
    if tokenizer in (None, BYTES) or not _is_of_hub(tokenizer):
        return False
    from huggingface_hub import try_to_load_from_cache

    return not isinstance(try_to_load_from_cache(tokenizer, "tokenizer_config.json"), str)
