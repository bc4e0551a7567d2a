"""Decode E2E's meaning representations in batches of similar length against one at a time.

    python benchmarks/decoding.py MODEL --references FILE [--items 64] [--batch-size 16] [--beams 10] [--repeats 3]

MODEL is a folder or hub name. Settings are SplitLoRA's (10 beams, length penalty 0.8, no 4-gram twice). Both sides use
the same code and prompts, in turn; outputs are compared. Prints items per second and the median of ratios.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from fedloom.evaluation.decoding import Decoded, DecodingSettings, decode
from fedloom.evaluation.e2e.e2e_files import read_references
from fedloom.models.load import Base, load_base


def run(base: Base, prompts: list[str], settings: DecodingSettings, batch_size: int) -> Decoded:
    """Decode all prompts."""
    return decode(base.model, base.tokenizer, prompts, settings, batch_size=batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    base = load_base(options.model)
    mrs = read_references(options.references).mrs
    prompts = [f"{mr} ||" for mr in mrs[:: max(1, len(mrs) // options.items)][: options.items]]
    settings = DecodingSettings(num_beams=options.beams, max_new_tokens=options.max_new_tokens)
    run(base, prompts[:2], settings, 2)
    ratios, batched_s, alone_s, same = [], [], [], 0
    for _ in range(options.repeats):
        batched, alone = (run(base, prompts, settings, size) for size in (options.batch_size, 1))
        ratios.append(alone.seconds / batched.seconds)
        batched_s.append(batched.seconds)
        alone_s.append(alone.seconds)
        same = sum(one == other for one, other in zip(batched.outputs, alone.outputs, strict=True))
    num = len(prompts)
    per_second = num / statistics.median(batched_s), num / statistics.median(alone_s)
    print(
        f"{num} items on {base.device}: {per_second[0]:.2f} items/s in batches of "
        f"{options.batch_size}, {per_second[1]:.2f} one at a time: {statistics.median(ratios):.2f}x; "
        f"{same} of {num} outputs equal"
    )


if __name__ == "__main__":
    main()
