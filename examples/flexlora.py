"""FlexLoRA in one page: the mean product, cut by an SVD; each client gets its top slots (arXiv 2402.11505).

    python examples/flexlora.py [BASE ROWS]

BASE is the folder of a model with q_proj and v_proj, ROWS a JSON-lines file of instruction, context, response and
category. By default both are those in the package. The fast version of this is `FlexLoRA` in
`src/fedloom/methods/flexlora.py`: `fedloom run` with `method.name = "flexlora"`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom import embedded

NUM_CLIENTS, NUM_ROUNDS, LOCAL_STEPS, BATCH_SIZE = 10, 3, 10, 8
RANKS = [32, 16, 8, 8, 4, 4, 2, 2, 2, 2]
LEARNING_RATE, SEED = 3e-3, 1


def decomposed(uploads: list[dict[str, Tensor]], num_rows: list[int], max_rank: int) -> dict[str, Tensor]:
    """Return B = U √Σ and A = √Σ Vᵀ of every module's Σ p_k B_k A_k, cut to the largest rank."""
    shares = [count / sum(num_rows) for count in num_rows]
    adapter = {}
    for name_b in (name for name in uploads[0] if "lora_B" in name):
        name_a = name_b.replace("lora_B", "lora_A")
        mean = sum(p * upload[name_b] @ upload[name_a] for p, upload in zip(shares, uploads, strict=True))
        u, sigma, v = torch.linalg.svd(mean, full_matrices=False)
        root = sigma[:max_rank].sqrt()
        adapter |= {name_b: u[:, :max_rank] * root, name_a: root[:, None] * v[:max_rank]}
    return adapter


def cut(name: str, factor: Tensor, rank: int) -> Tensor:
    """Keep the first rows of A, the first columns of B."""
    return factor[:rank] if "lora_A" in name else factor[:, :rank]


def tokenised(path: str, base: str) -> list[tuple[list[int], list[int]]]:
    """Return (ids, labels) of every row, sorted by category; the prompt is not learned."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for row in sorted(map(json.loads, lines), key=lambda row: str(row.get("category"))):
        asked = "\n".join(filter(None, [row["instruction"], row.get("context")]))
        prompt = tokenizer(f"Question: {asked}\nAnswer:")["input_ids"]
        answer = [*tokenizer(f" {row['response']}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    return rows


def loss_on(model: torch.nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Return the mean loss over the rows' answers; padding comes last, where a causal model cannot see it."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    return model(input_ids=ids, labels=labels).loss


def main(base_path: str, rows_path: str) -> list[float]:
    """Run every round and return the held-out losses, the base's first."""
    rows = tokenised(rows_path, base_path)
    held_out, rows = rows[::40], [row for position, row in enumerate(rows) if position % 40]
    size = len(rows) // NUM_CLIENTS
    clients = [rows[k * size : (k + 1) * size] for k in range(NUM_CLIENTS)]
    draw = torch.Generator().manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    losses = [loss_on(base, held_out).item()]

    # the global adapter at the largest rank: A random, B zero
    model = get_peft_model(base, lora(max(RANKS)))
    adapter = {name: torch.zeros_like(f) for name, f in model.named_parameters() if f.requires_grad}
    for name, factor in adapter.items():
        if "lora_A" in name:
            factor.uniform_(-(factor.shape[1] ** -0.5), factor.shape[1] ** -0.5, generator=draw)
    base = model.unload()

    for number in range(1, NUM_ROUNDS + 1):
        uploads = []
        for client, rank in enumerate(RANKS):
            model = get_peft_model(base, lora(rank))
            factors = {name: factor for name, factor in model.named_parameters() if factor.requires_grad}
            for name, factor in factors.items():
                factor.data.copy_(cut(name, adapter[name], rank))
            optimiser = torch.optim.AdamW(factors.values(), lr=LEARNING_RATE, weight_decay=0.0)
            for _ in range(LOCAL_STEPS):
                chosen = torch.randperm(len(clients[client]), generator=draw)[:BATCH_SIZE].tolist()
                loss_on(model, [clients[client][row] for row in chosen]).backward()
                optimiser.step()
                optimiser.zero_grad()
            uploads.append({name: factor.detach().clone() for name, factor in factors.items()})
            base = model.unload()

        adapter = decomposed(uploads, [len(rows) for rows in clients], max(RANKS))

        model = get_peft_model(base, lora(max(RANKS)))
        for name, factor in model.named_parameters():
            if factor.requires_grad:
                factor.data.copy_(adapter[name])
        losses.append(loss_on(model, held_out).item())
        base = model.unload()
        print(f"round {number}: held-out loss {losses[-1]:.4f} nats (base {losses[0]:.4f})")
    return losses


def lora(rank: int) -> LoraConfig:
    """Return an adapter's settings: the scale alpha / r is 2 at every rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(embedded.model_path()), str(embedded.data_path())]))
