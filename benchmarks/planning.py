"""What each paper's recipe costs at full size: operations, memory, and hours on named devices, before it is run.

    FEDLOOM_DATA=../shared/data python benchmarks/planning.py

Nothing is loaded but configurations: the bases are built without numbers. The mean row is that of a sample of the
recipe's data, by the base's tokenizer, where FEDLOOM_DATA holds it (Alpaca's first 5,000 rows stand for all); numbers
of rows are the published ones. Operations are those of ``fedloom.preview.run_costs``. Hours are operations over 40 % of
a device's dense peak for the recipe's type, as the cost model of cuts assumes; on a small base with small batches a GPU
reaches less. Memory is that of ``fedloom describe``: base, one adapter with its optimiser, one pass.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GPT2Config, LlamaConfig

from fedloom import config, recipes
from fedloom.assembly.inputs import lora_of
from fedloom.assembly.start_adapter import targets_of
from fedloom.data.encoding import encode
from fedloom.data.records import read_records
from fedloom.data.sources import load_rows
from fedloom.data.tokenizer import load_tokenizer
from fedloom.preview.description import describe, skeleton
from fedloom.preview.run_costs import run_costs
from fedloom.split.cost_model import Work, shape_of

TINY = {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4}
LLAMA_7B = LlamaConfig(vocab_size=32_000, dtype="float16")
TINYLLAMA = LlamaConfig(vocab_size=32_000, num_attention_heads=32, dtype="float32", **TINY)
MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
DOLLY, E2E = "instruct/dolly15k_10clients", "e2e/trainset.csv"
SAMPLED = 1000
UTILISATION = 0.4
PEAKS = {
    "RTX 4090": {"float32": 82.6e12, "bfloat16": 165e12},
    "A100": {"float32": 19.5e12, "bfloat16": 312e12},
    "H100": {"float32": 67e12, "bfloat16": 989e12},
}
"""Dense peaks in operations per second, by the vendor's data sheets; fp32 without TF32."""


@dataclass(frozen=True)
class Full:
    """A recipe at full size: its base, a sample of its rows, their tokenizer, rows to train on and held out."""

    base: Any
    sample: str
    tokenizer: str
    num_rows: int
    num_held_out: int


FULL = {
    "fedit-dolly": Full(LLAMA_7B, DOLLY, "llama", 14_931, 80),
    "flora-hetero-dolly": Full(TINYLLAMA, DOLLY, "llama", 14_931, 80),
    "flora-homo-alpaca": Full(TINYLLAMA, "instruct/alpaca_5000.json", "llama", 51_802, 200),
    "splitlora-e2e": Full(GPT2Config(), E2E, "gpt2", 41_061, 1000),
    "splitlora-e2e-medium": Full(MEDIUM, E2E, "gpt2", 41_061, 1000),
    "e2e-dirichlet": Full(GPT2Config(), E2E, "gpt2", 41_061, 1000),
}


def mean_row(settings: config.Settings, full: Full, data: Path) -> Work:
    """Return the tokens of the mean row, and those supervised."""
    rows = load_rows(data / full.sample)
    rows = rows.select(range(0, len(rows), max(1, len(rows) // SAMPLED)))
    chosen = settings.data
    tokens = encode(
        read_records(rows, chosen.shape, chosen.columns),
        load_tokenizer(data / "tokenizers" / full.tokenizer),
        template=chosen.template or "auto",
        max_length=chosen.max_length or 1024,
        loss_on=chosen.loss_on,
        overlong="drop" if chosen.overlong == "error" else chosen.overlong,
        unanswered="drop",
    ).tokens
    mean = tokens.num_tokens / len(tokens)
    return Work(mean, tokens.num_loss_tokens / len(tokens), mean)


def main() -> None:
    data = Path(os.environ["FEDLOOM_DATA"])
    hours_of = " | ".join(f"h on {name}" for name in PEAKS)
    print(f"| recipe | tokens a row (learned) | operations | evaluation | memory | {hours_of} |")
    print("|---|---:|---:|---:|---:|" + "---:|" * len(PEAKS))
    for name, full in FULL.items():
        with tempfile.TemporaryDirectory() as folder:
            full.base.save_pretrained(folder)
            table = config.parse(recipes.read(name), name)
            # The hub's data is not opened; a cut's own table is left to `fedloom describe`.
            overrides = [f"model.base={folder}", "model.device=cuda", f"data.path={data / full.sample}"]
            settings = config.resolve(table, name, overrides, also=())
            model = skeleton(settings)
            dtype = settings.model.dtype if settings.model.dtype != "auto" else "float32"
            lora = lora_of(model, targets_of(settings.model))
            shape = shape_of(lora.model, lora.shapes)
            row = mean_row(settings, full, data)
            costs = run_costs(settings, shape, row, full.num_rows, full.num_held_out)
            plain = settings.model_copy(update={"method": settings.method.model_copy(update={"name": "fedit"})})
            memory = describe(plain).memory_bytes
        total = costs.training_flops + costs.evaluation_flops
        hours = [total / (UTILISATION * peak[dtype]) / 3600 for peak in PEAKS.values()]
        print(
            f"| {name} | {row.tokens_per_step:.0f} ({row.loss_tokens_per_step:.0f}) | {total:.2e} | "
            f"{costs.evaluation_share:.1%} | {memory / 1e9:.1f} GB | {' | '.join(f'{h:.2f}' for h in hours)} |"
        )


if __name__ == "__main__":
    main()
