"""What of fedloom works with one kind of decoder, tried on a tiny one: each answer is compared with stock peft's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from tiny_decoders import DRAFTS, NUM_BLOCKS, tiny_config, tiny_decoder
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedloom.data.tokenizer import load_tokenizer
from fedloom.data.tokens import TokenSet
from fedloom.errors import CutError, FedloomError
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import load_peft, save_peft
from fedloom.models.cut import cut, verify_cut
from fedloom.models.families import ALL_LINEAR, FAMILIES, resolve_targets
from fedloom.models.load import load_base
from fedloom.models.partial_load import load_bottom, load_top
from fedloom.models.stock_peft import taken_for_experts
from fedloom.results.export import export_adapter
from fedloom.results.merged_export import export_merged
from fedloom.seeding import stream, torch_stream
from fedloom.split.split_step import run_part
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort
from fedloom.training.packing import hidden_states, pack
from fedloom.training.skeleton import check_runs_packed
from fedloom.training.verified_head import output_head

RANK = 2
LENGTHS = (9, 5, 24)
"""Tokens of the rows: one is longer than the tiny sliding window."""
TOLERANCE = 2e-3
"""Of a norm: float32 through a few blocks."""
LONGEST_REASON = 74

REFUSED_BY_PEFT = ("mixer.out_proj", "mamba.out_proj")
"""Layers that stock peft does not adapt, so that there is nothing to compare a step with."""

NOT = "no"


@dataclass
class Findings:
    """What was found of a kind. ``wrong`` are differences that nobody tells the user: there must be none."""

    kind: str
    is_built: bool = False
    trains: str = NOT
    adapted: str = NOT
    is_in_table: bool = False
    cut: str = NOT
    peft: str = NOT
    merged: str = NOT
    reasons: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def try_kind(kind: str, folder: Path) -> Findings:
    """Return what works with a kind of decoder; files go into ``folder``."""
    found = Findings(kind, is_in_table=kind in FAMILIES)
    try:
        model = tiny_decoder(kind)
        logits_of(model)
    except Exception as error:  # whatever the installed transformers raises, the kind cannot be tried
        found.reasons["built"] = DRAFTS.get(kind) or reason_of(error)
        return found
    found.is_built = True
    _try_loading(found, model, folder / "base")
    _try_training(found, model)
    _try_cutting(found, model, folder / "base")
    _try_files(found, folder)
    return found


def logits_of(model: Any) -> list[Tensor]:
    """Return the model's own logits of every row, each alone."""
    with torch.no_grad():
        return [model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).logits for ids, _ in rows()]


def rows() -> list[tuple[Any, Any]]:
    """Return rows of tokens with what of them is learned."""
    draw = stream(0, "rows of a trial")
    return [(draw.integers(3, 120, n, dtype=np.int32), np.arange(n) > 2) for n in LENGTHS]


def alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether tensors are the same but for rounding."""
    whole, other = (torch.cat([part.double().flatten() for part in parts]) for parts in (ours, theirs))
    return bool((whole - other).norm() <= TOLERANCE * other.norm().clamp_min(1e-12))


def reason_of(error: Exception) -> str:
    """Return an error's first line, short, without what only this try has: folders and sizes of differences."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((one for one in lines if one.startswith("ValueError")), lines[0] if lines else "")
    text = (
        re.sub(r"/\S*/", "", line)
        .removeprefix("model.base: ")
        .removeprefix("base: ")
        .partition(";")[0]
        .replace("|", "/")
    )
    text = re.sub(r" by \d.*| in \w+ \('.*", "", text)  # sizes of differences, and names of classes
    text = re.sub(r"^the (\w+ )?forward of '[\w-]+' ", lambda match: f"its {match[1] or ''}forward ", text)
    told = text if isinstance(error, FedloomError) else f"{type(error).__name__}: {text}"
    return told if len(told) <= LONGEST_REASON else f"{told[: LONGEST_REASON - 1].rstrip()}…"


@contextmanager
def _told(found: Findings, step: str) -> Iterator[None]:
    """Keep the reason of an error of ours; any other is one that the user meets as a traceback."""
    try:
        yield
    except FedloomError as error:
        found.reasons[step] = reason_of(error)
        if "\n" in str(error):
            found.wrong.append(f"{step}: an error of several lines")
    except Exception as error:
        found.reasons[step] = reason_of(error)
        found.wrong.append(f"{step}: {reason_of(error)}")


