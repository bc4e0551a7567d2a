"""Time split training against unsplit training, count its bytes against the release's, and hide a link's delay.

    FEDLOOM_DATA=../shared/data python benchmarks/split.py
    FEDLOOM_DATA=../shared/data python benchmarks/split.py --repeats 9 --steps 6 --cut-layer 3

Real E2E rows, stories3M (6 blocks), LoRA of rank 8 on q and v, AdamW, bf16 on the wire. Four statements:

* one client's split step costs at most 1.05 times the unsplit step on the same rows (`train_cohort`, fp32);
* three clients joint cost less than three times one;
* bytes of a step against the paper's release: rows padded to 512 tokens, fp32, keys and values of the client's blocks
  shipped too; for stories3M as run here, and for GPT-2 small's widths with GPT-2's tokenizer, batch 4, 3 blocks;
* two micro-batches in flight hide at least half of a simulated link delay. Time is virtual here: CPU seconds of this
  process, plus what a message that is under way makes its receiver wait; both sides share one processor, so only
  waiting can be hidden.

Sides run in turn in one process; reported are medians of paired ratios of CPU time.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import cut_parties
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.models.families import resolve_targets
from fedloom.split.codecs import encode
from fedloom.split.cut_messages import SplitMessage
from fedloom.split.parties import SplitParties
from fedloom.split.period import Period
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort

RELEASE_TOKENS = 512
RANK, SCALE, SEED = 8, 2.0, 1


def e2e_rows(folder: Path, tokenizer: Any, num_rows: int) -> TokenSet:
    """Read rows of E2E with the loss on the text."""
    with (folder / "e2e" / "trainset.csv").open(encoding="utf-8") as file:
        records = list(csv.DictReader(file))[:num_rows]
    rows = []
    for record in records:
        asked = tokenizer(record["mr"] + " =>")["input_ids"]
        told = [*tokenizer(" " + record["ref"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id or 0]
        rows.append((asked + told, [False] * len(asked) + [True] * len(told)))
    return TokenSet.from_rows(rows)


def parties_of(
    folder: Path, rows: Sequence[TokenSet], cut_layer: int, training: LocalTraining, **changes: Any
) -> SplitParties:
    """Set up a split run of as many clients as there are sets of rows, on a model of its own."""
    return cut_parties(adapted_model(folder), rows, cut_layer, training, rank=RANK, seed=SEED, **changes)


def adapted_model(folder: Path) -> LoRAModel:
    """Load stories3M with room for adapters on q and v."""
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / "stories3M").eval()
    return LoRAModel(model, resolve_targets(model))


def cpu_seconds(period: Period, steps: range) -> float:
    """Time split steps."""
    begun = time.process_time()
    for step in steps:
        period.step(step)
    return time.process_time() - begun


def unsplit_seconds(lora: LoRAModel, rows: TokenSet, training: LocalTraining, round: int) -> float:
    """Time as many unsplit steps."""
    start = fresh_adapter(lora.shapes, RANK, SEED)
    begun = time.process_time()
    train_cohort(lora, [ClientTask(0, rows, RANK, SCALE, start)], training, seed=SEED, round=round)
    return time.process_time() - begun


def compare_speed(
    folder: Path, rows: Sequence[TokenSet], cut_layer: int, batch_size: int, steps: int, repeats: int
) -> None:
    """Report the first two statements."""
    training = LocalTraining(learning_rate=1e-3, batch_size=batch_size, steps=steps)
    lora = adapted_model(folder)
    one = parties_of(folder, rows[:1], cut_layer, training)
    three = parties_of(folder, rows, cut_layer, training)
    alone, together = Period(one, one.initial()), Period(three, three.initial())
    to_unsplit, to_three = [], []
    for turn in range(repeats + 1):
        span = range(turn * steps, (turn + 1) * steps)
        whole = unsplit_seconds(lora, rows[0], training, turn + 1)
        split, joint = cpu_seconds(alone, span), cpu_seconds(together, span)
        if turn:
            to_unsplit.append(split / whole)
            to_three.append(joint / (3 * split))
    print(f"split / unsplit step, one client, batch {batch_size}: {spread(to_unsplit)} (at most 1.05 wanted)")
    print(f"three clients joint / three times one:  {spread(to_three)} (below 1 wanted)")


def spread(ratios: Sequence[float]) -> str:
    """Write a median with its range."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs)"


def compare_bytes(folder: Path, rows: TokenSet, cut_layer: int) -> None:
    """Report the third statement, for one client's mean step of four rows."""
    gpt2 = AutoTokenizer.from_pretrained(folder / "tokenizers" / "gpt2")
    shapes = [
        ("stories3M", rows, 192, 64, cut_layer),
        ("GPT-2 small", e2e_rows(folder, gpt2, len(rows)), 768, 768, 3),
    ]
    for name, own, width, key_width, blocks in shapes:
        ours = statistics.mean(step_bytes(own.select(range(i, i + 4)), width) for i in range(0, len(own) - 4, 4))
        activations = 4 * RELEASE_TOKENS * width * 4
        release = 2 * activations + 2 * blocks * 4 * RELEASE_TOKENS * key_width * 4
        print(
            f"bytes of a step of 4 rows, {name}: ours {ours:,.0f}, the release's {release:,}: 1/{release / ours:.1f} "
            f"(without keys and values 1/{2 * activations / ours:.1f}; 1/12 wanted)"
        )


