"""Make the embedded data and model: write the text, learn the tokenizer, pretrain the base, measure it, write the card.

python scripts/make_embedded.py                   # everything, minutes on two cores
python scripts/make_embedded.py --only data       # the data files alone, seconds
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

from embedded import corpus

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_FOLDER = Path(__file__).parents[1] / "src" / "fedloom" / "embedded"
NUM_INSTRUCTIONS, NUM_SENTENCES = 40_000, 40_000


def main() -> None:
    """Parse the arguments and make what they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["data"], help="make this part alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="more are faster; other weights")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_data(arguments.out, arguments.seed)
    if arguments.only is None:
        make_model(arguments.out, arguments.seed, arguments.threads)


def make_data(folder: Path, seed: int) -> None:
    """Write ``train.jsonl`` and ``eval.jsonl``."""
    train, held_out = corpus.shipped_rows(seed)
    corpus.write_rows(folder / "train.jsonl", train)
    corpus.write_rows(folder / "eval.jsonl", held_out)


def make_model(folder: Path, seed: int, threads: int) -> None:
    """Pretrain the base into ``model/`` (bf16 weights) and write the card with what it reached."""
    import torch
    import transformers
    from embedded import card, measure, pretrain, tokenizer
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    train, held_out = corpus.shipped_rows(seed)
    pairs = corpus.instruction_text(NUM_INSTRUCTIONS, seed, held_out)
    pairs += corpus.prose_text(NUM_SENTENCES, seed, held_out)
    words = tokenizer.learn(prompt + answer for prompt, answer in pairs)
    settings = pretrain.Pretraining()
    model = pretrain.fresh_model(pretrain.config(words), seed)
    started = time.perf_counter()
    rows = pretrain.tokenized(words, pairs)
    losses = list(_reported(pretrain.train(model, rows, words.pad_token_id, settings, seed), settings.steps))
    seconds = time.perf_counter() - started
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    stored = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    facts = card.Facts(
        num_parameters=sum(parameter.numel() for parameter in stored.parameters()),
        shape=pretrain.described(stored.config),
        vocabulary=len(words),
        num_train=len(train),
        num_eval=len(held_out),
        command=f"python scripts/make_embedded.py --seed {seed} --threads {threads}",
        seed=seed,
        num_instructions=NUM_INSTRUCTIONS,
        num_sentences=NUM_SENTENCES,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seconds=seconds,
        threads=threads,
        last_loss_nats=sum(losses[-100:]) / 100,
        torch_version=torch.__version__,
        transformers_version=f"{transformers.__version__}, {platform.machine()}",
    )
    told = corpus.retold(seed, held_out)
    finished = {category: measure.scores(stored, words, pairs) for category, pairs in told.items()}
    card.write_card(folder, facts, measure.figures(stored, words, held_out), finished)


def _reported(losses: Iterator[float], num_steps: int) -> Iterator[float]:
    """Pass the losses on and print every hundredth."""
    started = time.perf_counter()
    for step, loss_nats in enumerate(losses, start=1):
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step}/{num_steps}  loss {loss_nats:.3f} nats  {seconds:.0f} s", flush=True)
        yield loss_nats


if __name__ == "__main__":
    main()
