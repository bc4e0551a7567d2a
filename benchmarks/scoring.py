"""Score 630 outputs against E2E's 4,693 references, and print the systems' scores beside the official ones.

    python benchmarks/scoring.py --data FOLDER [--systems 8] [--repeats 3] [--resamples 1000]

FOLDER holds testset_w_refs.csv and system_outputs/ with official_scores.tsv. Times are CPU seconds of this process and
its children, which other work on the machine disturbs little. The baseline is the COCO caption code the official scorer
runs for ROUGE_L and CIDEr (the pycocoevalcap package: Java tokeniser, Python metrics) on the same texts, in turn with
ours; METEOR is the same Java program on both sides and is timed apart.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from fedloom.evaluation.e2e.e2e_files import matched_texts, read_outputs, read_references
from fedloom.evaluation.e2e.scorer import METRICS, Scores, available_metrics, score_e2e


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return user and system time of one call, children included."""
    before = sum(os.times()[:4])
    work()
    return sum(os.times()[:4]) - before


def caption_code(references: Sequence[Sequence[str]], outputs: Sequence[str]) -> None:
    """Compute ROUGE_L and CIDEr as the official scorer does."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    truth = {i: [{"caption": text} for text in texts] for i, texts in enumerate(references)}
    found = {i: [{"caption": output}] for i, output in enumerate(outputs)}
    truth, found = PTBTokenizer().tokenize(truth), PTBTokenizer().tokenize(found)
    Rouge().compute_score(truth, found)
    Cider().compute_score(truth, found)


def table_row(name: str, scores: Scores, official: dict[str, str]) -> str:
    """Return one row: ours and the official figure for each metric."""
    cells = [f"{scores.estimates[m].value:.4f} / {official[m]}" if m in scores.estimates else "—" for m in METRICS]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--systems", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args()
    references = read_references(options.data / "testset_w_refs.csv")
    with (options.data / "system_outputs" / "official_scores.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[: options.systems]
    print(f"{len(references)} items, {references.num_texts:,} references; ours / official")
    print("| system | " + " | ".join(METRICS) + " |\n|---|" + "---|" * len(METRICS))
    outputs: tuple[str, ...] = ()
    for row in rows:
        outputs = matched_texts(references, read_outputs(options.data / "system_outputs" / row["file"]))
        print(table_row(Path(row["file"]).stem, score_e2e(references.texts, outputs, resamples=2), row), flush=True)
    python_metrics = [name for name in METRICS if name != "METEOR"]
    pairs = {"four metrics": (python_metrics, options.resamples), "ROUGE_L and CIDEr": (["ROUGE_L", "CIDEr"], 1)}
    has_caption_code = find_spec("pycocoevalcap") is not None
    times: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for label, (metrics, resamples) in pairs.items():
            ours = partial(score_e2e, references.texts, outputs, metrics=metrics, resamples=resamples)
            found = cpu_seconds(ours)
            times.setdefault(f"ours, {label}, {resamples} resamples", []).append(found)
        if has_caption_code:
            found = cpu_seconds(lambda: caption_code(references.texts, outputs))
            times.setdefault("caption code, ROUGE_L and CIDEr", []).append(found)
    if "METEOR" in available_metrics()[0]:
        times["METEOR's program"] = [
            cpu_seconds(lambda: score_e2e(references.texts, outputs, metrics=["METEOR"], resamples=1))
        ]
    for label, values in times.items():
        print(f"{label}: {statistics.median(values):.2f} CPU s")


if __name__ == "__main__":
    main()
