"""FLoRA in one page: fresh adapters of any ranks, stacked, merged (arXiv 2409.05976, Algorithm 1).

    python examples/flora.py [BASE ROWS]

BASE is the folder of a model with q_proj and v_proj, ROWS a JSON-lines file of instruction, context, response and
category. By default both are those in the package. The fast version of this is `FLoRA` in
`src/fedloom/methods/flora.py`, which keeps the stack next to the base instead of merging it: `fedloom run` with
`method.name = "flora"`.
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


def stacked(uploads: list[tuple[Tensor, Tensor]], num_rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return B = [B_1 ... B_K] and A = [p_1 A_1; ...; p_K A_K], whose product is Σ p_k B_k A_k."""
    shares = [count / sum(num_rows) for count in num_rows]
    b = torch.cat([b for b, _ in uploads], dim=1)
    return b, torch.cat([p * a for p, (_, a) in zip(shares, uploads, strict=True)], dim=0)


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

    for number in range(1, NUM_ROUNDS + 1):
        uploads = []
        for client, rank in enumerate(RANKS):
            # a fresh adapter beside the model as it is now: A random, B zero
            lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
            model = get_peft_model(base, lora)
            factors = {name: factor for name, factor in model.named_parameters() if factor.requires_grad}
            for name, factor in factors.items():
                if "lora_A" in name:
                    factor.data.uniform_(-(factor.shape[1] ** -0.5), factor.shape[1] ** -0.5, generator=draw)
            optimiser = torch.optim.AdamW(factors.values(), lr=LEARNING_RATE, weight_decay=0.0)
            for _ in range(LOCAL_STEPS):
                chosen = torch.randperm(len(clients[client]), generator=draw)[:BATCH_SIZE].tolist()
                loss_on(model, [clients[client][row] for row in chosen]).backward()
                optimiser.step()
                optimiser.zero_grad()

            # what is sent: the scale alpha / r = 2 goes with B
            modules = sorted({name.split(".lora_")[0] for name in factors})
            sent = {
                module.removeprefix("base_model.model."): (
                    2.0 * factors[f"{module}.lora_B.default.weight"].detach(),
                    factors[f"{module}.lora_A.default.weight"].detach(),
                )
                for module in modules
            }
            uploads.append(sent)
            base = model.unload()

        # the stack goes to every client, which adds it to its model
        for module in uploads[0]:
            b, a = stacked([sent[module] for sent in uploads], [len(rows) for rows in clients])
            base.get_submodule(module).weight.data += b @ a

        losses.append(loss_on(base, held_out).item())
        print(f"round {number}: held-out loss {losses[-1]:.4f} nats (base {losses[0]:.4f})")
    return losses


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(embedded.model_path()), str(embedded.data_path())]))