def _try_loading(found: Findings, model: Any, folder: Path) -> None:
    """Load the base as a run does: it must be what was saved."""
    model.save_pretrained(folder)
    tiny_config(found.kind).save_pretrained(folder)  # a base is saved as the kind that it is, not as its text part
    load_tokenizer("bytes").save_pretrained(folder)
    with _told(found, "load"):
        if not alike(logits_of(load_base(folder, device="cpu").model), logits_of(model)):
            found.wrong.append("load: other logits than those of the model that was saved")


def ways_to_attend() -> tuple[str, ...]:
    """Return how rows can share a pass, the faster way first."""
    try:
        from fedloom.models.row_attention import choose_attention  # noqa: F401
    except ImportError:
        return ("packed",)
    return ("packed", "padded")


def attending(model: Any, way: str) -> Any:
    """Return the model, set to attend in one of the ways."""
    if len(ways_to_attend()) > 1:
        from fedloom.models.row_attention import choose_attention

        choose_attention(model, way)
    return model


def _try_training(found: Findings, model: Any) -> None:
    """Train in the first way that works, and compare it with stock peft."""
    with _told(found, "adapted"):
        found.adapted = ", ".join(_last_names(resolve_targets(model)))
    for way in ways_to_attend():
        try:
            output_head(attending(tiny_decoder(found.kind), way))
        except FedloomError as error:
            found.reasons["trains"] = reason_of(error)
            continue
        except Exception as error:
            found.wrong.append(f"trains {way}: {reason_of(error)}")
            continue
        with _told(found, "trains"):
            differs = _differs_from_peft(found, way)
            found.trains = way
            if differs is not None:
                found.wrong.append(f"trains {way}: {differs} differ from stock peft's")
        break
    _try_describing(found)


def _try_describing(found: Findings) -> None:
    """What is said without weights must be what a run says."""
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(tiny_config(found.kind)).eval()
    try:
        check_runs_packed(skeleton)
    except FedloomError as error:
        if found.trains == "packed":
            found.wrong.append(f"describe: refuses what trains packed: {reason_of(error)}")
    except Exception as error:
        found.wrong.append(f"describe: {reason_of(error)}")


def _differs_from_peft(found: Findings, way: str) -> str | None:
    """Return what of a step differs from one of stock peft on rows one by one: its loss, or a gradient."""
    model = attending(tiny_decoder(found.kind), way)
    targets = resolve_targets(model, None if found.adapted != NOT else [ALL_LINEAR])
    lora = LoRAModel(model, [name for name in targets if not name.endswith(REFUSED_BY_PEFT)])
    start = random_adapter(lora.shapes)
    task = ClientTask(0, TokenSet.from_rows(rows()), RANK, 1.0, start, measures_gradient=True)
    settings = LocalTraining(learning_rate=1e-3, batch_size=len(LENGTHS), steps=1)
    (result,) = train_cohort(lora, [task], settings, seed=0, round=1)
    stock: Any = stock_peft(found.kind, start, is_conv1d=lora.uses_conv1d)
    total, learned = torch.zeros(()), sum(int(marks[1:].sum()) for _, marks in rows())
    for ids, marks in rows():
        ids_T, marks_T = torch.from_numpy(ids).long(), torch.from_numpy(marks)
        logits_TV = stock(input_ids=ids_T[None], use_cache=False).logits[0]
        total = total + cross_entropy(logits_TV[:-1][marks_T[1:]].float(), ids_T[1:][marks_T[1:]], reduction="sum")
    (total / learned).backward()
    if abs(float(total) / learned - result.stats.loss_nats) > TOLERANCE:
        return "losses"
    gradient = result.gradient or Adapter()
    ours = [factor for name in start for factor in (gradient[name].a_RI, gradient[name].b_OR)]
    theirs = [
        torch.zeros_like(factor) if factor.grad is None else factor.grad
        for name in start
        for factor in (stock.get_parameter(f"base_model.model.{name}.lora_{letter}.default.weight") for letter in "AB")
    ]
    return None if alike(ours, theirs) else "gradients"


