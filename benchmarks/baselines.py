"""The loops that others offer, which ``round.py`` and ``device.py`` time beside fedloom.

All train the same adapters from the same start on the same batches of real rows (loss on the answer), with AdamW and
clipping, over one base in memory. No copies, no tokenising inside the timed part. `peft` and `parts` are lean loops:
`peft` injected once per client, SDPA attention, fused AdamW.

* ``peft`` pads a batch to its longest row and takes the model's own loss;
* ``parts`` is the best loop from parts that others ship: transformers' packing (one row, positions that restart, which
  its mask keeps apart) and its ``logits_to_keep``, by which logits are computed only in front of a label;
* ``trl`` is TRL's ``SFTTrainer`` over the same rows, padded; ``trl-packed`` the same with its ``padding_free``. Timed
  is ``train()`` alone: what it takes to make a trainer for each client is :attr:`Side.setup_cpu_seconds`.

TRL is no requirement of fedloom. Where it is missing its sides say so; `pip install --no-deps trl` is enough beside
fedloom's own requirements (measured with 1.16.0), also into another folder (`--target`) that PYTHONPATH names.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from fedloom.data.batches import batches
from fedloom.data.tokenizer import load_tokenizer
from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.models.families import resolve_targets
from fedloom.seeding import stream
from fedloom.training.cohort_round import LocalTraining

SCALE = 2.0
SEED = 1
LossOf = Callable[[Any, list[Any]], tuple[torch.Tensor, int]]
"""A baseline's mean loss of some rows, and its number of targets."""


@dataclass(frozen=True)
class Work:
    """What both sides do in a round."""

    rows: list[TokenSet]
    ranks: list[int]
    training: LocalTraining


@dataclass(frozen=True)
class Side:
    """What a side did: seconds on the wall and on the CPU, and the clients' losses, which must agree.

    ``setup_cpu_seconds`` is what a side needs before each round of training that is not counted in the others.
    """

    seconds: float
    cpu_seconds: float
    losses: list[float]
    setup_cpu_seconds: float = 0.0


class Clock:
    """Time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def side(self, losses: list[float]) -> Side:
        return Side(time.perf_counter() - self._wall, time.process_time() - self._cpu, losses)


def run_peft(model: Any, work: Work, loss_of: LossOf | None = None) -> Side:
    names = resolve_targets(model)
    lora = LoRAModel(model, names)
    shapes = lora.shapes
    lora.unwrap()
    clock = Clock()
    losses = [
        _train_with_peft(model, work, k, start_of(shapes, rank, k), loss_of or _padded_loss)
        for k, rank in enumerate(work.ranks)
    ]
    return clock.side(losses)


def run_parts(model: Any, work: Work) -> Side:
    return run_peft(model, work, _packed_loss)


def start_of(shapes: dict[str, tuple[int, int]], rank: int, client: int) -> Adapter:
    return fresh_adapter(shapes, rank, SEED, 1, client)


def run_trl(model: Any, work: Work, *, packed: bool = False) -> Side:
    """Train every client by TRL's SFTTrainer; the time is that of its ``train()``."""
    names = resolve_targets(model)
    lora = LoRAModel(model, names)
    starts = [start_of(lora.shapes, rank, k) for k, rank in enumerate(work.ranks)]
    lora.unwrap()
    own = copy.deepcopy(model)  # TRL changes the model's forward, its settings and its mode
    for module in own.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the other sides train in evaluation mode
    sides = [_train_with_trl(own, work, client, start, packed) for client, start in enumerate(starts)]
    return Side(
        sum(side.seconds for side in sides),
        sum(side.cpu_seconds for side in sides),
        [loss for side in sides for loss in side.losses],
        sum(side.setup_cpu_seconds for side in sides),
    )


def run_trl_packed(model: Any, work: Work) -> Side:
    """Train every client by TRL's SFTTrainer, a batch being one row."""
    return run_trl(model, work, packed=True)


def _lora_config(rank: int, start: Adapter) -> Any:
    from peft import LoraConfig

    targets = {name.rpartition(".")[2] for name in start}
    return LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=sorted(targets), task_type="CAUSAL_LM")


def _load_start(peft_model: Any, start: Adapter) -> None:
    for name, pair in start.items():
        peft_model.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(pair.a_RI)


