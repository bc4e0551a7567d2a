"""FedSA-LoRA in one page: clients train A and B, A alone is shared, every B stays (arXiv 2410.01463).

    python examples/fedsa_lora.py [BASE ROWS]

BASE is the folder of a model with q_proj and v_proj, ROWS a JSON-lines file of instruction, context, response and
category. By default both are those in the package. The fast version of this is `FedSALoRA` in
`src/fedloom/methods/fedsa.py`: `fedloom run` with `method.name = "fedsa-lora"`.
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
CLIENTS_PER_ROUND, RANK, LEARNING_RATE, SEED = 5, 8, 3e-3, 1


def averaged(uploads: list[dict[str, Tensor]], num_rows: list[int]) -> dict[str, Tensor]:
    """Return the mean of every A, with p_k = n_k / Σ n."""
    shares = [count / sum(num_rows) for count in num_rows]
    return {name: sum(p * upload[name] for p, upload in zip(shares, uploads, strict=True)) for name in uploads[0]}


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
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]))
    factors = {name: factor for name, factor in model.named_parameters() if factor.requires_grad}

    # the shared A, random; every client's own B, zero
    shared = {name: torch.zeros_like(factor) for name, factor in factors.items() if "lora_A" in name}
    for factor in shared.values():
        factor.uniform_(-(factor.shape[1] ** -0.5), factor.shape[1] ** -0.5, generator=draw)
    own = [{n: torch.zeros_like(f) for n, f in factors.items() if "lora_B" in n} for _ in clients]

    losses = [loss_on(base, held_out).item()]
    for number in range(1, NUM_ROUNDS + 1):
        uploads, num_rows, chosen = [], [], torch.randperm(NUM_CLIENTS, generator=draw)[:CLIENTS_PER_ROUND].tolist()
        for client in chosen:
            for name, factor in factors.items():
                factor.data.copy_((shared | own[client])[name])
            optimiser = torch.optim.AdamW(factors.values(), lr=LEARNING_RATE, weight_decay=0.0)
            for _ in range(LOCAL_STEPS):
                batch = torch.randperm(len(clients[client]), generator=draw)[:BATCH_SIZE].tolist()
                loss_on(model, [clients[client][row] for row in batch]).backward()
                optimiser.step()
                optimiser.zero_grad()
            own[client] = {name: factors[name].detach().clone() for name in own[client]}
            uploads.append({name: factors[name].detach().clone() for name in shared})
            num_rows.append(len(clients[client]))

        shared = averaged(uploads, num_rows)

        scores = []
        for client in chosen:
            for name, factor in factors.items():
                factor.data.copy_((shared | own[client])[name])
            scores.append(loss_on(model, held_out).item())
        losses.append(sum(scores) / len(scores))
        print(f"round {number}: mean held-out loss {losses[-1]:.4f} nats (base {losses[0]:.4f})")
    return losses


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(embedded.model_path()), str(embedded.data_path())]))
