"""SplitLoRA in one page: the model is cut between clients and server (arXiv 2407.00952, Algorithm 1).

    python examples/splitlora.py [BASE ROWS]

BASE is the folder of a Llama-like model with q_proj and v_proj, ROWS a JSON-lines file of instruction, context,
response and category. By default both are those in the package. The fast version of this is `run_split` in
`src/fedloom/split/lockstep.py`, which cuts other families too and packs instead of padding: `fedloom run` with
`method.name = "splitlora"`.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom import embedded

NUM_CLIENTS, NUM_PERIODS, AGGREGATE_EVERY, BATCH_SIZE, CUT_LAYER = 3, 3, 10, 8, 1
RANK, LEARNING_RATE, SEED = 8, 3e-3, 1


def averaged(uploads: list[dict[str, Tensor]], num_rows: list[int]) -> dict[str, Tensor]:
    """Return Σ p_k B_k and Σ p_k A_k of every module, with p_k = n_k / Σ n."""
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


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Return ids and labels; padding comes last, where a causal model cannot see it."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])


def half(base: nn.Module, blocks: slice, draw: torch.Generator) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a copy of the base with some of its blocks and fresh adapters in them, and the adapters' factors."""
    part = copy.deepcopy(base)
    part.model.layers = part.model.layers[blocks]
    if blocks.stop is not None:
        part.model.norm = nn.Identity()
    part = get_peft_model(part, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]))
    factors = {name: factor for name, factor in part.named_parameters() if factor.requires_grad}
    for name, factor in factors.items():
        if "lora_A" in name:
            factor.data.uniform_(-(factor.shape[1] ** -0.5), factor.shape[1] ** -0.5, generator=draw)
    return part.base_model.model, factors


def server_step(
    server: nn.Module, activations: list[Tensor], labels: list[Tensor], optimiser: torch.optim.Optimizer
) -> list[Tensor]:
    """Step on Σ_k w_k ℓ_k, with w_k the clients' shares of the labels, and return every ∂ℓ_k / ∂H_k."""
    counts = [int((label[:, 1:] != -100).sum()) for label in labels]
    gradients = []
    for hidden, label, count in zip(activations, labels, counts, strict=True):
        received, weight = hidden.detach().requires_grad_(), count / sum(counts)
        (weight * server(inputs_embeds=received, labels=label, use_cache=False).loss).backward()
        gradients.append(received.grad / weight)
    optimiser.step()
    optimiser.zero_grad()
    return gradients


@torch.no_grad()
def loss_of(client: nn.Module, server: nn.Module, rows: list[tuple[list[int], list[int]]]) -> float:
    """Return the mean loss of both halves together over the rows' answers."""
    ids, labels = padded(rows)
    hidden = client.model(input_ids=ids, use_cache=False).last_hidden_state
    return server(inputs_embeds=hidden, labels=labels, use_cache=False).loss.item()


def main(base_path: str, rows_path: str) -> list[float]:
    """Run every aggregation period and return the held-out losses, the base's first."""
    rows = tokenised(rows_path, base_path)
    held_out, rows = rows[::40], [row for position, row in enumerate(rows) if position % 40]
    shares = [rows[k::NUM_CLIENTS] for k in range(NUM_CLIENTS)]
    draw = torch.Generator().manual_seed(SEED)

    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()
    server, server_factors = half(base, slice(CUT_LAYER, None), draw)
    halves = [half(base, slice(0, CUT_LAYER), draw) for _ in range(NUM_CLIENTS)]
    server_optimiser = torch.optim.AdamW(server_factors.values(), lr=LEARNING_RATE, weight_decay=0.0)
    optimisers = [torch.optim.AdamW(f.values(), lr=LEARNING_RATE, weight_decay=0.0) for _, f in halves]

    adapter = {name: factor.detach().clone() for name, factor in halves[0][1].items()}
    losses = [loss_of(halves[0][0], server, held_out)]
    for period in range(1, NUM_PERIODS + 1):
        for _, factors in halves:
            for name, factor in factors.items():
                factor.data.copy_(adapter[name])

        for _ in range(AGGREGATE_EVERY):
            # clients forward, activations and labels up
            activations, labels = [], []
            for (client, _), own in zip(halves, shares, strict=True):
                chosen = torch.randperm(len(own), generator=draw)[:BATCH_SIZE].tolist()
                ids, label = padded([own[row] for row in chosen])
                activations.append(client.model(input_ids=ids, use_cache=False).last_hidden_state)
                labels.append(label)
            # the server's step, gradients down
            gradients = server_step(server, activations, labels, server_optimiser)
            # clients backward and step
            for hidden, gradient, optimiser in zip(activations, gradients, optimisers, strict=True):
                hidden.backward(gradient)
                optimiser.step()
                optimiser.zero_grad()

        uploads = [{name: factor.detach().clone() for name, factor in factors.items()} for _, factors in halves]
        adapter = averaged(uploads, [len(own) for own in shares])

        for name, factor in halves[0][1].items():
            factor.data.copy_(adapter[name])
        losses.append(loss_of(halves[0][0], server, held_out))
        print(f"period {period}: held-out loss {losses[-1]:.4f} nats (base {losses[0]:.4f})")
    return losses


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(embedded.model_path()), str(embedded.data_path())]))
