"""Answer MMLU with shared prefixes computed once, against every choice from scratch; or answer all of it.

    python benchmarks/multiple_choice.py MODEL --mmlu FOLDER [--subjects 3] [--questions 24] [--shots 5]
    python benchmarks/multiple_choice.py MODEL --mmlu FOLDER --all

MODEL is a folder or hub name, FOLDER holds test/ and dev/. From scratch means one row per choice, prompt included,
packed without padding (no straw man: it is how fedloom scores rows everywhere else). Both sides take the same tokens,
in turn; the largest difference in nats is printed. Prints the median of ratios by way of answering.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedloom.evaluation.choice import shared_prefix
from fedloom.evaluation.choice.multiple_choice import answer_questions, tokenised_groups
from fedloom.evaluation.choice.question_prompts import Answering
from fedloom.evaluation.choice.questions import Question, read_mmlu
from fedloom.models.load import Base, load_base


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def compare(base: Base, questions: list[Question], examples: list[Question], answering: Answering, shots: int) -> None:
    """Time both ways on groups of questions and print the median ratio."""
    groups = tokenised_groups(base.model, base.tokenizer, questions, examples, shots=shots, answering=answering)
    ratios, worst = [], 0.0
    for queries in groups:
        found = shared_prefix.continuation_nats(base.model, queries, token_budget=8192)
        again = shared_prefix.nats_from_scratch(base.model, queries, token_budget=8192)
        worst = max(worst, *(float(abs(a - b).max()) for a, b in zip(found, again, strict=True)))
        shared_s = seconds(partial(shared_prefix.continuation_nats, base.model, queries, token_budget=8192))
        scratch_s = seconds(partial(shared_prefix.nats_from_scratch, base.model, queries, token_budget=8192))
        ratios.append(scratch_s / shared_s)
        print(
            f"  {len(queries)} questions, {len(shared_prefix.shared_prefix(queries))} shared tokens: "
            f"{shared_s:.2f} s against {scratch_s:.2f} s, {ratios[-1]:.1f}x",
            flush=True,
        )
    print(f"{answering}: median {statistics.median(ratios):.1f}x, largest difference {worst:.1e} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mmlu", type=Path, required=True)
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--answering", choices=list(Answering), default=Answering.LETTER)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    base = load_base(options.model)
    questions, examples = read_mmlu(options.mmlu), read_mmlu(options.mmlu, "dev")
    if options.all:
        how = {"shots": options.shots, "answering": options.answering}
        found = answer_questions(base.model, base.tokenizer, questions, examples, **how)
        print(
            f"{options.answering}: micro {found.micro}, macro {found.macro}, chance {found.chance}, shuffled "
            f"{found.shuffled:.4f}\n{found.mean_shots:.2f} shots each, {found.num_with_fewer_shots} with fewer, "
            f"{found.num_truncated} truncated, {found.seconds:.0f} s"
        )
        return
    subjects = list(dict.fromkeys(question.subject for question in questions))
    chosen = subjects[:: len(subjects) // options.subjects][: options.subjects]
    few = [q for subject in chosen for q in [q for q in questions if q.subject == subject][: options.questions]]
    for answering in Answering:
        compare(base, few, examples, answering, options.shots)


if __name__ == "__main__":
    main()
