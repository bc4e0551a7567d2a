"""The three shapes on which training is timed, and real rows for each: what ``round.py`` and ``levers.py`` share.

Shapes: stories3M as it is; a Llama of 8 layers, width 512 and vocabulary 32,000 and a GPT-2 small, both with random
weights. Rows are Dolly's ten clients by the shape's own tokenizer, those of more than 512 tokens left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedloom.data.encoding import encode
from fedloom.data.records import read_records
from fedloom.data.sources import load_rows
from fedloom.data.tokenizer import load_tokenizer
from fedloom.data.tokens import TokenSet
from fedloom.federation.server import ServerRules
from fedloom.lora.layer import LoRAModel
from fedloom.methods.server_steps import PlainStep
from fedloom.methods.zero_padding import fedit
from fedloom.models.fused import TanhGELU, fuse_operators
from fedloom.models.load import DTYPES, load_base
from fedloom.split.local_parties import local_parties
from fedloom.split.parties import SplitParties
from fedloom.split.plan import SplitPlan
from fedloom.training.cohort_round import LocalTraining

SHAPES = ("stories3M", "llama", "gpt2")
LONGEST = 512


def load_shape(shape: str, data: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """Return a shape's frozen model, its operators as its family has them, and its tokenizer."""
    if shape == "stories3M":
        base = load_base(data / "models" / shape, dtype=dtype, device="cpu")  # type: ignore[arg-type]
        spell_out(base.model)
        return base.model, base.tokenizer
    tokenizer = load_tokenizer(data / "tokenizers" / shape)
    if shape == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config())
    else:
        sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes))
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0.0, 0.02, generator=generator)
    return model.to(DTYPES[dtype]).requires_grad_(False).eval(), tokenizer


def spell_out(model: Any, *kinds: str) -> None:
    """Take back what fedloom does to the operators of a loaded base, or of these kinds of modules alone."""
    chosen = [module for module in model.modules() if type(module).__name__.endswith(kinds or ("",))]
    for module in chosen:
        for name, child in module.named_children():
            if isinstance(child, TanhGELU):
                setattr(module, name, child.spelled_out)
        if isinstance(vars(module).get("forward"), MethodType):
            del module.forward


@contextmanager
def as_shipped(model: Any) -> Iterator[None]:
    """Give a model the operators of a base that fedloom loaded, for a while."""
    fuse_operators(model)
    try:
        yield
    finally:
        spell_out(model)


def load_clients(data: Path, tokenizer: Any, num_clients: int = 10, most_rows: int | None = None) -> list[TokenSet]:
    """Return the tokens of Dolly's clients, of the first rows of each where few are enough."""
    folder = data / "instruct" / "dolly15k_10clients"
    files = [folder / f"local_training_{i}.json" for i in range(num_clients)]
    kept: dict[str, Any] = {"max_length": LONGEST, "overlong": "drop", "unanswered": "drop", "at_most": most_rows}
    return [encode(read_records(load_rows(str(f))), tokenizer, **kept).tokens for f in files]


def cut_parties(
    lora: LoRAModel, rows: Sequence[TokenSet], cut_layer: int, training: LocalTraining, *, rank: int, **changes: Any
) -> SplitParties:
    """Set up a split run over a model, of as many clients as there are sets of rows, that never aggregates."""
    count = len(rows)
    plan: dict[str, Any] = {
        "seed": 1,
        "num_steps": 10**6,
        "aggregate_every": 10**6,
        "cut_layers": (cut_layer,) * count,
        "ranks": (rank,) * count,
        "scales": (2.0,) * count,
        "server_rank": rank,
        "server_scale": 2.0,
        "num_rows": tuple(len(own) for own in rows),
        "training": training,
    }
    return local_parties(lora, SplitPlan(**plan | changes), rows, fedit, ServerRules(PlainStep()))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call, which other work on the machine disturbs little."""
    begun = time.process_time()
    work()
    return time.process_time() - begun