def step_bytes(rows: TokenSet, width: int) -> int:
    """Return what our messages of a step weigh, both ways."""
    matrix = encode(torch.zeros(rows.num_tokens, width), "bf16")
    lengths = torch.from_numpy(rows.lengths).int()
    labels = torch.zeros(rows.num_loss_tokens, dtype=torch.int32)
    up = SplitMessage("activations", 0, 1, 0, matrix, rows.num_loss_tokens, 0.0, lengths, labels, labels)
    return up.num_bytes + SplitMessage("gradients", 0, 1, 0, matrix, loss_nats=123.456).num_bytes


class Virtual:
    """CPU seconds of this process plus the seconds waited, without waiting."""

    def __init__(self) -> None:
        self.waited = 0.0

    def now(self) -> float:
        return time.process_time() + self.waited

    def wait_until(self, moment: float) -> None:
        self.waited += max(0.0, moment - self.now())


class DelayedClients:
    """Clients behind a link: every message arrives ``delay`` seconds after it was sent."""

    def __init__(self, clients: Any, delay: float, clock: Virtual) -> None:
        self._clients, self._delay, self._clock = clients, delay, clock
        self._arrives: dict[tuple[int, int], float] = {}
        self._under_way: list[tuple[float, Sequence[SplitMessage]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clients, name)

    def request(self, step: int, micro_batch: int, rows: Any) -> None:
        self._clients.request(step, micro_batch, rows)
        self._arrives[step, micro_batch] = self._clock.now() + self._delay

    def activations(self, step: int, micro_batch: int) -> Iterator[Any]:
        self._deliver(self._clock.now())
        self._clock.wait_until(self._arrives.pop((step, micro_batch)))
        return self._clients.activations(step, micro_batch)

    def gradients(self, messages: Sequence[SplitMessage]) -> None:
        self._under_way.append((self._clock.now() + self._delay, messages))

    def finish(self, step: int, clients: Sequence[int]) -> Any:
        for arrival, _ in list(self._under_way):
            self._clock.wait_until(arrival)
            self._deliver(arrival)
        return self._clients.finish(step, clients)

    def _deliver(self, moment: float) -> None:
        while self._under_way and self._under_way[0][0] <= moment:
            self._clients.gradients(self._under_way.pop(0)[1])


def compare_overlap(folder: Path, rows: Sequence[TokenSet], cut_layer: int, steps: int, repeats: int) -> None:
    """Report the fourth statement, for a delay of a tenth, a quarter and half of a step's work."""
    training = LocalTraining(learning_rate=1e-3, batch_size=16)
    parties = {m: parties_of(folder, rows, cut_layer, training, micro_batches=m) for m in (1, 2)}
    work = seconds_behind(parties[2], 0.0, range(steps)) / steps
    for share in (0.1, 0.25, 0.5):
        hidden = []
        for turn in range(repeats):
            span = range(steps * turn, steps * (turn + 1))
            delay = share * work / 2
            waits = {m: waited_behind(parties[m], delay, span) / steps for m in parties}
            hidden.append(1 - waits[2] / waits[1])
        print(f"delay of {share:.0%} of a step's {work:.3f} s: {statistics.median(hidden):.0%} hidden (half wanted)")


def seconds_behind(parties: SplitParties, delay: float, steps: range) -> float:
    """Return the virtual seconds of steps behind a link."""
    clock = Virtual()
    period = Period(replace(parties, clients=DelayedClients(parties.clients, delay, clock)), parties.initial())
    begun = clock.now()
    for step in steps:
        period.step(step)
    return clock.now() - begun


def waited_behind(parties: SplitParties, delay: float, steps: range) -> float:
    """Return the virtual seconds that were spent waiting for messages."""
    clock = Virtual()
    period = Period(replace(parties, clients=DelayedClients(parties.clients, delay, clock)), parties.initial())
    for step in steps:
        period.step(step)
    return clock.waited


def main() -> None:
    """Run all four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cut-layer", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(os.environ.get("FEDLOOM_DATA", "../shared/data"))
    rows = e2e_rows(folder, AutoTokenizer.from_pretrained(folder / "models" / "stories3M"), 600)
    shares = [rows.select(range(k, 600, 3)) for k in range(3)]
    compare_bytes(folder, rows, options.cut_layer)
    for batch_size in (4, 16):
        compare_speed(folder, shares, options.cut_layer, batch_size, options.steps, options.repeats)
    compare_overlap(folder, shares, options.cut_layer, options.steps, options.repeats)


if __name__ == "__main__":
    main()
