"""The card of an exported result: how it was made, its figures, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom import embedded
from fedloom.config.setting import values_of
from fedloom.lora.base_reference import BaseReference
from fedloom.reporting.privacy import privacy_line
from fedloom.results.opened_result import Found
from fedloom.wording import written_bytes

UNNAMED = BaseReference("the base", is_folder=True)
"""The base of an adapter whose files name none."""
_HASHES = (
    ("base_sha256", "base, sha256 of configuration and weights"),
    ("data_sha256", "training rows as tokens, sha256"),
    ("held_out_sha256", "held-out rows as tokens, sha256"),
    ("partition_sha256", "partition, sha256"),
)
_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""
_LOAD_ON_EMBEDDED = """\
from fedloom.embedded import model_path
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(model_path())
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""
_LOAD_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""


def adapter_card(found: Found, losses: Sequence[str], is_exact: bool) -> str:
    """Return the README.md of an exported adapter; ``losses`` say what the export cost, ``is_exact``: nothing.

    A base that is a folder goes by the folder's name, without its place on this machine.
    """
    base = found.reference or UNNAMED
    loading = _LOAD_ADAPTER.format(base=base.name if base.is_public else f"path/to/{base.name}")
    if base.name == embedded.NAME:
        loading = _LOAD_ON_EMBEDDED
    return _card(found, losses, is_exact, "peft", "A low-rank adapter", loading)


def merged_card(found: Found, losses: Sequence[str], is_exact: bool) -> str:
    """Return the README.md of an exported merged model."""
    what = "A model with its low-rank adapter merged in"
    return _card(found, losses, is_exact, "transformers", what, _LOAD_MERGED)


def _card(found: Found, losses: Sequence[str], is_exact: bool, library: str, what: str, loading: str) -> str:
    base = found.reference or UNNAMED
    front = [
        "---",
        *([f"base_model: {base.name}"] if base.is_public else []),
        f"library_name: {library}",
        "tags:",
        "- lora",
    ]
    if found.run is not None:
        front.append("- federated-learning")
    lines = [*front, "---", "", f"# {found.path.name}", "", f"{what} for `{base.name}`, made by fedloom.", ""]
    lines += ["## The file", "", *(f"* {line.partition(': ')[2] or line}" for line in losses[:1])]
    lines += [*(f"* {line}" for line in losses[1:]), ""]
    if found.run is not None and found.settings is not None:
        lines += ["## Training", "", "| what | value |", "|---|---|", *_rows_of(_training(found)), ""]
        lines += ["## Figures", "", "| what | value |", "|---|---|", *_rows_of(_figures(found, is_exact)), ""]
    lines += ["## Load it", "", "```python", *loading.splitlines(), "```", ""]
    return "\n".join(lines)


def _rows_of(pairs: Iterator[tuple[str, object]]) -> Iterator[str]:
    for what, value in pairs:
        yield f"| {what} | {value} |"


def _training(found: Found) -> Iterator[tuple[str, object]]:
    settings, run = found.settings, found.run
    assert settings is not None
    assert run is not None
    ranks = settings.method.ranks
    yield "method", settings.method.name
    yield "rounds", len(run.records)
    yield "clients", f"{settings.federation.num_clients}, {settings.cohort_size} a round"
    yield "ranks of the clients", ", ".join(map(str, values_of(ranks)))
    yield "seed", settings.run.seed
    data = Path(settings.data.path)
    yield "data", f"`{data.name if data.is_absolute() else data}`"
    identity = run.manifest["identity"]
    for key, meaning in _HASHES:
        if identity.get(key):
            yield meaning, f"`{identity[key]}`"
    versions: Mapping[str, str] = run.manifest["sessions"][-1]["versions"]
    yield "made with", ", ".join(f"{name} {versions[name]}" for name in ("fedloom", "torch", "transformers"))


def _figures(found: Found, is_exact: bool) -> Iterator[tuple[str, object]]:
    run, name = found.run, next(iter(found.adapters))
    assert run is not None
    finished: Mapping[str, Any] = run.finished or {}
    before, after = finished.get("base_eval") or {}, finished.get("eval") or {}
    of_client = after.get("loss_nats_of_client") or {}
    if after:
        loss = of_client.get(name.removeprefix("client-"), after["loss_nats"])
        whose = "" if is_exact else " of the run's own adapter, before compression or rounding"
        yield f"held-out loss{whose}", f"{loss:.4f} nats per token"
        begun = found.settings is not None and found.settings.model.adapter is not None
        first = "before training, of base and the adapter that it started from" if begun else "of the base"
        yield f"held-out loss {first}", f"{before['loss_nats']:.4f} nats per token"
        yield "held-out", f"{after['num_rows']:,} rows, {after['num_loss_tokens']:,} tokens to predict"
    if len(of_client) > 1:
        losses = ", ".join(f"{client}: {loss:.4f}" for client, loss in of_client.items())
        yield "held-out loss of each client's own adapter", losses
    if (privacy := run.records[-1].get("privacy") if run.records else None) is not None:
        yield "privacy", privacy_line(privacy)
        if (
            privacy["unit"] == "client"
        ):  # the card goes with the adapter: bytes tell how many came, noise what they sent
            return
    yield "bytes up", written_bytes(sum(record.get("upload_bytes") or 0 for record in run.records))
    yield "bytes down", written_bytes(sum(record.get("download_bytes") or 0 for record in run.records))
    noise = run.records[-1].get("aggregation_noise") if run.records else None
    if noise is not None:
        yield "aggregation noise of the last round", f"{noise:.3g}"
