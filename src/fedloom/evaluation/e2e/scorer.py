"""Score E2E outputs as the challenge's official scorer does: BLEU, NIST, METEOR, ROUGE_L and CIDEr.

BLEU and NIST read text through mteval-13a's tokenisation; the others through the Penn Treebank's, without punctuation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedloom.errors import EvaluationError, MissingExtraError
from fedloom.evaluation.e2e.bleu import bleu, bleu_and_nist_statistics, nist
from fedloom.evaluation.e2e.cider import cider_d
from fedloom.evaluation.e2e.meteor import meteor, meteor_command, meteor_statistics
from fedloom.evaluation.e2e.rouge import rouge_l
from fedloom.evaluation.e2e.tokenisers import mteval_words, ptb_words
from fedloom.evaluation.intervals import (
    Estimate,
    ItemStatistics,
    Score,
    Statistics,
    bootstrap,
    ratio,
    ratio_statistics,
)

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
_SCORES: dict[str, Score] = {"BLEU": bleu, "NIST": nist, "METEOR": meteor, "ROUGE_L": ratio, "CIDEr": ratio}


@dataclass(frozen=True)
class Scores:
    """One system's scores, and for each metric that could not be computed the reason why.

    ``items`` holds what each item adds to each metric, for a paired comparison.
    """

    estimates: dict[str, Estimate]
    absent: dict[str, str]
    num_items: int
    num_references: int
    num_empty_outputs: int
    items: Mapping[str, ItemStatistics] = field(repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"{name:8}{estimate}" for name, estimate in self.estimates.items()]
        lines += [f"{name:8}absent: {reason}" for name, reason in self.absent.items()]
        return "\n".join(lines)


def score_e2e(
    references: Sequence[Sequence[str]],
    outputs: Sequence[str],
    *,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Scores:
    """Score one output per item against the item's references, with bootstrap intervals over items.

    The information weights of NIST and the document frequencies of CIDEr belong to the reference file and stay fixed
    while items are resampled. ``metrics=None`` means every metric this machine can compute, and says which it cannot.

    Raises:
        EvaluationError: outputs and references do not match, everything is empty, or a metric is unknown.
        MissingExtraError: METEOR was asked for by name and cannot run.
    """
    names, absent = (metrics, {}) if metrics is not None else available_metrics()
    statistics, meteor_value = _statistics(references, outputs, names)
    estimates = {
        name: bootstrap(statistics[name], _SCORES[name], seed=seed, resamples=resamples, level=level) for name in names
    }
    if "METEOR" in estimates:
        estimates["METEOR"] = replace(estimates["METEOR"], value=meteor_value)
    num_empty = sum(not output.strip() for output in outputs)
    items = {name: ItemStatistics(statistics[name], _SCORES[name]) for name in names}
    return Scores(estimates, absent, len(outputs), sum(map(len, references)), num_empty, items)


def available_metrics() -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the metrics this machine can compute, and for the others why not."""
    try:
        meteor_command()
    except (MissingExtraError, EvaluationError) as reason:
        return tuple(name for name in METRICS if name != "METEOR"), {"METEOR": str(reason)}
    return METRICS, {}


def _statistics(
    references: Sequence[Sequence[str]], outputs: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, Statistics], float]:
    """Return what each metric sums over items, and METEOR's own total (NaN where it was not asked for)."""
    _check(references, outputs, names)
    statistics: dict[str, Statistics] = {}
    meteor_value = float("nan")
    if {"BLEU", "NIST"} & set(names):
        words = _words(mteval_words, references, outputs)
        statistics["BLEU"], statistics["NIST"] = bleu_and_nist_statistics(*words)
    if {"METEOR", "ROUGE_L", "CIDEr"} & set(names):
        reference_words, output_words = _words(ptb_words, references, outputs)
        statistics["ROUGE_L"] = ratio_statistics([*map(rouge_l, reference_words, output_words)])
        statistics["CIDEr"] = ratio_statistics(cider_d(reference_words, output_words))
        if "METEOR" in names:
            statistics["METEOR"], meteor_value = meteor_statistics(reference_words, output_words)
    return statistics, meteor_value


def _words(
    cut: Callable[[str], tuple[str, ...]], references: Sequence[Sequence[str]], outputs: Sequence[str]
) -> tuple[list[list[tuple[str, ...]]], list[tuple[str, ...]]]:
    return [[cut(text) for text in texts] for texts in references], [cut(text) for text in outputs]


def _check(references: Sequence[Sequence[str]], outputs: Sequence[str], names: Sequence[str]) -> None:
    unknown = sorted(set(names) - set(METRICS))
    if unknown:
        raise EvaluationError(f"metrics: expected names from {', '.join(METRICS)}, got {unknown}: choose among these")
    if len(references) != len(outputs):
        raise EvaluationError(
            f"expected one output for each of {len(references)} items, got {len(outputs)}: "
            "decode every unique meaning representation once, in the order of the references"
        )
    without = [index for index, texts in enumerate(references) if not texts]
    if without:
        raise EvaluationError(
            f"item {without[0] + 1}: expected a reference, got none: give at least one human text per item"
        )
    if not any(output.strip() for output in outputs):
        raise EvaluationError(
            f"expected an output with text, all {len(outputs)} are empty: check the adapter and the prompts"
        )
