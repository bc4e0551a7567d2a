"""Standalone tuning in one page: the control in which each client trains alone.

    python examples/standalone.py [BASE ROWS]

BASE is the folder of a model with q_proj and v_proj, ROWS a JSON-lines file of instruction, context, response and
category. By default both are those in the package. The fast version of this is `Standalone` in
`src/fedloom/methods/standalone.py`: `fedloom run` with `method.name = "standalone"`.
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
RANK, LEARNING_RATE, SEED = 8, 3e-3, 1


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
    """Train one model per client on its own rows; return the base's held-out loss and the mean of the clients'."""
    rows = tokenised(rows_path, base_path)
    held_out, rows = rows[::40], [row for position, row in enumerate(rows) if position % 40]
    size = len(rows) // NUM_CLIENTS
    clients = [rows[k * size : (k + 1) * size] for k in range(NUM_CLIENTS)]
    draw = torch.Generator().manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    base_loss = loss_on(base, held_out).item()

    client_losses = []
    for client in range(NUM_CLIENTS):
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]))
        factors = {name: factor for name, factor in model.named_parameters() if factor.requires_grad}
        for name, factor in factors.items():
            if "lora_A" in name:
                factor.data.uniform_(-(factor.shape[1] ** -0.5), factor.shape[1] ** -0.5, generator=draw)
        optimiser = torch.optim.AdamW(factors.values(), lr=LEARNING_RATE, weight_decay=0.0)
        for _ in range(NUM_ROUNDS * LOCAL_STEPS):
            chosen = torch.randperm(len(clients[client]), generator=draw)[:BATCH_SIZE].tolist()
            loss_on(model, [clients[client][row] for row in chosen]).backward()
            optimiser.step()
            optimiser.zero_grad()
        client_losses.append(loss_on(model, held_out).item())
        base = model.unload()
        print(f"client {client}: held-out loss {client_losses[-1]:.4f} nats (base {base_loss:.4f})")

    mean = sum(client_losses) / NUM_CLIENTS
    print(f"mean of the clients: {mean:.4f} nats")
    return [base_loss, mean]


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(embedded.model_path()), str(embedded.data_path())]))
