"""The flat page and the library take the same server step."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from split.split_cases import random_adapter, random_rows, wrapped

from fedloom.lora.layer import Slot
from fedloom.models.cut import part_of
from fedloom.split.split_step import Arrival, ServerHalf, backward_from_labels, run_bottom
from fedloom.training.packing import pack
from fedloom.training.verified_head import output_head


def example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "splitlora.py"
    spec = importlib.util.spec_from_file_location("splitlora_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_flat_page_returns_the_librarys_gradients() -> None:
    page, rows, cut_layer = example(), random_rows(6), 2
    lora = wrapped("llama")
    head = output_head(lora.model)
    lora.open([Slot(3, 2.0)])
    lora.load(0, random_adapter(lora, 3, seed=0))
    lora.route_all(0)
    batches = [pack([rows.row(2 * k), rows.row(2 * k + 1)]) for k in range(3)]
    counts = [len(batch.targets_S) for batch in batches]
    bottom = part_of(lora.model, 0, cut_layer)
    hidden = [run_bottom(bottom, batch).detach() for batch in batches]
    arrivals = [
        Arrival(k, cut_layer, hidden[k], b.lengths, counts[k], counts[k] / sum(counts), b.target_index_S, b.targets_S)
        for k, b in enumerate(batches)
    ]
    done = ServerHalf(lora.model, [cut_layer]).forward(arrivals, wants_gradients=True)
    backward_from_labels(done, head)

    server = copy.deepcopy(lora.model)
    server.model.layers = server.model.layers[cut_layer:]
    padded = [
        torch.nn.utils.rnn.pad_sequence(torch.split(h, b.lengths), batch_first=True)
        for h, b in zip(hidden, batches, strict=True)
    ]
    labels = [
        page.padded([(ids.tolist(), np.where(m, ids, -100).tolist()) for ids, m in map(rows.row, (2 * k, 2 * k + 1))])
        for k in range(3)
    ]
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    gradients = page.server_step(server, padded, [label for _, label in labels], sgd)
    for k, batch in enumerate(batches):
        own = torch.cat([gradients[k][i, :n] for i, n in enumerate(batch.lengths)])
        torch.testing.assert_close(own, done.gradients()[k], rtol=1e-4, atol=1e-6)