def _train_with_trl(base: Any, work: Work, client: int, start: Adapter, packed: bool) -> Side:
    """Train one client on its batches, in their order."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise SystemExit("trl: expected the library trl, it is not installed; pip install --no-deps trl") from None
    rows, training = work.rows[client], work.training
    rng = stream(SEED, "batches", 1, client)
    order = list(batches(len(rows), training.batch_size, rng, steps=training.steps))
    if {len(indices) for indices in order} != {training.batch_size}:
        raise SystemExit("trl: expected batches of one size, the last is smaller; take fewer steps or smaller batches")
    losses: list[tuple[torch.Tensor, int]] = []

    class Trainer(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer that keeps every step's loss."""

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            count = int((inputs["labels"][:, 1:] >= 0).sum())
            loss = super().compute_loss(model, inputs, *arguments, **named)
            losses.append((loss.detach(), count))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            use_cpu=base.device.type == "cpu",
            max_steps=training.steps,
            per_device_train_batch_size=training.batch_size,
            train_sampling_strategy="sequential",
            padding_free=packed,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=training.max_grad_norm,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        data = Dataset.from_list([_trl_row(*rows.row(int(index))) for indices in order for index in indices])
        setup = Clock()
        trainer = Trainer(
            base,
            settings,
            train_dataset=data,
            processing_class=load_tokenizer("bytes"),  # of which nothing but an id to pad with is used
            peft_config=_lora_config(work.ranks[client], start),
        )
        _load_start(trainer.model, start)
        took = setup.side([])
        clock = Clock()
        trainer.train()
        count = sum(targets for _, targets in losses)
        side = clock.side([sum(float(loss) * targets for loss, targets in losses) / count])
    vars(trainer.model.unload()).pop("forward", None)
    return replace(side, setup_cpu_seconds=took.cpu_seconds)


def _trl_row(ids: Any, supervised: Any) -> dict[str, list[int]]:
    labels = np.where(supervised, ids, -100)
    labels[:1] = -100  # nothing stands in front of a row's first token
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def _train_with_peft(base: Any, work: Work, client: int, start: Adapter, loss_of: LossOf) -> float:
    """Train one client and return its mean loss over the round."""
    from peft import get_peft_model

    training = work.training
    model: Any = get_peft_model(base, _lora_config(work.ranks[client], start))
    _load_start(model, start)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0, fused=True)
    rng = stream(SEED, "batches", 1, client)
    total, count = 0.0, 0
    for indices in batches(len(work.rows[client]), training.batch_size, rng, steps=training.steps):
        loss, num_targets = loss_of(model, [work.rows[client].row(int(i)) for i in indices])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
        total, count = total + float(loss.detach()) * num_targets, count + num_targets
    model.unload()
    return total / count


def _padded_loss(model: Any, rows: list[Any]) -> tuple[torch.Tensor, int]:
    longest = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, -100)
    seen_BT = torch.zeros_like(ids_BT)
    for i, (ids, supervised) in enumerate(rows):
        row = torch.from_numpy(ids.astype(np.int64))
        ids_BT[i, : len(ids)], seen_BT[i, : len(ids)] = row, 1
        labels_BT[i, : len(ids)] = torch.where(torch.from_numpy(supervised.copy()), row, -100)
    inputs = {"input_ids": ids_BT, "attention_mask": seen_BT, "labels": labels_BT}
    loss = model(**{name: held.to(model.device) for name, held in inputs.items()}, use_cache=False).loss
    return loss, int((labels_BT[:, 1:] >= 0).sum())


def _packed_loss(model: Any, rows: list[Any]) -> tuple[torch.Tensor, int]:
    ids_T = torch.from_numpy(np.concatenate([ids for ids, _ in rows]).astype(np.int64))
    positions_T = torch.cat([torch.arange(len(ids)) for ids, _ in rows])
    learned_T = torch.from_numpy(np.concatenate([supervised for _, supervised in rows])) & (positions_T > 0)
    (target_S,) = learned_T.nonzero(as_tuple=True)
    ids_T, positions_T, target_S = (t.to(model.device) for t in (ids_T, positions_T, target_S))
    outputs = model(input_ids=ids_T[None], position_ids=positions_T[None], logits_to_keep=target_S - 1, use_cache=False)
    return cross_entropy(outputs.logits[0].float(), ids_T[target_S]), len(target_S)