def stock_peft(kind: str, adapter: Adapter, *, is_conv1d: bool) -> Any:
    """Return a stock base with an adapter that stock peft made."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(adapter), fan_in_fan_out=is_conv1d)
    stock: Any = get_peft_model(tiny_decoder(kind), settings).eval()
    with torch.no_grad():
        for name, pair in adapter.items():
            stock.get_parameter(f"base_model.model.{name}.lora_A.default.weight").copy_(pair.a_RI)
            stock.get_parameter(f"base_model.model.{name}.lora_B.default.weight").copy_(pair.b_OR)
    return stock


def random_adapter(shapes: dict[str, tuple[int, int]]) -> Adapter:
    """Return an adapter of random numbers that changes the logits visibly."""
    draw = torch_stream(0, "adapter of a trial")
    pairs = {}
    for name, (num_out, num_in) in shapes.items():
        rank = min(RANK, num_out, num_in)
        b_OR, a_RI = torch.randn(num_out, rank, generator=draw), torch.randn(rank, num_in, generator=draw)
        pairs[name] = Pair(b_OR * 0.2, a_RI * 0.2)
    return Adapter(pairs)


def without_uncalled(adapter: Adapter, lora: LoRAModel) -> Adapter:
    """Return an adapter as training leaves it: a layer whose weight is read but which is not called learns nothing."""
    called: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name))  # type: ignore[misc]
        for name, layer in lora.layers.items()
    ]
    logits_of(lora.model)
    for hook in hooks:
        hook.remove()
    return Adapter({name: pair if name in called else Pair(pair.b_OR * 0, pair.a_RI) for name, pair in adapter.items()})


def _try_cutting(found: Findings, model: Any, folder: Path) -> None:
    """Cut at every block, whole, as loaded in parts, and on packed rows, which a cut model runs on."""
    if found.trains != "packed":
        return
    with _told(found, "cut"):
        places = []
        for place in range(1, NUM_BLOCKS):
            try:
                verify_cut(model, cut(model, place))
            except CutError as error:
                found.reasons["cut"] = reason_of(error)
                continue
            places.append(place)
        if not places:
            return
        found.cut = "every block" if len(places) == NUM_BLOCKS - 1 else f"at {', '.join(map(str, places))}"
        bottom, top = load_bottom(folder, places[0]).part, load_top(folder, places[0]).part
        verify_cut(model, [bottom, top])
        batch = pack(rows())
        with torch.no_grad():
            whole_TD, hidden = hidden_states(model, batch), batch.input_ids_T
            for part in (bottom, top):
                hidden = run_part(part, hidden, batch.position_ids_T, batch.layout)
        if not alike([hidden], [whole_TD]):
            found.wrong.append("cut: on packed rows it differs from the uncut model")


def _try_files(found: Findings, folder: Path) -> None:
    """Write adapters as a run does, on the default modules and on every linear layer, and load them elsewhere."""
    said = []
    for name, patterns in (("default", None), (ALL_LINEAR, [ALL_LINEAR])):
        if patterns is None and found.adapted == NOT:
            continue
        with _told(found, f"peft {name}"):
            said.append(_try_adapter(found, folder, name, patterns))
    if said:
        found.peft = "equal" if all(one is None for one in said) else "named"
    with _told(found, "merged"):
        _try_merging(found, folder)


def _try_adapter(found: Findings, folder: Path, name: str, patterns: Sequence[str] | None) -> str | None:
    """Return what export says of stock peft; None where it loads all and gives our logits."""
    model = tiny_decoder(found.kind)
    lora = LoRAModel(model, resolve_targets(model, patterns))
    adapter, base = without_uncalled(random_adapter(lora.shapes), lora), folder / "base"
    parameters = taken_for_experts(model.config, lora.shapes)
    written, exported = folder / f"{name} written", folder / f"{name} exported"
    save_peft(adapter, written, base_name=str(base), conv1d=lora.uses_conv1d, parameters=parameters)
    unread = export_adapter(written, exported, base=base).unread
    lora.set_side(adapter)
    try:
        stock = PeftModel.from_pretrained(tiny_decoder(found.kind), str(exported)).eval()
        is_equal, differs = alike(logits_of(lora.model), logits_of(stock)), "other logits than ours"
    except Exception as error:
        is_equal, differs = False, reason_of(error)
    if not is_equal and unread is None:
        found.wrong.append(f"peft, {name} modules: {differs}")
    if is_equal and unread is not None:
        found.wrong.append(f"peft, {name} modules: refused, but equal: {unread}")
    if unread is not None:
        found.reasons[f"peft {name}"] = unread.partition(":")[0]
    return unread


def _try_merging(found: Findings, folder: Path) -> None:
    """Merge the adapter on every linear layer; the written model must give the logits of adapter and base."""
    model = tiny_decoder(found.kind)
    lora = LoRAModel(model, resolve_targets(model, [ALL_LINEAR]))
    lora.set_side(load_peft(folder / f"{ALL_LINEAR} written"))
    export_merged(folder / f"{ALL_LINEAR} written", folder / "merged", base=folder / "base")
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    if alike(logits_of(merged), logits_of(lora.model)):
        found.merged = "equal"
    else:
        found.wrong.append("merged: other logits than the adapter beside the base")


def _last_names(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
